"""Measures an adapter's change: its distance from the base, its share of the bound, its number of directions.

A low-rank change is measured from its small factors, without building an [out, in] matrix.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from delora.ambient import put_aside
from delora.frozen import Frozen, given
from delora.hosts.base import by_rows
from delora.layer import Placed
from delora.meeting import collective, meet
from delora.methods.base import bound, reachable
from delora.models import adapters
from delora.sharded import numbers
from delora.updates import LowRank
from delora.zero import full_shape

__all__ = ["LayerReport", "Recorder", "changing", "column_norms", "distances", "inspect", "report", "singular_values"]

T = TypeVar("T")


@torch.no_grad()
def singular_values(update: LowRank) -> Tensor:
    """The singular values of up @ down, largest first, in float64, from the triangular factors of both.

    >>> singular_values(LowRank(up=2 * torch.eye(3, 2), down=torch.eye(2, 5)))
    tensor([2., 2.], dtype=torch.float64)
    """
    return update.svd()[1]  # the terms that cancel (a subtracted start) do so in its [k, k] core


def _here(measure: Callable[[Placed], T]) -> Callable[[Placed], T]:
    """Let the tensors of a layer and its adapter be here while they are measured, whatever is set around the call."""

    @functools.wraps(measure)
    def measured(adapter: Placed) -> T:
        with put_aside(), adapter.here():
            return measure(adapter)

    return measured


@_here
@torch.no_grad()
def _changed(adapter: Placed) -> tuple[float, float, Tensor | None] | None:
    """|W' - W|_F, |W|_F, and the singular values of W' - W if it is low-rank (else None); None if no weight changes.

    A change that is not low-rank is measured from the matrices, and that of the bias counts with it.
    """
    if adapter.whole:
        base, new = dict(adapter.base.named_parameters()) | dict(adapter.base.named_buffers()), adapter.at_strength()
        pairs = [(numbers(base[k]).double(), t.double()) for k, t in new.items() if t.is_floating_point()]
        return _norm(new - old for old, new in pairs), _norm(old for old, _ in pairs), None
    host, W = adapter.host, adapter.frozen
    with host.held():
        update, b = adapter.update(), host.bias()
        factors = given(update.low_rank, W)
        if factors is not None:
            spectrum = singular_values(factors)
            return _norm([spectrum]), W.norm().item(), spectrum
        if not adapter.mergeable(update):
            return None
        new_b = update.bias(b)
        change = _norm(part.merge(block) - block for _, block, part in by_rows(update, W))
        if new_b is not None:
            change = math.hypot(change, _norm([new_b if b is None else new_b - b]))
        return change, math.hypot(W.norm().item(), 0.0 if b is None else _norm([b])), None


def _share(change: float, base: float) -> float:
    return change / base if base else math.inf if change else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(t).item() for t in tensors))


@collective
def distances(model: nn.Module, name: str | None = None) -> dict[str, float]:
    """|W' - W|_F / |W|_F of every layer of an adapter (the active one, if ``name`` is None) at its current strength.

    It is computed from the factors if the change is low-rank, else from the matrices. A bias that changes counts as a part
    of W. Layers where no weight changes, because the method edits the output, are left out.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(blocks=4), ["0"])
    >>> {layer: round(d, 4) for layer, d in delora.distances(model).items()}  # W' = -W
    {'0': 2.0}
    """
    changed = {layer: _changed(adapter) for layer, adapter in adapters(model, name).items()}
    return {layer: _share(c[0], c[1]) for layer, c in changed.items() if c is not None}


@dataclass(frozen=True)
class LayerReport:
    """One layer's change. All norms but ``spectral`` are Frobenius norms; None means that a number does not exist.

    ``distance`` is |W' - W|, ``relative`` divides it by |W|, ``spectral`` is the largest singular value of W' - W. If the
    change is not low-rank, ``spectral`` and ``effective_rank`` are None.

    ``effective_rank`` is exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007).
    ``bound`` is the bound of ``distance`` that the method guarantees, ``bound_used`` is distance / bound; ``reachable`` is
    the distance for orthogonal terms, which training reaches long before the bound, and ``reach`` divides it by |W|.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), delora.LoRA(r=2), ["0"])
    >>> r = delora.diagnostics.inspect(model)["0"]
    >>> r.shape, r.parameters, r.distance, r.bound
    ((3, 4), 14, 0.0, None)
    """

    method: str
    shape: tuple[int, ...] | None
    parameters: int
    r: int | None
    lam: float | None
    distance: float | None
    relative: float | None
    bound: float | None
    bound_used: float | None
    reachable: float | None
    reach: float | None
    spectral: float | None
    effective_rank: float | None


@_here
@torch.no_grad()
def report(adapter: Placed) -> LayerReport:
    """Measure the change of one layer's adapter.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> round(report(model[0].adapter).effective_rank, 4)  # one reflection
    1.0
    """
    change, base, spectrum = _changed(adapter) or (None, 0.0, None)
    lam = getattr(adapter, "lam", None)
    unscaled = bound(adapter.method, adapter.numbers()) if not adapter.whole else None
    limit = None if unscaled is None else unscaled.item() * adapter.strength
    size = reachable(adapter.method, adapter.numbers()) if not adapter.whole else None
    expected = None if size is None else size.item() * adapter.strength
    effective = None
    if spectrum is not None:
        share = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
        effective = torch.special.entr(share).sum().exp().item() if change else 0.0
    return LayerReport(
        method=str(adapter.method),
        shape=adapter.host.shape if not adapter.whole else None,
        parameters=sum(full_shape(p).numel() for p in adapter.parameters()),
        r=getattr(adapter.method, "r", None),
        lam=None if lam is None else numbers(lam).item(),
        distance=change,
        relative=None if change is None else _share(change, base),
        bound=limit,
        bound_used=change / limit if change is not None and limit else None,
        reachable=expected,
        reach=None if expected is None else _share(expected, base),
        spectral=None if spectrum is None else spectrum[0].item(),
        effective_rank=effective,
    )


@collective
def inspect(model: nn.Module, name: str | None = None) -> dict[str, LayerReport]:
    """A `LayerReport` of every layer of an adapter (the active one, if ``name`` is None).

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2, lam=3.0), ["0"])
    >>> inspect(model)["0"].lam
    3.0
    """
    return {layer: report(adapter) for layer, adapter in adapters(model, name).items()}


@torch.no_grad()
def column_norms(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The norm of every input column of the named layers' frozen weights (Figure 4 of the paper).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> column_norms(model, ["0"])
    {'0': tensor([1., 1.])}
    """
    from delora.hosts import host
    from delora.models import walk

    modules = dict(walk(model))
    return {n: Frozen(host(getattr(modules[n], "base", modules[n]))).column_norms() for n in names}


def changing(model: nn.Module, layers: Sequence[str]) -> dict[str, Placed]:
    """The adapters of layers for a `Recorder`, each by the end of its name: of the last parts that no other layer shares.

    Raises:
        ValueError: one of them is not an adapted layer whose weights change, or more than one.

    >>> import delora
    >>> changing(delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"]), ["1"])
    Traceback (most recent call last):
        ...
    ValueError: '1' is no adapted layer whose weights change; such are 0
    """
    known = {name: a for name, a in adapters(model).items() if a.mergeable()} if layers else {}
    chosen = {}
    for name in layers:
        ends = [full for full in known if full == name or full.endswith(f".{name}")]
        if len(ends) > 1:
            raise ValueError(f"{name!r} is the end of {len(ends)} adapted layers' names; such as {', '.join(ends[:3])}")
        if not ends:
            like = difflib.get_close_matches(name, known) or list(known)[:10]
            raise ValueError(f"{name!r} is no adapted layer whose weights change; such are {', '.join(like) or 'none'}")
        chosen[name] = known[ends[0]]
    return chosen


class Recorder:
    """Metrics of the active adapter's weight changes over a training run: ``recorder.record() -> {metric: value}``.

    The values are means over the layers: ``distance``, ``spectral`` and ``reach`` (all relative to |W|_F),
    ``bound_used`` and ``lam``, as far as the method has them. ``turn_A`` and ``turn_B`` are the angles, in degrees, by
    which the rows of A and the columns of B turned since the last record; vectors of length zero are left out.
    Of each of the ``layers`` that are named (`changing`), ``|dW| NAME`` is |W' - W|_F (Figure 3 of the paper).

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> recorder = Recorder(model, layers=["0"])
    >>> with torch.no_grad():
    ...     _ = model[0].adapter.A.neg_()
    >>> now = recorder.record()
    >>> round(now["turn_A"]), now["|dW| 0"]
    (180, 0.0)
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = ()) -> None:
        self.model = model
        self.layers = changing(model, layers)
        with meet(model, "delora.diagnostics.Recorder"):
            self.adapters = [a for a in adapters(model).values() if not a.whole]
            self.base = [a.frozen.norm().item() for a in self.adapters]
            self.directions = self._directions()

    @torch.no_grad()
    def _directions(self) -> dict[str, list[Tensor]]:
        tensors = [a.numbers() for a in self.adapters]
        both = [(p["A"].detach().clone(), p["B"].detach().T.clone()) for p in tensors if "A" in p and "B" in p]
        return {"turn_A": [A for A, _ in both], "turn_B": [B for _, B in both]}

    def distance(self) -> float | None:
        """The ``distance`` of `record` alone, without beginning to measure angles anew."""
        changed = [_changed(adapter) for adapter in self.adapters]
        return _mean([_share(c[0], c[1]) for c in changed if c is not None])

    def record(self) -> dict[str, float]:
        """The metrics now; metrics that do not exist are left out."""
        with meet(self.model, "Recorder.record"):
            return self._record()

    def _record(self) -> dict[str, float]:
        rows: list[dict[str, Any]] = []
        for adapter, base in zip(self.adapters, self.base, strict=True):
            r = report(adapter)
            spectral = None if r.spectral is None else r.spectral / base
            rows.append({"distance": r.relative, "spectral": spectral})
            rows[-1] |= {"bound_used": r.bound_used, "reach": r.reach, "lam": r.lam}
        now = self._directions()
        turns = {key: _degrees(self.directions[key], now[key]) for key in now}
        self.directions = now
        means = {key: _mean([row[key] for row in rows if row[key] is not None]) for key in (rows[0] if rows else ())}
        changed = {f"|dW| {name}": _changed(adapter) for name, adapter in self.layers.items()}
        alone = {key: None if change is None else change[0] for key, change in changed.items()}
        return {key: value for key, value in (means | turns | alone).items() if value is not None}


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _degrees(before: list[Tensor], after: list[Tensor]) -> float | None:
    angles = []
    for old, new in zip(before, after, strict=True):
        cosine = torch.nn.functional.cosine_similarity(old.double(), new.double(), dim=1).clamp(-1, 1)
        nonzero = (old.norm(dim=1) > 0) & (new.norm(dim=1) > 0)
        angles += torch.rad2deg(torch.acos(cosine[nonzero])).tolist()
    return _mean(angles)
