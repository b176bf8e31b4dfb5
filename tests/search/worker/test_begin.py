"""The codes that a student begins with: they compensate for errors, are found once, and are checked by checksums."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from autodistill.data.dataset import load_split
from autodistill.errors import InputError
from autodistill.export.gguf import GgufExporter
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.learned_scales import write_scales
from autodistill.quantization.packing import deployed
from autodistill.search.setup.candidates import beginning
from autodistill.search.worker import begin
from autodistill.search.worker.attempt import Assignment, attempted
from autodistill.search.worker.begin import begun, scales_as
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.utils.clock import Moment

WHOLE = Init(depth=1.0)
SCHEMES = {
    "q4_0": {"format": "gguf-q4_0", "bits": 4, "group_size": 32},
    "q4_1": {"format": "gguf-q4_1", "bits": 4, "group_size": 32, "symmetric": False},
    "iq4_nl": {"format": "gguf-iq4_nl", "bits": 4, "group_size": 32},
    "zero points": {"format": "compressed-tensors", "bits": 4, "group_size": 32, "symmetric": False},
}


def strategy(rounding: str = "compensated", scheme: str = "q4_0", init: Init = WHOLE) -> Strategy:
    finishing = Finishing(**SCHEMES[scheme], scales="alone", rounding=rounding)  # type: ignore[arg-type]
    return Strategy(init=init, distillation=Distillation(learning_rate=1e-3), finishing=finishing)


@pytest.fixture
def setting(lab: Any, tmp_path: Path) -> TrialSetting:
    (tmp_path / "codes").mkdir()
    found: TrialSetting = lab.setting(tmp_path, codes=tmp_path / "codes")
    return found


def grids(one: Strategy, model: Any) -> dict[str, Grid]:
    assert one.finishing is not None
    return one.finishing.grids_of(begin.spec_from_config(model.config.to_dict()).tensors)


# The codes of other types are searched for in the same way: tests/search/solve/test_compensation.py has more of them.
@pytest.mark.parametrize(
    "scheme", ["q4_0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero points", "q4_1", "iq4_nl"))]
)
def test_weights_lie_on_the_codes_and_are_nearer_to_the_teacher(setting: TrialSetting, scheme: str) -> None:
    """Packing with these scales changes nothing. The model follows the teacher better than with the nearest codes."""
    teacher = load_model(setting.teacher, torch.float32)
    text = load_split(setting.data, "train").head(1024)
    _, reference = score_teacher(teacher, text)

    def kl(one: Strategy, model: Any, scales: Any) -> float:
        with torch.no_grad():
            for name, grid in grids(one, model).items():
                parameter = model.get_parameter(name)
                parameter.copy_(torch.from_numpy(deployed(parameter.numpy(), grid, scales.get(name))))
        scores, _ = score(model, text, reference)
        assert scores.divergence is not None
        return float(scores.divergence.mean())

    one = strategy(scheme=scheme)
    model, scales = begun(setting, one, 0)
    assert grids(one, model)
    for name, grid in grids(one, model).items():
        values = model.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(deployed(values, grid, scales[name]), values)
    nearest, none = begun(setting, strategy("nearest", scheme), 0)
    assert none == {}
    assert kl(one, model, scales) < 0.9 * kl(strategy("nearest", scheme), nearest, none)


@pytest.mark.slow
def test_codes_are_found_once_and_again_where_their_file_is_damaged(
    setting: TrialSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, make = [], begin.made_up
    monkeypatch.setattr(begin, "made_up", lambda *given, **more: found.append(1) or make(*given, **more))
    one = strategy(init=Init(depth=0.5))
    first, scales = begun(setting, one, 0)
    begun(setting, replace(one, distillation=Distillation(learning_rate=1e-4)), 1)
    assert len(found) == 1
    (file,) = setting.codes.rglob("*.safetensors")  # type: ignore[union-attr]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again, more = begun(setting, one, 0)
    assert len(found) == 2
    assert scales.keys() == more.keys()
    for (name, weight), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_codes_of_a_teacher_that_no_device_holds_are_found_in_main_memory(
    setting: TrialSetting, tmp_path: Path
) -> None:
    """The teacher counts as divided over two GPUs that are not here."""
    (tmp_path / "apart").mkdir()
    apart = replace(setting, device="cuda", held_type="bfloat16", divided=2, codes=tmp_path / "apart")
    found = begin.codes_file(apart, strategy())
    assert found.read_bytes() == begin.codes_file(setting, strategy()).read_bytes()


@pytest.mark.slow
def test_a_trial_is_given_back_where_the_time_ends_while_its_codes_are_found(setting: TrialSetting) -> None:
    """Finding codes may take longer than a segment, and the time budget only knows segments."""

    def never(record: object) -> None:
        raise AssertionError("a step was trained")

    deployment = Deployment(**SCHEMES["q4_0"], runtime="llama.cpp")
    task = TrialTask(id="t000", strategy=strategy(), seed=0, deployments=(deployment,), probe=deployment)
    work = Assignment(task=task, rung=0)
    assert attempted(Workbench(setting), work, never, Moment.after(-1.0)) == {"trained": 0}
    assert not list(setting.codes.rglob("*.safetensors"))  # type: ignore[union-attr]
    assert "report" in attempted(Workbench(setting), work, lambda record: None, Moment.after(600.0))


def test_a_trial_keeps_the_codes_and_trains_their_scales(setting: TrialSetting, tmp_path: Path) -> None:
    one = strategy()
    model, scales = begun(setting, one, 0)
    deployment = Deployment(**SCHEMES["q4_0"], runtime="llama.cpp")
    task = TrialTask(id="t000", strategy=one, seed=0, deployments=(deployment,), probe=deployment, straight=True)
    report = Trial(Workbench(setting), task).run(len(setting.plan.rungs) - 1)
    assert report is not None
    trained = dict(load_model(tmp_path / "t000" / "student", torch.float32).named_parameters())
    after = begin.read_scales(tmp_path / "t000" / "student", deployment)
    moved = 0
    for name, before in scales.items():
        weight = model.get_parameter(name).detach().numpy()
        codes, now = _codes(weight, before), _codes(trained[name].detach().numpy(), after[name])
        np.testing.assert_array_equal(codes, now)
        moved += int((after[name].scales != before.scales).any())
    assert moved


@pytest.fixture
def file(setting: TrialSetting, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a GGUF file of the teacher, and its codes.

    They use the middle of the range, as no rule would choose them.
    """
    folder, deployment = tmp_path / "file", Deployment(**SCHEMES["q4_0"], runtime="llama.cpp")
    shutil.copytree(setting.teacher, folder)
    model, scales, codes = load_model(folder, torch.float32), {}, {}
    for name in grids(strategy(), model):
        if name.startswith("model.layers"):
            groups = model.get_parameter(name).detach().numpy().reshape(-1, 32)
            steps = (np.abs(groups).max(axis=1) / 5).astype(np.float16).astype(np.float32)
            rows = len(model.get_parameter(name))
            scales[name] = Scales(steps.reshape(rows, -1), None)
            codes[name] = np.rint(groups / steps[:, None]).reshape(rows, -1)
    write_scales(folder, deployment, scales)
    return GgufExporter().export(folder, deployment, tmp_path / "made").path, codes


def test_a_trial_keeps_the_codes_of_the_file_that_it_begins_with(
    setting: TrialSetting, file: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, codes = file
    folder, told = beginning(str(path), tmp_path / "cache")
    assert told == ""
    setting = replace(setting, pretrained={str(path): folder.folder})
    deployment = Deployment(**SCHEMES["q4_0"], runtime="llama.cpp")
    one = strategy("nearest", init=Init(source="pretrained", model=str(path), depth=1.0))
    model, scales = begun(setting, one, 0)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, expected in codes.items():
        np.testing.assert_array_equal(_codes(model.get_parameter(name).detach().numpy(), scales[name]), expected)
    up = stored["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(
        model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().numpy(),
        dequantize(up.data, up.tensor_type).reshape(tuple(reversed(up.shape.tolist()))),
    )
    task = TrialTask(id="t000", strategy=one, seed=0, deployments=(deployment,), probe=deployment, straight=True)
    assert Trial(Workbench(setting), task).run(len(setting.plan.rungs) - 1) is not None
    trained = dict(load_model(tmp_path / "t000" / "student", torch.float32).named_parameters())
    after = begin.read_scales(tmp_path / "t000" / "student", deployment)
    for name, expected in codes.items():
        np.testing.assert_array_equal(_codes(trained[name].detach().numpy(), after[name]), expected)
    assert any((after[name].scales != scales[name].scales).any() for name in codes)


def _codes(weight: Any, scales: Scales) -> Any:
    steps = np.repeat(scales.scales, 32, axis=1)
    return np.rint(np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0))


@pytest.mark.slow
def test_scales_hold_in_the_scheme_that_they_were_found_for(setting: TrialSetting) -> None:
    one = strategy()
    model, scales = begun(setting, one, 0)
    spec = begin.spec_from_config(model.config.to_dict())
    own, other = (Deployment(**SCHEMES[name], runtime="llama.cpp") for name in ("q4_0", "q4_1"))
    assert scales_as(scales, one, spec, own).keys() == scales.keys()
    assert scales_as(scales, one, spec, other) == {}


def test_students_begin_alike_where_shape_and_codes_are_the_same() -> None:
    one, other = strategy(), strategy("nearest")
    assert one.begins_as(replace(one, distillation=Distillation(learning_rate=0.5)))
    assert not one.begins_as(other)
    assert not one.begins_as(strategy(scheme="q4_1"))
    assert other.begins_as(Strategy(init=Init(depth=1.0)))


def test_rounding_is_said_of_scales_that_are_trained_alone() -> None:
    with pytest.raises(InputError, match=r"give finishing\.scales alone, or leave rounding out"):
        Finishing(**SCHEMES["q4_0"], rounding="compensated")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rounding"):
        Finishing(**SCHEMES["q4_0"], scales="alone", rounding="down")  # type: ignore[arg-type]
