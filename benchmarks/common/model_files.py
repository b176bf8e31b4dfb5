"""Models without use, in the shapes and types of real ones, written by libraries other than our exporter, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from autodistill.advisor.describe import deployment_named, spec_of
from autodistill.models.loading import save_model
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.grids import Grid, Storage
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.runtimes.timing import Server
from autodistill.strategy.deployment import Deployment

_GRAPHS = {
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "mistral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
THREADS = 1  # threads of a timed server
_SECONDS = 0.3  # seconds of CPU over which a step is timed; the system counts CPU time in hundredths
STRIDE = 7919  # a prime, so that a prompt's tokens are spread over the vocabulary
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
LATENT = {
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
"""DeepSeek's attention, small."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one setting.

    `table` is the storage type of tables in GGUF, if it differs from what the form implies.
    """

    family: str
    layers: int = 8
    width: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    ffn: int = 1536
    vocabulary: int = 32000
    tied: bool = True
    form: str = "gguf-q8_0"
    table: str = ""
    context: int = 2048
    batch: int = 1
    kv_type: str = "f16"
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Return the model's config, as transformers takes it."""
        config: dict[str, Any] = {
            "model_type": self.family,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 16384,
            "tie_word_embeddings": self.tied,
        }
        return config | self.more


def gguf_name(spec: ModelSpec, family: str, name: str) -> str:
    """Return a tensor's name in GGUF for a family."""
    parts = name.split(".")
    if "layers" in parts:
        block, part, suffix = parts[parts.index("layers") + 1], parts[-2], parts[-1]
        if "experts" in parts:
            return f"blk.{block}.{_EXPERTS[name.removesuffix('.weight').rpartition('.')[2]]}.weight"
        if part == "router":
            return f"blk.{block}.ffn_gate_inp.{suffix}"
        if suffix == "e_score_correction_bias":
            return f"blk.{block}.exp_probs_b.bias"
        if family == "gemma3_text" and part in _GEMMA:
            return f"blk.{block}.{_GEMMA[part]}.{suffix}"
    if name == "lm_head.weight":
        return "output.weight"
    graph = _GRAPHS.get(family, family)
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == graph)
    found = gguf.get_tensor_name_map(kind, spec.layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def write_gguf(case: Case, spec: ModelSpec, deployment: Deployment, path: Path) -> None:
    """Write the model as a GGUF file, with the types of a deployment."""
    graph = _GRAPHS.get(case.family, case.family)
    writer = gguf.GGUFWriter(path, graph)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    # For models with experts next to layers with one FFN, the spec has the experts' width.
    writer.add_feed_forward_length(case.ffn if spec.latent else spec.ffn_width)
    writer.add_head_count(spec.heads)
    if not spec.latent:
        writer.add_head_count_kv(spec.kv_heads)
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
        writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_parallel_residual(True)
    writer.add_vocab_size(spec.vocabulary)
    if spec.window:
        writer.add_sliding_window(spec.window)
    if spec.experts:
        writer.add_expert_count(spec.experts)
        writer.add_expert_used_count(spec.active_experts)
        writer.add_expert_feed_forward_length(spec.ffn_width)
    if spec.latent:
        _add_latent(writer, case.config())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{index}" for index in range(spec.vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * spec.vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(1)
    for tensor in spec.tensors:
        storage = "f32" if tensor.role in (Role.NORM, Role.NORM_ABOVE_ONE) else deployment.storage(tensor)
        if "kv_b_proj" in tensor.name:
            for name, dims in _latent_halves(case.config(), tensor):
                _add_zeros(writer, name, dims, storage)
            continue
        dims = tensor.shape
        if ".experts." in tensor.name:
            dims = (spec.experts, dims[0] // spec.experts, dims[1])
        names = [tensor.name]
        if tensor.name.endswith(".gate_up_proj"):
            # A family that is trained has the gates and ups of all experts in one tensor.
            names = [tensor.name.replace("gate_up", half) for half in ("gate", "up")]
            dims = (dims[0], dims[1] // 2, dims[2])
        for name in names:
            _add_zeros(writer, gguf_name(spec, case.family, name), dims, storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_zeros(writer: gguf.GGUFWriter, name: str, dims: tuple[int, ...], storage: Storage) -> None:
    if not isinstance(storage, Grid):
        writer.add_tensor(name, np.zeros(dims, np.float16 if storage == "f16" else np.float32))
        return
    kind = gguf.GGMLQuantizationType[storage.name.removeprefix("gguf-").upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor(name, np.zeros((*dims[:-1], dims[-1] // block * size), np.uint8), raw_dtype=kind)


def _add_latent(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Describe DeepSeek's attention to llama.cpp. One vector for all heads is cached; its values are a part of it."""
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(10000.0)
    routed = config.get("n_routed_experts", 0)
    dense = config["first_k_dense_replace"] if routed else config["num_hidden_layers"]
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(False)
    writer.add_expert_shared_count(config.get("n_shared_experts", 0))
    if not routed:
        writer.add_expert_count(0)
        writer.add_expert_used_count(0)
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        return
    sigmoid = config["model_type"] == "deepseek_v3"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)


def _latent_halves(config: dict[str, Any], tensor: TensorSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors that make keys and values from the cached vector. llama.cpp holds them apart and by heads."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    block = tensor.name.split(".")[2]
    yield f"blk.{block}.attn_k_b.weight", (heads, rank, config["qk_nope_head_dim"])
    yield f"blk.{block}.attn_v_b.weight", (heads, config["v_head_dim"], rank)


def write_folder(case: Case, folder: Path) -> None:
    """Write the model as a transformers folder with random weights."""
    config = transformers.AutoConfig.for_model(**case.config())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()  # after `to_empty`, the tied tensors are separate, and would be stored twice
    # Not zeros: ONNX Runtime stores equal tensors once.
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    save_model(model, folder)


def _cpu(server: Server) -> float:
    return server.used_seconds() - time.process_time()


def timed(server: Server, vocabulary: int, prompt: int) -> tuple[float, float]:
    """Return the milliseconds of CPU time of a decoding step, and of reading the prompt."""
    ids = [2 + index % (vocabulary - 2) for index in range(prompt)]
    server.begin([ids[:32]])
    server.step()
    times, began = max(1, 512 // prompt), _cpu(server)
    for _ in range(times):
        server.begin([ids])
    read = _cpu(server)
    steps = 0
    while steps < 16 or _cpu(server) - read < _SECONDS:
        server.step()
        steps += 1
    return 1e3 * (_cpu(server) - read) / steps, 1e3 * (read - began) / times


def milliseconds(case: Case, folder: Path, prompt: int) -> tuple[float, float]:
    """Return llama.cpp's milliseconds of CPU time for a decoding step, and for reading the prompt."""
    path = folder / "model.gguf"
    write_gguf(case, spec_of(case.config()), deployment_named(case.form), path)
    with LlamaServer(path, 2048, THREADS) as server:
        return timed(server, case.vocabulary, prompt)
