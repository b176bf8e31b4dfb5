"""Two claims of the guide on the small language model: the full recipe beside outputs alone, and training on a grid.

    python -m benchmarks.search.language_claims [--tokens 256k] [--seeds 3] [--teacher-tokens 69M] [--time 20m]

`engine.claims` has them on sums. Here the teacher is that of `search.small_teacher`, and the text is of the kind that
it was trained on. Students begin with two of its three layers. Each recipe has the learning rate, of four, with the
lowest loss on validation documents, with a seed that is not used again. Everything else is judged on documents that no
training reads, as shares of next tokens. Results are kept, and the same command continues them.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.trainer import Trainer
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.evaluation.statistics import clustered_mean
from autodistill.inference.scoring import score
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.quantization.grids import Grid
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import trainer_of
from autodistill.strategy.deployment import Deployment, serving
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import debian_texts, program, report, trials
from benchmarks.common.math_table import exhaust
from benchmarks.common.over_seeds import is_clear, mean, paired
from benchmarks.search.small_teacher import small_teacher

LENGTH, BATCH = 256, 1024
TEST_TOKENS, VALIDATION_TOKENS = 32_768, 8_192
SWEEP_SEED = 100
RATES = (2e-4, 6e-4, 1.8e-3, 5.4e-3)
TEXT = "manuals"
DECAY = 0.2

LABELS, OUTPUTS, FULL = "labels alone", "outputs alone", "the full recipe"
_PLAIN = Distillation(divergence_weight=0.0, train_embeddings=True)


def _full() -> Distillation:
    """Return the guide's recipe, without its grid, for a student of two layers."""
    named = load_strategy("full_recipe").distillation
    assert named.alignment is not None
    return replace(named, alignment=replace(named.alignment, count=2), train_embeddings=True)


RECIPES = {
    LABELS: _PLAIN,
    OUTPUTS: replace(_PLAIN, divergence_weight=1.0),
    "labels and outputs": replace(_PLAIN, divergence_weight=0.444),
    FULL: _full(),
}
# What is rounded, with and without training on the grid, and the bits of its groups of 32.
QUANTISED, BITS = "labels and outputs", (8, 4, 3, 2)
_WHOLE = Deployment(format="huggingface", bits=16, group_size=0, runtime="transformers")


def quantized(bits: int) -> Deployment:
    """Return symmetric integers as compressed-tensors packs them. The tied table of tokens stays in 16 bits."""
    finishing = Finishing(format="compressed-tensors", bits=bits, group_size=32)
    return Deployment(runtime=serving(finishing)[0], format="compressed-tensors", bits=bits, group_size=32)


class Bench:
    """Trains students of one teacher, and judges them.

    Args:
        setting: What trials of the recipes need.
        test: Documents that no training reads.
        init: How students begin.
    """

    def __init__(self, setting: TrialSetting, test: TokenSet, init: Init) -> None:
        self._bench = Workbench(setting)
        self._test, self._init = test, init
        self._tokens, self._batch = setting.plan.tokens, setting.plan.batch_tokens
        self._spec = student_spec(Strategy(init=init), setting.teacher_spec)

    def swept(self, recipe: Distillation) -> float:
        """Return nats a token of validation, after a training with the seed for choosing rates."""
        trainer = self._begun(recipe, SWEEP_SEED)
        self._stable(trainer)
        exhaust(trainer.train_decay(self._tokens))
        return self._judged(trainer.model, _WHOLE, self._bench.held_out(VALIDATION_TOKENS, self._init)[0])["nll"]

    def trained(self, recipe: Distillation, seed: int, grids: bool) -> dict[str, Any]:
        """Train a student, and judge it by the name of its storage. With `grids`, also on each grid, in two ways.

        It is rounded after the training, and its decay is trained once more on the grid.
        """
        trainer = self._begun(recipe, seed)
        self._stable(trainer)
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            branch = Path(folder) / "branch.safetensors"
            trainer.save(branch)
            exhaust(trainer.train_decay(self._tokens))
            found["16"] = self._judged(trainer.model, _WHOLE, self._test)
            for bits in BITS if grids else ():
                packed = quantized(bits)
                found[f"{bits} rounded"] = self._judged(trainer.model, packed, self._test)
                aware = self._begun(recipe, seed)
                aware.load(branch)
                storages = {tensor.name: packed.storage(tensor) for tensor in self._spec.tensors}
                on = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
                exhaust(aware.train_decay(self._tokens, on.get))
                found[f"{bits} trained"] = self._judged(aware.model, packed, self._test)
        return found

    def _begun(self, recipe: Distillation, seed: int) -> Trainer:
        task_of = Strategy(init=self._init, distillation=recipe)
        task = TrialTask(id="x", strategy=task_of, seed=seed, deployments=(_WHOLE,), probe=_WHOLE)
        model, kept = initial_student(self._bench.setting, self._init, seed)
        return trainer_of(self._bench, task, model, kept)

    def _stable(self, trainer: Trainer) -> None:
        exhaust(trainer.train_stable(branch_point(self._tokens, DECAY, self._batch)))

    def _judged(self, model: Any, deployment: Deployment, data: TokenSet) -> dict[str, float]:
        with torch.no_grad(), deployed_weights(model, self._spec, deployment):
            return figures(model, data)


def figures(model: Any, data: TokenSet) -> dict[str, float]:
    """Return nats a token, and the share of next tokens that a model ranks first."""
    scores, _ = score(model.eval(), data)
    return {
        "nll": float(clustered_mean(scores.nll, scores.documents)[0]),
        "accuracy": float(clustered_mean(scores.correct, scores.documents)[0]),
    }


def _sections(
    teacher: Mapping[str, float], rates: Mapping[str, float], found: Mapping[str, Mapping[int, Any]], tokens: int
) -> list[str]:
    """Return the parts of the report."""

    def accuracy(name: str, storage: str = "16") -> dict[int, float]:
        return {seed: one[storage]["accuracy"] for seed, one in found[name].items() if storage in one}

    def nll(name: str) -> list[float]:
        return [one["16"]["nll"] for one in found[name].values()]

    lines = []
    for name in found:
        lost = [teacher["accuracy"] - value for value in accuracy(name).values()]
        beside = paired(accuracy(name), accuracy(OUTPUTS))
        clear = "" if name == OUTPUTS else f" ({'clear' if is_clear(beside) else 'not clear'})"
        less = "-" if name == OUTPUTS else mean(beside, 2, factor=100, sign=True) + clear
        lines.append(
            [name, f"{rates[name]:g}", len(lost), mean(nll(name), 4), mean(lost, 2, factor=100, sign=True), less]
        )
    titles = ["trained on", "rate", "seeds", "nats a token", "points below the teacher", "points above outputs alone"]
    kept = []
    for bits in BITS:
        without, aware = accuracy(QUANTISED, f"{bits} rounded"), accuracy(QUANTISED, f"{bits} trained")
        shares = [[value / teacher["accuracy"] for value in one.values()] for one in (without, aware)]
        gained = [value / teacher["accuracy"] for value in paired(aware, without)]
        clear = "clear" if is_clear(gained) else "not clear"
        shown = [mean(one, 2, factor=100) for one in shares]
        kept.append([bits, *shown, f"{mean(gained, 2, factor=100, sign=True)} ({clear})"])
    return [
        f"Students of two of the teacher's three layers, {tokens:,} training tokens each, in steps of {BATCH:,}, "
        f"judged on {TEST_TOKENS:,} tokens of unseen documents of the text `{TEXT}`. The teacher has "
        f"{teacher['nll']:.4f} nats a token and {100 * teacher['accuracy']:.2f}% of the next tokens there. Means over "
        "seeds and their standard errors; differences are paired by seed, and clear where chance would cause them "
        "less than once in twenty times.",
        "## Recipes, in 16 bits\n\n" + report.table(titles, lines),
        f"## Share of the teacher's accuracy that a student keeps, in %, trained on {QUANTISED}\n\nThe last fifth of "
        "the training is on the grid, or it is not, and the student is rounded afterwards. Groups of 32.\n\n"
        + report.table(["bits", "rounded afterwards", "trained on the grid", "gained"], kept),
    ]


def main() -> None:
    """Train the students that are missing, and write the report."""
    parser = program.parser_of(__doc__, seeds=3, time=True)
    parser.add_argument("--tokens", type=program.token_count, default=256_000)
    parser.add_argument("--teacher-tokens", type=program.token_count, help="of the small teacher: an earlier one")
    arguments = program.parse(parser, tokens=8 * BATCH, seeds=2)
    tokens = arguments.tokens // BATCH * BATCH
    torch.set_num_threads(2)
    init = Init(depth=2 / 3)
    if arguments.smoke:
        folder = Path(program.tiny_teacher(layers=3, width=64, heads=4, kv_heads=2, ffn=128))
        data = test_data = str(program.tiny_data())
    else:
        texts = debian_texts.debian_texts().folder
        folder = small_teacher(arguments.teacher_tokens)
        data, test_data = str(texts / TEXT), str(texts / f"{TEXT}-test")
    strategies = {name: Strategy(init=init, distillation=recipe) for name, recipe in RECIPES.items()}
    request = trials.request_of(str(folder), data, tokens=tokens, step_tokens=BATCH, context=LENGTH, length=LENGTH)
    source = content_hash([tokenizer_fingerprint(folder), folder.name, data, tokens])
    kept = report.Kept("language-claims", source, arguments.time)
    own = cache_folder() / "benchmarks" / "versus"
    prepared = prepare(resolve_data(test_data), folder, tokenizer_fingerprint(folder), LENGTH, own)
    test = load_split(prepared.folder, "train").head(TEST_TOKENS)
    with trials.ready(request, strategies, 1, VALIDATION_TOKENS) as (setting, _):
        plan = replace(setting.plan, threads=2, micro_batch=BATCH // LENGTH, warmup_tokens=8 * BATCH)
        bench = Bench(replace(setting, plan=plan), test, init)
        teacher = kept.get("teacher", lambda: figures(load_model(folder, torch.float32), test))
        rates = {}
        for name, recipe in RECIPES.items():
            losses = {}
            for rate in RATES:
                print(f"{name}, rate {rate:g}", file=sys.stderr, flush=True)
                losses[rate] = kept.get(
                    f"sweep {name} {rate:g}", partial(bench.swept, replace(recipe, learning_rate=rate))
                )
            rates[name] = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
        found: dict[str, dict[int, Any]] = {name: {} for name in RECIPES}
        for seed in range(arguments.seeds):
            for name, recipe in RECIPES.items():
                print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                make = partial(bench.trained, replace(recipe, learning_rate=rates[name]), seed, name == QUANTISED)
                found[name][seed] = kept.get(f"{name} {rates[name]:g} {seed}", make)
    title = "Two claims of the guide, on a language model of two million weights"
    parts = _sections(teacher, rates, found, tokens)
    print(report.write("language-claims", title, parts, made_by="-m benchmarks.search.language_claims"))


if __name__ == "__main__":
    main()
