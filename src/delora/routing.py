"""Mixed batches: every row of a batch with an adapter of its own, or with none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from delora.ambient import apart, put_aside
from delora.hosts import of_transformers
from delora.layer import Adapted, Adapter, Changing, Copy, Placed
from delora.lowrank import traced
from delora.meeting import meet
from delora.methods.base import edits_output, is_number
from delora.models import active_adapter, adapted_layers, adapter_names, refuse_inside, states, unwrapped
from delora.parts import Parts, Slices
from delora.updates import Affine, Edited, LowRank, PerRow

__all__ = ["Rows", "routed", "serving"]

# What transformers gives a module of experts: the tokens, the experts chosen for each, and their weights.
TOKENS = (["hidden_states", "top_k_index", "top_k_weights"], ["hidden_states", "router_indices", "routing_weights"])

Key = tuple[str, float | None] | None  # an adapter's name and strength (None: the adapter's own), or None: no adapter


class Rows:
    """Which adapter each row of a batch runs with, while `routed` is open.

    >>> import delora
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> model = delora.inject(model, delora.ETHER(), ["0"], name="a").eval()
    >>> with delora.routed(model, ["a", None]) as rows:
    ...     rows.use([None, "a", "a"])
    ...     rows.names
    [None, 'a', 'a']
    """

    def __init__(self, model: nn.Module, num_beams: int) -> None:
        self.known = adapter_names(model)
        self.num_beams = num_beams
        self.names: list[str | None] = []
        self.routes = {name: _Route(name, layer, self) for name, layer in adapted_layers(model).items()}

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of rows that a layer may get."""
        n = len(self.names)
        return (n,) if self.num_beams == 1 else (n, n * self.num_beams)

    @apart
    def use(self, names: Sequence[str | None], strengths: Sequence[float | None] | None = None) -> None:
        """Give the rows of the next batches these adapters.

        Args:
            names: one adapter's name, or None for the base model, for each row.
            strengths: for each row the strength of its adapter, or None for the adapter's own.

        Raises:
            ValueError, TypeError: a name is unknown, or a strength is not a number of at least 0; nothing is changed then.
        """
        keys = _keys(names, strengths, self.known)
        with torch.no_grad():
            self.names = list(names)
            for route in self.routes.values():
                route.use(keys)


def _keys(names: Sequence[str | None], strengths: Sequence[float | None] | None, known: list[str]) -> list[Key]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names = {names!r}: expected a list with the name of an adapter, or None, for each row of the batch")
    if not names:
        raise ValueError("names = []: expected the name of an adapter, or None, for each row of the batch")
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"no adapter is named {name!r}: this model has {known or 'none'}")
    each = [None] * len(names) if strengths is None else list(strengths)
    if len(each) != len(names):
        raise ValueError(f"{len(each)} strengths for {len(names)} rows: expected one for each row")
    for s in each:
        if s is not None and (not is_number(s) or s < 0):
            raise ValueError(f"strength {s!r}: must be a finite number, at least 0")
    return [None if name is None else (name, None if s is None else float(s)) for name, s in zip(names, each, strict=True)]


class _Route:
    """How one layer runs a mixed batch: all low-rank changes at once, if all that is asked for is of that kind; else the rows
    of each adapter for themselves."""

    def __init__(self, name: str, layer: Adapted, rows: Rows) -> None:
        self.name, self.layer, self.rows = name, layer, rows
        self.adapters = {key: cast("Adapter | Copy | Parts", module) for key, module in layer.adapters.items()}
        if differ := [k for k, a in self.adapters.items() if isinstance(a, Slices) and math.isnan(a.strength)]:
            raise ValueError(f"the slices of {name} have different strengths in the adapter {differ[0]!r}: set one for all")
        low = {
            key: None if isinstance(adapter, Parts) else Placed(adapter.at(1.0), layer.base).low_rank()
            for key, adapter in self.adapters.items()
        }
        changes = {key: change for key, change in low.items() if change is not None}
        self.number = {key: i for i, key in enumerate(changes, start=1)}  # 0: no change
        if changes:
            host = layer.placed(next(iter(changes))).host
            self.kind, self.gathers = type(host), host.linear
            self.length = 1 if host.lookup else 2 if host.linear else None  # dimensions before that of the features, or None
            self.up, self.down = _stacked(list(changes.values()), host.dtype)
        self.keys: list[Key] = []  # what each row of the batch runs with in this layer
        self.changes: list[PerRow] = []  # one for each number of rows that is possible
        self.groups: list[tuple[Tensor, Key]] = []  # of one batch, the rows of each adapter
        self.takes_tokens = any(isinstance(a, Parts) for a in self.adapters.values()) and _takes_tokens(layer.base)
        self.batch_first = False  # whether a call has shown that the first dimension of what this layer gets is the batch

    def use(self, keys: list[Key]) -> None:
        self.keys = mine = [key if key is not None and key[0] in self.adapters else None for key in keys]
        if all(key is None or key[0] in self.number for key in mine):
            self.groups = []
            self._gather(mine)
            return
        self.changes = []
        self.groups = [(torch.tensor([i for i, other in enumerate(mine) if other == key]), key) for key in dict.fromkeys(mine)]

    def _adapter(self, key: Key) -> Adapter | Copy | Parts | None:
        """The adapter of some rows, at their strength."""
        if key is None:
            return None
        adapter = self.adapters[key[0]]
        return adapter if key[1] is None else adapter.at(key[1])

    def _gather(self, keys: list[Key]) -> None:
        self.changes = []
        if not self.number:
            return
        numbers = torch.tensor([0 if key is None else self.number[key[0]] for key in keys])
        scales = torch.tensor(
            [0.0 if key is None else self.adapters[key[0]].strength if key[1] is None else key[1] for key in keys],
            dtype=torch.float64,
        )
        for times in dict.fromkeys((1, self.rows.num_beams)):
            index = numbers.repeat_interleave(times).to(self.up.device)
            scale = scales.repeat_interleave(times).to(self.up.device, self.up.dtype)
            new = PerRow(self.up, self.down, index, scale)
            if self.gathers:
                new = PerRow(self.up, self.down, index, scale, *(t.contiguous() for t in new.gathered(self.up.dtype)))
            self.changes.append(new)

    def read(self, name: str, weight: Tensor) -> Tensor:
        """What a module gets that reads the weight of this layer: none is right for all rows, if their changes differ."""
        first = self.keys[0]
        if all(key == first for key in self.keys):
            return _read(self._adapter(first), self.layer.base, name, weight)
        raise ValueError(
            f"{self.name}: the module around this layer reads its weight, and the rows of a mixed batch have none in common; "
            "run the rows of each adapter for themselves"
        )

    def __call__(self, layer: Adapted, *args: Any, **kwargs: Any) -> Any:
        if layer.training and (self.groups or self.changes):
            raise ValueError("delora.routed is for inference, in which adapters get no gradient: call model.eval() first")
        if self.groups:
            return self._by_groups(layer.base, args, kwargs)
        if not self.changes:
            return layer.base(*args, **kwargs)
        (x,) = args if args else kwargs.values()  # layer(input=x)
        change = next((change for change in self.changes if len(change.index) == x.shape[0]), None) if x.dim() else None
        if change is None:
            raise self._other_rows(x)
        self._is_batch_first(x, self.length)
        return change.forward(self.kind(layer.base), 0.0, x)

    def _other_rows(self, x: Tensor) -> ValueError:
        names, hint = len(self.rows.names), ""
        if x.dim() and len(x) and len(x) % names == 0 and self.rows.num_beams == 1:
            hint = f". If generate repeats every row, tell it: delora.routed(model, names, num_beams={len(x) // names})"
        return ValueError(
            f"{self.name} got an input of shape {list(x.shape)}, and delora.routed was given names for {names} rows: its first "
            f"dimension has to be the batch{hint}"
        )

    def _is_batch_first(self, x: Tensor, length: int | None) -> None:
        """Refuse an input whose first two dimensions could both be the batch, unless another call has shown which is."""
        if length is None or x.dim() <= length:
            return
        counts = [len(self.rows.names) * times for times in (1, self.rows.num_beams)]
        if x.shape[1] not in counts:
            if not traced():
                self.batch_first = True
        elif not self.batch_first and len(set(self.rows.names)) > 1:
            raise ValueError(
                f"{self.name} got an input of shape {list(x.shape)}: as many rows as tokens, so which of the two are the rows "
                "cannot be told yet; run one batch of another length first, or pad this one by a token"
            )

    # ---------------------------------------------------------------- rows of each adapter for themselves

    def _by_groups(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        edits = self._edits(base)
        if edits is not None:
            host, edit = edits
            return host.edited(edit, *args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise ValueError(f"{self.name} got no tensor whose rows could be told apart")
        at = self._rows_of(x)
        parts = []
        for rows, (_, key) in zip(at, self.groups, strict=True):
            adapter = self._adapter(key)
            run = base if adapter is None else Placed(adapter, base)
            with self._inside(key, len(rows)):
                parts.append(run(*_split(args, x, rows, self.name), **_split(kwargs, x, rows, self.name)))
        return _joined(parts, torch.cat(at).argsort(), self.name)

    @contextmanager
    def _inside(self, key: Key, count: int) -> Iterator[None]:
        """A context in which the layers inside this one get so many rows, all with one adapter."""
        routes = [route for name, route in self.rows.routes.items() if name.startswith(f"{self.name}.")]
        if not routes:
            yield
            return
        names, keys = self.rows.names, [route.keys for route in routes]
        try:
            self.rows.names = [None if key is None else key[0]] * count
            for route in routes:
                route.use([key] * count)
            yield
        finally:
            self.rows.names = names
            for route, before in zip(routes, keys, strict=True):
                route.use(before)

    def _rows_of(self, x: Tensor) -> list[Tensor]:
        """The rows of each group in a batch in which every row may be repeated, or of which this layer gets the tokens."""
        names = len(self.rows.names)
        times = len(x) // names if x.dim() else 0
        if not times or times * names != len(x) or (times not in (1, self.rows.num_beams) and not self.takes_tokens):
            raise self._other_rows(x)
        if not self.takes_tokens:
            self._is_batch_first(x, 2 if x.is_floating_point() else 1)
        each = torch.arange(times)
        return [(rows[:, None] * times + each).flatten().to(x.device) for rows, _ in self.groups]

    def _edits(self, base: nn.Module) -> tuple[Any, Any] | None:
        """If all adapters edit the layer's output, one edit of all rows: the layer itself runs once, for whatever arguments."""
        found: list[Any] = []
        host: Any = None
        for _, key in self.groups:
            adapter = self._adapter(key)
            if adapter is None:
                found.append(None)
                continue
            if not isinstance(adapter, Adapter) or not edits_output(adapter.method):
                return None
            host = adapter.kind(base)
            update = adapter.update(host)
            if not isinstance(update, (Edited, Affine)):
                return None
            found.append(update.forward(_Caught(), 0.0))

        def edit(y: Tensor) -> Tensor:
            at = self._rows_of(y)
            parts = [y[rows] if fn is None else fn(y[rows]) for rows, fn in zip(at, found, strict=True)]
            return torch.cat(parts)[torch.cat(at).argsort()]

        return host, edit


class _Ready:
    """How one layer runs while `serving` is open: with the change that its adapter had then. What is trained whole, or is no
    change of one matrix, runs as ever."""

    def __init__(self, layer: Adapted, adapter: Any) -> None:
        self.layer, self.adapter, self.update, self.is_plain = layer, adapter, None, False
        if isinstance(adapter, Changing) and adapter.strength != 0:
            host = adapter.kind(layer.base)
            update: Any = adapter.update(host)
            if isinstance(update, LowRank):
                change = update.evened() if host.dtype == torch.float16 else update
                update = LowRank(change.up.to(host.dtype).contiguous(), change.down.to(host.dtype).contiguous())
                self.is_plain = type(layer.base) is nn.Linear
            self.update = update

    def __call__(self, layer: Adapted, *args: Any, **kwargs: Any) -> Any:
        if layer.training:
            raise ValueError("delora.serving is for inference, in which adapters get no gradient: call model.eval() first")
        if self.update is None:
            return self.adapter(self.adapter.kind(layer.base), *args, **kwargs)
        if not args and len(kwargs) == 1:  # layer(input=x)
            args, kwargs = tuple(kwargs.values()), {}
        if self.is_plain and args[0].dtype == self.update.down.dtype:
            y: Tensor = layer.base(*args)
            return y + nn.functional.linear(nn.functional.linear(args[0], self.update.down), self.update.up)
        return self.update.forward(self.adapter.kind(layer.base), 0.0, *args, **kwargs)

    def read(self, name: str, value: Tensor) -> Tensor:
        """The weight or bias with the change in it, for a module that reads it."""
        return _read(self.adapter, self.layer.base, name, value)


class _Caught:
    """In a host's place: gives the function by which an update edits an output, without running a layer."""

    def edited(self, fn: Any) -> Any:
        return fn


def _read(adapter: Adapter | Copy | Parts | None, base: nn.Module, name: str, value: Tensor) -> Tensor:
    """A tensor of a layer with the change of an adapter in it, for a module that reads it."""
    if adapter is None:
        return value
    if isinstance(adapter, Copy):
        changed: Tensor = adapter.at_strength(base).get(name, value)
        return changed
    compute = adapter.read(base, name)
    return value if compute is None else compute()


def _takes_tokens(module: nn.Module) -> bool:
    """Whether a module takes the tokens of all rows, one row after the other, in its first dimension: transformers' experts,
    of those few kinds excepted that are given the tokens of each expert apart."""
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    return bool(of_transformers(module)) and arguments in TOKENS


def _stacked(changes: list[LowRank], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors [n + 1, out, k] and [n + 1, k, in] of n changes after none, filled up with zeros to the largest rank."""
    if dtype == torch.float16:
        changes = [change.evened() for change in changes]
    first, k = changes[0], max(len(change.down) for change in changes)
    up = first.up.new_zeros(len(changes) + 1, len(first.up), k, dtype=dtype)
    down = first.down.new_zeros(len(changes) + 1, k, first.down.shape[1], dtype=dtype)
    for i, change in enumerate(changes, start=1):
        rank = len(change.down)
        up[i, :, :rank], down[i, :rank] = change.up, change.down
    return up, down


def _split(value: Any, x: Tensor, rows: Tensor, name: str) -> Any:
    """Of every tensor among arguments these rows of as many as ``x`` has; a tensor of one row is for all of them."""
    if isinstance(value, Tensor) and value.dim() and len(value) == len(x):
        if value is not x and value.dim() == 2 and x.dim() == 3 and list(value.shape) == list(x.shape[:2]) == 2 * [len(x)]:
            raise ValueError(
                f"{name} gets a tensor of shape {list(value.shape)} and has as many rows as tokens: whether it is of the rows "
                "or of all pairs of tokens cannot be told; pad this batch by a token"
            )
        return value[rows]
    if isinstance(value, dict):
        return {key: _split(part, x, rows, name) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_split(part, x, rows, name) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    if isinstance(value, Tensor) and len(value) == 1:
        return value
    got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ValueError(
        f"{name} is changed by an adapter whose change is not low-rank, or one of parameters, and gets {got}, which cannot be "
        "split into the rows of each adapter: run these adapters one after the other"
    )


def _joined(parts: list[Any], order: Tensor, name: str) -> Any:
    """The outputs for groups of rows as one output, in the order of the batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if type(first) in (tuple, list):
        return type(first)(_joined(list(each), order, name) for each in zip(*parts, strict=True))
    if first is None:
        return None
    raise ValueError(f"{name} gave a {type(first).__name__}, which cannot be put together from the rows of each adapter")


@contextmanager
def _open(model: nn.Module, context: str, routes: Sequence[tuple[Adapted, Any]]) -> Iterator[None]:
    """The context of this name, in which these layers run as the routes beside them say."""
    before, opened = [layer.active for layer, _ in routes], states(model)
    try:
        for state in opened:
            state.contexts.append(context)
        for layer, route in routes:
            layer.active, layer.route = None, route
        yield
    finally:
        for (layer, _), active in zip(routes, before, strict=True):
            layer.active, layer.route = active, None
        for state in opened:
            state.contexts.pop()


@contextmanager
def routed(
    model: nn.Module,
    names: Sequence[str | None],
    strengths: Sequence[float | None] | None = None,
    *,
    num_beams: int = 1,
) -> Iterator[Rows]:
    """A context in which row i of every batch runs with the adapter ``names[i]``, or as the base model where that is None.

    ``y_i = W x_i + s_i up_i down_i x_i``: the layer runs once for all rows, and the small factors are multiplied row by row.
    Adapters of any rank and method go together; where a change is not low-rank (DoRA, OFT, modules trained whole ...), the
    layer runs once for each adapter, on its rows. The factors are computed when the context is entered. What it gives changes
    the adapters of the rows, ``rows.use(names)``: a few factors are copied, and ``torch.compile`` compiles nothing anew.

    Args:
        model: in eval mode; the adapters get no gradient.
        names: one adapter's name, or None, for each row of the batch.
        strengths: for each row the strength of its adapter, or None for the adapter's own. Default: the adapters' own.
        num_beams: how often ``generate`` repeats each row (its ``num_beams`` or ``num_return_sequences``). Batches may then
            have ``len(names)`` rows or that many times more.

    Raises:
        ValueError, TypeError: a name is unknown, or another context is open.

    Within the context, a forward raises a ValueError if a layer gets another number of rows, or if the module around it reads
    its weight instead of calling it.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"], name="a").eval()
    >>> x = torch.eye(4)[:1].repeat(2, 1)
    >>> with delora.routed(model, ["a", None]):
    ...     y = model(x)
    >>> torch.allclose(y[:1], model(x[:1]), atol=1e-6)
    True
    >>> with delora.disabled(model):
    ...     torch.allclose(y[1:], model(x[1:]), atol=1e-6)
    True
    """
    refuse_inside(model, "routed")
    if type(num_beams) is not int or num_beams < 1:
        raise ValueError(f"num_beams = {num_beams!r}: must be an integer of at least 1")
    layers = adapted_layers(model)
    with put_aside(), torch.no_grad():
        _keys(names, strengths, adapter_names(model))
        for layer in layers.values():
            if layer._blank:
                layer.refresh()
        rows = Rows(unwrapped(model), num_beams)
    rows.use(names, strengths)
    with _open(model, "routed", [(layer, rows.routes[name]) for name, layer in layers.items()]):
        yield rows


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """A context for inference in which the changes of the active adapter are computed once, when it is entered.

    A low-rank change is kept as its two small factors in the layer's dtype, so that a call adds two narrow products and nothing
    else; other changes (DoRA, OFT ...) are kept as the update that they are. Weights stay as they are, unlike in `merged`.
    What is written to an adapter's tensors inside has no effect until the context is entered again; `strength`, `load` and
    all that changes the structure are refused inside.

    Args:
        model: in eval mode; the adapters get no gradient.

    Raises:
        ValueError: another context is open, or no adapter is active.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2, start="zero"), ["0"]).eval()
    >>> _ = nn.init.normal_(model[0].adapter.B)
    >>> x = torch.ones(1, 4)
    >>> y = model(x)
    >>> with delora.serving(model), torch.no_grad():
    ...     torch.allclose(model(x), y, atol=1e-5)
    True
    """
    refuse_inside(model, "serving")
    active_adapter(model)
    layers = [layer for layer in adapted_layers(model).values() if layer.active is not None]
    with put_aside(), meet(model, "delora.serving"), torch.no_grad():
        for layer in layers:
            if layer._blank:
                layer.refresh()
        routes = [(layer, _Ready(layer, layer.adapters[cast(str, layer.active)])) for layer in layers]
    with _open(model, "serving", routes):
        yield
