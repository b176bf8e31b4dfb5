"""Qwen3.5 and Gemma 4 as GGUF files: their weights, what llama.cpp computes with them, its memory, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from autodistill.advisor.describe import describe
from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.any_model import any_spec, held, load_any
from autodistill.distillation.teacher.resolve import Teacher, resolve_teacher
from autodistill.errors import InputError, VerificationError
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.export.base import Expected, load_exporter
from autodistill.export.verify import prove
from autodistill.export.whole.file import cannot_write, verify_whole
from autodistill.hardware.budget import Budget
from autodistill.inference.scoring import choices
from autodistill.quantization.formats import TYPES
from autodistill.quantization.rounding import deploy_tensor
from autodistill.search.solve.bench import Bench, load_bench
from autodistill.search.solve.call.export import write_solution
from autodistill.search.solve.options import Options
from autodistill.testing import tiny_tokenizer
from autodistill.utils.json_files import read_json
from tests.models.random_models import saved

_SIZES: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_GEMMA = {
    **_SIZES,
    "num_hidden_layers": 6,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 300,
    "sliding_window": 32,  # shorter than the text
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_QWEN = {
    **_SIZES,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
}
CONFIGS = {
    # The last three layers use other layers' keys and values, and their FFNs are twice as wide. Logits are capped.
    "gemma4": lambda: Gemma4TextConfig(
        **_GEMMA, num_kv_shared_layers=3, use_double_wide_mlp=True, final_logit_softcapping=4.0
    ),
    # Like its larger models: no tables by layer. In full attention, keys are also values and have fewer heads.
    "gemma4_large": lambda: Gemma4TextConfig(
        **_GEMMA | {"hidden_size_per_layer_input": 0}, attention_k_eq_v=True, num_global_key_value_heads=1
    ),
    # Two value heads for each key head, which llama.cpp orders differently.
    "qwen3_5": lambda: Qwen3_5TextConfig(**_QWEN, linear_num_value_heads=4),
    "qwen3_5_small": lambda: Qwen3_5TextConfig(**_QWEN | {"tie_word_embeddings": True}, linear_num_value_heads=2),
}
TEXT = TokenSet(
    tokens=np.random.default_rng(0).integers(3, 300, (8, 64)).astype(np.int32),
    documents=np.repeat(np.arange(8)[:, None], 64, axis=1).astype(np.int32),
)


def _sharpened(name: str, model: Any) -> None:
    for own, one in held(model).items():
        if one.dim() > 1:
            one.mul_(4)
        elif own.endswith("q_norm.weight") and "gemma" in name:
            one.fill_(0.3)  # these norms scale Gemma 4's attention instead of a constant
        elif own.endswith(("norm.weight", "layer_scalar", "dt_bias")):
            one.add_(0.2 * torch.randn_like(one))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(CONFIGS, tmp_path_factory.mktemp("models"), _sharpened)


def teacher_of(folder: Path) -> tuple[Teacher, Bench]:
    teacher = Teacher(folder=folder, fingerprint="", name="m", license=None)
    return teacher, load_bench(teacher, any_spec(read_json(folder / "config.json")), None)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_of_a_file_what_transformers_does(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher, bench = teacher_of(folders[name])
    budget = Budget(memory_bytes=10**9, context=512, batch=2)
    options = Options(spec=bench.spec, budget=budget)
    deployment = options.deployment(dict.fromkeys(options.matrices | options.tables, "f16"), ("f16", "f16"))
    artifact, _ = write_solution(bench, teacher, deployment, tmp_path)
    # Transformers' own model of the folder in float32, not the bench.
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(TEXT.tokens).long()).logits
    labels = torch.from_numpy(TEXT.tokens[:, 1:]).long()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels, reduction="none")
    expected = Expected(TEXT.tokens, logits.argmax(dim=-1).int().numpy()[:, :-1], nll.numpy(), nll.numpy())
    check = prove(load_exporter("gguf"), artifact.path, deployment, expected, 1, folders[name])
    assert check.agreement > 0.97
    assert check.excess == pytest.approx(0, abs=0.01)
    assert (choices(bench.model, TEXT)[0] == expected.top1).mean() > 0.99
    subject = Subject(spec=bench.spec, deployment=deployment, budget=budget, artifact=artifact.path, threads=1)
    (found,) = load_evaluator("memory").evaluate(subject)
    parts, estimate = found.detail, memory(bench.spec, deployment, context=512, batch=2)
    # llama.cpp's log is in hundredths of a MiB. Gemma 4's table, which exists twice, counts in addition to the weights.
    assert parts["kv_cache_bytes"] == pytest.approx(estimate.kv_cache_bytes, abs=12_000)
    twice = 2 * 300 * 128 if "gemma" in name else 0
    assert parts["weights_bytes"] == pytest.approx(estimate.weights_bytes + twice, abs=6000)
    assert estimate.total_bytes == pytest.approx(found.value, rel=0.1)
    assert 0.98 * parts["compute_bytes"] < estimate.compute_bytes < 1.4 * parts["compute_bytes"]


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5"])
def test_codes_with_scales_of_their_own_are_in_the_file_as_they_were_measured(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher, bench = teacher_of(folders[name])
    bench.weigh(TEXT)
    options = Options(spec=bench.spec, budget=Budget(memory_bytes=10**9, context=128))
    kinds = {one: "q4_0" if ".layers.1." in one else "q5_1" for one in options.matrices}
    deployment = options.deployment(kinds | dict.fromkeys(options.tables, "q8_0"), ("f16", "f16"))
    artifact, tensors = write_solution(bench, teacher, deployment, tmp_path)  # compares each tensor
    stored = {one.name: one for one in GGUFReader(artifact.path).tensors}
    assert len(stored) == tensors
    config = read_json(folders[name] / "config.json")
    # With other rounding, without these scales, they would differ.
    with pytest.raises(VerificationError, match="holds other values of blk"):
        verify_whole(
            artifact.path,
            lambda one: bench.in_file(one, _plain(bench, one, deployment.storage(_tensors(bench)[one]))),
            bench.spec,
            config,
            deployment,
        )


def _tensors(bench: Bench) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in bench.spec.tensors}


def _plain(bench: Bench, name: str, storage: Any) -> torch.Tensor:
    other = Bench(bench.model, bench.spec, {})
    return other.stored(name, storage, bench.master(name))


def test_heads_of_values_lie_in_llama_cpps_order(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher, bench = teacher_of(folders["qwen3_5"])
    options = Options(spec=bench.spec, budget=Budget(memory_bytes=10**9, context=128))
    deployment = options.deployment(dict.fromkeys(options.matrices | options.tables, "f16"), ("f16", "f16"))
    artifact, _ = write_solution(bench, teacher, deployment, tmp_path)
    stored = {one.name: np.asarray(one.data, dtype=np.float32) for one in GGUFReader(artifact.path).tensors}
    own = {name: one.detach().half().float().numpy() for name, one in bench.model.state_dict().items()}
    block = "model.layers.0.linear_attn"
    # Heads 0 and 1 belong to the first key head, 2 and 3 to the second.
    order = [0, 2, 1, 3]
    assert np.array_equal(stored["blk.0.ssm_beta.weight"], own[f"{block}.in_proj_b.weight"][order])
    columns = own[f"{block}.out_proj.weight"].reshape(128, 4, 32)[:, order].reshape(128, 128)
    assert np.array_equal(stored["blk.0.ssm_out.weight"], columns)
    exact = dict(bench.model.state_dict())[f"{block}.A_log"].detach().numpy()
    assert np.allclose(stored["blk.0.ssm_a"], [-math.exp(value) for value in exact[order]], rtol=1e-6)
    # The blocks of a type are in the order of the rows in the file.
    name = f"{block}.out_proj.weight"
    master = torch.from_numpy(bench.in_file(name, bench.master(name)))
    rounded = bench.in_file(name, bench.stored(name, TYPES["q4_0"]))
    assert np.array_equal(rounded, deploy_tensor(master, TYPES["q4_0"]).numpy())


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5"])
def test_of_a_model_with_images_the_text_model_is_read(name: str, tmp_path: Path) -> None:
    text = CONFIGS[name]().to_dict()
    sizes = {"hidden_size": 96, "intermediate_size": 192, "depth": 2, "num_heads": 2, "out_hidden_size": 128}
    torch.manual_seed(0)
    if name == "gemma4":
        model: Any = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text))
    else:
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=sizes))
    folder = tmp_path / "whole"
    model.eval().float().save_pretrained(folder)
    tiny_tokenizer(300).save_pretrained(folder)
    assert resolve_teacher(str(folder), trained=False).config["model_type"] == f"{name}_text"
    shapes = {tensor.name: tensor.shape for tensor in describe(str(folder)).spec.tensors}
    assert shapes == {tensor.name: tensor.shape for tensor in any_spec(text).tensors}
    tokens = torch.from_numpy(TEXT.tokens).long()[:2]
    with torch.no_grad():
        assert torch.equal(load_any(folder, torch.float32)(input_ids=tokens).logits, model(input_ids=tokens).logits)
    content = read_json(folder / "config.json")
    for own in (None, {}, 5):
        (folder / "config.json").write_text(json.dumps(content | {"text_config": own}))
        with pytest.raises(InputError, match="must give text_config of a"):
            resolve_teacher(str(folder), trained=False)
    (folder / "config.json").write_text(json.dumps(content))
    assert resolve_teacher(str(folder)).config["model_type"] == f"{name}_text"


def test_a_gemma_4_has_tables_by_layer_of_as_many_tokens_as_it_knows() -> None:
    tokens = {"vocab_size": 20_000, "vocab_size_per_layer_input": 20_000}  # more than the layers of any model
    spec = any_spec(Gemma4TextConfig(**_GEMMA | tokens).to_dict())
    assert [tensor.shape for tensor in spec.tensors if len(tensor.shape) > 1 and tensor.shape[0] == 20_000] == [
        (20_000, 128),
        (20_000, 6 * 32),
    ]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gemma4", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, "a Gemma 4 with experts"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "tokens see those behind them"),
        ("gemma4", {"attention_bias": True}, "no biases for gemma4"),
        ("gemma4", {"hidden_activation": "silu"}, "with gelu_pytorch_tanh, not with 'silu'"),
        ("gemma4", {"vocab_size_per_layer_input": 200}, "these have 200 and 300"),
        ("gemma4", {"num_kv_shared_layers": 2}, "of which the first has a sliding window"),
        ("qwen3_5", {"linear_key_head_dim": 16}, "these have 16 and 32"),
        ("qwen3_5", {"linear_num_value_heads": 3}, "2 heads of keys of a recurrent state, which do not divide 3"),
        ("qwen3_5", {"layer_types": ["full_attention", "linear_attention"] * 2}, "every n-th layer of qwen35"),
        ("qwen3_5", {"hidden_act": "gelu"}, "with silu, not with 'gelu'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_not_written(
    name: str, change: dict[str, Any], said: str, folders: dict[str, Path]
) -> None:
    config = read_json(folders[name] / "config.json")
    spec = any_spec(config)
    assert cannot_write(spec, config) == ""
    assert said in cannot_write(spec, config | change)
