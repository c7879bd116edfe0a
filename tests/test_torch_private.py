"""Every private part of torch that is used can be taken away: then the fallback gives the same results."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import delora
from delora import DeLoRA, torch_private
from tests.cases import LAYERS, METHODS, Net, adapted, ids, shake


class Without:
    """A module of torch, as our file sees it, without some of its names."""

    def __init__(self, module, hidden, **replaced):
        self.__dict__.update(module=module, hidden=hidden, replaced=replaced)

    def __getattr__(self, name):
        if name == self.hidden:
            raise AttributeError(name)
        return self.replaced[name] if name in self.replaced else getattr(self.module, name)


def hide_transforms(monkeypatch):
    private = Without(torch._C, "_are_functorch_transforms_active")
    monkeypatch.setattr(torch_private, "torch", Without(torch, "", _C=private))


def hide_saved_tensors_hooks(monkeypatch):
    private = Without(torch._C, "", _autograd=Without(torch._C._autograd, "_top_saved_tensors_default_hooks"))
    monkeypatch.setattr(torch_private, "torch", Without(torch, "", _C=private))


def hide_dispatch_stack(monkeypatch):
    private = Without(torch._C, "_len_torch_dispatch_stack")
    monkeypatch.setattr(torch_private, "torch", Without(torch, "", _C=private))


def hide_conv_forward(monkeypatch):
    monkeypatch.delattr(nn.modules.conv._ConvNd, "_conv_forward")
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        monkeypatch.delattr(kind, "_conv_forward")
        # Their own forward calls it: what stands there in a torch without that name.
        operation = getattr(nn.functional, kind.__name__.lower())

        def forward(self, x, operation=operation):
            padding = self._reversed_padding_repeated_twice
            if self.padding_mode != "zeros":
                x, pads = nn.functional.pad(x, padding, mode=self.padding_mode), 0
            else:
                pads = self.padding
            return operation(x, self.weight, self.bias, self.stride, pads, self.dilation, self.groups)

        monkeypatch.setattr(kind, "forward", forward)


def hide_version(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "_version", property(missing), raising=False)


def hide_base(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "_base", property(missing), raising=False)


def hide_storage_use_count(monkeypatch):
    private = Without(torch._C, "_storage_Use_Count")
    monkeypatch.setattr(torch_private, "torch", Without(torch, "", _C=private))


def missing(self):
    raise AttributeError("not in this torch")


def hide_wrapper_subclass(monkeypatch):
    tensor = Without(torch.Tensor, "_make_wrapper_subclass")
    monkeypatch.setattr(torch_private, "torch", Without(torch, "", Tensor=tensor))
    monkeypatch.setattr(torch_private, "Tensor", tensor)


# By the function that uses the name.
HIDERS = {
    "checkpoint_part": hide_dispatch_stack,
    "only_here": hide_storage_use_count,
    "transforms_active": hide_transforms,
    "saved_tensors_hooks": hide_saved_tensors_hooks,
    "conv": hide_conv_forward,
    "versions": hide_version,
    "is_view": hide_base,
    "wrapper_tensor": hide_wrapper_subclass,
}
# The list of hooks that are always called is only tidied up, and torch's own __call__ reads `_compiled_call_impl`, so that it
# cannot be hidden; as for the others, see their docstrings.
WITHOUT_FALLBACK = {"unhook", "is_compiled", "without_subclass", "without_memory"}
OF_SEVERAL_PROCESSES = {"process_store"}  # hidden in tests/field/test_sharded.py


def everything() -> list[torch.Tensor]:
    """Outputs, gradients and merged weights of some methods on some layers, and of several layers of one shape in a model."""
    torch.manual_seed(0)
    results = []
    for layer in ("Linear", "Conv1d", "Conv2d", "Conv2d, reflect", "Conv3d"):
        for method in ("DeLoRA subtract", "DoRA", "ETHER+"):
            model = shake(adapted(LAYERS[layer], METHODS[method]))
            x = LAYERS[layer].x()
            model(x).square().sum().backward()
            results += [p.grad for p in model.parameters() if p.grad is not None]
            results.append(delora.merge(model)(x))
    net = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "classifier.0"]))
    y = net(ids())
    y.sum().backward()
    results += [y, *(p.grad for p in net.parameters() if p.grad is not None)]
    delora.eject(net)
    parts = shake(delora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), DeLoRA(r=2), ["0", "1"]))
    parts.register_forward_pre_hook(lambda part, args: (checkpoint(part[0], *args, use_reentrant=False),))
    parts(torch.ones(2, 4, requires_grad=True)).sum().backward()
    results += [p.grad for p in parts.parameters() if p.grad is not None]
    return [*results, net(ids())]


@pytest.mark.parametrize("hide", HIDERS.values(), ids=HIDERS)
def test_without_it_all_comes_out_the_same(hide, monkeypatch):
    expected = everything()
    hide(monkeypatch)
    for value, wanted in zip(everything(), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_every_private_name_is_hidden_by_a_test_and_stands_in_one_file():
    from tests.test_architecture import SOURCE

    private = (
        r"torch\._C|_conv_forward|\._version\b|\._base\b|_forward_hooks_always_called"
        r"|_make_wrapper_subclass|_compiled_call_impl|_get_default_store|torch\._subclasses"
    )
    users = {path.name for path in SOURCE.rglob("*.py") if re.search(private, path.read_text("utf-8"))}
    assert users == {"torch_private.py"}
    assert {*HIDERS, *WITHOUT_FALLBACK, *OF_SEVERAL_PROCESSES} == {*torch_private.__all__}
