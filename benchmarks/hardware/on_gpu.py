"""What holds on a GPU: tests, memory and speed against their predictions, a GPU shared by two trials, a real search?

    python -m benchmarks.hardware.on_gpu [--time 24m] [--rehearse]

`make gpu` runs it. Every part has its own time limit, and all of them together stay below 25 minutes. Measurements are
kept, and the same command continues with the rest. A part that fails is a line of the report. Without a CUDA GPU, the
program says so and ends. `--rehearse` runs each part on the CPU, as far as possible. This tests the program, but gives
no figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autodistill.options import cache_folder
from autodistill.units import format_bytes
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report

# Seconds that each part may take. A part that is not done by then fails alone.
LIMITS = {"tests": 240, "training memory": 180, "weights": 60, "step": 240, "shared GPU": 300, "search": 420}
STRATEGIES = {"logit_kd": "the teacher's likeliest tokens, from its cache", "gkd": "the teacher in each step"}
SEARCH = ["--budget", "16GB", "--runner", "ray"]


class Setting:
    """What is run, and on which device.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        teacher, data: References.
        step: Tokens of the step that is traced.
        search: Further options of each search.
    """

    def __init__(self, device: str, *, smoke: bool) -> None:
        self.device = device
        self.teacher = program.tiny_teacher(layers=3) if smoke else "smollm2"
        self.data = program.tiny_data() if smoke else "pydoc"
        self.step = 128 if smoke else 1024 if device == "cpu" else 16384
        self.length = 64 if smoke else 256
        self.memory = ["4, bfloat16"] if device == "cuda" else ["4 sequences at once"]
        self.smoke = smoke
        small = ["--trials", "2", "--tokens", str(4 * self.step)]
        self.short = small if device == "cpu" else ["--trials", "4", "--tokens", "262144"]
        self.search = small if device == "cpu" else ["--time", "6m"]
        if smoke:
            self.short += ["--context", "256", "--sequence-length", "64", "--step-tokens", "128"]
            self.search = self.short

    def key(self, part: str) -> str:
        """Return the key of a part's result."""
        return f"{part}, {self.device}{', smoke' if self.smoke else ''}"


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return a command's output, and the reason of its failure in a line, or "".

    A command that takes too long is ended.
    """
    given = os.environ | dict(environment or {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=program.ROOT, env=given, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"not done after {seconds:.0f} s"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return done.stdout, said[-1] if said else f"exit code {done.returncode}"
    return done.stdout, ""


def tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Run the tests of devices other than the CPU on this device. A rehearsal uses a pretended device."""
    kind = "cuda" if setting.device == "cuda" else "pretend"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/on_device", "-q"]
    if setting.smoke:
        command += ["-k", "test_what_is_written_at_once_is_what_is_written_alone"]
    said, failed = run(command, seconds, {"AUTODISTILL_TEST_DEVICE": kind})
    last = said.strip().splitlines()[-1:]
    return {"device": kind, "said": last[0].strip("= ") if last else "", "failed": failed and f"tests failed: {last}"}


def training_memory(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare predicted and measured memory of training."""
    found: dict[str, Any] = {"modes": {}, "failed": ""}
    for mode in setting.memory:
        command = [sys.executable, "-m", "benchmarks.hardware.training_memory", "--measure", mode]
        command += ["--device", setting.device, *(["--smoke"] if setting.smoke else [])]
        said, failed = run(command, seconds / len(setting.memory))
        if failed:
            return found | {"failed": failed}
        found["modes"][mode] = json.loads(said.splitlines()[-1])
    return found


def weights(setting: Setting, seconds: float) -> dict[str, Any]:
    """Compare the predicted and the measured memory of a model's weights, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hardware.on_gpu", "--weights", setting.teacher, setting.device]
    said, failed = run(command, seconds)
    return {"failed": failed} | ({} if failed else json.loads(said.splitlines()[-1]))


def held_by_weights(teacher: str, device: str) -> dict[str, int]:
    """Return the bytes that loading a model in 16 bits takes, and the prediction. Runs in a process of its own."""
    import psutil

    from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
    from autodistill.models.config import spec_from_config
    from autodistill.models.loading import load_model
    from autodistill.models.model_folder import read_config

    folder = materialize(resolve_teacher(teacher), cache_folder()).folder
    spec = spec_from_config(read_config(folder))

    def held() -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.memory_allocated())
        return int(psutil.Process().memory_info().rss)

    # Memory that libraries take at their first use does not belong to the model.
    load_model(folder, torch.bfloat16, device)
    before = held()
    model = load_model(folder, torch.bfloat16, device)
    return {"predicted": 2 * spec.parameters, "held": held() - before, "weights": len(list(model.parameters()))}


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
    return _searched(setting, "on-gpu-shared", [*setting.short, *share], seconds)


def search(setting: Setting, seconds: float) -> dict[str, Any]:
    """Run a search on the GPU."""
    return _searched(setting, "on-gpu", setting.search, seconds)


def _searched(setting: Setting, name: str, options: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a search in a new folder, and return a summary of its result."""
    out = cache_folder() / "benchmarks" / "on-gpu-runs" / str(time.time_ns())
    command = [sys.executable, "-m", "autodistill", "search", *SEARCH, "--teacher", setting.teacher, "--json"]
    command += ["--data", setting.data, "--name", name, "--runs", str(out), *options]
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


PARTS: Mapping[str, Callable[[Setting, float], dict[str, Any]]] = {
    "tests": tests,
    "training memory": training_memory,
    "weights": weights,
    "step": step,
    "shared GPU": shared,
    "search": search,
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
    if "weights" in ran:
        memory.append(["weights in 16 bits", *_held(ran["weights"]["predicted"], ran["weights"]["held"])])
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
    searches = [
        [name, f"{one['seconds']:.0f} s", one["workers"], one["trials"], one["best"], f"{one['accuracy']:.4f}"]
        for name, one in ran.items()
        if name in ("shared GPU", "search")
    ]
    if searches:
        titles = ["search", "took", "workers", "trials planned", "exported", "accuracy on validation"]
        parts.append("## Searches\n\n" + report.table(titles, searches))
    return parts


def _held(predicted: int, held: int) -> list[str]:
    return [format_bytes(predicted), format_bytes(held), f"{predicted / held:.2f}" if held > 0 else "-"]


def main() -> None:
    """Run each part that was not done before, as long as there is time, and write the report of all."""
    parser = program.parser_of(__doc__, time=True)
    parser.add_argument("--rehearse", action="store_true", help="each part on the CPU, where there is no GPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="by default all")
    parser.add_argument("--weights", nargs=2, metavar=("TEACHER", "DEVICE"), help="one measurement, for a process")
    given = program.parse(parser, parts=["tests", "training memory", "weights", "step"])
    if given.weights:
        print(json.dumps(held_by_weights(*given.weights)))
        return
    if not torch.cuda.is_available() and not (given.rehearse or given.smoke):
        sys.exit("there is no CUDA GPU here: run make gpu where one is, or make gpu REHEARSE=1 to try it on the CPU")
    device = "cuda" if torch.cuda.is_available() and not given.rehearse else "cpu"
    setting = Setting(device, smoke=given.smoke)
    ends = time.monotonic() + min(given.time, 24 * 60)
    sources = [file_hash(Path(__file__)), *sorted(map(file_hash, (program.ROOT / "autodistill").rglob("*.py")))]
    kept = report.Kept("on-gpu", content_hash([*sources, report.machine()]), ends - time.monotonic())
    found = {}
    for name in given.parts:
        if not kept.knows(setting.key(name)):
            left = ends - time.monotonic()
            if left < LIMITS[name] / 4:
                print(f"no time is left for {name}: give the same command again", file=sys.stderr)
                continue
            print(f"{name}, at most {min(left, LIMITS[name]):.0f} s", file=sys.stderr, flush=True)
        found[name] = kept.get(
            setting.key(name), lambda name=name: PARTS[name](setting, min(ends - time.monotonic(), LIMITS[name]))
        )
    for name, one in found.items():
        print(f"{name}: {one['failed'] or 'done'}", file=sys.stderr)
    rehearsed = "" if device == "cuda" else ", rehearsed on the CPU"
    print(report.write("on-gpu" if device == "cuda" else "on-gpu-rehearsal", f"On a GPU{rehearsed}", sections(found)))


if __name__ == "__main__":
    main()
