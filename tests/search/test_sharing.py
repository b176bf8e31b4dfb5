"""Trials of a search that share stages: their figures equal those of trials without sharing; and what sharing saves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.hardware.budget import Budget
from autodistill.runs.checkpoints import open_stages, stage_key
from autodistill.runs.events import read_events, rows_of
from autodistill.runs.phase_clock import Clock
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import saved
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.admission import admit, candidate_of
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.explain import explain
from autodistill.search.planning.placement import Place
from autodistill.search.prepare import plan_run, prepare_rows, prepare_trials
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.runners.inline import run_inline
from autodistill.testing import save_tiny_teacher, tiny_text

TIMES = ("time", "seconds", "train_seconds", "steps")
SPACE = """
dimensions:
  init.depth: {low: 0.5, high: 1.0, step: 0.25}
  distillation.learning_rate: {low: 1e-4, high: 1e-2, log: true}
  finishing:
    choices:
      none: null
      gguf-q8_0: {format: gguf-q8_0, bits: 8, group_size: 32}
      compressed-tensors: {format: compressed-tensors, scales: learned}
  finishing.bits: {choices: [8, 4], when: {finishing: [compressed-tensors]}}
  finishing.group_size: {choices: [32, 64], when: {finishing: [compressed-tensors]}}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
starts:
  plain: {init: {depth: 0.75}, distillation: {learning_rate: 1e-3}}
  on_a_grid:
    init: {depth: 0.75}
    distillation: {learning_rate: 1e-3}
    finishing: {format: gguf-q8_0, bits: 8, group_size: 32}
"""


@dataclass(frozen=True)
class Searched:
    """The results of a search without its final steps."""

    run: RunFolder
    events: list[dict[str, Any]]
    plan: Plan

    @property
    def rows(self) -> dict[str, object]:
        return {row.row_id: without_times(row.to_json()) for row in rows_of(read_events(self.events))}


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher", layers=4)
    tiny_text(folder / "text", documents=30, sentences=24)
    (folder / "space.yaml").write_text(SPACE)
    return folder


def asked(inputs: Path, out: Path, **changes: object) -> SearchConfig:
    """Return a search of four short trials in this process."""
    fields: dict[str, Any] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "space": str(inputs / "space.yaml"),
        "trials": 4,
        "tokens": 1536,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": inputs / "cache",
    }
    return check_request(SearchRequest(**(fields | changes)))


def searched(inputs: Path, out: Path, limit: int | None = None, **changes: object) -> Searched:
    """Run trials one after another in this process, as `search` does. Nothing is exported."""
    config = asked(inputs, out, **changes)
    clock = Clock(time.monotonic(), lambda phase: None)
    with RunFolder.create(out, "run") as run:
        planned = plan_run(config, Place.local(), run, clock, Observer())
        ready = prepare_trials(planned, prepare_rows(planned, run, clock), run, clock, Observer())
        campaign = Campaign(
            ready.question,
            sampler=Sampler(config.space, seed=config.seed),
            log=run.events,
            checkpoints=run.checkpoints,
            checkpoint_limit=limit,
        )
        run_inline(campaign, ready.setting, None)
        campaign.close()
    return Searched(run, run.events.read(), planned.plan)


@pytest.fixture(scope="module")
def shared(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return searched(inputs, tmp_path_factory.mktemp("shared"))


@pytest.mark.slow  # tests/search/worker/test_trial.py checks it for single trials
def test_trials_that_share_stages_have_the_figures_of_trials_that_train_all_themselves(
    inputs: Path, shared: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategies are the same, and two share a stage.

    One search resumes from checkpoints, and the other finds none.
    """
    monkeypatch.setattr("autodistill.runs.checkpoints.StageStore.find", lambda *arguments: None)
    alone = searched(inputs, tmp_path)
    assert shared.rows == alone.rows
    totals = [saved(read_events(one.events), one.plan) for one in (shared, alone)]
    assert totals[0].shared_tokens > 0
    assert totals[1].shared_tokens == 0
    # The difference is larger if a rung's decay is trained in addition to what goes on from its branch.
    assert totals[1].trained_tokens >= totals[0].trained_tokens + totals[0].shared_tokens


@pytest.mark.slow
def test_what_shares_a_stage_trains_its_decays_alone_and_that_is_counted(shared: Searched) -> None:
    strategies = {event["trial"]: event["strategy"] for event in shared.events if event["event"] == "trial"}
    rungs = [event for event in shared.events if event["event"] == "rung"]
    assert _stable(strategies["t001"]) == _stable(strategies["t000"])
    first = next(event for event in rungs if event["trial"] == "t001")
    plan = shared.plan
    assert first["shared"] == branch_point(plan.rungs[0], plan.decay, plan.batch_tokens) > 0
    assert first["trained"] == first["tokens"] - first["shared"]
    document = explain(shared.run)
    assert document.saved.shared_tokens == sum(event["shared"] for event in rungs)
    assert "went on from stages that others had trained" in document.describe()


def _stable(strategy: dict[str, Any]) -> str:
    return json.dumps([strategy["init"], strategy["distillation"]], sort_keys=True)


@pytest.mark.slow
def test_a_tiny_limit_changes_nothing_but_what_is_kept(inputs: Path, shared: Searched, tmp_path: Path) -> None:
    limited = searched(inputs, tmp_path, limit=1)
    assert limited.rows == shared.rows
    assert any(event["event"] == "collected" for event in limited.events)
    held = open_stages(limited.run.checkpoints).checkpoints()
    assert len({checkpoint.stage for checkpoint in held}) <= 3


def test_stages_are_those_of_the_machines_that_train_whichever_drives(inputs: Path, tmp_path: Path) -> None:
    """Even if a node without GPUs drives, a trial's checkpoints lie where a node with GPUs finds them."""
    config, clock = asked(inputs, tmp_path), Clock(time.monotonic(), lambda phase: None)
    with RunFolder.create(tmp_path, "run") as run:
        planned = plan_run(config, Place.local(), run, clock, Observer())
        workers = replace(planned.loaded.workers, device="cuda")
        elsewhere = replace(planned, loaded=replace(planned.loaded, device="cpu", workers=workers))
        question = prepare_trials(elsewhere, prepare_rows(elsewhere, run, clock), run, clock, Observer()).question
    strategy = config.space.baselines["logit_kd"]
    trial = admit(
        question,
        candidate_of(question, strategy),
        trial_id="b000",
        number=None,
        kind="baseline",
        name="logit_kd",
        point=None,
    )
    assert trial.task.stage == stage_key(strategy, 0, planned.plan, "cuda")
