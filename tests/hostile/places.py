"""Further arguments of commands that read runs and exports: rows, trackers, places to write to, images, ports."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.cases import Case, Kit, nothing

_REFERENCE = Path(__file__).parents[2] / "results" / "reference"
_RUN, _OTHER = "search-20261126-101010", "search-20261128-114135"
_ODD = (
    "",
    " ",
    ".",
    "..",
    "/",
    "/proc/self/mem",
    "/dev/full",
    "a\x1b[31mb",
    "\udcff",
    "x" * 300,
    "no/such/folder/x",
    "--",
)
_PLACES = (*_ODD, "taken", "folder", "loop", "pipe", "sealed/x")
_TRACKERS = (
    *("", " ", "=", "tensorboard=", "tensorboard= ", "tensorboard=board,mlflow", "Tensorboard", "neptune", "mlflow"),
    *("mlflow=", "mlflow=http://[::1", "mlflow=ftp://x", "wandb", "wandb=", "wandb=a/b/c", "../tensorboard", "os"),
)
_ROWS = (
    *("", ",", "a", "a,", ",a", "a,b", "a,b,c", "teacher,teacher", "teacher", "none,teacher", "\udcff,teacher"),
    *("teacher-gguf-q4_0,teacher-gguf-q4_0", "teacher,teacher-gguf-q4_0", "t001-huggingface,none", "x" * 5_000),
)
_IMAGES = (
    *("", " ", "A", "a b", "a:b:c", "a@sha256:0", "-a", "a;touch ran", "a$(touch ran)", "a\nRUN touch ran", "a/../b"),
    *("x" * 300, "registry.example.com/", "registry.example.com:x/a", "a//b", "é", "a:", ":a", "\udcff"),
)
_NUMBERS = ("0", "-1", "1e3", "nan", "", "x", "1.5", "65536", "9" * 400, "9" * 5_000)


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    count = 0

    def case(
        *argv: str, make: Callable[[Path], object] = nothing, codes: tuple[int, ...] = (2,), name: str = ""
    ) -> Case:
        nonlocal count
        count += 1
        shown = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{argv[0]}-{argv[-2]}-{name}")
        return Case(area="places", name=f"{count:03d}-{shown[:40]}", argv=argv, make=make, codes=codes)

    exports = partial(_export, kit=kit)
    for tracker in _TRACKERS:
        yield case("log", _RUN, "--runs", "runs", "--to", tracker, make=_runs)
    for row in _ROWS:
        yield case("cascade", _RUN, "--runs", "runs", "--cache", "cache", "--rows", row, make=_runs)
    for image in _IMAGES:
        yield case("bundle", "export", "--out", "bundle", "--image", image, make=exports)
    for runtime in ("", "vllm", "onnxruntime", "llama.cpp", "LLAMACPP", "../x"):
        codes = (0,) if runtime == "llama.cpp" else (2,)
        yield case("bundle", "export", "--out", "bundle", "--runtime", runtime, make=exports, codes=codes)
    for more in (("--out", "b"), ("--image", "a"), ("--runtime", "vllm"), ("export",)):
        yield case("bundle", *more, "--check", "export", make=exports)
    yield case("bundle", "--image", "a")
    yield case("bundle", "export", "--image", "a", make=exports)
    for number in _NUMBERS:
        yield case("dashboards", "--out", "boards", "--port", number)
        for option in dice.sample(("--prompt", "--decoded", "--threads"), 2):
            every_core = option == "--threads" and number == "0"
            serving = ("profile", "export", "--out", "traced", "--cache", "cache")
            yield case(*serving, option, number, make=exports, codes=(0,) if every_core else (2,))
        for option in dice.sample(("--steps", "--step-tokens", "--sequence-length", "--threads"), 2):
            training = ("profile", "kd", "--teacher", str(kit.teacher), "--out", "traced", "--cache", "cache")
            # A step may have a thousand tokens.
            yield case(*training, option, number, codes=(0, 2) if number in ("1e3", "1.5") else (2,))
    for target in _ODD:
        for command in ("verify", "bundle"):
            yield case(command, *(("--out", "bundle") if command == "bundle" else ()), "--", target)
        yield case("profile", "--out", "traced", "--cache", "cache", "--", target)
    # Places where they write. Existing files are not overwritten, and a place that cannot be written is reported.
    writing: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
        "log": (("log", _RUN, "--runs", "runs", "--to"), _runs),
        "study": (("study", _RUN, "--runs", "runs", "--out"), _runs),
        "compare": (("compare", _RUN, _OTHER, "--runs", "runs", "--out"), _runs),
        "report": (("report", _RUN, "--runs", "runs", "--out"), _runs),
        "plots": (("report", _RUN, "--runs", "runs", "--plots"), _runs),
        "merge": (("leaderboard", _RUN, _OTHER, "--merge", "--runs", "runs", "--parquet"), _runs),
        "bundle": (("bundle", "export", "--out"), exports),
        "dashboards": (("dashboards", "--out"), nothing),
        "profile": (("profile", "export", "--cache", "cache", "--decoded", "1", "--prompt", "1", "--out"), exports),
        "reproduce": (("reproduce", "t001-huggingface", "--on", _RUN, "--runs", "runs", "--cache"), _runs),
    }
    for command, (argv, make) in writing.items():
        for place in _PLACES:
            given = f"tensorboard={place}" if command == "log" else place
            # A report is replaced in its place, and an existing folder may be written into. A device is never replaced:
            # a superuser could.
            codes = (2,) if place in ("/dev/full", "pipe") else (0, 2)
            yield case(*argv, given, make=partial(_taken, before=make), codes=codes, name=command)
    for runs in ((_RUN,), (_RUN, _RUN), (_RUN, "none"), (_RUN, ""), (_RUN, "../x"), (_RUN,) * 400, ("runs",)):
        yield case("compare", "--runs", "runs", *runs, make=_runs)
        yield case("leaderboard", "--merge", "--runs", "runs", *runs, make=_runs, codes=(0, 2))
    for by in (*_ODD, "nothing", "row_id", "task:", "accuracy,kl", "memory_bytes"):
        codes = (0, 2) if by == "memory_bytes" else (2,)
        yield case("leaderboard", _RUN, _OTHER, "--merge", "--runs", "runs", "--by", by, make=_runs, codes=codes)
    for number in _NUMBERS:
        # With more rows than a table has, all rows are shown.
        codes = (0, 2) if number in ("65536", "9" * 400) else (2,)
        yield case("leaderboard", _RUN, "--merge", "--runs", "runs", "--most", number, make=_runs, codes=codes)
    for name, content in _PARQUETS.items():
        make = partial(_parquet, content=content)
        yield case("leaderboard", "--merge", "--runs", "runs", _RUN, "rows.parquet", make=make, name=name)
    for name, place in (("folder", "folder"), ("pipe", "pipe"), ("loop", "loop"), ("device", "/dev/zero")):
        make = partial(_taken, before=_runs)
        yield case("leaderboard", "--merge", "--runs", "runs", _RUN, place, make=make, name=name)


_PARQUETS: dict[str, bytes] = {
    "empty": b"",
    "magic": b"PAR1",
    "magic-twice": b"PAR1" * 2,
    "length": b"PAR1" + b"\xff" * 8 + b"PAR1",
    "no-parquet": b'{"row_id": "a"}\n' * 100,
}


def _runs(folder: Path) -> None:
    for name in (_RUN, _OTHER):
        shutil.copytree(_REFERENCE / name, folder / "runs" / name, ignore=shutil.ignore_patterns("*.png"))


def _export(folder: Path, kit: Kit) -> None:
    shutil.copytree(kit.export, folder / "export")


def _parquet(folder: Path, content: bytes) -> None:
    _runs(folder)
    (folder / "rows.parquet").write_bytes(content)


def _taken(folder: Path, before: Callable[[Path], object]) -> None:
    """Make things that already exist at places where a file or folder should be written."""
    before(folder)
    (folder / "taken").write_text("mine")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "sealed").write_text("no folder")
