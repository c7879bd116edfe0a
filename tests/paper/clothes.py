"""The real pictures of clothes, for the tests that need them."""

from __future__ import annotations

import shutil

import pytest

from delora.data.fashion import PACKAGE
from delora.data.packages import PACKAGES, cache

_known = any(cache().glob(f"{PACKAGE}[-_]*"))  # unpacked, or put there by hand
needed = pytest.mark.skipif(
    not _known and shutil.which("apt-get") is None,
    reason=f"Fashion-MNIST comes in a package of Debian, {PACKAGES[PACKAGE].file}, and there is no apt-get here",
)
