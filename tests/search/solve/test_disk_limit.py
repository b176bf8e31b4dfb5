"""What remains of scores after a kill, on a full disk, and beyond the disk's limit; and models that are refused."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from autodistill.export.gguf import GgufExporter
from autodistill.export.verify import verify
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.search.solve import SolveRequest, solve
from autodistill.search.solve import library as scores
from autodistill.search.solve.disk_limit import mark_used
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils import json_files

SIZES: dict[str, Any] = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 64}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), seed=3, **SIZES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text"), documents=300)


def asked(teacher: Path, text: Path, cache: Path) -> SolveRequest:
    budgets = (Budget(memory_bytes=10**9, context=256),)
    load: dict[str, Any] = {"tokens": 2048, "sequence_length": 64}
    return SolveRequest(budgets=budgets, cache=cache, teacher=str(teacher), data=str(text), **load)


def dies(teacher: Path, text: Path, cache: Path, number: int) -> None:
    """End within the writing of a file of scores, so that nothing can be cleaned up. Each block writes one file."""
    put, written = json_files.put, []

    def dying(temporary: Path, path: Path) -> None:
        if path.parent.name == "solve":
            written.append(path)
        if len(written) == number:
            os._exit(9)
        put(temporary, path)

    scores._SAVED_SECONDS, json_files.put = 0.0, dying
    solve(asked(teacher, text, cache))


@pytest.fixture(scope="module")
def found(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return solve(asked(teacher, text, tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 9])
def test_a_process_that_is_killed_leaves_what_it_scored_and_the_same_solution(
    found: dict[str, Any], teacher: Path, text: Path, tmp_path: Path, number: int
) -> None:
    # The kill comes while the scores of the second block are written (those of the last block come first), or later.
    kind = "fork" if number == 9 else "spawn"  # "spawn" imports anew, with other hashes
    killed: Any = get_context(kind).Process(target=dies, args=(teacher, text, tmp_path, number))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    (file,) = (one for one in (tmp_path / "solve").glob("*.json") if not one.name.startswith("."))
    held = json_files.read_json(file)
    blocks = {name.split(".")[2] for name in held["passes"]["0"]}
    assert (blocks, len(held["exact"])) == (({"1"}, 0) if number == 2 else ({"0", "1"}, number - 4))
    told: list[str] = []
    again = solve(asked(teacher, text, tmp_path), told.append)
    assert again["solutions"] == found["solutions"]
    gradients = ["scoring all matrices by gradients, pass 1 of 1"] if number == 2 else []
    assert [line for line in told if "gradients" in line] == gradients


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_costs_no_solution(
    found: dict[str, Any], teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote = json_files.write_json
    saved: list[Path] = []

    def filling(path: Path, data: Any) -> None:
        if len(saved) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved.append(path)
        wrote(path, data)

    told: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(scores, "write_json", filling)
        full = solve(asked(teacher, text, tmp_path), told.append)
    assert full["solutions"] == found["solutions"]
    (line,) = (line for line in told if "cannot be kept" in line)
    assert "No space left on device" in line
    assert list(json_files.read_json(saved[0])["passes"]) == ["0"]
    told.clear()
    assert solve(asked(teacher, text, tmp_path), told.append)["solutions"] == found["solutions"]
    assert not any("gradients" in line for line in told)


def test_what_was_used_least_recently_is_removed_first_unless_it_is_in_use(tmp_path: Path) -> None:
    def made(name: str, age: int, size: int = 100) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b" " * size)
        when = path.stat().st_mtime - age
        os.utime(path, (when, when))
        return path

    mine, old, held = made("mine.json", 10**6), made("old.json", 5000), made("held.json", 9000)
    told, new = made("found/teacher.json", 7000), made("new.json", 10)
    half, fresh = made(".gone.1.json", 4000), made(".now.2.json", 10)
    lock = tmp_path / ".held.json.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        mark_used(mine, limit=500)
    assert not half.exists()
    assert not told.exists()
    assert all(path.exists() for path in (mine, held, new, fresh, old))
    mark_used(tmp_path / "next.json", limit=300)  # this file does not exist yet
    assert not held.exists()
    assert not old.exists()
    assert all(path.exists() for path in (mine, new, fresh))


@pytest.mark.slow  # its scores, its file and its run have their own tests
def test_a_gemma_is_solved_written_and_run(text: Path, tmp_path: Path) -> None:
    """Such a model has scaled embeddings, norms above one, norms of heads and sliding windows."""
    folder = save_tiny_teacher(tmp_path / "gemma", architecture="gemma3_text", **SIZES | {"layers": 3})
    spec = spec_from_config(json_files.read_json(folder / "config.json"))
    limit = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256)).smallest()[1].total_bytes + 50_000
    request = replace(asked(folder, text, tmp_path), budgets=(Budget(memory_bytes=limit, context=256),), tokens=512)
    found = solve(request)
    deployment = Deployment.from_json(found["solutions"][0]["solution"]["deployment"])
    solution = found["solutions"][0]["solution"]
    assert solution["bytes"] <= limit
    assert 0.4 < solution["predicted_kl"] / solution["calibration_kl"] < 2.5
    assert len(solution["types"]["matrices"]) > 1
    # For so small a model, the overhead of a process varies by more than the weights. No budget is checked here.
    artifact = GgufExporter().export(folder, deployment, tmp_path / "out")
    verify(GgufExporter(), artifact, folder, deployment)
    keys, values = deployment.cache_types
    with LlamaServer(artifact.path, 64, 1, cache_type_k=keys, cache_type_v=values) as server:
        assert len(server.complete([5, 6, 7], 8, ignore_end=True).tokens) == 8
