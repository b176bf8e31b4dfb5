"""The command line: parse, call the function that a library user calls, print its result."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodistill.cli import completion
from autodistill.cli.commands import (
    RUNS,
    appraised,
    explained,
    exported,
    leaderboards,
    listed_devices,
    measured,
    packaged,
    picked,
    planned,
    search_request,
    searched,
    written,
)
from autodistill.cli.help import PlainCommand, PlainGroup, SectionedCommand
from autodistill.cli.options import (
    BUDGET_HELP,
    AnyBudgetOption,
    BaselineOption,
    BatchOption,
    CacheLimitOption,
    CacheOption,
    CheckpointLimitOption,
    CommandOption,
    CommandTimeOption,
    ConfirmOption,
    ContextOption,
    CpusPerTrialOption,
    DataOption,
    DevicesOption,
    DirectionOption,
    ExploreOption,
    Format,
    FormatOption,
    GpusPerTrialOption,
    LatencyOption,
    MetricOption,
    NameOption,
    ObjectivesOption,
    OutOption,
    PlanOption,
    PriceOption,
    RayAddressOption,
    ResumeOption,
    RunArgument,
    RunnerOption,
    RunsArgument,
    SamplerOption,
    SearchBudgetOption,
    SearchDeviceOption,
    SeedOption,
    SequenceLengthOption,
    SpaceOption,
    StepTokensOption,
    StorageOption,
    StudentsOnlyOption,
    TaskOption,
    TeacherOption,
    TimeOption,
    TokensOption,
    TrialsOption,
    WarmStartOption,
    option,
)
from autodistill.cli.printing import line_width, lines, packaged_text, rows, show, tables
from autodistill.cli.solve import solve
from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import leaderboard_of, plan_summary, search_summary, written_summary
from autodistill.cli.tables import printable
from autodistill.errors import AutoDistillError, InputError, shortened
from autodistill.runs.run_folder import RunFolder, default_cache
from autodistill.utils.process_exit import INTERRUPTED, ended_by, error_document, sigterm_as_interrupt
from autodistill.utils.timeouts import calls_left

if TYPE_CHECKING:
    from autodistill.search.request.request import SearchRequest
    from autodistill.search.search import Outcome

_SHAPE = "A shape in the place of MODEL"
# The base of all of Typer's own complaints, which it does not export by name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(cls=PlainGroup, add_completion=True, pretty_exceptions_enable=False)


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        print(version("autodistill-search"))
        raise typer.Exit


@app.callback(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    """Finds the distilled and quantised student with the highest measured accuracy that fits your hardware."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


@app.command(cls=SectionedCommand)
def search(
    ctx: typer.Context,
    budget: SearchBudgetOption = None,
    device: SearchDeviceOption = None,
    latency: LatencyOption = None,
    own: DevicesOption = None,
    context: ContextOption = None,
    batch: BatchOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    metric: MetricOption = None,
    objectives: ObjectivesOption = None,
    task: TaskOption = None,
    metric_command: CommandOption = None,
    metric_direction: DirectionOption = None,
    metric_timeout: CommandTimeOption = None,
    space: SpaceOption = None,
    baseline: BaselineOption = None,
    sampler: SamplerOption = None,
    time_box: TimeOption = None,
    trials: TrialsOption = None,
    explore: ExploreOption = None,
    confirm: ConfirmOption = None,
    students_only: StudentsOnlyOption = False,
    warm_start: WarmStartOption = None,
    seed: SeedOption = None,
    tokens: TokensOption = None,
    sequence_length: SequenceLengthOption = None,
    step_tokens: StepTokensOption = None,
    name: NameOption = None,
    out: OutOption = RUNS,
    resume: ResumeOption = False,
    plan: PlanOption = False,
    price: PriceOption = None,
    runner: RunnerOption = "ray",
    ray_address: RayAddressOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    cpus_per_trial: CpusPerTrialOption = None,
    storage: StorageOption = None,
    cache: CacheOption = None,
    cache_limit: CacheLimitOption = "8GB",
    checkpoint_limit: CheckpointLimitOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Find, export and verify the best student that fits a hardware budget."""
    _search(ctx)


@app.command(cls=SectionedCommand)
def distill(
    ctx: typer.Context,
    strategy: Annotated[
        str,
        typer.Argument(
            help="A name that autodistill strategies lists, or a YAML file.",
            metavar="STRATEGY",
            autocompletion=completion.strategies,
        ),
    ],
    budget: AnyBudgetOption = None,
    device: SearchDeviceOption = None,
    latency: LatencyOption = None,
    own: DevicesOption = None,
    context: ContextOption = None,
    batch: BatchOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    metric: MetricOption = None,
    task: TaskOption = None,
    metric_command: CommandOption = None,
    metric_direction: DirectionOption = None,
    metric_timeout: CommandTimeOption = None,
    time_box: TimeOption = None,
    seed: SeedOption = None,
    tokens: TokensOption = None,
    sequence_length: SequenceLengthOption = None,
    step_tokens: StepTokensOption = None,
    name: NameOption = None,
    out: OutOption = RUNS,
    resume: ResumeOption = False,
    plan: PlanOption = False,
    price: PriceOption = None,
    runner: RunnerOption = "ray",
    ray_address: RayAddressOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    cpus_per_trial: CpusPerTrialOption = None,
    storage: StorageOption = None,
    cache: CacheOption = None,
    cache_limit: CacheLimitOption = "8GB",
    checkpoint_limit: CheckpointLimitOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Train, export and verify the student of one strategy, without a search."""
    _search(ctx)


@app.command(cls=PlainCommand)
def write(
    ctx: typer.Context,
    prompts: Annotated[
        str,
        option(
            "--prompts",
            "Prompts to answer: a .jsonl file, a .txt file with one prompt per line, or reasoning-gym:TASK.",
            "REF",
        ),
    ],
    out: Annotated[Path, option("--out", "The .jsonl file to write; answers already in it are kept.", "FILE")],
    teacher: TeacherOption = None,
    endpoint: Annotated[
        str | None, option("--endpoint", "Address of an OpenAI-compatible API, like http://localhost:8000/v1.", "URL")
    ] = None,
    model: Annotated[str | None, option("--model", "Name of the model at the endpoint.", "NAME")] = None,
    max_tokens: Annotated[
        int, option("--max-tokens", "Longest answer; answers cut off here are not trained on.", "N")
    ] = 256,
    temperature: Annotated[
        float, option("--temperature", "Sampling temperature; 0 takes the most likely token.", "T")
    ] = 0.0,
    top_p: Annotated[
        float, option("--top-p", "Sample from the most likely tokens that add up to this probability.", "P")
    ] = 1.0,
    seed: Annotated[int, option("--seed", "Seed of the sampling.", "N", min=0)] = 0,
    top_k: Annotated[
        int, option("--top-k", "Number of log-probabilities to request from the endpoint for each token.", "N")
    ] = 0,
    batch: Annotated[
        int | None,
        option(
            "--batch", "Number of answers written at once (default: 8 at an endpoint, what suits the device here).", "N"
        ),
    ] = None,
    timeout: Annotated[
        str | None, option("--timeout", "Give up a request to the endpoint after this long (default: 5m).", "TIME")
    ] = None,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Let a teacher answer prompts, as training data. An endpoint's key is read from AUTODISTILL_API_KEY."""
    show(output, lambda: written(ctx.params), dict, written_summary)


@app.command(cls=PlainCommand)
def leaderboard(
    runs: RunsArgument = None,
    out: OutOption = RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show the ranked students of runs, including runs that are still going on."""
    show(output, lambda: leaderboards(runs, out), rows, tables)


@app.command(cls=PlainCommand)
def explain(
    run: RunArgument,
    out: OutOption = RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show what mattered in a run, what was stopped early, which limit binds and what to try next."""
    show(output, lambda: explained(RunFolder.open(out, run)), dict, lambda found: found["text"])


@app.command(cls=PlainCommand)
def export(
    run: RunArgument,
    to: Annotated[
        str, option("--to", "Formats to write, separated by commas: huggingface, gguf, compressed-tensors.", "NAMES")
    ],
    out: Annotated[Path, option("--out", "Folder to write into; each format gets a folder in it.", "DIR")],
    row: Annotated[
        str | None, option("--row", "Row of the leaderboard to export (default: the best row).", "ID")
    ] = None,
    runs: Annotated[Path, option("--runs", "Folder that holds the runs.", "DIR")] = RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Export a row of a run, a student or the teacher, to other formats, and verify it."""
    containers = [name.strip() for name in to.split(",") if name.strip()]
    show(output, lambda: exported(RunFolder.open(runs, run), row, containers, out), dict, lines)


@app.command(cls=PlainCommand)
def doctor(
    out: OutOption = RUNS,
    cache: CacheOption = None,
    storage: StorageOption = None,
    ray_address: RayAddressOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Check what is installed and what is missing. Exits with 2 if the default search cannot run."""
    quiet_libraries()
    from autodistill.cli.doctor import describe, examine, ready, to_json

    found = show(output, lambda: examine(out, cache or default_cache(), storage, ray_address), to_json, describe)
    if not ready(found):
        raise typer.Exit(2)


@app.command(cls=PlainCommand)
def devices(
    ctx: typer.Context,
    name: Annotated[
        list[str] | None,
        typer.Argument(
            help="Show only devices of this name, like 4090 or apple m3.",
            metavar="NAME",
            autocompletion=completion.devices,
        ),
    ] = None,
    own: DevicesOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Include this machine; it is measured the first time.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="With --local: measure this machine again.")] = False,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the known devices with their memory, bandwidth and computing rates."""
    from autodistill.cli.hardware_summary import devices_table

    show(output, lambda: listed_devices(ctx.params), lambda all: [one.to_json() for one in all], devices_table)


@app.command(cls=PlainCommand)
def strategies(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this strategy's YAML.", metavar="NAME", autocompletion=completion.strategies),
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the strategies that distill and --baseline know by name, or print one."""
    show(output, lambda: packaged("strategies", name), dict, packaged_text)


@app.command(cls=PlainCommand)
def spaces(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this space's YAML.", metavar="NAME", autocompletion=completion.spaces),
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the search spaces that --space knows by name, or print one, to begin your own with."""
    show(output, lambda: packaged("spaces", name), dict, packaged_text)


@app.command(cls=PlainCommand)
def estimate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A transformers folder, a .gguf file, a hub id, or smollm2.", metavar="MODEL")
    ] = None,
    format_name: Annotated[
        str | None,
        option(
            "--format-name",
            "Format of the weights, like gguf-q4_0 (default: the grid of --strategy or of a packed MODEL, else "
            "gguf-q8_0).",
            "NAME",
            autocompletion=completion.formats,
        ),
    ] = None,
    runtime: Annotated[
        str | None, option("--runtime", "Another runtime that serves the format, or onnxruntime (memory only).", "NAME")
    ] = None,
    context: ContextOption = None,
    batch: BatchOption = None,
    kv_type: Annotated[str, option("--kv-type", "Type of the KV cache: f16, q8_0 or q4_0.", "TYPE")] = "f16",
    prompt: Annotated[
        int | None, option("--prompt", "Length of the prompt before the first token (default: 512).", "TOKENS")
    ] = None,
    training: Annotated[
        int | None,
        option(
            "--training",
            "Estimate the memory of training too, with passes of this many tokens (default: 1024 with --strategy, else "
            "no training).",
            "TOKENS",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        option(
            "--strategy",
            "Estimate the student that this strategy makes of MODEL, and training it: a name, or a .yaml file.",
            "STRATEGY",
            autocompletion=completion.strategies,
        ),
    ] = None,
    device: Annotated[
        str | None,
        option(
            "--device",
            "Device to estimate the speed on, like 4090 or local.",
            "NAME",
            autocompletion=completion.devices,
        ),
    ] = None,
    all_devices: Annotated[
        bool, typer.Option("--all-devices", help="Estimate the speed on every known device.")
    ] = False,
    own: DevicesOption = None,
    layers: Annotated[int | None, option("--layers", "Number of layers.", "N", rich_help_panel=_SHAPE)] = None,
    width: Annotated[int | None, option("--width", "Width of the hidden states.", "N", rich_help_panel=_SHAPE)] = None,
    heads: Annotated[int | None, option("--heads", "Number of attention heads.", "N", rich_help_panel=_SHAPE)] = None,
    kv_heads: Annotated[
        int | None,
        option("--kv-heads", "Number of key-value heads (default: as --heads).", "N", rich_help_panel=_SHAPE),
    ] = None,
    head_dim: Annotated[
        int | None, option("--head-dim", "Width of each head (default: width / heads).", "N", rich_help_panel=_SHAPE)
    ] = None,
    ffn: Annotated[
        int | None, option("--ffn", "Feed-forward neurons of a layer, or of an expert.", "N", rich_help_panel=_SHAPE)
    ] = None,
    vocab: Annotated[int | None, option("--vocab", "Size of the vocabulary.", "N", rich_help_panel=_SHAPE)] = None,
    experts: Annotated[
        int | None, option("--experts", "Number of experts of a mixture.", "N", rich_help_panel=_SHAPE)
    ] = None,
    active_experts: Annotated[
        int | None, option("--active-experts", "Number of experts used for each token.", "N", rich_help_panel=_SHAPE)
    ] = None,
    window: Annotated[
        int | None,
        option(
            "--window",
            "Window of sliding attention in all layers, which GGUF cannot hold.",
            "TOKENS",
            rich_help_panel=_SHAPE,
        ),
    ] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="The output layer shares the embedding table.", rich_help_panel=_SHAPE)
    ] = False,
    out: OutOption = RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Predict the memory and speed of a model without loading it. Measurements stored in --out correct it."""
    from autodistill.cli.hardware_summary import appraisal_text

    show(output, lambda: appraised(ctx.params), dict, appraisal_text)


@app.command(cls=PlainCommand)
def pick(
    ctx: typer.Context,
    runs: RunsArgument = None,
    budget: Annotated[str | None, option("--budget", f"{BUDGET_HELP}.", "SIZE")] = None,
    device: Annotated[
        str | None,
        option(
            "--device",
            "Device to pick for, like 4090 or local; sets the budget.",
            "NAME",
            autocompletion=completion.devices,
        ),
    ] = None,
    context: ContextOption = None,
    streams: Annotated[
        int | None, option("--streams", "Number of sequences decoded at once (default: 1).", "N")
    ] = None,
    latency: LatencyOption = None,
    min_accuracy: Annotated[
        float | None,
        option(
            "--min-accuracy",
            "Lowest acceptable score, as a fraction: of the metric that ranked the runs if higher is better, else of "
            "accuracy.",
            "X",
        ),
    ] = None,
    tiers: Annotated[
        bool, typer.Option("--tiers", help="Show the best for GPUs of 4 to 80 GB instead. Not with --latency.")
    ] = False,
    own: DevicesOption = None,
    out: OutOption = RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Pick the best stored student for some hardware, without training."""
    from autodistill.cli.hardware_summary import pick_text

    show(output, lambda: picked(ctx.params), dict, pick_text)


@app.command(cls=PlainCommand)
def measure(
    ctx: typer.Context,
    student: Annotated[Path, typer.Argument(help="A .gguf file, or a transformers folder.", metavar="STUDENT")],
    on: Annotated[
        str | None, option("--on", "Measure on a board, like ssh://pi@raspberrypi.local.", "ssh://HOST")
    ] = None,
    script: Annotated[Path | None, option("--script", "Write a script to run on a board without ssh.", "FILE")] = None,
    result: Annotated[Path | None, option("--result", "Read what that script printed.", "FILE")] = None,
    bench: Annotated[str | None, option("--bench", "Path of llama-bench on the board.", "PATH")] = None,
    device: Annotated[
        str | None,
        option(
            "--device",
            "Which device the board is (default: found by its own name).",
            "NAME",
            autocompletion=completion.devices,
        ),
    ] = None,
    ssh_config: Annotated[
        Path | None, option("--ssh-config", "ssh configuration to use instead of your own.", "FILE")
    ] = None,
    context: Annotated[
        int | None,
        option("--context", "Measured here: context of each stream (default: 2048, or the student's limit).", "TOKENS"),
    ] = None,
    streams: Annotated[
        str, option("--streams", "Measured here: numbers of sequences decoded at once, like 1,4,16.", "N,...")
    ] = "1",
    prompt: Annotated[
        int | None, option("--prompt", "Length of the prompt before the first token (default: 512).", "TOKENS")
    ] = None,
    decoded: Annotated[int | None, option("--decoded", "Length of an answer (default: 64).", "TOKENS")] = None,
    rounds: Annotated[int | None, option("--rounds", "Number of repetitions (default: 3).", "N")] = None,
    threads: Annotated[int, option("--threads", "CPU threads; 0 uses every core.", "N", min=0)] = 0,
    timeout: Annotated[
        str | None, option("--timeout", "Stop waiting for a board after this long (default: 30m).", "TIME")
    ] = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure even if the machine is busy, and mark the result.")
    ] = False,
    own: DevicesOption = None,
    out: OutOption = RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Measure a student's speed and memory, here or on a board with llama-bench. pick uses the results."""
    from autodistill.cli.hardware_summary import measured_text

    show(output, lambda: measured(ctx.params), dict, measured_text)


app.command(cls=PlainCommand)(solve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default this process's own, and gives its exit code."""
    code = _run(sys.argv[1:] if arguments is None else list(arguments))
    if arguments is None and calls_left():
        # A library would wait for it at exit without end, deaf to interrupts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(given: Sequence[str]) -> int:
    typed = shlex.join(["autodistill", *given])
    with sigterm_as_interrupt():
        try:
            code = app(given, prog_name="autodistill", obj=typed, standalone_mode=False) or 0
        except AutoDistillError as error:
            return _fail(str(error), ended_by(error.exit_code))
        except _UsageError as error:
            if _asks_for_json(given):
                print(error_document(_complaint(error), InputError.exit_code), flush=True)
            return _fail(_complaint(error), InputError.exit_code)
    # Typer turns a Ctrl-C that nobody met into this code.
    return _fail("stopped", ended_by(code)) if code == INTERRUPTED else int(code)


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _asks_for_json(words: Sequence[str]) -> bool:
    """Whether a command line that could not be read asks for JSON, as far as can be told."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return any(word == "--format=json" or (word, value) == ("--format", "json") for word, value in pairs)


# What Typer's reader of values says, and what a person is told in its place.
_PLAINER = {
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "write a whole number",
    "Input should be a valid number, unable to parse string as a number": "write a number",
    "Input should be greater": "it must be greater",
}


def _complaint(error: Any) -> str:
    where = error.ctx.command_path if error.ctx else "autodistill"
    said = error.format_message().rstrip(".")
    for theirs, ours in _PLAINER.items():
        said = said.replace(theirs, ours)
    if re.search(r"'--format': 'gguf|'--format': '(?:huggingface|compressed)", said):
        said += "; --format-name names a format of weights"
    return shortened(f"{said}; see {where} --help")


def _search(ctx: typer.Context) -> None:
    """What `search` and `distill` do; their arguments are read from the context."""
    started = time.monotonic()
    output = ctx.params["output"]

    def asked() -> SearchRequest:
        return search_request(ctx.params, ctx.command.name or "", ctx.obj or ctx.command_path, started)

    if ctx.params["plan"]:
        show(output, lambda: planned(asked()), dict, lambda document: plan_summary(document, line_width()))
    else:
        show(output, lambda: searched(asked()), lambda outcome: outcome.document, _summary(ctx))


def _summary(ctx: typer.Context) -> Callable[[Outcome], str]:
    def text(outcome: Outcome) -> str:
        run = RunFolder.open(ctx.params["out"], outcome.document["name"])
        return search_summary(outcome.document, *leaderboard_of(run), line_width())

    return text
