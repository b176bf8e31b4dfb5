"""Beliefs about recipes: the best values of synthetic students are recovered, and little data leave them uncertain."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.prior.knowledge import RATE, UNITS, load, names
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Temperature
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import tiny_config
from benchmarks.common.evidence import Evidence, _Model, evidence_of, evidence_of_run, updated

COST = 0.3


def student(rate, *, best=1e-4, weight=0.25, nll=None, group="g", teacher="t", alignment=None, **others):
    """A student whose loss in nats grows with the squared distance of its rate from the best, in half decades."""
    away = (math.log10(rate / best) / UNITS[RATE]) ** 2
    told = {"architecture": "llama", "width": 576, "batch": 256, "steps": 24, "cut": False} | others
    recipe = Distillation(learning_rate=rate, divergence_weight=weight, alignment=alignment)
    return Evidence(teacher=teacher, group=group, recipe=recipe, nll=3.0 + COST * away if nll is None else nll, **told)


def grid(best, **others):
    return [student(best * factor, best=best, **others) for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]


def rate_of(knowledge):
    return 10 ** knowledge.beliefs["rate"].mean


def test_the_best_rate_of_many_students_is_found():
    before = load()
    after = updated(before, grid(3e-5), own=True)
    assert rate_of(after) == pytest.approx(3e-5, rel=0.25)
    assert after.beliefs["rate"].sd < before.beliefs["rate"].sd
    assert math.exp(after.beliefs[f"cost {RATE}"].mean) == pytest.approx(COST, rel=0.4)


def test_nothing_is_learnt_of_no_students_of_one_student_or_of_other_losses():
    before = load()
    attended = replace(student(1e-4).recipe, attention=Attention())
    for evidence in (
        [],
        [student(1e-3)],
        [student(1e-3, group="a"), student(1e-5, group="b")],
        [replace(student(rate), recipe=replace(attended, learning_rate=rate)) for rate in (1e-3, 1e-5)],
        [student(1e-3, nll=math.inf), student(1e-5)],
    ):
        assert updated(before, evidence, own=True) == before


def test_two_students_teach_less_than_five():
    before = load()
    few = updated(before, [student(3e-5, best=3e-5), student(9e-5, best=3e-5)], own=True)
    many = updated(before, grid(3e-5), own=True)
    assert many.beliefs["rate"].sd < few.beliefs["rate"].sd
    assert rate_of(few) < rate_of(before)


def test_what_other_teachers_found_is_less_sure_of_a_new_one():
    before = load()
    own = updated(before, grid(3e-5), own=True)
    others = updated(before, grid(3e-5), own=False)
    assert own.between[RATE] == 0
    assert others.between == before.between
    assert math.hypot(others.beliefs["rate"].sd, others.between[RATE]) > own.beliefs["rate"].sd


def test_a_family_is_told_from_its_rates():
    before = load()
    evidence = grid(1e-5, architecture="gemma3_text", group="a")
    after = updated(before, evidence, own=False)
    told = after.beliefs["family gemma3_text"]
    assert told.mean < before.unseen.mean
    assert told.sd < before.unseen.sd
    assert after.family("gemma3_text") == told
    assert after.family("gpt_neox") == before.unseen


def test_a_choice_is_told_from_pairs_that_differ_in_it_alone():
    aligned = Alignment(layers="even", count=8, weight=10 ** load().beliefs["distillation.alignment.weight"].mean)
    pairs = [
        student(1e-4, nll=3.0 - won, alignment=alignment, group=f"pair {seed}", cut=True)
        for seed in range(8)
        for alignment, won in ((None, 0.0), (aligned, 0.1))
    ]
    name, before = "cut distillation.alignment=even-8", load()
    after = updated(before, pairs, own=True)
    assert -0.1 < after.beliefs[name].mean < before.beliefs[name].mean
    assert after.beliefs[name].sd < before.beliefs[name].sd
    whole = "whole distillation.alignment=even-8"
    assert after.beliefs[whole].mean == pytest.approx(before.beliefs[whole].mean, abs=1e-4)


def test_shifts_of_a_group_teach_nothing():
    apart = [replace(one, nll=one.nll + 5) for one in grid(3e-5, group="h")]
    together = updated(load(), [*grid(3e-5), *grid(3e-5, group="h")], own=True)
    shifted = updated(load(), [*grid(3e-5), *apart], own=True)
    assert rate_of(shifted) == pytest.approx(rate_of(together), rel=1e-3)


def row(trial, strategy, **fields):
    data = {
        "row_id": f"{trial}-gguf-f16",
        "trial": trial,
        "kind": "student",
        "name": trial,
        "deployment": {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0},
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "perplexity": 20.0,
        "train_tokens": 512,
        "seed": 0,
        "strategy": strategy.to_json(),
        "shape": tiny_config(),
    }
    return Row.from_json(data | fields)


def test_rows_of_trained_students_are_evidence():
    strategy = Strategy(init=Init(depth=0.5), distillation=Distillation(learning_rate=2e-4))
    rows = [
        row("t1", strategy),
        row("t1", strategy, row_id="t1-other", perplexity=21.0),
        row("t2", strategy, kind="initial"),
        row("t3", strategy, split="test"),
        row("t4", strategy, perplexity=None),
        row("t5", strategy, train_tokens=0),
        row("t6", replace(strategy, init=Init(depth=1.0)), perplexity=10.0),
    ]
    first, last = evidence_of(rows, batch=256, teacher="tiny", name="run")
    assert (first.nll, first.steps, first.width, first.architecture, first.cut) == (math.log(20), 2, 64, "llama", True)
    assert (last.cut, first.group == last.group) == (False, False)
    assert first.recipe == strategy.distillation


def test_a_run_tells_of_its_students_at_every_rung():
    folder = Path(__file__).parents[2] / "results" / "reference"
    found = evidence_of_run(RunFolder.open(folder, "budget-210MB"), "smollm2")
    assert {(one.steps, one.width, one.batch) for one in found} >= {(3, 576, 256), (8, 576, 256), (24, 576, 256)}
    # Each student appears once at each length, however it was deployed.
    assert len({(one.group, one.recipe) for one in found}) == len(found)
    after = updated(load(), found, own=True)
    assert all(belief.sd <= load().beliefs[name].sd + 0.2 for name, belief in after.beliefs.items())


def test_the_model_is_the_documented_sum():
    """Compare the loss at given beliefs with a plain computation for two groups."""
    shapes = [Temperature(), Temperature(shape="linear", start=4.0, end=1.0)]
    evidence = [
        replace(
            student(rate, group=group, cut=True),
            nll=nll,
            recipe=Distillation(learning_rate=rate, divergence_weight=weight, temperature=shape),
        )
        for rate, weight, shape, group, nll in (
            (1e-4, 0.2, shapes[0], "a", 3.0),
            (3e-4, 0.5, shapes[1], "a", 3.1),
            (1e-3, 0.9, shapes[1], "b", 4.0),
            (2e-4, 0.9, shapes[0], "b", 3.5),
        )
    ]
    order = [*names(), "family llama"]
    values = dict(zip(order, np.random.default_rng(0).normal(0, 0.5, len(order)), strict=True))

    def predicted(one):
        recipe = one.recipe
        found = (
            math.exp(values[f"cost {RATE}"])
            * ((math.log10(recipe.learning_rate) - values["rate"] - values["rate.cut"] - values["family llama"]) / 0.5)
            ** 2
        )
        path = "distillation.divergence_weight"
        found += math.exp(values[f"cost {path}"]) * ((recipe.divergence_weight - values[path]) / 0.25) ** 2
        if recipe.temperature.shape == "linear":
            found += values["cut distillation.temperature.shape=linear"]
            for end in ("start", "end"):
                path = f"distillation.temperature.{end}"
                told = math.log10(getattr(recipe.temperature, end))
                found += math.exp(values[f"cost {path}"]) * ((told - values[path]) / 0.3) ** 2
        return found

    expected = 0.0
    for group in ("a", "b"):
        mine = [one for one in evidence if one.group == group]
        best = min(one.nll for one in mine)
        weights = np.array([1 / (0.02**2 + (0.25 * (one.nll - best)) ** 2) for one in mine])
        rest = np.array([one.nll - predicted(one) for one in mine])
        rest -= (weights * rest).sum() / weights.sum()
        expected += (weights * rest**2).sum() / 2
    assert _Model(evidence, order).loss(np.array(list(values.values()))) == pytest.approx(expected)
