"""What has to hold of the library on every model: the laws, and the outcome of each.

right     it holds
named     it holds but for layers that the library itself named, in a warning or in ``str(delora.summary(model))``
refused   an error in words, raised by the library, that names the layer or says what to do
wrong     anything else: other numbers, a layer passed over in silence, an error from deep inside
skipped   nothing can be asked: the base model, transformers or PEFT cannot do the same without this library, or the type's
          time had passed
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import delora
from delora.errors import UserError
from delora.formats.files import AdapterError
from delora.hosts import Slot
from delora.models import adapted_layers, adapters, places, walk
from tests.zoo.inputs import run

__all__ = ["LAWS", "Outcome", "check"]

Kind = Literal["right", "named", "refused", "wrong", "skipped"]
TOLERANCE = 1e-4  # of the largest number in an output
LAWS = {
    "inject": "goes into a model by all-linear",
    "left out": "every matrix that the model multiplies by has an adapter, or is named",
    "start": "starts at the base",
    "gradients": "every adapter gets a gradient, or is named as left out or never run",
    "merged": "merged = adapted",
    "saved": "saved and loaded = adapted",
    "reloaded": "merged, save_pretrained, from_pretrained = adapted",
    "peft": "exported and read by PEFT = adapted",
}


@dataclass(frozen=True)
class Outcome:
    """How a law came out, with the words that say why where it is not right."""

    kind: Kind
    words: str = ""


RIGHT = Outcome("right")


def wrong(words: str) -> Outcome:
    return Outcome("wrong", words)


def skipped(words: str) -> Outcome:
    return Outcome("skipped", words)


def of_error(error: Exception) -> Outcome:
    """Refused, if the library raised it on purpose and in words; else wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(last.filename).is_relative_to(Path(delora.__file__).parent)
    if own and isinstance(error, (ValueError, TypeError, AdapterError, UserError)) and len(str(error)) > 20:
        return Outcome("refused", f"{type(error).__name__}: {str(error)[:300]}")
    return wrong(f"{type(error).__name__}: {str(error)[:300]} [{Path(last.filename).name}:{last.lineno}]")


# ---------------------------------------------------------------- what the library said


class Said:
    """All that the library told the user: its warnings, and a model's summary."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                own = str(Path(delora.__file__).parent)
                self.texts += [str(w.message) for w in caught if w.filename.startswith(own) or "delora" in str(w.message)]
                self.texts += [str(w.message) for w in caught if w.filename.startswith(str(Path(__file__).parent))]

    def summary(self, model: nn.Module) -> None:
        self.texts.append(str(delora.summary(model)))

    def names(self, name: str, kind: str = "") -> bool:
        """Whether a text holds the name of a layer or of a parameter, of what holds it, or its name without the numbers; or
        counts the layers of its class (``2 MixtralExperts ..., such as 'layers.0.experts'``)."""
        text = "\n".join(self.texts)
        if kind and re.search(rf"\d+ {re.escape(kind)}\b", text):
            return True
        owner = name.rpartition(".")[0]
        forms = [n for n in (name, owner) if n.count(".") or n == name]
        patterns = [
            re.sub(r"(?<=\\\.)\d+(?=\\\.|$)|^\d+(?=\\\.)", r"(\\d+|\\W{1,5}|\\{?\\w\\}?|\\S*[*,-]\\S*)", re.escape(n))
            for n in forms
        ]
        return any(re.search(rf"(?<![\w.]){p}(?![\w])", text) for p in patterns)

    def counts(self, least: int) -> bool:
        """Whether a text says of so many adapted layers at once that they did not run (and names some of them)."""
        return any(int(n) >= least for text in self.texts for n in re.findall(r"(\d+) of \d+ adapted layers did not run", text))


# ---------------------------------------------------------------- measuring


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    ok = b.isfinite()
    return ((a - b)[ok].abs().max() / b[ok].abs().max().clamp(min=1e-12)).item() if ok.any() else 0.0


class Multiplied(TorchDispatchMode):
    """Watches a forward for the parameters that inputs are multiplied by, whoever reads them and from whatever view."""

    SECOND = {"mm": 1, "addmm": 2, "bmm": 1, "baddbmm": 2, "linear": 1, "matmul": 1, "_grouped_mm": 1, "mv": 0, "dot": 1}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owners: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.ndim > 1:
                self.owners.setdefault(p.untyped_storage().data_ptr(), []).append(name)
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        place = self.SECOND.get(func.overloadpacket.__name__)
        weight = args[place] if place is not None and place < len(args) else None
        if isinstance(weight, Tensor) and weight.untyped_storage().data_ptr() in self.owners:
            self.found.add(weight.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))

    def names(self) -> list[list[str]]:
        """The parameters' names; a parameter in several places has several."""
        return [self.owners[where] for where in self.found]


def of_head(model: nn.Module) -> set[str]:
    """The modules that put out the answer of a transformers model, which all-linear leaves as they are: those outside its base
    model and, where the class has none, the linear layers beside its parts."""
    base = getattr(model, "base_model", model)
    inside = {id(m) for m in base.modules()} if isinstance(base, nn.Module) else set()
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except Exception:
        head = None
    found = {name for name, m in walk(model) if id(m) not in inside or m is head}
    if base is model and "For" in type(model).__name__:
        for name, m in model.named_children():
            if isinstance(m, (nn.Linear, nn.Sequential, nn.ModuleList)):
                found |= {name, *(f"{name}.{n}" for n, part in m.named_modules() if isinstance(part, nn.Linear))}
    return found


def convolutions(model: nn.Module) -> list[str]:
    """The names of convolutions that have room for a change of rank 4."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [n for n, m in walk(model) if type(m) in kinds and m.groups == 1 and min(m.weight.flatten(1).shape) >= 4]


def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    y = run(model, inputs)
    y = y[y.isfinite()]
    return (y * torch.randn(len(y), generator=torch.Generator().manual_seed(2))).sum()


def perturb(model: nn.Module, layers: Mapping[str, Any] | None = None) -> None:
    """Adapters (all, or those of some layers) as after some training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in (adapted_layers(model) if layers is None else layers).values():
            for adapter in layer.adapters.values():
                for key, p in adapter.named_parameters():
                    if key.rpartition(".")[2] == "lam":
                        p.mul_(1.3)
                    else:
                        p.add_(0.5 * (p.std() if p.numel() > 1 else p.abs()) * torch.randn_like(p))


# ---------------------------------------------------------------- the laws


@dataclass
class Zoo:
    """A base model, its inputs and tolerance, and what the laws share of its adapted copies."""

    base: nn.Module
    inputs: dict[str, Any]
    end: float
    tolerance: float = TOLERANCE
    said: Said = field(default_factory=Said)
    targets: str | list[str] = "all-linear"

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def injected(self) -> nn.Module:
        with self.said.listening():
            model = delora.inject(self.fresh(), delora.DeLoRA(r=4, lam=4.0), self.targets)
        return model

    def equal(self, y: Tensor, want: Tensor, model: nn.Module, words: str = "") -> Outcome:
        """Right, if two outputs of a model with these weights are one but for rounding.

        A router, a codebook or an argmax that stands between two choices takes another one by rounding alone, on one processor
        and not on the next: where the outputs differ, the model itself is asked how far more draws of rounding move it. If they
        move it as far, nothing can be asked of it.
        """
        if (d := gap(y, want)) <= self.tolerance:
            return RIGHT
        if d <= 10 * (noise := self.noise(model, draws=8)):
            return skipped(f"gap {d:.1e}, but rounding alone moves the output by {noise:.1e}")
        return wrong(f"gap {d:.1e}{words}")

    def noise(self, model: nn.Module, draws: int = 1) -> float:
        """How far rounding alone moves the output: of a second run, and of weights that differ in their last digits."""
        first = run(model, self.inputs)
        gaps = [gap(run(model, self.inputs), first)]
        for _ in range(draws):
            shaken = copy.deepcopy(model)
            for p in shaken.parameters():
                if p.is_floating_point():
                    p.mul_(1 + 1e-6 * torch.randn_like(p))
            gaps.append(gap(run(shaken, self.inputs), first))
        return max(gaps)


def check(base: nn.Module, inputs: dict[str, Any], seconds: float = 60.0) -> Iterator[tuple[str, Outcome]]:
    """Every law with its outcome, one after the other; laws that would begin after the time are skipped."""
    zoo = Zoo(base, inputs, time.process_time() + seconds)

    def ask(law: Callable[[], Outcome]) -> Outcome:
        if time.process_time() > zoo.end:
            return skipped(f"more than {seconds:g} seconds had passed")
        try:
            with torch.no_grad():
                return law()
        except Exception as error:
            return of_error(error)

    with torch.no_grad():
        zoo.tolerance = max(TOLERANCE, 10 * zoo.noise(base))
        original = run(base, inputs)
    outcome = RIGHT
    try:
        model = zoo.injected()
    except Exception as error:
        outcome = of_error(error)
    found = convolutions(base) if outcome.kind == "refused" else []
    if found:  # nothing is linear: the other laws are asked of the convolutions, by their names
        zoo.targets = found
        try:
            model = zoo.injected()
        except Exception as error:
            outcome, found = of_error(error), []
    yield "inject", outcome
    if outcome.kind != "right" and not found:
        return
    yield "left out", ask(lambda: _left_out(zoo, model))
    yield "start", ask(lambda: zoo.equal(run(model, inputs), original, base))
    yield "gradients", ask(lambda: _gradients(zoo))
    perturb(model)
    try:
        with torch.no_grad(), zoo.said.listening():
            adapted = run(model, inputs)
        zoo.said.summary(model)
    except Exception as error:
        yield "merged", of_error(error)
        return
    yield "merged", ask(lambda: _with_way_out(partial(_merged, zoo, model, original, adapted)))
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder)
        yield "saved", ask(lambda: _saved(zoo, model, adapted, to))
        yield "reloaded", ask(lambda: _with_way_out(partial(_reloaded, zoo, model, adapted, to)))
        yield "peft", ask(lambda: _peft(zoo, model, adapted, to))


def _left_out(zoo: Zoo, model: nn.Module) -> Outcome:
    with Multiplied(zoo.base) as watch:
        run(zoo.base, zoo.inputs)
    zoo.said.summary(model)
    # An adapter of a parameter is on the module that owns it, whatever the library calls it.
    adapted, head = set(adapted_layers(model)), of_head(zoo.base)
    adapted |= {name for name, m in model.named_modules() if not name.endswith("base") and getattr(m, "adapters", None)}
    looked_up = {name for name, m in walk(zoo.base) if isinstance(m, nn.Embedding)}
    passed = []
    for names in watch.names():
        owners = [n.rpartition(".")[0] for n in names]
        if not any(o in adapted or o in head or o in looked_up for o in owners):
            passed.append(names)
    kinds = {n: type(m).__name__ for n, m in zoo.base.named_modules(remove_duplicate=False)}
    if zoo.targets != "all-linear":
        return skipped("adapted by the names of convolutions")
    silent = [ns[0] for ns in passed if not any(zoo.said.names(n, kinds.get(n.rpartition(".")[0], "")) for n in ns)]
    if silent:
        return wrong(f"{len(silent)} matrices without an adapter, never named: {_list(silent)}")
    return Outcome("named", _list(names[0] for names in passed)) if passed else RIGHT


def _list(names: Iterable[str], most: int = 4) -> str:
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _gradients(zoo: Zoo) -> Outcome:
    """In training mode an adapter has a gradient wherever the layer's own weight has one."""
    plain, model, said = zoo.fresh().train().requires_grad_(False), zoo.injected().train(), zoo.said
    layers, called = adapted_layers(model), set()
    for name, module in walk(plain):
        if name in layers:
            for p in _weights(module):
                p.requires_grad_(True)
    with torch.enable_grad():
        try:
            total = loss(plain, zoo.inputs)
            if total.requires_grad:
                total.backward()
        except Exception as error:
            return skipped(f"the base model cannot train these layers itself: {type(error).__name__}: {str(error)[:100]}")
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        there, owner = places(plain), {}
        for n, layer in layers.items():
            for part, _, _ in layer.adapters["default"].each(n, layer.base):  # type: ignore[operator]
                owner[part] = n
        sizes = {n: max((g.abs().max().item() for g in _gradients_of(there[n])), default=0.0) for n in owner}
        least = max(1e-7, 1e-6 * max(sizes.values(), default=0.0))  # less is what rounding leaves of zero
        grown = {n for n, size in sizes.items() if size > least}
        wanted = {owner[n] for n in grown}
        with said.listening():
            total = loss(model, zoo.inputs)
            if total.requires_grad or wanted:
                total.backward()
        said.summary(model)
    # The projection of an attention layer whose weight is read there runs with it, also where the result is not used.
    called |= {n for n, layer in layers.items() if layer.ran and n.rpartition(".")[0] in called}
    # A module with several matrices has adapters for each: of experts, those that no token reaches have no gradient.
    trained = {n: [p for p in placed.parameters() if p.requires_grad] for n, placed in adapters(model).items()}
    dead_parts = {n for n, ps in trained.items() if not all(p.grad is not None and p.grad.any() for p in ps)}
    lost = {owner[n] for n in dead_parts & grown}
    dead = layers.keys() - {owner[n] for n in trained.keys() - dead_parts}
    bypassed = {n for n in lost if n not in called}
    cut = lost - bypassed
    never = _without_effect(zoo, model, dead - wanted - called)
    silent = {n for n in lost if not said.names(n)}
    if not said.counts(len(never)):
        silent |= {n for n in never if not said.names(n)}
    for words, names in (("bypassed", bypassed), ("ran without a gradient", cut), ("never ran", never)):
        if found := names & silent:
            return wrong(f"{len(found)} of {len(layers)} {words}, never named: {_list(found)}")
    if not layers.keys() - dead:
        return skipped("no layer ran with a gradient")
    return Outcome("named", _list(bypassed | cut | never)) if bypassed | cut | never else RIGHT


def _without_effect(zoo: Zoo, model: nn.Module, names: set[str]) -> set[str]:
    """Those layers whose adapters change nothing: the others are not called, but their weights are read by their parents."""
    if not names:
        return names
    layers = {n: layer for n, layer in adapted_layers(model).items() if n in names}
    before = run(model, zoo.inputs)
    perturb(model, layers)
    if gap(run(model, zoo.inputs), before) <= zoo.tolerance:
        return names
    found = set()
    for name, layer in layers.items():
        before = run(model, zoo.inputs)
        perturb(model, {name: layer})
        if gap(run(model, zoo.inputs), before) <= zoo.tolerance:
            found.add(name)
    return found


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.ndim > 1]


def _gradients_of(place: Any) -> list[Tensor]:
    """The gradients of a layer's matrices, or of one matrix in a parameter."""
    if isinstance(place, Slot):
        g = getattr(place.owner, place.key).grad
        return [] if g is None else [g if place.index is None else place.layout.apart(place.owner, g)[place.index]]
    return [p.grad for p in _weights(place) if p.grad is not None]


def _with_way_out(law: Callable[..., Outcome]) -> Outcome:
    """A law of a merge. Where the library refuses layers that never ran and says ``unused=True``, that is tried as well."""
    try:
        return law()
    except ValueError as error:
        refused = of_error(error)
        if refused.kind != "refused" or "unused=True" not in str(error):
            raise
        then = law(unused=True)
        return Outcome("refused", f"{refused.words}; with unused=True: {then.kind} {then.words}".strip())


def _merged(zoo: Zoo, model: nn.Module, original: Tensor, adapted: Tensor, **more: Any) -> Outcome:
    with zoo.said.listening(), delora.merged(model, **more):
        y = run(model, zoo.inputs)
    if not torch.equal(after := run(model, zoo.inputs), adapted) and gap(after, adapted) > zoo.tolerance:
        return wrong(f"after merged() the adapted model is another: gap {gap(after, adapted):.1e}")
    if gap(adapted, original) <= 1e-6:
        return skipped("no adapted layer runs")
    return zoo.equal(y, adapted, model, f" of a change of {gap(adapted, original):.1e}")


def _saved(zoo: Zoo, model: nn.Module, adapted: Tensor, to: Path) -> Outcome:
    delora.save(model, to / "adapter")
    return zoo.equal(run(delora.load(zoo.fresh(), to / "adapter"), zoo.inputs), adapted, model)


def _trip(model: nn.Module, to: Path, inputs: dict[str, Any]) -> tuple[Tensor, list[str]]:
    """The output of a model that was saved and read back by the library it is of, and what its file lacked."""
    model.save_pretrained(to)  # type: ignore[operator]
    back, info = type(model).from_pretrained(to, output_loading_info=True)  # type: ignore[attr-defined]
    return run(back.float().eval(), inputs), sorted(info.get("missing_keys", ()))


def _reloaded(zoo: Zoo, model: nn.Module, adapted: Tensor, to: Path, **more: Any) -> Outcome:
    if not hasattr(model, "save_pretrained"):
        return skipped("it has no save_pretrained")
    copied = copy.deepcopy(model)
    with zoo.said.listening():
        merged = delora.merge(copied, **more)
    try:
        y, missing = _trip(merged, to / "merged", zoo.inputs)
        result = zoo.equal(y, adapted, model, f", missing in the file: {_list(missing)}" if missing else "")
    except Exception as error:
        result = wrong(f"{type(error).__name__}: {str(error)[:200]}")
    if result.kind in ("right", "skipped"):
        return result
    try:
        if (d := gap(_trip(zoo.fresh(), to / "base", zoo.inputs)[0], run(zoo.base, zoo.inputs))) > zoo.tolerance:
            return skipped(f"the base model itself reads back otherwise: gap {d:.1e}")
    except Exception as error:
        return skipped(f"the base model itself cannot be saved and read: {type(error).__name__}: {str(error)[:150]}")
    return result


def _peft(zoo: Zoo, model: nn.Module, adapted: Tensor, to: Path) -> Outcome:
    import peft

    said = Said()
    with said.listening():
        delora.export.peft(model, to / "peft")
    try:
        y = run(peft.PeftModel.from_pretrained(zoo.fresh(), to / "peft").eval(), zoo.inputs)
        result = zoo.equal(y, adapted, model)
    except Exception as error:
        result = wrong(f"{type(error).__name__}: {str(error)[:200]}")
    if result.kind in ("right", "skipped"):
        return result
    if any(map(said.names, adapted_layers(model))):
        return Outcome("named", _list(filter(said.names, adapted_layers(model))))
    try:
        torch.manual_seed(11)
        config = peft.LoraConfig(r=2, target_modules=list(adapted_layers(model)), init_lora_weights=False)
        own = peft.get_peft_model(zoo.fresh(), config).eval()
        own.save_pretrained(to / "own")
        want = run(own, zoo.inputs)
        torch.manual_seed(12)  # what it does not read must not be right by chance
        d = gap(run(peft.PeftModel.from_pretrained(zoo.fresh(), to / "own").eval(), zoo.inputs), want)
    except Exception as error:
        return skipped(f"PEFT cannot adapt these layers itself: {type(error).__name__}: {str(error)[:150]}")
    too = f"it misreads its own LoRA of these layers too, gap {d:.0e}" if d > zoo.tolerance else "it reads its own LoRA of them"
    return wrong(f"{result.words} (PEFT: {too})")
