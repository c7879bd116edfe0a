"""Files that PEFT wrote are read to its outputs or refused in words; files for PEFT are read by it to our outputs."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from peft import DeloraConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import delora
from delora import IA3, OFT, DeLoRA, DoRA, Full, LoRA
from delora.formats import peft_fields, peft_names
from delora.formats.files import AdapterError
from delora.formats.patterns import Patterns
from tests.cases import Holder, Net, ids, shake

CONFIGS = {"LORA": LoraConfig, "DELORA": DeloraConfig, "IA3": IA3Config, "OFT": OFTConfig}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\b|transformers\b")
        warnings.filterwarnings("ignore", message=r"(fan_in_fan_out|Model has `tie_word|Setting `save_emb|Could not)")
        yield


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def theirs_saved(base, config, folder, **options):
    """A PEFT model on a copy of the base, moved away from its start, and saved."""
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    shake(theirs).save_pretrained(folder, **options)
    return theirs


def theirs_loaded(base, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def keys(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# ---------------------------------------------------------------- fields


def default(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_account_of_fields_is_of_those_that_peft_has(kind):
    """A field that a new PEFT adds fails here, until what it does is known."""
    theirs = {field.name: default(field) for field in dataclasses.fields(CONFIGS[kind])}
    ours = peft_fields.READ[kind] | peft_fields.UNUSED[kind].keys()
    assert ours == set(theirs)
    assert not peft_fields.READ[kind] & peft_fields.UNUSED[kind].keys()
    for field, value in peft_fields.UNUSED[kind].items():
        assert peft_fields.MISSING.get((kind, field), value) == theirs[field], field


def unlike(value):
    return {"none": "all", False: True, None: {"a": 1}}[value]


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in peft_fields.UNUSED.items() for f in fields])
def test_a_field_that_is_used_is_refused_by_name(kind, field):
    config = {"peft_type": kind, **peft_fields.UNUSED[kind]}
    peft_fields.require_known(config, kind, "here")
    with pytest.raises(AdapterError, match=f"here: {field} = .*merge it with PEFT and adapt the result"):
        peft_fields.require_known(config | {field: unlike(config[field])}, kind, "here")


def test_what_is_missing_means_what_peft_takes_it_for():
    """An OFT without the field is a truncated series to PEFT."""
    with pytest.raises(AdapterError, match="use_cayley_neumann = True: a truncated series"):
        peft_fields.require_known({"peft_type": "OFT", "r": 2}, "OFT", "here")


@pytest.mark.parametrize("value", [3, "x", [1], {"a": None}, True])
def test_an_unknown_field_is_refused_if_it_is_set(value):
    for harmless in (None, False, {}, []):
        peft_fields.require_known({"peft_type": "LORA", "tomorrow": harmless}, "LORA", "here")
    with pytest.raises(AdapterError, match="tomorrow = .*this field is not known"):
        peft_fields.require_known({"peft_type": "LORA", "tomorrow": value}, "LORA", "here")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["q"], bias="all"), "bias = 'all': trained biases"),
        (LoraConfig(r=2, target_modules=["q"], bias="lora_only"), "bias = 'lora_only': trained biases"),
        (LoraConfig(r=2, target_modules=["q"], lora_bias=True), "lora_bias = True"),
        (
            LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": [1]}),
            "trainable_token_indices = .*single rows",
        ),
        (LoraConfig(r=2, target_modules=["q"], kasa_config={"beta": 1e-4}), "kasa_config"),
        (OFTConfig(r=2, oft_block_size=0, target_modules=["q"]), "use_cayley_neumann = True: a truncated series"),
        (
            OFTConfig(r=2, oft_block_size=0, target_modules=["q"], use_cayley_neumann=False, block_share=True),
            "block_share = True: one rotation for all",
        ),
        (
            OFTConfig(r=2, oft_block_size=0, target_modules=["q", "emb"], use_cayley_neumann=False),
            "'base_model.model.emb.oft_embedding_R.weight' belongs to no adapter of type OFT that is read",
        ),
        (
            OFTConfig(r=2, oft_block_size=0, target_modules=["conv"], use_cayley_neumann=False),
            "conv is a convolution with a kernel, on which PEFT's OFT computes something else",
        ),
        (
            IA3Config(target_modules=["conv"], feedforward_modules=["conv"]),
            "a scale of a convolution's input is not read",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_writes_and_is_not_read_is_refused_in_words(config, words, tmp_path):
    base = Net()
    base.conv = nn.Conv2d(2, 2, 3)
    theirs_saved(base, config, tmp_path)
    with pytest.raises(AdapterError, match=words):
        delora.load(copy.deepcopy(base), tmp_path)


# ---------------------------------------------------------------- initialisations

CHANGES_W = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
SPARES_W = (True, False, "gaussian", "orthogonal", "eva", "mica")


def test_every_initialisation_of_peft_is_decided():
    hint = next(f for f in dataclasses.fields(LoraConfig) if f.name == "init_lora_weights").type
    named = set(re.findall(r'"(\w+?)(?:_niter_\[number of iters\])?"', str(hint).replace("'", '"')))
    assert {"pissa", "gaussian"} <= named
    assert named <= {str(init) for init in (*SPARES_W, *CHANGES_W)}


@pytest.mark.parametrize("init", SPARES_W)
@pytest.mark.filterwarnings("ignore:PEFT's MiCA", "ignore:`init_lora_weights`")
def test_an_initialisation_that_spares_the_base_is_read(init, tmp_path):
    base, x = Net().eval(), ids()
    theirs = theirs_saved(base, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=init), tmp_path)
    close(theirs_loaded(base, tmp_path)(x), theirs(x))
    close(delora.load(copy.deepcopy(base), tmp_path)(x), theirs(x))


def test_what_mica_keeps_fixed_is_told(tmp_path):
    theirs_saved(Net(), LoraConfig(r=2, target_modules=["q"], init_lora_weights="mica"), tmp_path)
    with pytest.warns(UserWarning, match="MiCA trains A alone"):
        delora.load(Net(), tmp_path)


@pytest.mark.parametrize("init", CHANGES_W)
def test_an_initialisation_that_changes_the_base_is_refused(init, tmp_path):
    theirs_saved(Net(), LoraConfig(r=2, target_modules=["q"]), tmp_path)
    change(tmp_path, init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{init}': the adapter belongs to base weights that"):
        delora.load(Net(), tmp_path)


def test_an_unknown_initialisation_is_refused(tmp_path):
    theirs_saved(Net(), LoraConfig(r=2, target_modules=["q"]), tmp_path)
    change(tmp_path, init_lora_weights="tomorrow")
    with pytest.raises(AdapterError, match="init_lora_weights = 'tomorrow': this initialisation is not known"):
        delora.load(Net(), tmp_path)


@pytest.mark.parametrize(("init", "same"), [("pissa", True), ("olora", True), ("pissa_niter_0", False)])
def test_some_of_them_peft_redoes_when_it_loads_and_some_it_draws_anew(init, same, tmp_path):
    base, x = Net().eval(), ids()
    theirs = theirs_saved(base, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=init), tmp_path)
    torch.manual_seed(9)
    assert torch.allclose(theirs_loaded(base, tmp_path)(x), theirs(x), atol=1e-5) == same


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_way_out_of_a_changed_base_works(init, rslora, tmp_path):
    """The adapter that PEFT turns into a plain LoRA gives the outputs of the model that was trained."""
    base, x = Net().eval(), ids()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q", "v"], init_lora_weights=init, use_rslora=rslora)
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # the start is saved as it is, beside the base it belongs to
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    y = shake(theirs)(x)
    assert not torch.allclose(y, base(x), rtol=0.1)
    theirs.save_pretrained(tmp_path / "relative")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        delora.load(copy.deepcopy(base), tmp_path / "relative")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(delora.load(copy.deepcopy(base), tmp_path / "plain")(x), y)


# ---------------------------------------------------------------- methods

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "conv1d of transformers": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(3, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(0, 9, (3, 5))),
}


def dora(layer):
    return LoraConfig(r=2, lora_alpha=6, use_dora=True, use_rslora=layer == "linear", target_modules=["layer"])


def ia3(side):
    return IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if side == "input" else [])


def oft(**options):
    fields = {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": ["layer"], "init_weights": False}
    return OFTConfig(**fields | options)


METHODS = {
    **{f"DoRA on {name}": (name, dora(name), DoRA(2, 6, rslora=name == "linear")) for name in LAYERS},
    "IA3 on linear": ("linear", ia3("output"), IA3()),
    "IA3 before linear": ("linear", ia3("input"), IA3(side="input")),
    "IA3 before conv1d of transformers": ("conv1d of transformers", ia3("input"), IA3(side="input")),
    "IA3 on conv1d of transformers": ("conv1d of transformers", ia3("output"), IA3()),
    "IA3 on conv2d": ("conv2d", ia3("output"), IA3()),
    "IA3 by an expression": (
        "linear",
        IA3Config(target_modules="lay.*", feedforward_modules="lay.*"),
        IA3(side="input"),
    ),
    "OFT": ("linear", oft(), OFT(2)),
    "OFT by the size of blocks": ("linear", oft(r=0, oft_block_size=2), OFT(4)),
    "COFT": ("linear", oft(coft=True, eps=0.2), OFT(2, radius=0.2 / 2**0.5)),
}


@pytest.mark.parametrize("name", METHODS)
def test_pefts_other_methods_are_read_as_ours(name, tmp_path):
    layer, config, method = METHODS[name]
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    base, x = Holder(make()).eval(), inputs()
    theirs = theirs_saved(base, copy.deepcopy(config), tmp_path)
    ours = delora.load(copy.deepcopy(base), tmp_path)
    assert ours.layer.adapter.method == method
    close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), base(x), rtol=0.05)


def test_a_side_that_shape_and_configuration_say_otherwise_is_refused(tmp_path):
    base = Holder(nn.Linear(8, 8))
    theirs_saved(base, ia3("input"), tmp_path)
    change(tmp_path, feedforward_modules=[])
    with pytest.raises(AdapterError, match=r"of shape \[1, 8\] scales the input, feedforward_modules says the output"):
        delora.load(base, tmp_path)


def test_a_dropout_that_has_no_counterpart_is_told(tmp_path):
    base = Holder(nn.Linear(8, 8))
    theirs_saved(base, oft(module_dropout=0.1), tmp_path)
    with pytest.warns(UserWarning, match=r"module_dropout = 0.1: OFT has no dropout here"):
        delora.load(base, tmp_path)


# ---------------------------------------------------------------- embeddings, and modules trained whole


def llama(tied=False, vocabulary=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = torch.arange(10).reshape(2, 5)


def lora(*targets, **fields):
    return LoraConfig(r=2, target_modules=["q_proj", *targets], init_lora_weights=False, **fields)


SAVED = {
    "embedding adapted": (lora("embed_tokens"), "model.embed_tokens.base_layer.weight"),
    "embedding and head adapted": (lora("embed_tokens", "lm_head"), "lm_head.base_layer.weight"),
    "embedding trained whole": (lora(modules_to_save=["embed_tokens"]), "model.embed_tokens.weight"),
    "a plain ending": (lora(modules_to_save=["norm"]), "model.layers.0.input_layernorm.weight"),
    "tied adapters": (lora("embed_tokens", ensure_weight_tying=True), "lm_head.lora_B.weight"),
    "tied modules": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "lm_head.weight"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", SAVED)
@pytest.mark.filterwarnings("ignore:ensure_weight_tying", "ignore:You have requested")
def test_files_with_weights_of_the_base_are_read(case, tied, tmp_path):
    config, key = SAVED[case]
    if config.ensure_weight_tying and not tied:
        pytest.skip("nothing is tied")
    base = llama(tied)
    theirs = theirs_saved(base, copy.deepcopy(config), tmp_path)
    assert key in keys(tmp_path)
    ours = delora.load(copy.deepcopy(base), tmp_path)
    close(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert not torch.allclose(ours(TOKENS).logits, base(TOKENS).logits, rtol=0.1)
    again = delora.save(ours, tmp_path / "ours")
    close(delora.load(copy.deepcopy(base), again)(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_is_read_whole(tied, tmp_path):
    """PEFT saves the embeddings of a vocabulary that was resized as plain weights of the base."""
    trained, fresh = llama(tied), llama(tied)
    torch.manual_seed(2)
    trained.resize_token_embeddings(40)
    theirs = theirs_saved(trained, lora(), tmp_path, save_embedding_layers=True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= keys(tmp_path)
    with pytest.raises(AdapterError, match=r"weight has shape \[40, 16\], expected \[32, 16\]"):
        delora.load(copy.deepcopy(fresh), tmp_path)
    torch.manual_seed(3)
    fresh.resize_token_embeddings(40)  # other new rows
    ours = delora.load(fresh, tmp_path)
    assert ours.model.embed_tokens.adapter.method == Full()
    close(ours(TOKENS + 30).logits, theirs(TOKENS + 30).logits)


def test_the_weight_under_an_adapter_tells_another_base(tmp_path):
    theirs_saved(llama(), lora("embed_tokens", "lm_head"), tmp_path)
    for layer in ("lm_head", "model.embed_tokens"):
        other = llama()
        with torch.no_grad():
            other.get_submodule(layer).weight[0] *= -1
        with pytest.raises(AdapterError, match=f"the weights of {layer} are not those the adapter was trained on"):
            delora.load(other, tmp_path)
        delora.load(other, tmp_path, allow_other_base=True)


def test_that_tied_adapters_train_apart_is_told(tmp_path):
    theirs_saved(llama(True), lora("embed_tokens", ensure_weight_tying=True), tmp_path)
    with pytest.warns(UserWarning, match="PEFT trains the adapters of tied layers as one, here they train apart"):
        delora.load(llama(True), tmp_path)


class Gate(nn.Module):
    """A module whose parameter and buffer have names of their own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return self.scale * x + self.shift


def test_a_plain_ending_names_the_module_and_all_that_is_in_it(tmp_path):
    """As in PEFT, "norm" stands for "post_norm" too, and for whatever tensors that has."""
    base = Nested().eval()
    base.post_norm = nn.Sequential(Gate(), nn.LayerNorm(8))
    theirs = theirs_saved(base, LoraConfig(r=2, target_modules=["enc.q"], modules_to_save=["norm"]), tmp_path)
    assert {"post_norm.0.scale", "post_norm.0.shift", "post_norm.1.weight", "norm.bias"} <= keys(tmp_path)
    ours, x = delora.load(copy.deepcopy(base), tmp_path), torch.randn(3, 8)
    assert [name for name, a in delora.models.adapters(ours).items() if a.whole] == ["norm", "post_norm"]
    close(ours(x), theirs(x))


# ---------------------------------------------------------------- patterns


def random_pattern(draw, depth=0):
    kind = draw.random()
    if depth > 3 or kind < 0.35:
        return draw.choice(["a", "b", r"\.", "q", "proj", ".", "[ab]", "[^a]", r"\d", r"\w", r"\S", "1", "^", "$"])
    if kind < 0.6:
        return random_pattern(draw, depth + 1) + random_pattern(draw, depth + 1)
    if kind < 0.75:
        return f"({random_pattern(draw, depth + 1)}|{random_pattern(draw, depth + 1)})"
    if kind < 0.9:
        return f"(?:{random_pattern(draw, depth + 1)}){draw.choice(['*', '+', '?', '{2}', '{1,3}', '*?'])}"
    return f"(?{draw.choice('=!')}{random_pattern(draw, depth + 1)})"


def test_patterns_match_what_peft_matches():
    """Against ``peft.utils.get_pattern_key`` itself, on random patterns and names."""
    draw, matched = random.Random(0), 0
    for _ in range(4000):
        pattern = random_pattern(draw)
        name = ".".join("".join(draw.choices("abq1x", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 3)))
        try:
            theirs = peft.utils.other.get_pattern_key([pattern], name) is pattern or re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            continue
        assert Patterns({pattern: 1}, "here").get(name, 0) == bool(theirs), (pattern, name)
        matched += bool(theirs)
    assert matched > 300


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ({"q": 1, "enc.q": 2}, "enc.q", 1),  # the first that fits
        ({"enc.q": 2, "q": 1}, "enc.q", 2),
        ({"a.b": 1}, "x.a_b", 1),  # a dot is any character
        ({"proj": 1}, "q_proj", 0),
        ({"^q": 1}, "enc.q", 0),
        ({r"layers\.[0-3]\.(q|v)": 1}, "model.layers.2.v", 1),
        ({"^(?!.*head).*q$": 1}, "head.q", 0),
    ],
)
def test_the_first_pattern_that_fits_counts(values, name, value):
    assert Patterns(values, "here").get(name, 0) == value
    key = peft.utils.other.get_pattern_key(list(values), name)
    assert values.get(key, 0) == value


HOSTILE = {
    "nested repetitions": {"(.*)*(.*)*!": 3},
    "many repetitions": {".*" * 200 + "!": 3},
    "alternatives": {"((a|.|aa)*)*((a|.)*)*!": 3},
    "counted": {"((a{1000}){1000}){1000}": 3},
    "100,000 patterns": {f"x{i}": 3 for i in range(100_000)},
    "100,000 expressions": {f"x{i}.*": 3 for i in range(100_000)},
    "5,000 brackets": {"(" * 5000 + "a" + ")" * 5000: 3},
    "450 brackets": {"(" * 450 + "a" + ")" * 450: 3},
    "back-references": {r"(.*)\1\1!": 3},
    "look-behind": {"(?<=a).*": 3},
    "atomic": {"(?>a*)b": 3},
    "flags": {"(?i:Q)": 3},
    "no expression": {"(": 3},
    "no number": {"q": [3]},
    "a list in a list": {"q": json.loads("[" * 900 + "]" * 900)},
}
READABLE = {"nested repetitions", "many repetitions", "alternatives", "counted"}  # they fit nothing, at once


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_patterns_are_refused_or_read_at_once(case, tmp_path):
    theirs_saved(Net(), LoraConfig(r=2, target_modules=["q", "v"]), tmp_path)
    change(tmp_path, rank_pattern=HOSTILE[case])
    start = time.process_time()
    with nullcontext() if case in READABLE else pytest.raises(AdapterError) as caught:
        delora.load(Net(), tmp_path)
    assert time.process_time() - start < 5  # about one second, on any machine
    assert case in READABLE or len(str(caught.value)) < 1000


def test_patterns_that_take_too_long_are_refused():
    patterns = Patterns({f"((?!(a|b)*!)a)*{i}": 1 for i in range(100)}, "here: rank_pattern")
    start = time.process_time()
    with pytest.raises(AdapterError, match="here: rank_pattern: these patterns take too long to match"):
        patterns.get("a" * 900, 0)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["." * 100_000, "a." * 50_000 + "q", "q" * 100_000])
@pytest.mark.parametrize("field", ["rank_pattern", "modules_to_save"])
def test_hostile_names_are_refused_at_once(name, field, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs_saved(Net(), LoraConfig(r=2, target_modules=["q", "v"]), tmp_path)
    change(tmp_path, **{field: {"(.*)*(.*)*!": 3} if field == "rank_pattern" else ["norm", "x"]})
    file = tmp_path / "adapter_model.safetensors"
    end = "lora_A.weight" if field == "rank_pattern" else "weight"
    save_file(load_file(file) | {f"base_model.model.{name}.{end}": torch.zeros(2, 8)}, file)
    start = time.process_time()
    with pytest.raises(AdapterError) as caught:
        delora.load(Net(), tmp_path)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < 5


def test_patterns_of_a_large_model_are_read():
    """1,000 layers, each with a rank of its own by its whole name: the budget is not spent."""
    names = [
        f"model.layers.{i}.{part}" for i in range(125) for part in ("q_proj", "k_proj", "v_proj", "o_proj", "a", "b", "c", "d")
    ]
    ranks = Patterns({name: i for i, name in enumerate(names)}, "here")
    assert [ranks.get(name, -1) for name in names] == list(range(1000))


# ---------------------------------------------------------------- export: which layer has which rank


class Nested(nn.Module):
    """Layers whose names are endings of others'."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.enc = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})
        self.v = nn.Linear(8, 8)
        self.a_q = nn.Linear(8, 8)
        self.a = nn.ModuleDict({"q": nn.Linear(8, 8)})
        self.norm = nn.LayerNorm(8)
        self.post_norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(torch.tanh(self.q(x)) + self.enc["q"](x) + torch.tanh(self.enc["v"](x)) * self.v(x))
        return self.post_norm(self.a_q(x) + torch.tanh(self.a["q"](x)))


def ours_on(base, method, targets, **options):
    torch.manual_seed(1)
    return shake(delora.inject(copy.deepcopy(base), method, targets, **options)).eval()


RANKS = [{"^q$": 4}, {"enc.q": 4}, {"enc.q": 4, "^q$": 3}, {"^a_q$": 4}, {"^a\\.q$": 4, "enc.v": 3}]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "delora"])
def test_layers_whose_names_end_others_keep_their_ranks(ranks, kind, tmp_path):
    base, x = Nested().eval(), torch.randn(3, 8)
    overrides = {name: {"r": r} for name, r in ranks.items()}
    model = ours_on(base, DeLoRA(2, 3.0, start="zero"), ["q", "v", "a_q"], overrides=overrides)
    delora.export.peft(model, tmp_path, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing tensors, and of patterns that match nothing
        theirs = theirs_loaded(base, tmp_path)
    close(theirs(x), model(x))
    read = delora.load(copy.deepcopy(base), tmp_path)
    close(read(x), model(x))
    for name in ("q", "enc.q", "enc.v", "v", "a_q", "a.q"):
        assert read.get_submodule(name).adapter.method.r == model.get_submodule(name).adapter.method.r


@pytest.mark.parametrize("targets", [["^q$"], ["^q$", "^v$"], ["enc.q"], ["^enc\\.v$"]], ids=str)
def test_only_the_adapted_layers_are_named(targets, tmp_path):
    base, x = Nested().eval(), torch.randn(3, 8)
    model = ours_on(base, LoRA(2), "|".join(targets))
    delora.export.peft(model, tmp_path)
    theirs = theirs_loaded(base, tmp_path)
    close(theirs(x), model(x))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(delora.models.adapters(model))


def test_a_name_that_ends_others_takes_their_own_weights_along(tmp_path):
    """PEFT trains "post_norm" whole if "norm" is in modules_to_save, and looks for its tensors."""
    base, x = Nested().eval(), torch.randn(3, 8)
    model = ours_on(base, LoRA(2), ["enc.q"], also_train=["norm"])
    delora.export.peft(model, tmp_path)
    assert {"norm.weight", "post_norm.weight"} <= keys(tmp_path)
    close(theirs_loaded(base, tmp_path)(x), model(x))
    close(delora.load(copy.deepcopy(base), tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("trained", "adapted", "words"),
    [
        ("q", "enc.q", "PEFT takes no adapter on enc.q: q, which is trained whole, is in its name"),
        ("q", "a_q", "PEFT trains a_q whole, too: its name ends as one of"),
    ],
)
def test_what_peft_cannot_be_told_is_refused_before_anything_is_written(trained, adapted, words, tmp_path):
    model = ours_on(Nested(), LoRA(2), [adapted], also_train=trained)
    with pytest.raises(ValueError, match=words):
        delora.export.peft(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- export: as PEFT's own method


def tensors_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


OWN = {
    **{name: case[:2] for name, case in METHODS.items()},
    "LoRA": ("linear", LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["layer"])),
    **{f"LoRA on {name}": (name, LoraConfig(r=2, use_rslora=True, target_modules=["layer"])) for name in LAYERS},
    "DeLoRA": ("linear", DeloraConfig(r=2, delora_lambda=3, module_dropout=0.1, target_modules=["layer"])),
}


@pytest.mark.parametrize("name", OWN)
def test_from_pefts_file_to_ours_and_back_every_tensor_is_the_same(name, tmp_path):
    layer, config = OWN[name]
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    base, x = Holder(make()).eval(), inputs()
    theirs = theirs_saved(base, copy.deepcopy(config), tmp_path / "theirs", save_embedding_layers=False)
    ours = delora.load(copy.deepcopy(base), tmp_path / "theirs")
    again = delora.load(copy.deepcopy(base), delora.save(ours, tmp_path / "ours"))
    delora.export.peft(again, tmp_path / "back", kind="own")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith("w_norm"):  # measured of W anew, which may round otherwise
            torch.testing.assert_close(after[key], tensor)
        else:
            assert torch.equal(tensor, after[key]), key
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = theirs_loaded(base, tmp_path / "back")
    torch.testing.assert_close(read(x), theirs(x))
    was, now = config_of(tmp_path / "theirs"), config_of(tmp_path / "back")
    same = {"r", "lora_alpha", "use_rslora", "use_dora", "delora_lambda", "coft", "lora_dropout", "module_dropout", "peft_type"}
    sized = {"r"} if was.get("oft_block_size") else set()  # OFT by the size of blocks is written by their number
    assert {k: was[k] for k in same & now.keys() - sized} == {k: now[k] for k in same & now.keys() - sized}


@pytest.mark.parametrize("method", [LoRA(2, 3), LoRA(2, 3, rslora=True), DoRA(2, 3)], ids=str)
def test_each_layers_rank_and_alpha_survive_as_themselves(method, tmp_path):
    base, x = Nested().eval(), torch.randn(3, 8)
    overrides = {r"^enc\.q$": {"r": 4}, "^a_q$": {"alpha": 7}, "^v$": {"r": 3, "alpha": 1}}
    model = ours_on(base, method, ["q", "v", "a_q"], overrides=overrides, also_train=["norm"])
    delora.export.peft(model, tmp_path, kind="own")
    close(theirs_loaded(base, tmp_path)(x), model(x))
    again = delora.load(copy.deepcopy(base), tmp_path)
    methods = {name: a.method for name, a in delora.models.adapters(model).items() if not a.whole}
    assert {name: a.method for name, a in delora.models.adapters(again).items() if not a.whole} == methods


@pytest.mark.parametrize("sides", [{"v": "input"}, {"^v$": "input"}, {r"enc\.v": "input"}, {"q": "input"}], ids=str)
def test_which_side_ia3_scales_survives_whatever_the_layers_are_called(sides, tmp_path):
    base, x = Nested().eval(), torch.randn(3, 8)
    overrides = {name: {"side": side} for name, side in sides.items()}
    model = ours_on(base, IA3(), ["q", "v", "a_q"], overrides=overrides)
    delora.export.peft(model, tmp_path, kind="own")
    close(theirs_loaded(base, tmp_path)(x), model(x))
    close(delora.load(copy.deepcopy(base), tmp_path)(x), model(x))


def test_a_strength_goes_into_alpha_and_lam_or_is_refused(tmp_path):
    base, x = Net().eval(), ids()
    for method in (LoRA(2, 3), DeLoRA(2, 3.0, start="zero")):
        model = ours_on(base, method, ["q", "v"])
        delora.strength(model, 1.5)
        delora.export.peft(model, tmp_path / type(method).__name__, kind="own")
        close(theirs_loaded(base, tmp_path / type(method).__name__)(x), model(x))
    for method in (DoRA(2), IA3(), OFT(2)):
        model = ours_on(base, method, ["q", "v"])
        delora.strength(model, 0.5)
        with pytest.raises(ValueError, match=f"PEFT has no {type(method).__name__} of strength 0.5"):
            delora.export.peft(model, tmp_path / "new", kind="own")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        (delora.ETHER(), {}, "PEFT has no adapter that is ETHER: LoRA, DoRA, DeLoRA, IA3, OFT are written as themselves"),
        (DeLoRA(2), {}, r"PEFT's DELORA is DeLoRA\(start='zero'"),
        (DoRA(2, fixed_magnitude=True), {}, "PEFT's DoRA always trains the magnitude"),
        (LoRA(2), {"v": {"rslora": True}}, "PEFT has one use_rslora for all layers: False at q and True at v"),
        (OFT(2), {"v": {"blocks": 4}}, "PEFT has one r for all layers: 2 at q and 4 at v"),
        (OFT(2), {"v": {"radius": 0.1}}, "PEFT has one eps for all layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_has_no_method_for_is_refused(method, overrides, words, tmp_path):
    model = ours_on(Net(), method, ["q", "v"], overrides=overrides)
    with pytest.raises(ValueError, match=words):
        delora.export.peft(model, tmp_path / "new", kind="own")
    assert not (tmp_path / "new").exists()


def test_patterns_hold_in_the_order_in_which_the_file_has_them(tmp_path):
    """JSON with sorted keys: "q" comes before "z.q", whose name it fits as well."""
    base = nn.ModuleDict({"z": nn.ModuleDict({"q": nn.Linear(8, 8)}), "q": nn.Linear(8, 8), "a": nn.Linear(8, 8)})
    model = ours_on(base, LoRA(2), ["q", "a"], overrides={r"z\.q": {"r": 4}, "^q": {"r": 3}})
    delora.export.peft(model, tmp_path)
    theirs = theirs_loaded(base, tmp_path).base_model.model
    ranks = [theirs.get_submodule(name).r["default"] for name in ("z.q", "q", "a")]
    assert ranks == [4, 3, 2]


# ---------------------------------------------------------------- export: task types


def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("also", "adapted", "task"),
    [(["classifier"], ["query"], "SEQ_CLS"), ([], ["query"], None), ([], ["query", "classifier"], None)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_task_type_is_written_only_if_the_head_is_in_the_file(also, adapted, task, tmp_path):
    base = bert()
    model = ours_on(base, LoRA(2), adapted, also_train=also)
    delora.export.peft(model, tmp_path)
    assert config_of(tmp_path)["task_type"] == task
    close(logits(theirs_loaded(base, tmp_path), TOKENS), logits(model, TOKENS))


def test_a_language_models_task_has_no_head(tmp_path):
    base = llama()
    model = ours_on(base, LoRA(2), ["q_proj"])
    delora.export.peft(model, tmp_path)
    assert config_of(tmp_path)["task_type"] == "CAUSAL_LM"
    close(theirs_loaded(base, tmp_path)(TOKENS).logits, model(TOKENS).logits)


# ---------------------------------------------------------------- export: what PEFT takes for experts


def test_the_names_of_experts_are_pefts():
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

    assert {kind: names.keys() for kind, names in _MOE_TARGET_MODULE_MAPPING.items()} == peft_names.EXPERTS


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    "shared_expert_intermediate_size": 24, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "num_shared_experts": 1, "num_shared_expert": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def mixture(kind):
    """A tiny random mixture of experts of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    known = CONFIG_MAPPING[kind]().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    sizes |= {"layer_types": ["linear_attention", "full_attention"]} if kind == "qwen3_next" else {}
    config = CONFIG_MAPPING[kind](**sizes)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) < 100_000
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()


MIXTURES = [
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "qwen3_next", "solar_open",
]  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.filterwarnings("ignore")
def test_peft_takes_no_layer_for_an_expert(kind, tmp_path):
    """Dense and shared layers beside experts: PEFT would take their names for the experts', and drop their tensors."""
    base = mixture(kind)
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and re.search(r"(gate|up|down)_proj$", n)]
    model = ours_on(base, LoRA(2), ["gate_proj", "up_proj", "down_proj", "lm_head"], overrides={re.escape(names[-1]): {"r": 3}})
    delora.export.peft(model, tmp_path)
    assert set(config_of(tmp_path)["target_parameters"]) == {f"{name}.weight" for name in names}
    y = model(TOKENS).logits
    torch.testing.assert_close(theirs_loaded(base, tmp_path)(TOKENS).logits, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(delora.load(copy.deepcopy(base), tmp_path)(TOKENS).logits, y, rtol=1e-6, atol=1e-6)
    assert (base(TOKENS).logits - y).abs().max() > 0.1


def test_every_mixture_that_peft_converts_is_known():
    """The condition of PEFT's own code, for every type that transformers has."""
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_FUSED_TARGETS
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for kind in CONFIG_MAPPING:
        like = _MODEL_TO_CONVERSION_PATTERN.get(kind)
        converted = get_checkpoint_conversion_mapping(kind) is not None and like in _MOE_FUSED_TARGETS
        stand_in = nn.Linear(2, 2)
        stand_in.config = type("Config", (), {"model_type": kind})()
        assert peft_names.experts(stand_in) == (peft_names.EXPERTS[like] if converted else frozenset()), kind


def test_a_dropout_that_peft_cannot_apply_to_them_is_told(tmp_path):
    base = mixture("deepseek_v3")
    model = ours_on(base, LoRA(2), ["gate_proj", "up_proj", "down_proj"], dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout is written as 0, not 0.1"):
        delora.export.peft(model, tmp_path)
    y = model(TOKENS).logits
    torch.testing.assert_close(theirs_loaded(base, tmp_path)(TOKENS).logits, y, rtol=1e-6, atol=1e-6)


def test_experts_that_peft_adapted_are_refused_in_words(tmp_path):
    base = mixture("deepseek_v3")
    theirs_saved(base, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]), tmp_path)
    with pytest.raises(AdapterError, match="of parameters, only the weights of layers are read; merge it with PEFT"):
        delora.load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize(("kind", "some"), [("laguna", True), ("deepseek_v3", False), ("mixtral", False), ("jamba", False)])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_renames_is_foretold_and_refused(kind, some, tmp_path):
    """PEFT's own file, read by PEFT: the layers that lose their tensors are those that an export refuses, no more, no fewer."""
    base = mixture(kind)
    names = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    names = {n for n in names if n.rpartition(".")[2] not in peft_names.experts(base) | {"out_proj", "conv1d"}}
    theirs = theirs_saved(base, LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False), tmp_path)
    before = {n: p for n, p in theirs.named_parameters() if "lora_A" in n}
    after = dict(theirs_loaded(base, tmp_path).named_parameters())
    lost = {n for n in before if not torch.equal(before[n], after[n])}
    moved = peft_names.renamed(base, names)
    assert {f"base_model.model.{name}.lora_A.default.weight" for name in moved} == lost
    assert bool(lost) == some
    if some:
        model = ours_on(base, LoRA(2), "|".join(map(re.escape, sorted(names))))
        with pytest.raises(ValueError, match="PEFT renames the tensors of a .* and would look for"):
            delora.export.peft(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_layer_whose_weight_its_parent_reads_is_told(tmp_path):
    """PEFT adapts the call of a layer: where a mixer multiplies by dt_proj's weight, its adapter has no effect."""
    base = mixture("jamba")
    model = ours_on(base, LoRA(2), ["dt_proj"])
    with pytest.warns(UserWarning, match=r"JambaMambaMixer can compute with the weight of model.layers.0.mamba.dt_proj itself"):
        delora.export.peft(model, tmp_path)
    y, theirs = model(TOKENS).logits, theirs_loaded(base, tmp_path)(TOKENS).logits
    torch.testing.assert_close(theirs, base(TOKENS).logits)
    assert not torch.allclose(y, theirs, rtol=0.1)


def test_a_layer_of_whose_weight_only_the_dtype_is_read_is_not(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = ours_on(T5ForConditionalGeneration(config), LoRA(2), ["wo", "q"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.export.peft(model, tmp_path)


# ---------------------------------------------------------------- the page for those who come from PEFT


def page_rows():
    text = (Path(__file__).parents[2] / "docs" / "coming-from-peft.md").read_text("utf-8")
    table = text.split("|---|---|\n")[1].split("\n\n")[0]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:3]) for line in table.splitlines()]


def names_of(model, attribute):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if attribute in m._modules}


def both(folder, right="LoRA()", targets=("q", "v"), base=Net, fields=None, **options):
    """PEFT's model and ours, made by what the two columns say."""
    torch.manual_seed(0)
    net = base().eval()
    config = LoraConfig(target_modules=list(targets) if not isinstance(targets, str) else targets, **(fields or {}))
    theirs = get_peft_model(copy.deepcopy(net), config)
    ours = delora.inject(copy.deepcopy(net), eval(right), targets, **options)
    return theirs, ours


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def same_method(config, right, folder):
    """What PEFT writes with these fields is read as the method that the page names."""
    torch.manual_seed(0)
    base = Net()
    theirs_saved(base, config, folder)
    methods = {a.method for a in delora.models.adapters(delora.load(base, folder)).values()}
    assert methods == {eval(code) for code in re.findall(r"`(\w+\([^`]*\))`", right)[:1]}


def row_inject(left, right, folder):
    theirs, ours = both(folder, "LoRA(r=8, alpha=16)", ["q"], fields={"r": 8, "lora_alpha": 16})
    assert trainable(theirs) == trainable(ours)
    assert isinstance(ours, Net)


def row_from_a_configuration(left, right, folder):
    config = LoraConfig(r=4, target_modules=["q"], modules_to_save=["classifier"])
    theirs, ours = get_peft_model(Net(), config), Net()
    code = re.findall(r"`([^`]+)`", right)
    names = {"delora": delora, "config": config, "model": ours}
    for line in code:
        exec(line, names)
    assert trainable(theirs) == trainable(ours)


def row_dropout(left, right, folder):
    theirs, ours = both(folder, fields={"lora_dropout": 0.1}, dropout=0.1)
    assert theirs.base_model.model.q.lora_dropout["default"].p == ours.q.adapter.dropout == 0.1


def row_targets(left, right, folder):
    for targets in ("all-linear", ["q", "v"], "q|.*v"):
        theirs, ours = both(folder, targets=targets, base=llama if targets == "all-linear" else Net)
        assert names_of(theirs, "lora_A") == set(delora.models.adapters(ours))


def row_exclude(left, right, folder):
    theirs, ours = both(folder, targets=["q", "v"], fields={"exclude_modules": ["v"]}, exclude=["v"])
    assert names_of(theirs, "lora_A") == set(delora.models.adapters(ours)) == {"q"}


def row_also_train(left, right, folder):
    theirs, ours = both(folder, fields={"modules_to_save": ["classifier"]}, also_train=["classifier"])
    assert trainable(theirs) == trainable(ours)


def row_fresh_head(left, right, folder):
    base = bert()
    nn.init.normal_(base.bert.pooler.dense.bias)  # a pretrained body below a new head
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.warns(UserWarning, match="classifier.*also_train"):
        without = delora.inject(copy.deepcopy(base), LoRA(), ["query"])
    ours = delora.inject(copy.deepcopy(base), LoRA(), ["query"], also_train=["classifier"])
    assert trainable(theirs) == trainable(ours) > trainable(without)


def row_patterns(left, right, folder):
    theirs, ours = both(
        folder, fields={"rank_pattern": {"v": 3}, "alpha_pattern": {"v": 5}}, overrides={"v": {"r": 3, "alpha": 5}}
    )
    layer = theirs.base_model.model.v
    assert (layer.r["default"], layer.lora_alpha["default"]) == (ours.v.adapter.method.r, ours.v.adapter.method.alpha) == (3, 5)
    with pytest.raises(ValueError, match="nothing"):
        delora.inject(Net(), LoRA(), ["q"], overrides={"nothing": {"r": 3}})


def row_save(left, right, folder):
    model = ours_on(Net(), DeLoRA(2), ["q"])
    delora.save(model, folder / "own")
    delora.export.peft(model, folder / "peft")
    close(theirs_loaded(Net(), folder / "peft")(ids()).shape, torch.Size([4, 3]))


def row_load(left, right, folder):
    for name in ("LORA", "use_dora", "DELORA", "IA3", "OFT"):
        assert name in right
    row_save(left, right, folder)
    torch.manual_seed(0)
    base, x = Net(), ids()
    for kind in ("own", "peft"):
        assert delora.load(copy.deepcopy(base), folder / kind, allow_other_base=True)(x).shape == (4, 3)


def row_merge(left, right, folder):
    theirs, ours = both(folder)
    assert {type(m) for m in theirs.merge_and_unload().modules()} == {type(m) for m in delora.merge(ours).modules()}


def row_merged(left, right, folder):
    torch.manual_seed(0)
    ours, x = ours_on(Net(), LoRA(), ["q"]), ids()
    before, y = ours.q.base.weight.clone(), ours(x)
    with delora.merged(ours):
        close(ours(x), y)
    assert torch.equal(ours.q.base.weight, before)


def row_disabled(left, right, folder):
    torch.manual_seed(0)
    base, x = Net().eval(), ids()
    theirs, ours = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q"])), ours_on(base, LoRA(), ["q"])
    with theirs.disable_adapter(), delora.disabled(ours):
        assert torch.equal(theirs(x), base(x))
        assert torch.equal(ours(x), base(x))


def row_several(left, right, folder):
    model = delora.inject(ours_on(Net(), LoRA(), ["q"], name="a"), LoRA(), ["q"], name="b")
    delora.activate(model, "a")
    delora.activate(model, "b")
    delora.blend(model, {"a": 0.7, "b": 0.3}, name="ab")
    assert delora.models.active_adapter(model) == "ab"


def row_summary(left, right, folder):
    theirs, ours = both(folder, "LoRA(r=8, alpha=8)")
    assert f"{theirs.get_nb_trainable_parameters()[0]:,}" in str(delora.summary(ours))


def row_rates(left, right, folder):
    model = delora.inject(Net(), DeLoRA(2, learn_lam=True), ["q"], also_train=["classifier"])
    groups = delora.param_groups(model, lr=1e-3, lam_lr=1e-2, head_lr=1e-4, weight_decay=0.1)
    lam = next(g for g in groups if any(p is model.q.adapter.lam for p in g["params"]))
    assert (lam["lr"], lam["weight_decay"]) == (1e-2, 0)


ROWS = {
    "`get_peft_model(model, LoraConfig(": row_inject,
    "`get_peft_model(model, config)`": row_from_a_configuration,
    "`lora_dropout=0.1`": row_dropout,
    '`target_modules="all-linear"`': row_targets,
    "`exclude_modules`": row_exclude,
    '`modules_to_save=["classifier"]`': row_also_train,
    '`task_type="SEQ_CLS"`': row_fresh_head,
    "`rank_pattern`": row_patterns,
    "`use_rslora=True`": lambda left, right, folder: same_method(
        LoraConfig(r=8, lora_alpha=16, target_modules=["q"], use_rslora=True), right, folder
    ),
    "`use_dora=True`": lambda left, right, folder: same_method(
        LoraConfig(r=8, lora_alpha=16, target_modules=["q"], use_dora=True), right, folder
    ),
    "`IA3Config(": lambda left, right, folder: same_method(
        IA3Config(target_modules=["q"], feedforward_modules=[]), right, folder
    ),
    "`OFTConfig(": lambda left, right, folder: same_method(
        OFTConfig(**eval(f"dict{left.strip('`')[9:]}"), target_modules=["q"]), right, folder
    ),
    "`DeloraConfig(": lambda left, right, folder: same_method(
        DeloraConfig(**eval(f"dict{left.strip('`')[12:]}"), target_modules=["q"]), right, folder
    ),
    "`model.save_pretrained(": row_save,
    "`PeftModel.from_pretrained(": row_load,
    "`model.merge_and_unload()`": row_merge,
    "`model.merge_adapter()`": row_merged,
    "`with model.disable_adapter():`": row_disabled,
    '`model.set_adapter("b")`': row_several,
    "`model.print_trainable_parameters()`": row_summary,
    "one learning rate for everything": row_rates,
}


@pytest.mark.parametrize("row", page_rows(), ids=lambda row: row[0])
@pytest.mark.filterwarnings("ignore")
def test_each_row_of_the_page_for_those_who_come_from_peft(row, tmp_path):
    """Both columns are carried out; a row without a test fails."""
    left, right = row
    check = [check for beginning, check in ROWS.items() if left.startswith(beginning)]
    assert len(check) == 1, f"no test for the row {left}"
    check[0](left, right, tmp_path)
