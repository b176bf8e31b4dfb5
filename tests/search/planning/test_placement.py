"""What each trial gets of some machines, and which requests cannot be met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.hardware.machine import Gpu, Machine
from autodistill.search.planning.placement import Share, check_share, process_bytes, share_out

GB = 10**9


def cores(*counts: int) -> list[Machine]:
    return [Machine(cpus=count, memory_bytes=100 * GB) for count in counts]


def cards(*counts: int, cpus: int = 16) -> list[Machine]:
    gpu = Gpu(name="a", memory_bytes=24 * GB)
    return [Machine(cpus=cpus, memory_bytes=100 * GB, gpus=(gpu,) * count) for count in counts]


def test_a_machine_is_shared_out_by_cores_memory_or_gpus() -> None:
    machine = Machine(cpus=4, memory_bytes=10 * GB)
    assert share_out([machine], GB, "ray").count == 4
    assert share_out([machine], 3 * GB, "ray").count == 2
    inline = share_out([machine], GB, "inline")
    assert (inline.count, inline.threads) == (1, 4)


def test_a_process_has_what_others_on_its_machine_leave_it() -> None:
    large, small = Machine(cpus=4, memory_bytes=40 * GB), Machine(cpus=8, memory_bytes=10 * GB)
    assert process_bytes([large], 40 * GB, GB, "ray") == 10 * GB
    assert process_bytes([large], 40 * GB, GB, "inline") == 40 * GB
    # There are four places on one machine and two on the other, and any place may get any trial.
    assert process_bytes([large, small], 10 * GB, 4 * GB, "ray") == 5 * GB
    assert process_bytes([large], 40 * GB, GB, "ray", Share(threads=2)) == 20 * GB
    # What lies on a GPU was already divided, and main memory does not limit it.
    assert process_bytes(cards(2), 12 * GB, GB, "ray", Share(gpus=0.5)) == 12 * GB


@pytest.mark.parametrize(
    ("machines", "share", "alone"),
    [
        (cores(4), Share(), 4),
        (cores(8), Share(threads=3), 6),
        # The only worker runs alone anyway. Several machines or a GPU are not known to be faster for a single worker.
        (cores(1), Share(), 1),
        (cores(2, 4), Share(), 0),
        (cards(2), Share(), 0),
        (cores(4), Share(processes=2, threads=1), 0),
    ],
)
def test_a_worker_with_nothing_beside_it_has_all_threads(machines: list[Machine], share: Share, alone: int) -> None:
    assert share_out(machines, GB, "ray", share).alone == alone
    assert share_out(machines, GB, "inline", Share()).alone == (0 if machines[0].gpus else machines[0].cpus)


def test_gpus_have_a_worker_each() -> None:
    workers = share_out(cards(2), GB, "ray")
    assert (workers.count, workers.threads, workers.device) == (2, 8, "cuda")


@pytest.mark.parametrize(("need", "gpus", "count", "beside"), [(19, 0.25, 4, 4), (21, 0.25, 3, 3), (90, 0.25, 1, 1)])
def test_main_memory_holds_what_trains_on_a_gpu_too(need: int, gpus: float, count: int, beside: int) -> None:
    """Four fifths of 100 GB hold 19 GB four times and 21 GB three times. There is always at least one worker."""
    workers = share_out(cards(1), need * GB, "ray", Share(gpus=gpus))
    assert (workers.count, workers.processes_sharing) == (count, beside)


def test_one_process_has_no_bundles_to_place() -> None:
    assert check_share(cards(1, cpus=1), 0.5, None, "inline") == Share(gpus=0.5)
    workers = share_out(cards(2), GB, "inline", Share(gpus=0.5))
    assert (workers.count, workers.threads, workers.processes_sharing) == (1, 16, 1)


def test_the_nodes_of_a_cluster_add_up() -> None:
    workers = share_out(cores(2, 4), GB, "ray")
    assert (workers.count, workers.threads, workers.processes_sharing) == (6, 1, 4)
    workers = share_out([*cores(8), *cards(2, 1)], GB, "ray")
    assert (workers.count, workers.device, workers.processes_sharing) == (3, "cuda", 1)


@pytest.mark.parametrize("runner", ["ray", "inline"])
def test_trials_compute_in_bfloat16_where_all_machines_that_train_do(runner: str) -> None:
    """The machine that runs the tests does not matter: it may train nothing."""
    (card,), (core,) = cards(1), cores(8)
    for machines, bf16 in (
        ([core], False),
        ([replace(core, bf16=True), core], False),
        ([replace(card, bf16=True), core], True),
        ([core, replace(card, bf16=True)], True),
        ([replace(core, bf16=True), card], False),
        ([replace(card, bf16=True), card], False),
        ([replace(card, bf16=True)] * 2, True),
    ):
        assert share_out(machines, GB, runner).bf16 is bf16


@pytest.mark.parametrize(
    ("machines", "gpus", "cpus", "share", "count", "threads"),
    [
        (cards(2), 0.25, None, Share(gpus=0.25), 8, 2),
        (cards(2), 0.3, 1, Share(gpus=0.3, threads=1), 6, 1),
        (cards(2, 2), 2, None, Share(processes=2), 2, 8),
        (cards(2, 1), 3, None, Share(processes=3), 1, 8),
        # Cores limit the next ones: 3 x 32 of 96; one of 2 for each of two workers; and each machine counts on its own.
        (cards(8, cpus=96), None, 32, Share(threads=32), 3, 32),
        (cards(1, cpus=2), 0.25, None, Share(gpus=0.25), 2, 1),
        (cards(8, cpus=96), 2, 32, Share(processes=2, threads=32), 1, 32),
        (cards(4, 4, cpus=6), 2, 4, Share(processes=2, threads=4), 1, 4),
        ([*cards(4, cpus=2), *cores(64)], None, None, Share(), 2, 1),
        (cores(4), None, 2, Share(threads=2), 2, 2),
        # A machine of three cores has one worker of two threads, so one core stays unused.
        (cores(3, 3), None, 2, Share(threads=2), 2, 2),
        (cores(1, 1), None, 2, Share(processes=2, threads=1), 1, 1),
        (cores(2, 2), None, 3, Share(processes=3, threads=1), 1, 1),
        (cores(2, 2, 2), None, 4, Share(processes=2, threads=2), 1, 2),
    ],
)
def test_a_trial_is_given_what_was_asked_for(
    machines: list[Machine], gpus: float | None, cpus: int | None, share: Share, count: int, threads: int
) -> None:
    assert check_share(machines, gpus, cpus, "ray") == share
    workers = share_out(machines, GB, "ray", share)
    assert (workers.count, workers.threads, workers.processes, workers.gpus) == (
        count,
        threads,
        share.processes,
        share.gpus,
    )


@pytest.mark.parametrize(
    ("machines", "gpus", "cpus", "runner", "said"),
    [
        (cards(2, 1), 4, None, "ray", "there are 3 GPUs"),
        (cards(2), 1.5, None, "ray", "a fraction of one, or a whole number"),
        (cards(2), 0, None, "ray", "a fraction of one, or a whole number"),
        (cards(2), float("nan"), None, "ray", "a fraction of one, or a whole number"),
        (cards(2), 2, None, "inline", "use --runner ray"),
        (cards(2), None, 17, "ray", "no machine has more than 16 cores"),
        (cards(8, cpus=96), 2, 64, "ray", "takes 2 x 64 cores.* only 1 x 64 are available"),
        (cards(8, cpus=4), 8, None, "ray", "takes 8 x 1 cores.* only 4 x 1 are available"),
        ([*cards(1, cpus=4), *cores(16)], None, 8, "ray", "takes 1 x 8 cores.* only 0 x 8 are available"),
        (cores(2), 1, None, "ray", "there is no GPU here"),
        (cores(2, 2), None, 5, "ray", "there are 4 cores"),
        (cores(2, 2), None, 0, "ray", "at least 1"),
        (cores(2, 2), None, 4, "inline", "use --runner ray"),
    ],
)
def test_what_cannot_be_given_is_refused(
    machines: list[Machine], gpus: Any, cpus: int | None, runner: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_share(machines, gpus, cpus, runner)


def test_a_cluster_that_offers_nothing_is_refused() -> None:
    """For example, its head has no CPUs and autoscaling has not begun."""
    with pytest.raises(InputError, match="no node of the Ray cluster offers CPUs or GPUs"):
        check_share((), None, None, "ray")
