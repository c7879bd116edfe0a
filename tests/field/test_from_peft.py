"""delora.from_peft: a configuration of PEFT trains here what it trains there, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import DeloraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import delora
from delora import IA3, OFT, DeLoRA, DoRA, LoRA
from delora.formats.files import AdapterError
from tests.cases import Net, ids, shake
from tests.field.test_peft_files import TOKENS, bert, change, close, llama, logits, quiet  # noqa: F401 (quiet is a fixture)

CONFIGS = {"LORA": LoraConfig, "DELORA": DeloraConfig, "IA3": IA3Config, "OFT": OFTConfig}


def of(kind, **fields):
    """A configuration of a kind that is translated, with some fields."""
    usual = {"target_modules": ["q", "v"]}
    usual |= {"feedforward_modules": []} if kind == "IA3" else {}
    usual |= {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False} if kind == "OFT" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CONFIGS[kind](**usual | fields)


def trained_alike(base, config, x, folder, steps=3):
    """PEFT's model and ours from the same start, after the same steps of SGD on the same loss."""
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    method, arguments = delora.from_peft(config)
    ours = delora.inject(copy.deepcopy(base), method, **arguments)
    theirs.save_pretrained(folder / "start")
    orders = {field: value for field, value in config.to_dict().items() if field.endswith("_pattern")}
    change(folder / "start", **orders)  # PEFT writes them sorted, and then another one is the first that fits
    delora.load(ours, folder / "start")  # into the adapter that is there: an error unless layers and methods are the same
    for model in (theirs, ours):
        model.eval()  # without dropout
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            logits(model, x).square().sum().backward()
            optimizer.step()
    return theirs, ours


class Stack(nn.Module):
    """Layers by number, in two stacks, with names that end each other's."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"q": nn.Linear(8, 8), "a_q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})  # noqa: E731
        self.enc = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(3))})
        self.dec = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2)), "h": nn.ModuleList([block()])})
        self.layers = nn.ModuleList([block()])
        self.norm = nn.LayerNorm(8)
        self.post_norm = nn.LayerNorm(8)
        self.classifier = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        for block in [*self.enc["layers"], *self.dec["layers"], *self.dec["h"], *self.layers]:
            x = x + torch.tanh(block["q"](x)) * torch.tanh(block["a_q"](x)) + 0.1 * torch.tanh(block["v"](x))
        return self.classifier(self.post_norm(self.norm(x)))


def two_ways(r):
    """A pattern for ranks and one for alphas, whose orders contradict each other."""
    return {
        "rank_pattern": {"v": r, r"enc\.layers\.\d\.v": 1},
        "alpha_pattern": {r"enc\.layers\.\d\.v": 5, "v": 3},
    }


ZERO = DeLoRA(4, 15, start="zero", learn_lam=True)  # PEFT trains its lambda
CASES = {
    "plain": (of("LORA", r=4, lora_alpha=8), Net, LoRA(4, 8)),
    "one expression": (of("LORA", target_modules=".*q|v"), Net, LoRA(8, 8)),
    "a set": (of("LORA", target_modules={"v", "q"}), Net, LoRA(8, 8)),
    "excluded by name": (of("LORA", exclude_modules=["v", "enc.layers.1.q"]), Stack, LoRA(8, 8)),
    "excluded by an expression": (of("LORA", exclude_modules=r"dec\..*"), Stack, LoRA(8, 8)),
    "trained whole": (of("LORA", modules_to_save=["classifier"]), Net, LoRA(8, 8)),
    "trained whole, by a plain ending": (of("LORA", modules_to_save=["norm"]), Stack, LoRA(8, 8)),
    "a target inside what is trained whole": (
        of("LORA", target_modules=["q", "0", "2"], modules_to_save=["classifier"], exclude_modules=["emb"]),
        Net,
        LoRA(8, 8),
    ),
    "ranks and alphas": (of("LORA", rank_pattern={"v": 3}, alpha_pattern={"v": 5}), Net, LoRA(8, 8)),
    "the first pattern counts": (of("LORA", rank_pattern={r"layers\.[01]\.v": 3, "v": 2, ".*[qv]": 4}), Stack, LoRA(8, 8)),
    "orders that contradict each other": (of("LORA", **two_ways(3)), Stack, LoRA(8, 8)),
    "a pattern for a whole name": (of("LORA", rank_pattern={"^layers.0.q": 3}), Stack, LoRA(8, 8)),
    "layers by number": (of("LORA", layers_to_transform=[0, 2]), Stack, LoRA(8, 8)),
    "one layer": (of("LORA", layers_to_transform=1), Stack, LoRA(8, 8)),
    "layers of one stack": (of("LORA", layers_to_transform=[0], layers_pattern="h"), Stack, LoRA(8, 8)),
    "layers of two": (of("LORA", layers_to_transform=[0, 1], layers_pattern=["h", "layers"]), Stack, LoRA(8, 8)),
    "weights": (of("LORA", target_modules=[], target_parameters=["q.weight"]), Net, LoRA(8, 8)),
    "weights beside modules": (of("LORA", target_modules=["q"], target_parameters=["v.weight"]), Net, LoRA(8, 8)),
    "weights beside layers by number": (
        of("LORA", target_modules=["q"], target_parameters=["a_q.weight"], layers_to_transform=[0]),
        Stack,
        LoRA(8, 8),
    ),
    "rank-stabilised": (of("LORA", use_rslora=True), Net, LoRA(8, 8, rslora=True)),
    "DoRA": (of("LORA", use_dora=True, rank_pattern={"v": 2}), Net, DoRA(8, 8)),
    "embedding": (of("LORA", target_modules=["emb", "q"]), Net, LoRA(8, 8)),
    "DeLoRA": (of("DELORA", r=4), Net, ZERO),
    "DeLoRA by pattern": (
        of("DELORA", rank_pattern={"v": 2}, lambda_pattern={"v": 3, ".*": 5}), Net, dataclasses.replace(ZERO, r=8),
    ),
    "IA3": (of("IA3", feedforward_modules=["v"]), Net, IA3()),
    "IA3 by an expression": (of("IA3", target_modules="[qv]", feedforward_modules="v"), Net, IA3()),
    "IA3 by a plain ending": (of("IA3", target_modules=["q", "v", "a_q"], feedforward_modules=["q"]), Stack, IA3()),
    "OFT": (of("OFT", r=2), Net, OFT(2)),
    "COFT": (of("OFT", r=2, coft=True, eps=0.2), Net, OFT(2, radius=0.2 / 2**0.5)),
    "OFT in some layers": (of("OFT", r=2, layers_to_transform=[1]), Stack, OFT(2)),
    "task of a sequence": (of("LORA", target_modules=["query", "dense"], task_type="SEQ_CLS"), bert, LoRA(8, 8)),
    "task of tokens": (of("LORA", target_modules=["query"], task_type="TOKEN_CLS"), bert, LoRA(8, 8)),
    "all-linear of a classifier": (of("LORA", r=2, target_modules="all-linear", task_type="SEQ_CLS"), bert, LoRA(2, 8)),
    "all-linear": (of("LORA", target_modules="All-Linear"), llama, LoRA(8, 8)),
    "task of language": (of("LORA", target_modules=["v_proj"], task_type="CAUSAL_LM"), llama, LoRA(8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.Tensor.normal_", "ignore:.*all-linear")
def test_a_configuration_trains_the_same_parameters(name, tmp_path):
    """The same layers, ranks, scales and heads: from PEFT's start, the same steps lead to the same outputs."""
    config, make, method = CASES[name]
    torch.manual_seed(0)
    base = make().eval()
    x = ids() if make is Net else torch.randn(5, 8) if make is Stack else TOKENS
    theirs, ours = trained_alike(base, config, x, tmp_path)
    assert delora.from_peft(config)[0] == method
    close(logits(ours, x), logits(theirs, x))
    assert (logits(ours, x) - logits(base, x)).abs().max() > 1e-4
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)  # noqa: E731
    assert count(ours) == count(theirs)


@pytest.mark.parametrize(
    "name", ["ranks and alphas", "IA3", "COFT", "DeLoRA by pattern", "layers of two", "task of a sequence"]
)
def test_the_json_that_peft_writes_says_the_same_as_the_object(name, tmp_path):
    config = CASES[name][0]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["inference_mode"] is False
    assert delora.from_peft(written) == delora.from_peft(config)


def random_name(draw):
    """A name with numbers in it, as PEFT searches for the first."""
    parts = [draw.choice(["h", "layers", "0", "1", "12", "q", "a_q", "x1", "01"]) for _ in range(draw.randint(0, 5))]
    return ".".join([*parts, draw.choice(["q", "q", "a_q", "x1"])])


def test_layers_are_chosen_as_peft_chooses_them():
    """Against PEFT's own function, on random names: targets, numbers, patterns, exclusions and what is trained whole."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    draw, chosen = random.Random(0), 0
    for _ in range(3000):
        options = {
            "target_modules": draw.sample(["q", "x1.q", "a_q", "1.q", "h.0.q"], draw.randint(1, 3)),
            "layers_to_transform": draw.choice([None, [], 1, [0, 12], [1, 2]]),
            "exclude_modules": draw.choice([None, ["1.q"], r".*h\..*"]),
            "modules_to_save": draw.choice([None, ["x1"], ["layers"]]),
        }
        if options["layers_to_transform"] not in (None, []):
            options["layers_pattern"] = draw.choice([None, "h", ["layers", "h"], ["h", "layers"]])
        config = LoraConfig(**options)
        _, arguments = delora.from_peft(config)
        name = random_name(draw)
        try:
            found = check_target_module_exists(config, name)
        except UnboundLocalError:  # PEFT's own, for no pattern
            continue
        theirs = bool(found) and not isinstance(found, _ExcludedModule)
        ours = fits(arguments["targets"], name) and not fits(arguments.get("exclude", []), name)
        assert ours == theirs, (options, name)
        chosen += theirs
    assert chosen > 300


def fits(patterns, name):
    from delora.targets import _select

    found = False
    for one in [patterns] if isinstance(patterns, str) else [[pattern] for pattern in patterns]:
        with suppress(ValueError):
            found |= name in _select(one, [name], "targets")
    return found


# ---------------------------------------------------------------- every field

SAME = "of no account"  # the same method and arguments as without it
COMMON = {
    "task_type": ("SEQ_CLS", {"also_train": ".*(?:classifier|score)"}),
    "peft_type": None,
    "auto_mapping": ({"base_model_class": "Net"}, SAME),
    "peft_version": ("0.21.2", SAME),
    "base_model_name_or_path": ("org/base", SAME),
    "revision": ("main", SAME),
    "inference_mode": (True, SAME),
    "target_modules": (["k"], {"targets": ["k"]}),
    "exclude_modules": (["v"], {"exclude": ["v"]}),
    "modules_to_save": (["head"], {"also_train": ".*(?:head)"}),
}
NUMBERED = {
    "layers_to_transform": ([1], {"targets": r"q|v|(?=(?>.*?\.[^.]*\.(?=\d+\.))0*(?:1)\.).*\.(?:q|v)"}),
    "layers_pattern": ("h", SAME),  # PEFT itself refuses it without layers_to_transform
}
NO = "refused"
LORA_FIELDS = {
    **COMMON, **NUMBERED,
    "r": (4, LoRA(4, 8)), "lora_alpha": (3, LoRA(8, 3)), "lora_dropout": (0.5, {"dropout": 0.5}),
    "fan_in_fan_out": (True, SAME), "bias": ("lora_only", NO), "use_rslora": (True, LoRA(8, 8, rslora=True)),
    "init_lora_weights": ("gaussian", NO), "use_dora": (True, DoRA(8, 8)),
    "rank_pattern": ({"q": 2}, {"overrides": {r"^(.*\.)?(q)$": {"r": 2}}}),
    "alpha_pattern": ({"q": 2}, {"overrides": {r"^(.*\.)?(q)$": {"alpha": 2}}}),
    "megatron_config": ({"a": 1}, NO), "megatron_core": ("other", SAME), "trainable_token_indices": ([1], NO),
    "loftq_config": ({"loftq_bits": 4}, SAME), "eva_config": ({"rho": 2.0}, SAME),
    "corda_config": ({"corda_method": "kpm"}, SAME),
    "lora_ga_config": ({"direction": "ArBr"}, SAME), "velora_config": ({"a": 1}, NO), "alora_invocation_tokens": ([1], NO),
    "use_qalora": (True, NO), "qalora_group_size": (8, SAME), "monteclora_config": ({"a": 1}, NO),
    "layer_replication": ([[0, 1]], NO), "runtime_config": ({"ephemeral_gpu_offload": True}, SAME), "lora_bias": (True, NO),
    "target_parameters": (["k.weight"], {"targets": ["k", "q", "v"]}), "use_bdlora": ({"a": 1}, NO),
    "arrow_config": ({"a": 1}, NO),
    "kasa_config": ({"a": 1}, NO), "ensure_weight_tying": (True, SAME),
}  # fmt: skip
FIELDS = {
    "LORA": LORA_FIELDS,
    "DELORA": {
        **COMMON, **NUMBERED, "r": (4, ZERO), "delora_lambda": (3, dataclasses.replace(ZERO, r=8, lam=3)),
        "module_dropout": (0.5, {"dropout": 0.5}), "bias": ("all", NO), "init_weights": (False, NO),
        "rank_pattern": ({"q": 2}, {"overrides": {r"^(.*\.)?(q)$": {"r": 2}}}),
        "lambda_pattern": ({"q": 2}, {"overrides": {r"^(.*\.)?(q)$": {"lam": 2}}}),
    },
    "IA3": {
        **COMMON, "feedforward_modules": (["v"], {"overrides": {"(?:v)$": {"side": "input"}}}), "fan_in_fan_out": (True, SAME),
        "init_ia3_weights": (False, NO),
    },
    "OFT": {
        **COMMON, **NUMBERED, "r": (4, OFT(4)), "oft_block_size": (32, NO), "module_dropout": (0.5, NO),
        "fan_in_fan_out": (True, SAME), "bias": ("all", NO), "init_weights": (False, NO), "coft": (True, OFT(2, 6e-5 / 2**0.5)),
        "eps": (1.0, SAME), "block_share": (True, NO), "use_cayley_neumann": (True, NO), "num_cayley_neumann_terms": (3, SAME),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_account_is_of_every_field_that_peft_has(kind):
    assert set(FIELDS[kind]) == {field.name for field in dataclasses.fields(CONFIGS[kind])}


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in FIELDS.items() for f in fields if f != "peft_type"])
@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
def test_a_field_is_translated_or_of_no_account_or_refused_by_name(kind, field):
    value, what = FIELDS[kind][field]
    usual = {**of(kind).to_dict(), "peft_type": kind}
    method, arguments = delora.from_peft(usual)
    changed = usual | {field: value}
    if what == NO:
        with pytest.raises(AdapterError, match=rf"{field} = .*(leave it at|set it to|set r = n)") as caught:
            delora.from_peft(changed)
        assert str(caught.value).startswith("the configuration: ")
        return
    new = delora.from_peft(changed)
    if what == SAME:
        assert new == (method, arguments)
    elif isinstance(what, dict):
        assert (new[0], {key: new[1][key] for key in what}) == (method, what)
    else:
        assert new == (what, arguments)


def page_of_fields():
    text = (Path(__file__).parents[2] / "docs" / "coming-from-peft.md").read_text("utf-8")
    table = text.split("## PEFT's configurations")[1].split("|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {field: words for names, words in rows for field in re.findall(r"`(\w+)`", names)}


def test_the_page_says_of_every_field_what_becomes_of_it():
    said = page_of_fields()
    fields = {field: what and what[1] for kind in FIELDS.values() for field, what in kind.items()}
    assert set(said) == set(fields)
    for field, what in fields.items():
        words = {NO: "refused", SAME: "of no account"}.get(what, "") if isinstance(what, str) else ""
        exceptions = {"module_dropout", "layers_pattern", "eps", "ensure_weight_tying"}
        assert words in said[field] or field in exceptions, field
        if not words and field not in ("peft_type", "module_dropout"):
            assert said[field] != "of no account", field


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "'LOHA' has no counterpart here: known types are LORA, DELORA, IA3, OFT"),
        (of("LORA").to_dict() | {"tomorrow": 3}, "tomorrow = 3: this field is not known; leave it at None, or train with PEFT"),
        (of("LORA").to_dict() | {"r": "x"}, "'r' must be int or float, got 'x'"),
        (of("LORA").to_dict() | {"r": 0}, "r = 0: the rank must be an integer of at least 1"),
        (of("LORA").to_dict() | {"lora_dropout": 1.5}, "lora_dropout = 1.5: must be at least 0 and below 1"),
        (of("LORA").to_dict() | {"target_modules": None}, "target_modules = None names no layer, for PEFT chooses by the type"),
        (of("LORA").to_dict() | {"target_modules": "q", "layers_to_transform": [1]}, "only for a list of target_modules"),
        (of("LORA").to_dict() | {"layers_to_transform": ["1"]}, "must be numbers of layers"),
        (of("LORA").to_dict() | {"layers_to_transform": [1], "layers_pattern": "h|x"}, "a plain name of what holds the layers"),
        (of("LORA").to_dict() | {"rank_pattern": {"(": 3}}, "rank_pattern has '\\(', no regular expression"),
        (of("LORA").to_dict() | {"rank_pattern": {"q": 3}, "target_parameters": ["k.weight"]}, "rank_pattern beside target"),
        (of("LORA").to_dict() | {"target_parameters": ["mlp.experts.up"]}, "only the weights of layers are read"),
        (of("LORA").to_dict() | {"target_parameters": ["weight"]}, "'weight', which every layer has"),
        (of("IA3").to_dict() | {"feedforward_modules": None}, "feedforward_modules = None: PEFT then chooses by the type"),
        (of("LORA", init_lora_weights="pissa"), "LoraConfig: init_lora_weights = 'pissa': training starts as with True here"),
        (OFTConfig(target_modules=["q"]), "OFTConfig: use_cayley_neumann = True: a truncated series is not orthogonal"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_translated_is_refused_in_words(config, words):
    with pytest.raises(AdapterError, match=words):
        delora.from_peft(config)


def test_other_types_of_peft_are_refused_by_name():
    with pytest.raises(AdapterError, match="LoHaConfig: 'LOHA' has no counterpart"):
        delora.from_peft(LoHaConfig(target_modules=["q"]))


@pytest.mark.parametrize("value", ["adapter", None, LoraConfig, nn.Linear(2, 2)], ids=str)
def test_what_is_no_configuration_is_a_type_error(value):
    with pytest.raises(TypeError, match="expected one of PEFT's configurations"):
        delora.from_peft(value)


def test_layers_of_ones_own_are_refused():
    config = of("LORA")
    config._register_custom_module({nn.LSTM: nn.Linear})
    with pytest.raises(AdapterError, match=r"layers of its own have no counterpart.*delora.host.register"):
        delora.from_peft(config)


def test_that_tied_adapters_train_apart_is_told():
    with pytest.warns(UserWarning, match="PEFT trains the adapters of tied layers as one, here they train apart"):
        delora.from_peft(of("LORA", ensure_weight_tying=True))


def test_a_start_that_is_refused_can_be_brought_along(tmp_path):
    """The way out that the refusal names: PEFT's untrained model holds the start."""
    base, x = Net().eval(), ids()
    config = of("LORA", init_lora_weights="orthogonal")
    with pytest.raises(AdapterError, match="save PEFT's untrained model and delora.load its folder, which holds this start"):
        delora.from_peft(config)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = delora.load(copy.deepcopy(base), tmp_path)
    close(ours.q.adapter.tensors()["A"], theirs.base_model.model.q.lora_A["default"].weight)
    close(shake(ours)(x).shape, theirs(x).shape)


def test_what_peft_chose_by_the_type_of_a_model_can_be_read_off():
    """The way out that the refusal names: get_peft_model writes its choice into the configuration."""
    config = of("LORA", target_modules=None)
    with pytest.raises(AdapterError, match="get_peft_model writes its choice into the configuration"):
        delora.from_peft(config)
    get_peft_model(llama(), config)
    assert delora.from_peft(config)[1]["targets"] == ["q_proj", "v_proj"]


def test_conv1d_of_transformers_needs_no_word_of_its_own():
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(8, 12))
    method, arguments = delora.from_peft(of("LORA", target_modules=["0"], fan_in_fan_out=True))
    theirs = get_peft_model(copy.deepcopy(base), of("LORA", target_modules=["0"], fan_in_fan_out=True))
    ours = delora.inject(base, method, **arguments)
    assert {tuple(p.shape) for p in ours.parameters() if p.requires_grad} == {
        tuple(p.shape) for p in theirs.parameters() if p.requires_grad
    }


def test_it_needs_no_peft():
    code = (
        "import sys, delora; sys.modules['peft'] = sys.modules['transformers'] = None\n"
        "print(delora.from_peft({'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': ['q']})[0])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "LoRA(r=2, alpha=4, rslora=False)"
