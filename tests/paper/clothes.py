"""The real pictures of clothes, for the tests that need them."""

from __future__ import annotations

import shutil

import pytest

from delora.data.packages import cache
from paper.standins.packages import FASHION_MNIST

_known = any(cache().glob(f"{FASHION_MNIST.name}[-_]*"))  # unpacked, or put there by hand
needed = pytest.mark.skipif(
    not _known and shutil.which("apt-get") is None,
    reason=f"Fashion-MNIST comes in a package of Debian, {FASHION_MNIST.file}, and there is no apt-get here",
)
