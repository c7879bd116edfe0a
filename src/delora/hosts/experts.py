"""The experts of transformers' mixtures, which are parameters of three dimensions: one matrix for each expert."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from delora.hosts.packed import Layout, parameters

__all__ = ["of_transformers"]

NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def of_transformers(module: nn.Module) -> Mapping[str, Layout]:
    """What transformers says of a class of experts, by ``is_transposed`` and ``has_bias``, which it sets on all but a few.

    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.is_transposed, self.has_bias = True, False
    ...         self.down_proj = nn.Parameter(nn.Conv1d(4, 3, 5).weight)  # 3 experts, from 4 to 5 numbers
    >>> from delora.hosts import slots
    >>> [slot.name for slot in slots(Experts()).values()]
    ['down_proj.0', 'down_proj.1', 'down_proj.2']
    """
    transposed, has_bias = (module.__dict__.get(key) for key in ("is_transposed", "has_bias"))
    if not isinstance(transposed, bool) or not isinstance(has_bias, bool):
        return {}
    return {key: Layout(transposed, f"{key}_bias" if has_bias else None, experts=True) for key in NAMES}


parameters.finders.append(of_transformers)
_MODELS = "transformers.models."
for _kind in ("longcat_flash.modeling_longcat_flash.LongcatFlashExperts", "step3p7.modeling_step3p7.Step3p7Experts"):
    parameters.by_name[_MODELS + _kind] = {key: Layout(experts=True) for key in NAMES}
parameters.by_name[_MODELS + "inkling.modeling_inkling.InklingSharedExperts"] = {key: Layout(experts=True) for key in NAMES}
parameters.by_name[_MODELS + "llama4.modeling_llama4.Llama4TextExperts"] = {
    key: Layout(transposed=True, experts=True) for key in NAMES
}
parameters.by_name[_MODELS + "jetmoe.modeling_jetmoe.JetMoeParallelExperts"] = {"weight": Layout(experts=True)}
parameters.by_name[_MODELS + "dbrx.modeling_dbrx.DbrxExpertGLU"] = {
    "w1": Layout(experts="moe_num_experts"),
    "v1": Layout(experts="moe_num_experts"),
    "w2": Layout(transposed=True, experts="moe_num_experts"),
}
