"""What holds on a GPU: tests, memory and speed against their predictions, a shared GPU, a search beside who does less?

    python -m benchmarks.hardware.on_gpu [--time 24m] [--rehearse] [--parts search "no search"]

`make gpu` runs it. Every part has its own time limit, and a call ends within 25 minutes. What was measured is kept. The
same command continues with the rest, and tries again what failed. A part that fails is a line of the report. Without a
CUDA GPU, the program says so and ends. `--rehearse` runs each part on the CPU, with a tiny teacher. This tests the
program, but gives no figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodistill.options import cache_folder
from autodistill.units import format_bytes
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report
from benchmarks.hardware import gpu_parts
from benchmarks.hardware.gpu_parts import MEASURES

# Seconds that each part may take. A part that is not done by then fails alone.
LIMITS = {
    "tests": 240,
    "training memory": 180,
    "weights": 60,
    "library": 120,
    "step": 240,
    "trainers": 120,
    "shared GPU": 300,
    "search": 360,
    "no search": 360,
    "recipe": 360,
    "serving": 120,
}
STRATEGIES = {"logit_kd": "the teacher's likeliest tokens, from its cache", "gkd": "the teacher in each step"}
ARMS = {"search": "search", "no search": "no-search", "recipe": "recipe"}
"""The parts that compare a search with those who do less, and their names in `versus`."""
CPU_TOKENS = 78_080
"""Tokens that the search read on two cores at 150 MB (`reports/2026-11-29-versus.json`); a GPU should read 100 times as
many."""


class Setting:
    """What is run, and on which device.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        teacher, data: References.
        step: Tokens of the step that is traced.
        length: Tokens of a sequence.
        memory: Ways of training whose memory is measured.
        short: Further options of the search whose trials share the GPU.
        solved: Teacher, text and context of the parts that solve.
        arm: Budget, seconds and, in a rehearsal, tokens of each arm.
        exported: Files that searches exported, the last one last.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.exported: list[str] = []
        if device == "cuda":
            self.teacher, self.data = "smollm2", "pydoc"
            self.step, self.length = 16384, 256
            self.memory = ["4, bfloat16"]
            self.short = ["--trials", "4", "--tokens", "262144"]
            self.solved: dict[str, Any] = {"teacher": self.teacher, "data": self.data, "context": 2048}
            self.arm: dict[str, Any] = {"share": 150e6, "box": 240.0, "tokens": None}
        else:
            self.teacher, self.data = program.tiny_teacher(layers=3), program.tiny_data()
            self.step, self.length = 128, 64
            self.memory = ["4 sequences at once"]
            self.short = ["--trials", "2", "--tokens", str(4 * self.step), "--context", "256"]
            self.short += ["--sequence-length", str(self.length), "--step-tokens", str(self.step)]
            wider = program.tiny_teacher(layers=3, width=128, heads=2, kv_heads=1, ffn=256)
            self.solved = {"teacher": wider, "data": program.tiny_data(60), "context": 256}
            self.arm = {"share": 0.9, "box": 60.0, "tokens": 4096}

    def key(self, part: str) -> str:
        """Return the key of a part's result."""
        return f"{part}, {self.device}"


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return a command's output, and the reason of its failure in a line, or "".

    A command that takes too long is ended. What a command that failed wrote to stderr is added to `on-gpu.log` in the
    cache.
    """
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=program.ROOT,
        env=os.environ | dict(environment or {}),
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=seconds)
    except BaseException as error:
        # What it has started ends with it.
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return "", f"not done after {seconds:.0f} s"
    done = subprocess.CompletedProcess(command, child.returncode, output, errors)
    if done.returncode:
        log = cache_folder() / "benchmarks" / "on-gpu.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{' '.join(command)}\n{done.stderr}\n")
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return done.stdout, said[-1] if said else f"exit code {done.returncode}"
    return done.stdout, ""


def tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Run the tests of devices other than the CPU on this device. A rehearsal uses a pretended device."""
    kind = "cuda" if setting.device == "cuda" else "pretend"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/on_device", "-q"]
    said, failed = run(command, seconds, {"AUTODISTILL_TEST_DEVICE": kind})
    last = said.strip().splitlines()[-1:]
    return {"device": kind, "said": last[0].strip("= ") if last else "", "failed": failed and f"tests failed: {last}"}


def training_memory(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare predicted and measured memory of training."""
    found: dict[str, Any] = {"modes": {}, "failed": ""}
    for mode in setting.memory:
        command = [sys.executable, "-m", "benchmarks.hardware.training_memory", "--measure", mode]
        command += ["--device", setting.device, *(["--smoke"] if setting.device == "cpu" else [])]
        said, failed = run(command, seconds / len(setting.memory))
        if failed:
            return found | {"failed": failed}
        found["modes"][mode] = json.loads(said.splitlines()[-1])
    return found


def weights(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare the predicted and the measured memory of a model's weights."""
    return measured("weights", setting, seconds, teacher=setting.teacher)


def library(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare the memory and the time of solving with its plan."""
    budget = 10**9 if setting.device == "cpu" else 175 * 10**6
    return measured("library", setting, seconds, budget=budget, tokens=512, **setting.solved)


def trainers(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare a step with that of TRL's stable trainer."""
    return measured("trainers", setting, seconds, teacher=setting.teacher, length=setting.length, tokens=setting.step)


def arm(part: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Run an arm of `versus`."""
    return measured("arm", setting, seconds, name=ARMS[part], **setting.solved, **setting.arm)


def measured(function: str, setting: Setting, seconds: float, **given: Any) -> dict[str, Any]:
    """Return what a function of `gpu_parts` measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hardware.on_gpu", "--measure", function, setting.device]
    said, failed = run([*command, json.dumps(given)], seconds)
    return {"failed": failed} | ({} if failed else json.loads(said.splitlines()[-1]))


def step(setting: Setting, seconds: float) -> dict[str, Any]:
    """Return the tokens per second of a training step by strategy, and its lower bound."""
    found: dict[str, Any] = {"strategies": {}, "failed": ""}
    folder = cache_folder() / "benchmarks" / "on-gpu-traces"
    for name in STRATEGIES:
        command = [sys.executable, "-m", "autodistill", "profile", name, "--teacher", setting.teacher, "--json"]
        command += ["--step-tokens", str(setting.step), "--sequence-length", str(setting.length)]
        command += ["--out", str(folder / name)]
        said, failed = run(command, seconds / len(STRATEGIES))
        if failed:
            return found | {"failed": f"{name}: {failed}"}
        profile = json.loads(said)
        kept = ("tokens_per_second", "floor_tokens_per_second", "step_ms", "floor_ms", "parts", "each_step", "advice")
        found["strategies"][name] = {part: profile[part] for part in kept} | {"step_tokens": setting.step}
    return found


def shared(setting: Setting, seconds: float) -> dict[str, Any]:
    """Run a search whose trials share the GPU by halves. In a rehearsal, they share cores."""
    share = ["--gpus-per-trial", "0.5"] if setting.device == "cuda" else ["--cpus-per-trial", "1"]
    return _searched(setting, [*setting.short, *share], seconds)


def _searched(setting: Setting, options: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a search in a new folder, and return a summary of its result."""
    out = cache_folder() / "benchmarks" / "on-gpu-runs" / str(time.time_ns())
    command = [sys.executable, "-m", "autodistill", "search", "--budget", "16GB", "--runner", "ray", "--json"]
    command += ["--teacher", setting.teacher, "--data", setting.data, "--runs", str(out), *options]
    began = time.monotonic()
    said, failed = run(command, seconds)
    took = time.monotonic() - began
    if failed:
        return {"failed": failed, "seconds": took}
    document = json.loads(said)
    best, plan = document["best"], document["plan"]
    return {
        "failed": "",
        "seconds": took,
        "workers": plan["workers"],
        "trials": plan["trials"],
        "best": best["row_id"],
        "accuracy": best["accuracy"],
        "memory_bytes": best["memory_bytes"],
        "notes": document["notes"],
    }


def serving(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare the memory of the runtimes that are here with its prediction, on what the search exported."""
    known = [one for one in setting.exported if Path(one).exists()]
    if not known:
        return {"failed": "the search has exported nothing yet"}
    file = Path(known[-1])
    folder = file.parents[1] / "huggingface"
    ways = [("llama.cpp", file), ("transformers", folder)]
    if importlib.util.find_spec("vllm") is not None:
        ways.append(("vllm", folder))
    found: dict[str, Any] = {"runtimes": {}, "failed": ""}
    for runtime, path in ways:
        command = [sys.executable, "-m", "autodistill", "measure", str(path), "--json", "--rounds", "1", "--busy"]
        command += ["--runs", str(cache_folder() / "benchmarks" / "on-gpu-runs" / "measured")]
        said, failed = run([*command, *(["--runtime", runtime] if path == folder else [])], seconds / len(ways))
        if failed:
            return found | {"failed": f"{runtime}: {failed}"}
        document = json.loads(said)
        held = document["measured"]["peak_bytes"]
        found["runtimes"][runtime] = {"held": held, "predicted": document["predicted"].get("memory_bytes")}
    return found


PARTS: Mapping[str, Callable[[Setting, float], dict[str, Any]]] = {
    "tests": tests,
    "training memory": training_memory,
    "weights": weights,
    "library": library,
    "step": step,
    "trainers": trainers,
    "shared GPU": shared,
    **{name: partial(arm, name) for name in ARMS},
    "serving": serving,
}


def sections(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the parts of the report."""
    lines = [[name, "failed: " + one["failed"] if one["failed"] else "done"] for name, one in found.items()]
    parts = ["## Parts\n\n" + report.table(["part", "what became of it"], lines)]
    ran = {name: one for name, one in found.items() if not one["failed"]}
    if "tests" in ran:
        parts.append(f"## Tests\n\n`tests/on_device` on {ran['tests']['device']}: {ran['tests']['said']}.")
    memory = [
        [f"training, {mode}", *_held(one["predicted"], one["grown"])]
        for mode, one in ran.get("training memory", {}).get("modes", {}).items()
    ]
    for name, what in (("weights", "weights in 16 bits"), ("library", "solving")):
        if name in ran:
            memory.append([what, *_held(ran[name]["predicted"], ran[name]["held"])])
    for runtime, one in ran.get("serving", {}).get("runtimes", {}).items():
        if one["held"] and one["predicted"]:
            memory.append([f"serving, {runtime}", *_held(one["predicted"], one["held"])])
    if memory:
        parts.append("## Memory\n\n" + report.table(["of", "predicted", "allocated", "ratio"], memory))
    if "step" in ran:
        steps = [
            [
                f"`{name}`: {STRATEGIES[name]}",
                f"{one['step_tokens']:,}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['floor_tokens_per_second']:,.0f}",
                f"{one['step_ms'] / one['floor_ms']:.2f}",
                one["parts"][0]["part"],
                f"{one['each_step']['launches']:,.0f}",
                f"{one['each_step']['synchronizations']:,.0f}",
            ]
            for name, one in ran["step"]["strategies"].items()
        ]
        titles = ["strategy", "step", "tokens/s", "floor", "times the floor", "largest part", "kernels", "waits"]
        parts.append("## A training step\n\n" + report.table(titles, steps))
    if "trainers" in ran:
        one = ran["trainers"]
        parts.append(
            f"## Another trainer\n\nSteps of {one['step_tokens']:,} tokens, each with its teacher and generalised JSD: "
            f"{one['ours']:,.0f} tokens/s here, and {one['theirs']:,.0f} in TRL's DistillationTrainer. Here it is "
            f"{one['ours'] / one['theirs']:.2f} times as fast."
        )
    if "shared GPU" in ran:
        one = ran["shared GPU"]
        titles = ["took", "workers", "trials planned", "exported", "accuracy on validation"]
        line = [f"{one['seconds']:.0f} s", one["workers"], one["trials"], one["best"], f"{one['accuracy']:.4f}"]
        parts.append("## Two trials on a GPU\n\n" + report.table(titles, [line]))
    compared = [
        [
            name,
            ran[name]["what"],
            f"{ran[name]['tokens']:,}",
            f"{ran[name]['tokens'] / CPU_TOKENS:.0f}",
            f"{ran[name]['nll'][0]:.4f} ± {ran[name]['nll'][1] or 0:.4f}",
            f"{100 * ran[name]['accuracy'][0]:.2f} ± {100 * (ran[name]['accuracy'][1] or 0):.2f}",
        ]
        for name in ARMS
        if name in ran
    ]
    if compared:
        titles = ["arm", "what", "tokens", "times those on two cores", "NLL", "accuracy, %"]
        parts.append("## A search beside who does less, in equal time\n\n" + report.table(titles, compared))
    return parts


def _held(predicted: int, held: int) -> list[str]:
    return [format_bytes(predicted), format_bytes(held), f"{predicted / held:.2f}" if held > 0 else "-"]


def found_of(names: Sequence[str], setting: Setting, kept: report.Kept, ends: float) -> dict[str, dict[str, Any]]:
    """Return what each part found, and run those that are not known, until the time `ends` of the monotonic clock."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        key = setting.key(name)
        if not kept.knows(key):
            left = ends - time.monotonic()
            if left < LIMITS[name] / 4:
                print(f"no time is left for {name}: give the same command again", file=sys.stderr)
                continue
            print(f"{name}, at most {min(left, LIMITS[name]):.0f} s", file=sys.stderr, flush=True)
            made = PARTS[name](setting, min(left, LIMITS[name]))
            if made["failed"]:
                # It is not kept, so that the same command tries it again.
                report.note(key, made)
                found[name] = made
                continue
            kept.get(key, lambda made=made: made)
        found[name] = kept.get(key, dict)
        setting.exported += [found[name]["file"]] if name == "search" else []
    return found


def main() -> None:
    """Run each part that was not done before, as long as there is time, and write the report of all."""
    parser = program.parser_of(__doc__, time=True)
    parser.add_argument("--rehearse", action="store_true", help="each part on the CPU, where there is no GPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="by default all")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "DEVICE", "JSON"), help="one measurement, for a process")
    given = program.parse(parser, parts=["training memory", "weights", "step"])
    if given.measure:
        name, device, options = given.measure
        with program.stdout_to_stderr():
            said = MEASURES[name](device, **json.loads(options))
        print(json.dumps(said))
        return
    small = given.rehearse or given.smoke
    if not torch.cuda.is_available() and not small:
        sys.exit("there is no CUDA GPU here: run make gpu where one is, or make gpu REHEARSE=1 to try it on the CPU")
    device = "cpu" if small else "cuda"
    setting = Setting(device)
    ends = time.monotonic() + min(given.time, 24 * 60)
    own = (Path(__file__), Path(gpu_parts.__file__))
    sources = [*map(file_hash, own), *sorted(map(file_hash, (program.ROOT / "autodistill").rglob("*.py")))]
    kept = report.Kept("on-gpu", content_hash([*sources, report.machine()]))
    found = found_of(given.parts, setting, kept, ends)
    for name, one in found.items():
        print(f"{name}: {one['failed'] or 'done'}", file=sys.stderr)
    rehearsed = "" if device == "cuda" else ", rehearsed on the CPU"
    print(report.write("on-gpu" if device == "cuda" else "on-gpu-rehearsal", f"On a GPU{rehearsed}", sections(found)))


if __name__ == "__main__":
    main()
