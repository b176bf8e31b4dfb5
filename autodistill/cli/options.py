"""The options that several verbs of the command line share, each with its help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from autodistill.cli import completion


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


def device_option(text: str) -> Any:
    """The device that a command is for."""
    return option("--device", text, "NAME", autocompletion=completion.devices)


RunArgument = Annotated[str, typer.Argument(help="Name of the run.", metavar="RUN", autocompletion=completion.runs)]
RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Names of runs (default: all).", metavar="RUN", autocompletion=completion.runs),
]
LATENCY_HELP = (
    'Latency limit: 50ms for each token, or several in quotes, like "ttft_p95=300ms, tpot_p99=50ms @streams=16": the '
    "95th percentile of the time to the first token, the 99th of each later one, 16 sequences at once"
)
BUDGET_HELP = "Memory limit for the deployed student, like 16GB or 900MiB"
SearchBudgetOption = Annotated[str | None, option("--budget", f"{BUDGET_HELP}.", "SIZE")]
AnyBudgetOption = Annotated[str | None, option("--budget", f"{BUDGET_HELP} (default: no limit).", "SIZE")]
SearchDeviceOption = Annotated[
    str | None,
    device_option('Device the student will run on, like 4090, "pi 5" or local; sets the budget.'),
]
LatencyOption = Annotated[
    str | None,
    option("--latency", f"{LATENCY_HELP}. Applies to --device, or else to this machine.", "LIMITS"),
]
DevicesOption = Annotated[
    list[Path] | None, option("--devices", "YAML file that describes your own devices. Repeatable.", "FILE")
]
ContextOption = Annotated[
    int | None,
    option("--context", "Context length the memory must cover (default: 2048, or the model's limit).", "TOKENS"),
]
BatchOption = Annotated[int | None, option("--batch", "Number of sequences decoded at once (default: 1).", "N")]
TeacherOption = Annotated[
    str | None,
    option(
        "--teacher",
        "Teacher model: a transformers folder, a .gguf file, a hub id, or smollm2 (default).",
        "REF",
    ),
]
DataOption = Annotated[
    str | None,
    option(
        "--data",
        "Text to train and measure on: a folder, a .txt, .jsonl or .parquet file, reasoning-gym:TASK, a hub id, or "
        "pydoc (default).",
        "REF",
    ),
]
MetricOption = Annotated[
    str | None,
    option(
        "--metric",
        "Score that ranks the students: accuracy (default), agreement, kl, ece, perplexity, exact_match, task:NAME, "
        "lm-eval:TASK, or one of an evaluator that you installed.",
        "NAME",
    ),
]
ObjectivesOption = Annotated[
    str | None,
    option(
        "--objectives",
        "Search for a Pareto front, like accuracy,memory,latency. The first one picks the export.",
        "NAMES",
    ),
]
TaskOption = Annotated[
    list[Path] | None,
    option("--task", "YAML file of tasks to measure; --metric task:NAME ranks by one of them. Repeatable.", "FILE"),
]
CommandOption = Annotated[
    str | None,
    option(
        "--metric-command",
        "Your own metric: a command that gets {student}, a folder, and {data}, a JSONL file, and prints scores as "
        "JSON.",
        "CMD",
    ),
]
DirectionOption = Annotated[
    BetterIs | None,
    option("--metric-direction", "Whether higher (max, the default) or lower (min) scores of the command are better."),
]
CommandTimeOption = Annotated[
    str | None, option("--metric-timeout", "Kill the metric command after this long (default: 10m).", "TIME")
]
SpaceOption = Annotated[
    str | None,
    option(
        "--space",
        "Search space: a name that autodistill spaces lists, or a YAML file.",
        "NAME|FILE",
        autocompletion=completion.spaces,
    ),
]
BaselineOption = Annotated[
    list[str] | None,
    option(
        "--baseline",
        "Strategy to beat (a name or a YAML file), instead of the space's own baselines. Repeatable.",
        "NAME|FILE",
        autocompletion=completion.strategies,
    ),
]
SamplerOption = Annotated[
    str | None, option("--sampler", "Method that proposes strategies: tpe (default), gp, nsga2 or random.", "NAME")
]
TimeOption = Annotated[
    str | None,
    option("--time", "Time for the whole run, like 45m or 1h30m (default: 10m, or 30m with an accelerator).", "TIME"),
]
TrialsOption = Annotated[
    int | None,
    option(
        "--trials",
        "Number of strategies to try (default: what the time allows). With --resume, the new total.",
        "N",
    ),
]
ExploreOption = Annotated[
    float | None,
    option(
        "--explore",
        "Share of the training time for trying strategies; the rest trains the best (default: 0.5).",
        "SHARE",
    ),
]
ConfirmOption = Annotated[
    int | None,
    option("--confirm", "Retrain the best 3 and the baseline on N more seeds; the best mean is chosen.", "N"),
]
StudentsOnlyOption = Annotated[
    bool,
    option("--students-only", "Export the best trained student, even if the quantised teacher does better."),
]
WarmStartOption = Annotated[
    str | None,
    option(
        "--warm-start",
        "Learn from earlier runs of the same space, teacher and data; the best strategy of each is tried first.",
        "RUN[,RUN]",
        autocompletion=completion.runs,
    ),
]
SeedOption = Annotated[
    int | None, option("--seed", "Seed of data order, projections and proposals (default: 0).", "N", min=0)
]
TokensOption = Annotated[
    int | None, option("--tokens", "Training tokens of each trial (default: what the time allows).", "TOKENS")
]
SequenceLengthOption = Annotated[
    int | None,
    option("--sequence-length", "Length of the sequences in training and evaluation (default: 256).", "TOKENS"),
]
StepTokensOption = Annotated[
    int | None,
    option(
        "--step-tokens",
        "Training tokens of each optimiser step (default: one sequence; on a GPU, what keeps it busy).",
        "TOKENS",
    ),
]
NameOption = Annotated[str | None, option("--name", "Name of the run (default: date and time).", "RUN")]
OutOption = Annotated[Path, option("--out", "Folder that holds the runs.", "DIR")]
ResumeOption = Annotated[bool, option("--resume", "Continue the run given by --name, with the settings it has.")]
PlanOption = Annotated[
    bool, option("--plan", "Print the planned trials, tokens, disk, time and hours without training anything.")
]
PriceOption = Annotated[
    str | None,
    option(
        "--price", "With --plan: the price of an hour of a GPU (or of the machine if it has none), like 2.5/h.", "PRICE"
    ),
]
RunnerOption = Annotated[
    str, option("--runner", "How trials run: ray for workers side by side, inline for this process alone.", "NAME")
]
RayAddressOption = Annotated[
    str | None,
    option("--ray-address", "Join a running Ray cluster from one of its nodes, given as auto or as host:port.", "ADDR"),
]
GpusPerTrialOption = Annotated[
    float | None,
    option("--gpus-per-trial", "GPUs of each trial: a fraction, like 0.25, or a whole number (default: 1).", "X"),
]
CpusPerTrialOption = Annotated[
    int | None,
    option("--cpus-per-trial", "Cores of each trial, or of each GPU's process in it (default: planned).", "N"),
]
StorageOption = Annotated[
    str | None,
    option(
        "--storage",
        "Also keep events, checkpoints and students there: an s3://, gs:// or file:// address.",
        "URI",
    ),
]
CacheOption = Annotated[
    Path | None,
    option("--cache", "Folder for what later runs can reuse (default: ~/.cache/autodistill).", "DIR"),
]
CacheLimitOption = Annotated[
    str,
    option("--cache-limit", "Disk space for teacher outputs, and for copies from --storage on each node.", "SIZE"),
]
CheckpointLimitOption = Annotated[
    str | None,
    option(
        "--checkpoint-limit",
        "Disk space for the run's checkpoints and students (default: a quarter of what is free).",
        "SIZE",
    ),
]
FormatOption = Annotated[Format, option("--format", "Print the result as a table or as JSON.")]
SECTIONS = {
    "Budget": ("budget", "device", "latency", "own", "context", "batch"),
    "Model and data": ("teacher", "data"),
    "Scores": ("metric", "objectives", "task", "metric_command", "metric_direction", "metric_timeout"),
    "Search": (
        "space",
        "baseline",
        "sampler",
        "time_box",
        "trials",
        "explore",
        "confirm",
        "students_only",
        "warm_start",
        "seed",
    ),
    "Training": ("tokens", "sequence_length", "step_tokens"),
    "Run": ("name", "out", "resume", "plan", "price"),
    "Workers": ("runner", "ray_address", "gpus_per_trial", "cpus_per_trial"),
    "Storage": ("storage", "cache", "cache_limit", "checkpoint_limit"),
    "Output": ("output", "help"),
}
"""Where the help of a command with many options shows each of them."""
