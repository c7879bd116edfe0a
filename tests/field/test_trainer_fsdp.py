"""transformers' Trainer under FSDP2: two processes train, save adapters alone, and go on, as one process does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

import delora
from delora import DeLoRA
from delora.integrations import AdapterTrainer
from delora.integrations.fsdp import divided_state
from tests.processes import all_hold

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def llama() -> Any:
    """With a tied head, an adapted embedding, and a norm that trains outside of the adapter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    delora.inject(model, DeLoRA(r=2, learn_lam=True), ["q_proj", "down_proj"], also_train=["layers.1.input_layernorm"])
    model.model.norm.weight.requires_grad_(True)
    return model


def bert() -> Any:
    """Whose blocks hold the input embedding."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return delora.inject(model, DeLoRA(r=2, learn_lam=True), ["query", "word_embeddings"], also_train=["classifier"])


def rows(language: bool) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 30, (24, 6))
    return [{"input_ids": row, "labels": row if language else row[0] % 2} for row in ids]


def trainer(folder: Path, kind: str, **changes: Any) -> AdapterTrainer:
    language = kind == "llama"
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "average_tokens_across_devices": language,
        "accelerator_config": {"split_batches": True},
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    data = rows(language)
    arguments = TrainingArguments(str(folder), **options | changes)
    model = llama() if language else bert()
    made = AdapterTrainer(model, arguments, train_dataset=data, eval_dataset=data[:8], lam_lr=1e-3, head_lr=1e-3)
    made.callback_handler.remove_callback(type(made.callback_handler.callbacks[-1]))  # which prints
    return made


def same(a: Path, b: Path) -> None:
    """Two checkpoints: the same files, the same numbers to rounding."""

    def names(folder: Path) -> set[str]:
        return {
            p.name.replace(p.name, "rng") if p.name.startswith("rng") else p.name.partition("-")[0] for p in folder.iterdir()
        }

    assert names(a) == names(b)
    for pattern in ("adapter-*.safetensors", "outside.safetensors"):
        for x, y in zip(a.glob(pattern), b.glob(pattern), strict=True):
            two = load_file(y)
            for key, t in load_file(x).items():
                torch.testing.assert_close(two[key], t, rtol=1e-3, atol=1e-5)
    x, y = (torch.load(folder / "optimizer.pt") for folder in (a, b))
    assert [g["params"] for g in x["param_groups"]] == [g["params"] for g in y["param_groups"]]
    assert [g["lr"] for g in x["param_groups"]] == [g["lr"] for g in y["param_groups"]]
    for key, values in x["state"].items():
        for name, t in values.items():
            torch.testing.assert_close(y["state"][key][name], t, rtol=1e-2, atol=1e-6)


def trains_as_one(rank: int, folder: str, kind: str) -> None:
    two, out = Path(folder) / f"two-{kind}", Path(folder) / f"one-{kind}"
    made = trainer(two, kind, fsdp=True)
    made.train()
    assert sum(isinstance(module, FSDPModule) for module in made.model.modules()) > 3  # blocks, not the root alone
    if rank == 0:
        for step in (4, 6):
            same(out / f"checkpoint-{step}", two / f"checkpoint-{step}")
        for file in (two / "checkpoint-6").rglob("*.safetensors"):
            with safe_open(file, "pt") as held:
                base = [k for k in held.keys() if "base" in k or k.endswith("proj.weight")]  # noqa: SIM118
                assert not base
        fresh = llama() if kind == "llama" else bert()
        delora.load(fresh, two / "checkpoint-6")
        shutil.copytree(out, Path(folder) / f"again-{kind}")
        shutil.rmtree(Path(folder) / f"again-{kind}" / "checkpoint-6")
    torch.distributed.barrier()
    again = trainer(Path(folder) / f"again-{kind}", kind, fsdp=True)
    again.train(resume_from_checkpoint=True)  # what one process had done
    if rank == 0:
        same(out / "checkpoint-6", Path(folder) / f"again-{kind}" / "checkpoint-6")


def refused(rank: int, folder: str) -> None:
    made = trainer(Path(folder) / "refused", "llama", fsdp=True, max_steps=1, save_strategy="no", load_best_model_at_end=False)
    made.ref_model = llama()
    with pytest.raises(ValueError, match="a reference model under FSDP2 has not been run"):
        made._require_shards()
    made.ref_model = None
    made.train()
    state = made.optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.ones(3)  # as Adafactor's rows
    with pytest.raises(ValueError, match=r"'exp_avg' is of shape \(3,\) for a parameter of shape \(2, 16\)"):
        divided_state(state, made.optimizer)
    made.accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="under FSDP1: shard with FSDP2"):
        made._require_shards()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    kinds = ("llama", "bert")
    for kind in kinds:
        trainer(tmp_path / f"one-{kind}", kind).train()
    laws = {kind: (trains_as_one, (str(tmp_path), kind)) for kind in kinds}
    all_hold(laws | {"refused": (refused, (str(tmp_path),))}, tmp_path)
    for kind in kinds:  # one process goes on with what two did
        shutil.rmtree(tmp_path / f"two-{kind}" / "checkpoint-6")
        trainer(tmp_path / f"two-{kind}", kind).train(resume_from_checkpoint=True)
        same(tmp_path / f"one-{kind}" / "checkpoint-6", tmp_path / f"two-{kind}" / "checkpoint-6")
