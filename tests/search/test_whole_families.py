"""Students of a family whose layers differ in kind: trained on the grid, scored, exported, and made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from autodistill.distillation.student.build import build_student, init_spec
from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.distillation.training.lora import check_lora
from autodistill.errors import InputError
from autodistill.estimates.training_memory import adapted_tensors
from autodistill.export.base import load_exporter
from autodistill.export.verify import verify
from autodistill.models.config import spec_from_config
from autodistill.models.loading import held, load_model
from autodistill.models.model_folder import read_config
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales, write_scales
from autodistill.quantization.packing import deployed
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Lora
from autodistill.strategy.strategy import WHOLE, Init
from autodistill.testing import save_tiny_teacher
from tests.search.whole_family import Q4_0, Q8_0, check_step_on_grid, request, trained, written_inputs

OUT = "model.layers.0.linear_attn.out_proj.weight"
QAT = {
    "init": {"depth": 1.0},
    "distillation": {"divergence_weight": 0.5, "learning_rate": 1e-3},
    "finishing": {"format": "gguf-q4_0", "bits": 4, "group_size": 32, "scales": "learned"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = save_tiny_teacher(folder / "teacher", architecture="qwen3_5_text", layers=4, head_dim=32, seed=1)
    return written_inputs(folder, teacher, {"qat": QAT})


@pytest.fixture(scope="module")
def gemma(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("gemma")
    teacher = save_tiny_teacher(folder / "teacher", architecture="gemma4_text", layers=6, seed=1)
    on_policy = QAT["distillation"] | {"signal": "online", "signal_tokens": 0, "on_policy": {"length": 8}}
    (inputs[1].parent / "own.yaml").write_text(yaml.safe_dump(QAT | {"distillation": on_policy}))
    return teacher, inputs[1], folder / "cache"


@pytest.mark.parametrize("deployment", [Q8_0, Q4_0], ids=["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["inputs", "gemma"])
def test_on_the_grid_it_computes_and_learns_as_transformers_model_of_the_rounded_weights(
    family: str, deployment: Deployment, request: pytest.FixtureRequest
) -> None:
    """The gradient of a weight is that of its rounded value. A weight beyond the last code of Q4_0 gets none."""
    tokens = torch.from_numpy(np.random.default_rng(0).permutation(300).reshape(2, 150))  # all rows of the tables
    teacher = request.getfixturevalue(family)[0]
    spec = spec_from_config(read_config(teacher))
    grids = deployment.grids_of(spec.tensors)
    ours = load_model(teacher, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    assert held(theirs).keys() == {tensor.name for tensor in spec.tensors}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in grids:
                parameter.copy_(torch.from_numpy(deployed(parameter.numpy(), grids[name])))
    check_step_on_grid(ours, theirs, grids, tokens, clips=deployment == Q4_0)


def test_a_student_is_trained_on_the_grid_and_is_the_file_that_llama_cpp_runs(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    found = trained(inputs, tmp_path)
    # The gguf package reads what the student's folder has, at its grid with its learned scales.
    own = read_scales(found.student, Q4_0.scheme)
    # The table is not trained here, so its scales follow from its weights.
    assert own.keys() == Q4_0.grids_of(found.teacher.tensors).keys() - {"model.embed_tokens.weight"}
    with safe_open(found.student / "model.safetensors", "np") as file:
        rows = deployed(file.get_tensor(OUT), Q4_0.linear, own[OUT])
    out = found.stored["blk.0.ssm_out.weight"]
    held = dequantize(out.data, out.tensor_type)
    # Heads 0 and 1 of the values belong to the first head of keys, 2 and 3 to the second; llama.cpp alternates.
    assert np.array_equal(held.reshape(-1, 4, 32), rows.reshape(-1, 4, 32)[:, [0, 2, 1, 3]])
    with pytest.raises(InputError, match="holds the architecture qwen35; supported are llama"):
        resolve_teacher(str(found.file))


def test_a_gemma_4_learns_from_its_own_text_too_and_is_the_file_that_llama_cpp_runs(
    gemma: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    found = trained(gemma, tmp_path, strategy=str(gemma[1].parent / "own.yaml"))
    # The gguf package reads the student's tables and factors as its folder has them.
    with safe_open(found.student / "model.safetensors", "np") as file:
        table = deployed(file.get_tensor("model.embed_tokens_per_layer.weight"), Q8_0.linear)
        factors = [file.get_tensor(f"model.layers.{layer}.layer_scalar") for layer in range(6)]
    further = found.stored["per_layer_token_embd.weight"]
    assert np.array_equal(dequantize(further.data, further.tensor_type), table)
    assert [found.stored[f"blk.{layer}.layer_output_scale.weight"].data for layer in range(6)] == factors
    assert [one.shape for one in found.described.tensors] == [one.shape for one in found.teacher.tensors]
    with pytest.raises(InputError, match="holds the architecture gemma4; supported are llama"):
        resolve_teacher(str(found.file))


def test_cuts_of_a_gemma_4_are_refused(gemma: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"init.depth is 0.5, and a gemma4_text is trained whole"):
        search(request(gemma, tmp_path, strategy=None, space=str(gemma[1].parent / "cut.yaml")))


def test_low_rank_changes_are_of_the_matrices_that_they_make_smaller(inputs: tuple[Path, Path, Path]) -> None:
    spec = spec_from_config(read_config(inputs[0]))
    check_lora(Lora(rank=4), spec)
    named = {one.name.partition(".layers.0.")[2] for one in adapted_tensors(spec, Lora(rank=4)) if ".0." in one.name}
    matrices = {f"mlp.{one}_proj.weight" for one in ("gate", "up", "down")}
    matrices |= {f"linear_attn.{one}.weight" for one in ("in_proj_qkv", "in_proj_z", "out_proj")}
    assert named == matrices


def test_a_student_may_be_new_or_begin_from_a_smaller_model(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, tokens = spec_from_config(read_config(inputs[0])), torch.arange(3, 60)[None]
    new, kept = build_student(inputs[0], Init(source="scratch", depth=1.0), seed=3)
    assert kept == (0, 1, 2, 3)
    assert spec_from_config(new.config.to_dict()) == teacher
    copy, _ = build_student(inputs[0], WHOLE)
    assert not torch.equal(new.model.layers[0].linear_attn.A_log, copy.model.layers[0].linear_attn.A_log)
    stock = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(copy(tokens).logits, stock(tokens).logits)
    small = save_tiny_teacher(
        tmp_path / "small", architecture="qwen3_5_text", layers=4, width=32, heads=2, head_dim=32, ffn=64, seed=4
    )
    init = Init(source="pretrained", model=str(small), depth=1.0)
    begun, _ = build_student(inputs[0], init, pretrained=small)
    spec = init_spec(init, teacher, small)
    assert spec_from_config(begun.config.to_dict()) == spec
    assert (spec.width, spec.vocabulary) == (32, 300)


def test_learned_scales_move_with_their_columns(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from shutil import copytree

    student = copytree(inputs[0], tmp_path / "student")
    dice = np.random.default_rng(0)
    scales = Scales(dice.uniform(0.01, 0.05, (64, 4)).astype(np.float16).astype(np.float32), None)
    write_scales(student, Q4_0.scheme, {OUT: scales})
    exporter = load_exporter("gguf")
    artifact = exporter.export(student, Q4_0, tmp_path / "out")
    spec = spec_from_config(read_config(student))
    assert verify(exporter, artifact, student, Q4_0).tensors == len(spec.tensors)
    stored = {one.name: one for one in GGUFReader(artifact.path).tensors}["blk.0.ssm_out.weight"]
    held = dequantize(stored.data, stored.tensor_type).reshape(64, 4, 32)
    for place, head in enumerate((0, 2, 1, 3)):
        codes = held[:, place] / scales.scales[:, head, None]
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
        assert np.abs(codes).max() > 1


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"init": {"depth": 0.5}}, "init.depth is 0.5, and a qwen3_5_text is trained whole.*give 1"),
        ({"init": {"depth": 1.0, "ffn": 0.5}}, "init.ffn is 0.5, and a qwen3_5_text is trained whole"),
        ({"init": {"depth": 1.0, "dropped": [1, 1]}}, r"init.dropped is \(1, 1\).*leave it out"),
        (
            {"init": {"depth": 1.0}, "distillation": {"attention": {"kind": "maps"}}},
            "a qwen3_5_text, because its layers differ in kind: leave distillation.attention out",
        ),
        (
            {"init": {"depth": 1.0}, "finishing": {"format": "compressed-tensors", "bits": 4, "group_size": 32}},
            "compressed-tensors is written of llama.* alone: store a qwen3_5_text as GGUF",
        ),
    ],
)
def test_what_a_whole_family_cannot_have_is_refused_in_one_line(
    inputs: tuple[Path, Path, Path], tmp_path: Path, strategy: dict[str, Any], said: str
) -> None:
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(strategy))
    with pytest.raises(InputError, match=said) as caught:
        search(request(inputs, tmp_path, strategy=str(tmp_path / "asked.yaml")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_space_that_also_cuts_and_a_smaller_cache_are_refused(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"init.depth is 0.5, and a qwen3_5_text is trained whole"):
        search(request(inputs, tmp_path, strategy=None, space=str(inputs[1].parent / "cut.yaml")))
    with pytest.raises(InputError, match="layers of this qwen3_5_text differ in what they cache"):
        search(request(inputs, tmp_path, kv_type="q8_0"))
