"""How alike pictures are to a subject's photographs and to a prompt: cosines of features, words that are seen in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer, CLIPModel

from delora.training.models import ModelError, loading


class Encoder:
    """Unit features of pictures and, with a CLIP, of texts.

    A CLIP's are its projected ones; those of any other vision transformer (DINO, DINOv2) the class token after the last norm;
    those of a convolutional network the means over the picture.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.model: nn.Module = loading(AutoModel, name, dtype=torch.float32).to(device).eval()
        self.processor = loading(AutoImageProcessor, name)
        self.tokenizer = loading(AutoTokenizer, name) if isinstance(self.model, CLIPModel) else None

    @torch.no_grad()
    def images(self, pictures: Sequence[Any], batch: int = 32) -> Tensor:
        """[pictures, features], each of norm one."""
        found = []
        for start in range(0, len(pictures), batch):
            pixels = self.processor(list(pictures[start : start + batch]), return_tensors="pt")["pixel_values"].to(self.device)
            if isinstance(self.model, CLIPModel):
                found.append(_unit(_tensor(self.model.get_image_features(pixel_values=pixels))))
            else:
                last = self.model(pixel_values=pixels).last_hidden_state
                found.append(_unit(last[:, 0] if last.ndim == 3 else last.mean((2, 3))))
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[prompts, features], each of norm one; of a CLIP alone."""
        assert self.tokenizer is not None
        batch = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        model: Any = self.model
        return _unit(_tensor(model.get_text_features(**batch)))


class Words:
    """A classifier whose labels are words, each with a probability of its own: which of a prompt's words a picture shows."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = loading(AutoModelForImageClassification, name, dtype=torch.float32).to(device).eval()
        self.processor = loading(AutoImageProcessor, name)
        self.known = {word: i for i, word in self.model.config.id2label.items()}
        kind = self.model.config.problem_type
        if kind != "multi_label_classification":
            raise ModelError(f"{name} does not give each label a probability of its own: its problem_type is {kind!r}")

    @torch.no_grad()
    def logits(self, pictures: Sequence[Any], batch: int = 64) -> Tensor:
        """[pictures, words]; above zero a word is more probable than not."""
        found = []
        for start in range(0, len(pictures), batch):
            pixels = self.processor(list(pictures[start : start + batch]), return_tensors="pt")["pixel_values"].to(self.device)
            found.append(self.model(pixel_values=pixels).logits.cpu())
        return torch.cat(found)

    def shown(self, pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """1 or 0 for every word of every prompt that the classifier knows: whether the prompt's picture shows it."""
        seen = self.logits(pictures) > 0
        asked = [[self.known[word] for word in prompt.split() if word in self.known] for prompt in prompts]
        return torch.cat([seen[i, words].float() for i, words in enumerate(asked)])


def _tensor(seen: Any) -> Tensor:
    return seen if isinstance(seen, Tensor) else seen.pooler_output  # transformers 5 gives the latter


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float().cpu(), dim=-1)


def pairs(references: Tensor, made: Tensor) -> Tensor:
    """The cosine of every reference with every picture that was made, in one row."""
    return (references @ made.T).flatten()


def own_pairs(references: Tensor) -> Tensor:
    """The cosines of all ordered pairs of different references: what real photographs of one subject have."""
    n = len(references)
    return (references @ references.T)[~torch.eye(n, dtype=torch.bool)]
