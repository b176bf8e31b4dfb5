"""Repaired FFNs against least squares by another library, and in a built student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autodistill.distillation.student.build import build_student
from autodistill.distillation.student.repair import (
    REPAIRED,
    RIDGE,
    HeldMoments,
    part_moments,
    refit,
    refitted,
    strongest,
)
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.families import Axis, get_family
from autodistill.models.loading import decoder_layers, load_model
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher

LAYERS, FFN = 3, 192


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return save_tiny_teacher(
        folder, architecture=request.param, layers=LAYERS, width=64, heads=4, kv_heads=4, ffn=FFN, seed=5
    )


@pytest.fixture(scope="module")
def calibration() -> PartImportance:
    dice = torch.Generator().manual_seed(2)
    return PartImportance(
        similarity=torch.rand(LAYERS + 1, LAYERS + 1, dtype=torch.float64, generator=dice),
        neurons=torch.rand(LAYERS, FFN, dtype=torch.float64, generator=dice),
        groups=torch.ones(LAYERS, 4, dtype=torch.float64),  # a repair chooses by its own measure
        channels=torch.ones(64, dtype=torch.float64),
        text=torch.randint(3, 300, (5, 40), generator=dice, dtype=torch.int32),
    )


def activations(model: Any, text: Tensor, axis: Axis = Axis.FFN) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the inputs of the last matrix of each FFN, or attention, in one pass of transformers."""
    seen: list[Tensor] = []
    name = get_family(model.config.model_type).reading(axis)
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        model(text.long())
    for hook in hooks:
        hook.remove()
    return [one.flatten(0, 1).double().numpy() for one in seen]


def matrices(model: Any) -> list[Tensor]:
    name = get_family(model.config.model_type).reading(Axis.FFN)
    return [layer.get_submodule(name).weight.detach() for layer in decoder_layers(model)]


def test_a_built_student_has_what_least_squares_finds(teacher: Path, calibration: PartImportance) -> None:
    model = load_model(teacher, torch.float32)
    student, kept = build_student(
        teacher, Init(depth=1.0, dropped=(1, 1), ffn=1 / 3, repair=True), calibration=calibration
    )
    assert kept == (0, 2)
    seen = activations(model, calibration.text)
    for layer, found in zip(kept, matrices(student), strict=True):
        inputs, weight = seen[layer], matrices(model)[layer].double().numpy()
        added = np.sqrt((inputs**2).mean(0)) * np.sqrt((weight**2).sum(0))
        neurons = np.sort(np.argsort(-added, kind="stable")[:64])
        others = np.setdiff1d(np.arange(FFN), neurons)
        # The ridge consists of extra rows.
        ridge = np.sqrt(RIDGE * (inputs**2).mean() * len(inputs)) * np.eye(64)
        rows = np.concatenate([inputs[:, neurons], ridge])
        wanted = np.concatenate([inputs[:, others] @ weight[:, others].T, np.zeros((64, 64))])
        change = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
        np.testing.assert_allclose(found.double().numpy(), weight[:, neurons] + change, atol=2e-5)
        assert np.abs(change).max() > 1e-3
        # The result is nearer to the whole FFN than the same neurons without repair.
        lost = np.square(inputs[:, others] @ weight[:, others].T).mean()
        assert np.square(inputs[:, neurons] @ change.T - inputs[:, others] @ weight[:, others].T).mean() < 0.9 * lost


def test_without_a_ridge_copied_neurons_are_made_up_for_exactly() -> None:
    dice = torch.Generator().manual_seed(0)
    half = torch.randn(200, 8, generator=dice)
    inputs, weight = torch.cat([half, 2 * half], dim=1), torch.randn(5, 16, generator=dice)
    neurons = torch.arange(8)
    found = refitted(inputs.T @ inputs / 200, weight, neurons, ridge=0.0)
    torch.testing.assert_close(found, weight[:, :8] + 2 * weight[:, 8:], atol=1e-4, rtol=1e-4)


def test_the_strongest_neurons_add_most_and_a_silent_ffn_stays_as_it_is() -> None:
    moments, weight = torch.diag(torch.tensor([1.0, 4.0, 0.0, 9.0])), torch.tensor([[3.0, 1.0, 9.0, 1.0]])
    assert strongest(moments, weight, 2, 4).tolist() == [0, 3]
    silent = refit(torch.zeros(4, 4), weight, 2, 4)
    assert silent is not None
    assert torch.equal(silent.matrix, weight[:, silent.kept])
    assert refit(moments, weight, 4, 4) is None


def test_a_student_that_is_repaired_by_layer_leaves_whole_layers_alone(
    teacher: Path, calibration: PartImportance
) -> None:
    if "neox" in str(load_model(teacher, torch.float32).config.model_type):
        pytest.skip("layers of different widths are of the Llama family")
    init = Init(depth=1.0, ffn_widths=(FFN, 64, FFN), repair=True)
    student, _ = build_student(teacher, init, calibration=calibration)
    model = load_model(teacher, torch.float32)
    before, after = matrices(model), matrices(student)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    moments = list(part_moments(model, calibration.text))
    made = refit(moments[1][Axis.FFN], before[1], 64, FFN)
    assert made is not None
    assert torch.equal(after[1], made.matrix)


def test_activations_are_read_once_for_all_who_cut_a_teacher(teacher: Path, calibration: PartImportance) -> None:
    model = load_model(teacher, torch.float32)
    spec, loads, held = spec_from_config(model.config.to_dict()), [], HeldMoments()

    def load() -> Any:
        loads.append(1)
        return model

    for text, reads in ((calibration.text, 1), (calibration.text.clone(), 1), (calibration.text[1:], 2)):
        found = held.of(load, spec, text)
        assert found is not None
        for one, other in zip(found, part_moments(model, text), strict=True):
            assert all(one[axis].equal(other[axis]) for axis in REPAIRED)
        assert len(loads) == reads
    held.release()
    held.of(load, spec, calibration.text[1:])
    assert len(loads) == 3
    assert held.of(load, replace(spec, ffn_width=2**16, ffn_widths=()), calibration.text) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"repair": True}, "init.repair fits FFNs and attention that were cut"),
        ({"source": "scratch", "ffn": 0.5, "repair": True}, "init.repair fits FFNs and attention that were cut"),
        ({"dropped": (3,), "depth": 1.0}, "how many are, like"),
        ({"dropped": (0, 2), "depth": 1.0}, "1 or more"),
        ({"dropped": (2, 0), "depth": 1.0}, "1 or more"),
        ({"dropped": (2, 2)}, "give init.depth 1"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Init(**fields)


def test_the_last_layer_stays(teacher: Path) -> None:
    with pytest.raises(InputError, match="the last layer that can be left out of the teacher's 3 is 1"):
        build_student(teacher, Init(depth=1.0, dropped=(1, 2)))


def test_older_strategies_keep_their_identity() -> None:
    assert set(Init().to_json()) == {"source", "model", "depth", "layers", "ffn", "heads", "width"}
    told = Init(depth=1.0, dropped=(4, 3), ffn=0.5, repair=True)
    assert Init.from_json(told.to_json()) == told
    assert told.describe() == "without layers 4 to 6 ffn 50% repaired"


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_without_some_heads_has_what_least_squares_finds(
    groups: int, calibration: PartImportance, tmp_path: Path
) -> None:
    folder = save_tiny_teacher(tmp_path, layers=LAYERS, width=64, heads=4, kv_heads=groups, ffn=FFN, seed=5)
    student, _ = build_student(folder, Init(depth=1.0, heads=0.5, repair=True), calibration=calibration)
    model = load_model(folder, torch.float32)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, groups // 2)
    own = 64 // groups
    for layer, (block, cut) in enumerate(zip(decoder_layers(model), decoder_layers(student), strict=True)):
        attention, after = block.self_attn, cut.self_attn
        inputs = activations(model, calibration.text, Axis.QUERIES)[layer]
        weight = attention.o_proj.weight.detach().double().numpy()
        parts = [slice(start, start + own) for start in range(0, 64, own)]
        added = [np.square(inputs[:, one] @ weight[:, one].T).mean() for one in parts]
        kept = np.sort(np.argsort(added)[groups // 2 :])
        columns = np.concatenate([np.arange(64)[parts[one]] for one in kept])
        others = np.setdiff1d(np.arange(64), columns)
        ridge = np.sqrt(RIDGE * (inputs**2).mean() * len(inputs)) * np.eye(32)
        rows = np.concatenate([inputs[:, columns], ridge])
        wanted = np.concatenate([inputs[:, others] @ weight[:, others].T, np.zeros((32, 64))])
        change = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
        np.testing.assert_allclose(after.o_proj.weight.detach().numpy(), weight[:, columns] + change, atol=2e-5)
        # Queries, keys and values are those of the same heads.
        assert torch.equal(after.q_proj.weight, attention.q_proj.weight[torch.from_numpy(columns)])
        rows_of = 16 * kept[:, None] + np.arange(16)
        for name in ("k_proj", "v_proj"):
            whole = attention.get_submodule(name).weight
            assert torch.equal(after.get_submodule(name).weight, whole[torch.from_numpy(rows_of.flatten())])
