"""The command line: parse, call the function that a library user calls, print its result."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodistill.calls import (
    appraised,
    explained,
    exported,
    leaderboards,
    measured,
    picked,
    planned,
    search_request,
    searched,
    written,
)
from autodistill.console import printable
from autodistill.errors import AutoDistillError, InputError
from autodistill.options import (
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
    RunnerOption,
    SamplerOption,
    SearchBudgetOption,
    SearchDeviceOption,
    SeedOption,
    SequenceLengthOption,
    SpaceOption,
    StepTokensOption,
    StorageOption,
    TaskOption,
    TeacherOption,
    TimeOption,
    TokensOption,
    TrialsOption,
    WarmStartOption,
    option,
)
from autodistill.printing import line_width, lines, rows, show, tables
from autodistill.records.store import RunFolder, default_cache
from autodistill.streams import quiet_libraries
from autodistill.summary import leaderboard_of, plan_summary, search_summary, written_summary

if TYPE_CHECKING:
    from autodistill.search.request import SearchRequest
    from autodistill.search.search import Outcome

_RUNS = Path("results/runs")
# The base of all of Typer's own complaints, which it does not export by name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def search(
    ctx: typer.Context,
    budget: SearchBudgetOption = None,
    device: SearchDeviceOption = None,
    latency: LatencyOption = None,
    own: DevicesOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    space: SpaceOption = None,
    baseline: BaselineOption = None,
    metric: MetricOption = None,
    objectives: ObjectivesOption = None,
    task: TaskOption = None,
    metric_command: CommandOption = None,
    metric_direction: DirectionOption = None,
    metric_timeout: CommandTimeOption = None,
    sampler: SamplerOption = None,
    trials: TrialsOption = None,
    warm_start: WarmStartOption = None,
    tokens: TokensOption = None,
    sequence_length: SequenceLengthOption = None,
    step_tokens: StepTokensOption = None,
    time_box: TimeOption = None,
    explore: ExploreOption = None,
    confirm: ConfirmOption = None,
    context: ContextOption = None,
    batch: BatchOption = 1,
    seed: SeedOption = None,
    name: NameOption = None,
    out: OutOption = _RUNS,
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


@app.command()
def distill(
    ctx: typer.Context,
    strategy: Annotated[str, typer.Argument(help="A strategy as a YAML file, or a name.", metavar="STRATEGY.yaml")],
    budget: AnyBudgetOption = None,
    device: SearchDeviceOption = None,
    latency: LatencyOption = None,
    own: DevicesOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    metric: MetricOption = None,
    task: TaskOption = None,
    metric_command: CommandOption = None,
    metric_direction: DirectionOption = None,
    metric_timeout: CommandTimeOption = None,
    tokens: TokensOption = None,
    sequence_length: SequenceLengthOption = None,
    step_tokens: StepTokensOption = None,
    time_box: TimeOption = None,
    context: ContextOption = None,
    batch: BatchOption = 1,
    seed: SeedOption = None,
    name: NameOption = None,
    out: OutOption = _RUNS,
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


@app.command()
def write(
    ctx: typer.Context,
    prompts: Annotated[
        str, option("--prompts", "A .jsonl file, a .txt file with a prompt a line, or reasoning-gym:TASK.", "REF")
    ],
    out: Annotated[Path, option("--out", "A .jsonl file; answers that it has already are kept.", "FILE")],
    teacher: TeacherOption = None,
    endpoint: Annotated[
        str | None, option("--endpoint", "Base of an OpenAI-compatible API, like http://localhost:8000/v1.", "URL")
    ] = None,
    model: Annotated[str | None, option("--model", "The model's name at the endpoint.", "NAME")] = None,
    max_tokens: Annotated[int, option("--max-tokens", "Of an answer; one cut there is not learnt.", "N")] = 256,
    temperature: Annotated[float, option("--temperature", "0 takes the most likely token.", "T")] = 0.0,
    top_p: Annotated[float, option("--top-p", "Draw from the likeliest tokens of this probability.", "P")] = 1.0,
    seed: Annotated[int, option("--seed", "Of the draws.", "N", min=0)] = 0,
    top_k: Annotated[int, option("--top-k", "Log-probabilities to ask the endpoint for at each token.", "N")] = 0,
    batch: Annotated[
        int | None, option("--batch", "Answers written at once; 8 at an endpoint, what suits the device here.", "N")
    ] = None,
    timeout: Annotated[str, option("--timeout", "After which a request to the endpoint is given up.", "TIME")] = "5m",
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Let a teacher answer prompts, as data to learn from; its key at an endpoint is AUTODISTILL_API_KEY."""
    show(output, lambda: written(ctx.params), dict, written_summary)


@app.command()
def leaderboard(
    runs: Annotated[list[str] | None, typer.Argument(help="Names of runs; all by default.", metavar="[RUN]...")] = None,
    out: OutOption = _RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show the ranked rows of runs, also of one that is under way."""
    show(output, lambda: leaderboards(runs, out), rows, tables)


@app.command()
def explain(
    run: Annotated[str, typer.Argument(help="Name of the run.", metavar="RUN")],
    out: OutOption = _RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Tell which dimensions of a run mattered, what was left early, which limit binds and what would fit next."""
    show(output, lambda: explained(RunFolder.open(out, run)), dict, lambda found: found["text"])


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Name of the run.", metavar="RUN")],
    to: Annotated[str, option("--to", "Containers, parted by commas: huggingface, gguf, compressed-tensors.", "NAMES")],
    out: Annotated[Path, option("--out", "Where to; a folder is made in it for each container.", "DIR")],
    row: Annotated[str | None, option("--row", "Of the leaderboard; the best student by default.", "ID")] = None,
    runs: Annotated[Path, option("--runs", "Folder of the runs.", "DIR")] = _RUNS,
    output: FormatOption = Format.TABLE,
) -> None:
    """Export a student of a run to other containers, and verify it."""
    containers = [name.strip() for name in to.split(",") if name.strip()]
    show(output, lambda: exported(RunFolder.open(runs, run), row, containers, out), dict, lines)


@app.command()
def doctor(
    out: OutOption = _RUNS,
    cache: CacheOption = None,
    storage: StorageOption = None,
    ray_address: RayAddressOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Say what is installed, found and missing; exits with 2 where the default search cannot run."""
    quiet_libraries()
    from autodistill.doctor import describe, examine, ready, to_json

    found = show(output, lambda: examine(out, cache or default_cache(), storage, ray_address), to_json, describe)
    if not ready(found):
        raise typer.Exit(2)


@app.command()
def devices(
    own: DevicesOption = None,
    local: Annotated[bool, typer.Option("--local", help="This machine too, measured once.")] = False,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the devices that a student may be served on: memory, bandwidth, rates."""
    from autodistill.hardware_summary import devices_table
    from autodistill.local_device import known_devices

    kept = (cache or default_cache()) if local else None
    show(output, lambda: known_devices(own or (), kept), lambda all: [one.to_json() for one in all], devices_table)


@app.command()
def estimate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A folder, a .gguf file, smollm2, or a hub id.", metavar="[MODEL]")
    ] = None,
    format_name: Annotated[
        str | None, option("--format-name", "Like gguf-q4_0; that of a packed MODEL itself, else gguf-q8_0.", "NAME")
    ] = None,
    runtime: Annotated[
        str | None, option("--runtime", "Another that serves the format; or onnxruntime, its memory alone.", "NAME")
    ] = None,
    context: ContextOption = None,
    batch: BatchOption = 1,
    kv_type: Annotated[str, option("--kv-type", "Of the KV cache: f16, q8_0 or q4_0.", "TYPE")] = "f16",
    prompt: Annotated[int | None, option("--prompt", "Tokens before the first one; 512 by default.", "TOKENS")] = None,
    training: Annotated[
        int | None, option("--training", "The memory of training it too, by passes of so many tokens.", "TOKENS")
    ] = None,
    device: Annotated[str | None, option("--device", "Like 4090 or local; see devices.", "NAME")] = None,
    all_devices: Annotated[bool, typer.Option("--all-devices", help="Every device.")] = False,
    own: DevicesOption = None,
    layers: Annotated[int | None, option("--layers", "Of a shape in the place of MODEL.", "N")] = None,
    width: Annotated[int | None, option("--width", "Of its hidden states.", "N")] = None,
    heads: Annotated[int | None, option("--heads", "Of its attention.", "N")] = None,
    kv_heads: Annotated[int | None, option("--kv-heads", "As many as heads by default.", "N")] = None,
    head_dim: Annotated[int | None, option("--head-dim", "The heads' share of the width by default.", "N")] = None,
    ffn: Annotated[int | None, option("--ffn", "Neurons of a layer, or of an expert.", "N")] = None,
    vocab: Annotated[int | None, option("--vocab", "Entries of the vocabulary.", "N")] = None,
    experts: Annotated[int | None, option("--experts", "Of a mixture.", "N")] = None,
    active_experts: Annotated[int | None, option("--active-experts", "That a token takes.", "N")] = None,
    window: Annotated[int | None, option("--window", "Of sliding attention in all layers.", "TOKENS")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="The head is the embedding table.")] = False,
    out: OutOption = _RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Predict what a model takes and how fast it would run; nothing is loaded. Memory measured in --out corrects it."""
    from autodistill.hardware_summary import appraisal_text

    quiet_libraries(model)
    show(output, lambda: appraised(ctx.params), dict, appraisal_text)


@app.command()
def pick(
    ctx: typer.Context,
    runs: Annotated[list[str] | None, typer.Argument(help="Names of runs; all by default.", metavar="[RUN]...")] = None,
    budget: Annotated[str | None, option("--budget", f"{BUDGET_HELP}.", "SIZE")] = None,
    device: Annotated[str | None, option("--device", "Takes the budget from it, like 4090 or local.", "NAME")] = None,
    context: ContextOption = None,
    streams: Annotated[int, option("--streams", "Sequences decoded at once.", "N")] = 1,
    latency: LatencyOption = None,
    min_accuracy: Annotated[float | None, option("--min-accuracy", "A fraction.", "X")] = None,
    tiers: Annotated[bool, typer.Option("--tiers", help="The best for each of 4 to 80 GB.")] = False,
    own: DevicesOption = None,
    out: OutOption = _RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Pick the best stored student for some hardware, without training."""
    from autodistill.hardware_summary import pick_text

    show(output, lambda: picked(ctx.params), dict, pick_text)


@app.command()
def measure(
    ctx: typer.Context,
    student: Annotated[Path, typer.Argument(help="A .gguf file, or a folder of transformers.", metavar="STUDENT")],
    on: Annotated[str | None, option("--on", "A board, like ssh://pi@raspberrypi.local.", "ssh://HOST")] = None,
    script: Annotated[Path | None, option("--script", "Write a script for a board without ssh.", "FILE")] = None,
    result: Annotated[Path | None, option("--result", "Read what that script printed.", "FILE")] = None,
    bench: Annotated[str | None, option("--bench", "Path of llama-bench on the board.", "PATH")] = None,
    device: Annotated[str | None, option("--device", "What the board is; by its own name by default.", "NAME")] = None,
    ssh_config: Annotated[Path | None, option("--ssh-config", "In the place of your own.", "FILE")] = None,
    context: Annotated[
        int | None, option("--context", "Here: of each stream; 2048 by default, or what the student reads.", "TOKENS")
    ] = None,
    streams: Annotated[str, option("--streams", "Here: numbers of sequences at once, like 1,4,16.", "N,...")] = "1",
    prompt: Annotated[int | None, option("--prompt", "Tokens before the first one; 512 by default.", "TOKENS")] = None,
    decoded: Annotated[int | None, option("--decoded", "Tokens of an answer; 64 by default.", "TOKENS")] = None,
    rounds: Annotated[int | None, option("--rounds", "How many times; 3 by default.", "N")] = None,
    threads: Annotated[int, option("--threads", "CPU threads; 0 is every core.", "N", min=0)] = 0,
    timeout: Annotated[str | None, option("--timeout", "That a board may take; 30m by default.", "TIME")] = None,
    busy: Annotated[bool, typer.Option("--busy", help="Measure a busy machine all the same, and mark it.")] = False,
    own: DevicesOption = None,
    out: OutOption = _RUNS,
    cache: CacheOption = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Measure a student's speed and memory here, or on a board with llama.cpp's own bench; pick uses what was found."""
    from autodistill.hardware_summary import measured_text

    show(output, lambda: measured(ctx.params), dict, measured_text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default this process's own, and gives its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    typed = shlex.join(["autodistill", *given])
    try:
        code = app(given, prog_name="autodistill", obj=typed, standalone_mode=False) or 0
    except AutoDistillError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        return _fail(_complaint(error), InputError.exit_code)
    # Typer turns a Ctrl-C that nobody met into this code.
    return _fail("stopped", code) if code == 130 else int(code)


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _complaint(error: Any) -> str:
    where = error.ctx.command_path if error.ctx else "autodistill"
    return f"{error.format_message().rstrip('.')}; see {where} --help"


def _search(ctx: typer.Context) -> None:
    """What `search` and `distill` do; their arguments are read from the context."""
    started = time.monotonic()
    output = ctx.params["output"]

    def asked() -> SearchRequest:
        return search_request(ctx.params, ctx.command.name or "", ctx.obj or ctx.command_path, started)

    if ctx.params["plan"]:
        show(output, lambda: planned(asked()), dict, plan_summary)
    else:
        show(output, lambda: searched(asked()), lambda outcome: outcome.document, _summary(ctx))


def _summary(ctx: typer.Context) -> Callable[[Outcome], str]:
    def text(outcome: Outcome) -> str:
        run = RunFolder.open(ctx.params["out"], outcome.document["name"])
        return search_summary(outcome.document, *leaderboard_of(run), line_width())

    return text
