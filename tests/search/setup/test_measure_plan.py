"""The optimiser step of a plan: one sequence on a CPU; on an accelerator, the measured or requested number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from autodistill.distillation.teacher.output_cache import CacheSettings
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.hardware.budget import Budget
from autodistill.hardware.machine import Gpu, Machine
from autodistill.runs.phase_clock import Clock
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Place, Share
from autodistill.search.planning.plan import ENOUGH_STEPS
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.setup.answering import OutputsPace
from autodistill.search.setup.loading import Loaded, load
from autodistill.search.setup.measure_plan import _sizes, plan_from_measurement
from autodistill.search.setup.teacher_phase import cache_phase
from autodistill.testing import save_tiny_teacher, tiny_text

LENGTH = 16
SPEED = Speed(cache=1e5, score=1e5, worker_train=1e3, worker_score=1e5)
GPU = Machine(cpus=2, memory_bytes=10**11, gpus=(Gpu(name="made up", memory_bytes=10**11),))
# Steps of four sequences are worth it, steps of eight are not.
RATES = {1: 1e3, 2: 1.9e3, 4: 3e3, 8: 3.2e3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher", layers=5)
    tiny_text(folder / "text", documents=60, sentences=80)
    return folder


def _checked(inputs: Path, **fields: object) -> SearchConfig:
    known: dict[str, Any] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=64),
        "space": "declared",
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "cache": inputs / "cache",
        "sequence_length": LENGTH,
    }
    return check_request(SearchRequest(**(known | fields)))


@pytest.fixture
def planned(inputs: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that plans on a machine at made-up rates, and returns the sizes to be timed too."""

    def plan(
        machine: Machine = GPU,
        rates: dict[int, float] = RATES,
        here: Machine | None = None,
        share: Share | None = None,
        fails: Any = None,
        **more: object,
    ):  # type: ignore[no-untyped-def]
        fields: dict[str, object] = {"trials": 2, "tokens": 4 * LENGTH * ENOUGH_STEPS} | more
        config = _checked(inputs, **fields)
        loaded = load(config, Place(here=here or machine, machines=(machine,), share=share or Share()))
        timed: list[int] = []

        def measure(*given: Any, sizes: tuple[int, ...], **options: object) -> tuple[Speed, dict[int, float]]:
            assert given[3].bf16 <= loaded.bf16, "nothing is emulated"
            timed.extend(sizes)
            return SPEED, {size: rate for size, rate in rates.items() if size in sizes}

        monkeypatch.setattr("autodistill.search.setup.measure_plan.measure_speed", measure)
        none = OutputsPace(cache=None, answering=0.0)
        monkeypatch.setattr("autodistill.search.setup.measure_plan.time_outputs", lambda *given: none)
        monkeypatch.setattr(Loaded, "load_teacher", lambda self, device="cpu": None)
        if fails is not None:
            name, error = fails
            monkeypatch.setattr(f"autodistill.search.setup.measure_plan.{name}", mock.Mock(side_effect=error))
        return *plan_from_measurement(config, loaded, 0.0), timed

    return plan


def test_on_a_cpu_a_step_has_one_sequence(planned) -> None:  # type: ignore[no-untyped-def]
    plan, speed, timed = planned(replace(GPU, gpus=()))
    assert (plan.batch_tokens, plan.micro_batch, timed, speed) == (LENGTH, 1, [1], SPEED)
    assert not any("optimiser step has" in note for note in plan.notes)


def test_what_moving_weights_takes_is_in_the_plan(  # type: ignore[no-untyped-def]
    planned, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def moving(state: str, device: str, threads: int) -> float:
        asked.append((state, device))
        return 1e-6

    machine = replace(GPU, gpus=())
    before, _, _ = planned(machine)
    monkeypatch.setattr("autodistill.search.setup.measure_plan.moving_seconds", moving)
    plan, speed, _ = planned(machine)
    assert asked == [(plan.optimizer_state, "cpu")]
    largest = load(_checked(inputs), Place(here=machine, machines=(machine,), share=Share())).largest[1]
    weights = largest.parameters - largest.vocabulary * largest.width  # the table is frozen
    assert speed.worker_train == pytest.approx(LENGTH / (LENGTH / SPEED.worker_train + 1e-6 * weights), rel=1e-9)
    assert plan.seconds["trials"] > before.seconds["trials"]


def test_on_an_accelerator_a_step_has_as_many_as_are_worth_it(planned) -> None:  # type: ignore[no-untyped-def]
    plan, speed, timed = planned(tokens=100 * LENGTH * ENOUGH_STEPS)
    assert timed == [1, 2, 4, 8, 16, 32, 64]
    assert (plan.batch_tokens, plan.micro_batch, speed.worker_train) == (4 * LENGTH, 4, 3e3)
    (note,) = (note for note in plan.notes if "optimiser step has" in note)
    assert note.startswith(
        "an optimiser step has 4 sequences for each process of a trial: training ran at 1,000 tokens"
    )
    two = replace(GPU, gpus=2 * GPU.gpus)
    processes, _, _ = planned(two, tokens=200 * LENGTH * ENOUGH_STEPS, share=Share(processes=2))
    assert (processes.batch_tokens, processes.micro_batch) == (8 * LENGTH, 4)


def test_what_a_teacher_beside_takes_is_in_the_plan_whatever_the_size_of_a_step(  # type: ignore[no-untyped-def]
    planned, tmp_path: Path
) -> None:
    space = tmp_path / "beside.yaml"
    space.write_text(
        "dimensions:\n"
        "  init.depth: {choices: [0.6, 1.0]}\n"
        "  distillation.signal: {choices: [online]}\n"
        "  distillation.signal_tokens: {choices: [0]}\n"
        "  distillation.divergence_weight: {choices: [0.0, 0.5]}\n"
        "deployments:\n"
        "  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}\n"
    )
    for machine in (GPU, replace(GPU, gpus=())):
        plan, speed, _ = planned(machine, tokens=100 * LENGTH * ENOUGH_STEPS, space=str(space))
        rate = RATES[plan.batch_tokens // LENGTH]
        assert speed.worker_train == pytest.approx(1 / (1 / rate + 1 / SPEED.worker_score))
        assert speed.by_labels().worker_train == rate
        assert plan.batch_tokens == (4 if machine is GPU else 1) * LENGTH


def test_a_plan_that_another_kind_of_device_is_measured_for_says_so(planned) -> None:  # type: ignore[no-untyped-def]
    fast, slow = replace(GPU, bf16=True), replace(GPU, gpus=())
    for machine, here, said in (
        (fast, slow, "trials train on the GPUs of other machines, but were planned at the speed of this one's CPU"),
        (slow, fast, "trials train on the CPUs of other machines, but were planned at the speed of this one's GPU"),
        (fast, fast, None),
        (slow, slow, None),
    ):
        plan, _, timed = planned(machine, here=here)
        notes = [note for note in plan.notes if "of other machines" in note]
        assert notes == [] if said is None else notes[0].startswith(said)
        assert plan.bf16 is machine.bf16
        assert timed == [1] or said is None


@pytest.mark.parametrize(("trials", "here"), [(True, True), (True, False), (False, True)])
def test_the_teachers_outputs_are_made_in_bfloat16_where_that_is_not_emulated(
    planned: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch, trials: bool, here: bool
) -> None:
    class Made(Exception):
        pass

    def make(*given: object, settings: CacheSettings, **options: object) -> None:
        assert settings.bf16 is (trials and here)
        raise Made

    machine = replace(GPU, bf16=trials)
    plan, _, _ = planned(machine)
    config = _checked(inputs, trials=2)
    loaded = load(config, Place(here=replace(GPU, bf16=here), machines=(machine,), share=Share()))
    monkeypatch.setattr("autodistill.search.setup.teacher_phase.calibration_file", lambda *given: None)
    monkeypatch.setattr("autodistill.search.setup.teacher_phase.ensure_cache", make)
    with pytest.raises(Made):
        cache_phase(config, loaded, plan, mock.Mock(), Clock(0.0, lambda name: None), mock.Mock())


def test_few_tokens_have_small_steps(planned) -> None:  # type: ignore[no-untyped-def]
    plan, speed, timed = planned(tokens=3 * LENGTH * ENOUGH_STEPS)
    assert (plan.batch_tokens, speed.worker_train, timed) == (2 * LENGTH, 1.9e3, [1, 2])
    plan, speed, timed = planned(tokens=LENGTH * ENOUGH_STEPS)
    assert (plan.batch_tokens, speed.worker_train, timed) == (LENGTH, 1e3, [1])


def test_a_short_box_has_small_steps(planned) -> None:  # type: ignore[no-untyped-def]
    boxes = (45.0, 300.0)
    plans = [planned(trials=None, tokens=None, time=box, runner="inline")[0] for box in boxes]
    assert plans[0].batch_tokens < plans[1].batch_tokens == 4 * LENGTH
    for plan in plans:
        assert plan.batch_tokens == LENGTH or plan.tokens // plan.batch_tokens >= ENOUGH_STEPS


def test_what_is_asked_for_is_kept_and_planned_at_its_own_rate(planned) -> None:  # type: ignore[no-untyped-def]
    plan, speed, timed = planned(step_tokens=8 * LENGTH)
    assert (plan.batch_tokens, plan.micro_batch, speed.worker_train, timed) == (8 * LENGTH, 8, 3.2e3, [1, 2, 4, 8])
    # Memory does not hold them in one pass, so only the rate of what it held is known.
    plan, speed, _ = planned(rates={1: 1e3}, step_tokens=8 * LENGTH)
    assert (plan.batch_tokens, speed.worker_train) == (8 * LENGTH, 1e3)
    one = planned(step_tokens=LENGTH)
    assert (one[0].batch_tokens, one[2]) == (LENGTH, [1])


def test_no_more_sequences_are_timed_than_memory_is_predicted_to_hold(planned, inputs: Path) -> None:  # type: ignore[no-untyped-def]
    config = _checked(inputs, trials=1, tokens=10**6)
    place = Place(here=GPU, machines=(GPU,), share=Share())
    loaded = load(config, place)
    for held, sizes in ((3, (1, 2)), (4, (1, 2, 4))):
        need = loaded.fit_step(held * LENGTH).safe_bytes("cuda")
        # The contexts of the trial's process and of the search take 600 MB each as well.
        small = replace(GPU, gpus=(replace(GPU.gpus[0], memory_bytes=need + 1200 * 10**6),))
        assert _sizes(config, load(config, replace(place, machines=(small,))), 10**6) == sizes


def test_a_trial_reads_no_more_tokens_than_the_cache_may_hold(planned, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("autodistill.search.setup.teacher_phase.calibration_file", lambda *given: None)
    fast = {size: 1e3 * rate for size, rate in RATES.items()}
    free, _, _ = planned(trials=1, tokens=None, time=600.0, runner="inline", rates=fast)
    limit = 60 * 1000  # the outputs for 16 tokens take more than 1,000 bytes in all
    held, _, timed = planned(trials=1, tokens=None, time=600.0, runner="inline", rates=fast, cache_limit=limit)
    assert held.tokens < free.tokens
    assert timed == [1]
    assert any("--cache-limit" in note for note in held.notes)
    assert not any("--cache-limit" in note for note in free.notes)


def test_what_outputs_take_is_in_the_speed() -> None:
    """100,000 tokens are scored in a second. Each waits ten times as long for its answers: a rate of 1 / (1 + 10)."""
    speed = OutputsPace(cache=5e3, answering=1e-4).into(SPEED)
    assert speed == replace(SPEED, cache=5e3, score=pytest.approx(1e5 / 11), worker_score=pytest.approx(1e5 / 11))
    assert OutputsPace(cache=None, answering=0.0).into(SPEED).cache == SPEED.cache


def test_the_teacher_that_was_timed_is_asked_too(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = inputs / "tasks.yaml"
    lines = [f'{{"q": "The miller {one}", "choices": ["carries", "paints"], "gold": 1}}\n' for one in range(20)]
    (inputs / "q.jsonl").write_text("".join(lines))
    questions.write_text(
        "tasks: [{name: miller, files: q.jsonl, metric: multiple_choice, "
        "template: {prompt: '{q}', choices: '{choices}', answer: '{gold}'}}]"
    )
    config = _checked(inputs, trials=1, tokens=10**4, task=(questions,))
    here = replace(GPU, gpus=())
    loaded = load(config, Place(here=here, machines=(here,), share=Share()))
    timed, asked, load_teacher = [], [], Loaded.load_teacher

    def measure(teacher: Any, *given: object, **options: object) -> tuple[Speed, dict[int, float]]:
        timed.append(teacher)
        return SPEED, {1: 1e3}

    def evaluate(model: Any, *given: object, **options: object) -> tuple[Any, None]:
        asked.append(model)
        return SimpleNamespace(measurements={}), None

    def loading(self: Loaded, device: str = "cpu") -> Any:
        assert not timed, "one teacher is enough"
        return load_teacher(self, device)

    monkeypatch.setattr("autodistill.search.setup.measure_plan.measure_speed", measure)
    monkeypatch.setattr("autodistill.search.setup.answering.evaluate", evaluate)
    monkeypatch.setattr(Loaded, "load_teacher", loading)
    plan_from_measurement(config, loaded, 0.0)
    assert asked == timed
    assert len(timed) == 1


@pytest.mark.parametrize("full", ["time_outputs", "measure_speed", "time_asked"])
def test_memory_that_runs_out_in_measuring_is_told_with_what_is_needed(planned, full: str) -> None:  # type: ignore[no-untyped-def]
    error = torch.OutOfMemoryError("CUDA out of memory")
    said = r"the GPU's memory ran out .* the teacher takes 54\d MB, and training .* 54\d MB.*--sequence-length"
    with pytest.raises(InputError, match=said) as told:
        planned(fails=(full, error))
    assert told.value.__cause__ is error
    with pytest.raises(RuntimeError, match="a bug"):
        planned(fails=(full, RuntimeError("a bug")))


def test_beside_a_gpu_a_process_has_the_teacher_and_its_student_in_main_memory(inputs: Path) -> None:
    """The teacher has 32-bit weights, and the largest student is as large.

    Machines hold one, two or three such pairs.
    """
    config = _checked(inputs, trials=1, tokens=10**4)
    tensors = load_file(inputs / "teacher" / "model.safetensors").values()
    need = 2 * 4 * sum(tensor.numel() for tensor in tensors) + TRAINING_PROCESS_BYTES
    for held in (1, 2, 3):
        machine = replace(GPU, cpus=8, memory_bytes=int(1.01 * held * need / 0.8))
        place = Place(here=machine, machines=(machine,), share=Share(gpus=0.25))
        assert load(config, place).workers.count == held


def test_a_step_that_memory_does_not_hold_is_not_timed(inputs: Path) -> None:
    """A single sequence has no gradients of earlier passes next to it. Two may therefore not fit where one does."""
    loaded = load(_checked(inputs, trials=2, tokens=4 * LENGTH * ENOUGH_STEPS), Place.local())
    config = _checked(inputs, trials=2, tokens=4 * LENGTH * ENOUGH_STEPS)

    def fit_step(tokens: int) -> Any:
        if tokens > 2 * LENGTH:
            raise InputError("no")
        return SimpleNamespace(micro_batch=tokens // LENGTH)

    on_gpu = replace(loaded, device="cuda", workers=replace(loaded.workers, device="cuda"), fit_step=fit_step)
    assert _sizes(config, on_gpu, 10**6) == (1, 2)
