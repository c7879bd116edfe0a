"""1g. Names of wrappers are never in a file and are read either way; what a parallel wrapper would not know is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import delora
from delora import DeLoRA, LoRA
from delora.models import adapted_layers
from tests.cases import ids, shake
from tests.processes import in_two_processes


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.emb(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h.mean(1))


def compiled(model):
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")


def checkpointed(model):
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)


def each_linear(model):
    for layer in model.layers:
        layer[0] = checkpoint_wrapper(layer[0])


def nothing(model):
    pass


LAYERS = ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]
WRAPS = [compiled, checkpointed, each_linear, nothing]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of torch's compiler, for a block's input
@pytest.mark.parametrize("outer", ["plain", "compile", "DataParallel"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_names_in_files_are_the_models_own(outer, wrap, when, tmp_path):
    torch.manual_seed(0)
    model, plain = Blocks(), Blocks()
    plain.load_state_dict(model.state_dict())
    x = ids()
    outers = {"plain": lambda m: m, "compile": lambda m: torch.compile(m, backend="eager"), "DataParallel": nn.DataParallel}
    if when == "before":
        wrap(model)
        whole = outers[outer](model)
        delora.inject(whole, DeLoRA(r=2), LAYERS, also_train=["head"])
    else:
        delora.inject(model, DeLoRA(r=2), LAYERS, also_train=["head"])
        wrap(model)
        whole = outers[outer](model)
    shake(model)
    expected = whole(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    delora.save(whole, tmp_path)
    data = json.loads((tmp_path / "adapter.json").read_text())
    assert [*data["layers"], *data["also_train"]] == ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "head"]
    torch.testing.assert_close(delora.load(plain, tmp_path)(x), expected)
    with delora.disabled(whole):
        base = whole(x)
    assert not torch.allclose(base, expected)
    delora.merge(whole)
    assert not adapted_layers(whole)
    torch.testing.assert_close(whole(x), expected)


@pytest.mark.parametrize("wrap", WRAPS)
def test_names_of_wrappers_in_a_file_are_read(wrap, tmp_path):
    """As an earlier version, or another program, wrote them."""
    torch.manual_seed(0)
    model, other = Blocks(), Blocks()
    other.load_state_dict(model.state_dict())
    shake(delora.inject(model, LoRA(r=2), ["layers.0.0"], also_train=["head"]))
    delora.save(model, tmp_path)
    x = ids()
    expected = model(x)
    rename(tmp_path, {"layers.0.0": "module.layers.0._orig_mod.0", "head": "module.head._checkpoint_wrapped_module"})
    wrap(other)
    torch.testing.assert_close(delora.load(other, tmp_path)(x), expected)


def rename(folder, names):
    import hashlib

    from safetensors.torch import load, save

    (file,) = folder.glob("*.safetensors")
    tensors = {}
    for key, t in load(file.read_bytes()).items():
        old = next(name for name in names if key.startswith(name + "."))
        tensors[names[old] + key.removeprefix(old)] = t
    data = json.loads((folder / "adapter.json").read_text())
    for part in ("layers", "also_train"):
        data[part] = {names[key]: value for key, value in data[part].items()}
    raw = save(tensors)
    digest = hashlib.sha256(raw).hexdigest()
    data["tensors"] |= {"file": f"adapter-{digest[:16]}.safetensors", "sha256": digest, "bytes": len(raw)}
    data.pop("checksum", None)
    data["schema"] = 1
    file.unlink()
    (folder / data["tensors"]["file"]).write_bytes(raw)
    (folder / "adapter.json").write_text(json.dumps(data))


def wrapped_too_early(rank, folder):
    torch.manual_seed(0)
    model = Blocks()
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="inject of a DistributedDataParallel: .* call delora.inject first"):
        delora.inject(ddp, DeLoRA(r=2), LAYERS)
    model = delora.inject(Blocks(), DeLoRA(r=2), LAYERS, name="a")
    delora.save(model, f"{folder}/{rank}")
    delora.inject(model, DeLoRA(r=2), LAYERS, name="b")
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="activate of a DistributedDataParallel"):
        delora.activate(ddp, "a")
    with pytest.raises(ValueError, match="load of a DistributedDataParallel"):
        delora.load(ddp, f"{folder}/{rank}", name="c", allow_other_base=True)
    optimizer = torch.optim.AdamW(delora.param_groups(ddp, lr=1e-2))
    for step in range(3):
        ddp(torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(10 * step + rank))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    both = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(both, flat)
    assert torch.equal(*both)


@pytest.mark.slow
def test_what_ddp_would_not_know_is_refused(tmp_path):
    in_two_processes(wrapped_too_early, str(tmp_path))
