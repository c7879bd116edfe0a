"""What one of PEFT's configurations says: the method, and the layers that train.

Files are read with it (`method_of`), and `from_peft` makes the arguments of `delora.inject` of it. PEFT itself is not needed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from delora.formats.files import AdapterError, get, shown
from delora.formats.patterns import MOST
from delora.formats.peft_fields import KINDS, require_known, require_usual_start
from delora.methods import IA3, OFT, DeLoRA, DoRA, LoRA
from delora.methods.base import Method

__all__ = ["TASK_HEADS", "from_peft", "method_of", "parameters_of", "texts"]

# The modules that PEFT trains whole for a task, without a word of the configuration.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha", "lambda_pattern": "lam"}  # the field that each of them changes
_INSTEAD = "or train with PEFT, merge, and adapt the result"


def from_peft(config: Any) -> tuple[Method, dict[str, Any]]:
    """The method and the arguments of `delora.inject` that train the parameters which a configuration of PEFT trains.

    Every field is accounted for: it is translated, it changes nothing of what is trained, or it is refused by name. A pattern
    that finds no layer is an error of ``inject``, and ``"all-linear"`` leaves out every head (PEFT only those that it knows).

    Args:
        config: a ``LoraConfig``, ``DeloraConfig``, ``IA3Config`` or ``OFTConfig``, or such a one's ``adapter_config.json`` as a
            dict.

    Returns:
        the method, and the keyword arguments: ``targets`` and, where they are needed, ``dropout``, ``also_train``, ``exclude``
        and ``overrides``.

    Raises:
        AdapterError (a ValueError): a field has no counterpart, or is not known; the message names it and says what to do.
        TypeError: it is no configuration.

    >>> import delora
    >>> from torch import nn
    >>> config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["0"]}
    >>> method, arguments = delora.from_peft(config)
    >>> method, arguments
    (LoRA(r=4, alpha=8, rslora=False), {'targets': ['0'], 'dropout': 0.1})
    >>> model = delora.inject(nn.Sequential(nn.Linear(8, 8)), method, **arguments)
    >>> delora.from_peft(config | {"bias": "all"})
    Traceback (most recent call last):
    delora.formats.files.AdapterError: the configuration: bias = 'all': trained biases of the base model have no counterpart; \
leave it at 'none', or train with PEFT, merge, and adapt the result
    """
    data, where = _plain(config)
    kind = get(data, "peft_type", str, where)
    if kind not in KINDS:
        raise AdapterError(f"{where}: {kind!r} has no counterpart here: known types are {', '.join(KINDS)}")
    require_known(data, kind, where, lambda default: f"leave it at {default!r}, {_INSTEAD}")
    require_usual_start(data, kind, where)
    if getattr(config, "_custom_modules", None):
        raise AdapterError(f"{where}: layers of its own have no counterpart; register a host for them: delora.host.register")
    try:
        method = method_of(data, kind, where)
    except (ValueError, OverflowError) as error:
        raise error if isinstance(error, AdapterError) else AdapterError(f"{where}: {error}") from error
    whole = [*texts(data, "modules_to_save", where), *TASK_HEADS.get(str(data.get("task_type")), ())]
    arguments: dict[str, Any] = {"targets": _targets(data, where)}
    if dropout := _dropout(data, kind, where):
        arguments["dropout"] = dropout
    if whole:
        arguments["also_train"] = rf".*(?:{_any(whole)})"  # each module whose name ends so, with or without a dot
    if exclude := _exclude(data, whole, where):
        arguments["exclude"] = exclude
    if overrides := _overrides(data, kind, where):
        arguments["overrides"] = overrides
    if data.get("ensure_weight_tying"):
        warnings.warn(
            "ensure_weight_tying: PEFT trains the adapters of tied layers as one, here they train apart", stacklevel=2
        )
    return method, arguments


def _plain(config: Any) -> tuple[dict[str, Any], str]:
    """A configuration as the values that its JSON has, and what to call it."""
    if isinstance(config, Mapping):
        return {key: _value(value) for key, value in config.items()}, "the configuration"
    if isinstance(config, type) or not hasattr(config, "peft_type") or not hasattr(config, "to_dict"):
        raise TypeError(
            "expected one of PEFT's configurations, such as LoraConfig(...), or its adapter_config.json as a dict, got "
            f"{config!r}"
        )
    return {key: _value(value) for key, value in config.to_dict().items()}, type(config).__name__


def _value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- the method


def method_of(config: dict[str, Any], kind: str, where: object, **fields: Any) -> Method:
    """The method of a configuration. ``fields``: what is a layer's own (``r``, ``alpha``, ``lam``, ``blocks``, ``side``).

    >>> method_of({"r": 4, "lora_alpha": 8, "use_dora": True}, "LORA", "adapter_config.json", r=2)
    DoRA(r=2, alpha=8, rslora=False, fixed_magnitude=False)
    """
    if kind == "IA3":
        return IA3(**fields)
    if kind == "OFT":
        return _oft(config, where, **fields)
    number: Callable[[str], Any] = lambda field: get(config, field, (int, float), where)  # noqa: E731
    r = fields["r"] if "r" in fields else number("r")
    if kind == "DELORA":
        lam = fields["lam"] if "lam" in fields else number("delora_lambda")
        return DeLoRA(r=r, lam=lam, start="zero", learn_lam=True)  # PEFT trains its lambda
    alpha = fields["alpha"] if "alpha" in fields else number("lora_alpha")
    rslora = bool(get(config, "use_rslora", bool, where, False))
    return (DoRA if get(config, "use_dora", bool, where, False) else LoRA)(r=r, alpha=alpha, rslora=rslora)


def _oft(config: dict[str, Any], where: object, blocks: int | None = None) -> OFT:
    if blocks is None:
        if size := config.get("oft_block_size", 32):
            raise AdapterError(
                f"{where}: oft_block_size = {shown(size)} has no counterpart: OFT(blocks=n) counts the blocks; set r = n, the "
                f"layer's input size / {shown(size)}, and oft_block_size = 0"
            )
        blocks = get(config, "r", int, where)
    radius = None
    if get(config, "coft", bool, where, False):
        radius = get(config, "eps", (int, float), where, 6e-5) / math.sqrt(blocks)
    return OFT(blocks=blocks, radius=radius)


def _dropout(config: dict[str, Any], kind: str, where: object) -> float:
    field = "lora_dropout" if kind == "LORA" else "module_dropout"
    value = 0.0 if kind == "IA3" else get(config, field, (int, float), where, 0.0)
    if not 0 <= value < 1:
        raise AdapterError(f"{where}: {field} = {shown(value)}: must be at least 0 and below 1")
    if kind == "OFT" and value:
        raise AdapterError(f"{where}: {field} = {shown(value)}: OFT has no dropout here; leave it at 0, {_INSTEAD}")
    return float(value)


# ---------------------------------------------------------------- the layers


def texts(config: dict[str, Any], field: str, where: object) -> list[str]:
    """A field that is a list of names; empty if it is None or missing.

    >>> texts({"modules_to_save": ["head"]}, "modules_to_save", "here"), texts({}, "modules_to_save", "here")
    (['head'], [])
    """
    names = get(config, field, list, where, None) or []
    if len(names) > MOST or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{where}: {field} must be a list of at most {MOST:,} names")
    return names


def parameters_of(config: dict[str, Any], where: object) -> tuple[str, ...]:
    """The names in ``target_parameters``, which must be those of layers' weights.

    >>> parameters_of({"target_parameters": ["mlp.up_proj.weight"]}, "here")
    ('mlp.up_proj.weight',)
    """
    names = texts(config, "target_parameters", where)
    if strange := [name for name in names if not f".{name}".endswith(".weight")]:
        raise AdapterError(
            f"{where}: target_parameters has {shown(strange[0])}: of parameters, only the weights of layers are read; "
            "merge it with PEFT and adapt the result"
        )
    return tuple(names)


def _any(names: list[str]) -> str:
    return "|".join(map(re.escape, names))


def _ending(names: list[str]) -> str:
    """An expression for whole names that end, after a dot, with one of these."""
    return rf"(?:.*\.)?(?:{_any(names)})"


def _named(config: dict[str, Any], field: str, where: object) -> str | list[str]:
    """A field that is an expression, or a list of names; empty if it is None or missing."""
    value = config.get(field)
    return value if isinstance(value, str) else sorted(set(texts(config, field, where)))


def _targets(config: dict[str, Any], where: object) -> str | list[str]:
    named = _named(config, "target_modules", where)
    layers = config.get("layers_to_transform")
    weights = list(parameters_of(config, where))
    if "weight" in weights:
        raise AdapterError(f"{where}: target_parameters has 'weight', which every layer has: name the layers in target_modules")
    if weights and (pattern := next((field for field in _PATTERNS if config.get(field)), None)):
        raise AdapterError(
            f"{where}: {pattern} beside target_parameters has no counterpart, for PEFT knows such layers by other names; name "
            "them in target_modules, by their weights' layers"
        )
    if not named and not weights:
        why = "for PEFT chooses by the type of the model; get_peft_model writes its choice into the configuration"
        raise AdapterError(f"{where}: target_modules = {config.get('target_modules')!r} names no layer, {why}: name them")
    modules = [name.removesuffix(".weight") for name in weights]
    if isinstance(named, str):
        if layers is not None and layers != []:
            raise AdapterError(f"{where}: layers_to_transform = {shown(layers)}: only for a list of target_modules")
        if named.lower() == "all-linear":
            if modules:
                raise AdapterError(f"{where}: target_parameters beside target_modules='all-linear': name them with the others")
            return "all-linear"
        return rf"(?:{named})|{_ending(modules)}" if modules else named
    if not named or layers is None or layers == []:
        return sorted({*named, *modules})
    chosen = _in_layers(config, named, layers, where)
    return f"{chosen}|{_ending(modules)}" if modules else chosen


def _in_layers(config: dict[str, Any], named: list[str], layers: Any, where: object) -> str:
    """An expression for these whole names, and for those that end so in the layers of these numbers.

    The first number in a name counts. In PEFT it stands where ``.*?\\.[^.]*\\.(\\d+)\\.`` finds it, or, of the patterns, the
    first with which ``(?:^|.*?\\.)pattern\\.(\\d+)\\.`` does.
    """
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(type(n) is int for n in numbers):
        raise AdapterError(f"{where}: layers_to_transform = {shown(layers)}: must be numbers of layers")
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else texts(config, "layers_pattern", where)
    if strange := [pattern for pattern in patterns if not re.fullmatch(r"[\w.-]+", pattern)]:
        raise AdapterError(f"{where}: layers_pattern = {shown(strange[0])}: a plain name of what holds the layers is read")
    places = [rf"(?:^|.*?\.){pattern}\." for pattern in patterns] or [r".*?\.[^.]*\."]
    fits = []
    for i, place in enumerate(places):
        before = "".join(rf"(?!{other}\d+\.)" for other in places[:i])
        fits.append(rf"{before}(?>{place}(?=\d+\.))0*(?:{'|'.join(map(str, numbers))})\.")
    return rf"{_any(named)}|(?={'|'.join(fits)}).*\.(?:{_any(named)})"


def _exclude(config: dict[str, Any], whole: list[str], where: object) -> str | list[str]:
    """What is excluded by name, and what lies in a module that is trained whole."""
    named = _named(config, "exclude_modules", where)
    if not whole:
        return named
    by_name = f"(?:{named})|" if isinstance(named, str) else f"{_ending(named)}|" if named else ""
    return rf"{by_name}.*(?:{_any(whole)})(?:\..*)?"


def _overrides(config: dict[str, Any], kind: str, where: object) -> dict[str, dict[str, Any]]:
    """PEFT's patterns as ours. Of PEFT's the first that fits the end of a name counts, of ours the last that fits."""
    if kind == "IA3":
        return _feedforward(config, where)
    overrides: dict[str, dict[str, Any]] = {}
    orders: list[list[str]] = []
    for field, changed in _PATTERNS.items():
        values = get(config, field, dict, where, None) or {}
        for pattern, value in reversed(values.items()):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise AdapterError(f"{where}: {field} has {shown(pattern)}, no regular expression: {error}") from error
            text = rf"^(.*\.)?({pattern})$"
            while text in overrides and list(values) not in orders:  # each field has an order of its own
                text = f"(?:{text})"
            overrides.setdefault(text, {})[changed] = value
        orders.append(list(values))
    return overrides


def _feedforward(config: dict[str, Any], where: object) -> dict[str, dict[str, Any]]:
    """The layers whose input (IA)^3 scales."""
    if config.get("feedforward_modules") is None:
        why = "PEFT then chooses by the type of the model; name them, or set it to []"
        raise AdapterError(f"{where}: feedforward_modules = None: {why}")
    named = _named(config, "feedforward_modules", where)
    if not named:
        return {}
    return {f"^(?:{named})$" if isinstance(named, str) else f"(?:{_any(named)})$": {"side": "input"}}
