"""Whether each strategy's own training fits the memory of a trial, and what happens to one that does not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.teacher_fit import TeacherFit
from autodistill.estimates.training_fit import training_fits
from autodistill.hardware.budget import Budget
from autodistill.hardware.machine import Gpu, Machine
from autodistill.models.config import spec_from_config
from autodistill.runs.events import read_events
from autodistill.runs.results.row import Status
from autodistill.runs.run_log import RunLog
from autodistill.runs.savings import saved
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.admission import admit, candidate_of, with_training
from autodistill.search.campaign.agenda import observation
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.planning.placement import Place, Share
from autodistill.search.planning.trial_memory import TrainingNeed, TrialMemory
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.search import search
from autodistill.search.setup import loading
from autodistill.search.setup.training_setup import memory_of_trials, planned_for
from autodistill.strategy.recipe import Alignment, Distillation, Lora
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher, small_plan, tiny_text
from autodistill.units import format_bytes
from tests.search.campaign.test_campaign import campaign, drive, question

# A model of about a billion weights.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TEACHER = spec_from_config(CONFIG)
TABLE, LAYER = 32000 * 2048, 4 * 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048
TEN = TABLE + 10 * LAYER + 2048  # weights of a student of ten layers
PLAN = small_plan()
HALF = Strategy(init=Init(depth=0.5))


def memory(limit: int, *, share: int | None = None, device: str = "cuda", **changes: Any) -> TrialMemory:
    made = TrialMemory(
        limit_bytes=limit,
        share_bytes=share or limit,
        device=device,
        threads=1,
        processes=1,
        bf16=False,
        teacher=TEACHER,
        held_bytes=4 * TEACHER.parameters,
    )
    return replace(made, **changes)


def need(strategy: Strategy, limit: int = 10**12, **changes: Any) -> TrainingNeed:
    return memory(limit, **changes).need(strategy, student_spec(strategy, TEACHER), PLAN)


def with_recipe(**fields: Any) -> Strategy:
    return replace(HALF, distillation=Distillation(**fields))


def test_what_a_strategy_takes_by_hand() -> None:
    # All weights; gradients and AdamW's states of all but the table. A pass keeps less than the gradients take.
    trained = TEN - TABLE
    plain = need(HALF).need_bytes
    assert plain == 4 * TEN + 12 * trained + TRAINING_PROCESS_BYTES
    assert need(with_recipe(train_embeddings=True)).need_bytes == plain + 12 * TABLE
    # Next to the student lies the teacher's head, or the whole teacher.
    assert need(with_recipe(signal="states", signal_tokens=0)).need_bytes == plain + 4 * TABLE
    assert need(with_recipe(signal="online", signal_tokens=0)).need_bytes == plain + 4 * TEACHER.parameters
    half = need(with_recipe(signal="online", signal_tokens=0), bf16=True).need_bytes - need(HALF, bf16=True).need_bytes
    assert half == 2 * TEACHER.parameters
    # Each of the ten layers has an MLP of twice the teacher's channels, with gradients and states.
    aligned = need(with_recipe(alignment=Alignment(layers="all", projection="mlp"))).need_bytes
    assert aligned > 10 * 16 * 2 * 2048 * (2048 + 2048)
    # Low-rank changes have gradients and states for only a few thousand weights, so the pass takes most of the memory.
    changes = need(with_recipe(lora=Lora(rank=8, alpha=16.0, layers="ffn"))).need_bytes
    assert 4 * TEN < changes - TRAINING_PROCESS_BYTES < 6 * TEN < plain


def test_it_fits_up_to_its_need_and_not_a_byte_below() -> None:
    least = need(HALF).need_bytes
    assert (need(HALF, least).slack, need(HALF, least).miss) == (0.0, None)
    short = need(HALF, least - 10**9)
    assert short.slack == pytest.approx(math.log(least / (least - 10**9)))
    miss = short.miss
    assert miss is not None
    assert (miss.limit, miss.slack) == ("training memory", short.slack)
    said = miss.text
    assert f"takes {format_bytes(least)} of memory" in said
    assert f"1.00 GB over the {format_bytes(least - 10**9)} that a trial has here" in said
    assert "low-rank changes (distillation.lora), or a larger --gpus-per-trial" in said
    assert "--sequence-length" not in said  # the pass takes less than the rest
    assert TrainingNeed.from_json(short.to_json()) == short
    # Next to other trials on a machine's cores, it may only take its share.
    assert need(HALF, 10**12, share=least - 1, device="cpu").miss is not None
    assert "--cpus-per-trial" in str(need(HALF, 10**12, share=least - 1, device="cpu").miss)
    assert "a machine with more memory" in str(need(HALF, least - 1, device="cpu").miss)


def test_where_the_plans_sequences_do_not_fit_at_once_fewer_do() -> None:
    plan = small_plan(batch_tokens=32 * 256, micro_batch=32, checkpointing=False)
    student = student_spec(HALF, TEACHER)
    many = memory(10**12).need(HALF, student, plan)
    assert many.micro_batch == 32
    # 32 sequences keep more than the gradients take. The least is one sequence plus gradients of the passes before it.
    for spare, device in ((1.10, "cuda"), (1.30, "cpu")):
        limit = int(1.4 * many.need_bytes)
        fewer = memory(limit, device=device).need(HALF, student, plan)
        assert fewer.miss is None
        assert 1 <= fewer.micro_batch < 32
        alone = replace(plan, micro_batch=fewer.micro_batch)
        assert memory(limit, device=device).need(HALF, student, alone).micro_batch == fewer.micro_batch
        twice = replace(plan, micro_batch=2 * fewer.micro_batch)
        # Twice as many sequences would not fit with the same margin.
        assert memory(limit, device=device).need(HALF, student, twice).micro_batch == fewer.micro_batch
        assert memory(int(spare * 10**13), device=device).need(HALF, student, plan).micro_batch == 32


def asked_with(limit: int, **changes: Any) -> Question:
    made = question()
    small = memory(limit, teacher=made.teacher_spec, held_bytes=0, device="cpu", **changes)
    return replace(made, memory=small)


def middle() -> int:
    """Return a limit between what the smallest and the largest student of the campaign's space take."""
    made = asked_with(10**12)
    needs = [
        with_training(made, candidate_of(made, Strategy(init=Init(depth=depth, ffn=1.0)))).training
        for depth in (0.6, 1.0)
    ]
    return sum(one.need_bytes for one in needs if one) // 2


def test_a_trial_that_has_fewer_at_once_shares_a_stage_with_those_of_as_many() -> None:
    asked = replace(question(), plan=small_plan(micro_batch=4, batch_tokens=1024))

    def stage(at_once: int | None, length: float = 1.0) -> tuple[str, int | None]:
        training = None if at_once is None else TrainingNeed(need_bytes=1, limit_bytes=2, micro_batch=at_once)
        trial = admit(
            asked,
            replace(candidate_of(asked, HALF), training=training),
            trial_id="t000",
            number=0,
            kind="student",
            name="",
            point=None,
            length=length,
        )
        return trial.task.stage, trial.task.micro_batch

    assert stage(4) == stage(None)
    assert stage(4)[1] is None
    assert stage(2)[1] == 2
    assert stage(2) == stage(2, 3.0)
    assert len({stage(2)[0], stage(1)[0], stage(4)[0]}) == 3


def untrained(trial: TrialState) -> bool:
    return trial.status is Status.REJECTED and "training it takes" in str(trial.reason)


def test_one_whose_training_does_not_fit_is_rejected_and_the_sampler_told(tmp_path: Path) -> None:
    asked = asked_with(middle())
    made = campaign(tmp_path, asked)
    done = drive(made)
    rejected = [trial for trial in made.trials.values() if untrained(trial)]
    assert rejected
    assert not {trial.task.id for trial in rejected} & {trial for trial, _ in done}
    assert sum(trial.number is not None and trial.status is not Status.REJECTED for trial in made.trials.values()) == 9
    for trial in made.trials.values():
        found = with_training(asked, candidate_of(asked, trial.task.strategy)).training
        assert found is not None
        assert (found.slack > 0) == untrained(trial)
        if trial.point is not None:
            deployed = min(fit.slack for fit in trial.candidate.fits)
            assert deployed < 0
            told = observation(trial, asked)
            assert told.constraint == max(deployed, math.log(found.need_bytes / middle()))
            assert (told.constraint > 0) == (told.state is Status.REJECTED)
    total = saved(RunLog(tmp_path / "trials.jsonl").all(), asked.plan)
    assert total.rejected == len(rejected)
    assert total.rejected_tokens == len(rejected) * asked.plan.rungs[0]


def strategies(folder: Path) -> list[tuple[str, str]]:
    events = RunLog(folder / "trials.jsonl").read()
    return [(event["trial"], event["strategy_id"]) for event in events if event["event"] == "trial"]


@pytest.mark.parametrize("kept", [2, 5, 17])
def test_what_was_admitted_or_rejected_stays_so_on_a_machine_of_other_memory(tmp_path: Path, kept: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    drive(campaign(whole, asked_with(middle())))
    events = RunLog(whole / "trials.jsonl").read()
    # One cut falls right after a rejected trial, before the log has its rejection.
    first = next(place for place, event in enumerate(events) if event.get("status") == "rejected")
    for count in (kept, first):
        for limit in (1, 10**12):
            folder = cut / f"{count}-{limit}"
            folder.mkdir(parents=True)
            for event in events[:count]:
                RunLog(folder / "trials.jsonl").append(event)
            again = campaign(folder, asked_with(limit))
            again.replay(RunLog(folder / "trials.jsonl").all())
            before = {event["trial"]: event["training"] for event in events[:count] if event["event"] == "trial"}
            for name, recorded in before.items():
                trial = again.trials[name]
                assert untrained(trial) == (recorded["need_bytes"] > recorded["limit_bytes"])
    # On the same machine, a search that was cut off makes the same proposals.
    same = campaign(cut, asked_with(middle()))
    for event in events[:kept]:
        RunLog(cut / "trials.jsonl").append(event)
    same.replay(RunLog(cut / "trials.jsonl").all())
    drive(same)
    assert strategies(cut) == strategies(whole)


def test_trials_of_an_earlier_version_are_not_asked(tmp_path: Path) -> None:
    drive(campaign(tmp_path, question()))
    events = RunLog(tmp_path / "trials.jsonl").read()
    assert all(event["training"] is None for event in events if event["event"] == "trial")
    for event in events:
        event.pop("training", None)
    again = Campaign(
        asked_with(1),
        sampler=Sampler(question().space, seed=0),
        log=RunLog(tmp_path / "again.jsonl"),
        checkpoints=tmp_path / "checkpoints",
    )
    again.replay(read_events(events))
    assert not any(trial.status is Status.REJECTED for trial in again.trials.values())


def test_what_was_trained_is_not_asked_again_for_further_seeds(tmp_path: Path) -> None:
    asked = replace(question(), confirm=1)
    drive(campaign(tmp_path, asked))
    events = RunLog(tmp_path / "trials.jsonl").read()
    begun = next(place for place, event in enumerate(events) if event["event"] == "trial" and "s" in event["trial"])
    cut = tmp_path / "cut"
    cut.mkdir()
    for event in events[:begun]:
        RunLog(cut / "trials.jsonl").append(event)
    again = campaign(cut, replace(asked_with(1), confirm=1))
    again.replay(RunLog(cut / "trials.jsonl").all())
    drive(again)
    assert strategies(cut) == strategies(tmp_path)
    assert not any(trial.status is Status.REJECTED for trial in again.trials.values())


WIDE = """
name: wide
dimensions:
  init.depth: {low: 0.05, high: 1.0, step: 0.05}
  distillation.learning_rate: {low: 1e-4, high: 1e-3, log: true}
  distillation.train_embeddings: {choices: [true]}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    """Return a request in a space of depths; its tests use a teacher of a billion weights."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "space.yaml").write_text(WIDE)
    asked = SearchRequest(
        budget=Budget(memory_bytes=10**12, context=256),
        teacher=str(save_tiny_teacher(folder / "teacher", layers=20)),
        data=str(tiny_text(folder / "text")),
        space=str(folder / "space.yaml"),
        runs=folder / "runs",
        cache=folder / "cache",
        runner="inline",
    )
    return replace(check_request(asked), spec=TEACHER)


def on_gpus(*memories: float, share: float = 1.0) -> TrialMemory:
    """Return a trial's memory on nodes that have one GPU each, with these memories."""
    machines = tuple(
        Machine(cpus=8, memory_bytes=10**12, gpus=(Gpu(name="", memory_bytes=int(size)),)) for size in memories
    )
    place = Place(here=machines[0], machines=machines, share=Share(gpus=share))
    held = TeacherFit(
        held_type="float32",
        stored="bfloat16",
        weights_bytes=8 * TEACHER.parameters,
        pass_bytes=0,
        held_bytes=4 * TEACHER.parameters,
        limit_bytes=10**12,
    )
    return memory_of_trials(place, TEACHER, held)


def test_a_plan_is_for_what_takes_most_of_what_can_be_trained(
    wide: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no 8-bit optimiser states
    strategies = {depth / 20: Strategy(init=Init(depth=depth / 20)) for depth in range(1, 21)}
    strategies = {
        depth: replace(strategy, distillation=Distillation(train_embeddings=True))
        for depth, strategy in strategies.items()
    }
    for limit in (6e9, 8e9, 12e9):
        # The trial may run on either GPU. Its process and the search also keep contexts there, of 600 MB each.
        trial = on_gpus(80e9, limit + 1.2e9)
        (strategy, student), most, step, note = planned_for(wide, trial, 256)
        # Float32 weights, two 16-bit states and gradients. The table's gradients take no more than the logits' pass.
        fitting = [
            depth
            for depth, one in strategies.items()
            if 12 * student_spec(one, TEACHER).parameters + TRAINING_PROCESS_BYTES <= limit
        ]
        assert strategy.init.depth == max(fitting)
        assert student == student_spec(strategy, TEACHER)
        assert most == student.parameters
        assert step(256).total_bytes <= limit
        assert "what cannot be trained here is rejected" in note
        assert format_bytes(limit) in note
    (strategy, _), most, _, note = planned_for(wide, on_gpus(80e9), 256)
    assert (strategy.init.depth, most, note) == (1.0, TEACHER.parameters, "")


def test_the_most_weights_may_be_of_another_than_what_takes_most_memory(wide: SearchConfig) -> None:
    """Low-rank changes need little memory for gradients and states."""
    changes = {"none": None, "changes": {"rank": 8, "alpha": 16.0, "layers": "ffn"}}
    space = wide.space.to_json()
    space["dimensions"]["distillation.lora"] = {"choices": changes}
    made = replace(wide, space=Space.from_json(space))
    (strategy, student), most, _, _ = planned_for(made, on_gpus(9e9), 256)
    assert strategy.distillation.lora is None
    assert student.parameters < most == TEACHER.parameters


def test_a_search_is_refused_where_nothing_of_its_space_can_be_trained(wide: SearchConfig) -> None:
    with pytest.raises(
        InputError, match=r"nothing of the space wide can be trained here, not even the student that takes least"
    ):
        planned_for(wide, on_gpus(1e9), 256)
    assert planned_for(wide, on_gpus(24e9, share=0.5), 256)[3]
    assert on_gpus(24e9, share=0.5).limit_bytes < 12e9


@pytest.mark.slow
def test_a_search_of_which_the_largest_cannot_be_trained_goes_on_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on this machine's CPU, and a trial gets less memory than the largest student takes."""

    (tmp_path / "space.yaml").write_text(WIDE.replace("0.05, high", "0.2, high").replace("step: 0.05", "step: 0.2"))
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=5)
    asked = SearchRequest(
        budget=Budget(memory_bytes=10**12, context=256),
        teacher=str(teacher),
        data=str(tiny_text(tmp_path / "text", documents=30, sentences=24)),
        space=str(tmp_path / "space.yaml"),
        trials=3,
        tokens=4608,
        step_tokens=512,
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
        runner="inline",
    )
    spec = check_request(asked).spec

    def small(*given: Any) -> TrialMemory:
        found = memory_of_trials(*given)
        strategy = Strategy(init=Init(depth=0.6), distillation=Distillation(train_embeddings=True))
        ways = training_fits(found.training(strategy, student_spec(strategy, spec), 256, 2))
        return replace(found, limit_bytes=min(way.total_bytes for way in ways))

    monkeypatch.setattr(loading, "memory_of_trials", small)
    monkeypatch.setattr(loading, "process_bytes", lambda machines, limit, *_: limit)
    outcome = search(asked)
    assert any("what cannot be trained here is rejected" in note for note in outcome.document["plan"]["notes"])
    trained = {row.params for row in outcome.rows if row.kind == "student"}
    assert trained
    assert max(trained) <= student_spec(Strategy(init=Init(depth=0.6)), spec).parameters
    assert all("training it takes" in one["reason"] for one in outcome.document["rejected"])
