"""Altered records of a run: whatever they contain, each command names the file in one line."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.cli.app import main
from autodistill.export.gguf import GgufExporter
from autodistill.export.promise import RECORD
from autodistill.hardware.budget import Budget
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish import export_run
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import write_json
from tests.search.conftest import untimed

SPACE = """
name: small
dimensions:
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: transformers, format: huggingface, bits: 16, group_size: 0}
baselines: [logit_kd]
"""
_DEEP = "[" * 100_000
# Replacements for a value. The text of some is not strict JSON.
WRONG: dict[str, Any] = {
    "null": None,
    "text": "odd",
    "list": [],
    "mapping": {},
    "true": True,
    "negative": -1,
    "huge": 10**400,
    "infinite": float("inf"),
    "nan": float("nan"),
    "long": "x" * 100_000,
}
_GONE = object()
# The message for a log without a whole line, from a search killed at once, or with only rows before the end.
_NOTHING = "there is no student that was trained to the end"


def places(record: Any, depth: int = 3, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of a record's fields, including nested ones. Of a list, only the first item is visited."""
    items = record.items() if isinstance(record, dict) else enumerate(record[:1]) if isinstance(record, list) else ()
    for key, value in items:
        yield (*before, key)
        if depth > 1:
            yield from places(value, depth - 1, (*before, key))


def altered(record: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a record with another value in one place, or without that field."""
    made = copy.deepcopy(record)
    *way, last = place
    inside = made
    for key in way:
        inside = inside[key]
    if value is _GONE:
        del inside[last]
    else:
        inside[last] = value
    return made


def variants(record: Any, depth: int = 3) -> Iterator[tuple[str, str]]:
    """Yield texts of a record, each with one field missing or replaced, and the description of the change."""
    for place in places(record, depth):
        for name, value in ({"gone": _GONE} | WRONG).items():
            # The limit of digits only applies to reading.
            yield f"{'.'.join(map(str, place))} {name}", json.dumps(altered(record, place, value))


FILES: dict[str, bytes] = {
    "empty": b"",
    "nothing": b"{}",
    "list": b"[]",
    "text": b'"x"',
    "bytes": bytes(range(256)),
    "deep": _DEEP.encode(),
    "digits": b'{"event": ' + b"9" * 10_000 + b"}",
    "newlines": b"\n\n\n",
    "event": b'{"event": "row"}\n',
    "unknown": b'{"event": "later", "more": 1}\n',
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run that has finished and opened its test split."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "space.yaml").write_text(SPACE)
    request = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=str(save_tiny_teacher(folder / "teacher", layers=2)),
        data=str(tiny_text(folder / "text", documents=30, sentences=24)),
        space=str(folder / "space.yaml"),
        tokens=1024,
        trials=1,
        runner="inline",
        runs=folder / "runs",
        name="run",
        cache=folder / "cache",
    )
    with untimed():
        search(request)
    return folder / "runs"


@pytest.fixture
def out(real: Path, tmp_path: Path) -> Path:
    """Return a copy of the run."""
    shutil.copytree(real, tmp_path / "runs")
    return tmp_path / "runs"


def commands(out: Path) -> list[list[str]]:
    """Return the commands that read a run's records."""
    where = ["--runs", str(out)]
    export = ["export", "run", "--to", "huggingface", "--runs", str(out), "--out", str(out / "exported")]
    return [["pick", "--budget", "1GB", *where], ["leaderboard", *where], ["explain", "run", *where], export]


class Told:
    """Counts what commands say about altered records, and keeps each wrong reaction."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.wrong: list[str] = []
        self.refused = self.taken = 0

    def run(self, words: list[str], what: str, path: Path) -> None:
        """Run a command. It must accept the altered record, or name its file in one line."""
        try:
            code = main(words)
        except BaseException as error:
            self._capsys.readouterr()
            self.wrong.append(f"{words[0]}: {what}: {type(error).__name__}: {str(error)[:200]}")
            return
        err = self._capsys.readouterr().err
        shutil.rmtree(path.parent.parent / "exported", ignore_errors=True)
        if code == 0:
            self.taken += 1
            return
        self.refused += 1
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if code not in (2, 3) or len(lines) != 1 or "Traceback" in err or len(err) > 3000:
            self.wrong.append(f"{words[0]}: {what}: exit {code}: {err[-300:]}")
        elif code == 2 and path.name not in lines[0] and not (path.name == "trials.jsonl" and _NOTHING in lines[0]):
            self.wrong.append(f"{words[0]}: {what}: does not name {path.name}: {lines[0][:300]}")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    # Only packing is replaced. The student's files have their own checksums.
    monkeypatch.setattr(GgufExporter, "export", _packed)
    for name in ("verify", "simulate", "prove"):
        monkeypatch.setattr(export_run, name, lambda *given: None)
    monkeypatch.setattr(export_run._Model, "text", (None, "no text"))
    monkeypatch.setattr(export_run, "write_record", lambda folder, *given: write_json(folder / RECORD, {"proof": None}))
    monkeypatch.setattr("autodistill.cli.commands.quiet_libraries", lambda *references: None)
    return Told(capsys)


def _packed(exporter: Any, student: Path, deployment: Any, out: Path, **label: Any) -> Any:
    out.mkdir(parents=True)
    return SimpleNamespace(path=out)


def _write(path: Path, data: bytes, run: RunFolder) -> None:
    """Write a file, and make the table of rows older, so that the log is read instead."""
    path.write_bytes(data)
    os.utime(run.leaderboard_file, (1, 1))


# Some of each record's several hundred fields, in addition to the whole files. The slow tests take all.
_FEW, _ALL = 4, 10**6


def _sample(found: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return random.Random(0).sample(found, min(count, len(found)))


def _tell(cases: list[tuple[str, str]], path: Path, run: RunFolder, told: Told, every: bool) -> None:
    """Let every command read each case, or one command in turn."""
    words = commands(run.path.parent)
    for place, (what, text) in enumerate(cases):
        _write(path, text.encode(), run)
        for one in words if every else [words[place % len(words)]]:
            told.run(one, what, path)
    assert not told.wrong, f"{len(told.wrong)} wrong:\n" + "\n".join(told.wrong[:40])
    assert told.refused >= len(cases) / 4


@pytest.mark.parametrize("count", [_FEW, pytest.param(_ALL, marks=pytest.mark.slow)])
def test_search_json_of_any_content_is_refused_by_name_or_taken(out: Path, told: Told, count: int) -> None:
    run = RunFolder.open(out, "run")
    path = run.search_file
    whole = [(name, data.decode(errors="replace")) for name, data in FILES.items()]
    cases = [*whole, *_sample(list(variants(json.loads(path.read_text()))), count)]
    _tell(cases, path, run, told, count == _ALL)


@pytest.mark.parametrize("count", [_FEW, pytest.param(_ALL, marks=pytest.mark.slow)])
def test_a_log_of_any_content_is_refused_by_name_or_taken(out: Path, told: Told, count: int) -> None:
    run = RunFolder.open(out, "run")
    path = run.events.path
    lines = path.read_text().splitlines()
    kinds = {json.loads(line)["event"]: place for place, line in enumerate(lines)}
    found = []
    for kind, place in kinds.items():
        for what, text in variants(json.loads(lines[place])):
            found.append((f"{kind}: {what}", "\n".join([*lines[:place], text, *lines[place + 1 :]]) + "\n"))
    texts = {name: data.decode(errors="replace") for name, data in FILES.items()}
    cases = list(texts.items())
    cases += [(f"line {name}", "\n".join([*lines[:3], text, *lines[3:]])) for name, text in texts.items()]
    for place in range(len(lines)):
        cases.append((f"first {place}", "\n".join(lines[:place]) + "\n"))
        cases.append((f"without {place}", "\n".join(lines[:place] + lines[place + 1 :]) + "\n"))
    cases = [*(cases if count == _ALL else _sample(cases, count)), *_sample(found, count)]
    _tell(cases, path, run, told, count == _ALL)


@pytest.mark.parametrize("count", [6 * _FEW, pytest.param(_ALL, marks=pytest.mark.slow)])
def test_a_table_of_any_content_is_refused_by_name_or_taken(out: Path, told: Told, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = RunFolder.open(out, "run")
    path = run.leaderboard_file
    table, data = pq.read_table(path), path.read_bytes()
    for name, content in (FILES | {"half": data[: len(data) // 2], "flipped": data[:400] + b"x" + data[401:]}).items():
        path.write_bytes(content)
        told.run(commands(out)[0], name, path)
    columns = {
        "text": pa.array(["{"] * len(table)),
        "numbers": pa.array([1] * len(table)),
        "null": pa.nulls(len(table)),
        "list": pa.array(["[]"] * len(table)),
        "gone": None,
    }
    cases = _sample([(name, kind) for name in table.column_names for kind in columns], count)
    for name, kind in cases:
        values, place = columns[kind], table.column_names.index(name)
        changed = table.drop_columns([name]) if values is None else table.set_column(place, name, values)
        pq.write_table(changed, path)
        told.run(commands(out)[0], f"{name} {kind}", path)
    assert not told.wrong, "\n".join(told.wrong[:20])
    assert told.refused >= len(cases) / 4


@pytest.mark.slow
def test_a_ledger_of_any_content_is_refused_by_name_or_taken(out: Path, told: Told) -> None:
    run = RunFolder.open(out, "run")
    path = out / "test_openings.jsonl"
    assert path.exists()
    record = json.loads(path.read_text().splitlines()[0])
    lines = [(name, data.decode(errors="replace")) for name, data in FILES.items() if name != "newlines"]
    for what, text in (*lines, *variants(record)):
        path.write_bytes(text.encode() + b"\n")
        told.run(["explain", run.name, "--runs", str(out)], what, path)
    assert not told.wrong, "\n".join(told.wrong[:20])
    assert told.refused > 15


@pytest.mark.parametrize("name", ["search.json", "trials.jsonl", "leaderboard.parquet", "../test_openings.jsonl"])
def test_nobody_waits_for_the_writer_of_a_pipe(out: Path, told: Told, name: str) -> None:
    path = (out / "run" / name).resolve()
    path.unlink()
    os.mkfifo(path)
    for words in commands(out):
        told.run(words, "pipe", path if name != "search.json" else out / "there is no run")
    assert not [line for line in told.wrong if "does not name" not in line], told.wrong


def test_of_several_runs_a_bad_one_is_left_out_and_named_and_refused_if_it_is_asked_for(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out / "run", out / "bad")
    (out / "bad" / "search.json").write_text("{}")
    for words in (["leaderboard"], ["pick", "--budget", "1GB"]):
        assert main([*words, "--runs", str(out)]) == 0
        assert f"warning: the run bad is left out: {out / 'bad' / 'search.json'}" in capsys.readouterr().err
        assert main([*words, "run", "--runs", str(out)]) == 0
        assert "warning" not in capsys.readouterr().err
        assert main([*words, "run", "bad", "--runs", str(out)]) == 2
        assert str(out / "bad" / "search.json") in capsys.readouterr().err


def test_what_a_later_version_wrote_is_refused_as_that(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "run" / "search.json"
    write_json(path, json.loads(path.read_text()) | {"schema_version": 2})
    assert main(["leaderboard", "--runs", str(out)]) == 2
    assert "it is of version 2, and this autodistill reads up to 1: upgrade it" in capsys.readouterr().err
