"""What every process of the census needs, imported once in the server that they are forked from."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers  # noqa: F401
import peft  # noqa: F401
import transformers.models.bert.modeling_bert
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import tests.zoo.build
import tests.zoo.laws  # noqa: F401
from tests.zoo.timms import timm

timm()
