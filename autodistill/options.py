"""The options that several verbs of the command line share, each with its help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


class BetterIs(StrEnum):
    """Whether more or less of a score is better."""

    MAX = "max"
    MIN = "min"


def option(name: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    """One option: its flag, its help and what stands for its value."""
    return typer.Option(name, help=text, metavar=metavar, **more)


BUDGET_HELP = "Memory that inference of the student may take, like 16GB or 900MiB"
SearchBudgetOption = Annotated[str | None, option("--budget", f"{BUDGET_HELP}.", "SIZE")]
SearchDeviceOption = Annotated[
    str | None,
    option("--device", "What serves the student, like 4090 or local: its usable memory is the budget.", "NAME"),
]
LatencyOption = Annotated[
    str | None,
    option(
        "--latency",
        "Limits, like 50ms or ttft_p95=300ms,tpot_p99=50ms@streams=16, on --device or here; memory is then that of as "
        "many streams.",
        "LIMITS",
    ),
]
AnyBudgetOption = Annotated[str | None, option("--budget", f"{BUDGET_HELP}; no limit by default.", "SIZE")]
TeacherOption = Annotated[
    str | None,
    option("--teacher", "smollm2 (the default), a folder of transformers, a .gguf file, or a hub id.", "REF"),
]
DataOption = Annotated[
    str | None,
    option(
        "--data",
        "pydoc (the default), a folder, a .txt, .jsonl or .parquet file, reasoning-gym:TASK, or a hub id.",
        "REF",
    ),
]
SpaceOption = Annotated[str | None, option("--space", "What may be tried: a name, or a YAML file.", "NAME|FILE")]
BaselineOption = Annotated[
    list[str] | None,
    option(
        "--baseline",
        "A strategy that runs first and is to be beaten, in place of the space's: a name, or a YAML file. May be given "
        "again.",
        "NAME|FILE",
    ),
]
MetricOption = Annotated[
    str | None,
    option(
        "--metric",
        "What ranks: accuracy (the default), agreement, kl, ece, perplexity, exact_match, task:NAME, lm-eval:TASK, or "
        "what another installed evaluator measures.",
        "NAME",
    ),
]
TaskOption = Annotated[
    list[Path] | None,
    option("--task", "A YAML file of tasks to measure; --metric task:NAME ranks by one. May be given again.", "FILE"),
]
CommandOption = Annotated[
    str | None,
    option(
        "--metric-command",
        "Your own metric: run with {student}, a folder, and {data}, a JSONL file; prints scores as JSON.",
        "CMD",
    ),
]
DirectionOption = Annotated[
    BetterIs | None, option("--metric-direction", "What is better of the command's scores; max by default.")
]
CommandTimeOption = Annotated[
    str | None, option("--metric-timeout", "After which the command is ended; 10m by default.", "TIME")
]
ObjectivesOption = Annotated[
    str | None,
    option(
        "--objectives",
        "Of which to find the Pareto front, like accuracy,memory,latency; the first ranks, and is exported by.",
        "NAMES",
    ),
]
SamplerOption = Annotated[
    str | None, option("--sampler", "What proposes: tpe (the default), gp, nsga2 or random.", "NAME")
]
TrialsOption = Annotated[
    int | None,
    option("--trials", "Strategies to try; planned from the time box by default. With --resume: in all.", "N"),
]
WarmStartOption = Annotated[
    str | None,
    option(
        "--warm-start",
        "Earlier runs of the same space, teacher and data to learn from; the best of each is proposed first.",
        "RUN[,RUN]",
    ),
]
TokensOption = Annotated[int | None, option("--tokens", "Training tokens of a trial; planned by default.", "T")]
SequenceLengthOption = Annotated[
    int | None, option("--sequence-length", "Tokens of a sequence in training and evaluation; 256 by default.", "T")
]
StepTokensOption = Annotated[
    int | None,
    option(
        "--step-tokens",
        "Training tokens of an optimiser step; by default one sequence, or on a GPU as many as make it fast.",
        "T",
    ),
]
TimeOption = Annotated[
    str | None, option("--time", "Time box, like 10m, the default without an accelerator; 30m with one.", "TIME")
]
ContextOption = Annotated[
    int | None,
    option("--context", "That the memory is stated at; 2048 by default, or less where models read less.", "TOKENS"),
]
BatchOption = Annotated[int, option("--batch", "Sequences decoded at once.", "N")]
ExploreOption = Annotated[
    float | None,
    option(
        "--explore",
        "Share of a time box's training that goes to trials; in the rest the best are trained on. 0.5 by default.",
        "SHARE",
    ),
]
ConfirmOption = Annotated[
    int | None,
    option(
        "--confirm",
        "Further seeds for the best three and the baseline; the best mean is chosen.",
        "N",
    ),
]
SeedOption = Annotated[
    int | None, option("--seed", "Of data order, projections and proposals; 0 by default.", "N", min=0)
]
NameOption = Annotated[str | None, option("--name", "Of the run; date and time by default.", "RUN")]
OutOption = Annotated[Path, option("--out", "Folder of the runs.", "DIR")]
ResumeOption = Annotated[bool, option("--resume", "Go on with the run of this --name.")]
PlanOption = Annotated[bool, option("--plan", "Print trials, rungs, tokens, disk, time and hours, and stop.")]
PriceOption = Annotated[
    str | None,
    option("--price", "With --plan: what an hour of a GPU costs, or of a machine without one, like 2.5/h.", "PRICE"),
]
RunnerOption = Annotated[str, option("--runner", "ray: workers side by side; inline: this process alone.", "NAME")]
RayAddressOption = Annotated[
    str | None,
    option("--ray-address", "Join a running Ray cluster, from one of its nodes: auto, or host:port.", "ADDR"),
]
GpusPerTrialOption = Annotated[
    float | None, option("--gpus-per-trial", "A fraction, like 0.25, or a whole number; 1 by default.", "X")
]
CpusPerTrialOption = Annotated[
    int | None, option("--cpus-per-trial", "Cores of a trial, or of its process on each GPU; planned by default.", "N")
]
StorageOption = Annotated[
    str | None,
    option("--storage", "Keep events, checkpoints and students there too: s3://, gs:// or file:// .", "URI"),
]
CacheOption = Annotated[
    Path | None, option("--cache", "Folder of what later searches use again; ~/.cache/autodistill by default.", "DIR")
]
CacheLimitOption = Annotated[
    str, option("--cache-limit", "Disk for teacher outputs, and on each node for copies from --storage.", "SIZE")
]
CheckpointLimitOption = Annotated[
    str | None,
    option("--checkpoint-limit", "Disk for a run's checkpoints; a quarter of the free disk by default.", "SIZE"),
]
FormatOption = Annotated[Format, option("--format", "How the result is printed.")]
DevicesOption = Annotated[
    list[Path] | None, option("--devices", "YAML file of devices of your own; may be given again.", "FILE")
]
