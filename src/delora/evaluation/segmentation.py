"""How well pictures follow their label maps, and the distance between two sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from delora.training.models import loading

__all__ = ["UNLABELLED", "Inception", "Overlap", "Segmenter", "frechet"]

UNLABELLED = -1


class Segmenter:
    """A semantic segmentation model of transformers.

    With ``scales`` it sees every picture with its shorter side resized to each of these, and the mean of its probabilities
    decides, as in CSAIL's semantic-segmentation-pytorch (300, 375, 450, 525, 600); else once, as its processor resizes it.
    """

    def __init__(self, name: str, device: torch.device, scales: Sequence[int] = ()) -> None:
        instead = "semantic_map.segmenter=FOLDER"
        self.model = loading(AutoModelForSemanticSegmentation, name, instead, dtype=torch.float32).to(device).eval()
        self.processor, self.device, self.scales = loading(AutoImageProcessor, name, instead), device, scales

    @torch.no_grad()
    def labels(self, picture: Any, size: tuple[int, int]) -> Tensor:
        """The class of every pixel [height, width], from 0."""
        if not self.scales:
            return self._logits(picture, size).argmax(0)
        total = torch.zeros(())
        for scale in self.scales:
            factor = scale / min(picture.size)
            resized = picture.resize([round(factor * side) for side in picture.size], Image.Resampling.BILINEAR)
            total = total + self._logits(resized, size, do_resize=False).softmax(0)
        return total.argmax(0)

    def _logits(self, picture: Any, size: tuple[int, int], **options: bool) -> Tensor:
        """[classes, height, width] of the picture, as large as ``size``."""
        pixels = self.processor(picture, return_tensors="pt", **options)["pixel_values"].to(self.device)
        logits = self.model(pixel_values=pixels).logits.float().cpu()
        return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]


class Overlap:
    """mIoU and pixel accuracy, in [0, 1], from counts summed over all pictures.

    IoU_k = sum of the intersections / sum of the unions, over the pixels that have a label; mIoU is the mean over the classes
    that occur among predictions or labels. Accuracy is the share of correct pixels among those with a label.

    >>> overlap = Overlap(classes=2)
    >>> overlap.add(predicted=torch.tensor([0, 0, 1, 1]), labels=torch.tensor([0, 1, 1, UNLABELLED]))
    >>> {name: round(value, 2) for name, value in overlap.scores().items()}
    {'miou': 0.5, 'accuracy': 0.67}
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [label, prediction]

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        labelled = labels != UNLABELLED
        n = len(self.counts)
        self.counts += torch.bincount(labels[labelled] * n + predicted[labelled], minlength=n * n).reshape(n, n)

    def scores(self) -> dict[str, float]:
        both = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - both
        known = union > 0
        return {
            "miou": (both[known] / union[known]).mean().item(),
            "accuracy": (both.sum() / self.counts.sum()).item(),
        }


def frechet(first: Tensor, second: Tensor) -> float:
    """The Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features [pictures, features].

    m are the means, S the covariances. With features of `Inception` it is the FID: M. Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017.

    >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
    >>> round(frechet(features, features), 4), round(frechet(features, features + torch.tensor([3.0, 4.0])), 4)
    (0.0, 25.0)
    """
    a, b = first.double(), second.double()
    if min(len(a), len(b)) < 2:
        raise ValueError("a Frechet distance needs two pictures or more on both sides")
    moved = (a.mean(0) - b.mean(0)).square().sum()
    s1, s2 = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = torch.linalg.eigvals(s1 @ s2).real.clamp_min(0).sqrt().sum()
    return max(0.0, (moved + s1.trace() + s2.trace() - 2 * root).item())


class Inception:
    """The 2,048 features of the Inception network on which published FIDs are computed, through torch-fidelity."""

    def __init__(self, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"{error}: the FID of Inception features needs pip install torch-fidelity", name=error.name
            ) from error
        self.model, self.device = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval(), device

    @torch.no_grad()
    def images(self, pictures: Sequence[Any]) -> Tensor:
        import numpy as np

        features = []
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(self.device)
            features.append(self.model(pixels)[0].cpu())
        return torch.cat(features)
