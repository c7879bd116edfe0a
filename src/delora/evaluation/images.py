"""Likeness of pictures to a subject's photographs and to a prompt: cosines of features, and the words a classifier sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer, CLIPModel

from delora.training.models import ModelError, loading

__all__ = ["Encoder", "Words", "own_pairs", "pairs"]


class Encoder:
    """Features of pictures and, for a CLIP, of texts, each of norm one.

    For a CLIP they are its projected features; for any other vision transformer (DINO, DINOv2) the class token after the last
    norm; for a convolutional network the mean over the picture.
    """

    def __init__(self, name: str, device: torch.device, instead: str = "model=FOLDER") -> None:
        self.name, self.device = name, device
        self.model: nn.Module = loading(AutoModel, name, instead, dtype=torch.float32).to(device).eval()
        self.processor = loading(AutoImageProcessor, name, instead)
        self.tokenizer = loading(AutoTokenizer, name, instead) if isinstance(self.model, CLIPModel) else None

    @torch.no_grad()
    def images(self, pictures: Sequence[Any], batch: int = 32) -> Tensor:
        """The features of pictures [pictures, features]."""
        features = []
        for start in range(0, len(pictures), batch):
            pixels = self.processor(list(pictures[start : start + batch]), return_tensors="pt")["pixel_values"].to(self.device)
            if isinstance(self.model, CLIPModel):
                features.append(_unit(_tensor(self.model.get_image_features(pixel_values=pixels))))
            else:
                last = self.model(pixel_values=pixels).last_hidden_state
                features.append(_unit(last[:, 0] if last.ndim == 3 else last.mean((2, 3))))
        return torch.cat(features)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """The features of texts [prompts, features]; for a CLIP alone."""
        assert self.tokenizer is not None
        batch = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        model: Any = self.model
        return _unit(_tensor(model.get_text_features(**batch)))


class Words:
    """Which words of a prompt a picture shows, by a classifier whose labels are words, each with its own probability."""

    def __init__(self, name: str, device: torch.device, instead: str = "model=FOLDER") -> None:
        self.device = device
        self.model = loading(AutoModelForImageClassification, name, instead, dtype=torch.float32).to(device).eval()
        self.processor = loading(AutoImageProcessor, name, instead)
        self.known = {word: i for i, word in self.model.config.id2label.items()}
        kind = self.model.config.problem_type
        if kind != "multi_label_classification":
            raise ModelError(f"{name} does not give each label a probability of its own: its problem_type is {kind!r}")

    @torch.no_grad()
    def logits(self, pictures: Sequence[Any], batch: int = 64) -> Tensor:
        """The logits [pictures, words]; above zero a word is more probable than not."""
        logits = []
        for start in range(0, len(pictures), batch):
            pixels = self.processor(list(pictures[start : start + batch]), return_tensors="pt")["pixel_values"].to(self.device)
            logits.append(self.model(pixel_values=pixels).logits.cpu())
        return torch.cat(logits)

    def shown(self, pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """1 or 0 for each word of each prompt that the classifier knows: whether the picture of that prompt shows it."""
        visible = self.logits(pictures) > 0
        known = [[self.known[word] for word in prompt.split() if word in self.known] for prompt in prompts]
        return torch.cat([visible[i, words].float() for i, words in enumerate(known)])


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers 5 returns the latter


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float().cpu(), dim=-1)


def pairs(references: Tensor, made: Tensor) -> Tensor:
    """The cosine of every reference with every picture made, in one row.

    >>> pairs(torch.eye(2), torch.tensor([[0.6, 0.8]])).tolist() == torch.tensor([0.6, 0.8]).tolist()
    True
    """
    return (references @ made.T).flatten()


def own_pairs(references: Tensor) -> Tensor:
    """The cosines of all ordered pairs of different references: the likeness of real photographs of one subject.

    >>> own_pairs(torch.eye(3)).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    n = len(references)
    return (references @ references.T)[~torch.eye(n, dtype=torch.bool)]
