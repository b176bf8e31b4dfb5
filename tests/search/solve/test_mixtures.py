"""How `solve` scores, stores, writes and refuses mixtures of experts, and models of no known family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.any_model import any_spec, holds_cache, load_any
from autodistill.distillation.teacher.resolve import Teacher, resolve_teacher
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.export.whole.file import cannot_write
from autodistill.hardware.budget import Budget
from autodistill.models.tensors import Role
from autodistill.quantization.formats import TYPES
from autodistill.search.solve import SolveRequest, solve
from autodistill.search.solve.bench import Bench, load_bench
from autodistill.search.solve.call.export import write_solution
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.testing import tiny_text
from autodistill.utils.json_files import read_json
from tests.models.random_models import saved

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 300}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, head_dim=32, moe_intermediate_size=96, num_experts=4, norm_topk_prob=True
    ),
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_experts=4, norm_topk_prob=False),
    "gpt_oss": lambda: GptOssConfig(**_SIZES, head_dim=32, num_local_experts=4),
    "gpt2": lambda: GPT2Config(**_TOKENS, n_embd=64, n_layer=2, n_head=2, n_positions=512),
    # One layer without keys and values, and one with them.
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **_SIZES,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    # Heads of two sizes, layers that use the keys and values of others, and tables of tokens for each layer.
    "gemma4": lambda: Gemma4TextConfig(
        **_SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
        head_dim=32,
        global_head_dim=64,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=300,
        num_kv_shared_layers=2,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def _scaled(_: str, model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(CONFIGS, tmp_path_factory.mktemp("models"), _scaled)


def bench_of(folder: Path) -> Bench:
    spec = any_spec(read_json(folder / "config.json"))
    return load_bench(Teacher(folder=folder, fingerprint="", name="m", license=None), spec, None)


def text_of(count: int) -> TokenSet:
    tokens = np.random.default_rng(0).integers(3, 300, (count, 64)).astype(np.int32)
    return TokenSet(tokens=tokens, documents=np.repeat(np.arange(count)[:, None], 64, axis=1).astype(np.int32))


@pytest.mark.parametrize(
    "name",
    [name if name in ("qwen3_moe", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_scores_are_what_replacing_a_matrix_costs(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    bench = bench_of(folders[name])
    options = Options(spec=bench.spec, budget=Budget(memory_bytes=10**9, context=64), cache_type="f16")
    sample = bench.sample("calibration", text_of(16))
    library = Library(tmp_path / "library.json", bench, options, sample, lambda _: None)
    library.build()
    experts = [one for one in options.matrices if ".experts." in one]
    assert bool(experts) == (name in EXPERTS)
    # Errors of matrices before a router send some tokens to other experts, which no gradient shows. Errors in the first
    # of four layers are too large for a second-order estimate.
    compared = [one for one in experts or options.matrices if ".1." in one or name == "gpt2"]
    pairs = [
        (library.score(one, kind).kl, bench.measure_parts({one: TYPES[kind]}, ("f16", "f16"), sample).kl)
        for one in compared
        for kind in ("q5_0", "q4_0")
    ]
    scored, direct = np.array(pairs).sum(axis=0)
    assert 0.6 < scored / direct < 1.7
    assert all(library.score(one, "q4_0").kl > 0 for one in options.matrices)


def test_every_parameter_is_stored_once_and_routers_stay_as_they_are(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        spec = any_spec(read_json(folder / "config.json"))
        model = load_any(folder, torch.float32)
        theirs = {name: one for name, one in model.state_dict().items() if name != "lm_head.weight" or not spec.tied}
        assert {one.name for one in spec.tensors} == set(theirs)
        assert spec.parameters == sum(one.numel() for one in theirs.values())
        roles = {one.name: one.role for one in spec.tensors}
        assert all(role is not Role.LINEAR for name, role in roles.items() if ".gate.weight" in name)
        assert all(role is Role.LINEAR for name, role in roles.items() if name.endswith("experts.down_proj"))


def test_a_cache_is_solved_where_all_layers_have_one_of_the_same_size(folders: dict[str, Path]) -> None:
    held = {name: holds_cache(read_json(folder / "config.json")) for name, folder in folders.items()}
    # GPT-OSS' attention, with sinks, is not replaced.
    assert held == {name: name not in ("gpt_oss", "qwen3_5", "gemma4") for name in folders}
    # If layers have two sizes, the larger one counts.
    assert any_spec(read_json(folders["gemma4"] / "config.json")).head_dim == 64


def test_sizes_of_single_layers_are_whole_numbers(folders: dict[str, Path]) -> None:
    config = read_json(folders["gemma4"] / "config.json")
    for own in ({"1": {"head_dim": "64"}}, {"one": {"head_dim": 64}}, {"1": 64}, [64]):
        with pytest.raises(InputError, match="from layers to sizes of their own"):
            any_spec(config | {"per_layer_config": own})


def test_experts_are_rounded_each_by_itself_along_what_goes_in(folders: dict[str, Path]) -> None:
    from autodistill.quantization.rounding import deploy_tensor

    for name, turned in (("mixtral", False), ("gpt_oss", True)):
        bench = bench_of(folders[name])
        (tensor,) = [one for one in bench.spec.tensors if "layers.1" in one.name and one.name.endswith("down_proj")]
        own = bench.master(tensor.name)
        found = bench.stored(tensor.name, TYPES["q4_0"])
        for expert in range(4):
            rows = own[expert].T.contiguous() if turned else own[expert]
            wanted = deploy_tensor(rows, TYPES["q4_0"])
            assert torch.equal(found[expert], wanted.T if turned else wanted)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_is_written_as_it_was_measured_and_runs(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    bench = bench_of(folders[name])
    budget = Budget(memory_bytes=10**9, context=128)
    options = Options(spec=bench.spec, budget=budget)
    kinds = {one: "q5_0" if ".experts." in one else "q8_0" for one in options.matrices}
    mixed = options.deployment(kinds | dict.fromkeys(options.tables, "q8_0"), ("q8_0", "q8_0"))
    teacher = Teacher(folder=folders[name], fingerprint="", name="m", license=None)
    artifact, tensors = write_solution(bench, teacher, mixed, tmp_path)
    assert tensors == sum(2 if one.name.endswith("gate_up_proj") else 1 for one in bench.spec.tensors)
    subject = Subject(spec=bench.spec, deployment=mixed, budget=budget, artifact=artifact.path, threads=1)
    (found,) = load_evaluator("memory").evaluate(subject)
    parts, estimate = found.detail, memory(bench.spec, mixed, context=128, batch=1)
    # llama.cpp's log is precise to hundredths of a MiB.
    assert parts["weights_bytes"] == pytest.approx(estimate.weights_bytes, abs=6000)
    assert parts["compute_bytes"] == pytest.approx(estimate.compute_bytes, abs=6000)


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4", "qwen3_5"))]
)
def test_solve_takes_a_model_from_folder_to_verified_file(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    text = tiny_text(tmp_path / "text", documents=32)
    request = SolveRequest(
        budgets=(Budget(memory_bytes=10**8, context=128),),
        cache=tmp_path / "cache",
        teacher=str(folders[name]),
        data=str(text),
        tokens=256,
        sequence_length=64,
        out=tmp_path / "out",
        export=True,
    )
    found = solve(request)
    assert found["not_exported"] is None
    assert found["exported"]["agreement"] > 0.9
    assert found["solutions"][0]["solution"]["family"] == "whole"


def test_what_cannot_be_written_or_solved_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    config = read_json(folders["olmoe"] / "config.json")
    assert cannot_write(any_spec(config), config) == ""
    for change, said in (
        ({"norm_topk_prob": True}, "norm_topk_prob false alone"),
        ({"num_key_value_heads": 1}, "as many heads of keys as of queries"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
    ):
        other = config | change
        assert said in cannot_write(any_spec(other), other)
    windowed = read_json(folders["mixtral"] / "config.json") | {"sliding_window": 64}
    assert "no sliding window of 64 tokens" in cannot_write(any_spec(windowed), windowed)
    request = SolveRequest(
        budgets=(Budget(memory_bytes=10**8, context=128),),
        cache=tmp_path,
        teacher=str(folders["gpt2"]),
        out=tmp_path / "out",
        export=True,
    )
    with pytest.raises(InputError, match="is solved and not exported: no GGUF file is written of 'gpt2'"):
        solve(request)
    with pytest.raises(InputError, match=r"autodistill solve can solve its types, but students cannot be made"):
        resolve_teacher(str(folders["mixtral"]))
    with pytest.raises(InputError, match=r"supported are llama"):
        resolve_teacher(str(folders["gpt2"]))
    with pytest.raises(InputError, match="config gives num_attention_heads as a whole number, but it is missing"):
        any_spec(MambaConfig(**_TOKENS, hidden_size=64, num_hidden_layers=2).to_dict())
    with pytest.raises(InputError, match="gives num_hidden_layers as 100000: check it"):
        any_spec(config | {"num_hidden_layers": 100_000})
    with pytest.raises(InputError, match="cannot read the config of the architecture 'nothing'"):
        any_spec({"model_type": "nothing"})
