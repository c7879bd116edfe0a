"""LoRA files for image models, with diffusers' names (``pipe.load_lora_weights``) or kohya's (most graphical programs).

The names come from the tables of the programs that read them:

- diffusers: ``loaders/lora_pipeline.py``, ``loaders/lora_base.py`` and ``loaders/lora_conversion_utils.py`` of 0.42
- kohya-ss/sd-scripts: ``networks/lora.py`` (Stable Diffusion 1, 2 and XL) with ``library/sdxl_model_util.py``,
  ``networks/lora_sd3.py``, ``networks/lora_flux.py`` and ``networks/convert_flux_lora.py``
- ComfyUI: ``comfy/lora.py`` and ``unet_to_diffusers``, ``mmdit_to_diffusers``, ``flux_to_diffusers`` in ``comfy/utils.py``
- AUTOMATIC1111/stable-diffusion-webui: ``extensions-builtin/Lora/networks.py``
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora.formats.files import write_atomically
from delora.formats.nearest import Approximation
from delora.formats.peft import as_lora
from delora.formats.peft_own import groups_of
from delora.meeting import collective, writes
from delora.models import adapted_layers, adapter_names, by_layer, unwrapped, walk

__all__ = ["write"]

FILE = "pytorch_lora_weights.safetensors"

Factors = tuple[Tensor, Tensor]  # down [r, in], up [out, r]; of a convolution with its kernel's dimensions


@collective
@torch.no_grad()
def write(
    model: Any,
    folder: str | os.PathLike[str],
    name: str | None = None,
    kohya: bool = False,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapters of an image model, at their current strength, as one exact LoRA file, and return its path.

    ``pipe.load_lora_weights(folder)`` reads it.

    Args:
        model: a diffusers pipeline; or its parts by name, ``{"unet": unet, "text_encoder": ...}``; or a U-Net or a
            transformer alone.
        folder: where to write; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        kohya: use the names of kohya's scripts (``lora_unet_down_blocks_0_....lora_down.weight`` and ``.alpha``), which
            graphical programs read: for Stable Diffusion 1, 2 and XL, SD3 and FLUX, with their text encoders. diffusers reads
            them as well, but those of SD3.

    Raises:
        ValueError: no part has an adapter, or one is not low-rank or not finite, or the file cannot hold a layer so that the
            programs read it. Nothing is written then.

    Warns:
        UserWarning: layers are not exact beyond rounding; ``delora.approximation`` in the header of the file has their errors.

    >>> import delora, tempfile
    >>> unet = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2, start="soft"), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     delora.export.diffusers(unet, folder).name
    'pytorch_lora_weights.safetensors'
    """
    form = Approximation(rank, dtype)
    parts, readable = _parts(model)
    known = {part: adapter_names(module) for part, module in parts.items() if adapted_layers(module)}
    if not known:
        raise ValueError(f"no part has an adapter: {', '.join(parts) or type(model).__name__}; delora.inject one first")
    chosen = [part for part, names in known.items() if name is None or name in names]
    if not chosen:
        raise ValueError(f"no part has an adapter named {name!r}, only: {known}")
    layers = {part: _factors(part, parts[part], name, form) for part in chosen}
    tensors = _kohyas_names(parts, layers) if kohya else _diffusers_names(parts, layers, readable)
    # An alpha is one number, and exact in float32 alone.
    tensors = {key: form.cast(tensor) if tensor.dim() else tensor for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    form.tell(stacklevel=4)
    folder = Path(folder)
    if not writes():
        return folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    data = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    write_atomically(folder / FILE, to_bytes(data, {"format": "pt", **form.header()}))
    return folder / FILE


def _parts(model: Any) -> tuple[dict[str, nn.Module], tuple[str, ...] | None]:
    """The modules of a model by the names of its parts; and of a pipeline, the parts into which diffusers loads a LoRA."""
    if isinstance(model, nn.Module):
        if _is_a(model, "PreTrainedModel"):
            raise ValueError(
                f"a {type(unwrapped(model)).__name__} alone can be any of a pipeline's text encoders: pass the pipeline, "
                "or the parts by name, such as {'text_encoder': encoder}"
            )
        return {"transformer" if "Transformer" in type(unwrapped(model)).__name__ else "unet": model}, None
    named = model if isinstance(model, Mapping) else getattr(model, "components", {})
    parts = {part: module for part, module in named.items() if isinstance(module, nn.Module)}
    return parts, None if isinstance(model, Mapping) else tuple(getattr(model, "_lora_loadable_modules", ()))


def _is_a(module: nn.Module, kind: str) -> bool:
    """Whether a module's class or one of its bases has this name: neither diffusers nor transformers need be installed."""
    return any(base.__name__ == kind for base in type(unwrapped(module)).__mro__)


def _factors(part: str, module: nn.Module, name: str | None, form: Approximation) -> dict[str, Factors]:
    """The factors of each layer of a part."""
    chosen = {f"{part}.{layer}": placed for layer, placed in by_layer(module, name).items()}
    whole = next((layer for layer, placed in chosen.items() if placed.whole), None)
    if whole is not None:
        raise ValueError(f"{whole} is trained whole, which a LoRA file cannot hold; delora.merge writes it into the weights")
    _, tensors = as_lora(chosen, form=form)
    factors: dict[str, Factors] = {}
    for layer in chosen:
        if f"{layer}.lora_A.weight" not in tensors:
            raise ValueError(
                f"{layer} is an embedding, which these files cannot hold; delora.merge writes its change into the weights"
            )
        if groups_of(chosen[layer]) > 1:
            raise ValueError(
                f"{layer} is a convolution with groups, which not all programs read; delora.merge writes its change into the "
                "weights"
            )
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        factors[layer.removeprefix(f"{part}.")] = (down.detach().cpu(), up.detach().cpu())
    return factors


# ---------------------------------------------------------------- text encoders

# The layers that every program reads: LORA_CLIP_MAP in ComfyUI's comfy/lora.py, and the endings that diffusers'
# _load_lora_into_text_encoder looks for. The names in files begin with "text_model."; transformers 5.6 leaves it out of some.
CLIP = re.compile(r"(?:text_model\.)?(encoder\.layers\.\d+\.)(self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


def _text_encoder(part: str, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The layers of a CLIP text encoder by their names in files.

    diffusers recognises the kind of a file by a text encoder's output projections (``convert_state_dict_to_peft``): without any
    it stops, or drops other layers. So if none is adapted, one is added whose change is zero.
    """
    named: dict[str, Factors] = {}
    for layer, factors in layers.items():
        match = CLIP.fullmatch(layer)
        if match is None:
            raise ValueError(
                f"{part}.{layer} has no name in LoRA files: of a text encoder they hold q_proj, k_proj, v_proj, out_proj, fc1 "
                "and fc2 in the layers of a CLIP model; leave it out of targets, or delora.merge writes it into the weights"
            )
        named[f"text_model.{match[1]}{match[2]}"] = factors
    if not any(layer.endswith("out_proj") for layer in named):
        layer, (down, up) = next(iter(named.items()))
        width = up.shape[0] if layer.endswith("fc2") else down.shape[1]
        output = re.sub(r"(self_attn|mlp)\.\w+$", "self_attn.out_proj", layer)
        named[output] = (down.new_zeros(1, width), up.new_zeros(width, 1))
    return named


# ---------------------------------------------------------------- diffusers' names

# The parts into which one of diffusers' pipelines loads a LoRA (_lora_loadable_modules in loaders/lora_pipeline.py).
LOADABLE = (
    *("unet", "transformer", "text_encoder", "text_encoder_2"),
    *("prior", "transformer_2", "transformer_ref", "connectors", "text_conditioner"),
)


def _diffusers_names(
    parts: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, Factors]], readable: tuple[str, ...] | None
) -> dict[str, Tensor]:
    if readable is None:
        model = _model(parts)
        readable = LOADABLE if model is None else tuple(part for part in model.prefixes if part != "text_encoder_3")
    tensors: dict[str, Tensor] = {}
    for part, of_part in layers.items():
        if part not in readable:
            raise ValueError(
                f"diffusers loads no LoRA into {part!r} here, only into {', '.join(readable) or 'no part of this pipeline'}: "
                f"delora.eject it, or delora.merge writes it into the weights"
            )
        for layer, (down, up) in (_text_encoder(part, of_part) if part.startswith("text_encoder") else of_part).items():
            tensors |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return tensors


# ---------------------------------------------------------------- kohya's names


@dataclass(frozen=True)
class Slot:
    """Where a layer is in a file of kohya's.

    ``layers`` are those whose outputs, one after the other, are the rows of one layer in the file, as q, k and v of SD3 and
    FLUX are. ``swapped``: the two halves of the rows are in the other order there (scale and shift of a last norm).
    """

    name: str
    layers: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class ImageModel:
    """A family of models: what kohya's names of its parts begin with."""

    name: str
    prefixes: dict[str, str]


ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SD = ImageModel("Stable Diffusion 1 and 2", {"unet": "lora_unet", "text_encoder": "lora_te"})
SDXL = ImageModel("Stable Diffusion XL", {"unet": "lora_unet", **ENCODERS})
SD3 = ImageModel("SD3", {"transformer": "lora_unet", **ENCODERS, "text_encoder_3": "lora_te3"})
# Not the T5 of FLUX, which diffusers leaves out without an error.
FLUX = ImageModel("FLUX", {"transformer": "lora_unet", "text_encoder": "lora_te1"})


def _model(parts: Mapping[str, nn.Module]) -> ImageModel | None:
    """The family of a model, which its U-Net or transformer tells."""
    for module in parts.values():
        if _is_a(module, "UNet2DConditionModel"):
            conditioned = getattr(getattr(unwrapped(module), "config", None), "addition_embed_type", None)
            return SDXL if conditioned == "text_time" else SD
        for kind, model in (("SD3Transformer2DModel", SD3), ("FluxTransformer2DModel", FLUX)):
            if _is_a(module, kind):
                return model
    return None


# The layers of a block by kohya's names, from the tables named at the top; several layers on the right are one there.
Q_K_V, ADDED_Q_K_V = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
FLUX_BLOCKS = {
    "transformer_blocks": {
        "double_blocks.{}.img_mod.lin": "norm1.linear",
        "double_blocks.{}.img_attn.qkv": Q_K_V,
        "double_blocks.{}.img_attn.proj": "attn.to_out.0",
        "double_blocks.{}.img_mlp.0": "ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": "ff.net.2",
        "double_blocks.{}.txt_mod.lin": "norm1_context.linear",
        "double_blocks.{}.txt_attn.qkv": ADDED_Q_K_V,
        "double_blocks.{}.txt_attn.proj": "attn.to_add_out",
        "double_blocks.{}.txt_mlp.0": "ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": "ff_context.net.2",
    },
    "single_transformer_blocks": {
        "single_blocks.{}.modulation.lin": "norm.linear",
        "single_blocks.{}.linear1": f"{Q_K_V} proj_mlp",
        "single_blocks.{}.linear2": "proj_out",
    },
}
SD3_BLOCKS = {
    "transformer_blocks": {
        "joint_blocks.{}.x_block.adaLN_modulation.1": "norm1.linear",
        "joint_blocks.{}.x_block.attn.qkv": Q_K_V,
        "joint_blocks.{}.x_block.attn.proj": "attn.to_out.0",
        "joint_blocks.{}.x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "joint_blocks.{}.x_block.attn2.proj": "attn2.to_out.0",
        "joint_blocks.{}.x_block.mlp.fc1": "ff.net.0.proj",
        "joint_blocks.{}.x_block.mlp.fc2": "ff.net.2",
        "joint_blocks.{}.context_block.adaLN_modulation.1": "norm1_context.linear",
        "joint_blocks.{}.context_block.attn.qkv": ADDED_Q_K_V,
        "joint_blocks.{}.context_block.attn.proj": "attn.to_add_out",
        "joint_blocks.{}.context_block.mlp.fc1": "ff_context.net.0.proj",
        "joint_blocks.{}.context_block.mlp.fc2": "ff_context.net.2",
    },
}
# Outside the blocks. Of FLUX none: diffusers drops those in kohya's files without an error (it forgets "transformer.").
SD3_OTHERS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
T5 = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))")
UNET = re.compile(
    r"(?P<block>(?:down|up)_blocks\.(?P<number>\d+)|mid_block)\."
    r"(?:attentions\.(?P<attention>\d+)\.(?P<inner>proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
    r"|resnets\.(?P<resnet>\d+)\.(?P<conv>conv1|conv2|time_emb_proj|conv_shortcut)"
    r"|(?P<sampler>downsamplers|upsamplers)\.0\.conv)"
)
# Stable Diffusion XL is in files with the names of its first code, as sdxl_model_util.py and unet_to_diffusers translate them.
SDXL_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
SDXL_RESNET |= {"conv_shortcut": "skip_connection"}
UNET_OTHERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _slot(model: ImageModel, layer: str, module: Any) -> Slot | None:
    """Where a layer of a U-Net or a transformer is in kohya's files, or None if they have no name for it."""
    if model in (SD, SDXL):
        name = _unet_name(layer, module if model is SDXL and _has_first_names(module) else None)
        return None if name is None else Slot(name, (layer,))
    blocks, others = (SD3_BLOCKS, SD3_OTHERS) if model is SD3 else (FLUX_BLOCKS, {})
    if T5.fullmatch(layer):
        return Slot(layer, (layer,))
    if layer in others:
        return Slot(others[layer], (layer,), swapped=layer == "norm_out.linear")
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    for name, inner in blocks.get(match[1], {}).items() if match else ():
        if match and match[3] in inner.split():
            # The last of SD3's blocks gives its text's norm as diffusers' last norm has it: scale, then shift.
            last = model is SD3 and inner == "norm1_context.linear" and int(match[2]) == len(module.transformer_blocks) - 1
            return Slot(name.format(match[2]), tuple(f"{match[1]}.{match[2]}.{end}" for end in inner.split()), last)
    return None


def _unet_name(layer: str, sdxl: Any | None) -> str | None:
    """The name of a U-Net's layer: diffusers' own, or for Stable Diffusion XL that of its first code."""
    if layer in UNET_OTHERS and (sdxl is not None or not layer.startswith("add_")):  # diffusers reads no "add_embedding"
        return layer if sdxl is None else UNET_OTHERS[layer]
    match = UNET.fullmatch(layer)
    if match is None or sdxl is None:
        return match and layer
    per_block = sdxl.config.layers_per_block + 1
    first = per_block * int(match["number"] or 0)
    if match["block"] == "mid_block":
        start = f"middle_block.{1 if match['attention'] else 2 * int(match['resnet'])}"
    elif match["sampler"]:
        return f"input_blocks.{first + per_block}.0.op" if "down" in layer else f"output_blocks.{first + per_block - 1}.2.conv"
    else:
        count = int(match["attention"] or match["resnet"])
        side, index = ("output_blocks", first + count) if layer.startswith("up") else ("input_blocks", first + count + 1)
        start = f"{side}.{index}.{1 if match['attention'] else 0}"
    return f"{start}.{match['inner'] or SDXL_RESNET[match['conv']]}"


def _has_first_names(unet: Any) -> bool:
    """Whether diffusers reads a U-Net's layers by the names of Stable Diffusion XL's first code.

    Not if there is a block 10 (it takes it for block 1 as well), or an upsampler without an attention before it (it takes it
    for one).
    """
    count = unet.config.layers_per_block
    return (
        isinstance(count, int)
        and len(unet.down_blocks) * (count + 1) <= 10
        and all(hasattr(block, "attentions") for block in (unet.mid_block, *unet.up_blocks[:-1]))
    )


def _kohyas_names(parts: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, Factors]]) -> dict[str, Tensor]:
    """All tensors by kohya's names, with one alpha for all layers and the rest of each layer's scale in ``up``.

    One alpha, because diffusers applies those of single layers to no layer of a U-Net (``get_peft_kwargs`` looks for them
    under names that it has changed).
    """
    model = _model(parts)
    if model is None:
        raise ValueError(
            f"kohya's names are known for the U-Net of Stable Diffusion 1, 2 and XL and the transformers of SD3 and FLUX, with "
            f"their text encoders; none of these is among {', '.join(parts)}: pass the whole pipeline, or use kohya=False"
        )
    named: dict[str, Factors] = {}
    for part, of_part in layers.items():
        if part not in model.prefixes:
            raise ValueError(f"kohya's names of {model.name} know {', '.join(model.prefixes)}, not {part!r}")
        for name, factors in _kohyas_layers(model, part, parts[part], of_part).items():
            named[f"{model.prefixes[part]}_{name.replace('.', '_')}"] = factors
    alpha = float(Counter(len(down) for down, _ in named.values()).most_common(1)[0][0])
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in named.items():
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up if len(down) == alpha else up * (len(down) / alpha)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def _kohyas_layers(model: ImageModel, part: str, module: nn.Module, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The layers of a part by kohya's names, with dots."""
    if part in ENCODERS:
        return _text_encoder(part, layers)
    slots = {layer: _slot(model, layer, unwrapped(module)) for layer in layers}
    nameless = next((layer for layer, slot in slots.items() if slot is None), None)
    if nameless is not None:
        raise ValueError(
            f"{part}.{nameless} has no name in kohya's files of {model.name} that all programs read; "
            "kohya=False writes it with the name that diffusers reads"
        )
    modules = dict(walk(module))
    named: dict[str, Factors] = {}
    for slot in dict.fromkeys(slot for slot in slots.values() if slot is not None):
        down, up = _joined(slot, {layer: layers[layer] for layer in slot.layers if layer in layers}, modules)
        named[slot.name] = (down, torch.cat(up.chunk(2)[::-1]) if slot.swapped else up)
    return named


def _joined(slot: Slot, layers: Mapping[str, Factors], modules: Mapping[str, Any]) -> Factors:
    """One change for the rows of several layers, of which those that are not adapted keep theirs."""
    if len(slot.layers) == 1:
        return layers[slot.layers[0]]
    down = torch.cat([down for down, _ in layers.values()])
    up = down.new_zeros(sum(modules[layer].out_features for layer in slot.layers), len(down))
    row = column = 0
    for layer in slot.layers:
        if layer in layers:
            rows, columns = layers[layer][1].shape
            up[row : row + rows, column : column + columns] = layers[layer][1]
            column += columns
        row += modules[layer].out_features
    return down, up
