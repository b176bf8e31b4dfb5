"""Profiles of a tiny strategy and of exports in their real runtimes, and requests that name nothing to profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import autodistill as ad
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.export.gguf import GgufExporter
from autodistill.export.huggingface import HuggingFaceExporter
from autodistill.profiling.request import ProfileRequest, described
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher

Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("profile") / "teacher", layers=6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where all tests of the file keep this machine's measurement."""
    return tmp_path_factory.mktemp("cache")


def _trained(teacher: Path, cache: Path, out: Path, strategy: str, **changes: Any) -> dict[str, Any]:
    sizes = {"step_tokens": 128, "sequence_length": 64, "steps": 2, "threads": 1}
    return ad.profile(strategy, teacher=str(teacher), cache=cache, out=out, **(sizes | changes))


@pytest.mark.parametrize("strategy", ["logit_kd", "gkd", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_step_is_parted_and_held_to_its_floor(
    teacher: Path, cache: Path, tmp_path: Path, strategy: str
) -> None:
    found = _trained(teacher, cache, tmp_path / "out", strategy)
    assert sum(part["ms"] for part in found["parts"]) == pytest.approx(found["traced_step_ms"], rel=0.01)
    assert found["floor_ms"] < found["step_ms"]
    assert found["each_step"]["operations"] > 100
    assert found["advice"]
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    steps = [one for one in trace["traceEvents"] if one.get("name") == "training step" and one.get("ph") == "X"]
    assert len(steps) == 2
    assert json.loads((tmp_path / "out" / "profile.json").read_text()) == json.loads(json.dumps(found))
    assert "tokens/s" in described(found)


@pytest.mark.slow
def test_a_strategy_that_runs_its_teacher_has_a_higher_floor(teacher: Path, cache: Path, tmp_path: Path) -> None:
    cached, live = (_trained(teacher, cache, tmp_path / name, name) for name in ("logit_kd", "gkd"))
    assert live["floor_ms"] / live["student_parameters"] > cached["floor_ms"] / cached["student_parameters"]


def test_serving_in_llama_cpp_is_timed_by_its_clock(teacher: Path, cache: Path, tmp_path: Path) -> None:
    artifact = GgufExporter().export(teacher, Q8, tmp_path / "gguf")
    found = ad.profile(artifact.path.parent, cache=cache, out=tmp_path / "out", prompt=40, decoded=8, threads=1)
    assert [part["part"] for part in found["parts"]] == ["reading the prompt", "writing a token"]
    assert all(part["ms"] > part["floor_ms"] > 0 for part in found["parts"])
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["reading the prompt", *["writing a token"] * 8]
    assert len(found["advice"]) == 2
    assert "llama.cpp" in described(found)


def test_serving_in_transformers_is_traced_by_operation(teacher: Path, cache: Path, tmp_path: Path) -> None:
    artifact = HuggingFaceExporter().export(teacher, IN_16_BITS, tmp_path / "huggingface")
    found = ad.profile(artifact.path, cache=cache, out=tmp_path / "out", prompt=40, decoded=8, threads=1)
    assert found["operations"].keys() == {"reading the prompt", "writing a token"}
    assert found["operations"]["writing a token"]["ms"]["matrix products"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"trace-prompt.json", "trace-tokens.json"}
    assert "matrix products" in described(found)


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("gkd", {"prompt": 9}, "--prompt does not apply to a strategy's training"),
        ("nothing-of-the-kind", {}, "nothing-of-the-kind"),
        ("gkd", {"step_tokens": 100, "sequence_length": 64}, "multiple of"),
        ("gkd", {"step_tokens": 1024, "sequence_length": 1024}, "beyond the teacher's context"),
        ("gkd", {"threads": 10**6}, "more than the cores"),
        ("written", {}, "random tokens"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(
    teacher: Path, cache: Path, tmp_path: Path, target: str, options: dict[str, Any], said: str
) -> None:
    training = {} if "prompt" in options else {"teacher": str(teacher)}
    with pytest.raises(InputError, match=said):
        ad.profile(target, cache=cache, out=tmp_path, **training, **options)


def test_options_of_training_say_nothing_of_a_model(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--steps does not apply to a served model"):
        ProfileRequest(teacher, steps=3)
    with pytest.raises(InputError, match="do not fit the model's context"):
        ad.profile(teacher, prompt=1000, out=tmp_path)


def test_a_trace_folder_that_cannot_be_written_ends_before_any_work(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for target, more in (("gkd", ["--teacher", str(teacher)]), (str(teacher), [])):
        assert main(["profile", target, *more, "--out", str(tmp_path / "file" / "x")]) == 2
        said = capsys.readouterr().err
        assert "cannot write into" in said
        assert "loading" not in said
