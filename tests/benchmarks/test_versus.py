"""The basis of the comparison with simpler methods: blocks, targets, orders, texts, and teachers made for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau

from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from autodistill.testing import save_tiny_teacher, tiny_config
from benchmarks.common import debian_texts
from benchmarks.search import off_grid_teacher, small_teacher, solve_controls, zero_shot
from benchmarks.search.versus import arms, targets, unstopped
from benchmarks.search.versus.blocks import blocks, read_blocks
from benchmarks.search.versus.chart import curve

COUNTS = [100] * 40


def row(nll, kl=0.1, bits=4.0, fits=True, accuracy=0.3, seed=0):
    """A synthetic row whose documents scatter around its figures."""
    noise = np.random.default_rng(seed).normal(scale=0.01, size=len(COUNTS))

    def sums(mean):
        return [100 * (mean + one) for one in noise]

    read = {"count": COUNTS, "nll": sums(nll), "correct": sums(accuracy), "kl": sums(kl)}
    text = {"nll": (nll, 0.01), "accuracy": (accuracy, 0.01), "kl": (kl, 0.01), "documents": read}
    return {"test": text, "general": text, "fits": fits, "bits": bits, "bytes": 10}


def core_of(asked):
    """The blocks of the product, without those that are further."""
    return [one for one in blocks(asked) if one.arms == (*asked["arms"], *asked["beside"])]


def test_the_file_s_blocks_are_a_product_and_what_is_beside_it():
    asked = read_blocks()
    found = list(blocks(asked))
    core = core_of(asked)
    assert len(core) == len({one.name for one in core}) == 2 * 2 * 2 * 2
    packaged = [f"smollm2-postgresql-{size}MB-{seed}" for seed in (0, 1) for size in (125, 150, 175, 210)]
    assert [one.name for one in found if one.budget > 1] == packaged
    assert set(asked["arms"]) == {*asked["rivals"], targets.MINE, targets.QUICK}
    assert {*asked["arms"], *asked["beside"]} == set(core[0].arms)
    assert {arm for one in found for arm in one.arms} == set(arms.ARMS)
    (shared,) = (one["arms"] for one in asked["targets"] if one["id"] == "shares-the-library")
    assert [one.arms for one in found if shared[0] in one.arms] == [(targets.MINE, *shared)] * 2
    core_hours = sum(one.box * arms.share_of(arm) for one in core for arm in asked["arms"]) * 2 / 3600
    assert core_hours < 30
    assert all("measure" in one or "where" in one for one in asked["targets"])


def test_a_row_is_of_its_block_and_not_of_the_other_arms():
    first = next(blocks(read_blocks()))
    assert first.key("search") == replace(first, arms=("search",)).key("search")
    changed = [replace(first, seed=5), replace(first, box=3.0), replace(first, context=64), replace(first, budget=0.5)]
    assert len({one.key("search") for one in (first, *changed)}) == 5
    assert next(blocks(read_blocks(), 3.0)) == replace(first, box=3.0)


def test_targets_are_met_failed_or_not_run():
    asked = read_blocks()
    core = core_of(asked)
    rivals = asked["rivals"]
    none = targets.verdicts(asked["targets"], {}, rivals)
    assert {one.state for one in none.values()} == {targets.NOT_RUN}

    def rows(mine, quick, kl, points):
        found = {}
        for seed, block in enumerate(core):
            others = {arm: row(3.0 + 0.1 * place, kl=0.2) for place, arm in enumerate(rivals)}
            own = row(mine, kl=kl, accuracy=0.3 + points / 100, seed=0)
            found[block] = {**others, targets.MINE: own, targets.QUICK: row(quick + 1e-4 * seed)}
        return targets.verdicts(asked["targets"], found, rivals)

    good = rows(mine=2.9, quick=2.95, kl=0.1, points=2.0)
    for name in ("ahead-everywhere", "gain", "less-compute", "guard", "kl-at-4.6-bits"):
        assert good[name].state == targets.MET, name
    assert "+2.00" in good["gain"].said
    bad = rows(mine=3.1, quick=3.2, kl=0.3, points=-1.0)
    for name in ("ahead-everywhere", "gain", "less-compute", "guard", "kl-at-4.6-bits"):
        assert bad[name].state == targets.FAILED, name
    assert good["packaged"].state == good["arithmetic"].state == targets.NOT_RUN


def test_the_target_of_the_packaged_teacher_waits_for_each_of_its_budgets():
    asked = read_blocks()
    packaged = {one.name.split("-", 2)[2]: one for one in blocks(asked) if one.budget > 1}

    def state(**points):
        found = {
            packaged[f"{size}-0"]: {targets.MINE: row(2.0, accuracy=0.3 + gain / 100), "untrained": row(3.0)}
            for size, gain in points.items()
        }
        return targets.verdicts(asked["targets"], found, asked["rivals"])["packaged"].state

    assert state(**{"150MB": 5.0, "210MB": 5.0}) == targets.NOT_RUN
    assert state(**{"175MB": 5.0, "210MB": 5.0}) == targets.MET
    assert state(**{"150MB": 0.0, "175MB": 5.0, "210MB": 5.0}) == targets.MET
    assert state(**{"175MB": 1.0, "210MB": 5.0}) == targets.FAILED


def test_arms_that_share_the_library_may_be_ahead_by_one_error():
    asked = read_blocks()
    block = next(one for one in blocks(asked) if "one-construction" in one.arms)

    def state(**nats):
        found = {targets.MINE: row(3.0)} | {arm.replace("_", "-"): row(nll) for arm, nll in nats.items()}
        return targets.verdicts(asked["targets"], {block: found}, asked["rivals"])["shares-the-library"]

    assert state().state == targets.NOT_RUN
    assert state(one_construction=3.5, all_trials=3.1).state == targets.MET
    assert state(one_construction=3.5, all_trials=2.9).state == targets.FAILED
    assert f"{block.name} all-trials +0.1000" in state(all_trials=2.9).said


def test_half_of_a_gap_is_closed_or_not():
    asked = read_blocks()
    block = next(one for one in blocks(asked) if "few-bits" in one.arms)

    def verdict(between):
        found = {"three-bits": row(3.0), "few-bits": row(between), "four-bits": row(2.8)}
        return targets.verdicts(asked["targets"], {block: found}, asked["rivals"])["three-bits"]

    assert verdict(2.89).state == targets.MET
    assert verdict(2.91).state == targets.FAILED
    assert "+0.0900 ± 0.0000 of +0.2000 ± 0.0000 nats" in verdict(2.91).said
    missing = targets.verdicts(asked["targets"], {block: {"few-bits": row(2.0)}}, asked["rivals"])["three-bits"]
    assert missing.state == targets.NOT_RUN


def test_a_race_without_stops_has_one_rung():
    assert unstopped.one_rung(2048, 256) == (2048,)
    assert kept_at_rungs(8, 1) == ()


def test_the_picture_has_a_point_for_each_row_that_fits():
    pytest.importorskip("altair")
    packaged = [one for one in blocks(read_blocks()) if one.budget > 1 and one.seed == 0]
    rows = {block: {targets.MINE: row(3 - 0.1 * place)} for place, block in enumerate(packaged)}
    rows[packaged[0]] |= {"recipe": row(4.0), "minitron": row(2.0, fits=False), "finetune": {"nothing_fits": "no"}}
    drawn = curve(rows).to_dict()
    assert {layer["encoding"]["color"]["legend"]["labelLimit"] for layer in drawn["layer"]} == {0}  # no name is cut off
    found = [(one["budget"], one["nll"]) for one in drawn["data"]["values"]]
    assert sorted(found) == [(125.0, 3.0), (125.0, 4.0), (150.0, 2.9), (175.0, 2.8), (210.0, 2.7)]
    assert curve({packaged[0]: rows[packaged[0]]}) is None


def test_one_rival_that_is_ahead_decides_though_others_were_not_run():
    asked = read_blocks()
    block = next(one for one in blocks(asked) if one.budget > 1)
    said = targets.verdicts(
        asked["targets"], {block: {targets.MINE: row(3.0), "no-teacher": row(2.9)}}, asked["rivals"]
    )
    assert said["ahead-everywhere"].state == targets.FAILED
    assert f"{block.name} by 0.1000" in said["ahead-everywhere"].said
    said = targets.verdicts(
        asked["targets"], {block: {targets.MINE: row(2.8), "no-teacher": row(2.9)}}, asked["rivals"]
    )
    assert said["ahead-everywhere"].state == targets.NOT_RUN


def test_an_arm_that_nothing_fits_or_that_does_not_fit_is_no_rival():
    found = {"finetune": {"nothing_fits": "too large"}, "recipe": row(2.0, fits=False), "minitron": row(3.0)}
    assert targets.best_rival(found, [*found]) == "minitron"
    assert targets.best_rival({}, [*found]) is None


def test_a_gap_is_that_of_the_sums_of_documents():
    value, error = targets.gap(row(2.0, seed=1), row(2.5, seed=2), "nll")
    first, second = (np.array(row(nll, seed=seed)["test"]["documents"]["nll"]) for nll, seed in ((2.0, 1), (2.5, 2)))
    assert value == pytest.approx((first - second).sum() / 4000)
    assert error == pytest.approx(np.std((first - second) / 100) / np.sqrt(40), rel=0.2)


def test_budgets_are_shares_of_weights_and_cache():
    spec = spec_from_config(tiny_config("llama", hidden_size=256, intermediate_size=512, head_dim=64))
    whole, part = (arms.budget_of(spec, share, 256).memory_bytes for share in (1.0, 0.5))
    constant = 2 * part - whole
    other = arms.budget_of(spec, 0.25, 256).memory_bytes
    assert other == pytest.approx(constant + 0.25 * (whole - constant), abs=2)
    assert arms.budget_of(spec, 2e8, 256).memory_bytes == 200_000_000
    assert solve_controls.budget_of(spec, 0.5).context == solve_controls.CONTEXT


def test_tau_is_scipy_s_where_nothing_ties():
    dice = np.random.default_rng(0)
    kl, noise = dice.uniform(0, 3, 12), dice.normal(size=12)
    found = [
        {"kl": one, "nll": one + other, "family": "ab"[place % 2], "bytes": place, "accuracy": -one, "name": str(place)}
        for place, (one, other) in enumerate(zip(kl, noise, strict=True))
    ]
    orders = zero_shot.orders(found)
    assert orders["all pairs"][0] == pytest.approx(kendalltau(kl, kl + noise).statistic)
    assert orders["within a family"][1] + orders["between families"][1] == orders["all pairs"][1] == 66
    assert orders["between families, within 0.3 nats"][1] <= orders["within 0.3 nats of KL"][1]
    one = zero_shot.regret(found, 5)
    assert one is not None
    assert one["fitting"] == 6
    assert one["chosen"] == str(int(np.argmin(kl[:6])))
    assert one["nats"] == pytest.approx((kl + noise)[:6][np.argmin(kl[:6])] - (kl + noise)[:6].min())
    assert zero_shot.regret(found, 0) is None


def test_markup_is_no_text():
    page = "<head><title>x</title></head><p>One &amp; two</p><script>if (a < b) {}</script>\n\n\n<pre>  kept</pre>"
    assert debian_texts._plain(page, "html") == "One & two\n\n  kept"
    assert debian_texts._plain("a  \n\n\n\nb\n", "rst") == "a\n\nb"


def test_a_teacher_that_is_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(small_teacher, "SEQUENCE", 64)
    monkeypatch.setattr(small_teacher, "TEST_TOKENS", 512)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    weights = []
    for name, parts in (("once", (8,)), ("twice", (3, 8))):
        monkeypatch.setattr(small_teacher, "cache_folder", lambda name=name: tmp_path / name)
        for steps in parts:
            teacher = small_teacher._tiny(6 * 64)
            teacher.train(steps * 64)
        assert teacher.newest is not None
        weights.append(load_file(teacher.newest / "model.safetensors"))
    for first, second in pairwise(weights):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(load_model(teacher.newest, torch.float32).model.layers) == 1


def test_weights_that_were_rounded_are_on_the_grid_and_others_are_not(tmp_path):
    folder = save_tiny_teacher(tmp_path / "teacher", layers=1)
    model = load_model(folder, torch.float32)
    spec = spec_from_config(model.config.to_dict())
    assert off_grid_teacher.off_grid(off_grid_teacher.errors(model, spec))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Each group of 32 has 16 evenly spaced values, including both ends, so both grids can represent them.
                steps = torch.arange(parameter.numel()) % 16
                parameter.copy_((steps.reshape(parameter.shape) - 8) * 0.125)
    found = off_grid_teacher.errors(model, spec)
    assert found[off_grid_teacher.MATRICES][0] == pytest.approx(0, abs=1e-6)
    assert not off_grid_teacher.off_grid(found)
