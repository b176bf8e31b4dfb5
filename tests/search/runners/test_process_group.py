"""One trial over two gloo processes through Ray. The second process has little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autodistill.distillation.training.step_loss import StepLoss
from autodistill.hardware.machine import Machine
from autodistill.inference.torch_memory import StepOutOfMemory
from autodistill.search.runners import process_group as group
from autodistill.search.runners.ray_local import LocalRay
from autodistill.search.worker.attempt import Assignment, attempt
from autodistill.search.worker.messages import RungReport, TrialSetting, TrialTask
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Strategy

Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
TASK = TrialTask(
    id="t000",
    strategy=Strategy(
        distillation=Distillation(learning_rate=1e-3),
        finishing=Finishing(format=Q4.format, bits=Q4.bits, group_size=Q4.group_size),
    ),
    seed=0,
    deployments=(Q4,),
    probe=Q4,
)


@pytest.fixture
def ray() -> Iterator[Any]:
    """Provide Ray with two cores of this machine."""
    local = LocalRay(Machine(cpus=2, memory_bytes=10**9, gpus=()))
    local.wait()
    import ray

    yield ray
    local.leave()


def holder(ray: Any, setting: TrialSetting, room: Mapping[str, tuple[int, int]]) -> Any:
    """Return an actor that holds a group of two processes, as a worker of Tune does.

    Args:
        ray: The Ray that runs it.
        setting: The setting of all trials.
        room: For each trial, a number of passes and of sequences. After so many passes, the second process runs out of
            memory in passes over more sequences.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(ray.util.placement_group([{"CPU": 1}] * 2))

    # Ray sends classes of a function by value, so other processes need not import this file.
    class Tight(group.Member):
        def work(self, assignment: Assignment) -> dict[str, Any]:
            real, passes = StepLoss.of, 0
            after, held = room.get(assignment.task.id, (0, 100))

            def tight(loss: StepLoss, indices: list[int], *rest: Any) -> Any:
                nonlocal passes
                passes += 1
                # A pass gathers weights from both processes. The other process has therefore come as far, and has
                # written the checkpoint before this pass.
                found = real(loss, indices, *rest)
                if self._rank == 1 and passes > after and len(indices) > held:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StepLoss, "of", tight)
                return super().work(assignment)

    class Holder:
        def __init__(self) -> None:
            group.Member = Tight  # type: ignore[misc]
            self.group = group.Group(setting, None)

        def work(self, assignment: Assignment) -> tuple[dict[str, Any], list[str]]:
            """Return the outcome of the assignment, and the members that finished it."""
            outcome = self.group.work(assignment)
            return outcome, [member._actor_id.hex() for member in self.group._members]

    return ray.remote(Holder).options(num_cpus=0, scheduling_strategy=place).remote()


def test_a_group_begins_again_with_fewer_sequences_at_once_for_as_long_as_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def runs_out(fewer: int) -> None:
        raise StepOutOfMemory(fewer)

    failure = {"failure": ("out-of-memory", "so")}
    outcomes = [attempt(lambda: runs_out(2)), attempt(lambda: runs_out(1)), failure]
    given: list[int | None] = []

    def said(self: group.Group, assignment: Assignment) -> dict[str, Any]:
        given.append(assignment.task.micro_batch)
        return outcomes[len(given) - 1]

    monkeypatch.setattr(group.Group, "_attempt", said)
    assert group.Group(None, None).work(Assignment(task=TASK, rung=0)) == failure  # type: ignore[arg-type]
    assert given == [None, 2, 1]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"report": "so"}, {"report": "so", "lost": 768}),
        ({"failure": ("nan", "so"), "trained": 128}, {"failure": ("nan", "so"), "trained": 896}),
        ({"failure": ("worker-died", "so")}, {"failure": ("worker-died", "so"), "trained": 768}),
        ({"trained": 0}, {"trained": 768}),
    ],
)
def test_what_a_group_trained_before_it_began_again_is_told(
    monkeypatch: pytest.MonkeyPatch, last: dict[str, Any], expected: dict[str, Any]
) -> None:
    outcomes = iter([{"fewer": 2, "trained": 512}, {"fewer": 1, "trained": 256}, last])
    monkeypatch.setattr(group.Group, "_attempt", lambda self, assignment: next(outcomes))
    made = group.Group(None, None)  # type: ignore[arg-type]
    assert made.work(Assignment(task=TASK, rung=0)) == expected
    monkeypatch.setattr(group.Group, "_attempt", lambda self, assignment: last)
    assert made.work(Assignment(task=TASK, rung=0)) == last


@pytest.mark.slow
def test_out_of_memory_in_one_process_goes_on_in_new_ones_with_fewer_sequences_at_once(
    ray: Any, lab: Any, tmp_path: Path
) -> None:
    # Each process has two of a step's four sequences. The decay of the first rung begins after three steps.
    changes = {"tokens": 1024, "rungs": (512, 1024), "keep": (1,), "batch_tokens": 128, "micro_batch": 2}
    setting = lab.setting(tmp_path, plan=replace(lab.plan, processes=2, **changes))
    room = {"begin": (0, 1), "decay": (3, 1), "never": (0, 0)}
    held = holder(ray, setting, room)

    def work(name: str, rung: int, at_once: int | None = None) -> tuple[dict[str, Any], list[str]]:
        task = replace(TASK, id=name, micro_batch=at_once)
        found: tuple[dict[str, Any], list[str]] = ray.get(held.work.remote(Assignment(task=task, rung=rung)))
        return found

    def trained(outcome: Mapping[str, Any]) -> tuple[int, list[tuple[int, int]]]:
        report: RungReport = outcome["report"]
        return report.trained, [(step.tokens, step.micro_batch) for step in report.steps]

    (first, anew), (last, same) = work("begin", 0), work("begin", 1, 1)
    assert trained(first) == (512, [(128, 1), (256, 1), (384, 1), (512, 1)])
    assert "lost" not in first, "it was the first step that memory did not hold"
    assert anew == same
    # The result equals bit for bit that of a trial that began with one sequence at a time.
    (alike, _), (alike_last, same) = work("alike", 0, 1), work("alike", 1, 1)
    assert anew == same
    for outcome, expected in ((first, alike), (last, alike_last)):
        assert outcome["report"].evaluation == expected["report"].evaluation
    students = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("begin", "alike")]
    assert students[0].keys() == students[1].keys()
    assert all(torch.equal(weight, students[1][name]) for name, weight in students[0].items())

    # It resumes from the checkpoint before the decay, which other processes had reached with two sequences at a time.
    decayed, others = work("decay", 0)
    assert trained(decayed) == (128, [(512, 1)])
    assert decayed["lost"] == 384, "which the first processes had trained before memory ran out"
    assert not set(others) & set(anew)
    perplexities = [one["report"].evaluation.measurements["perplexity"].value for one in (decayed, first)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)

    failure = ("out-of-memory", "CUDA out of memory. Tried to allocate 20 GiB.")
    assert work("never", 0, 1) == ({"failure": failure, "trained": 0}, [])
