"""llama.cpp as an oracle: small models written as GGUF in float32, and the log-probabilities of a server in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

CONTEXT = 64


def permuted(W: Tensor, heads: int) -> Tensor:
    """Rows in the order in which llama.cpp's "llama" rotates them: `LlamaModel.permute` in its conversion/llama.py."""
    return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def convert(model: nn.Module, path: Path, arch: str) -> Path:
    """A causal language model of transformers as GGUF, all numbers float32, with a vocabulary of bytes without meaning."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, arch)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    eps = getattr(config, "rms_norm_eps", None)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(eps) if eps is not None else writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch.startswith("gemma") and arch != "gemma":
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "phi3":
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    tokens = [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        t = tensor.float()
        if arch in ("llama", "mistral3") and name.endswith(("q_proj.weight", "q_proj.bias")):
            t = permuted(t, config.num_attention_heads)
        if arch in ("llama", "mistral3") and name.endswith(("k_proj.weight", "k_proj.bias")):
            t = permuted(t, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            t = t + 1
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        writer.add_tensor(new, t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Server:
    """llama.cpp's server in this process, on one thread, with adapters whose scale each request says."""

    def __init__(self, model: Path, *adapters: Path) -> None:
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path = str(model)
        p.n_ctx, p.n_parallel, p.n_batch, p.n_ubatch = CONTEXT, 1, CONTEXT, CONTEXT
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.warmup = False
        p.fit_params = False
        p.n_threads_http = 1
        p.verbosity = 0
        p.cache_prompt = False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # else keys and values are rounded to float16
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self.server = xllamacpp.Server(p)

    def logprobs(
        self, ids: list[int] | str, scales: list[float], top: int, vocabulary: int = 0, n: int = 4
    ) -> tuple[list[int], Tensor]:
        """Up to n greedy tokens, and the log-probabilities [n, vocabulary] from which they were taken, NaN but for the top.

        ``scales`` has one for each adapter.
        """
        said = self.server.handle_completions(
            {
                "prompt": ids,
                "n_predict": n,
                "n_probs": top,
                "temperature": 0,
                "cache_prompt": False,
                "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)],
            }
        )
        steps = said["choices"][0]["logprobs"]["content"]
        rows = torch.full((len(steps), vocabulary or top), float("nan"))
        for row, step in zip(rows, steps, strict=True):
            for one in step["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        return [step["id"] for step in steps], rows
