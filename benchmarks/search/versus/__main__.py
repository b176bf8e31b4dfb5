"""Is a search ahead of simpler approaches: no training, no search, or a fixed recipe?

    python -m benchmarks.search.versus [--only small-manuals-0.8-0/search] [--time 90s] [--stop 2h] [--plan]

Teachers, texts, budgets, seeds, arms and targets are in `versus/blocks.yaml`. Every arm is a process of its own with
the same seconds on the same two cores, including loading, planning and export. Its export is read back and scored on
documents that no arm saw. Only the tokens of the texts are made in advance. A row is stored when it is complete, and
existing rows are not made again. `--time` gives each arm another time than the file's, for a separate first look.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.errors import NothingFitsError
from autodistill.export.process_memory import measured_process_bytes
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.report.solved import write_chart
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes, parse_duration
from autodistill.utils.json_files import read_json
from benchmarks.common import debian_texts, report
from benchmarks.common.program import parse, parser_of, stdout_to_stderr, tiny_data, tiny_teacher, token_count
from benchmarks.common.report import Kept
from benchmarks.search.off_grid_teacher import off_grid_teacher
from benchmarks.search.small_teacher import small_teacher
from benchmarks.search.versus.arms import ARMS, Task, budget_of, share_of
from benchmarks.search.versus.blocks import Block, blocks, read_blocks
from benchmarks.search.versus.chart import curve
from benchmarks.search.versus.judge import Judge
from benchmarks.search.versus.targets import MINE, UNTRAINED, Row, best_rival, gap, has_figures, verdicts

THREADS = 2
ITSELF = "teacher"
LOGS = "versus-logs"


class Versus:
    """The rows of all blocks, kept in the cache.

    Args:
        asked: Content of the blocks' file.
        box: Seconds of each arm, instead of the file's.
        texts: Folder of the texts.
        teachers: References by name, instead of the teachers that the programs here train.
        stop: Seconds after which no row is begun.
        tokens: Training tokens of the arms in a smoke run, whatever the time.
    """

    def __init__(
        self,
        asked: Mapping[str, Any],
        box: float | None,
        texts: Path,
        teachers: Mapping[str, str],
        stop: float = float("inf"),
        tokens: int | None = None,
    ) -> None:
        self.asked, self.blocks = asked, list(blocks(asked, box))
        self._texts, self._teachers, self._stop, self._tokens = texts, teachers, stop, tokens
        self._kept: dict[str, Kept] = {}
        self._known_teachers: dict[str, Teacher] = {}
        self._rows: dict[str, Row] = {}

    def teacher(self, name: str) -> Teacher:
        """Return the teacher of a name. It is resolved only once."""
        if name not in self._known_teachers:
            given = self._teachers.get(name)
            if given is None and name == "small":
                given = str(small_teacher(self.asked["teachers"]["small"].get("tokens")))
            elif given is None and name == "off-grid":
                given = str(off_grid_teacher())
            self._known_teachers[name] = materialize(resolve_teacher(given or name), cache_folder())
        return self._known_teachers[name]

    def kept(self, name: str) -> Kept:
        """Return the rows of a teacher. Another teacher of the same name does not share them."""
        if name not in self._kept:
            self._kept[name] = Kept(f"versus-{name}", self.teacher(name).fingerprint, self._stop)
        return self._kept[name]

    def known(self) -> dict[Block, dict[str, Row]]:
        """Return all existing rows, and make none. A teacher that is not trained has none."""
        found: dict[Block, dict[str, Row]] = {}
        for block in self.blocks:
            try:
                kept = self.kept(block.teacher)
            except SystemExit:
                continue
            arms = [arm for arm in (ITSELF, *block.arms) if kept.knows(self._key(block, arm))]
            rows = {arm: self.row(block, arm) for arm in arms}
            if rows.keys() - {ITSELF}:
                found[block] = rows
        return found

    def missing(self, only: str | None) -> list[tuple[Block, str]]:
        """Return the missing rows, possibly only those of some blocks or arms."""
        found = []
        for block in self.blocks:
            for arm in (ITSELF, *block.arms):
                wanted = only is None or only in (block.name, arm, f"{block.name}/{arm}", block.teacher)
                if wanted and not self.kept(block.teacher).knows(self._key(block, arm)):
                    found.append((block, arm))
        return list({self._key(*one): one for one in found}.values())

    def _key(self, block: Block, arm: str) -> str:
        """Return the key of a row. The teacher's own row depends on its text only."""
        tokens = f"{block.teacher} {self.asked['test_tokens']}-{self.asked['general_tokens']}"
        own = f"{block.text}/{arm} {block.sequence}" if arm == ITSELF else block.key(arm)
        return f"{own} {tokens}"

    def row(self, block: Block, arm: str) -> Row:
        """Return a row. If it is missing, it is made in a process of its own and stored."""
        key = self._key(block, arm)
        if key not in self._rows:
            self._rows[key] = self.kept(block.teacher).get(key, partial(self._made, block, arm))
        return self._rows[key]

    def judge(self, block: Block) -> Judge:
        """Return the judge of a block."""
        test, general = (self._texts / name for name in (f"{block.text}-test", self.asked["general"]))
        return Judge(
            teacher=self.teacher(block.teacher).folder,
            test=test,
            general=general,
            sequence=block.sequence,
            test_tokens=self.asked["test_tokens"],
            general_tokens=self.asked["general_tokens"],
            cache=cache_folder() / "benchmarks" / "versus",
        )

    def _made(self, block: Block, arm: str) -> dict[str, Any]:
        if arm == ITSELF:
            return self.judge(block).teacher_itself()
        teacher, data = self.teacher(block.teacher), self._texts / block.text
        cache = cache_folder() / "benchmarks" / "versus"
        # This comes before the clock starts, as all arms read the same tokens.
        prepare(resolve_data(str(data)), teacher.folder, tokenizer_fingerprint(teacher.folder), block.sequence, cache)
        spec = spec_from_config(read_json(teacher.folder / "config.json"))
        spec = replace(spec, process_bytes=measured_process_bytes(teacher.folder, spec.vocabulary, cache))
        budget = budget_of(spec, block.budget, block.context)
        logs = cache_folder() / "benchmarks" / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="versus-") as folder:
            own = Path(folder) / "cache"
            own.mkdir()
            (own / "data").symlink_to(cache / "data")
            # The memory of llama.cpp's process is measured once, so that all arms have the same budget.
            if (cache / "devices").exists():
                shutil.copytree(cache / "devices", own / "devices")
            given: dict[str, Any] = {
                "teacher": self.reference(block.teacher),
                "data": str(data),
                "budget": [budget.memory_bytes, budget.context],
                "sequence": block.sequence,
                "seed": block.seed,
                "ends": time.time() + share_of(arm) * block.box,
                "cache": str(own),
                "out": str(Path(folder) / "runs"),
                "tokens": self._tokens,
            }
            began = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.search.versus", "--child", arm, json.dumps(given)]
            environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
            log = logs / f"{block.name}-{arm}-{block.box:g}s.log"
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
            wall = time.monotonic() - began
            if done.returncode:
                raise RuntimeError(f"{block.name}/{arm} ended with code {done.returncode}: see {log}")
            told = json.loads(done.stdout.splitlines()[-1])
            row = {"arm": arm, "block": block.name, "seconds": wall, "teacher": Path(given["teacher"]).name}
            if "nothing_fits" in told:
                return row | told
            file_of, deployment = Path(told.pop("file")), told["deployment"]
            found = self.judge(block).judge(file_of, Deployment.from_json(deployment), budget)
            bits = 8 * found["weights"] / spec.parameters
            return row | told | found | {"budget": budget.to_json(), "bits": bits}

    def reference(self, name: str) -> str:
        """Return the teacher's reference for an arm. A file stays a file, so that its codes are known."""
        if name in ("small", "off-grid") or name in self._teachers:
            return str(self.teacher(name).folder)
        return name


def child(arm: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run an arm in this process, and return what it made."""
    torch.set_num_threads(THREADS)
    memory_bytes, context = given["budget"]
    task = Task(
        **{
            **given,
            "budget": Budget(memory_bytes=memory_bytes, context=context),
            "cache": Path(given["cache"]),
            "out": Path(given["out"]),
        }
    )
    try:
        made = ARMS[arm](task)
    except NothingFitsError as error:
        return {"nothing_fits": str(error)}
    return {**asdict(made), "file": str(made.file), "deployment": made.deployment.to_json()}


def sections(versus: Versus, rows: Mapping[Block, Mapping[str, Row]], first_look: bool) -> Iterator[str]:
    """Yield the parts of the report."""
    asked = versus.asked
    if first_look:
        yield "**A first look, with other times or another teacher than the file's: no target is decided by it.**"
    yield (
        f"Every arm has its seconds on {THREADS} cores, all of it included but the tokens of the texts; its file is "
        "read back and scored in float32 with its cache as it is served, on "
        f"{asked['test_tokens']:,} tokens of documents that no arm saw. NLL in nats a token; general KL is to the "
        f"teacher on {asked['general_tokens']:,} tokens of the text `{asked['general']}`, on which nobody trained. "
        "Differences are paired and bootstrapped by document, and below zero where the arm is better than the best "
        "rival; the last column is what the search is ahead of the arm, and general NLL is above zero where the arm "
        "forgot, beside the untrained one. Memory is predicted, of weights and cache."
    )
    lines = []
    for block, found in rows.items():
        rival = best_rival(found, asked["rivals"])
        for arm in (ITSELF, *block.arms):
            if arm in found:
                line = _line(block, arm, found[arm], found.get(rival or ""), rival)
                ahead = _ahead(found.get(MINE), found[arm]) if arm not in (MINE, ITSELF) else "-"
                lines.append([*line, _general_nll(found[arm], found.get(UNTRAINED)), ahead])
    titles = ["block", "arm", "what", "weights + cache", "NLL", "less best rival", "accuracy, %", "general KL"]
    yield report.table([*titles, "tokens", "s", "general NLL", "search ahead, points"], lines)
    yield _run_and_not(versus, rows)
    said = verdicts(asked["targets"], rows, asked["rivals"])
    table = []
    for one in asked["targets"]:
        verdict = said[one["id"]]
        table.append([one["id"], one["text"] + _bound(one), verdict.state, verdict.said])
    yield "## Targets\n\n" + report.table(["target", "what", "state", "figures"], table)


def _bound(target: Mapping[str, Any]) -> str:
    bounds = {"least": "at least", "most": "at most"}
    return "".join(f" ({words} {target[name]})" for name, words in bounds.items() if name in target)


def _line(block: Block, arm: str, row: Row, rival: Row | None, named: str | None) -> list[str]:
    head = [f"{block.name}, {block.box:g} s", arm]
    if not has_figures(row):
        return [*head, f"nothing fits: {row['nothing_fits']}", *["-"] * 6, f"{row['seconds']:.0f}"]
    test, size = row["test"], "-" if row["bytes"] is None else format_bytes(row["weights"] + row["kv_cache"])
    less = "-"
    if rival is not None and arm not in (named, ITSELF):
        value, one = gap(row, rival, "nll")
        less = f"{value:+.4f} ± {one:.4f}"
    elif arm == named:
        less = "the best rival"
    return [
        *head,
        "the teacher in 32 bits" if arm == ITSELF else f"{row['name']} as {_name(row)}",
        size,
        f"{test['nll'][0]:.4f}",
        less,
        f"{100 * test['accuracy'][0]:.2f} ± {100 * (test['accuracy'][1] or 0):.2f}",
        f"{row['general']['kl'][0]:.4f}",
        f"{row['tokens']:,}" if row.get("tokens") else "-",
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
    ]


def _general_nll(row: Row, untrained: Row | None) -> str:
    """Return the nats per token that an arm loses on general text, and how much more than the untrained arm."""
    if not has_figures(row):
        return "-"
    told = f"{row['general']['nll'][0]:.4f}"
    if untrained is None or not has_figures(untrained) or untrained is row:
        return told
    value, one = gap(row, untrained, "nll", "general")
    return f"{told} ({value:+.4f} ± {one:.4f})"


def _ahead(mine: Row | None, row: Row) -> str:
    """Return how many points of accuracy the search is ahead of an arm, paired by document."""
    if not (has_figures(mine) and has_figures(row)):
        return "-"
    assert mine is not None
    value, one = gap(mine, row, "correct")
    return f"{100 * value:+.2f} ± {100 * one:.2f}"


def _name(row: Row) -> str:
    return Deployment.from_json(row["deployment"]).name


def _run_and_not(versus: Versus, rows: Mapping[Block, Mapping[str, Row]]) -> str:
    """Describe how many of the rows that the file asks for exist."""
    wanted = sum(len(block.arms) for block in versus.blocks)
    there = sum(sum(arm in found for arm in block.arms) for block, found in rows.items())
    whole = sum(all(arm in found for arm in block.arms) for block, found in rows.items())
    mine = sum(MINE in found for found in rows.values())
    return (
        f"{there} of {wanted} rows are there, {whole} of {len(versus.blocks)} blocks are whole; {mine} blocks have the "
        "search's own row. What is missing was not run."
    )


def main() -> None:
    """Make the rows that are missing, each in a process of its own, and write the report and its charts."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", metavar="BLOCK/ARM", help="a row, a block, an arm or a teacher: no others are made")
    parser.add_argument("--time", type=parse_duration, help="of each arm, instead of the file's: a first look")
    parser.add_argument("--stop", type=parse_duration, default=float("inf"), help="no row is begun after so long")
    parser.add_argument(
        "--teacher-tokens", type=token_count, help="of the small teacher, instead of the file's: a first look"
    )
    parser.add_argument("--plan", action="store_true", help="say which rows are missing, and make none")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parse(parser, time=20.0)
    if arguments.child:
        arm, given = arguments.child
        with stdout_to_stderr():
            told = child(arm, json.loads(given))
        print(json.dumps(told))
        return
    versus = _tiny(arguments.time) if arguments.smoke else _whole(arguments)
    if arguments.plan:
        for block, arm in versus.missing(arguments.only):
            print(f"{block.name}/{arm}: {share_of(arm) * block.box:.0f} s")
        return
    failed = 0
    for block, arm in versus.missing(arguments.only):
        print(f"{block.name}/{arm} ...", file=sys.stderr, flush=True)
        try:
            versus.row(block, arm)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed += 1
        except SystemExit as ended:
            print(ended, file=sys.stderr)
            break
    rows = versus.known()
    if not rows:
        sys.exit("no row is there yet: nothing to report")
    first_look = arguments.time is not None or arguments.teacher_tokens is not None
    name = "versus-first-look" if first_look else "versus"
    title = "This search beside everyone who does less, in equal time"
    parts = [*sections(versus, rows, first_look)]
    drawn = curve(rows)
    if drawn is not None:
        parts.insert(1, "The picture beside this report, of the same name, has the NLL by budget.")
    path = report.write(name, title, parts, made_by="-m benchmarks.search.versus")
    if drawn is not None:
        write_chart(drawn, path.with_suffix(".svg"))
    print(path)
    if failed:
        sys.exit(f"{failed} rows failed: see above")


def _whole(arguments: argparse.Namespace) -> Versus:
    asked = read_blocks()
    if arguments.teacher_tokens is not None:
        asked["teachers"]["small"]["tokens"] = arguments.teacher_tokens
    return Versus(asked, arguments.time, debian_texts.debian_texts().folder, {}, arguments.stop)


def _tiny(box: float) -> Versus:
    """Return two arms of one tiny block."""
    texts = Path(tempfile.mkdtemp())
    for name in ("tiny", "tiny-test", "general"):
        shutil.copytree(tiny_data(60), texts / name)
    asked = {
        **read_blocks(),
        "teachers": {"tiny": {"context": 256, "sequence": 64, "box": box}},
        "texts": ["tiny"],
        "general": "general",
        "budgets": [0.9],
        "seeds": [0],
        "test_tokens": 512,
        "general_tokens": 256,
        "arms": {"untrained": "", "no-search": ""},
        "beside": {},
        "further": {},
    }
    teacher = tiny_teacher(layers=2, width=128, heads=2, kv_heads=1, ffn=256)
    return Versus(asked, box, texts, {"tiny": teacher}, tokens=1024)


if __name__ == "__main__":
    main()
