"""Small models on real data, in the place of the paper's. They run anywhere; no number of theirs belongs beside the paper's.

====================  ==================================================================================
``digits``            a small vision transformer on turned digits
``fashion``           clothes with captions, subjects and label maps, out of Fashion-MNIST
``text_to_image``     a small text-to-image model, pretrained on these clothes (its weights: ``weights/fashion``)
``dinov2``            a packaged DINOv2, as a folder of transformers
``packages``          the packages that these are made from
``prepare``           makes the folders that the recipes name
``recipes/``          recipes of the ordinary kind over all of these
====================  ==================================================================================
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PREPARED = ROOT / "runs" / "prepared"  # where `prepare` puts the folders that the recipes name
WEIGHTS = Path(__file__).parent / "weights"
COMMAND = "python -m paper.standins.prepare"
