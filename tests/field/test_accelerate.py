"""1b, 1i. accelerate: a prepared model trains, is saved and resumed; one whose weights lie elsewhere is right, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_in_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delora
from delora import DeLoRA, DoRA
from tests.cases import Net, ids, shake
from tests.processes import in_two_processes


@pytest.fixture(autouse=True)
def _own_state():
    """accelerate keeps one state for a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def data(n: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(0, 20, (n, 6), generator=generator), torch.randint(0, 3, (n,), generator=generator))


def net() -> nn.Module:
    torch.manual_seed(1)
    return delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(delora.param_groups(model, 1e-2))


def step(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_trains_as_the_plain_loop_and_is_resumed(precision, tmp_path):
    plain, accelerator = net(), Accelerator(cpu=True, mixed_precision=precision)
    plain_optimizer = optimizer(plain)
    model = net()
    model, prepared, loader = accelerator.prepare(model, optimizer(model), DataLoader(data(), batch_size=4))
    for at, batch in enumerate(DataLoader(data(), batch_size=4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = step(plain, batch)
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        if at == 1:
            half = trained(plain)
    for at, batch in enumerate(loader):
        if at == 2:
            assert same(trained(model), half)
            accelerator.save_state(tmp_path / "state")
        accelerator.backward(step(model, batch))
        prepared.step()
        prepared.zero_grad()
    assert same(trained(model), trained(plain))
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    shake(model)
    accelerator.load_state(tmp_path / "state")
    assert same(trained(model), half)
    for batch in accelerator.skip_first_batches(loader, 2):
        accelerator.backward(step(model, batch))
        prepared.step()
        prepared.zero_grad()
    assert same(trained(model), trained(plain))

    x, inside = ids(), accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    delora.save(inside, tmp_path / "adapter")
    torch.manual_seed(1)
    torch.testing.assert_close(delora.load(Net(), tmp_path / "adapter")(x), plain(x))


def apart(model: nn.Module, how: str, folder: Path) -> None:
    if how == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        places = {"emb": "cpu", "q": "disk", "v": "cpu", "classifier": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


HOW = ["cpu", "disk", "map"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", [DeLoRA(r=2), DoRA(r=2)], ids=["DeLoRA", "DoRA"])
def test_a_base_that_lies_elsewhere_trains_and_is_saved(how, method, tmp_path):
    torch.manual_seed(1)
    model, x = Net(), ids()
    before, state = model(x), {key: t.clone() for key, t in model.state_dict().items()}
    apart(model, how, tmp_path / "weights")
    assert model.q.weight.is_meta
    delora.inject(model, method, ["q", "v"])
    torch.testing.assert_close(model(x), before)
    made = optimizer(model)
    for batch in DataLoader(data(), batch_size=4):
        made.zero_grad()
        step(model, batch).backward()
        made.step()
    after = model(x)
    assert not torch.allclose(after, before)
    delora.save(model, tmp_path / "adapter")
    fresh = Net()
    fresh.load_state_dict(state)
    torch.testing.assert_close(delora.load(fresh, tmp_path / "adapter")(x), after)
    elsewhere = Net()
    elsewhere.load_state_dict(state)
    apart(elsewhere, how, tmp_path / "others")
    torch.testing.assert_close(delora.load(elsewhere, tmp_path / "adapter")(x), after)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("s", [1.0, 0.5])
def test_an_adapted_model_that_is_sent_elsewhere_runs_and_is_saved(how, s, tmp_path):
    model, x = shake(net()), ids()
    delora.strength(model, s)
    after, distances = model(x), delora.distances(model)
    apart(model, how, tmp_path / "weights")
    assert all(p.is_meta for p in model.q.parameters())
    with torch.no_grad():
        if s == 1:
            torch.testing.assert_close(model(x), after)
        else:
            with pytest.raises(ValueError, match="trained whole is kept elsewhere by a hook .*delora.merge the model before"):
                model(x)
    assert all(p.is_meta for p in model.q.parameters())  # also what was given to an adapter as its layer
    assert delora.distances(model) == pytest.approx(distances)
    delora.save(model, tmp_path / "adapter")
    torch.manual_seed(1)
    torch.testing.assert_close(delora.load(Net(), tmp_path / "adapter")(x), after)
    with pytest.raises(ValueError, match="cannot merge 'q': its weight is kept elsewhere by a hook"):
        delora.merge(model)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(model(x), after)


def test_a_model_without_memory_is_injected_and_then_loaded(tmp_path):
    torch.manual_seed(1)
    source, x = Net(), ids()
    source_file = tmp_path / "pytorch_model.bin"
    torch.save(source.state_dict(), source_file)
    with init_empty_weights():
        model = Net()
    delora.inject(model, DeLoRA(r=2), ["q", "v"])
    delora.eject(model)
    load_checkpoint_in_model(model, str(source_file), {"": "cpu"})
    torch.testing.assert_close(model(x), source(x))
    delora.inject(model, DeLoRA(r=2), ["q", "v"])
    torch.testing.assert_close(model(x), source(x))


def _two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = net()
    model, made, loader = accelerator.prepare(model, optimizer(model), DataLoader(data(), batch_size=2))
    for batch in loader:
        accelerator.backward(step(model, batch))
        made.step()
        made.zero_grad()
    with pytest.raises(ValueError, match="inject of a DistributedDataParallel"):
        delora.inject(model, DeLoRA(r=2), ["q"], name="late")
    everywhere = accelerator.gather(torch.cat([t.flatten() for t in trained(model)])[None])
    assert torch.equal(everywhere[0], everywhere[1])
    if accelerator.is_main_process:
        delora.save(model, folder / "adapter")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    in_two_processes(_two, tmp_path)
    model = net()
    made = optimizer(model)
    for batch in DataLoader(data(), batch_size=4):
        step(model, batch).backward()
        made.step()
        made.zero_grad()
    x = ids()
    torch.manual_seed(1)
    torch.testing.assert_close(delora.load(Net(), tmp_path / "adapter")(x), model(x), atol=1e-5, rtol=1e-4)
