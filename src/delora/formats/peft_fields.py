"""What a field of PEFT's configurations means here: read, without effect on what is computed, or refused unless it is unused.

The account is of PEFT 0.21.2. A field that is not in it is refused if it is set, because what it does is not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from delora.formats.files import AdapterError, shown

__all__ = ["KINDS", "READ", "UNUSED", "require_known", "require_same_base", "require_usual_start"]

KINDS = ("LORA", "DELORA", "IA3", "OFT")

_ALL = "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode"
_ALL += " target_modules exclude_modules modules_to_save"
_SOME = "layers_to_transform layers_pattern"  # which layers are adapted: the tensors' names say it

# Fields that are read, or that change nothing of what a trained adapter computes.
READ: dict[str, frozenset[str]] = {
    "LORA": frozenset(
        f"{_ALL} {_SOME} r lora_alpha rank_pattern alpha_pattern lora_dropout use_rslora use_dora fan_in_fan_out "
        "init_lora_weights target_parameters ensure_weight_tying loftq_config eva_config corda_config lora_ga_config "
        "qalora_group_size megatron_core runtime_config".split()
    ),
    "DELORA": frozenset(f"{_ALL} {_SOME} r delora_lambda rank_pattern lambda_pattern module_dropout init_weights".split()),
    "IA3": frozenset(f"{_ALL} feedforward_modules fan_in_fan_out init_ia3_weights".split()),
    "OFT": frozenset(
        f"{_ALL} {_SOME} r oft_block_size module_dropout fan_in_fan_out init_weights coft eps num_cayley_neumann_terms".split()
    ),
}

# Fields that must have this value, and what a field that is missing means (PEFT's default).
UNUSED: dict[str, dict[str, Any]] = {
    "LORA": {
        "bias": "none",
        "lora_bias": False,
        "use_qalora": False,
        "use_bdlora": None,
        "velora_config": None,
        "kasa_config": None,
        "monteclora_config": None,
        "arrow_config": None,
        "alora_invocation_tokens": None,
        "layer_replication": None,
        "trainable_token_indices": None,
        "megatron_config": None,
    },
    "DELORA": {"bias": "none"},
    "IA3": {},
    "OFT": {"bias": "none", "block_share": False, "use_cayley_neumann": False},
}
MISSING: dict[tuple[str, str], Any] = {("OFT", "use_cayley_neumann"): True}

_WHY = {
    "bias": "trained biases of the base model have no counterpart",
    "lora_bias": "a bias in B has no counterpart",
    "trainable_token_indices": "single rows of an embedding have no counterpart",
    "layer_replication": "the base model would have other layers",
    "block_share": "one rotation for all blocks has no counterpart",
    "use_cayley_neumann": "a truncated series is not orthogonal; OFT here is the exact Cayley transform",
}
_WAY_OUT = "merge it with PEFT and adapt the result"

STARTS = {"LORA": "init_lora_weights", "DELORA": "init_weights", "IA3": "init_ia3_weights", "OFT": "init_weights"}
_SAME_BASE = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}  # initial values of A and B alone
_OTHER_BASE = ("pissa", "olora", "corda", "lora_ga")


def require_known(
    config: Mapping[str, Any], kind: str, where: object, way_out: Callable[[Any], str] = lambda default: _WAY_OUT
) -> None:
    """Raise an AdapterError unless every field of a configuration is one that is understood here.

    ``way_out``: what to do instead, for a field with this default.

    >>> require_known({"peft_type": "LORA", "r": 8, "a_new_idea": None}, "LORA", "adapter_config.json")
    >>> require_known({"peft_type": "LORA", "r": 8, "new": 3}, "LORA", "adapter.json")
    Traceback (most recent call last):
    delora.formats.files.AdapterError: adapter.json: new = 3: this field is not known; merge it with PEFT and adapt the result
    """
    unused = UNUSED[kind]
    for field in {**unused, **config}:
        value = config.get(field, MISSING.get((kind, field), unused.get(field)))
        if field in READ[kind] or value is None or value is False or value in ({}, [], unused.get(field)):
            continue
        why = _WHY.get(field, "it has no counterpart") if field in unused else "this field is not known"
        raise AdapterError(f"{where}: {field} = {shown(value)}: {why}; {way_out(unused.get(field))}")


def require_usual_start(config: Mapping[str, Any], kind: str, where: object) -> None:
    """Raise an AdapterError if training would begin elsewhere than at PEFT's usual start, which is also the one here.

    >>> require_usual_start({"init_lora_weights": True}, "LORA", "LoraConfig")
    """
    field = STARTS[kind]
    if config.get(field, True) is not True:
        raise AdapterError(
            f"{where}: {field} = {shown(config[field])}: training starts as with True here; set it to True, or, if it leaves "
            "the base's weights as they are, save PEFT's untrained model and delora.load its folder, which holds this start"
        )


def require_same_base(init: Any, where: object) -> None:
    """Refuse an adapter whose initialisation has changed the weights that it is added to.

    >>> require_same_base("gaussian", "adapter_config.json")
    """
    name = str(init).lower()
    if name.startswith(_OTHER_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights = {shown(init)}: the adapter belongs to base weights that this initialisation has "
            "changed; write it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a "
            "plain LoRA of it"
        )
    if name == "loftq":
        raise AdapterError(
            f"{where}: init_lora_weights = {shown(init)}: the adapter belongs to base weights that this initialisation has "
            f"quantised; {_WAY_OUT}"
        )
    if name not in _SAME_BASE:
        raise AdapterError(f"{where}: init_lora_weights = {shown(init)}: this initialisation is not known; {_WAY_OUT}")
    if name == "mica":
        warnings.warn("PEFT's MiCA trains A alone: what is computed is the same here, and B trains as well", stacklevel=2)
