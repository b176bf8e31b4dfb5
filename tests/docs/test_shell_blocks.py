"""Each shell block of a page is run: its commands in order, in an empty home, with a tiny model for the real ones.

What a command is given is smaller (`STANDS_FOR`, `ADDED`), and the rest runs as it is written. What needs a program,
a machine or a service that tests do not have is in `NOT_RUN`, with the reason;
`tests/cli/test_documented_commands.py` parses it like all others.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from autodistill.advisor.blocks import timing
from autodistill.advisor.describe import deployment_named
from autodistill.cli.app import main
from autodistill.distillation.teacher import resolve
from autodistill.export.gguf import GgufExporter
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.docs.shell import PAGES, ROOT, Command, Reader, commands, without
from tests.search import conftest as speeds

# Patterns of commands that are not run, and the reason.
NOT_RUN = {
    r"python3 -m venv|source |(\S*/)?pip install": "a package registry; .ci/run installs the README's way",
    r"\.venv/bin/(python -m pytest|pre-commit)": "it is the run of these tests, and the hooks of the checkout",
    r"make |\.ci/run": "the tests themselves; a test below compares them with the Makefile",
    r"autodistill .*--ray-address|ray start": "a Ray cluster; tests/search/runners/test_ray_cluster.py has one",
    r"autodistill .*--on ssh:": "a board; tests/runtimes and tests/advisor have an ssh server",
    r"autodistill .*--metric lm-eval:": "a data set of the hub; tests/evaluators/tasks has one of its own",
    r"autodistill .*--dashboard": "the extra dashboard; tests/dashboards/test_ray_dashboard.py opens it",
    r"autodistill write .*--endpoint": "a server of a large model; tests/distillation/teacher has a stand-in",
    r"python docs/examples/": "two servers, or Flower; test_route_example.py and tests/federated run the examples",
    r"autodistill reproduce .*--runs results/": "the real teacher, for minutes; `make slow` does it",
    r"autodistill search --teacher \./arithmetic": "a teacher that benchmarks.common.math_teacher has to train first",
    r"autodistill estimate .*(npz-q8|devices\.yaml)": "tests/test_contributing.py runs it with what the page adds",
}
# What a page names, and what it is here.
STANDS_FOR = {
    r"Qwen/Qwen2\.5-1\.5B": "./model",
    r"\bRUN\b": "given",
    r"\bROW\b": "t000-gguf-q8_0",
    r"\bt003-gguf-q4_0\b": "t000-gguf-q4_0",
    r"\bt001-gguf-q8_0\b": "t000-gguf-q8_0",
    # All of the tiny model fits these budgets, which no storage of the real one does.
    r"^100MB\.\.250MB$": "26.8MB..28MB",
    r"^80MB$": "1MB",
}
# Options that a command is given here in place of those of the same name, by how it begins. The first one holds.
SEARCH = "--trials 1 --tokens 512 --sequence-length 64 --runner inline --space small.yaml"
ADDED = {
    r"search .*--resume.*--trials": "--trials 2",
    r"search .*--resume": "",
    r"search .*--candidate": SEARCH.removesuffix(" --space small.yaml"),  # it is compared with what is solved
    r"search .*--explore 0": SEARCH.replace(" --tokens 512", ""),  # with trials and tokens there is nothing to share
    # The tiny model ends hardly an answer, and an answer without an end is not learned.
    r"search .*--data answers.jsonl": f"{SEARCH} --data chats.jsonl",
    r"search .*--warm-start": f"{SEARCH} --teacher ./model --data ./docs",  # as the earlier runs were
    r"search ": SEARCH,
    r"solve .*--device local": "--tokens 128 --sequence-length 64 --context 256",
    r"solve .*--coarse": "--tokens 512 --sequence-length 64",  # of which it reads a quarter
    r"solve ": "--tokens 128 --sequence-length 64",
    r"measure .*--script": "",
    r"measure .*--blocks": "--context 256 --rounds 1 --busy",
    r"measure ": "--context 64 --prompt 16 --decoded 4 --rounds 1 --busy",
    r"profile .*--teacher": "--step-tokens 64 --sequence-length 64 --steps 1",
    r"profile ": "--prompt 16 --decoded 4",
    r"load ": "--time 5s --decoded 4 --prompt 16 --streams 1",
    r"monitor ": "--time 3s",
    r"drafts ": "--prompts 2 --prompt 8 --decoded 4 --time 1m",
    r"write ": "--max-tokens 24",
}
# A search with none of these is planned alone (`--plan`): it would train as the others do.
TRAINED = {"--name", "--metric", "--metric-command", "--objectives", "--warm-start", "--confirm", "--baseline"}
TRAINED |= {"--candidate", "--log", "--metrics-port", "--resume"}
# What commands are typed into.
STDIN = {"chat": "Where is the river?\n"}
# A limit of time may be broken on a busy machine. Its exit code is then 4.
BROKEN = {"load", "monitor"}
# Commands that time a student in its runtime, which the searches here do not.
TIMED = {"cascade", "measure"}
# Commands that take no second: they answer about hardware, or about the runs that come with the project.
LIGHT, RECORDED = {"devices", "doctor", "estimate"}, {"leaderboard", "show", "explain", "report", "pick"}
# Runs that a page begins with.
RUNS = {
    "README.md": ["given"],
    "docs/cascades.md": ["given"],
    "docs/deploying.md": ["given"],
    "docs/formats.md": ["given"],
    "docs/guides/one-gpu.md": ["given"],
    "docs/hardware.md": ["given"],
    "docs/leaderboards.md": ["mine"],
    "docs/searches.md": ["run1", "run2"],
    "docs/trackers.md": ["first"],
}
SPACE = """
dimensions:
  init.depth: {choices: [0.5, 0.75]}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
  - {runtime: llama.cpp, format: gguf-q4_0, bits: 4, group_size: 32}
"""
RECIPE = "init: {depth: 1.0}\ndistillation: {learning_rate: 1.0e-4}\n"
SCORE = '#!/bin/sh\nwc -l < "$2" | awk \'{printf "[0.5"; for (i = 1; i < $1; i++) printf ", 0.5"; print "]"}\'\n'
BY_PAGE = {str(page.relative_to(ROOT)): list(commands(page)) for page in PAGES}
EVERY = [command for found in BY_PAGE.values() for command in found]


def reason(command: Command) -> str | None:
    """Return why a command is not run, or None if it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command.text)), None)


def smaller(command: Command, port: int) -> list[str]:
    """Return the words of a command as it is run."""
    words = [re.sub(r"\b8080\b", str(port), word) for word in command.words]
    if command.verb:
        words[0] = "autodistill"
    for theirs, ours in STANDS_FOR.items():
        words = [re.sub(theirs, ours, word) for word in words]
    if command.verb == "serve" and "--port" not in words:
        return [*words, "--port", str(port)]
    typed = " ".join(words[1:])
    added = next(
        (options.split() for pattern, options in ADDED.items() if command.verb and re.match(pattern, typed)), []
    )
    replaced = [word for word in added if word.startswith("--") and word != "--busy"]
    # The number of trials and tokens fixes the work of a search, and no time is to be filled.
    words = without(words, [*replaced, *(["--time"] if command.verb == "search" else [])]) + added
    if command.verb == "search" and not ({"--plan"} | TRAINED) & {*words} and command.code == 0:
        words.append("--plan")
    return words


def furnish(folder: Path) -> None:
    """Write what a reader has into a folder: a model in several forms, texts, tasks, a space, the results that ship."""
    teacher = save_tiny_teacher(folder / "model", layers=6, width=128, kv_heads=4)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    for copy in ("teacher", "student/huggingface"):
        shutil.copytree(teacher, folder / copy)
    for name, files in (("q8_0", ("student", "teacher")), ("q4_0", ("model-Q4_K_M-imatrix", "model-IQ4_XS"))):
        path = GgufExporter().export(teacher, deployment_named(f"gguf-{name}"), folder / name).path
        for file in files:
            shutil.copy(path, folder / f"{file}.gguf")
        shutil.rmtree(folder / name)
    tiny_text(folder / "docs", documents=16, sentences=12)
    for name, text in (("small", SPACE), ("mine", SPACE), ("recipe", RECIPE)):
        (folder / f"{name}.yaml").write_text(text)
    (folder / "score.py").write_text(SCORE)
    (folder / "score.py").chmod(0o755)
    questions = [f"Where is story {number} told?" for number in range(24)]
    (folder / "prompts.txt").write_text("\n".join(questions) + "\n")
    chats = [{"prompt": question, "answer": f"Near the river. {question}"} for question in questions]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    shutil.copy(ROOT / "search_spaces" / "tasks" / "openbookqa.yaml", folder)
    (folder / "openbookqa").mkdir()
    records = ({"question": f"{n}?", "options": "A. yes\nB. no", "answer": "B. no"} for n in range(20))
    (folder / "openbookqa" / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
    shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("runs", "arithmetic", "small"))
    shutil.copy(next((folder / "results" / "reference").glob("*/leaderboard.parquet")), folder / "theirs.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an empty `home`, and with `folder`, in which a reader works."""
    made = tmp_path_factory.mktemp("reader")
    for name in ("home", "folder"):
        (made / name).mkdir()
    furnish(made / "folder")
    before = Path.cwd()
    os.chdir(made / "folder")
    with pytest.MonkeyPatch.context() as patch, speeds.untimed():
        patch.setenv("HOME", str(made / "home"))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.delenv("XDG_CONFIG_HOME", raising=False)
        patch.setenv("COLUMNS", "120")
        # Two of the types in which blocks are timed, as all of them take minutes.
        patch.setattr(timing, "time_blocks", partial(timing.time_blocks, kinds=("q8_0", "q4_0")))
        patch.setattr(resolve, "_smollm2_file", lambda: made / "folder" / "student.gguf")
        yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def given(home: Path) -> Path:
    """A finished run of a student of the tiny model."""
    run = ["search", "--budget", "8GB", "--teacher", "./model", "--data", "./docs", *SEARCH.split()]
    assert main([*run, "--runs", str(home / "runs"), "--name", "given"]) == 0
    return home / "runs" / "given"


@pytest.fixture
def reader(home: Path, tmp_path: Path) -> Iterator[Reader]:
    """A reader in a copy of the folder."""
    shutil.copytree(home / "folder", tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        yield Reader(tmp_path, patch, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def failure(command: Command, reader: Reader, port: int) -> str | None:
    """Run a command, and return what it says where it does not end as its page shows."""
    words = smaller(command, port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speeds, "_timing", command.verb in TIMED)
        code, printed = reader.types(words, STDIN.get(command.verb, ""))
    allowed = {None} if command.verb == "serve" else {command.code, *([4] if command.verb in BROKEN else [])}
    return None if code in allowed else f"{command.place}: {shlex.join(words)}\nexit code {code}:\n{printed}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_pages_show_commands_and_each_reason_is_of_one():
    assert len(EVERY) > 100
    assert [why for pattern, why in NOT_RUN.items() if not any(re.match(pattern, one.text) for one in EVERY)] == []
    assert [one.text for one in EVERY if not reason(one) and not one.verb and one.words[0] != "export"] == []


def test_each_replacement_and_each_run_is_of_something_that_a_page_says():
    words = [word for command in EVERY for word in command.words]
    assert [pattern for pattern in STANDS_FOR if not any(re.search(pattern, word) for word in words)] == []
    assert {*RUNS} <= {*BY_PAGE}
    typed = [" ".join(command.words[1:]) for command in EVERY if command.verb and not reason(command)]
    assert [pattern for pattern in ADDED if not any(re.match(pattern, one) for one in typed)] == []


def test_each_target_of_make_is_one_of_the_makefile():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [command.words[1] for command in EVERY if command.words[0] == "make"]
    assert len(named) > 8
    assert {*named} <= {*targets}


def test_what_reads_alone_answers(reader: Reader):
    """Questions about hardware, and about the runs that come with the project."""
    read = [one for one in EVERY if one.verb in LIGHT or (one.verb in RECORDED and "results/" in one.text)]
    assert len(read) > 15
    assert [told for one in read if not reason(one) and (told := failure(one, reader, 8080))] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, found in BY_PAGE.items() if any(not reason(one) for one in found)])
def test_the_commands_of_a_page_run_in_order(page: str, reader: Reader, given: Path):
    for name in RUNS.get(page, ()):
        shutil.copytree(given, reader.folder / "results" / "runs" / name)
    if not any("--out ./student" in command.text for command in BY_PAGE[page]):
        shutil.copytree(given / "student", reader.folder / "student", dirs_exist_ok=True)
    port = free_port()
    try:
        told = [failure(command, reader, port) for command in BY_PAGE[page] if not reason(command)]
    finally:
        left = reader.leave()
    assert [one for one in told if one] == []
    assert {text: said for text, (code, said) in left.items() if code} == {}
