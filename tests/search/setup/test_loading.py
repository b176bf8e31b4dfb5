"""What is reported about a teacher once it is loaded, and what is refused before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.errors import InputError
from autodistill.hardware.machine import Machine
from autodistill.search.planning.placement import Place, Share
from autodistill.search.setup import loading
from autodistill.search.setup.loading import load
from autodistill.strategy.space import Space
from autodistill.testing import save_tiny_teacher


def test_a_model_of_another_tokenizer_is_refused_before_any_weights_are_obtained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model = (save_tiny_teacher(tmp_path / str(size), vocabulary=size) for size in (300, 280))
    monkeypatch.setattr(loading, "materialize", lambda *_: pytest.fail("weights were obtained"))
    config: Any = SimpleNamespace(
        teacher=resolve_teacher(str(teacher)), request=None, candidates=(), space=SimpleNamespace(models=(str(model),))
    )
    with pytest.raises(InputError, match=f"needs one vocabulary: {model} lacks"):
        load(config, Place(here=Machine(cpus=1, memory_bytes=1), machines=(), share=Share()))


def test_a_student_that_writes_is_not_trained_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(save_tiny_teacher(tmp_path / "teacher"))
    monkeypatch.setattr(loading, "materialize", lambda *_: pytest.fail("weights were obtained"))
    dimensions: dict[str, Any] = {
        "distillation.signal": {"choices": ["online"]},
        "distillation.signal_tokens": {"choices": [0]},
        # Only labels count, except in the phase, which asks the teacher all the same.
        "distillation.divergence_weight": {"choices": [0.0]},
        "distillation.on_policy": {"choices": {"none": None, "half": {"length": 8}}},
    }
    space = Space(dimensions)
    config: Any = SimpleNamespace(
        teacher=resolve_teacher(teacher), request=None, candidates=(), stored=None, space=space
    )
    place = Place(here=Machine(cpus=1, memory_bytes=1), machines=(), share=Share(processes=2))
    with pytest.raises(InputError, match=r"in one process.*leave on_policy out"):
        load(config, place)
    with pytest.raises(InputError, match=r"signal top-k is of the text alone.*when: {distillation.signal: \[online\]}"):
        Space({"distillation.on_policy": dimensions["distillation.on_policy"]})


@pytest.mark.parametrize(
    ("runtime", "stored", "gpu", "found"),
    [
        ("llama.cpp", None, False, 25_000_000),
        ("onnxruntime", None, False, 0),
        ("llama.cpp", None, True, 0),
        # A resumed run keeps what it planned with, or what an earlier version predicted.
        ("llama.cpp", {"process_bytes": 24_000_000}, False, 24_000_000),
        ("llama.cpp", {}, False, 0),
    ],
)
def test_the_process_is_measured_where_it_counts_and_once_in_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
    stored: dict[str, int] | None,
    gpu: bool,
    found: int,
) -> None:
    monkeypatch.setattr(loading, "measured_process_bytes", lambda folder, vocabulary, cache: 25_000_000)
    monkeypatch.setattr(loading, "on_gpu", lambda budget: gpu)
    config: Any = SimpleNamespace(
        stored=None if stored is None else {"teacher": stored},
        space=SimpleNamespace(solved=False, deployments=(SimpleNamespace(runtime=runtime),)),
        budget=None,
        cache=tmp_path,
    )
    spec: Any = SimpleNamespace(vocabulary=288)
    assert loading._process_bytes(config, tmp_path, spec) == found
