"""How well pictures follow their label maps, and how alike two sets of pictures are as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from delora.training.models import loading

UNLABELLED = -1


class Segmenter:
    """A semantic segmentation model of transformers."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model = loading(AutoModelForSemanticSegmentation, name, dtype=torch.float32).to(device).eval()
        self.processor, self.device = loading(AutoImageProcessor, name), device

    @torch.no_grad()
    def labels(self, picture: Any, size: tuple[int, int]) -> Tensor:
        """The class of every pixel [height, width], from 0."""
        pixels = self.processor(picture, return_tensors="pt")["pixel_values"].to(self.device)
        logits = self.model(pixel_values=pixels).logits.float().cpu()
        return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].argmax(0)


class Overlap:
    """mIoU and pixel accuracy, in [0, 1], from sums over all pictures.

    IoU_k = sum of the intersections / sum of the unions, over the pixels that have a label; the mean is over the classes that
    were predicted or labelled at all. Accuracy is the share of right pixels among those with a label.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [label, prediction]

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        seen = labels != UNLABELLED
        n = len(self.counts)
        self.counts += torch.bincount(labels[seen] * n + predicted[seen], minlength=n * n).reshape(n, n)

    def scores(self) -> dict[str, float]:
        both = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - both
        known = union > 0
        return {
            "miou": (both[known] / union[known]).mean().item(),
            "accuracy": (both.sum() / self.counts.sum()).item(),
        }


def frechet(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features [pictures, features]: FID, for the given features.

    M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017.
    """
    a, b = first.double(), second.double()
    if min(len(a), len(b)) < 2:
        raise ValueError("a Frechet distance needs two pictures or more on both sides")
    moved = (a.mean(0) - b.mean(0)).square().sum()
    s1, s2 = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = torch.linalg.eigvals(s1 @ s2).real.clamp_min(0).sqrt().sum()
    return max(0.0, (moved + s1.trace() + s2.trace() - 2 * root).item())


class Inception:
    """The 2,048 features of the Inception network that published FIDs use, through torch-fidelity."""

    def __init__(self, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"{error}: FID of Inception features needs pip install torch-fidelity", name=error.name
            ) from error
        self.model, self.device = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval(), device

    @torch.no_grad()
    def images(self, pictures: Sequence[Any]) -> Tensor:
        import numpy as np

        found = []
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(self.device)
            found.append(self.model(pixels)[0].cpu())
        return torch.cat(found)
