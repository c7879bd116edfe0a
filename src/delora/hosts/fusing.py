"""Matrices whose rows are those of several: a fused ``qkv``, a ``gate_up_proj``.

One product computes them, and their module takes it apart. Each can be adapted as a matrix of its own, under the name of the
layer or parameter with that of the slice: ``qkv_proj.q``. Which rows are whose is known for the classes in the tables below, as
their own code says it; of a module of yours one line says it:
``delora.hosts.fused.register(MyAttention, {"qkv": delora.hosts.Fused({"q": 64, "k": 16, "v": 16})})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delora.hosts.registry import ByType

__all__ = ["Fused", "FusedMatrices", "fused"]


@dataclass(frozen=True)
class Fused:
    """The rows of a matrix [out, in] that holds several: one block of rows for each, and all of that ``repeats`` times.

    Args:
        sizes: the number of rows in a block of each, by name, in the order in which the blocks lie.
        repeats: how often the blocks follow one another: 1 for thirds of a ``qkv``, the number of heads where each head has
            its own q, k and v.

    >>> Fused({"q": 4, "k": 2, "v": 2}).rows("k").tolist()
    [4, 5]
    >>> interleaved = Fused({"gate": 1, "up": 1}, repeats=3)
    >>> interleaved.rows("up").tolist(), interleaved.total
    ([1, 3, 5], 6)
    """

    sizes: Any  # a mapping; kept as a tuple of pairs, which can be a key
    repeats: int = 1

    def __post_init__(self) -> None:
        pairs = tuple(self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes)
        numbers = [self.repeats, *(n for _, n in pairs)]
        if len(pairs) < 2 or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"Fused({dict(pairs)}, repeats={self.repeats!r}): expected two or more sizes, integers above 0")
        if not all(isinstance(name, str) and name.isidentifier() and not hasattr(nn.ModuleDict, name) for name, _ in pairs):
            raise ValueError(f"Fused({dict(pairs)}): a name is made of letters, digits and '_', and no attribute of ModuleDict")
        object.__setattr__(self, "sizes", pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the matrices."""
        return tuple(name for name, _ in self.sizes)

    @property
    def total(self) -> int:
        """The number of rows of all."""
        return self.repeats * sum(n for _, n in self.sizes)

    def count(self, name: str) -> int:
        """The number of rows of one.

        >>> Fused({"q": 2, "k": 1, "v": 1}, repeats=3).count("q")
        6
        """
        return self.repeats * dict(self.sizes)[name]

    def rows(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The indices of the rows of one, ascending."""
        start = sum(n for _, n in self.sizes[: self.names.index(name)])
        every = torch.arange(self.total, device=device).view(self.repeats, -1)
        return every[:, start : start + dict(self.sizes)[name]].flatten()

    def span(self, name: str) -> slice | None:
        """The rows of one, if they lie together, else None.

        >>> Fused({"q": 4, "k": 2, "v": 2}).span("v")
        slice(6, 8, None)
        """
        if self.repeats > 1:
            return None
        start = sum(n for _, n in self.sizes[: self.names.index(name)])
        return slice(start, start + self.count(name))

    def place(self, name: str, device: torch.device | str = "cpu") -> slice | Tensor:
        """The rows of one as an index: a slice where they lie together, so that indexing gives a view."""
        span = self.span(name)
        return self.rows(name, device) if span is None else span

    def of(self, name: str, t: Tensor) -> Tensor:
        """Of a tensor [total, ...] the rows of one, a view where they lie together.

        >>> Fused({"k": 1, "v": 1}, repeats=2).of("v", torch.arange(4)).tolist()
        [1, 3]
        """
        return t[self.place(name, t.device)]


# Of a module, and the number of rows of the matrix: how these are divided.
Divided = Fused | Callable[[Any, int], Fused]


class FusedMatrices(ByType[Divided]):
    """Which rows of a module's fused layers and parameters are whose, by the module's type and their names in it.

    Of a type of your own: ``fused.register(MyAttention, {"qkv": Fused(...)})``; where the sizes are told by the module, a
    function of the module and the number of rows.

    >>> fused(nn.MultiheadAttention(4, 2), "in_proj_weight", 12).rows("v").tolist()
    [8, 9, 10, 11]
    """

    def register(self, kind: type, layouts: Mapping[str, Divided]) -> None:
        """Let these layers and parameters of modules of a type, and of types derived from it, be known as fused.

        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.heads, self.qkv = 2, nn.Linear(8, 24)
        >>> fused.register(Attention, {"qkv": lambda module, rows: Fused({"q": 4, "k": 4, "v": 4}, repeats=module.heads)})
        >>> fused(Attention(), "qkv", 24).repeats
        2
        """
        if not isinstance(layouts, Mapping) or not all(isinstance(e, Fused) or callable(e) for e in layouts.values()):
            raise TypeError(
                f"fused.register({kind.__name__}, ...): expected for each layer or parameter a Fused, or a function of the "
                f"module and the number of rows that gives one, got {layouts!r}"
            )
        self.registry[kind] = dict(layouts)

    def __call__(self, module: nn.Module, key: str, rows: int) -> Fused | None:
        """How the rows of a layer or parameter are divided; None if it is not known, or what is known does not fit it."""
        divided = self.known(module).get(key)
        try:
            how = divided(module, rows) if callable(divided) else divided
        except (AttributeError, ValueError, TypeError):  # of another version, with other attributes
            return None
        return how if how is not None and how.total == rows else None


fused = FusedMatrices()


# ---------------------------------------------------------------- what is known


def _parts(*names: str) -> Callable[[Any, int], Fused]:
    """Equal parts, one after another."""
    return lambda module, rows: Fused({name: rows // len(names) for name in names})


def _by_head(heads: Callable[[Any], int]) -> Callable[[Any, int], Fused]:
    """Each head has its own q, k and v of one size, one after another."""
    return lambda module, rows: Fused(dict.fromkeys("qkv", rows // 3 // heads(module)), repeats=heads(module))


def _grouped(q: int, kv: int) -> Fused:
    return Fused({"q": q, "k": kv, "v": kv})


def _gpt2(module: Any, rows: int) -> Fused:
    return _parts(*("kv" if module.is_cross_attention else "qkv"))(module, rows)


def _falcon(module: Any, rows: int) -> Fused:
    if module.new_decoder_architecture:  # each head of k and v after its heads of q
        q = module.num_heads // module.num_kv_heads * module.head_dim
        return Fused({"q": q, "k": module.head_dim, "v": module.head_dim}, repeats=module.num_kv_heads)
    if module.multi_query:
        return _grouped(module.num_heads * module.head_dim, module.head_dim)
    return _by_head(lambda m: m.num_heads)(module, rows)


def _bigcode(module: Any, rows: int) -> Fused:
    if module.is_cross_attention:
        return _parts("k", "v")(module, rows)
    if module.multi_query:
        return _grouped(module.embed_dim, module.kv_dim)
    return _by_head(lambda m: m.num_heads)(module, rows)


def _codegen(module: Any, rows: int) -> Fused:
    return Fused({"q": rows // 12, "v": rows // 12, "k": rows // 12}, repeats=4)  # laid out for four processes


def _phi3(module: Any, rows: int) -> Fused:
    return _grouped(module.config.num_attention_heads * module.head_dim, module.num_key_value_heads * module.head_dim)


def _of_experts(module: nn.Module) -> Mapping[str, Divided]:
    """Gate and up of transformers' experts, by ``is_concatenated``, which it sets on all but a few."""
    concatenated = module.__dict__.get("is_concatenated")
    if not isinstance(concatenated, bool):
        return {}
    if concatenated:
        return {"gate_up_proj": _parts("gate", "up")}
    return {"gate_up_proj": lambda module, rows: Fused({"gate": 1, "up": 1}, repeats=rows // 2)}


fused.register(nn.MultiheadAttention, {"in_proj_weight": _parts("q", "k", "v")})
fused.finders.append(_of_experts)

# Classes by the kind of transformers' model or their module in timm, as their code in transformers 5.23 and timm 1.0.31 says.
_THIRDS = """
blip.BlipAttention blip_2.Blip2Attention instructblip.InstructBlipAttention instructblipvideo.InstructBlipVideoAttention
mgp_str.MgpstrAttention cohere_compass.CohereCompassVisionAttention dots3_note.Dots3NoteVisionAttention
deepseek_ocr2.DeepseekOcr2SamVisionAttention got_ocr2.GotOcr2VisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention
hiera.HieraMaskUnitAttention florence2.Florence2VisionChannelAttention florence2.Florence2VisionWindowAttention
glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention glm5_next.Glm5NextVisionAttention
glm_image.GlmImageVisionAttention glm_ocr.GlmOcrVisionAttention pp_formulanet.PPFormulaNetVisionAttention
pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention vitdet.VitDetAttention pp_ocrv5_server_rec.PPOCRV5ServerRecAttention
sam.SamVisionAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention qwen2_vl.VisionAttention
qwen2_5_vl.Qwen2_5_VLVisionAttention qwen3_5.Qwen3_5VisionAttention qwen3_5_moe.Qwen3_5MoeVisionAttention
qwen3_vl.Qwen3VLVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention qwen3_vl_moe.Qwen3VLMoeVisionAttention
qwen4_exp.Qwen4ExpVisionAttention sam2.Sam2MultiScaleAttention sam_hq.SamHQVisionAttention seggpt.SegGptAttention
slanext.SLANeXtVisionAttention timesformer.TimesformerSelfAttention unlimited_ocr.UnlimitedOcrSamVisionAttention
"""
_TIMM_THIRDS = """
layers.attention.Attention layers.attention.AttentionRope layers.diff_attention.DiffAttention models.beit.Attention
models.cait.TalkingHeadAttn models.coat.FactorAttnConvRelPosEnc models.convit.MHSA models.davit.ChannelAttention
models.davit.ChannelAttentionV2 models.davit.WindowAttention models.edgenext.CrossCovarianceAttn models.eva.EvaAttention
models.fastvit.Attention models.hiera.MaskUnitAttention models.hieradet_sam2.MultiScaleAttention models.metaformer.Attention
models.mvitv2.MultiScaleAttention models.nest.Attention models.swin_transformer.WindowAttention
models.twins.LocallyGroupedAttn models.swin_transformer_v2.WindowAttention
models.swin_transformer_v2_cr.WindowMultiHeadAttention models.visformer.Attention
models.vision_transformer_relpos.RelPosAttention models.vision_transformer_sam.Attention models.volo.Attention models.xcit.XCA
"""
_GATE_UP = """
dia.DiaMLP dots3_note.Dots3NoteAudioMLP esmfold2.EsmFold2SwiGLU glm.GlmMLP glm4.Glm4MLP glm4v.Glm4vTextMLP
glm_image.GlmImageTextMLP glm_ocr.GlmOcrTextMLP minimax_m3_vl.MiniMaxM3VLDenseMLP phi3.Phi3MLP
phi4_multimodal.Phi4MultimodalMLP zamba2.Zamba2MLP
"""
_QKV, _HALVES = _parts("q", "k", "v"), _parts("gate", "up")
_KNOWN: dict[str, dict[str, Divided]] = {
    **{name: {"qkv": _QKV} for name in _THIRDS.split()},
    **{name: {"gate_up_proj": _HALVES} for name in _GATE_UP.split()},
    "bark.BarkSelfAttention": {"att_proj": _QKV},
    "bloom.BloomAttention": {"query_key_value": _by_head(lambda m: m.num_heads)},
    "codegen.CodeGenAttention": {"qkv_proj": _codegen},
    "dbrx.DbrxAttention": {
        "Wqkv": lambda m, rows: _grouped(m.hidden_size, m.num_key_value_heads * m.head_dim),
    },
    "decision_transformer.DecisionTransformerGPT2Attention": {"c_attn": _gpt2},
    "exaone4_5.Exaone4_5_VisionAttention": {"qkv": lambda m, rows: _grouped(m.q_dim, m.kv_dim)},
    "falcon.FalconAttention": {"query_key_value": _falcon},
    "gpt2.GPT2Attention": {"c_attn": _gpt2},
    "gpt_bigcode.GPTBigCodeAttention": {"c_attn": _bigcode},
    "gpt_neox.GPTNeoXAttention": {"query_key_value": _by_head(lambda m: m.config.num_attention_heads)},
    "granitemoehybrid.GraniteMoeHybridMLP": {"input_linear": _HALVES},
    "granitemoeshared.GraniteMoeSharedMLP": {"input_linear": _HALVES},
    "imagegpt.ImageGPTAttention": {"c_attn": _gpt2},
    "llama4.Llama4TextExperts": {"gate_up_proj": _HALVES},
    "modernbert.ModernBertAttention": {"Wqkv": _QKV},
    "modernbert.ModernBertMLP": {"Wi": _HALVES},  # what is activated is the gate
    "mpt.MptAttention": {"Wqkv": _QKV},
    "openai.Attention": {"c_attn": _QKV},
    "persimmon.PersimmonAttention": {"query_key_value": _by_head(lambda m: m.num_heads)},
    "phi3.Phi3Attention": {"qkv_proj": _phi3},
    "phi4_multimodal.Phi4MultimodalAttention": {"qkv_proj": _phi3},
}
for _name, _layouts in _KNOWN.items():
    _kind, _class = _name.split(".")
    fused.by_name[f"transformers.models.{_kind}.modeling_{_kind}.{_class}"] = _layouts
fused.by_name |= {f"timm.{name}": {"qkv": _QKV} for name in _TIMM_THIRDS.split()}
