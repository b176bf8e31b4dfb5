"""Each arm makes a file from a teacher within a budget and a time, and says how to serve the file."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import NothingFitsError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import memory
from autodistill.export.base import load_exporter
from autodistill.export.process_memory import measured_process_bytes
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.objects.run import run_search
from autodistill.search.construction.construction import FEWEST_BITS, Construction
from autodistill.search.construction.recipe import first_prior
from autodistill.search.prior.prior import Prior
from autodistill.search.request.request import SearchRequest
from autodistill.search.solve import SolveRequest, solve
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import OWN_CODES, rivals
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import WHOLE, Finishing, Init, Strategy
from autodistill.utils.json_files import read_json

# The share of the time for a search that must reach its rivals' final result with 40% less.
SHORT = 0.6
# Bits of the file for each weight, for which types are solved, beside rivals in plain types of three and four bits.
FEW_BITS = 3.2
# Storages of one type, for a person who does not search, the most bits first, with an 8-bit cache.
PLAIN = ("q8_0", "q6_k", "q5_0", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k")

_FOUR_BITS = PLAIN[:6]
_TRIALS = 8  # of the arms that share the library and try recipes
_SEQUENCE = 256
_STEPS = 512  # of a sequence each, about as many as fit in ten minutes; they give the learning rate
# Depths of the hand-designed recipe, its own first, and shapes for Minitron's pruning.
_RECIPE_DEPTHS = (0.8, 0.7, 0.6, 0.5, 0.4)
_DEPTHS, _FFNS = (1.0, 0.9, 0.8, 0.7, 0.6), tuple(round(1 - 0.05 * step, 2) for step in range(15))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an arm is given.

    Attributes:
        teacher, data: References.
        budget: Bytes of the process, and the context.
        sequence, seed: Sequence length and seed of the training.
        ends: The `time.time()` at which the arm's time is over.
        cache: The arm's own cache. At first it has only the tokens of the data.
        out: The arm's own folder.
        tokens: Training tokens in a smoke run, instead of as many as the time allows.
    """

    teacher: str
    data: str
    budget: Budget
    sequence: int
    seed: int
    ends: float
    cache: Path
    out: Path
    tokens: int | None = None

    @property
    def left(self) -> float:
        """The seconds that are left, at least 1."""
        return max(1.0, self.ends - time.time())


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an arm exports.

    Attributes:
        file: A file for llama.cpp.
        deployment: How the student is stored and served.
        tokens: Tokens that it was trained on.
        name: A description of the student.
    """

    file: Path
    deployment: Deployment
    tokens: int
    name: str


def untrained(task: Task) -> Made:
    """Return the construction with the lowest KL: the solution, or a plain storage."""
    request = _solving(task)
    document = solve(request, _say)
    (found,) = document["solutions"]
    rivals = [one for one in found["rivals"] if one["fits"] and one["kl"] is not None]
    best = min([found["solution"], *rivals], key=lambda one: float(one["kl"]))
    deployment, name = Deployment.from_json(best["deployment"]), f"{best.get('what') or 'solved'}, untrained"
    if _is_cut(best):
        # The solver itself writes a cut teacher, from the one that it has scored.
        exported = solve(replace(request, out=task.out, export=True), _say)["exported"]
        return Made(file=Path(exported["path"]), deployment=deployment, tokens=0, name=name)
    reference = resolve_teacher(task.teacher)
    # The codes of the teacher's file keep their scales, if it has any.
    teacher, _ = stored_as(reference, materialize(reference, task.cache), _spec(task), task.cache)
    artifact = load_exporter("gguf").export(teacher.folder, deployment, task.out / "plain", teacher=teacher.name)
    return Made(file=artifact.path, deployment=deployment, tokens=0, name=name)


def _solving(task: Task, file_bytes: int | None = None) -> SolveRequest:
    """Return the request to solve a task's budget, perhaps within so many bytes of weights in the file."""
    return SolveRequest(
        budgets=(task.budget,),
        cache=task.cache,
        teacher=task.teacher,
        data=task.data,
        sequence_length=task.sequence,
        file_bytes=file_bytes,
    )


def _is_cut(found: Mapping[str, Any]) -> bool:
    return Init.from_json(found.get("init", WHOLE.to_json())) != WHOLE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def no_search(task: Task) -> Made:
    """Train only what a search begins with: its recipe on the best plain storage that fits, or on a plain cut."""
    return _unsearched(task, _known(_spec(task)))


def no_teacher(task: Task) -> Made:
    """Train the same on the labels alone. The difference is what the teacher is worth."""
    return _unsearched(task, _labels(_spec(task)))


def _unsearched(task: Task, recipe: Distillation) -> Made:
    deployment = _best_plain(task)
    if deployment is None:
        return _begun(task, recipe, *_cut(task, _spec(task)))
    return _begun(task, recipe, WHOLE, deployment)


def _begun(task: Task, recipe: Distillation, init: Init, deployment: Deployment) -> Made:
    """Train a student as a search would train it, from this beginning and in this storage."""
    construction = Construction(init=init, deployment=deployment, bytes=0)
    finishing = next(iter(construction.finishings(_prior(_spec(task)).many).values()))
    return _distilled(task, Strategy(init=init, distillation=recipe, finishing=finishing), deployment)


def _best_plain(task: Task) -> Deployment | None:
    """Return how a person would store the whole teacher, or None if nothing fits.

    This is the teacher's own codes, or else the type with the most bytes. Nobody trains two bits if a cut of the
    teacher fits in four. With the small model in 65% of its bytes, the cut ends 0.3 nats ahead, while the whole model
    fits in Q2_K by less than 0.1 MB.
    """
    spec, reference = _spec(task), resolve_teacher(task.teacher)
    _, stored = stored_as(reference, _materialized(task), spec, task.cache)
    options = Options(spec=spec, budget=task.budget)

    def bytes_of(one: Deployment) -> float:
        return float(options.memory(one).total_bytes)

    own = stored.deployment if stored else None
    found = rivals(options, own, task.budget.memory_bytes, lambda one: -bytes_of(one))
    held = [one for one in found if options.fits(one.deployment) and one.deployment.bits >= FEWEST_BITS]
    first = [one for one in held if one.what.startswith(OWN_CODES)] or held
    return max((one.deployment for one in first), key=bytes_of, default=None)


def finetune(task: Task) -> Made:
    """Train the whole teacher on the labels, and quantise it at the end."""
    spec = _spec(task)
    return _distilled(task, Strategy(init=WHOLE, distillation=_labels(spec)), _plain(task, spec))


def recipe(task: Task) -> Made:
    """Train the hand-designed recipe on the type that stores it, with as many of its layers as fit."""
    spec, whole = _spec(task), load_strategy("hand_designed")
    for depth in _RECIPE_DEPTHS:
        init = replace(whole.init, depth=depth)
        student = student_spec(Strategy(init=init), spec)
        alignment = whole.distillation.alignment
        if alignment is not None:
            alignment = replace(alignment, count=min(alignment.count, student.layers))
        with contextlib.suppress(NothingFitsError):
            deployment = _plain(task, student, _FOUR_BITS)
            recipe = replace(whole.distillation, alignment=alignment)
            cut = replace(whole, init=init, distillation=recipe, finishing=_finishing_on(deployment))
            return _distilled(task, cut, deployment)
    raise NothingFitsError("no part of the recipe's layers fits with 4 bits or more")


def minitron(task: Task) -> Made:
    """Prune only as much as 4 bits require, distil from logits, then quantise."""
    init, deployment = _cut(task, _spec(task))
    return _distilled(task, Strategy(init=init, distillation=load_strategy("logit_kd").distillation), deployment)


def _cut(task: Task, spec: ModelSpec) -> tuple[Init, Deployment]:
    """Return the largest cut that fits in 4 bits, and of equal cuts the deeper one, in the most bits that it fits in.

    At most 40% of the layers and 70% of the FFN are cut.
    """
    found = list[tuple[ModelSpec, Init]]()
    for depth in _DEPTHS:
        for ffn in _FFNS:
            init = Init(depth=depth, ffn=ffn, layers="block-influence" if depth < 1 else "even")
            cut = student_spec(Strategy(init=init), spec)
            plain = _stored(cut, "q4_0")
            if plain is not None and _fits(task, cut, plain):
                found.append((cut, init))
                break
    if not found:
        raise NothingFitsError("no cut of at most 40% of the layers and 70% of the FFN fits with 4 bits")
    cut, init = max(found, key=lambda one: one[0].parameters)
    return init, _plain(task, cut, _FOUR_BITS)


def search(task: Task, *further: str, program: str = "autodistill") -> Made:
    """Run the unchanged command, with further options. It ends by itself. `program` is the module that runs it."""
    command = ["search", "--budget", f"{task.budget.memory_bytes / 1e6}MB", "--context", str(task.budget.context)]
    command += ["--teacher", task.teacher, "--data", task.data, "--time", f"{task.left:.0f}s"]
    command += ["--seed", str(task.seed), "--sequence-length", str(task.sequence)]
    command += ["--cache", str(task.cache), "--runs", str(task.out), "--json", *further]
    done = subprocess.run([sys.executable, "-m", program, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode == NothingFitsError.exit_code:
        raise NothingFitsError("the search says that nothing fits")
    if done.returncode:
        raise RuntimeError(f"the search ended with code {done.returncode}: see its log")
    return _exported(json.loads(done.stdout))


def search_task(task: Task) -> Made:
    """Run the command so that only the given text counts, as for all rivals. Forgetting is only reported."""
    return search(task, "--goal", "task")


def one_construction(task: Task) -> Made:
    """Train only the best solution, without a race, as Puzzle does."""
    return search(task, "--trials", "1")


def all_trials(task: Task) -> Made:
    """Tune in all of the time: Optuna proposes trials, Ray Tune pauses or promotes them, and nothing is trained on."""
    return search(task, "--trials", str(_TRIALS), "--explore", "1")


def short_then_best(task: Task) -> Made:
    """Train all trials equally long, and the best of them in the rest of the time."""
    return search(task, "--trials", str(_TRIALS), "--explore", "0.4", program="benchmarks.search.versus.unstopped")


def three_bits(task: Task) -> Made:
    """Train the whole teacher in a plain type of three bits, by the recipe that is known before a search."""
    return _whole_in(task, _stored(_spec(task), "q3_k"))


def four_bits(task: Task) -> Made:
    """Train it in a plain type of four bits, whose bytes are the block's budget."""
    return _whole_in(task, _stored(_spec(task), "q4_0"))


def few_bits(task: Task) -> Made:
    """Train it in the types that are solved for `FEW_BITS`."""
    (found,) = solve(_solving(task, int(FEW_BITS * _spec(task).parameters / 8)), _say)["solutions"]
    if _is_cut(found["solution"]):
        raise NothingFitsError("the solution is a cut of the teacher")
    return _whole_in(task, Deployment.from_json(found["solution"]["deployment"]))


def _whole_in(task: Task, deployment: Deployment | None) -> Made:
    if deployment is None:
        raise NothingFitsError("the type's blocks do not divide the rows")
    return _begun(task, _known(_spec(task)), WHOLE, deployment)


ARMS: Mapping[str, Callable[[Task], Made]] = {
    "untrained": untrained,
    "no-search": no_search,
    "no-teacher": no_teacher,
    "finetune": finetune,
    "recipe": recipe,
    "minitron": minitron,
    "search": search,
    "search-short": search,
    "search-task": search_task,
    "one-construction": one_construction,
    "all-trials": all_trials,
    "short-then-best": short_then_best,
    "three-bits": three_bits,
    "four-bits": four_bits,
    "few-bits": few_bits,
}


def share_of(arm: str) -> float:
    """Return the share of the time that an arm has."""
    return SHORT if arm == "search-short" else 1.0


def _distilled(task: Task, strategy: Strategy, deployment: Deployment) -> Made:
    """Train one strategy's student for all of the time, and store it in one way.

    If only scales are trained, a step has as many sequences as processes can divide, as in a search.
    """
    task.out.mkdir(parents=True, exist_ok=True)
    files = {"strategy.yaml": strategy.to_json(), "space.yaml": _space(deployment)}
    for name, data in files.items():
        (task.out / name).write_text(json.dumps(data), encoding="utf-8")
    request = SearchRequest(
        strategy=task.out / "strategy.yaml",
        space=task.out / "space.yaml",
        budget=task.budget,
        teacher=task.teacher,
        data=task.data,
        time=None if task.tokens else task.left,
        tokens=task.tokens,
        step_tokens=2 * task.sequence if strategy.scales_alone else None,
        seed=task.seed,
        sequence_length=task.sequence,
        cache=task.cache,
        runs=task.out,
        runner="inline",
    )
    return _exported(run_search(request).document)


def _space(deployment: Deployment) -> dict[str, Any]:
    """Return a space that only says how students are stored."""
    return {"name": "versus", "dimensions": {"init.depth": {"choices": [1.0]}}, "deployments": [deployment.to_json()]}


def _exported(document: Mapping[str, Any]) -> Made:
    best = document["best"]
    return Made(
        file=Path(document["paths"]["gguf"]),
        deployment=Deployment.from_json(best["deployment"]),
        tokens=int(best["train_tokens"] or 0),
        name=str(best["name"]),
    )


def _known(spec: ModelSpec) -> Distillation:
    """Return the recipe that is known before a search. The search begins with it too."""
    return _prior(spec).recipe


def _prior(spec: ModelSpec) -> Prior:
    return first_prior(spec, batch_tokens=_SEQUENCE, steps=_STEPS)


def _labels(spec: ModelSpec) -> Distillation:
    plain = Distillation()
    return replace(_known(spec), divergence_weight=0.0, signal=plain.signal, signal_tokens=plain.signal_tokens)


def _finishing_on(deployment: Deployment) -> Finishing | None:
    scheme = deployment.scheme
    return Finishing(**asdict(scheme)) if scheme.bits < 16 else None


def _plain(task: Task, spec: ModelSpec, kinds: Sequence[str] = PLAIN) -> Deployment:
    """Return the plain type with the most bits in which a model fits."""
    for kind in kinds:
        plain = _stored(spec, kind)
        if plain is not None and _fits(task, spec, plain):
            return plain
    raise NothingFitsError("the model fits in no plain type")


def _stored(spec: ModelSpec, kind: str) -> Deployment | None:
    """Return a deployment with all matrices and tables in one type, and an 8-bit cache.

    None if the type's blocks do not divide the rows. A tied table beside Q4_0 may be in Q5_0 if that takes less:
    llama.cpp holds a Q4_0 table twice, and a Q5_0 table once.
    """
    options = Options(spec=spec, budget=Budget(memory_bytes=1, context=1))
    tensors = options.matrices | options.tables
    if any(kind not in options.kinds(tensor) for tensor in tensors.values()) or ("q8_0", "q8_0") not in options.caches:
        return None
    tables = (kind, "q5_0") if kind == "q4_0" else (kind,)
    found = [
        options.deployment(dict.fromkeys(tensors, kind) | dict.fromkeys(options.tables, table), ("q8_0", "q8_0"))
        for table in tables
    ]
    held = [one for one in found if not cannot_hold(spec, one)]
    return min(held, key=lambda one: memory(spec, one, context=1, batch=1).total_bytes, default=None)


def _fits(task: Task, spec: ModelSpec, deployment: Deployment) -> bool:
    budget = task.budget
    return memory(spec, deployment, context=budget.context, batch=1).total_bytes <= budget.memory_bytes


def _spec(task: Task) -> ModelSpec:
    folder = _materialized(task).folder
    spec = spec_from_config(read_json(folder / "config.json"))
    return replace(spec, process_bytes=measured_process_bytes(folder, spec.vocabulary, task.cache))


def _materialized(task: Task) -> Teacher:
    return materialize(resolve_teacher(task.teacher), task.cache)


def budget_of(spec: ModelSpec, share: float, context: int) -> Budget:
    """Return a block's budget: bytes, or a share of the whole model's weights and cache in Q4_0 with an 8-bit cache.

    Args:
        spec: The teacher's shape.
        share: The share; above 1, the bytes of the process.
        context: Tokens.
    """
    if share > 1:
        return Budget(memory_bytes=int(share), context=context)
    plain = _stored(spec, "q4_0")
    assert plain is not None, "the teacher's rows are divided by 32"
    need = memory(spec, plain, context=context, batch=1)
    serves = need.compute_bytes + need.overhead_bytes
    return Budget(memory_bytes=serves + int(share * (need.weights_bytes + need.kv_cache_bytes)), context=context)
