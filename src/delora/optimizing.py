"""What trains and with which learning rate: parameter groups for an optimizer, and a summary to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from delora.hosts import quantised_layers
from delora.layer import Adapter, Copy
from delora.methods.base import is_number
from delora.models import adapted_layers, adapters, states
from delora.sharded import settle
from delora.zero import full_shape

__all__ = ["Summary", "param_groups", "summary"]


def param_groups(
    model: nn.Module,
    lr: float,
    lam_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    lam_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, which contain every trainable tensor exactly once.

    Args:
        model: a model with an adapter.
        lr: learning rate of the adapters and of everything that no other rate is for.
        lam_lr: learning rate of the strengths lam, of methods that learn them (``lr`` if None).
        head_lr: learning rate of the modules in ``also_train`` (``lr`` if None).
        weight_decay: for matrices; biases, scales of norms and other vectors are never decayed.
        lam_weight_decay: for the strengths lam.

    Raises:
        ValueError: a rate is not a finite number of at least 0, nothing trains, or a rate or decay is given for strengths
            of which none is learned.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> [(group["name"], group["lr"]) for group in param_groups(model, lr=1e-2)]
    [('adapter', 0.01)]
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2, learn_lam=True), ["0"])
    >>> [(group["name"], group["lr"]) for group in param_groups(model, lr=1e-2, lam_lr=1e-3)]
    [('adapter', 0.01), ('lam', 0.001)]
    """
    rates = {"lr": lr, "lam_lr": lam_lr, "head_lr": head_lr, "weight_decay": weight_decay, "lam_weight_decay": lam_weight_decay}
    for key, value in rates.items():
        if value is not None and (not is_number(value) or value < 0):
            raise ValueError(f"{key} = {value!r}: must be a finite number, at least 0")
    settle(model)
    strengths = _strengths(model)
    for key in ("lam_lr", "lam_weight_decay"):
        if rates[key] and strengths and not any(p.requires_grad for p in strengths):
            raise ValueError(
                f"{key} = {rates[key]!r}: no strength lam of this model is learned; leave {key} out, or inject a method "
                "that learns it, such as DeLoRA(learn_lam=True)"
            )
    lam = {id(m.lam) for m in model.modules() if isinstance(m, Adapter) and hasattr(m, "lam")}
    head = {id(p) for m in model.modules() if isinstance(m, Copy) for p in m.parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "lam" if id(parameter) in lam else "head" if id(parameter) in head else "adapter"
            groups.setdefault((kind, len(full_shape(parameter)) > 1), []).append(parameter)
    if not groups:
        raise ValueError("nothing in this model trains: delora.inject or delora.activate an adapter first")
    rate = {"adapter": lr, "head": lr if head_lr is None else head_lr, "lam": lr if lam_lr is None else lam_lr}
    return [
        {
            "name": kind if kind == "lam" or matrix else f"{kind} vectors",
            "params": parameters,
            "lr": rate[kind],
            "weight_decay": lam_weight_decay if kind == "lam" else weight_decay if matrix else 0.0,
        }
        for (kind, matrix), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _strengths(model: nn.Module) -> list[Tensor]:
    """lam of every active adapter that has one."""
    active = [layer.adapter for layer in adapted_layers(model).values() if layer.adapter is not None]
    found = [getattr(m, "lam", None) for placed in active for m in placed.adapter.modules() if isinstance(m, Adapter)]
    return [lam for lam in found if isinstance(lam, Tensor)]


@dataclass(frozen=True)
class Summary:
    """How much of a model trains. ``share`` is trainable / base. ``quantised`` says of each kind of quantised layer how many
    there are, how many weights they stand for, and how many bytes they take with scales and biases.

    >>> Summary(rows=(("LoRA(r=8)", 2, 30),), other=0, base=1000).share
    0.03
    """

    rows: tuple[tuple[str, int, int], ...]  # method, layers, trainable parameters
    other: int  # trainable parameters outside the adapters
    base: int
    left_out: str = ""  # what targets="all-linear" could not adapt, by kind
    quantised: tuple[tuple[str, int, int, int], ...] = ()  # kind, layers, weights, bytes

    @property
    def trainable(self) -> int:
        return sum(row[2] for row in self.rows) + self.other

    @property
    def share(self) -> float:
        return self.trainable / self.base

    def __str__(self) -> str:
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{method:<{width}}  {layers:>5} layers  {count:>13,} trainable" for method, layers, count in self.rows]
        if self.other:
            lines.append(f"{'outside the adapters':<{width}}  {'':>12}  {self.other:>13,} trainable")
        lines.append(f"{self.trainable:,} of the base model's {self.base:,} parameters: {self.share:.3%}")
        for kind, layers, count, size in self.quantised:
            each = 8 * size / count
            lines.append(f"{kind}: {layers} layers, {count:,} of these parameters in {size:,} bytes ({each:.2f} bits each)")
        lines += [self.left_out] if self.left_out else []
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What trains in a model, to print.

    >>> import delora
    >>> print(summary(delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])))
    LoRA(r=2, alpha=16.0, rslora=False)      1 layers             16 trainable
    16 of the base model's 20 parameters: 80.000%
    """
    layers = adapted_layers(model)
    in_adapters = {id(p) for layer in layers.values() for p in layer.adapters.parameters()}
    counts: dict[str, list[int]] = {}
    for placed in adapters(model).values():
        n = sum(full_shape(p).numel() for p in placed.parameters() if p.requires_grad)
        counts.setdefault(str(placed.method), []).append(n)
    rows = tuple((method, len(ns), sum(ns)) for method, ns in counts.items())
    rest = [p for p in model.parameters() if id(p) not in in_adapters]
    trainable, total = (sum(full_shape(p).numel() for p in ps) for ps in ([p for p in rest if p.requires_grad], rest))
    kinds: dict[str, tuple[int, int, int]] = {}
    for look in quantised_layers(model):
        total += look.weights() - look.counted()
        n, count, size = kinds.get(look.kind, (0, 0, 0))
        kinds[look.kind] = n + 1, count + look.weights(), size + look.bytes()
    left_out = "\n".join(state.left_out for state in states(model) if state.left_out)
    return Summary(rows, trainable, total, left_out, tuple((kind, *numbers) for kind, numbers in kinds.items()))
