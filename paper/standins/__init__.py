"""Small models on real data, in place of the paper's. They run anywhere; no score on them is comparable with the paper's.

====================  ==================================================================================
``digits``            a small vision transformer on turned digits: its data, its training, one run
``fashion``           clothes with captions, subjects and label maps, from Fashion-MNIST
``text_to_image``     pretrains a small text-to-image model on these clothes, and the models that judge its pictures
``weights/fashion``   that model and its judges, with a card
``dinov2``            a packaged DINOv2 as a folder of transformers; it judges likeness
``packages``          the packages that hold what is not in the library's own
``drawing``           some rows of data, as a user of `delora finetune` has them
``prepare``           makes the folders that the recipes name: ``python -m paper.standins.prepare``
``recipes/``          recipes for `delora train`: ``fashion-*`` (images), ``sentences``, ``ratings``, ``smollm2`` (text)
====================  ==================================================================================
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PREPARED = ROOT / "runs" / "prepared"  # where `prepare` puts the folders that the recipes name
