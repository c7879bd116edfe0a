"""delora: Decoupled Low-rank Adaptation. `W' = W + (lam / r) B Xi A diag(|W|)`, directions apart from their strength.

From the ground up; imports only point to what stands above them in this list:

======================================================  =======================================================================
``frozen`` ``updates`` ``lowrank`` ``ambient``          what may be asked of a weight; how one layer changes, in two equal
                                                        computations, whatever torch's modes
``zero`` ``sharded`` ``meeting``                        tensors in parts over several processes, and what these do together
``methods`` ``hosts``                                   what is changed, by which rule; which layers can be
``layer`` ``parts`` ``factored``                        `Adapted`: a frozen layer with named adapters;
``together`` ``reading``                                all updates of a shape at once; who reads a layer's weight
``models`` ``targets`` ``ties`` ``injection``           a model's layers by name: put adapters in, switch them, take them out
``optimizing`` ``quantisers`` ``pretrained``            what trains, at which rate; quantised models; save_pretrained
``merging`` ``routing`` ``references``                  into the weights; an adapter for each row; what the model was
``diagnostics`` ``choosing``                            how far from the base; the best strength after training
``formats`` ``export``                                  to and from files
``integrations``                                        in trainers of transformers, TRL and Lightning; the Hub; a server
``data`` ``training`` ``evaluation`` ``outside``        an engine for experiments; methods and tasks of one's own
``tasks`` ``recipes``                                   what is particular to each kind of experiment; recipes to start from
``reports`` ``sweep`` ``finetuning`` ``talking``        what came of it; many runs; from data to a run; a chat with one
``app`` ``cli``                                         a page of a run in a browser; the command line
======================================================  =======================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from delora import diagnostics as diagnostics
from delora import export as export
from delora import hosts as hosts
from delora import integrations as integrations
from delora import methods as methods
from delora import updates as updates
from delora.choosing import choose_strength as choose_strength
from delora.diagnostics import distances as distances
from delora.errors import UserError as UserError
from delora.formats.files import AdapterError as AdapterError
from delora.formats.native import save as save
from delora.formats.peft_config import from_peft as from_peft
from delora.hosts import host as host
from delora.injection import activate as activate
from delora.injection import disabled as disabled
from delora.injection import eject as eject
from delora.injection import inject as inject
from delora.injection import strength as strength
from delora.integrations.hub import HubError as HubError
from delora.integrations.hub import card as card
from delora.integrations.hub import load as load
from delora.integrations.hub import push as push
from delora.layer import Adapted as Adapted
from delora.merging import blend as blend
from delora.merging import merge as merge
from delora.merging import merged as merged
from delora.methods import *  # noqa: F403 (METHODS, RUNGS and every method)
from delora.optimizing import param_groups as param_groups
from delora.optimizing import summary as summary
from delora.references import reference as reference
from delora.routing import routed as routed
from delora.routing import serving as serving
from delora.version import __version__ as __version__

if not TYPE_CHECKING:  # type checkers read the names from the lines above
    __all__ = [
        "Adapted",
        "AdapterError",
        "HubError",
        "UserError",
        "activate",
        "blend",
        "card",
        "choose_strength",
        "diagnostics",
        "disabled",
        "distances",
        "eject",
        "export",
        "from_peft",
        "host",
        "hosts",
        "inject",
        "integrations",
        "load",
        "merge",
        "merged",
        "methods",
        "param_groups",
        "push",
        "reference",
        "routed",
        "serving",
        "save",
        "strength",
        "summary",
        "updates",
        *methods.__all__,
    ]
