"""PEFT's folders: what we write, PEFT reads to our logits; what PEFT writes, we read to its logits."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import DeloraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import delora
from delora import DeLoRA, LoRA
from delora.formats.files import AdapterError
from tests.cases import Net, ids, shake


class Everything(nn.Module):
    """One layer of each kind that PEFT's LoRA knows."""

    def __init__(self, conv1d: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.conv1d = nn.Conv1d(3, 4, 3)
        self.linear = Conv1D(8, 4) if conv1d else nn.Linear(4, 8)
        self.out = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids):
        h = self.conv(self.emb(ids)[:, None]).flatten(2)  # [batch, 3, positions]
        h = self.out(torch.tanh(self.linear(self.conv1d(h).transpose(1, 2).contiguous())))
        return self.classifier(torch.tanh(h)).mean(1)


TARGETS = ["emb", "conv", "conv1d", "linear", "out"]


def peft_of(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is one switch for all layers; PEFT sets it for each and says so
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("method", [LoRA(2), DeLoRA(2), DeLoRA(2, start="soft"), DeLoRA(2, norm="rows")], ids=str)
@pytest.mark.parametrize("conv1d", [True, False])
def test_peft_gives_our_logits(method, conv1d, tmp_path):
    base, x = Everything(conv1d).eval(), ids()
    model = copy.deepcopy(base)
    delora.inject(model, method, TARGETS, also_train=["classifier"], overrides={"conv": {"r": 3}})
    delora.strength(shake(model).eval(), 0.8)
    delora.export.peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is conv1d
    theirs = peft_of(base, tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x), base(x), rtol=0.1)


def test_a_zero_delora_becomes_pefts_delora(tmp_path):
    base, x = Net().eval(), ids()
    model = copy.deepcopy(base)
    delora.inject(
        model, DeLoRA(2, 5.0, start="zero"), ["q", "v"], also_train=["classifier"], overrides={"v": {"r": 3, "lam": 2.0}}
    )
    delora.strength(shake(model), 0.5)
    delora.export.peft(model, tmp_path, kind="delora")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELORA"
    torch.testing.assert_close(peft_of(base, tmp_path)(x), model(x), rtol=1e-5, atol=1e-6)
    again = delora.load(copy.deepcopy(base), tmp_path)
    assert again.v.adapter.method == DeLoRA(3, 2.0, start="zero", learn_lam=True)  # as PEFT would train it
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, modules_to_save=["classifier"], init_lora_weights=False),
        LoraConfig(
            r=2, lora_alpha=6, use_rslora=True, target_modules=TARGETS, init_lora_weights=False,
            rank_pattern={"^out": 4}, alpha_pattern={"conv1?d?": 3},
        ),
        DeloraConfig(r=2, delora_lambda=3, target_modules=["out"], modules_to_save=["classifier"], init_weights=False),
        DeloraConfig(
            r=2, target_modules=["out", "classifier"], init_weights=False,
            rank_pattern={"out": 4}, lambda_pattern={"classifier": 2},
        ),
    ],
    ids=["LORA", "rsLoRA with patterns", "DELORA", "DELORA with patterns"],
)  # fmt: skip
def test_we_give_pefts_logits(config, tmp_path):
    base, x = Everything(conv1d=False).eval(), ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config).eval()
        shake(theirs).save_pretrained(tmp_path, save_embedding_layers=False)
    ours = delora.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(x), base(x), rtol=0.1)


def test_target_names_are_short_where_that_selects_the_same_layers(tmp_path):
    model = Net()
    delora.inject(model, LoRA(2), ["q", "v"])
    delora.export.peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q", "v"]
    model = nn.ModuleDict({"a": Net(), "b": Net()})
    delora.inject(model, LoRA(2), ["a.q"])
    delora.export.peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a.q"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    model = delora.inject(Net(), DeLoRA(2), ["q"])
    with pytest.raises(
        ValueError, match=r"q: PEFT's DELORA is DeLoRA\(start='zero', norm='columns'\) on nn.Linear, this is DeLoRA"
    ):
        delora.export.peft(model, tmp_path / "a", kind="delora")
    model.q.adapter.A.data[:] = float("inf")
    with pytest.raises(ValueError, match="holds NaN or infinity: nothing was written"):
        delora.export.peft(model, tmp_path / "a")
    whole = delora.inject(Net(), delora.Full(), ["classifier"])
    with pytest.raises(ValueError, match="there is no low-rank change to export; use delora.merge"):
        delora.export.peft(whole, tmp_path / "a")
    with pytest.raises(ValueError, match="kind = 'dora'"):
        delora.export.peft(model, tmp_path / "a", kind="dora")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    model = delora.inject(Net(), DeLoRA(2, start="zero"), ["q", "v"], also_train=["classifier"])
    return delora.export.peft(shake(model), tmp_path / "peft", kind="delora")


def refuses(folder, words, **kwargs):
    torch.manual_seed(3)
    base = Net()
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(AdapterError, match=words):
        delora.load(base, folder, **kwargs)
    assert {name: id(module) for name, module in base.named_modules()} == before


CONFIGS = [
    ({"peft_type": "LOHA"}, "cannot read adapters of type 'LOHA': known types are LORA, DELORA"),
    ({"peft_type": 3}, "'peft_type' must be str"),
    ({"bias": "all"}, "bias = 'all': trained biases of the base model have no counterpart"),
    ({"r": 0}, "r = 0: the rank"),
    ({"r": 3}, r"q\.A has shape \[2, 8\], expected \[3, 8\]"),
    ({"delora_lambda": -5}, "lam = -5: must be"),
    ({"delora_lambda": "15"}, "'delora_lambda' must be int or float"),
    ({"module_dropout": -0.1}, "dropout -0.1 must be at least 0"),
    ({"rank_pattern": {"(": 3}}, r"rank_pattern has '\(', no regular expression"),
    ({"peft_type": "LORA", "lora_alpha": 2}, "delora_lambda = 8.0: this field is not known"),
    ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow = 1: this field is not known; merge it with PEFT"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS, ids=[words for _, words in CONFIGS])
def test_configs_that_cannot_be_read(folder, change, words):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuses(folder, words)


def test_a_weight_of_the_base_that_no_field_names_is_read_as_peft_reads_it(folder):
    file = folder / "adapter_config.json"
    torch.manual_seed(3)
    named, x = delora.load(Net(), folder).eval(), ids()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    torch.manual_seed(3)
    torch.testing.assert_close(delora.load(Net(), folder).eval()(x), named(x), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["lora_bias", "use_qalora"])
def test_other_loras_are_refused(folder, key):
    file = folder / "adapter_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith(("delora", "lambda", "module_dropout"))}
    file.write_text(json.dumps(config | {"peft_type": "LORA", key: True}))
    refuses(folder, f"{key} = True: .*merge it with PEFT")


def test_truncated_and_strange_tensors(folder):
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    refuses(folder, "is not a whole safetensors file")
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.q.delora_B": torch.full((8, 2), float("nan"))}, file)
    refuses(folder, "'base_model.model.q.delora_B' holds NaN")
    save_file(tensors | {"other.q.delora_B": torch.zeros(8, 2)}, file)
    refuses(folder, "'other.q.delora_B' does not start with 'base_model.model.'")
    save_file({"base_model.model.classifier.0.weight": torch.zeros(6, 12)}, file)
    refuses(folder, "holds no tensor of type DELORA")


def test_pefts_delora_on_another_base_is_refused(folder):
    torch.manual_seed(4)
    other = Net()
    with pytest.raises(AdapterError, match="the weights of q are not those the adapter was trained on"):
        delora.load(other, folder)
    delora.load(other, folder, allow_other_base=True)
