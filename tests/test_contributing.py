"""CONTRIBUTING.md is followed literally: each addition that it shows is made, in a package or a copy, and works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEAD = re.compile(r"# (?P<file>[\w./]+)(?:, (?P<how>in|before|after) (?P<place>.+))?\n")

# The joint work of the text's three plug-ins: the evaluator ranks, the divergence trains, the exporter writes.
SEARCH = """
from autodistill.hardware.budget import Budget
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text


def test_a_search_uses_all_three(tmp_path):
    outcome = search(
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            teacher=str(save_tiny_teacher(tmp_path / "teacher", layers=2, ffn=192)),
            data=str(tiny_text(tmp_path / "text", documents=30, sentences=24)),
            space="space.yaml",
            metric="surprise",
            trials=1,
            tokens=1024,
            runner="inline",
            runs=tmp_path / "runs",
            name="run",
            cache=tmp_path / "cache",
        )
    )
    best = outcome.finish.best
    assert best.deployment_name == "npz-q8"
    assert best.other["surprise"] > 0
    assert best.other["surprise_stderr"] > 0
    assert (outcome.finish.paths["npz"] / "weights.npz").is_file()
    assert outcome.finish.checks["npz"].agreement >= 0.97
    assert "tvd" in (tmp_path / "runs" / "run" / "trials.jsonl").read_text()
"""


def blocks() -> list[tuple[str, str]]:
    """Return the kind and the content of each block of the text."""
    return [(found[1], found[2]) for found in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))]


def put(path: Path, how: str, place: str, code: str) -> None:
    """Put code into a file of this project: in a table or a class, or next to a given line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if how == "in":
        begins = next(
            index for index, line in enumerate(lines) if re.match(rf"class {place}\b|{place}\b.* = {{$", line.rstrip())
        )
        # After the table's first line, or before the first method of the class.
        found = begins + 1
        if lines[begins].startswith("class "):
            found = next(index for index in range(begins, len(lines)) if lines[index].startswith("    def ")) - 1
    else:
        found = next(index for index, line in enumerate(lines) if line.strip() == place) + (how == "after")
    path.write_text("".join([*lines[:found], code, *lines[found:]]), encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after following the text: `copy`, a copy of this project, and `own`, an installed package."""
    folder = tmp_path_factory.mktemp("contributing")
    copy, own = folder / "copy", folder / "own"
    # Compiled files are copied too, except those that are being written. Python notices that the files changed by the
    # text are newer.
    leave = shutil.ignore_patterns("*.pyc.*", "*.tmp.*")
    shutil.copytree(ROOT / "autodistill", copy / "autodistill", ignore=leave)
    for name in ("evaluators", "search_spaces"):
        shutil.copytree(ROOT / name, copy / "autodistill" / name, ignore=leave)
    own.mkdir()
    for kind, text in blocks():
        if kind not in ("python", "toml", "yaml"):
            continue
        head = HEAD.match(text)
        assert head, f"a block begins with {text.splitlines()[0]!r}, and not with the name of its file"
        code = text[head.end() :]
        if head["how"]:
            put(copy / head["file"], head["how"], head["place"], code)
        else:
            (own / head["file"]).write_text(code, encoding="utf-8")
    # As an installer leaves it.
    info = own / "additions-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: additions\nVersion: 1.0\n")
    declared = tomllib.loads((own / "pyproject.toml").read_text())["project"]["entry-points"]
    groups = (f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in declared.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    (own / "test_search.py").write_text(SEARCH)
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the package's folder, with the copy in place of this project."""
    paths = {
        "PYTHONPATH": os.pathsep.join([str(folder / "copy"), str(folder / "own")]),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *words], cwd=folder / "own", env=os.environ | paths, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def results(followed: Path) -> Counter[str]:
    """Numbers of the text's tests that passed, by the file or the suite that contains them. All of them must pass."""
    done = run(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--junitxml=results.xml")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    cases = ElementTree.parse(followed / "own" / "results.xml").iter("testcase")
    return Counter(str(case.get("classname")).rpartition(".")[2] for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "least"),
    [
        ("TestSurprise", 8),  # an evaluator
        ("TestTotalVariation", 6),  # a divergence
        ("TestNpz", 6),  # an exporter
        ("test_search", 1),  # the three in a search
        ("test_seed_oss", 2),  # a family
        ("test_weight_decay", 2),  # a dimension
    ],
)
def test_what_the_text_adds_works(results: Counter[str], where: str, least: int) -> None:
    assert results[where] >= least


COMMANDS = [text for kind, text in blocks() if kind == "sh" and text.startswith("autodistill ")]


# One process for all of them.
PROGRAM = f"""
import autodistill.evaluators.kl
from autodistill.cli.app import main
print(autodistill.evaluators.kl.__file__)
for words in {[shlex.split(command)[1:] for command in COMMANDS]}:
    print("@", main(words))
"""


@pytest.mark.slow
def test_the_commands_of_the_text_answer(followed: Path) -> None:
    """The copy estimates with the format and the device that were added."""
    done = run(followed, "-c", PROGRAM)
    place, _, printed = done.stdout.partition("\n")
    assert Path(place).is_relative_to(followed / "copy"), done.stderr
    answers = printed.split("@ 0\n")
    for answer, said in zip(answers, ("npz-q8 in npz-reader", "Orange Pi 5 16GB", ""), strict=True):
        assert said in answer, done.stderr
