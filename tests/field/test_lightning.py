"""1e, 1h. Lightning's Trainer in each of its precisions: adapters stay in float32, train, are checkpointed and resumed."""

from __future__ import annotations

import pytest
import pytorch_lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delora
from delora import DeLoRA
from delora.formats.files import AdapterError
from delora.integrations import LightningAdapter
from tests.cases import Net, ids, shake

pytestmark = [pytest.mark.filterwarnings("ignore:::pytorch_lightning"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}  # and the dtype of the base
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"enable_checkpointing": False}


def rows(n: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return list(DataLoader(data(n, generator), batch_size=4))


def data(n: int, generator: torch.Generator) -> TensorDataset:
    return TensorDataset(torch.randint(0, 20, (n, 6), generator=generator), torch.randint(0, 3, (n,), generator=generator))


def loader() -> DataLoader:
    return DataLoader(data(12, torch.Generator().manual_seed(0)), batch_size=4)


def injected() -> nn.Module:
    torch.manual_seed(1)
    return delora.inject(Net(), DeLoRA(r=2, learn_lam=True), ["q", "v"], also_train=["classifier"])


def loss_of(net: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]).float(), batch[1])


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = injected()

    def training_step(self, batch, number):
        return loss_of(self.net, batch)

    def validation_step(self, batch, number):
        self.inference = torch.is_inference_mode_enabled()
        loss_of(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(delora.param_groups(self.net, 1e-2))


class Late(Module):
    """Injects where Lightning builds a model: within the precision's own default dtype."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            assert torch.get_default_dtype() == torch.bfloat16
            self.net = injected()


def fit(module: L.LightningModule, precision: str, epochs: int, checkpoint=None, validation=None) -> L.Trainer:
    trainer = L.Trainer(max_epochs=epochs, precision=precision, **QUIET)
    trainer.fit(module, loader(), validation, ckpt_path=checkpoint, weights_only=False)
    return trainer


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_stay_in_float32_train_and_are_resumed(precision, tmp_path):
    first, whole = Module(), Module()
    before = tensors(first)
    trainer = fit(first, precision, 2)
    assert {p.dtype for p in first.parameters() if p.requires_grad} == {torch.float32}
    assert first.net.q.base.weight.dtype == PRECISIONS[precision]
    after = tensors(first)
    moved = {name for name in before if not torch.equal(after[name], before[name].to(after[name].dtype))}
    assert moved == {name for name, p in first.named_parameters() if p.requires_grad}
    assert 0 < abs(first.net.q.adapter.lam.item() - 8.0) < 0.0625 + 1e-2  # about bfloat16's next number, in six steps of 0.01

    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = Module()
    shake(again)  # whatever it holds, the checkpoint's values come in its place
    fit(again, precision, 4, tmp_path / "two.ckpt")
    fit(whole, precision, 4)
    expected = tensors(whole)
    assert all(torch.equal(t, expected[name]) for name, t in tensors(again).items())

    delora.save(again.net, tmp_path / "adapter")
    fresh = Net().to(PRECISIONS[precision])
    torch.manual_seed(1)
    fresh.load_state_dict(Net().state_dict())
    x = ids()
    torch.testing.assert_close(delora.load(fresh, tmp_path / "adapter")(x), again.net(x))


def test_lightnings_loop_is_the_plain_loop():
    module, plain = Module(), injected()
    L.Trainer(**QUIET).validate(module, loader(), verbose=False)  # neither this nor the validation between changes anything
    assert module.inference
    fit(module, "32-true", 2, validation=loader())
    assert not module.inference
    optimizer = torch.optim.AdamW(delora.param_groups(plain, 1e-2))
    for batch in rows() * 2:
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        optimizer.step()
    expected = tensors(plain)
    assert all(torch.equal(t, expected[name]) for name, t in tensors(module.net).items())


def test_a_model_that_is_injected_within_lightnings_precision():
    module = Late()
    fit(module, "bf16-true", 1)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert module.net.q.base.weight.dtype == torch.bfloat16
    assert module.net.q.adapter.lam.item() != 8.0


# ---------------------------------------------------------------- checkpoints of the adapter alone


def adapter_fit(module: L.LightningModule, precision: str, epochs: int, checkpoint=None) -> L.Trainer:
    trainer = L.Trainer(max_epochs=epochs, precision=precision, callbacks=[LightningAdapter()], **QUIET)
    trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
    return trainer


class Normed(Module):
    """With another model beside the adapted one, and statistics that change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.net.norm = nn.BatchNorm1d(3)

    def training_step(self, batch, number):
        return loss_of(lambda x: self.net.norm(self.net(x)), batch)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [Module, Normed])
def test_checkpoints_of_the_adapter_alone_are_resumed(precision, kind, tmp_path):
    first, whole, again = kind(), kind(), kind()
    trainer = adapter_fit(first, precision, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=False)["state_dict"]
    frozen = {name for name, p in first.net.named_parameters() if not p.requires_grad}
    assert {name for name in first.state_dict() if name not in state} == {f"net.{name}" for name in frozen}
    shake(again)
    adapter_fit(again, precision, 4, tmp_path / "two.ckpt")
    fit(whole, precision, 4)
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())


def test_a_checkpoint_on_another_base_is_refused_also_where_it_is_only_tested(tmp_path):
    adapter_fit(Module(), "32-true", 1).save_checkpoint(tmp_path / "one.ckpt")
    other = Module()
    with torch.no_grad():
        other.net.q.base.weight.mul_(1.1)
    with pytest.raises(AdapterError, match=r"the weights of net\.q are not those that the checkpoint was written with"):
        adapter_fit(other, "32-true", 2, tmp_path / "one.ckpt")
    tester = L.Trainer(callbacks=[LightningAdapter()], **QUIET)
    with pytest.raises(AdapterError, match=r"the weights of net\.q are not those"):
        tester.validate(other, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=False, verbose=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.emb\.weight"):  # without the callback nothing fits by chance
        fit(Module(), "32-true", 2, tmp_path / "one.ckpt")
