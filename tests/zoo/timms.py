"""timm's families of models, without torchvision.

timm reads torchvision as it is imported, for pictures on disk and for data sets, which no model here needs; and the torchvision
of the package index does not import beside every build of torch. So timm is installed without what it depends on, in a folder
of its own (``pip install --no-deps --target .venv/timm timm``), where other libraries do not find it, and while it is imported
a package of empty classes stands in the place of torchvision if that cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["FAMILIES", "timm"]

FOLDER = Path(sys.prefix) / "timm"
FAMILIES = [
    *(
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
    ),
    *("resnet18", "resnetv2_50", "mixer_s32_224", "resmlp_12_224", "efficientvit_b0", "levit_128s", "pvt_v2_b0", "coat_tiny"),
    *("xcit_nano_12_p16_224", "cait_xxs24_224", "poolformer_s12", "maxvit_rmlp_pico_rw_256", "mobilevit_xxs", "regnetx_002"),
]


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn:
    """Finds a package and all modules in it, as modules whose every name is an empty class."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self.package else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


@contextmanager
def _stand_in(package: str) -> Iterator[None]:
    finder: Any = _StandIn(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


@cache
def timm() -> ModuleType | str:
    """The library, or the words why there is none."""
    sys.path.append(str(FOLDER))
    try:
        try:
            return importlib.import_module("timm")
        except (ImportError, RuntimeError):
            for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
                del sys.modules[name]
            with _stand_in("torchvision"):
                return importlib.import_module("timm")
    except ImportError as error:
        return f"timm is not installed in {FOLDER.name}/ of the environment: {error}"
    finally:
        sys.path.remove(str(FOLDER))
