"""Small configurations: every size of a transformers configuration is cut down by what its name says it is."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import ResNetConfig, TimmBackboneConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.words import mismatches

__all__ = ["SPECIAL", "Tiny", "given", "peek", "seek"]

# The largest value (-1: as it is) of a field, by the first pattern that its whole name matches.
TABLE = r"""
-1 type_vocab_size|.*num_mel_bins|num_channels|in_chann?els?|.*kernel.*|.*stride.*|temporal_patch_size|.*merge_size
-1 (num_zero_|zero_)expert.*|lags_sequence
128 (.*_)?vocab_size(_per_layer_input)?|.*tokenizer_vocab_size
128 (.*max_|n_)(position_embeddings|positions|ctx)|max_(source|target)_positions|max_seq(uence)?_len(gth)?
16 axes_dims?_rope|rope_axes_dims?|sample_size|(decoder_)?base_dim|axes_dims?|axes_lens?
32 block_out_channels|(encoder|decoder)_block_out_channels|.*(cross|joint|caption|text|freq|context|cap)\w*_(dim|channels)
8 norm_num_groups
64 num_position_embeddings|upsample_groups|codebook_size|num_embeddings|audio_vocab_size
0 max_window_layers|num_kv_shared_layers|num_nextn_predict_layers
1 n_group|topk_group|num_expert_group|num_limited_groups|(num|n)_shared_experts|moe_num_shared_experts|mamba_n_groups|n_groups
1 first_k_dense_replace|num_dense_layers|moe_layer_start_index|(decoder|encoder)_sparse_step|depths|num_(block|layer)s_per_stage
1 mamba_ngroups|block_sizes|layers_per_block|num_res_blocks
2 num_(experts_per_tok|selected_experts)|moe_topk|.*top_k(_experts)?|topk|moe_top_k|moe_k|num_codebooks|num_quantizers
2 num_codevector_groups|.*embedding_groups
2 (.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|resampler_depth|num_blocks)
2 num_(encoder|decoder|denoising|.*hidden)_?(layers|blocks)?|layers|(.*_)?num_sparse_.*_layers|num_\w+_layers
2 (.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|kv_heads)
4 (moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts|window_size|mm_tokens_per_image|mamba_n_heads
4 linear_num_(key_|value_)?heads
4 (.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads|query_heads|index_n_heads)
8 (.*_)?(state_size|d_state|rotary_dim)|(sliding|attention|local)_(window|chunk_size).*|patch_size|num_queries
8 num_query_tokens|(mamba_)?chunk_(size|length)
16 index_topk|hidden_size_per_layer_input|num_conv_pos_embeddings
6 prediction_length
32 qk_head_dim|mamba_d_head|mamba_head_dim|image_size|pretrain_image_size|img_size|input_size
16 (.*_)?(head_dim|d_kv|d_head|head_size|dim_head|v_head_dim)
24 (q|kv|o)_lora_rank|time_step_rank|mamba_dt_rank|attention_latent_dim
96 (.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|d_inner|mlp_dim|intermediate_dim|n_inner|feedforward_dim)
96 (.*_)?(inner_dim|intermediate_size_mlp)
64 (.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|projection_dim|proj_dim|dim|out_dim|width)
64 (.*_)?(embedding_dim|hidden_sizes|hidden_channels|embed_dims|embed_size|conv_dim|output_dim|lru_width|bottleneck_size)
64 encoder_in_channels|(.*_)?(query_pre_attn_scalar|visual_feat_dim|visual_embedding_dim)
"""
SIZES = [(int(size), re.compile(pattern)) for size, pattern in (line.split(None, 1) for line in TABLE.strip().splitlines())]
# Tokens with a meaning stand outside of what the synthetic texts draw from.
SPECIAL = dict(pad=0, bos=1, eos=2, sep=3, cls=4, mask=5, unk=6, decoder_start=1, image=120, video=121, audio=122) | dict(
    vision_start=100, vision_end=101, image_start=102, image_end=103, boi=104, eoi=105, audio_start=106, audio_end=107
)
# The parts of a configuration that has none by itself, by the name of the part and of the type.
PARTS = [
    (r"(vision|image).*encoder.*\.encoder|vision_config|vision", "vit"),
    (r"speech.*\.encoder", "wav2vec2"),
    (r"audio_encoder", "encodec"),
    (r"text_encoder", "t5"),
    (r"musicgen.*\.decoder", "musicgen_decoder"),
    (r"question_encoder", "dpr"),
    (r"generator", "bart"),
    (r"decoder", "bert"),
    (r".*", "bert"),
]


def _size(name: str) -> int:
    """The largest value of a field of this name, or -1."""
    return next((size for size, pattern in SIZES if pattern.fullmatch(name)), -1)


def peek(config: Any, name: str) -> Any:
    """An attribute, or None where it is absent or cannot be told."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def seek(config: Any, names: list[str], default: Any = None) -> Any:
    """The first of these fields that is set to a number or numbers, in a configuration or else in those inside it."""
    for name in names:
        value = peek(config, name)
        if isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and value:
            return value
    inner = [v for v in getattr(config, "__dict__", {}).values() if isinstance(v, PreTrainedConfig)]
    return next((v for c in inner if (v := seek(c, names)) is not None), default)


def given(kind: str) -> PreTrainedConfig:
    """The configuration of a type as it is by default, with plain parts where it has no parts of its own."""
    cls = CONFIG_MAPPING[kind]
    try:
        config = cls()
    except Exception:
        config = None
    parts = getattr(cls, "sub_configs", {}) or {}
    bare = bool(parts) and not any(isinstance(peek(config, p), PreTrainedConfig) for p in parts)
    if config is not None and not (bare and getattr(cls, "has_no_defaults_at_init", False)):
        return config
    made = {}
    for part in parts or ("encoder", "decoder"):
        which = next(t for pattern, t in PARTS if re.fullmatch(pattern, part) or re.fullmatch(pattern, f"{kind}.{part}"))
        made[part] = CONFIG_MAPPING[which]().to_dict() | {"model_type": which}
        if part == "decoder":
            made[part] |= {"is_decoder": True, "add_cross_attention": True}
    return cls(**made)


def _ropes(rope: Any) -> list[dict[str, Any]]:
    return [r for r in [rope, *rope.values()] if isinstance(r, dict)] if isinstance(rope, dict) else []


def _sections(rope: dict[str, Any], head_dim: int) -> None:
    n = int(head_dim // 2 * (rope.get("partial_rotary_factor") or 1))
    rope["mrope_section"] = [n - 2 * (n // 3), n // 3, n // 3]


class Tiny:
    """Makes a configuration small. ``changed`` holds the fields that it cut, by path; those in ``keep`` are left alone.

    Level 0 cuts all that it knows, 1 leaves tuples as they are, 2 cuts only the numbers of layers and of experts.
    """

    def __init__(self, level: int = 0, keep: Collection[str] = (), put: Mapping[str, Any] | None = None) -> None:
        self.level, self.keep, self.put = level, set(keep), dict(put or {})
        self.changed: dict[str, int | None] = {}  # the fields that were cut, with what they became
        self.large: dict[str, int] = {}  # the fields that are large and were left alone
        self.unset: list[str] = []  # the fields that are None
        self.flags: dict[str, bool] = {}
        self.aliases: dict[str, list[str]] = {}

    def __str__(self) -> str:
        more = [*(f"+{path}" for path in sorted(self.keep)), *(f" {path}={value}" for path, value in self.put.items())]
        return f"{self.level}{''.join(more)}"

    def near(self, reason: str) -> Iterator[Tiny]:
        """Others that may do where this one failed for a reason: a field set that the reason names, or one cut less."""

        def said(path: str) -> bool:
            return any(re.search(rf"(?<!\w){n}(?!\w)", reason) for n in {path.rpartition(".")[2], *self.aliases.get(path, ())})

        def other(**put: Any) -> Tiny:
            return Tiny(self.level, self.keep, self.put | put)

        if "are not tiny" in reason:
            yield from (other(**{path: 64}) for path in sorted(self.large, key=lambda path: -self.large[path]))
            yield from (other(**{path: max(1, v // 4)}) for path, v in self.changed.items() if v and v > 8)
            return
        if missing := re.search(r"'(\w+)' object has no attribute '(\w+)'", reason):
            yield from (other(**{f"{missing[1]}!{missing[2]}": v}) for v in (0.0, max(8, _size(missing[2]))))
        unset = {p: s for p in self.unset if p not in self.put and (s := _size(p.rpartition(".")[2])) != 0}
        for path in filter(said, unset):
            yield from (other(**{path: value}) for value in ([unset[path]] if unset[path] > 0 else [8]))
            yield other(**{path: True})
        for path, value in self.flags.items():
            if path not in self.put and (
                said(path) or any(len(w) > 5 and w in reason for w in path.rpartition(".")[2].split("_"))
            ):
                yield other(**{path: not value})
        for old, new in mismatches(reason):
            yield from (other(**{path: new}) for path, value in self.changed.items() if value == old and new <= 2048)
        for path, value in self.changed.items():
            if said(path):
                yield Tiny(self.level, self.keep | {path}, self.put)
                yield from (other(**{path: v}) for v in ((value * 2, value // 2) if value else ()) if v)
        yield from (other(**{path: size}) for path, size in unset.items() if size > 0 and not said(path))
        yield from (Tiny(self.level, self.keep | {path}, self.put) for path in self.changed if not said(path))

    def arguments(self, cls: type) -> dict[str, Any]:
        """Small values for the arguments of a class that describes its size by them."""
        new: dict[str, Any] = {}
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            value = parameter.default
            if value is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
                continue
            self._note(name, value)
            if name in self.put:
                new[name] = self.put[name]
            elif (small := self._shrunk(name, name, value)) is not value:
                new[name] = small
        if "attention_head_dim" in new:  # the parts of a rotary embedding fill a head
            for name in new:
                if "rope" in name and isinstance(new[name], (list, tuple)) and name not in self.keep:
                    part = new["attention_head_dim"] // len(new[name]) // 2 * 2
                    new[name] = type(new[name])(
                        [new["attention_head_dim"] - part * (len(new[name]) - 1), *[part] * (len(new[name]) - 1)]
                    )
        return new

    def _note(self, path: str, value: Any, aliases: Mapping[str, str] | None = None) -> None:
        name = path.rpartition(".")[2]
        self.aliases[path] = [other for other, own in (aliases or {}).items() if own == name]
        if type(value) is int and value > 32 and _size(name) < 0 and "token" not in name and not name.endswith("_id"):
            self.large[path] = value
        if value is None:
            self.unset.append(path)
        elif isinstance(value, bool) and not re.match("output_|return_|use_cache|is_encoder_decoder", name):
            self.flags[path] = value

    def __call__(self, config: PreTrainedConfig, path: str = "") -> PreTrainedConfig:
        kind = type(config)
        fields = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        depth = peek(config, "num_hidden_layers")
        new: dict[str, Any] = {}
        for name in fields or vars(config):
            self._note(path + name, peek(config, name), kind.attribute_map)
            if (match := re.fullmatch("(image|video|audio)_token_(id|index)", name)) and peek(config, name) is None:
                new[name] = SPECIAL[match[1]]
        try:
            plain = kind()
        except Exception:
            plain = None
        for name, value in self._values(config, plain, fields):
            if path + name in self.put:
                continue
            if isinstance(value, TimmBackboneConfig):
                new[name] = _backbone(value)
            elif isinstance(value, PreTrainedConfig):
                new[name] = self(value, f"{path}{name}.")
            elif _one_a_layer(name, value, depth):
                continue
            elif (small := self._shrunk(path + name, name, value)) is not value or _given(plain, name, value):
                new[name] = small
        new |= self._layers(config, fields, depth, path)
        new |= self._related(config, plain, fields, new, path)
        new |= {name: self.put[path + name] for name in fields or vars(config) if path + name in self.put}
        made = kind(**new)
        for key, value in self.put.items():
            if key.startswith(f"{kind.__name__}!"):
                setattr(made, key.partition("!")[2], value)
        if self.level == 0:
            for rope in _ropes(peek(made, "rope_parameters")):
                if "rope_theta" in rope and f"{path}mrope_section" not in self.keep:
                    _sections(rope, peek(made, "head_dim") or 16)
        if self.level < 2 and "id2label" in fields:
            made.num_labels = 5
        if peek(made, "pad_token_id") is None and (
            peek(made, "vocab_size") or any(isinstance(v, PreTrainedConfig) for v in new.values())
        ):
            made.pad_token_id = 0
        return made

    def _values(self, config: PreTrainedConfig, plain: Any, fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The fields but those that follow from others (they are None by default and set when the object is made)."""
        for name in fields or vars(config):
            value = peek(config, name)
            if not isinstance(value, (PreTrainedConfig, list, tuple)) and name in fields and fields[name].default is None:
                follows = peek(plain or config, name) == value
            else:
                follows = False
            if not follows:
                yield name, value

    def _shrunk(self, path: str, name: str, value: Any) -> Any:
        many = isinstance(value, (list, tuple))
        if isinstance(value, float):
            if re.fullmatch("(width|depth)_(coefficient|multiplier)", name) and path not in self.keep:
                return min(value, 0.25)
            return 0.0 if "drop" in name else value
        if not value or isinstance(value, bool) or not all(type(x) is int for x in (value if many else [value])):
            return value
        if path in self.keep:
            return value
        if (match := re.fullmatch(r"(.*?)(_token)?_(id|index|ids)", name)) and ("token" in name or match[1] in SPECIAL):
            token = SPECIAL.get(match[1], 100 + sum(map(ord, name)) % 19)
            return type(value)([token] * len(value)) if many else token
        chosen = re.search("(?<!num)_layers$", name) and many and len(value) > 2 and sorted(set(value)) == list(value)
        if chosen or (many and min(value) >= 0 and re.search("indexes$|(?<!out_)indices$|feature_layers?$", name)):
            return type(value)(range(min(len(value), 2)))
        if (self.level == 2 and not re.search(r"layers?$|vocab_size$|experts?$", name)) or (self.level == 1 and many):
            return value
        size = _size(name)
        if size < 0 or (max(value) if many else value) <= size:
            return value
        self.changed[path] = None if many else size
        if not many:
            return size
        cut = (size < 16 and "head" not in name) or (name.endswith("size") and "hidden" not in name)
        return type(value)([min(x, size) if cut else size for x in value])

    def _layers(self, config: PreTrainedConfig, fields: dict[str, Any], depth: Any, path: str) -> dict[str, Any]:
        """Lists with an entry for each layer are cut to one layer of each kind."""
        lists = {n: list(v) for n in fields or vars(config) if _one_a_layer(n, v := peek(config, n), depth)}
        if not lists:
            return {}
        kinds: dict[tuple[str, ...], int] = {}
        for i in range(depth):
            kinds.setdefault(tuple(str(v[i]) for v in lists.values()), i)
        others = [i for i in range(depth) if i not in kinds.values()]
        chosen = sorted([*kinds.values(), *others][: min(max(2, len(kinds)), 4)])
        count = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return {name: [v[i] for i in chosen] for name, v in lists.items()} | {count: len(chosen)}

    def _related(
        self, config: PreTrainedConfig, plain: Any, fields: dict[str, Any], new: dict[str, Any], path: str
    ) -> dict[str, Any]:
        """Fields that have to go together with those that were cut."""
        more: dict[str, Any] = {}
        names = type(config).attribute_map
        depth, heads, kv = (names.get(n, n) for n in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
        if self.level == 2:
            return more
        if "head_dim" in fields and peek(config, "head_dim") is None and f"{path}head_dim" not in self.keep:
            more["head_dim"] = 16
            self.changed[f"{path}head_dim"] = 16
        if "spatial_merge_size" in fields and new.get("window_size"):
            more["window_size"] = 32
        if kv in new and peek(config, kv) == peek(config, heads):
            more[kv] = new.get(heads, new[kv])
        if any("mrope_section" in r for r in _ropes(peek(config, "rope_parameters"))):
            more["rope_parameters"] = copy.deepcopy(config.rope_parameters)
            for rope in _ropes(more["rope_parameters"]):
                if "mrope_section" in rope:
                    _sections(rope, 16)
        features = peek(config, "out_features")
        if features and features != peek(plain, "out_features"):
            more["out_features"] = list(features)
        out = peek(config, "out_indices")
        if isinstance(out, (list, tuple)) and len(out) > 1 and type(peek(config, depth)) is int and "hidden_size" in fields:
            more |= {"out_indices": list(range(1, len(out) + 1)), "out_features": None, depth: len(out)}
        return more


def _given(plain: Any, name: str, value: Any) -> bool:
    """Whether a field was set to something else than what its class has by default."""
    private = name.startswith("_") or name in ("transformers_version", "model_type")
    return plain is not None and not private and isinstance(value, (bool, str, int, float)) and peek(plain, name) != value


def _one_a_layer(name: str, value: Any, depth: Any) -> bool:
    many = isinstance(value, (list, tuple)) and type(depth) is int and len(value) == depth > 2
    return many and (type(value[0]) is not int or "layer" in name or depth > 6)


def _backbone(config: TimmBackboneConfig) -> ResNetConfig:
    """A small network of this library in the place of one of timm, with as many outputs."""
    stages = ["stage1", "stage2", "stage3", "stage4"][-len(config.out_indices or [1]) :]
    return ResNetConfig(embedding_size=64, hidden_sizes=[64] * 4, depths=[1] * 4, out_features=stages)
