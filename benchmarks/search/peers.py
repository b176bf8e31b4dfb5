"""This search against Model Optimizer and Olive, with the same teacher, text and processor time.

    pip install nvidia-modelopt==0.47.0 olive-ai==0.13.0
    python -m benchmarks.search.peers [--budget 210MB] [--box 10m] [--time 60m]

Every arm is a process of its own with two threads. The search has its time budget. Arms that train with other tools
have the same number of cores for the same time, with everything included. Each result is scored as its own tool
computes it in torch, in float32, on test text that no arm has seen. Its weights are counted as they are served.
Existing results are not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.inference.scoring import score
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.units import format_bytes, parse_duration
from autodistill.utils.hashing import content_hash
from benchmarks.common import report
from benchmarks.common.curves import difference
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher
from benchmarks.common.report import Kept
from benchmarks.search import peers_arms

THREADS, TEST_TOKENS, SEQUENCE = 2, 16384, 256
PACKAGES = {"modelopt": "nvidia-modelopt", "olive": "olive-ai"}
AS_IT_IS = "teacher, 16 bits"
MINE, TRIALS = "AutoDistill, search", "AutoDistill, all of the box for trials"
# The share of the training that goes to trials.
EXPLORED = {MINE: 0.5, TRIALS: 1.0}
MAX, AWQ = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG"
ARMS = {
    AS_IT_IS: partial(peers_arms.as_it_is),
    "Olive, RTN": partial(peers_arms.olive, kind="Rtn"),
    "Olive, RTN, embeddings too": partial(peers_arms.olive, kind="Rtn", whole=True),
    "Olive, GPTQ": partial(peers_arms.olive, kind="Gptq"),
    "Model Optimizer, INT4": partial(peers_arms.modelopt, preset=MAX),
    "Model Optimizer, INT4 AWQ": partial(peers_arms.modelopt, preset=AWQ),
    "Model Optimizer, QAD": partial(peers_arms.modelopt, preset=AWQ, loss="teacher"),
    # This arm gets what our default space's start knows: its rate, and the teacher's quarter of the loss.
    "Model Optimizer, QAD told our rate and weight": partial(peers_arms.modelopt, preset=AWQ, loss="both", rate=1e-4),
}

HEAD = f"""SmolLM2-135M, distributed as Q4_1 and dequantised, so that "16 bits" is that model and not the one
before it was rounded, and Python's own documentation; {TEST_TOKENS:,} test tokens that none has seen, each result
as its own tool computes it in torch. This search: `autodistill search --budget {{budget}}` with a time
box of {{box:.0f}} s on {THREADS} cores, everything included, its student read back from the exported
file. The others: Model Optimizer {{modelopt}} and Olive {{olive}}, weights in 4 bits, groups of
{peers_arms.GROUP} (their own 128 does not divide this model's rows), calibrated on
{peers_arms.CALIBRATION} sequences of the training text ({peers_arms.FOR_AWQ} for AWQ); what trains has
{{seconds:.0f}} s of processor time, as much as the search may use."""
NOTES = """Half of the training of a search is for the best student, trained on in the rest of the box; where all of the
box is for trials (`--explore 1`) none is. QAD is Model Optimizer's quantisation-aware distillation from the live
teacher's probabilities, which begins with its AWQ, by its documents' rate of 1e-5, warm-up and cosine; its guide says
that it gives back what rounding took and teaches no new text. The last arm is told what our default space's start has:
ten times the rate, and three quarters of the loss for the labels. Steps are of one sequence of 256 tokens everywhere.
Olive trains nothing. Differences are in points, paired and bootstrapped by document."""
LIMITS = """## Limits

One small model, one text, one seed, and no GPU, for which both tools are made and where their kernels would train
faster. Neither searches: the settings are ours. The search pays for trials that it drops, for choosing on validation
and for an export that is run and measured; the others for none of these."""


def main() -> None:
    """Run each arm in a process of its own, and write the report of what they made."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--budget", default="210MB", help="of the search")
    parser.add_argument("--box", type=parse_duration, default=600.0, help="of the search, on two cores")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--teacher", default="smollm2", help=argparse.SUPPRESS)
    parser.add_argument("--data", default="pydoc", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--runner", default="", help=argparse.SUPPRESS)
    # The box is what a search needs on a busy machine. It ends sooner, as it may read so small a text only a few times.
    # It runs without Ray, whose sockets cannot have the long names of nested temporary folders.
    arguments = parse(parser, box=120.0, context=256, runner="inline")
    if arguments.arm:
        print(json.dumps(made(arguments)))
        return
    arms = (*ARMS, *EXPLORED)
    if arguments.smoke:
        arguments.teacher, arguments.data = tiny_teacher(), tiny_data(60)
        arms = (AS_IT_IS, MINE)
        versions = dict.fromkeys(PACKAGES, "(left out)")
    else:
        versions = {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}
    kept = Kept("peers", content_hash([arguments.budget, arguments.box, versions]), arguments.time)
    found = {}
    for name in arms:
        given = ("arm", name), ("teacher", arguments.teacher), ("data", arguments.data)
        given += ("budget", arguments.budget), ("box", f"{arguments.box}s"), ("context", str(arguments.context))
        given += (("runner", arguments.runner),) if arguments.runner else ()
        words = [word for option, value in given for word in (f"--{option}", value)]
        command = [sys.executable, "-m", "benchmarks.search.peers", *words]
        found[name] = kept.get(name, partial(_child, command))
        print(f"{name}: {found[name]['accuracy'][0]:.4f}", file=sys.stderr, flush=True)
    title = "The same teacher, text and processor time, in this search and in other tools"
    print(report.write("peers", title, sections(found, versions, arguments)))


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def made(asked: argparse.Namespace) -> dict[str, Any]:
    """Return an arm's result: accuracy with its error on test, bytes, wall-clock and processor seconds, tokens."""
    torch.set_num_threads(THREADS)
    cache, name = cache_folder(), asked.arm
    teacher = materialize(resolve_teacher(asked.teacher), cache).folder
    data = prepare(resolve_data(asked.data), teacher, tokenizer_fingerprint(teacher), SEQUENCE, cache).folder
    began = time.monotonic()
    train = load_split(data, "train")
    own = name in EXPLORED
    one = searched(asked, EXPLORED[name]) if own else ARMS[name](teacher, train, THREADS * asked.box)
    wall, processor = time.monotonic() - began, time.process_time()
    scores, _ = score(one.model.eval(), load_split(data, "test").head(TEST_TOKENS))
    return {
        "accuracy": clustered_mean(scores.correct, scores.documents),
        "documents": per_document(scores.correct, scores.documents),
        "perplexity": float(np.exp(scores.nll.mean())),
        "size": one.size,
        "tokens": one.tokens,
        "seconds": wall,
        "processor": processor,
    }


def searched(asked: argparse.Namespace, explore: float) -> peers_arms.Made:
    """Return the student that the command exports, read back from its file. The run is kept for inspection."""
    out = cache_folder() / "benchmarks" / "peers-runs"
    command = [
        "autodistill",
        "search",
        "--budget",
        asked.budget,
        "--time",
        f"{asked.box}s",
        "--explore",
        f"{explore:g}",
    ]
    command += ["--teacher", asked.teacher, "--data", asked.data, "--runs", str(out), "--json"]
    command += ["--context", str(asked.context)] if asked.context else []
    command += ["--runner", asked.runner] if asked.runner else []
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, check=True, text=True)
    document = json.loads(done.stdout)
    file, tokens = Path(document["paths"]["gguf"]), document["best"]["train_tokens"]
    with tempfile.TemporaryDirectory() as unpacked:
        folder = materialize(resolve_teacher(str(file)), Path(unpacked)).folder
        model = load_model(folder, torch.float32)
    return peers_arms.Made(model=model, size=file.stat().st_size, tokens=tokens)


def sections(found: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str], asked: Any) -> list[str]:
    """Return the parts of the report."""
    mine, seconds = found[MINE], THREADS * asked.box
    given = {**vars(asked), **versions, "seconds": seconds}
    rows = []
    for name in (name for name in (*EXPLORED, *ARMS) if name in found):
        one = found[name]
        accuracy, error = one["accuracy"]
        rows.append(
            [
                name,
                f"{100 * accuracy:.2f} ± {100 * error:.2f}",
                "" if name == MINE else difference([mine["documents"]], one["documents"], "sum", "count"),
                f"{one['perplexity']:.2f}",
                format_bytes(one["size"]),
                f"{one['tokens']:,}" if one["tokens"] else "",
                f"{one['seconds']:.0f}",
                f"{one['processor']:.0f}" if name not in EXPLORED else "",
            ]
        )
    titles = ["tool", "next token, %", "this search is better by", "perplexity", "weights", "trained on", "s", "core s"]
    return [HEAD.format(**given), report.table(titles, rows), NOTES, LIMITS]


if __name__ == "__main__":
    main()
