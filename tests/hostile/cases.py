"""Defines a hostile input, and the small valid things that areas spoil."""

from __future__ import annotations

import importlib
import json
import pkgutil
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tests.hostile

VERBS = (
    "bundle",
    "cascade",
    "chat",
    "compare",
    "dashboards",
    "devices",
    "distill",
    "doctor",
    "drafts",
    "estimate",
    "explain",
    "export",
    "leaderboard",
    "load",
    "log",
    "measure",
    "monitor",
    "pick",
    "profile",
    "report",
    "reproduce",
    "search",
    "serve",
    "show",
    "solve",
    "spaces",
    "strategies",
    "study",
    "verify",
    "write",
)


def nothing(folder: Path) -> None:
    """Make no file: only the command line is hostile."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input.

    Attributes:
        area: The module that it belongs to.
        name: Unique within the area.
        argv: The command line after `autodistill`. It runs in the folder of `make`.
        make: Makes the files in an empty folder, the same ones each time.
        codes: The exit codes that are right. Any code except 0 comes with one line on stderr, after lines of progress
            if the command has these.
    """

    area: str
    name: str
    argv: tuple[str, ...]
    make: Callable[[Path], object] = nothing
    codes: tuple[int, ...] = (2,)

    @property
    def command(self) -> str:
        """The verb."""
        return next((word for word in self.argv if not word.startswith("-")), "autodistill")

    @property
    def verb(self) -> str:
        """The name of the command in counts. Everything that is no command counts together."""
        return self.command if self.command in VERBS else "no command"

    @property
    def slow(self) -> bool:
        """Whether it may get as far as measuring this machine for a plan, which takes seconds."""
        return self.command in ("search", "distill") and 0 in self.codes

    def __str__(self) -> str:
        return f"{self.area}/{self.name}"


class Kit:
    """Small valid things, each made once.

    Args:
        folder: Folder for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def teacher(self) -> Path:
        """A teacher of two layers, as a transformers folder."""
        from autodistill.testing import save_tiny_teacher

        return save_tiny_teacher(self.folder / "teacher", layers=2, width=64, ffn=128)

    @cached_property
    def gguf(self) -> Path:
        """The same teacher as a GGUF file, with its matrices in Q8_0."""
        from autodistill.export.gguf import GgufExporter
        from autodistill.strategy.deployment import Deployment

        deployment = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
        GgufExporter().export(self.teacher, deployment, self.folder / "exported")
        (path,) = (self.folder / "exported").rglob("*.gguf")
        return path.rename(self.folder / "teacher.gguf")

    @cached_property
    def export(self) -> Path:
        """An export of the GGUF file with its record and its proof, as `autodistill export` leaves it."""
        from tests.bundle.conftest import Q8_0, export_to

        return export_to(self.folder / "export", "gguf", Q8_0)

    @cached_property
    def text(self) -> Path:
        """A folder of texts."""
        from autodistill.testing import tiny_text

        return tiny_text(self.folder / "text", documents=24)

    @cached_property
    def chats(self) -> Path:
        """A file of conversations."""
        path = self.folder / "chats.jsonl"
        records = [
            {"prompt": f"What is {n} plus {n}?", "answer": f"It is {2 * n}, said the miller."} for n in range(200)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    @cached_property
    def prompts(self) -> Path:
        """A file of two prompts."""
        path = self.folder / "prompts.txt"
        path.write_text("What is two plus two?\nWho carries the boat?\n", encoding="utf-8")
        return path

    def write(self, teacher: str) -> tuple[str, ...]:
        """Return a command that lets a teacher write one token to each prompt.

        It loads everything, in a fraction of the time that a plan takes.
        """
        options = ("--prompts", str(self.prompts), "--out", "written.jsonl", "--max-tokens", "1", "--cache", "cache")
        return ("write", "--teacher", teacher, *options)

    def plan(self, *more: str, teacher: str = "", data: str = "", budget: str = "1GB") -> tuple[str, ...]:
        """Return a command that plans a small search, by default with a valid teacher and text."""
        what = ("--teacher", teacher or str(self.teacher), "--data", data or str(self.text), "--budget", budget)
        return ("search", "--plan", *what, *self.small, *more)

    @property
    def small(self) -> tuple[str, ...]:
        """Options of a search that touch nothing outside its folder and take little time."""
        return ("--runs", "runs", "--cache", "cache", "--runner", "inline", "--trials", "1", "--tokens", "512")

    def teacher_copy(self, folder: Path) -> Path:
        """Copy the teacher so that it can be spoilt. The weights are a link, so never write into them."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.teacher.iterdir():
            if path.suffix == ".safetensors":
                (folder / path.name).hardlink_to(path)
            else:
                shutil.copyfile(path, folder / path.name)
        return folder


def areas() -> dict[str, Callable[[Kit, random.Random], Iterator[Case]]]:
    """Return the functions that make cases, by the name of their area."""
    names = sorted(module.name for module in pkgutil.iter_modules(tests.hostile.__path__))
    own = [
        name for name in names if not name.startswith(("test_", "_")) and name not in ("cases", "server", "conftest")
    ]
    modules = {name: importlib.import_module(f"tests.hostile.{name}") for name in own}
    return {name: module.cases for name, module in modules.items() if hasattr(module, "cases")}


def all_cases(kit: Kit, seed: int = 0, only: Sequence[str] = ()) -> list[Case]:
    """Return every case of all areas, or of some. The same seed gives the same cases."""
    found = [
        case
        for area, make in areas().items()
        if not only or area in only
        for case in make(kit, random.Random(f"{area}/{seed}"))
    ]
    names = [str(case) for case in found]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if repeated:
        raise ValueError(f"cases of one name: {', '.join(sorted(repeated))}")
    return found
