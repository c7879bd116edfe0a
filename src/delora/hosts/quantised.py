"""Linear layers whose weight is kept in a few bits: bitsandbytes, torchao, quanto, HQQ, GPTQ and AWQ.

Such a layer runs its own quantised forward, and the change is computed beside it. W is read, dequantised, in blocks of rows;
nothing is ever written into its codes. No library is imported before a layer of it is met.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.frozen import mark
from delora.hosts.base import BY_NAME, BY_WEIGHT, host_class
from delora.hosts.linear import Linear
from delora.updates import Update

__all__ = ["Bits4", "Fp8", "Gptq", "Hqq", "Int8", "Quantised", "Quanto", "TorchAo", "quantised_host", "quantised_layers"]


class Quantised(Linear):
    """A linear layer with a weight of codes. A host of one's own needs two functions:

    * ``rows(start, stop)``: these rows of W [out, in], dequantised;
    * ``requantised(W, b)``: a new layer of the same scheme with W and b, for ``merge(model, requantise=True)``.

    What the layer does not call ``out_features`` and ``in_features`` is told by overriding ``shape``; the dtype of the rows, if
    it is not that of the layer's first floating-point tensor, by ``dtype``.

    >>> class Tenths(nn.Module):  # whole multiples of 0.1
    ...     def __init__(self, codes):
    ...         super().__init__()
    ...         self.out_features, self.in_features = codes.shape
    ...         self.codes = nn.Parameter(codes, requires_grad=False)
    ...     def forward(self, x):
    ...         return F.linear(x, self.codes * 0.1)
    >>> class TenthsHost(Quantised):
    ...     def rows(self, start, stop):
    ...         return self.layer.codes[start:stop] * 0.1
    ...     def requantised(self, W, b):
    ...         return Tenths((W * 10).round().to(torch.int8))
    >>> from delora.hosts import host
    >>> host.register(Tenths, TenthsHost)
    >>> look = host(Tenths(torch.ones(2, 3, dtype=torch.int8)))
    >>> look.shape, look.weight()[0].tolist()
    ((2, 3), [0.10000000149011612, 0.10000000149011612, 0.10000000149011612])
    """

    @property
    def kind(self) -> str:
        """What the layer is, in words."""
        return type(self.layer).__name__

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        floats = (t.dtype for t in self.stored() if t.is_floating_point() and t.element_size() > 1)
        return next(floats, torch.float32)

    @property
    def device(self) -> torch.device:
        return next(iter(self.stored())).device

    def rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.rows(start, stop): these rows of W, dequantised")

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        """A new layer of the same scheme, and with the same hooks, with the matrix W [out, in] and the bias b.

        Raises:
            ValueError: the layer's weight cannot be quantised again.
        """
        raise ValueError(f"a {self.kind} layer cannot be quantised anew: merge it without requantise=True, into a dense layer")

    def settle(self) -> None:
        """Keep the layer's library from rewriting the codes in place."""

    def stored(self) -> Iterator[Tensor]:
        """All tensors that the layer keeps."""
        yield from _plain(t for t in (*self.layer._parameters.values(), *self.layer._buffers.values()) if t is not None)

    def weights(self) -> int:
        """The number of entries of W and of the bias."""
        b = getattr(self.layer, "bias", None)
        return self.shape[0] * self.shape[1] + (0 if b is None else b.numel())

    def counted(self) -> int:
        """How many of these the layer's parameters have entries for."""
        return sum(p.numel() for p in self.layer._parameters.values() if p is not None)

    def bytes(self) -> int:
        """The memory of all that the layer keeps: codes, scales and bias."""
        return sum(t.numel() * t.element_size() for t in self.stored())

    def mark(self) -> object:
        return mark(self.stored())

    def check(self) -> None:
        super().check()
        if any(t.is_meta for t in self.stored()):
            raise ValueError(f"a {self.kind} layer on the meta device has no weight yet: load the model first")

    def matrix(self) -> Tensor:
        with torch.no_grad():
            return self.rows(0, self.shape[0])

    def run(self, x: Tensor, W: Tensor) -> Tensor:
        b = self.bias()
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    @torch.no_grad()
    def changed(self, update: Update, dtype: torch.dtype | None = None) -> dict[str, nn.Parameter]:
        """The weight and the bias with the change in them, dense, in ``dtype``; the bias alone if only that changes.

        The layer itself is never given a weight: `replaced` makes a new layer of these.
        """
        W, b = self.weight(), self.bias()
        new_W, new_b = update.merge(W), update.bias(b)
        if new_W is W and new_b is b:
            return {}
        dtype = dtype or self.dtype
        new = {} if new_W is W and "bias" in self.layer._parameters else {"weight": _frozen(new_W.to(dtype))}
        if new_b is not None and new_b is not b:
            new["bias"] = _frozen(new_b.to(dtype))
        return new

    def replaced(self, new: dict[str, Any], requantise: bool) -> nn.Module:
        """A new layer, with what `changed` gave and the old layer's hooks: quantised anew, or dense."""
        W: Any = new["weight"]
        b: Any = new.get("bias")
        if b is None and (old := self.bias()) is not None:
            b = _frozen(old.to(W.dtype, copy=True))
        if requantise:
            with torch.no_grad():
                return self.requantised(W.detach(), None if b is None else b.detach())
        linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, device="meta")
        linear.weight, linear.bias = W, b
        linear.train(self.layer.training)
        for name, hooks in _registries(self.layer, "_forward", "_backward").items():
            linear.__dict__[name].update({k: f for k, f in hooks.items() if getattr(f, "__self__", None) is not self.layer})
        return _with_accelerate(self.layer, linear)

    def twin(self) -> Any:
        """A copy of the layer that shares its tensors, so that it can be given others: its class, its scheme, its hooks."""
        new = copy.copy(self.layer)
        for name, registry in _registries(self.layer, "_").items():
            new.__dict__[name] = registry.copy()
        new.__dict__.pop("_hf_hook", None)
        for name in ("forward", "_old_forward"):  # accelerate's, bound to the old layer
            new.__dict__.pop(name, None)
        return _with_accelerate(self.layer, new)


class _AtOnce(Quantised):
    """A layer whose library dequantises the whole matrix at once: within `held` that is done for the first block alone."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._depth, self._kept = 0, None

    _kept: Tensor | None

    def all(self) -> Tensor:
        """The whole matrix [out, in], dequantised."""
        raise NotImplementedError

    @contextmanager
    def held(self) -> Iterator[None]:
        self._depth += 1
        try:
            with super().held():
                yield
        finally:
            self._depth -= 1
            self._kept = self._kept if self._depth else None

    def rows(self, start: int, stop: int) -> Tensor:
        W = self.all().detach().to(self.dtype) if self._kept is None else self._kept
        if self._depth:
            self._kept = W
        return W[start:stop]


def quantised_host(layer: nn.Module) -> Quantised | None:
    """The host of a layer if it is a quantised one, else None; the layer is not checked.

    >>> quantised_host(nn.Linear(2, 2)) is None
    True
    """
    kind = host_class(layer)
    return kind(layer) if kind is not None and issubclass(kind, Quantised) else None


def quantised_layers(model: nn.Module) -> list[Quantised]:
    """The hosts of all quantised layers in a model, adapted or not.

    >>> quantised_layers(nn.Sequential(nn.Linear(2, 3)))
    []
    """
    return [look for module in model.modules() if (look := quantised_host(module)) is not None]


def _registries(layer: nn.Module, *prefixes: str) -> dict[str, Any]:
    """What a module keeps in dictionaries of its own, such as its parameters and its hooks."""
    return {name: value for name, value in layer.__dict__.items() if name.startswith(prefixes) and isinstance(value, dict)}


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors, or what a tensor of a subclass is made of."""
    for t in tensors:
        if hasattr(t, "__tensor_flatten__"):
            yield from _plain(getattr(t, name) for name in t.__tensor_flatten__()[0])
        else:
            yield t


def _with_accelerate(old: nn.Module, new: nn.Module) -> nn.Module:
    """The new layer with the hook by which accelerate places the old one."""
    if "_hf_hook" in old.__dict__:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, copy.copy(old._hf_hook))
    return new


# ---------------------------------------------------------------- bitsandbytes


class Bits4(Quantised):
    """bitsandbytes' ``Linear4bit`` (nf4, fp4; QLoRA, arXiv:2305.14314): blocks of codes with one scale for each block."""

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.layer.weight.quant_type}"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state().dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device
        return device

    def check(self) -> None:
        if self._held_state() is None:
            raise ValueError(
                "cannot adapt a Linear4bit that is not quantised yet: moving the model to its device does that, .to(device)"
            )
        super().check()

    def _held_state(self) -> Any:
        state = getattr(self.layer.weight, "quant_state", None)
        return getattr(self.layer, "quant_state", None) if state is None else state  # a cast may lose the parameter's

    def _state(self) -> Any:
        state = self._held_state()
        if not getattr(state, "packing_format_for_cpu", False):
            return state
        state = copy.copy(state)
        # Packed for inference, the scales were transposed; they are bfloat16 since, whatever they were before.
        state.absmax, state.dtype, state.nested = state.absmax.T.reshape(-1).float(), state.original_dtype, False
        state.packing_format_for_cpu = False
        return state

    def _codes(self) -> Tensor:
        """The codes, two in a byte, row after row."""
        codes: Tensor = self.layer.weight.data
        if getattr(self._held_state(), "packing_format_for_cpu", False):
            codes = _unpacked(codes, self.shape)
        return codes.reshape(-1).view(torch.uint8)

    def rows(self, start: int, stop: int) -> Tensor:
        from bitsandbytes import functional

        state, width = copy.copy(self._state()), self.shape[1]
        if state.nested:  # the scales are quantised, too
            state.absmax = functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
            state.nested = False
        codes = self._codes()
        if width % state.blocksize:  # a block may end inside a row, where bitsandbytes' kernels differ: only the whole is sure
            whole: Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
            return whole.reshape(self.shape)[start:stop]
        per_row = width // state.blocksize
        state.absmax, state.shape = state.absmax[start * per_row : stop * per_row], torch.Size((stop - start, width))
        rows: Tensor = functional.dequantize_4bit(codes[start * width // 2 : stop * width // 2].view(-1, 1), state)
        return rows

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        old, state, new = self.layer.weight, self._state(), self.twin()
        new._parameters["weight"] = Params4bit(
            W.to(state.dtype).contiguous(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=new,
        ).to(self.device)
        new.quant_state = new.weight.quant_state
        return _with_bias(new, b, self.layer.bias)

    def settle(self) -> None:
        """On a CPU with AVX512-BF16, one evaluation repacks the codes for inference: no gradient passes the layer afterwards,
        and its scales are rounded. It shall not happen, and is undone where it did."""
        layer = self.layer
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
        state = self._held_state()
        if not getattr(state, "packing_format_for_cpu", False):
            return
        old, codes, plain = layer.weight, self._codes(), self._state()
        storage = getattr(state, "original_storage_type", None) or torch.uint8
        old.data = codes.view(storage).reshape(-1, 1)
        old.quant_state = layer.quant_state = plain
        warnings.warn(
            "bitsandbytes repacked the 4-bit weights for inference when the model was evaluated, which rounds their scales to "
            "bfloat16 and blocks training; they are unpacked again, with the rounded scales. To have the exact ones: inject, "
            "or set support_avx512bf16_for_cpu = False on the layers, before the first evaluation",
            stacklevel=2,
        )

    def stored(self) -> Iterator[Tensor]:
        yield from super().stored()
        for state in (s := self._held_state(), getattr(s, "state2", None)):
            if state is not None:
                yield from (t for key in ("absmax", "code", "offset") if isinstance(t := getattr(state, key, None), Tensor))


def _unpacked(packed: Tensor, shape: tuple[int, int], lanes: int = 32) -> Tensor:
    """Undo bitsandbytes' packing for AVX512-BF16, of 32 rows beside each other: the codes, two in a byte, row after row."""
    pairs = packed.reshape(-1, lanes)
    both = torch.cat([pairs & 0xF, pairs >> 4], dim=1)  # [blocks * in / 2, 2 lanes]
    both = both.reshape(shape[0] // lanes, shape[1] // 2, lanes, 2).transpose(1, 2).reshape(-1, 2)
    return (both[:, 0] << 4) | both[:, 1]


def _with_bias(new: Any, b: Tensor | None, like: Tensor | None) -> nn.Module:
    dtype = b.dtype if b is not None and like is None else None if like is None else like.dtype
    new._parameters["bias"] = None if b is None else _frozen(b.to(dtype))
    module: nn.Module = new
    return module


class Int8(Quantised):
    """bitsandbytes' ``Linear8bitLt`` (LLM.int8(), arXiv:2208.07339): W = codes * SCB / 127, with one scale for each row.

    The scales are the weight's before the first forward and the layer's afterwards.
    """

    kind = "bitsandbytes int8"
    dtype = torch.float32  # nothing says in which one it was before

    def check(self) -> None:
        if not self.layer.weight.dtype.is_floating_point and self._scales() is None:
            raise ValueError("cannot adapt a Linear8bitLt without scales (SCB): load the model with its quantised weights")
        super().check()

    def _scales(self) -> Tensor | None:
        scales: Tensor | None = getattr(self.layer.weight, "SCB", None)
        return self.layer.state.SCB if scales is None else scales

    def rows(self, start: int, stop: int) -> Tensor:
        codes, scales = self.layer.weight.data[start:stop], self._scales()
        if codes.is_floating_point():  # it quantises at every forward
            return codes.float()
        assert scales is not None
        return codes.float() * (scales[start:stop, None].float() / 127)

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        from bitsandbytes.nn import Int8Params

        new, old = self.twin(), self.layer.weight
        new.state = copy.copy(self.layer.state)
        new.state.reset_grads()
        # It is quantised on its way from the CPU.
        weight = Int8Params(W.half().cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        new._parameters["weight"] = weight.to(self.device)
        return _with_bias(new, b, self.layer.bias)

    def stored(self) -> Iterator[Tensor]:
        yield from super().stored()
        if (scales := self._scales()) is not None:
            yield scales


# ---------------------------------------------------------------- weights that are tensors of a quantised kind


class TorchAo(Quantised):
    """An ``nn.Linear`` whose weight is a quantised tensor of torchao: the layer is asked for the kind of its weight."""

    @property
    def kind(self) -> str:
        W = self.layer.weight
        codes = getattr(W, "target_dtype", None) or getattr(getattr(W, "qdata", None), "dtype", type(W).__name__)
        return f"torchao {str(codes).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int]:
        out, inp = self.layer.weight.shape
        return out, inp

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device
        return device

    def check(self) -> None:
        super().check()
        with torch.enable_grad():
            x = torch.zeros(1, self.shape[1], dtype=self.dtype, device=self.device, requires_grad=True)
            y = F.linear(x, self.layer.weight)
        if not y.requires_grad:
            raise ValueError(
                f"cannot adapt a Linear with a {self.kind} weight that quantises its input, too: no gradient passes through "
                "it, so that layers before it could not learn; quantise the weights only"
            )

    def rows(self, start: int, stop: int) -> Tensor:
        W = self.layer.weight.detach()
        try:
            rows: Tensor = W[start:stop].dequantize()
        except Exception:  # not every kind can be cut
            rows = W.dequantize()[start:stop]
        return rows

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        from torchao import quantization as q

        old = self.layer.weight
        W = W.to(self.dtype)
        block = tuple(getattr(old, "block_size", ()))
        whole = block == tuple(W.shape)
        over = q.PerTensor() if whole else q.PerRow()
        tensor: Any
        if isinstance(old, q.Int8Tensor) and (whole or block == (1, W.shape[1])):
            tensor = q.Int8Tensor.from_hp(W, over, reduce_range=old.reduce_range)
        elif isinstance(old, q.Float8Tensor) and (whole or block == (1, W.shape[1])):
            tensor = q.Float8Tensor.from_hp(
                W, old.qdata.dtype, over, mm_config=old.mm_config, kernel_preference=old.kernel_preference
            )
        elif isinstance(old, q.IntxUnpackedToInt8Tensor):
            mapping = q.MappingType.ASYMMETRIC if old.zero_point.any() else q.MappingType.SYMMETRIC
            tensor = q.IntxUnpackedToInt8Tensor.from_hp(W, block, old.target_dtype, mapping_type=mapping)
        else:
            return super().requantised(W, b)
        new = self.twin()
        new._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
        return _with_bias(new, b, self.layer.bias)


class Quanto(_AtOnce):
    """optimum-quanto's ``QLinear``, frozen: its weight is a quantised tensor."""

    @property
    def kind(self) -> str:
        return f"quanto {self.layer.weight_qtype.name}"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype

    def check(self) -> None:
        if not self.layer.frozen:
            raise ValueError("cannot adapt a QLinear before its weight is quantised: call optimum.quanto.freeze(model) first")
        if self.layer.activation_qtype is not None:
            raise ValueError("cannot adapt a QLinear that quantises its activations, too: quantise the weights only")
        super().check()

    def all(self) -> Tensor:
        W: Tensor = self.layer.weight.detach().dequantize()
        return W

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        new = self.twin()
        new._parameters["weight"] = _frozen(W.to(self.dtype))
        weight = new.qweight
        new._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        return _with_bias(new, b, self.layer.bias)


# ---------------------------------------------------------------- modules that dequantise themselves


class Hqq(_AtOnce):
    """``HQQLinear`` (half-quadratic quantisation, 1 to 8 bits): it dequantises itself."""

    @property
    def kind(self) -> str:
        return f"hqq {self.layer.meta['nbits']} bit"

    @property
    def shape(self) -> tuple[int, int]:
        out, inp = self.layer.meta["shape"]
        return out, inp

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.compute_dtype
        return dtype

    def check(self) -> None:
        if not self.layer.ready:
            raise ValueError("cannot adapt an HQQLinear that holds no weight yet")
        super().check()

    def mark(self) -> object:
        # HQQ makes its zero points in inference mode, where a tensor has no version; the codes and scales change with them.
        return mark([self.layer.W_q, *(t for t in self.stored() if not t.is_inference())])

    def all(self) -> Tensor:
        W: Tensor = self.layer.dequantize()
        return W

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        new = self.twin()
        del new._parameters["W_q"]  # HQQ sets a tensor there before it makes it a parameter
        new.quantize(W, **copy.deepcopy(self.layer.quant_config))
        new.bias = None if b is None else b.to(self.dtype)
        module: nn.Module = new
        return module

    def stored(self) -> Iterator[Tensor]:
        yield from super().stored()
        yield from (t for t in (*self.layer.meta.values(), self.layer.bias) if isinstance(t, Tensor))


class Fp8(Quantised):
    """transformers' ``FP8Linear``: W = codes times one scale for each block of W, or for all of it. Its kernel needs a GPU."""

    kind = "transformers float8"

    def rows(self, start: int, stop: int) -> Tensor:
        codes, scale = self.layer.weight.detach(), self.layer.weight_scale_inv.detach().float()
        if codes.element_size() > 1:  # dequantised when it was loaded
            return codes[start:stop].float()
        return codes[start:stop].float() * self._each(scale)[start:stop]

    def _each(self, scale: Tensor) -> Tensor:
        """The scales of the blocks, for every entry of W."""
        if self.layer.block_size is None:
            return scale.expand(self.shape)
        high, wide = self.layer.block_size
        return scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: self.shape[0], : self.shape[1]]

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        old, (out, inp) = self.layer.weight_scale_inv, self.shape
        if old.dtype != torch.float32:
            return super().requantised(W, b)
        high, wide = self.layer.block_size or (out, inp)
        padded = F.pad(W.abs(), (0, -inp % wide, 0, -out % high))
        largest = padded.unflatten(0, (-1, high)).unflatten(2, (-1, wide)).amax((1, 3))  # [blocks down, blocks across]
        limit = torch.finfo(self.layer.weight.dtype).max
        scale = torch.where(largest > 0, largest / limit, 1.0).reshape(old.shape)
        new = self.twin()
        new._parameters["weight_scale_inv"] = _frozen(scale)
        new._parameters["weight"] = _frozen((W / self._each(scale)).clamp(-limit, limit).to(self.layer.weight.dtype))
        return _with_bias(new, b, self.layer.bias)


class Gptq(_AtOnce):
    """A layer of GPTQModel (GPTQ, AWQ) that has a ``dequantize_weight()``: W^T [in, out]. It cannot be quantised anew, which
    needs the data it was calibrated with."""

    dequantises: ClassVar[str] = "dequantize_weight"

    @property
    def kind(self) -> str:
        return f"{'awq' if 'awq' in type(self.layer).__name__.lower() else 'gptq'} {self.layer.bits} bit"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.scales.dtype
        return dtype

    def check(self) -> None:
        if not callable(getattr(self.layer, self.dequantises, None)):
            raise TypeError(
                f"cannot adapt a {type(self.layer).__name__}: its kernel has no {self.dequantises}(); load the model with the "
                "torch backend"
            )
        super().check()

    def all(self) -> Tensor:
        W: Tensor = getattr(self.layer, self.dequantises)()
        return W.T


BY_NAME["bitsandbytes.nn.modules.Linear4bit"] = Bits4
BY_NAME["bitsandbytes.nn.modules.Linear8bitLt"] = Int8
BY_NAME["optimum.quanto.nn.qlinear.QLinear"] = Quanto
BY_NAME["hqq.core.quantize.HQQLinear"] = Hqq
BY_NAME["transformers.integrations.finegrained_fp8.FP8Linear"] = Fp8
BY_NAME["gptqmodel.nn_modules.qlinear.BaseQuantLinear"] = Gptq
BY_WEIGHT["torchao.utils.TorchAOBaseTensor"] = TorchAo
