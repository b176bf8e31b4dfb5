"""The promise of a row, written into a record and read back as limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.export.promise import promise_of
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.runs.results.row import Row
from autodistill.service.promise import find_promise, read_promise
from autodistill.strategy.deployment import Deployment

Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
PI = find_device("pi 5 8gb", devices())


def row(**changes: Any) -> Row:
    measured = {
        "memory_bytes": 200_000_000,
        "memory_source": "measured",
        "latency_ms": 10.0,
        "latency_source": "measured",
        "machine": "a board",
        "context": 1024,
        "batch": 2,
        "other": {"ttft_ms": 80.0, "latency_detail": {"loads": [{"prompt_tokens": 64}]}},
    }
    given = {"row_id": "t001-gguf-q8_0", "trial": "t001", "kind": "student", "name": "s", "deployment": Q8}
    return Row(**{**given, "status": "completed", "feasible": True, **measured, **changes})


def limits(stored: dict[str, Any], margin: float = 0.25) -> dict[str, tuple[float, int, bool]]:
    promise = read_promise(json.loads(json.dumps(stored)), "s", margin, "here")
    return {one.figure: (one.most, one.streams, one.requested) for one in promise.limits}


def test_what_was_asked_for_is_the_limit_and_what_was_not_is_held_to_what_was_measured() -> None:
    asked = DeviceBudget(
        memory_bytes=300_000_000, device=PI, latency=parse_latency("ttft_p95=2s,tpot_p99=50ms", 4), context=512
    )
    assert limits(promise_of(row(), asked)) == {
        "ttft_p95": (2.0, 4, True),
        "tpot_p99": (0.05, 4, True),
        "memory": (3e8, 2, True),
    }
    assert read_promise(promise_of(row(), asked), "s", 0.25, "here").prompt == 512
    free = Budget(memory_bytes=NO_LIMIT)
    found = limits(promise_of(row(), free), margin=0.5)
    assert found["ttft_p50"] == (pytest.approx(0.12 + 0.01), 1, False)
    assert found["tpot_p95"] == (pytest.approx(0.015), 1, False)
    assert found["memory"] == (pytest.approx(3e8), 2, False)
    assert read_promise(promise_of(row(), free), "s", 0.25, "here").prompt == 64


def test_what_was_only_predicted_or_is_a_gpus_is_not_promised() -> None:
    predicted = row(memory_source="predicted", latency_source="predicted")
    assert limits(promise_of(predicted, Budget(memory_bytes=10**9))) == {"memory": (1e9, 2, True)}
    with pytest.raises(InputError, match="promises nothing"):
        limits(promise_of(predicted, Budget(memory_bytes=NO_LIMIT)))
    on_gpu = row(other={"memory_on": "discrete-gpu"})
    assert "memory" not in limits(promise_of(on_gpu, Budget(memory_bytes=10**9)))
    for_gpu = DeviceBudget(memory_bytes=10**9, device=find_device("4090", devices()))
    assert "memory" not in limits(promise_of(row(), for_gpu)), "nor of a GPU that is not here"
    assert promise_of(row(), Budget(memory_bytes=10**9), "gguf-q4_0") is None


def test_the_promise_of_an_export_is_in_its_record(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    shutil.copytree(export, folder)
    with pytest.raises(InputError, match=r"no export\.json"):
        find_promise(folder, tmp_path)
    stored = promise_of(row(), Budget(memory_bytes=10**9))
    (folder / "export.json").write_text(json.dumps({"row": "t001-gguf-q8_0", "promise": stored}))
    (file,) = folder.glob("*.gguf")
    for named in (folder, file):
        found = find_promise(named, tmp_path)
        assert (found.of, found.context, found.streams) == ("t001-gguf-q8_0", 1024, 2)
    (folder / "export.json").write_text(json.dumps({"row": "x", "promise": None}))
    with pytest.raises(InputError, match="has no promise"):
        find_promise(folder, tmp_path)
    with pytest.raises(InputError, match="--margin"):
        find_promise(folder, tmp_path, -1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"context": "x"}, "context"),
        (
            {"latency": [{"quantity": "all", "percentile": 5, "seconds": 1.0, "streams": 1, "prompt": None}]},
            "not valid",
        ),
        (
            {"latency": [{"quantity": "ttft", "percentile": 0, "seconds": 1.0, "streams": 1, "prompt": None}]},
            "not valid",
        ),
        ({"latency": 3}, "latency"),
        ({"memory_bytes": None, "measured": {"memory_bytes": "much", "tpot_p95_ms": -1}}, "promises nothing"),
    ],
)
def test_a_promise_that_is_none_is_refused(changed: dict[str, Any], words: str) -> None:
    stored = promise_of(row(), Budget(memory_bytes=10**9))
    assert stored is not None
    with pytest.raises(InputError, match=words):
        read_promise(stored | changed, "s", 0.25, "here")
