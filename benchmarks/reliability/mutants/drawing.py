"""Which wrong changes are tried, and the test files that are near them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import program
from benchmarks.reliability.mutants.mutations import Mutation, mutations

ROOT = program.ROOT
_EQUIVALENT = Path(__file__).with_name("equivalent.yaml")

CORE = tuple(Path(__file__).with_name("core.txt").read_text().split())
"""The files that must be correct: the mathematics of training, storage and estimates, and what is chosen and
reported."""


def hash_of(*paths: Path, more: str = "") -> str:
    """Return a hash of the contents of files and of a text."""
    found = hashlib.sha256(more.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def id_of(mutant: Mutation) -> str:
    """Return an id of a mutant: equal changes of the same line have the same one."""
    said = (mutant.module, str(mutant.line), mutant.kind, mutant.before, mutant.after)
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:12]


def whole_id(mutant: Mutation) -> str:
    """Return an id of a mutant and of its whole file."""
    return id_of(mutant) + hash_of(ROOT / mutant.module)


def near(modules: Iterable[str], wide: Iterable[str] = ()) -> list[Path]:
    """Return the test files that are named after files of the core, or are in the folder of one and import it.

    Args:
        modules: Modules of the core.
        wide: Modules for which the other files of the folder count too, and files of other folders that import it.
    """
    found = set()
    for module in wide:
        path = Path(module)
        found.update((ROOT / "tests" / path.parent.relative_to(path.parts[0])).glob("test_*.py"))
        dotted = ".".join((*path.parent.parts, path.stem))
        found.update(test for test in (ROOT / "tests").rglob("test_*.py") if dotted in test.read_text(encoding="utf-8"))
    for module in modules:
        path = Path(module)
        folder = ROOT / "tests" / path.parent.relative_to(path.parts[0])
        dotted = f"{'.'.join(path.parent.parts)}.{path.stem}"
        apart = f"from {'.'.join(path.parent.parts)} import {path.stem}"
        for test in folder.glob("test_*.py"):
            text = test.read_text(encoding="utf-8")
            if test.stem == f"test_{path.stem}" or dotted in text or apart in text:
                found.add(test)
        found.update((ROOT / "tests").rglob(f"test_{path.name}"))
    return sorted(found)


def core_of(files: Sequence[Path] | None) -> list[str]:
    """Return the core's files that test files are named after, or all of them without test files."""
    return [name for name in CORE if not files or f"test_{Path(name).name}" in {path.name for path in files}]


def drawn(count: int, seed: int, core: Sequence[str]) -> list[Mutation]:
    """Return `count` mutations of some of the core's files. All are equally likely."""
    every = [one for name in core for one in mutations(name, (ROOT / name).read_text())]
    return random.Random(seed).sample(every, min(count, len(every)))


def record_of(seed: int) -> Path:
    """Return the file that keeps the verdicts of a seed's mutants."""
    return program.REPORTS / (f"mutants-{seed}.jsonl" if seed else "mutants.jsonl")


def still_there(survivors: Iterable[Mapping[str, Any]]) -> dict[int, Mutation]:
    """Return the mutants of a record by number, in the current core. Those whose statement is gone are left out.

    A mutant that is not in its file is searched in the folder's other files, because a file may have been divided.
    """
    found = {}
    for one in survivors:
        folder = [name for name in CORE if Path(name).parent == Path(one["module"]).parent]
        for name in sorted(folder, key=lambda name: name != one["module"]):
            made = mutations(name, (ROOT / name).read_text())
            alike = [m for m in made if (m.kind, m.before, m.after) == (one["kind"], one["before"], one["after"])]
            if alike:
                found[one["number"]] = min(alike, key=lambda mutant: abs(mutant.line - one["line"]))
                break
    return found


def equivalents() -> dict[tuple[str, str, str | None], str]:
    """Return the reason for each known mutant without effect, by module, before and after.

    Where nothing is named that a statement becomes, none of its mutants has an effect.
    """
    listed = yaml.safe_load(_EQUIVALENT.read_text()) or []
    return {(one["module"], one["before"], one.get("after")): one["why"] for one in listed}


def without_effect(mutant: Mutation, same: Mapping[tuple[str, str, str | None], str]) -> str | None:
    """Return why no test could see a mutant, or None if one could."""
    statement = mutant.before.partition("  [")[0]
    return same.get((mutant.module, mutant.before, mutant.after)) or same.get((mutant.module, statement, None))
