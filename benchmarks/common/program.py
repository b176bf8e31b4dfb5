"""The command line of a benchmark: `--help` says what it answers, and `--smoke` runs it in seconds.

This file imports nothing from AutoDistill at the top, because `mutants` may not load it in its own process.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# The tracked reports, whose records some programs read.
TRACKED = ROOT / "benchmarks" / "reports"
# Where reports and records are written. A smoke run has its own folder.
REPORTS = TRACKED

BOX = "like 10m: what is begun when it is over is ended, and the same command goes on with the rest"


def token_count(text: str) -> int:
    """Parse a count of tokens as AutoDistill's command line does, like 6144, 6k, 1.5M or 69M."""
    from autodistill.errors import InputError
    from autodistill.units import parse_tokens

    try:
        count = parse_tokens(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below zero: write one like 6144, 6k or 69M")
    return count


def parser_of(doc: str | None, *, seeds: int | None = None, time: bool = False) -> argparse.ArgumentParser:
    """Return a parser whose help is the program's docstring.

    Args:
        doc: Docstring of the program's module.
        seeds: Default of `--seeds`, if the program has several.
        time: Whether the program has a time budget.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for some seconds; all files are temporary")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help=f"how many, {seeds} by default")
    if time:
        from autodistill.units import parse_duration

        parser.add_argument("--time", type=parse_duration, default=float("inf"), help=BOX)
    return parser


def parse(parser: argparse.ArgumentParser, **small: Any) -> argparse.Namespace:
    """Parse the command line. A smoke run gets small defaults, and a temporary folder for everything that it writes.

    Args:
        parser: A parser made by `parser_of`.
        small: Defaults of a smoke run, by the argument's name. Values given on the command line are kept.
    """
    if "--smoke" in sys.argv[1:]:
        parser.set_defaults(**small)
    arguments = parser.parse_args()
    if arguments.smoke:
        _write_elsewhere()
    return arguments


def _write_elsewhere() -> None:
    """Move home, caches, temporary files and reports of this process and its children to a folder that is deleted."""
    global REPORTS
    folder = Path(tempfile.mkdtemp(prefix="benchmark-smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    REPORTS = folder / "reports"
    REPORTS.mkdir()
    os.environ |= {"HOME": str(folder), "TMPDIR": str(folder)}
    tempfile.tempdir = str(folder)


def tiny_teacher(**sizes: Any) -> str:
    """Write a tiny teacher with random weights into a temporary folder, and return its path."""
    from autodistill.testing import save_tiny_teacher

    return str(save_tiny_teacher(Path(tempfile.mkdtemp()) / "teacher", **sizes))


def tiny_data(documents: int = 30, sentences: int = 24) -> str:
    """Write a tiny text into a new folder, and return its path."""
    from autodistill.testing import tiny_text

    return str(tiny_text(Path(tempfile.mkdtemp()) / "text", documents=documents, sentences=sentences))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what libraries print, because the stdout of a child only carries its result."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
