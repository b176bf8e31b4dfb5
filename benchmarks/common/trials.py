"""Train named strategies straight to the end, in parallel, on the default teacher and data. No search, no export."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.distillation.student.check import probe_deployment, student_spec
from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.hardware.budget import CONTEXT, Budget
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.phase_clock import Clock
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.observer import Observer
from autodistill.search.planning.placement import Place
from autodistill.search.prepare import plan_run, prepare_rows, prepare_trials
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Strategy
from benchmarks.common import over_seeds, program, report

# Constructions and alignments are compared under these losses: the start of the default space, without its alignment.
LOGITS = Distillation(divergence_weight=0.25, learning_rate=2e-4)
LOGITS_SAID = "forward KL from a cached top-64 (0.25, T 1) with cross-entropy, rate 2e-4, steps of one sequence"


# The heads are as many as the default teacher's, so the same shares of them are whole numbers.
SMALL = {"layers": 15, "width": 288, "heads": 9, "kv_heads": 3, "ffn": 384}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One trained strategy on validation, under the deployment it finishes on (or the widest).

    Attributes:
        name: The program's name for the strategy.
        strategy: The strategy's id.
        seed: Seed of data order and projections.
        tokens, batch_tokens, eval_tokens: Tokens of training, of a step, and of validation.
        deployment: Name of the deployment.
        accuracy, stderr, perplexity, agreement: Figures of its next-token predictions.
        train_seconds: Seconds of training alone.
        signal_bytes: Bytes on disk of the teacher's logits for each predicted token, at one temperature.
    """

    name: str
    strategy: str
    seed: int
    tokens: int
    batch_tokens: int
    eval_tokens: int
    deployment: str
    accuracy: float
    stderr: float
    perplexity: float
    agreement: float
    train_seconds: float
    signal_bytes: float

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify a result."""
        return self.strategy, self.seed, self.tokens, self.batch_tokens, self.eval_tokens


_bench: Workbench | None = None


def _open(setting: TrialSetting) -> None:
    global _bench
    _bench = Workbench(setting)


def _train(name: str, task: TrialTask) -> Result:
    assert _bench is not None
    plan = _bench.setting.plan
    told = Trial(_bench, task).run(len(plan.rungs) - 1)
    forget(_bench.setting.checkpoints, task.id)
    evaluation = told.evaluation
    figures = evaluation.measurements
    return Result(
        name=name,
        strategy=task.strategy.id,
        seed=task.seed,
        tokens=plan.tokens,
        batch_tokens=plan.batch_tokens,
        eval_tokens=plan.eval_tokens,
        deployment=evaluation.deployment.name,
        accuracy=figures["accuracy"].value,
        stderr=figures["accuracy"].stderr or float("nan"),
        perplexity=figures["perplexity"].value,
        agreement=figures["agreement"].value,
        train_seconds=told.seconds["train"],
        signal_bytes=signal_bytes(_bench.setting.cache, task.strategy.distillation),
    )


def forget(checkpoints: Path, trial: str) -> None:
    """Remove a trial's files. Nothing continues from them, and with optimiser states they take 2 GB each."""
    shutil.rmtree(checkpoints / trial, ignore_errors=True)
    stages = open_stages(checkpoints)
    for checkpoint in stages.checkpoints(trial):
        stages.remove(checkpoint)


def signal_bytes(cache: Path | None, recipe: Distillation) -> float:
    """Return the cached bytes of the teacher's logits that a recipe reads for each predicted token."""
    if cache is None or not recipe.weighs_teacher or recipe.signal == "online":
        return 0.0
    settings = TeacherCache(cache).settings
    batch = pa.ipc.open_file(pa.memory_map(str(cache / "outputs.arrow"))).get_batch(0)
    held = {name: batch.column(name).nbytes / len(batch) for name in batch.schema.names}
    if recipe.signal == "states":
        return held["final"]
    one = held["log_sum"] / len(settings.temperatures)
    if recipe.signal == "sampled":
        return held[f"drawn_{recipe.signal_tokens}"] + one
    return (held["ids"] + held["below_maximum"]) * recipe.signal_tokens / settings.top_k + one


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for a program that compares strategies over seeds."""
    parser = program.parser_of(doc, seeds=5)
    parser.add_argument("--tokens", type=program.token_count, default=6144, help="training tokens of each")
    parser.add_argument("--workers", type=int, default=2, help="that train at once")
    parser.add_argument("--report", action="store_true", help="only the report of what is there")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options, with small ones for `--smoke`."""
    return program.parse(parser, tokens=256, seeds=1, workers=2)


def small_inputs() -> dict[str, Any]:
    """Make a tiny teacher and text, and return them with sizes that fit."""
    inputs = {"teacher": program.tiny_teacher(**SMALL), "data": program.tiny_data()}
    return inputs | {"context": 256, "eval_tokens": 512}


def study(arguments: argparse.Namespace, store: str, strategies: Mapping[str, Strategy]) -> tuple[Path, list[Result]]:
    """Train each strategy with each seed that a results file lacks; return the file and all its results.

    Args:
        arguments: The program's options.
        store: Name of the file.
        strategies: Strategies by name. A smoke run trains the first and the last.
    """
    file, inputs = program.REPORTS / store, {}
    if arguments.smoke:
        first, *_, last = strategies
        strategies, inputs = {name: strategies[name] for name in (first, last)}, small_inputs()
    seeds = range(0 if arguments.report else arguments.seeds)
    run(strategies, tokens=arguments.tokens, seeds=seeds, workers=arguments.workers, store=file, **inputs)
    return file, named(file, strategies, tokens=arguments.tokens)


def kept(store: Path) -> list[Result]:
    """Return the results of a file."""
    return [Result(**line) for line in report.lines_of(store)]


def by_seed(results: Iterable[Result], figure: str) -> dict[str, dict[int, float]]:
    """Return a figure by the name of the strategy and by seed."""
    found: dict[str, dict[int, float]] = {}
    for one in sorted(results, key=lambda one: one.seed):
        found.setdefault(one.name, {})[one.seed] = getattr(one, figure)
    return found


def named(store: Path, strategies: Mapping[str, Strategy], *, tokens: int) -> list[Result]:
    """Return the results of these strategies at this many tokens, under their names and in their order."""
    names = {strategy.id: name for name, strategy in strategies.items()}
    found = [one for one in kept(store) if one.strategy in names and one.tokens == tokens]
    order = list(strategies)
    return sorted((replace(one, name=names[one.strategy]) for one in found), key=lambda one: order.index(one.name))


def judged(results: Sequence[Result]) -> str:
    """Describe in sentences how results were judged."""
    evaluated = ", ".join(f"{tokens:,}" for tokens in sorted({one.eval_tokens for one in results}))
    packed = ", ".join(sorted({one.deployment for one in results}))
    return (
        f"Judged on {evaluated} tokens of validation documents that no training sequence shares, packed as {packed}. "
        "Figures are means over seeds (of data order, projections and random weights) and their standard errors; "
        "differences are paired by seed, and clear where chance would bring them about less than once in twenty "
        "(Student's t)."
    )


def table(results: Sequence[Result], base: str) -> str:
    """Return a table of each case's accuracy, perplexity and agreement.

    The first two are compared with the base too.
    """
    accuracy, perplexity, agreement = (by_seed(results, name) for name in ("accuracy", "perplexity", "agreement"))
    rows = []
    for name in dict.fromkeys(one.name for one in results):
        row = [name, len(accuracy[name])]
        for figures, digits in ((accuracy, 4), (perplexity, 2)):
            row.append(over_seeds.mean(list(figures[name].values()), digits))
            off = over_seeds.paired(figures[name], figures[base])
            row.append("" if name == base else over_seeds.mean(off, digits, sign=True))
        rows.append([*row, over_seeds.mean(list(agreement[name].values()), 3)])
    titles = ["case", "seeds", "accuracy", f"less {base}", "perplexity", f"less {base}", "agreement with the teacher"]
    return report.table(titles, rows)


def verdicts(results: Sequence[Result], base: str) -> str:
    """Return a sentence for each case: whether its differences in accuracy and log perplexity are clear."""
    accuracy, perplexity = by_seed(results, "accuracy"), by_seed(results, "perplexity")
    sentences = []
    for name in dict.fromkeys(one.name for one in results):
        if name == base:
            continue
        points = over_seeds.paired(accuracy[name], accuracy[base])
        losses = [
            math.log(perplexity[name][seed] / perplexity[base][seed])
            for seed in sorted(perplexity[name].keys() & perplexity[base].keys())
        ]
        said = [
            f"{over_seeds.mean(values, digits, factor=factor, sign=True)} {unit} "
            f"({'clear' if over_seeds.is_clear(values) else 'not clear'})"
            for values, digits, factor, unit in ((points, 2, 100, "points of accuracy"), (losses, 4, 1, "nats a token"))
        ]
        sentences.append(f"- {name}, less {base}: {', '.join(said)}.")
    return "\n".join(sentences)


def run(
    strategies: Mapping[str, Strategy],
    *,
    tokens: int,
    seeds: Iterable[int] = (0,),
    workers: int = 2,
    batch_tokens: int = SEQUENCE_LENGTH,
    eval_tokens: int = 4096,
    teacher: str = "smollm2",
    data: str = "pydoc",
    context: int = CONTEXT,
    store: Path | None = None,
) -> list[Result]:
    """Train every strategy with every seed, one seed of all strategies after another. Print a line for each that ends.

    Args:
        strategies: Strategies by name.
        tokens: Training tokens of each.
        seeds: Seeds of data order and projections.
        workers: Number of processes, each with an equal share of the cores.
        batch_tokens: Tokens of an optimiser step.
        eval_tokens: Validation tokens that are read.
        teacher, data: References.
        context: Context of the budget.
        store: JSONL file to which each result is appended. Results that it has are not trained again.
    """
    tokens = tokens // batch_tokens * batch_tokens
    wanted = {
        (strategy.id, seed, tokens, batch_tokens, eval_tokens): (name, strategy)
        for seed in seeds
        for name, strategy in strategies.items()
    }
    earlier = [] if store is None else kept(store)
    # A strategy's name may have changed since.
    done = [replace(one, name=wanted[one.key][0]) for one in earlier if one.key in wanted]
    missing = {key: wanted[key] for key in wanted.keys() - {one.key for one in done}}
    if not missing:
        return done
    results = list(done)
    spawned = multiprocessing.get_context("spawn")
    request = request_of(teacher, data, tokens=tokens, step_tokens=batch_tokens, context=context)
    named_missing = {name: strategies[name] for name, _ in missing.values()}
    with (
        ready(request, named_missing, workers, eval_tokens) as (setting, deployments),
        ProcessPoolExecutor(workers, spawned, initializer=_open, initargs=(setting,)) as pool,
    ):
        futures = []
        for index, key in enumerate(key for key in wanted if key in missing):
            name, strategy = missing[key]
            probe = probe_deployment(strategy, deployments)
            task = TrialTask(
                id=f"x{index:03d}", strategy=strategy, seed=key[1], deployments=(probe,), probe=probe, straight=True
            )
            futures.append(pool.submit(_train, name, task))
        for future in as_completed(futures):
            result = future.result()
            results.append(result)
            if store is not None:
                report.add_line(store, result)
            print(
                f"[{len(results)}/{len(wanted)}] {result.name}, seed {result.seed}: accuracy "
                f"{result.accuracy:.4f}, perplexity {result.perplexity:.2f}, {result.train_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return results


def request_of(
    teacher: str, data: str, *, tokens: int, step_tokens: int, context: int, length: int | None = None
) -> SearchRequest:
    """Return the request for trials of so many training tokens, within a budget that holds any student.

    Args:
        teacher, data: References.
        tokens, step_tokens: Training tokens of a trial and of an optimiser step.
        context: Context of the budget.
        length: Sequence length; None for the usual one.
    """
    return SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=context),
        teacher=teacher,
        data=data,
        trials=1,
        tokens=tokens,
        step_tokens=step_tokens,
        sequence_length=length,
        runner="inline",
        name="trials",
    )


@contextmanager
def ready(
    request: SearchRequest, strategies: Mapping[str, Strategy], workers: int, eval_tokens: int
) -> Iterator[tuple[TrialSetting, Sequence[Deployment]]]:
    """Yield what trials of these strategies need, and the space's deployments. The run is deleted after the block."""
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is solved in this space. A solved recipe would be raced in place of these strategies.
        config = check_request(replace(request, runs=Path(folder), space="declared"))
        deployments = config.space.deployments
        # One deployment suffices, as no teacher rows are wanted. The strategies are kept as baselines, so that the
        # cache has every state that one of them aligns to.
        space = replace(config.space, deployments=deployments[:1], dimensions=(), starts={}, baselines=dict(strategies))
        config = replace(config, space=space)
        with RunFolder.create(Path(folder), config.name) as run_folder:
            clock = Clock(time.monotonic(), lambda text: None)
            planned = plan_run(config, Place.local(), run_folder, clock, Observer())
            threads, tokens = max(1, planned.plan.threads // workers), request.tokens
            plan = replace(planned.plan, threads=threads, eval_tokens=eval_tokens, tokens=tokens)
            for strategy in strategies.values():
                student_spec(strategy, planned.loaded.spec)  # raises an error if no such student exists
            planned = replace(planned, plan=plan)
            rows = prepare_rows(planned, run_folder, clock)
            yield prepare_trials(planned, rows, run_folder, clock, Observer()).setting, deployments
