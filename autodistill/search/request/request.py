"""What a person asks of a search, as it was typed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import Budget, Price
from autodistill.runs.run_folder import default_cache
from autodistill.utils.plain_dataclass import check_no_blank

DEFAULT_TEACHER, DEFAULT_DATA, DEFAULT_SPACE = "smollm2", "pydoc", "default"
DEFAULT_METRIC, DEFAULT_SAMPLER = "accuracy", "tpe"
RUNNERS = ("ray", "inline")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a person asks of a search; None is "the default", or on resuming "as before".

    Attributes:
        budget: Limits of the deployed student.
        context_by_default: Whether nobody asked for the budget's context: it is then lowered to what the teacher and
            every pretrained model read, and on resuming it is as before.
        memory_by_default, batch_by_default, device_by_default: Whether nobody asked for the budget's memory, batch
            or device: on resuming they are as before.
        strategy: Name or file of a strategy: it alone is trained, to the plan's tokens, and nothing is searched.
        teacher, data, space, metric, sampler: References and names.
        baselines: Names or files of the strategies that run first and are to be beaten, in place of the space's.
        tasks: Task files, whose tasks are measured beside the metric; one of them may be the metric, as "task:NAME".
        metric_command: A command that scores the student's folder; it ranks unless `metric` says otherwise.
        metric_direction: Whether more or less of its scores is better; more by default.
        metric_seconds: After which it is ended; ten minutes by default.
        evaluators: Names of installed or registered evaluators that are read at every rung beside the usual ones.
        objectives: Names parted by commas, where a search has more than its metric.
        device: Name of the one that the student is for, or None for this machine; a predicted latency is there.
        trials, tokens: Fixed instead of planned; with both, there is no time box unless `time_seconds` gives one. On
            resuming, more trials than were planned extend the search.
        sequence_length: Tokens of a training or evaluated sequence; 256 by default.
        warm_start: Names of earlier runs of the same space, teacher and data, parted by commas, to learn from.
        step_tokens: Training tokens of an optimiser step, whole sequences; one sequence by default, and on an
            accelerator as many as make it fast.
        time_seconds: The time box; on resuming a finished search, of what it is extended by.
        explore: Share of a time box's training that goes to trials; in the rest the best are trained on. By default
            half, and all of it where the space has lengths of its own or `confirm` takes the rest.
        confirm: Further seeds on which the best few are trained before one is chosen; none by default.
        seed: Of data order, projections and proposals.
        students_only: Whether only trained students may be chosen, and not what needs no training where that is better;
            a strategy that alone is trained always is.
        name: Of the run; a date and time by default.
        out: Folder of the runs.
        resume: Go on with the run `name`.
        runner: "ray" or "inline".
        ray_address: Of a running cluster to join, "auto" or host:port; by default a Ray is started here.
        gpus_per_trial: A fraction, so that several trials share a GPU, or a whole number; one by default.
        cpus_per_trial: Cores of a trial, where there are GPUs of each of its processes; planned by default.
        storage: URI below which events, checkpoints, students and what trials read are kept, so that the search, and
            each of its trials, can go on from any node that reaches it; by default they lie in `out` and `cache` alone.
        cache: Folder of everything that later searches may use again.
        cache_limit_bytes: Disk that cached teacher outputs may take, and on each node the copies of what a storage has.
        checkpoint_limit_bytes: Disk that checkpoints of stages and trained students may take in the run's folder, what
            is needed aside; by default a quarter of what is free.
        sharing, forking: Whether trials continue each other's stages, and whether proposals fork one on
            purpose; off to measure what each is worth. On resuming as before.
        price: Of an hour, for the cost of a plan.
        command: As typed, for the record.
        started: `time.monotonic()` at which the time box began.
    """

    budget: Budget
    context_by_default: bool = False
    memory_by_default: bool = False
    batch_by_default: bool = False
    device_by_default: bool = False
    strategy: str | None = None
    teacher: str | None = None
    data: str | None = None
    space: str | None = None
    baselines: tuple[str, ...] | None = None
    metric: str | None = None
    objectives: str | None = None
    device: str | None = None
    sampler: str | None = None
    tasks: tuple[Path, ...] | None = None
    metric_command: str | None = None
    metric_direction: Direction | None = None
    metric_seconds: float | None = None
    evaluators: tuple[str, ...] | None = None
    trials: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    step_tokens: int | None = None
    warm_start: str | None = None
    time_seconds: float | None = None
    explore: float | None = None
    confirm: int | None = None
    seed: int | None = None
    students_only: bool | None = None
    name: str | None = None
    out: Path = Path("results/runs")
    resume: bool = False
    runner: str = "ray"
    ray_address: str | None = None
    gpus_per_trial: float | None = None
    cpus_per_trial: int | None = None
    storage: str | None = None
    cache: Path = field(default_factory=default_cache)
    cache_limit_bytes: int = 8 * 10**9
    checkpoint_limit_bytes: int | None = None
    sharing: bool = True
    forking: bool = True
    price: Price | None = None
    command: str = "autodistill search"
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        check_no_blank(self)
