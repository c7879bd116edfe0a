"""transformers' Trainer, and any class derived from it, for adapters: checkpoints without the base model, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from delora.formats.files import AdapterError, read_json, write_atomically
from delora.formats.native import load, save
from delora.integrations import fsdp
from delora.integrations.checkpoints import damage, last_checkpoint, require_same, write_manifest
from delora.integrations.monitor import first
from delora.models import active_adapter, adapted_layers, adapters
from delora.optimizing import param_groups
from delora.references import reference
from delora.sharded import fill, whole

__all__ = ["AdapterCheckpoints", "AdapterTrainer"]

REST, OPTIMIZER, SCHEDULER = "outside.safetensors", "optimizer.pt", "scheduler.pt"
LOADER = "create_model_from_path"  # in the modules of TRL's trainers
# Not among them: how many steps are trained in all, which a resume may change.
SETTINGS = (
    "learning_rate",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)
UNRESUMED = {"grokadamw": "keeps its state outside of its state dict, so that training would not go on to the same numbers"}

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class AdapterCheckpoints(Base):
    """What a Trainer lacks for a model with an adapter, to be named before it: ``class Mine(AdapterCheckpoints, SFTTrainer)``.

    - A checkpoint holds the adapter (`delora.load` reads it), what else trains, and the states of optimizer, schedule and
      random generators, never the base model. A resumed training goes on to the same numbers, or is refused.
    - The optimizer is the one of ``args.optim``, whichever that is, over the groups of `delora.param_groups`:
      ``args.learning_rate`` for the adapter, ``lam_lr`` for learned strengths, ``head_lr`` for modules trained whole.
    - The best model is that of the best checkpoint (``load_best_model_at_end``).
    - Under FSDP2 (``fsdp=True``) all processes save and load together, a checkpoint is that of one process, and training goes
      on from it with any number of them.
    - A trainer of TRL that needs a reference model (DPO, KTO, GRPO, RLOO) gets `delora.reference` of the model, if none is
      given: it would load another base from its file.

    Raises:
        TypeError: the class is derived in the other order.
        ValueError: the model has no active adapter, an argument would have no effect, or the model would be sharded by
            DeepSpeed or FSDP1, or by FSDP2 beside its reference.

    >>> class Mine(AdapterCheckpoints, Trainer):
    ...     pass
    >>> class Wrong(Trainer, AdapterCheckpoints):
    ...     pass
    Traceback (most recent call last):
    TypeError: Wrong: AdapterCheckpoints must stand before Trainer: class Wrong(AdapterCheckpoints, Trainer)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = cls.__mro__.index(AdapterCheckpoints)
        before = [base for base in cls.__mro__[1:ours] if not issubclass(base, AdapterCheckpoints)]
        late = next((base for base in before if issubclass(base, Trainer)), None)
        if late is not None:
            name = cls.__name__
            raise TypeError(
                f"{name}: AdapterCheckpoints must stand before {late.__name__}: "
                f"class {name}(AdapterCheckpoints, {late.__name__})"
            )

    def __init__(
        self,
        *args: Any,
        lam_lr: float | None = None,
        head_lr: float | None = None,
        lam_weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.lam_lr, self.head_lr, self.lam_weight_decay = lam_lr, head_lr, lam_weight_decay
        args, kwargs, load_reference = _with_reference(super().__init__, args, kwargs)
        with load_reference:
            super().__init__(*args, **kwargs)
        if self.model is not None:
            active_adapter(self._injected)
        self._require_shards()
        if self.optimizer is not None and (lam_lr is not None or head_lr is not None or lam_weight_decay):
            raise ValueError(
                "lam_lr, head_lr and lam_weight_decay are for the optimizer of args.optim, not for one that is given: use "
                "delora.param_groups for that one"
            )
        first(self.callback_handler)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == "MULTI_CPU":
            fsdp.shard_on_a_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def _require_shards(self) -> None:
        """Raise a ValueError if the model would be sharded in a way in which no adapter is saved; else name its blocks."""
        plugin = fsdp.plugin_of(self.accelerator)
        if self.is_deepspeed_enabled or (plugin is not None and plugin.fsdp_version != 2):
            raise ValueError(
                f"no checkpoints of the adapter alone are to be had under {'FSDP1' if plugin else 'DeepSpeed'}: shard with "
                'FSDP2 (fsdp=True, fsdp_config={"version": 2}), or take the Trainer without AdapterCheckpoints'
            )
        if plugin is not None and getattr(self, "ref_model", None) is not None:
            raise ValueError(
                "a reference model under FSDP2 has not been run: train in DDP (without fsdp), or take the trainer without "
                "AdapterCheckpoints"
            )
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None and self.model is not None:
            plugin.transformer_cls_names_to_wrap = fsdp.blocks(self._injected)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._regroup(super().create_optimizer(model), model or self._injected)
        return cast(torch.optim.Optimizer, self.optimizer)

    def _regroup(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Give the Trainer's optimizer the groups of `param_groups`; each keeps what was set for its parameters beside."""
        args = self.args
        wanted = param_groups(
            model,
            args.learning_rate,
            lam_lr=self.lam_lr,
            head_lr=self.head_lr,
            weight_decay=args.weight_decay,
            lam_weight_decay=self.lam_weight_decay,
        )
        old = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        apart = hasattr(optimizer, "fused_backward") or any(id(p) not in old for group in wanted for p in group["params"])
        if apart:  # LOMO's kin step within backward, layer-wise optimizers in hooks of their own
            raise ValueError(
                f"optim={self._optim!r} has no parameter groups, so that no rate of lam or of a head could be set: choose "
                "another, or a plain Trainer"
            )
        if any(group["params"] and not any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups):
            raise ValueError(
                f"optim={self._optim!r} is set for modules ({args.optim_target_modules}) of which nothing trains: it works "
                "on whole weights, and these are frozen; choose another"
            )
        optimizer.param_groups = []
        for group in wanted:
            parts: dict[int, list[nn.Parameter]] = {}  # what the Trainer keeps apart stays apart
            for p in group["params"]:
                parts.setdefault(id(old[id(p)]), []).append(p)
            for parameters in parts.values():
                optimizer.add_param_group(old[id(parameters[0])] | group | {"params": parameters})

    @property
    def _optim(self) -> str:
        return str(getattr(self.args.optim, "value", self.args.optim))

    @property
    def _injected(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def _folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given; ``True``: from the newest one that is whole.

        Raises:
            AdapterError: the checkpoint is not whole, or was written with other settings.
        """
        if resume_from_checkpoint is True:

            def tell(line: str) -> None:
                warnings.warn(line, stacklevel=4)

            resume_from_checkpoint = last_checkpoint(self._folder, tell, bool(self.args.load_best_model_at_end))
            if resume_from_checkpoint is None:
                raise AdapterError(f"{self._folder} holds no whole checkpoint: train without resume_from_checkpoint")
        if resume_from_checkpoint and 0 < self.args.max_steps <= _step(Path(resume_from_checkpoint)):
            self.finished(resume_from_checkpoint)
            if self.args.load_best_model_at_end:
                self._load_best_model()
            return TrainOutput(self.state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # the Trainer's own would gather the base model
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, schedule = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        state = fsdp.whole_state(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(schedule.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, schedule = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        state = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True)
        try:
            optimizer.load_state_dict(fsdp.divided_state(state, optimizer))
        except ValueError as error:
            raise AdapterError(f"{checkpoint}: {error}") from error
        schedule.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / "manifest.json").unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its own random state
        if self.args.should_save and checkpoint.is_dir():  # a limit of checkpoints may have removed it
            write_manifest(checkpoint, self.settings())

    def settings(self) -> dict[str, Any]:
        """What the numbers of a step depend on, beside the model and the data: a resume with other values is refused."""
        placed = [a for a in adapters(self._injected).values() if not a.whole]
        rates = {key: getattr(self, key) for key in ("lam_lr", "head_lr", "lam_weight_decay")}
        methods = {"method": sorted({str(a.method) for a in placed}), "dropout": sorted({a.dropout for a in placed})}
        common = {field.name for field in dataclasses.fields(TrainingArguments)}
        own = sorted({field.name for field in dataclasses.fields(self.args)} - common)  # such as beta, of TRL's DPOConfig
        values = methods | {key: getattr(self.args, key) for key in (*SETTINGS, *own)} | rates
        return cast(dict[str, Any], json.loads(json.dumps(values, default=str)))  # as the manifest will have them

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self._folder)
        if self.args.should_save or self.is_fsdp_enabled:
            save(self._injected, folder)
            rest = {key: whole(t.detach()).cpu().contiguous() for key, t in _rest(self._injected).items()}
            if rest and self.args.should_save:
                write_atomically(folder / REST, to_bytes(rest))
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if (broken := damage(checkpoint)) is not None:
            raise AdapterError(f"{checkpoint} is not whole: {broken}")
        if self._optim in UNRESUMED:
            raise AdapterError(f"{checkpoint}: {self._optim} {UNRESUMED[self._optim]}; train anew without it")
        for name in (OPTIMIZER, SCHEDULER, "rng_state*.pth"):
            if not any(checkpoint.glob(name)):
                raise AdapterError(
                    f"{checkpoint} holds no {name} (save_only_model?): training cannot go on from it; delora.load its adapter "
                    "and train anew"
                )
        require_same(checkpoint, self.settings())
        _take(self._injected, checkpoint)

    def _load_best_model(self) -> None:
        # Not the path that the state remembers: the run's folder may have been moved since.
        _take(self._injected, self._folder / f"checkpoint-{self.state.best_global_step}")

    def finished(self, checkpoint: str) -> None:
        """Load a checkpoint of a finished training. The Trainer itself would do one more step."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """`AdapterCheckpoints` over transformers' own Trainer, whose arguments it takes, and ``lam_lr``, ``head_lr``,
    ``lam_weight_decay``.

    >>> import delora, tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    >>> model = BertForSequenceClassification(BertConfig(**sizes))
    >>> model = delora.inject(model, delora.DeLoRA(r=2), ["query"], also_train=["classifier"])
    >>> rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor(0)}] * 4
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = TrainingArguments(folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_steps=1)
    ...     trainer = AdapterTrainer(model, arguments, train_dataset=rows, head_lr=1e-2)
    ...     trainer.callback_handler.remove_callback(type(trainer.callback_handler.callbacks[-1]))  # which prints
    ...     trainer.train().global_step, (Path(folder) / "checkpoint-1" / "adapter.json").is_file()
    (2, True)
    """


def _with_reference(init: Any, args: Any, kwargs: Any) -> tuple[Any, Any, AbstractContextManager[None]]:
    """The arguments of a trainer with a reference among them, if it takes one; and a context in which it may load one."""
    bound = inspect.signature(init).bind(*args, **kwargs)
    model, arguments = bound.arguments.get("model"), bound.arguments.get("args")
    if not isinstance(model, nn.Module) or not adapted_layers(model):
        return args, kwargs, nullcontext()
    if "ref_model" in bound.signature.parameters:
        if bound.arguments.get("ref_model") is None:
            bound.arguments["ref_model"] = reference(model)
    elif getattr(arguments, "beta", None) and hasattr(module := sys.modules[init.__module__], LOADER):
        return args, kwargs, _in_place(module, model)
    return bound.args, bound.kwargs, nullcontext()


@contextmanager
def _in_place(module: Any, model: nn.Module) -> Iterator[None]:
    """TRL's GRPO and RLOO take no reference: within this context, the one that they load is the model's."""
    loader = getattr(module, LOADER)
    setattr(module, LOADER, lambda *_, **__: reference(model))
    try:
        yield
    finally:
        setattr(module, LOADER, loader)


def _step(checkpoint: Path) -> int:
    file = checkpoint / "trainer_state.json"
    step = read_json(file).get("global_step") if file.is_file() else None
    return step if isinstance(step, int) else 0


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """What changes in training outside the adapters: parameters that were set to train by hand, and running statistics."""
    layers = adapted_layers(model).values()
    inside = {id(t) for layer in layers for t in (*layer.adapters.parameters(), *layer.adapters.buffers())}
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase):
            found |= {f"{name}.{key}": t for key, t in module._buffers.items() if t is not None}
    return {name: t for name, t in found.items() if id(t) not in inside}


def _take(model: nn.Module, checkpoint: Path) -> None:
    rest, saved = _rest(model), load_file(checkpoint / REST) if (checkpoint / REST).is_file() else {}
    other = [name for name in {*rest, *saved} if name not in rest or name not in saved or rest[name].shape != saved[name].shape]
    if other:
        raise AdapterError(
            f"{checkpoint}: other parameters train outside of the adapters there than here: {', '.join(sorted(other)[:5])}"
        )
    load(model, checkpoint, active_adapter(model))
    for name, t in saved.items():
        fill(rest[name], t.to(rest[name].device))
