"""Trainers of other libraries: checkpoints without the base, exact resume, every optimizer, the adapter's measures logged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTTrainer

import delora
from delora import DeLoRA, LoRA
from delora.formats.files import AdapterError
from delora.integrations import AdapterCheckpoints, AdapterTrainer, Monitor
from tests import tiny
from tests.field import test_trl
from tests.field.test_resume import Classifier, Sentences

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "remove_unused_columns": False}
QUIET |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}


def arguments(folder: Path, **changes) -> TrainingArguments:
    return TrainingArguments(str(folder), **({"max_steps": 4, "save_steps": 2} | QUIET | changes))


def injected(net: nn.Module | None = None, name: str = "default", method=None) -> nn.Module:
    torch.manual_seed(0)
    return delora.inject(
        net or Classifier(), method or DeLoRA(r=2, learn_lam=True), ["q", "v"], also_train=["classifier"], name=name
    )


def made(folder: Path, kind=AdapterTrainer, model: nn.Module | None = None, rates=None, callbacks=None, **changes):
    model = model or injected()
    return kind(model, arguments(folder, **changes), train_dataset=Sentences(), callbacks=callbacks, **(rates or {}))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    other = tensors(b)
    return all(torch.equal(t, other[name]) for name, t in tensors(a).items())


# ---------------------------------------------------------------- the mixin


class Tuned(AdapterCheckpoints, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return tiny.make_language_model(tmp_path_factory.mktemp("llama"))


def tuned(source: str, folder: Path, steps: int, **changes) -> Tuned:
    torch.manual_seed(0)
    model = delora.inject(test_trl.base(source), DeLoRA(r=2, learn_lam=True), ["q_proj", "v_proj"], dropout=0.1, name="chat")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "lr_scheduler_type": "constant", "lam_lr": 0.05}
    options |= {"bf16": False}
    return test_trl.trainer(model, folder, source, Tuned, **options | changes)


@pytest.mark.slow
def test_sft_with_checkpoints_of_the_adapter_alone(source, tmp_path):
    whole = tuned(source, tmp_path / "whole", 4)
    whole.train()
    half = tuned(source, tmp_path / "half", 2)  # whose construction seeds the random generators
    half.train()
    again = tuned(source, tmp_path / "half", 4)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)
    checkpoint = tmp_path / "half" / "checkpoint-2"
    (file,) = checkpoint.glob("*.safetensors")
    with safe_open(file, "pt") as held:
        assert {key.rsplit(".", 2)[1] for key in held.keys()} == {"q_proj", "v_proj"}  # noqa: SIM118
    assert (checkpoint / "tokenizer.json").is_file()
    assert not (checkpoint / "config.json").exists()
    x = test_trl.words()
    torch.testing.assert_close(delora.load(test_trl.base(source), checkpoint).eval()(**x).loss, half.model.eval()(**x).loss)
    with pytest.raises(AdapterError, match="written with other settings: max_length = 1024 there, 8 now"):
        tuned(source, tmp_path / "other", 4, max_length=8).train(resume_from_checkpoint=str(checkpoint))


def test_the_order_of_the_classes_and_a_model_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(TypeError, match="AdapterCheckpoints must stand before SFTTrainer"):
        type("Wrong", (SFTTrainer, AdapterCheckpoints), {})
    with pytest.raises(ValueError, match=r"this model has no adapter: delora\.inject or delora\.load one first"):
        made(tmp_path, model=Classifier())
    model = injected()
    chosen = torch.optim.SGD(delora.param_groups(model, 1e-2))
    with pytest.raises(ValueError, match="lam_lr, head_lr and lam_weight_decay are for the optimizer of args.optim"):
        AdapterTrainer(model, arguments(tmp_path), optimizers=(chosen, None), lam_lr=0.1)


@pytest.mark.parametrize("changes", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}], ids=str)
def test_resumed_in_bfloat16_and_compiled(changes, tmp_path):
    torch._dynamo.reset()
    whole = made(tmp_path / "whole", **changes)
    whole.train()
    made(tmp_path / "half", max_steps=2, **changes).train()
    again = made(tmp_path / "half", **changes)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}


def test_the_best_model_is_loaded_and_a_finished_training_makes_no_step_more(tmp_path):
    """At a rate this high the loss is lowest before the end."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 8, "learning_rate": 0.3, "load_best_model_at_end": True}
    model = injected(name="a")
    trainer = AdapterTrainer(model, arguments(tmp_path, **options), train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == losses[best]
    again = AdapterTrainer(injected(name="a"), trainer.args, train_dataset=Sentences(), eval_dataset=Sentences())
    assert again.train(resume_from_checkpoint=True).global_step == 8
    assert same(again.model, model)


class Normed(Classifier):
    """With running statistics, which change in training, and a norm that is set to train by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(3), nn.LayerNorm(3)

    def forward(self, ids, labels):
        logits = self.scale(self.norm(self.net(ids)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_what_trains_outside_the_adapters_is_resumed_too(tmp_path):
    def model() -> nn.Module:
        model = injected(Normed())
        model.scale.requires_grad_(True)
        return model

    whole = made(tmp_path / "whole", model=model())
    whole.train()
    made(tmp_path / "half", model=model(), max_steps=2).train()
    again = made(tmp_path / "half", model=model())
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)
    assert not torch.equal(again.model.norm.running_mean, torch.zeros(3))
    with pytest.raises(
        AdapterError, match="other parameters train outside of the adapters there than here: scale.bias, scale.w"
    ):
        made(tmp_path / "other", model=injected(Normed())).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))


# ---------------------------------------------------------------- optimizers

WHOLE = ("lomo", "adalomo", "galore", "apollo")  # which change whole weights


def optimizer_or_skip(trainer: Trainer) -> torch.optim.Optimizer:
    try:
        return trainer.create_optimizer()
    except (ImportError, ValueError) as error:
        if "install" in str(error) or "torch_xla" in str(error) or "torch_npu" in str(error):
            words = str(error).partition("\n")[0]
            pytest.skip(f"{trainer.args.optim.value} is in a package, or for hardware, that is not here: {words}")
        raise


RATES = {"lam_lr": 0.0, "head_lr": 1e-3}
OPTIONS = {"weight_decay": 0.1, "optim_target_modules": "all-linear"}
NAMES = [str(name.value) for name in OptimizerNames]
ALL = os.environ.get("OPTIMIZERS") == "all"  # in minutes
TRAINED = [n for n in NAMES if not n.startswith(WHOLE)] if ALL else ["adafactor", "sgd", "lion_32bit"]
foreign = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Paged optimizers", "ignore:CUDA is not available"
)


@foreign
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_transformers_has_the_groups_or_is_refused(name, tmp_path):
    if name.startswith(WHOLE):
        adapter = delora.inject(Classifier(), DeLoRA(r=2), ["q", "v"])
        trainer = made(tmp_path, model=adapter, rates=RATES, optim=name, **OPTIONS)
        if name in ("adalomo", "galore_adafactor_layerwise"):  # the first needs CUDA, the other is refused by transformers
            with pytest.raises((AssertionError, ValueError), match=r"CUDA|Cannot combine"):
                optimizer_or_skip(trainer)
            return
        with pytest.raises(ValueError, match=r"has no parameter groups|of which nothing trains"):
            optimizer_or_skip(trainer)
        return
    trainer = made(tmp_path, rates=RATES, optim=name, **OPTIONS)
    optimizer = optimizer_or_skip(trainer)
    wanted = delora.param_groups(trainer.model, 1e-2, lam_lr=0.0, head_lr=1e-3, weight_decay=0.1)
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in wanted]
    for found, group in zip(optimizer.param_groups, wanted, strict=True):
        assert (float(found["lr"]), found["weight_decay"]) == pytest.approx((group["lr"], group["weight_decay"]))
        assert [id(p) for p in found["params"]] == [id(p) for p in group["params"]]


@foreign
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_an_optimizer_trains_at_its_rates_and_is_resumed(name, tmp_path):
    optimizer_or_skip(made(tmp_path / "trial", optim=name))
    steps = 8 if "radam" in name else 4  # RAdam waits for five
    options = OPTIONS | {"optim": name, "save_steps": steps // 2, "rates": RATES}
    start, whole = tensors(injected()), made(tmp_path / "whole", max_steps=steps, **options)
    whole.train()
    moved = {key for key, t in tensors(whole.model).items() if not torch.equal(t, start[key])}
    assert moved == {key for key, p in whole.model.named_parameters() if p.requires_grad and not key.endswith(".lam")}
    made(tmp_path / "half", max_steps=steps // 2, **options).train()
    again = made(tmp_path / "half", max_steps=steps, **options)
    if name == "grokadamw":
        with pytest.raises(AdapterError, match="grokadamw keeps its state outside of its state dict"):
            again.train(resume_from_checkpoint=True)
        return
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)


# ---------------------------------------------------------------- the monitor


class Logger(TrainerCallback):
    """Any logger: it gets what the Trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("late", [False, True])
def test_the_monitor_logs_to_every_logger_wherever_it_stands(kind, late, tmp_path):
    log, model = Logger(), injected()
    trainer = made(
        tmp_path, kind, model, callbacks=[log, *([] if late else [Monitor()])], logging_strategy="steps", logging_steps=1
    )
    if late:
        trainer.add_callback(Monitor())
    trainer.train()
    steps = [row for row in log.rows if "loss" in row]
    assert len(steps) == 4
    names = {"distance", "bound_used", "lam", "turn_A", "turn_B", "spectral", "reach"}
    assert all({f"delora/{name}" for name in names} <= set(row) for row in steps)
    layers = delora.distances(model)
    assert steps[-1]["delora/distance"] == pytest.approx((layers["net.q"] + layers["net.v"]) / 2)
    assert [row["delora/distance"] for row in trainer.state.log_history if "loss" in row] == [
        row["delora/distance"] for row in steps
    ]


def test_the_monitor_and_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    options = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 1}
    made(tmp_path / "run", Trainer, callbacks=[Monitor()], **options).train()
    written = b"".join(file.read_bytes() for file in (tmp_path / "log").rglob("*tfevents*"))
    assert b"train/delora/distance" in written


@pytest.mark.parametrize("every", [None, 1])
def test_the_monitor_stops_at_a_distance_and_keeps_what_it_has(every, tmp_path):
    model = injected(method=LoRA(r=2))
    options = {"max_steps": 200, "save_steps": 100, "logging_strategy": "steps", "logging_steps": 5, "learning_rate": 1e-3}
    trainer = made(tmp_path, model=model, callbacks=[Monitor(budget=0.05, every=every)], **options)
    with pytest.warns(UserWarning, match="stopped at step .*: the distance from the base, .*, reached the budget 0.05"):
        trainer.train()
    stopped = trainer.state.global_step
    assert 1 < stopped < 200
    assert every is not None or stopped % 5 == 0
    layers = delora.distances(model)
    assert (layers["net.q"] + layers["net.v"]) / 2 >= 0.05
    assert (tmp_path / f"checkpoint-{stopped}" / "adapter.json").is_file()


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"budget": float("nan")}, {"every": 0}, {"every": 1.5}])
def test_a_monitor_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="must be a"):
        Monitor(**wrong)
