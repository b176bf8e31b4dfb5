"""Worker-seconds that a search spends on anything except its trials, against a plain Ray Tune loop in one run.

    python -m benchmarks.reliability.orchestration [--trials 12] [--plain-trials 8] [--seconds 0 30] [--time 5m]

Trials do nothing, or sleep for a fixed time. The rest is orchestration: processes that start and import, assignments in
transit, and workers that wait for them. Ours are run by the search's own runner, with a list of trials in place of its
campaign. The plain loop is a function trainable as in the documentation of Ray Tune. It imports torch and transformers,
as any loop that distils must. Both run on the same Ray. They report for each trial when its work began and ended, and
in which process. Processor time is that of this process and all of Ray's. It does not depend on other work on the
machine. Measured runs are not repeated as long as the search's files, the packages and the machine are the same. A call
that ends early is continued by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from autodistill.hardware.machine import detect
from autodistill.search.runners import ray_cluster as cluster
from autodistill.search.runners.ray import drive
from autodistill.search.runners.ray_local import LocalRay
from autodistill.utils.hashing import content_hash
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of
from benchmarks.common.report import Kept


@dataclass(frozen=True, kw_only=True)
class Spell:
    """The work of one trial: the `time.time()` of its beginning and end, and the process that did it."""

    began: float
    ended: float
    process: int

    @classmethod
    def of(cls, seconds: float) -> Spell:
        """Sleep for some seconds, and return when that was."""
        began = time.time()
        time.sleep(seconds)
        return cls(began=began, ended=time.time(), process=os.getpid())


class Trials:
    """A source of `count` trials that take `seconds` each."""

    def __init__(self, count: int, seconds: float) -> None:
        self._left = [seconds] * count
        self.spells: list[Spell] = []

    def next(self) -> Any:
        """Return the next trial, or None."""
        return self._left.pop() if self._left else None

    def take(self, assignment: Any, outcome: Mapping[str, Any]) -> None:
        """Record the outcome of a trial."""
        self.spells.append(outcome["report"])


def sleeper() -> Callable[[float], dict[str, Any]]:
    """Return a worker's function: it sleeps, and reports when."""
    return lambda seconds: {"report": Spell.of(seconds)}


def ours(count: int, seconds: float, workers: int) -> list[Spell]:
    """Run trials with this project's runner on Ray."""
    trials = Trials(count, seconds)
    drive(trials, workers, [{"CPU": 1.0}], sleeper, lambda: None)
    return trials.spells


def plain(count: int, seconds: float, workers: int) -> list[Spell]:
    """Run the same work with Ray Tune alone."""
    from ray import tune

    def train(config: dict[str, Any]) -> None:
        import torch  # noqa: F401
        import transformers

        _ = transformers.AutoModelForCausalLM
        spell = Spell.of(config["seconds"])
        tune.report({"began": spell.began, "ended": spell.ended, "process": spell.process})

    storage = tempfile.mkdtemp()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        results = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            param_space={"seconds": seconds},
            tune_config=tune.TuneConfig(num_samples=count),
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    names = ("began", "ended", "process")
    return [Spell(**{name: result.metrics[name] for name in names}) for result in results if result.metrics]


class Processors:
    """Measures the processor seconds of this process and all its children within the context.

    A process that ends counts as it was last seen, at most a tenth of a second before.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._first: dict[tuple[int, float], float] = {}
        self._last: dict[tuple[int, float], float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Processors:
        self._first = dict(self._look())
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        self._last.update(self._look())

    @property
    def seconds(self) -> float:
        """The processor seconds that the processes have taken so far."""
        return sum(spent - self._first.get(process, 0.0) for process, spent in self._last.items())

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._last.update(self._look())

    def _look(self) -> Iterator[tuple[tuple[int, float], float]]:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                yield (process.pid, process.create_time()), times.user + times.system


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run spent in addition to the work of its trials.

    Attributes:
        trials, workers, wall: Numbers of trials and workers, and seconds of the run.
        spent: Worker-seconds in addition to the work.
        share: These as a share of all worker-seconds.
        first: Mean seconds until a worker's first trial began.
        gaps: Seconds between two trials in the same worker process.
        processors: Processor seconds of the whole run.
    """

    trials: int
    workers: int
    wall: float
    spent: float
    share: float
    first: float
    gaps: tuple[float, ...]
    processors: float


def measure(run: Callable[[int, float, int], list[Spell]], count: int, seconds: float, workers: int) -> Cost:
    """Run the work, and return what was spent in addition to it."""
    start = time.time()
    with Processors() as processors:
        spells = run(count, seconds, workers)
    wall = time.time() - start
    assert len(spells) == count
    by_process: dict[int, list[Spell]] = {}
    for spell in sorted(spells, key=lambda spell: spell.began):
        by_process.setdefault(spell.process, []).append(spell)
    spent = workers * wall - sum(spell.ended - spell.began for spell in spells)
    firsts = sorted(own[0].began - start for own in by_process.values())[:workers]
    gaps = [later.began - earlier.ended for own in by_process.values() for earlier, later in pairwise(own)]
    return Cost(
        trials=count,
        workers=workers,
        wall=wall,
        spent=spent,
        share=spent / (workers * wall),
        first=statistics.mean(firsts),
        gaps=tuple(gaps),
        processors=processors.seconds,
    )


def line(name: str, seconds: float, cost: Cost) -> Sequence[Any]:
    """Return a row of the table."""
    gaps = f"{statistics.mean(cost.gaps):.2f} (most {max(cost.gaps):.2f})" if cost.gaps else "no process has two"
    beyond = (cost.spent - cost.workers * cost.first) / max(1, cost.trials - cost.workers)
    return (
        name,
        f"{seconds:g}",
        cost.trials,
        cost.workers,
        f"{cost.wall:.1f}",
        f"{cost.first:.1f}",
        gaps,
        f"{beyond:.2f}",
        f"{cost.spent / cost.trials:.2f}",
        f"{cost.share:.1%}",
        f"{cost.processors / cost.trials:.2f}",
    )


TITLES = (
    "loop",
    "trial, s",
    "trials",
    "workers",
    "wall, s",
    "until the first trial, s",
    "from trial to trial in a worker, s",
    "a trial beyond the first of each worker, s",
    "a trial, s",
    "of all worker-seconds",
    "processor time a trial, s",
)


def source() -> str:
    """Return a hash of what the figures depend on: this program, the search's files, packages and machine."""
    files = [Path(__file__), *sorted(Path(cluster.__file__).parent.glob("*.py"))]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    versions = [importlib.metadata.version(name) for name in ("ray", "torch", "transformers")]
    return content_hash([digests, versions, report.machine()])


def main() -> None:
    """Time searches and plain loops of Ray Tune in turn, and write the report of what each spends."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--trials", type=int, default=12, help="of each run")
    parser.add_argument("--seconds", type=float, nargs="*", default=[0.0, 30.0], help="that a trial works for")
    parser.add_argument("--plain-trials", type=int, default=8, help="of each run of the plain loop")
    arguments = parse(parser, trials=2, seconds=[0.0], plain_trials=2)
    kept = Kept("orchestration", source(), arguments.time)
    workers = detect().cpus
    lines, loads = [], []
    with contextlib.ExitStack() as stack:

        @cache
        def started() -> float:
            """Start Ray once, when something must be measured. Return the seconds that it took."""
            began = time.time()
            ray = LocalRay(detect())
            stack.callback(ray.leave)
            ray.wait()
            return time.time() - began

        def measured(run: Callable[[int, float, int], list[Spell]], count: int, seconds: float) -> dict[str, Any]:
            started()
            return {"cost": asdict(measure(run, count, seconds, workers)), "load": os.getloadavg()[1]}

        start = kept.get("start", started)
        for seconds in arguments.seconds:
            for name, run, count in (
                ("ours", ours, arguments.trials),
                ("plain Ray Tune", plain, arguments.plain_trials),
            ):
                found = kept.get(f"{name}, {count} of {seconds:g} s", partial(measured, run, count, seconds))
                lines.append(line(name, seconds, Cost(**found["cost"])))
                loads.append(found["load"])
                print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    notes = (
        f"Ray itself took {start:.1f} s to start, once for both; a search starts it while the teacher's outputs are "
        f"cached. Other processes shared the cores: the load of the five minutes before the end of each run was "
        f"{min(loads):.1f} to {max(loads):.1f}."
    )
    print(report.write("orchestration", "What orchestration costs", [notes, report.table(TITLES, lines)]))


if __name__ == "__main__":
    main()
