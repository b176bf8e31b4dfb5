"""The path that a user names is found, and the files next to it say how it is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.service.served import as_asked, find_served
from autodistill.testing import save_tiny_teacher


def test_a_file_and_its_folders_are_served_as_serve_json_says(export: Path, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(export, out / "gguf")
    for named in (student, export, str(export), out):
        found = find_served(named, tmp_path)
        assert (found.runtime, found.context, found.streams) == ("llama.cpp", 512, 2)
        assert (found.cache_types, found.flash_attention) == (("f16", "f16"), "auto")
    document = json.loads((export / "serve.json").read_text())
    document |= {"cache_type_k": "q8_0", "cache_type_v": "q4_0", "flash_attention": "on"}
    (out / "gguf" / "serve.json").write_text(json.dumps(document))
    assert find_served(out, tmp_path).cache_types == ("q8_0", "q4_0")
    # It says nothing about another file.
    (out / "gguf" / "serve.json").write_text(json.dumps(document | {"model": "another.gguf"}))
    assert find_served(out, tmp_path).context is None


def for_vllm(folder: Path, **promise: Any) -> Path:
    """Return a folder for vLLM, which promised something."""
    stored = {"context": 640, "streams": 3, "memory_bytes": 12_000_000_000, "device": "NVIDIA GeForce RTX 4090"}
    save_tiny_teacher(folder, layers=2)
    document = {"promise": stored | {"latency": [], "measured": {}} | promise}
    (folder / "export.json").write_text(json.dumps(document))
    return folder


def test_a_folder_for_vllm_is_served_as_its_promise_says(tmp_path: Path) -> None:
    found = find_served(for_vllm(tmp_path / "student"), tmp_path)
    assert (found.runtime, found.context, found.streams) == ("vllm", 640, 3)
    assert found.gpu_share == pytest.approx(12e9 / (24564 * 2**20), abs=0.011)
    assert as_asked(found, None, None, 10**6) == found
    assert as_asked(found, 100, 3, 10**6).gpu_share == found.gpu_share
    # The promised memory was not for so many tokens, and vLLM would not start with it.
    assert as_asked(found, None, 4, 10**6).gpu_share is None
    assert find_served(for_vllm(tmp_path / "other", device="Raspberry Pi 5 8GB"), tmp_path).gpu_share is None
    (tmp_path / "student" / "export.json").write_text(json.dumps({"promise": None}))
    assert find_served(tmp_path / "student", tmp_path).context is None
    with pytest.raises(InputError, match=r"the streams in .* must be"):
        find_served(for_vllm(tmp_path / "many", streams=10**9), tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cache_type_k": "q3"}, "none of f16"),
        ({"context": "many"}, "context"),
        ({"context": 1}, "2 to"),
        ({"slots": 0}, "at least 1"),
        ({"flash_attention": "maybe"}, "flash_attention"),
    ],
)
def test_a_serve_json_that_is_none_is_refused(export: Path, tmp_path: Path, changed: dict, words: str) -> None:
    folder = tmp_path / "gguf"
    shutil.copytree(export, folder)
    document = json.loads((folder / "serve.json").read_text())
    (folder / "serve.json").write_text(json.dumps(document | changed))
    with pytest.raises(InputError, match=words):
        find_served(folder, tmp_path)


def test_context_and_streams_are_those_asked_for_within_what_the_student_reads(student: Path, tmp_path: Path) -> None:
    found = find_served(student, tmp_path)
    assert as_asked(found, None, None, 4096).context == 512
    assert as_asked(found, None, None, 100).context == 100
    assert (as_asked(found, 64, 5, 100).context, as_asked(found, 64, 5, 100).streams) == (64, 5)
    with pytest.raises(InputError, match="reads 100 tokens"):
        as_asked(found, 101, None, 100)
    shutil.copy(student, tmp_path / "alone.gguf")
    assert as_asked(find_served(tmp_path / "alone.gguf", tmp_path), None, None, 10**6).context == 2048


def test_what_nothing_here_serves_is_refused_with_what_to_do(export: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    two = tmp_path / "two"
    shutil.copytree(export, two)
    shutil.copy(student, two / "second.gguf")
    for named, words in (
        (tmp_path / "empty", "export with --to gguf"),
        (tmp_path / "text.txt", "no .gguf file"),
        (tmp_path / "gone.gguf", "there is no"),
        (two, "name one of them"),
        ("gone", "there is no file, folder or run 'gone', and there are no runs"),
        ("/gone/student", "there is no /gone/student: give a .gguf file, an exported folder, a run or a row"),
        ("./gone", "there is no ./gone: give a .gguf file, an exported folder, a run or a row"),
    ):
        with pytest.raises(InputError, match=words):
            find_served(named, tmp_path / "runs")
    with pytest.raises(InputError, match="--row names a row of a run"):
        find_served(student, tmp_path, "t001")


def test_of_a_run_what_it_exported_is_served_and_of_another_row_the_command_is_told(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "search.json").write_text("{}")
    with pytest.raises(InputError, match="has exported no student yet"):
        find_served("first", tmp_path / "runs")
    shutil.copytree(export, run / "student" / "gguf")
    (run / "student" / "gguf" / "export.json").write_text(json.dumps({"row": "t001-gguf-q8_0"}))
    for named in ("first", run):
        assert find_served(named, tmp_path / "runs").path.parent == RunFolder.open(run.parent, "first").student("gguf")
    assert find_served("first", tmp_path / "runs", "t001-gguf-q8_0").context == 512
    with pytest.raises(InputError, match=r"autodistill export .*first --row t002 --to gguf --out students/t002"):
        find_served("first", tmp_path / "runs", "t002")


def test_a_folder_of_safetensors_is_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_served(tmp_path, tmp_path).runtime == "vllm"
