"""The request for a search, as typed by the user. Its fields are the options of the command line and of Python."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction, Evaluator, Goal, Scoring, register_evaluator
from autodistill.hardware.budget import Budget
from autodistill.options import (
    BUDGET_HELP,
    RUNS,
    TEACHER,
    Batch,
    Cache,
    Context,
    Devices,
    KvType,
    Latency,
    Option,
    RayAddress,
    Runs,
    ServedBy,
    Storage,
    counts_tokens,
    parsed,
    read_texts,
)
from autodistill.search.callbacks import Callback
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.units import parse_bytes, parse_duration
from autodistill.utils.plain_dataclass import check_choice

DEFAULT_SPACE, DEFAULT_METRIC, DEFAULT_SAMPLER = "default", "accuracy", "tpe"
RUNNERS = ("ray", "inline")
_SEARCH = ("search", "plan")

Names: TypeAlias = str | Sequence[str] | None
"""Names in one text, separated by commas, or as a sequence."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The request for a search. None means the default, or for a resumed run the run's own setting.

    A new option needs a field here, and a line in `resolve` that gives its value if nobody asks for it.

    Attributes:
        teacher, data: References, or a loaded transformers model and a `datasets.Dataset`.
        budget: A `Budget` contains memory, context, batch, device and latency. The options of those names are then
            ignored, except `device`, which says where latency is predicted.
        resume: Whether to go on with the run `name`.
        recorded_space: Whether a resumed run's space is read from its record, and not by its name or from its file,
            which may have another content by now.
        command: The command line as typed, for the record.
        started: The value of `time.monotonic()` at which the time budget began.
    """

    strategy: Annotated[
        str | Path | Strategy | None,
        Option(
            help="A name that autodistill strategies lists, or a YAML file.",
            metavar="STRATEGY",
            argument=True,
            complete="strategies",
            required=True,
            commands=("distill", "plan"),
        ),
    ] = None
    budget: Annotated[
        str | int | Budget | None,
        Option(
            help=f"{BUDGET_HELP}.",
            helps={"distill": f"{BUDGET_HELP} (default: no limit)."},
            metavar="SIZE",
            parse=parse_bytes,
            section="Budget",
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(
            help='Device the student will run on, like 4090, "pi 5" or local; sets the budget.',
            metavar="NAME",
            complete="devices",
            section="Budget",
        ),
    ] = None
    latency: Latency = None
    devices: Devices = None
    context: Context = None
    batch: Batch = None
    kv_type: KvType = None
    runtime: ServedBy = None
    teacher: Annotated[str | Path | object | None, TEACHER] = None
    tokenizer: Annotated[
        object | None, Option(help="Tokenizer of a teacher that is given as a loaded model.", python=True)
    ] = None
    data: Annotated[
        str | Path | object | None,
        Option(
            help="Text to train and measure on: a folder, a .txt, .jsonl or .parquet file, reasoning-gym:TASK, a hub "
            "id, or pydoc (default).",
            metavar="REF",
            section="Model and data",
        ),
    ] = None
    metric: Annotated[
        str | None,
        Option(
            help="Score that ranks the students: accuracy (default), agreement, kl, ece, perplexity, exact_match, "
            "task:NAME, lm-eval:TASK, or one of an evaluator that you installed.",
            metavar="NAME",
            section="Scores",
        ),
    ] = None
    objectives: Annotated[
        Names,
        Option(
            help="Search for a Pareto front, like accuracy,memory,latency. The first one picks the export.",
            metavar="NAMES",
            section="Scores",
            commands=_SEARCH,
        ),
    ] = None
    task: Annotated[
        Sequence[str | Path] | None,
        Option(
            help="YAML file of tasks to measure; --metric task:NAME ranks by one of them. Repeatable.",
            metavar="FILE",
            typed=list[Path],
            section="Scores",
        ),
    ] = None
    metric_command: Annotated[
        str | None,
        Option(
            help="Your own metric: a command that gets {student}, a folder, and {data}, a JSONL file, and prints "
            "scores as JSON.",
            metavar="CMD",
            section="Scores",
        ),
    ] = None
    metric_direction: Annotated[
        Direction | None,
        Option(
            help="Whether higher (max, the default) or lower (min) scores of the command are better.",
            typed=Direction,
            section="Scores",
        ),
    ] = None
    metric_timeout: Annotated[
        str | float | None,
        Option(
            help="Kill the metric command after this long (default: 10m).",
            metavar="TIME",
            parse=parse_duration,
            section="Scores",
        ),
    ] = None
    scoring: Annotated[
        Scoring | None,
        Option(
            help="What models are scored in: float32 (default), tf32 on NVIDIA's GPUs, or bf16. A run has one of them.",
            metavar="float32|tf32|bf16",
            typed=Scoring,
            section="Scores",
        ),
    ] = None
    evaluators: Annotated[
        Sequence[str | Evaluator] | None,
        Option(
            help="Evaluators that are read at every rung beside the usual ones: objects, or names of installed ones.",
            python=True,
        ),
    ] = None
    space: Annotated[
        str | Path | Space | None,
        Option(
            help="Search space: a name that autodistill spaces lists, or a YAML file.",
            metavar="NAME|FILE",
            complete="spaces",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    candidate: Annotated[
        Sequence[str | Path] | None,
        Option(
            help="Measure this GGUF file of the teacher's model too: it may win as it is, or be where training begins. "
            "Repeatable.",
            metavar="FILE",
            typed=list[str],
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    baseline: Annotated[
        Sequence[str | Path] | None,
        Option(
            help="Strategy to beat (a name or a YAML file), instead of the space's own baselines. Repeatable.",
            metavar="NAME|FILE",
            typed=list[str],
            complete="strategies",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    sampler: Annotated[
        str | None,
        Option(
            help="Method that proposes strategies: tpe (default) or random.",
            metavar="NAME",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    time: Annotated[
        str | float | None,
        Option(
            help="Time for the whole run, like 45m or 1h30m (default: 10m, or 30m with an accelerator).",
            metavar="TIME",
            parse=parse_duration,
            section="Search",
        ),
    ] = None
    trials: Annotated[
        int | None,
        Option(
            help="Number of strategies to try (default: what the time allows). With --resume, the new total.",
            metavar="N",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    explore: Annotated[
        float | None,
        Option(
            help="Share of the training time for trying strategies; the rest trains the best (default: 0.2, from an "
            "hour on 0.25; 0.5 where the space is not solved).",
            metavar="SHARE",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    confirm: Annotated[
        int | None,
        Option(
            help="Retrain the best 3 and the baseline on N more seeds; the best mean is chosen.",
            metavar="N",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    students_only: Annotated[
        bool | None,
        Option(
            help="Export the best trained student, even if the quantised teacher does better.",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    goal: Annotated[
        Goal | None,
        Option(
            help="general: do not export a student that forgot general text (default); task: only the metric counts "
            "(default if the metric or the data is a task).",
            metavar="general|task",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    general_text: Annotated[
        str | Path | None,
        Option(
            help=(
                "Text that is not trained on, to see what students forget: a folder, a .txt, .jsonl or .parquet file, "
                "or a hub id (default: a small text that comes with autodistill)."
            ),
            metavar="REF",
            section="Model and data",
        ),
    ] = None
    warm_start: Annotated[
        Names,
        Option(
            help="Learn from earlier runs of the same space, teacher and data; the best strategy of each is tried "
            "first.",
            metavar="RUN[,RUN]",
            complete="runs",
            section="Search",
            commands=_SEARCH,
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            help="Seed of data order, projections and proposals (default: 0).", metavar="N", minimum=0, section="Search"
        ),
    ] = None
    tokens: Annotated[
        str | int | None,
        counts_tokens(
            "Training tokens of each trial, like 6k, 1.5M or 2B (default: what the time allows).", section="Training"
        ),
    ] = None
    sequence_length: Annotated[
        str | int | None,
        counts_tokens("Length of the sequences in training and evaluation (default: 256).", section="Training"),
    ] = None
    step_tokens: Annotated[
        str | int | None,
        counts_tokens(
            "Training tokens of each optimiser step (default: one sequence; on a GPU, what keeps it busy).",
            maximum=10**9,
            section="Training",
        ),
    ] = None
    name: Annotated[
        str | None, Option(help="Name of the run (default: date and time).", metavar="RUN", section="Run")
    ] = None
    runs: Runs = RUNS
    resume: Annotated[
        bool, Option(help="Continue the run given by --name, with the settings it has.", section="Run")
    ] = False
    metrics_port: Annotated[
        int | None,
        Option(
            help="Serve the search's figures to Prometheus on this port of 127.0.0.1; autodistill dashboards writes a "
            "dashboard of them.",
            metavar="PORT",
            minimum=0,
            section="Run",
            commands=("search", "distill"),
        ),
    ] = None
    dashboard: Annotated[
        bool,
        Option(
            help="Show Ray's workers in its dashboard, on this machine alone and by a token, while trials run.",
            section="Run",
            commands=("search", "distill"),
        ),
    ] = False
    runner: Annotated[
        str,
        Option(
            help="How trials run: ray for workers side by side, inline for this process alone.",
            metavar="NAME",
            section="Workers",
        ),
    ] = "ray"
    ray_address: RayAddress = None
    gpus_per_trial: Annotated[
        float | None,
        Option(
            help="GPUs of each trial: a fraction, like 0.25, or a whole number (default: 1).",
            metavar="X",
            section="Workers",
        ),
    ] = None
    cpus_per_trial: Annotated[
        int | None,
        Option(
            help="Cores of each trial, or of each GPU's process in it (default: planned).",
            metavar="N",
            section="Workers",
        ),
    ] = None
    storage: Storage = None
    cache: Cache = None
    cache_limit: Annotated[
        str | int,
        Option(
            help="Disk space for teacher outputs, and for copies from --storage on each node.",
            metavar="SIZE",
            parse=parse_bytes,
            section="Storage",
        ),
    ] = "8GB"
    checkpoint_limit: Annotated[
        str | int | None,
        Option(
            help="Disk space for the run's checkpoints and students (default: a quarter of what is free).",
            metavar="SIZE",
            parse=parse_bytes,
            section="Storage",
        ),
    ] = None
    log: Annotated[
        Sequence[str] | None,
        Option(
            help="Also send trials to a tracker while they run: tensorboard[=DIR], mlflow[=URI] or wandb[=PROJECT]. "
            "Repeatable.",
            metavar="TRACKER",
            typed=list[str],
            section="Output",
            commands=("search", "distill"),
        ),
    ] = None
    callbacks: Annotated[
        Sequence[Callback],
        Option(help="Objects of `Callback` classes, told of trials, steps, rungs and exports.", python=True),
    ] = ()
    recorded_space: bool = False
    command: str = "autodistill search"
    started: float = field(default_factory=clock.monotonic)

    def __post_init__(self) -> None:
        read_texts(self)
        if self.goal is not None:
            check_choice("--goal", self.goal, get_args(Goal))
        if self.scoring is not None:
            check_choice("--scoring", self.scoring, get_args(Scoring))
        if self.evaluators is not None:
            # From here on, an object is known by its name, in this session and in the run's records.
            object.__setattr__(self, "evaluators", tuple(map(_named, self.evaluators)))
        if not isinstance(self.budget, Budget):
            self._check_limits()

    @property
    def several(self) -> bool:
        """Whether this is a search for several budgets."""
        return False

    def apart(self) -> Sequence[SearchRequest]:
        """Return the request as one request per budget."""
        return [self]

    def _check_limits(self) -> None:
        """Refuse impossible limits. This runs before a device is looked up, which may measure this machine."""
        if (self.strategy, self.budget, self.device) == (None, None, None) and not self.resume:
            raise InputError(
                "search needs the memory that the student may take: --budget like 16GB, or --device like 4090"
            )
        if self.devices and self.device is None:
            raise InputError("--devices only describes devices: choose one with --device")
        limits = parsed(self.latency)
        check_room(self.batch, limits or (), "--batch")
        context, batch = (1 if given is None else given for given in (parsed(self.context), self.batch))
        Budget(memory_bytes=1, context=context, batch=batch)


def _named(evaluator: str | Evaluator) -> str:
    return evaluator if isinstance(evaluator, str) else register_evaluator(evaluator)


def joined(names: Names) -> str | None:
    """Return the names as one text, separated by commas."""
    return names if names is None or isinstance(names, str) else ",".join(names)


def check_room(at_once: int | None, limits: Sequence[Any], option: str) -> None:
    """Refuse a batch that is smaller than the number of streams of a latency limit.

    Args:
        at_once: The batch asked for, or None.
        limits: Limits of latency.
        option: The option that sets the batch, like "--batch".
    """
    most = max((limit.streams for limit in limits), default=1)
    if at_once is not None and 1 <= at_once < most:
        raise InputError(
            f"{option} {at_once} contradicts --latency @streams={most}, which needs the memory of {most} streams: give "
            f"{option} {most} or more, or leave it out, or lower the streams"
        )
