"""Which step sizes are timed (doubled while that is worth it and fits memory), and with which layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autodistill.distillation.student.build import cut_student
from autodistill.distillation.training.optimizers.adamw_bf16 import RoundedAdamW
from autodistill.estimates.training_memory import OptimizerState
from autodistill.evaluation.base import Scoring
from autodistill.models.config import spec_from_config
from autodistill.models.loading import decoder_layers, load_model
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Workers
from autodistill.search.setup import throughput as pace
from autodistill.search.setup.throughput import _growing, _Passes, measure_speed, moving_seconds
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher

LAYERS = 5


@pytest.mark.parametrize(
    ("rates", "timed"),
    [
        ({1: 100.0}, [1]),
        ({1: 100.0, 2: 190.0, 4: 350.0}, [1, 2, 4]),
        # The second size is not worth it, so no larger one is tried.
        ({1: 100.0, 2: 114.0, 4: 300.0}, [1, 2]),
        ({1: 100.0, 2: 116.0, 4: 120.0, 8: 400.0}, [1, 2, 4]),
        # Memory runs out at 4.
        ({1: 100.0, 2: 190.0, 4: None, 8: 700.0}, [1, 2]),
    ],
)
def test_sizes_are_timed_while_they_are_worth_it(rates: dict[int, float | None], timed: list[int]) -> None:
    def rate(size: int) -> float:
        found = rates[size]
        if found is None:
            raise torch.OutOfMemoryError("out of memory")
        return found

    assert _growing(rate, list(rates)) == {size: rates[size] for size in timed}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("a bug")])
def test_a_first_step_that_fails_is_told(error: RuntimeError) -> None:
    def fail(size: int) -> float:
        raise error

    with pytest.raises(type(error), match=str(error)):
        _growing(fail, (1, 2))


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gemma3_text"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=LAYERS, architecture=request.param)


def _workers(processes: int) -> Workers:
    return Workers(count=1, threads=1, bf16=False, device="cpu", processes=processes)


def measured(model: Any, workers: Workers, depth: float = 1.0, **more: Any) -> tuple[Speed, dict[int, float]]:
    """Return the speeds measured for a teacher on one thread. Its largest student has this share of its layers."""
    return measure_speed(
        model,
        spec_from_config(model.config.to_dict()),
        lambda given: cut_student(given, Init(depth=depth), None)[0],
        workers,
        1,
        device="cpu",
        sequence_length=8,
        **more,
    )


@pytest.mark.parametrize(("processes", "held"), [(1, 5), (4, 2), (8, 1)])
def test_of_a_student_that_several_processes_share_no_more_layers_are_run_than_lie_in_one(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, processes: int, held: int
) -> None:
    model = load_model(teacher, torch.float32)
    block, run = type(decoder_layers(model)[0]), 0
    forward, passes = block.forward, []

    def counting(*given: object, **options: object) -> object:
        nonlocal run
        run += 1
        return forward(*given, **options)

    body = type(model.base_model)
    whole = body.forward

    def counted(*given: object, **options: object) -> object:
        nonlocal run
        run = 0
        found = whole(*given, **options)
        passes.append((run, torch.is_grad_enabled()))
        return found

    monkeypatch.setattr(block, "forward", counting)
    monkeypatch.setattr(body, "forward", counted)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    speed, rates = measured(model, _workers(processes))
    assert {count for count, training in passes if training} == ({held} if processes == 1 else {held, 0})
    assert min(speed.worker_train, speed.worker_score, *rates.values()) > 0
    # The teacher is unchanged, and can be asked.
    assert len(decoder_layers(model)) == LAYERS
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "bf16", "caches", "times"), [(1.0, True, False, 1), (1.0, True, True, 2), (0.5, False, True, 2)]
)
def test_what_is_read_by_all_threads_is_timed_once(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, depth: float, bf16: bool, caches: bool, times: int
) -> None:
    """Outputs are only in bfloat16 if they are cached. Students of the teacher's own size are read as fast as it is."""
    model, asked = load_model(teacher, torch.float32), list[bool]()

    def rate(_: _Passes, sequences: int, half: bool) -> float:
        asked.append(half)
        return 100.0 * len(asked)

    monkeypatch.setattr(_Passes, "rate", rate)
    speed, _ = measured(model, replace(_workers(1), bf16=bf16), depth, caches=caches)
    assert len(asked) == times
    assert asked.count(True) == (caches and bf16)
    assert speed.score == 100
    assert speed.worker_score == (100 if depth == 1 else 200)


@pytest.mark.parametrize(("many", "threads", "expected"), [(4, 1, 4), (1, 1, 1), (None, 1, 0), (4, 0, 0)])
def test_a_worker_on_all_threads_is_timed_with_as_many_sequences_as_its_passes_have(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, many: int | None, threads: int, expected: int
) -> None:
    def train_rate(_: _Passes, size: int, processes: int | None = None) -> float:
        return 80.0 if processes is None else 100.0 * size

    def alone(rate: float) -> int:
        assert rate == 100.0
        assert many is not None
        return many

    monkeypatch.setattr(_Passes, "train_rate", train_rate)
    model = load_model(teacher, torch.float32)
    speed, found = measured(model, replace(_workers(1), alone=threads), alone=None if many is None else alone)
    assert found == {1: 80.0}
    assert (speed.alone, speed.at_once) == (100.0 * expected, max(1, expected))


@pytest.mark.parametrize(
    ("bf16", "scoring", "seen"),
    [
        (False, "float32", {torch.float32}),
        (False, "bf16", {torch.float32, torch.bfloat16}),  # the cache's passes, in addition to those that score
        (True, "bf16", {torch.bfloat16}),
    ],
)
def test_models_are_timed_in_the_precision_that_scores_them(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, scoring: Scoring, seen: set[torch.dtype]
) -> None:
    model, kinds = load_model(teacher, torch.float32), set[torch.dtype]()

    def watched(layer: torch.nn.Module, ids: tuple[Tensor, ...], found: Tensor) -> None:
        if not torch.is_grad_enabled() and layer is not model.get_output_embeddings():
            kinds.add(found.dtype)

    for layer in decoder_layers(model).modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(watched)
    speed, _ = measured(model, replace(_workers(1), bf16=bf16), 0.5, scoring=scoring)
    assert kinds == seen
    assert min(speed.score, speed.cache, speed.worker_score) > 0
    # The model is unchanged.
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_layers_that_are_left_out_take_as_long_as_those_that_are_there(tmp_path: Path, processes: int) -> None:
    model = load_model(save_tiny_teacher(tmp_path, layers=LAYERS), torch.float32)
    passes = _Passes(model, torch.zeros(1, 8, dtype=torch.long), 1, "cpu", _workers(processes))
    passes.take(model)
    # The head takes 30 ms, and each layer 10 ms.
    taken = passes.of_all_layers(lambda: 0.03 + 0.01 * len(decoder_layers(model)))
    assert taken == pytest.approx(0.03 + 0.01 * LAYERS)
    assert 1 <= len(decoder_layers(model)) <= LAYERS
    # Noise may make fewer layers take longer than more. That does not count as speed.
    assert passes.of_all_layers(lambda: 0.03 - 0.001 * len(decoder_layers(model))) > 0


def test_what_moving_weights_takes_is_that_of_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only optimisers move this clock. The first step, which creates the states, does not count."""
    clock, steps = [0.0], iter((9.0, 3.0, 2.0, 4.0))
    make, made = pace.adamw, []

    def slow(groups: list[dict[str, Any]], state: OptimizerState) -> Any:
        optimizer = make(groups, state)
        made.append(type(optimizer))
        step = optimizer.step

        def timed() -> None:
            step()
            clock[0] += next(steps)

        optimizer.step = timed
        return optimizer

    monkeypatch.setattr(pace, "adamw", slow)
    monkeypatch.setattr(pace, "_MOVED", 1000)
    monkeypatch.setattr("autodistill.search.setup.throughput.time.perf_counter", lambda: clock[0])
    threads = torch.get_num_threads()
    assert moving_seconds("float32", "cpu", threads + 1) == 0
    assert moving_seconds("bfloat16", "cpu", threads + 1) == 2.0 / 1000
    assert made == [RoundedAdamW]
    assert torch.get_num_threads() == threads


def test_longer_steps_train_fewer_tokens_a_second() -> None:
    timed = Speed(cache=1.0, score=1.0, worker_train=100.0, worker_score=1.0)
    # A step of 50 tokens took half a second, and now takes a whole one.
    assert timed.with_steps_longer(0.5, 50) == replace(timed, worker_train=50.0)
    alone = replace(timed, alone=200.0)
    assert alone.with_steps_longer(0.5, 50).alone == pytest.approx(50 / 0.75)
    assert alone.with_steps_longer(0.0, 50) == alone
