"""Altered records of runs: `search.json`, the log, the table and the ledger, for all commands that read a run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit
from tests.hostile.spoils import Spoil, as_folder, as_pipe, change, paths, without, write

_REFERENCE = Path(__file__).parents[2] / "results" / "reference"
_RUN, _OTHER = "search-20261126-101010", "search-20261128-114135"
_ROW, _SMALL, _LARGE = "t001-huggingface", "teacher-gguf-q4_0", "teacher"
# Each command reads only records, or reads them before it would load anything. Teacher and students do not exist.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "leaderboard": ("leaderboard", _RUN, "--runs", "runs"),
    "merge": ("leaderboard", _RUN, _OTHER, "--merge", "--parquet", "all.parquet", "--runs", "runs"),
    "explain": ("explain", _RUN, "--runs", "runs"),
    "show": ("show", _ROW, "--on", _RUN, "--runs", "runs"),
    "report": ("report", _RUN, "--runs", "runs"),
    "compare": ("compare", _RUN, _OTHER, "--runs", "runs"),
    "study": ("study", _RUN, "--runs", "runs"),
    "log": ("log", _RUN, "--to", "tensorboard=board", "--runs", "runs"),
    "cascade": ("cascade", _RUN, "--rows", f"{_SMALL},{_LARGE}", "--runs", "runs", "--cache", "cache"),
    "reproduce": ("reproduce", _ROW, "--on", _RUN, "--runs", "runs", "--cache", "cache"),
    "export": ("export", _RUN, "--to", "gguf", "--out", "students", "--runs", "runs"),
    "pick": ("pick", "--budget", "1GB", "--runs", "runs", "--cache", "cache"),
    "resume": ("search", "--resume", "--name", _RUN, "--runs", "runs", "--cache", "cache", "--runner", "inline"),
}
_VALUES: tuple[Any, ...] = (None, 7, -1, 1e308, "", "x", "\ud800", [], [[]], {}, {"": None}, True, "9" * 5_000)
_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n",
    "object": b"{}\n",
    "list": b"[]\n",
    "null": b"null\n",
    "torn": b'{"event": "row", "row": {',
    "no-text": b"\xff\xfe\x00",
    "nul": b"\0" * 4096,
    "deep": b'{"event":' + b"[" * 100_000,
    "digits": b'{"event": ' + b"9" * 5_000 + b"}\n",
    "nan": b'{"event": "session", "time": NaN}\n',
    "half": b'{"event": "\\ud800"}\n',
    "unknown": b'{"event": "surprise", "time": "2026-01-01T00:00:00+00:00"}\n',
}


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    for name, spoil in _spoils(dice).items():
        for command in dice.sample(sorted(_COMMANDS), 4):
            yield Case(
                area="run_records",
                name=f"{name}-{command}",
                argv=_COMMANDS[command],
                make=partial(_make, spoil=spoil),
                # If no row is left, nothing fits for pick. A search with nothing to do is finished.
                codes=(0, 2, 3),
            )


def _spoils(dice: random.Random) -> dict[str, Spoil]:
    """Return ways to alter the folder of a run."""
    asked = json.loads((_REFERENCE / _RUN / "search.json").read_text())
    log = (_REFERENCE / _RUN / "trials.jsonl").read_text().splitlines()
    table = (_REFERENCE / _RUN / "leaderboard.parquet").read_bytes()
    kinds = {json.loads(line)["event"]: number for number, line in enumerate(log)}
    found: dict[str, Spoil] = {}
    for file in ("search.json", "trials.jsonl", "leaderboard.parquet", "../test_openings.jsonl"):
        short = Path(file).name.partition(".")[0]
        for name, content in _TEXTS.items():
            found[f"{short}-{name}"] = partial(write, file=file, content=content)
        found[f"{short}-none"] = partial(without, file=file)
        found[f"{short}-folder"] = partial(as_folder, file=file)
        found[f"{short}-pipe"] = partial(as_pipe, file=file)
    for field in asked:
        found[f"search-without-{field}"] = partial(change, file="search.json", path=[field], lost=True)
        found[f"search-{field}"] = partial(change, file="search.json", path=[field], value=dice.choice(_VALUES))
    for kind, number in kinds.items():
        event = json.loads(log[number])
        for path in dice.sample(sorted(paths(event, 9)), min(6, len(list(paths(event, 9))))):
            more = {"lost": True} if dice.random() < 0.3 else {"value": dice.choice(_VALUES)}
            name = f"log-{kind}-{'.'.join(path)}"
            found[name] = partial(change, file="trials.jsonl", line=number, path=list(path), **more)
    for number in range(6):
        lines = [line for line in log if dice.random() < 0.7]
        found[f"log-some-{number}"] = partial(write, file="trials.jsonl", content="\n".join(lines).encode() + b"\n")
        mixed = dice.sample(log, len(log))
        found[f"log-mixed-{number}"] = partial(write, file="trials.jsonl", content="\n".join(mixed).encode() + b"\n")
        end = dice.randrange(len(table))
        found[f"table-cut-{number}"] = partial(write, file="leaderboard.parquet", content=table[:end])
        flipped = bytearray(table)
        flipped[dice.randrange(len(table))] ^= 1 << dice.randrange(8)
        found[f"table-flip-{number}"] = partial(write, file="leaderboard.parquet", content=bytes(flipped))
    found["log-twice"] = partial(write, file="trials.jsonl", content="\n".join([*log, *log]).encode() + b"\n")
    found["table-columns"] = partial(_other_table, columns={"row_id": ["a"], "accuracy": ["b"]})
    found["table-numbers"] = partial(_other_table, columns={"row_id": [1], "trial": [2], "kind": [3]})
    found["table-no-rows"] = partial(_other_table, columns={"row_id": []})
    return found


def _make(folder: Path, spoil: Spoil) -> None:
    runs = folder / "runs"
    runs.mkdir()
    for name in (_RUN, _OTHER):
        shutil.copytree(_REFERENCE / name, runs / name, ignore=shutil.ignore_patterns("*.png"))
        # A command that would load the teacher ends here.
        change(runs / name, "search.json", ("teacher", "reference"), "./gone")
    shutil.copyfile(_REFERENCE / "test_openings.jsonl", runs / "test_openings.jsonl")
    spoil(runs / _RUN)


def _other_table(run: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), run / "leaderboard.parquet")
