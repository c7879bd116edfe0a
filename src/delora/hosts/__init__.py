"""Hosts: each presents the weight of one kind of layer as a matrix ``[out, in]`` and runs the layer with another one.

``host(layer)`` finds the host by the layer's type. Your own layer type needs one line:
``delora.host.register(MyConv, delora.hosts.Conv2d)``.

====================  ==================================================================================
``base``              `Host`, `MatrixHost`, and how a layer's host is found
``registry``          what is known by a module's type, its bases included
``linear``            ``nn.Linear``, transformers' ``Conv1D``
``convolution``       ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``
``embedding``         ``nn.Embedding``
``parallel``          linear layers and embeddings of which each process computes a part
``packed``            matrices that a module keeps as parameters of its own: ``nn.MultiheadAttention``; slices of layers
``fusing``            which rows of a fused ``qkv`` or ``gate_up_proj`` are whose
``experts``           those of transformers' mixtures of experts
``quantised``         linear layers of bitsandbytes, torchao, quanto, HQQ, GPTQ and AWQ
====================  ==================================================================================
"""

from __future__ import annotations

from torch import nn

from delora.hosts.base import BY_NAME, Host, MatrixHost, Norm, any_host, codes_of, host, host_class, host_type
from delora.hosts.convolution import Conv1d, Conv2d, Conv3d, Convolution
from delora.hosts.embedding import Embedding
from delora.hosts.experts import of_transformers
from delora.hosts.fusing import Fused, FusedMatrices, fused
from delora.hosts.linear import Conv1D, Linear
from delora.hosts.packed import LayerSlice, Layout, Parameters, Slice, Slot, parameters, slices, slots
from delora.hosts.parallel import ParallelEmbedding, ParallelLinear
from delora.hosts.quantised import Quantised, quantised_host, quantised_layers

__all__ = [
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Convolution",
    "Embedding",
    "Fused",
    "FusedMatrices",
    "Host",
    "LayerSlice",
    "Layout",
    "Linear",
    "MatrixHost",
    "Norm",
    "ParallelEmbedding",
    "ParallelLinear",
    "Parameters",
    "Quantised",
    "Slice",
    "Slot",
    "any_host",
    "codes_of",
    "fused",
    "host",
    "host_class",
    "host_type",
    "of_transformers",
    "parameters",
    "quantised_host",
    "quantised_layers",
    "slices",
    "slots",
]

host.register(nn.Linear, Linear)
host.register(nn.Embedding, Embedding)
host.register(nn.Conv1d, Conv1d)
host.register(nn.Conv2d, Conv2d)
host.register(nn.Conv3d, Conv3d)
BY_NAME["transformers.pytorch_utils.Conv1D"] = Conv1D
