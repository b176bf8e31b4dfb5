"""Students that are mixtures of experts: trained on the grid, scored, exported, continued, and made again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.training.lora import check_lora
from autodistill.distillation.training.trained_scales import TrainedScales
from autodistill.errors import InputError
from autodistill.estimates.training_memory import adapted_tensors
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.export.base import load_exporter
from autodistill.export.verify import verify
from autodistill.inference.half_precision import load_held
from autodistill.models.config import spec_from_config
from autodistill.models.loading import check_model, load_model
from autodistill.models.model_folder import read_config
from autodistill.quantization.learned_scales import read_scales
from autodistill.quantization.packing import deployed
from autodistill.runs.run_folder import RunFolder
from autodistill.search.remake import remake
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Lora
from autodistill.strategy.strategy import WHOLE
from autodistill.testing import save_tiny_teacher
from tests.search.test_kill import kill_when, start
from tests.search.whole_family import Q4_0, Q8_0, check_step_on_grid, request, trained, written_inputs

PROGRAM = """
import sys
from pathlib import Path
from autodistill.search.search import search
from tests.search.whole_family import request
search(request(tuple(map(Path, sys.argv[1:4])), Path(sys.argv[4])))
"""
BF16 = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
UPS = "model.layers.1.mlp.experts.gate_up_proj"
ROUTER = "model.layers.1.mlp.gate.weight"
QAT = {
    "init": {"depth": 1.0},
    "distillation": {
        "divergence_weight": 0.5,
        "learning_rate": 1e-3,
        "signal": "online",
        "signal_tokens": 0,
        "on_policy": {"share": 0.2},
    },
    "finishing": {"format": "gguf-q4_0", "bits": 4, "group_size": 32, "scales": "learned"},
}
ALONE = {
    "init": {"depth": 1.0},
    "distillation": {"divergence_weight": 0.5, "learning_rate": 1e-3},
    "finishing": {"format": "gguf-q4_0", "bits": 4, "group_size": 32, "scales": "alone", "rounding": "compensated"},
}

LOW_RANK = {
    "init": {"depth": 1.0},
    "distillation": {
        "divergence_weight": 0.0,
        "learning_rate": 2e-2,
        "train_embeddings": False,
        "lora": {"rank": 8, "alpha": 16.0},
    },
    "finishing": {"format": "gguf-q4_0", "bits": 4, "group_size": 32},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = save_tiny_teacher(folder / "teacher", architecture="qwen3_moe", layers=2, head_dim=32, seed=1)
    return written_inputs(folder, teacher, {"qat": QAT, "alone": ALONE, "low": LOW_RANK})


def stock(folder: Path) -> Any:
    """Return the model in transformers' own computation of experts."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


@pytest.mark.parametrize("deployment", [Q8_0, Q4_0], ids=["q8_0", "q4_0"])
def test_on_the_grid_it_computes_and_learns_as_transformers_model_of_the_rounded_weights(
    inputs: tuple[Path, Path, Path], deployment: Deployment
) -> None:
    """The gradient of a weight is that of its rounded value. A weight beyond the last code of Q4_0 gets none."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 70)))
    spec = spec_from_config(read_config(inputs[0]))
    grids = deployment.grids_of(spec.tensors)
    assert UPS in grids
    assert ROUTER not in grids
    ours, theirs = load_model(inputs[0], torch.float32), stock(inputs[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)
        for name, parameter in theirs.named_parameters():
            if name in grids:
                # Each matrix of each expert is rounded in groups along its inputs.
                for matrix in parameter if parameter.dim() == 3 else [parameter]:
                    matrix.copy_(torch.from_numpy(deployed(matrix.numpy(), grids[name])))
    logits = check_step_on_grid(ours, theirs, grids, tokens, clips=deployment == Q4_0)
    again = load_model(inputs[0], torch.float32)
    scaled = TrainedScales(again, grids.get)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, logits)
    # Codes stay, so a scale that is twice as large makes all weights of its group twice as large.
    before = again.get_parameter(ROUTER).clone()
    with torch.no_grad():
        scaled.by_name[UPS].scale.fill_(1.0)
    scaled.settle()
    assert torch.equal(again.get_parameter(UPS), 2 * dict(theirs.named_parameters())[UPS])
    assert torch.equal(again.get_parameter(ROUTER), before)


def test_a_student_is_trained_on_the_grid_and_is_the_file_that_llama_cpp_runs(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    found = trained(inputs, tmp_path)
    # The gguf package reads what the student's folder has, at its grid with its learned scales.
    own = read_scales(found.student, Q4_0.scheme)
    # The table is not trained here, so its scales follow from its weights.
    assert own.keys() == Q4_0.grids_of(found.teacher.tensors).keys() - {"model.embed_tokens.weight"}
    with safe_open(found.student / "model.safetensors", "np") as file:
        # As released folders hold it: an expert's matrices under names of their own.
        ups = [file.get_tensor(f"model.layers.1.mlp.experts.{expert}.up_proj.weight") for expert in range(4)]
        router = file.get_tensor(ROUTER)
    scales = own[UPS].scales.reshape(4, 2, 128, 2)[:, 1]
    stored = found.stored["blk.1.ffn_up_exps.weight"]
    held = dequantize(stored.data, stored.tensor_type)
    for expert, rows in enumerate(ups):
        given = type(own[UPS])(np.ascontiguousarray(scales[expert]), None)
        assert np.array_equal(held[expert], deployed(rows, Q4_0.linear, given))
    # llama.cpp keeps routers in 32 bits.
    stored = found.stored["blk.1.ffn_gate_inp.weight"]
    assert stored.tensor_type.name == "F32"
    assert np.array_equal(stored.data, router)
    with safe_open(inputs[0] / "model.safetensors", "np") as file:
        assert not np.array_equal(file.get_tensor(ROUTER), router)


@pytest.mark.slow
def test_low_rank_changes_move_the_matrices_of_attention_alone(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = trained(inputs, tmp_path, strategy=str(inputs[1].parent / "low.yaml"))
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs[0], found.student))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkvo"}


@pytest.mark.slow
def test_a_killed_search_ends_as_if_it_had_not_been(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    whole = search(request(inputs, tmp_path / "whole")).finish
    assert whole.best is not None
    words = [sys.executable, "-c", PROGRAM, *map(str, inputs), str(tmp_path / "cut")]
    kill_when(start(words, Path(__file__).parents[2]), lambda: any((tmp_path / "cut").glob("run/checkpoints/*")))
    found = search(request(inputs, tmp_path / "cut", resume=True)).finish
    assert found.best is not None
    assert found.best.accuracy == whole.best.accuracy
    assert found.paths["gguf"].read_bytes() == whole.paths["gguf"].read_bytes()


@pytest.mark.slow
def test_scales_alone_are_trained_on_codes_that_make_up_for_errors_where_layers_are_linear(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    outcome = search(request(inputs, tmp_path, strategy=str(inputs[1].parent / "alone.yaml")))
    row = outcome.finish.best
    assert row is not None
    assert row.strategy is not None
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert abs(outcome.finish.checks["gguf"].excess) < 0.02
    assert remake(RunFolder(tmp_path, "run"), row, inputs[2]).verdict == "identical"


def test_a_folder_is_written_as_released_ones_are(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    exporter = load_exporter("huggingface")
    artifact = exporter.export(inputs[0], BF16, tmp_path / "out")
    spec = spec_from_config(read_config(inputs[0]))
    # Four experts of three matrices in place of two tensors, in each of two layers.
    assert verify(exporter, artifact, inputs[0], BF16).tensors == len(spec.tensors) + 2 * (4 * 3 - 2)
    check_model(artifact.path)
    student, _ = build_student(inputs[0], WHOLE)
    save_student(student, inputs[0], tmp_path / "student")
    check_model(tmp_path / "student")
    for name, parameter in load_model(tmp_path / "student", torch.float32).named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))
    tokens = torch.arange(3, 60)[None]
    rounded = stock(inputs[0])
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(stock(artifact.path)(tokens).logits, rounded(tokens).logits)
    for part in ("model.layers.0.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.gate.weight"):
        _without(artifact.path, tmp_path / "lacks", part)
        with pytest.raises(InputError, match=f"it lacks {part}"):
            check_model(tmp_path / "lacks")


def _without(folder: Path, out: Path, name: str) -> None:
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    copytree(folder, out, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def test_a_teacher_may_be_held_in_16_bits(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    exporter = load_exporter("huggingface")
    folder = exporter.export(inputs[0], BF16, tmp_path).path
    held, whole = load_held(folder, "bfloat16"), load_model(folder, torch.float32)
    assert held.get_parameter(UPS).dtype == torch.bfloat16
    assert held.get_parameter(ROUTER).dtype == torch.float32
    tokens, spec = torch.arange(3, 60)[None], spec_from_config(read_config(folder))
    with torch.no_grad():
        torch.testing.assert_close(held(tokens).logits, whole(tokens).logits)
        with deployed_weights(held, spec, Q4_0), deployed_weights(whole, spec, Q4_0):
            torch.testing.assert_close(held(tokens).logits, whole(tokens).logits)
        assert not torch.allclose(held(tokens).logits, stock(inputs[0])(tokens).logits, atol=1e-3)


def test_low_rank_changes_are_of_linear_layers(inputs: tuple[Path, Path, Path]) -> None:
    spec = spec_from_config(read_config(inputs[0]))
    check_lora(Lora(rank=4), spec)
    named = {one.name.partition(".layers.0.")[2] for one in adapted_tensors(spec, Lora(rank=4)) if ".0." in one.name}
    assert named == {f"self_attn.{one}_proj.weight" for one in "qkvo"}
    with pytest.raises(InputError, match=r"lora.layers is ffn, where a qwen3_moe has no linear layer"):
        check_lora(Lora(rank=4, layers="ffn"), spec)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"init": {"depth": 0.5}}, "init.depth is 0.5, and a qwen3_moe is trained whole, because it is a mixture"),
        ({"init": {"depth": 1.0, "ffn": 0.5}}, "init.ffn is 0.5, and a qwen3_moe is trained whole"),
        (
            {"init": {"depth": 1.0}, "distillation": {"attention": {"kind": "maps"}}},
            "not compared in a qwen3_moe, because it is a mixture of experts: leave distillation.attention out",
        ),
        (
            {"init": {"depth": 1.0}, "finishing": {"format": "compressed-tensors", "bits": 4, "group_size": 32}},
            "compressed-tensors is written of llama.* alone: store a qwen3_moe as GGUF",
        ),
    ],
)
def test_what_a_mixture_cannot_have_is_refused_in_one_line(
    inputs: tuple[Path, Path, Path], tmp_path: Path, strategy: dict[str, Any], said: str
) -> None:
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(strategy))
    with pytest.raises(InputError, match=said) as caught:
        search(request(inputs, tmp_path, strategy=str(tmp_path / "asked.yaml")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"init.depth is 0.5, and a qwen3_moe is trained whole"):
        search(request(inputs, tmp_path, strategy=None, space=str(inputs[1].parent / "cut.yaml")))
