"""Pressure tests: a child that really holds a plan, and limits at which it ends, on simulated memories."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

import autodistill as ad
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.hardware.machine import free_memory_bytes
from autodistill.hardware.pressure import fill, stress
from autodistill.testing import save_tiny_teacher

MB = 10**6


def test_a_child_holds_all_of_a_plan_and_gives_it_back() -> None:
    before = psutil.Process().memory_info().rss
    found = stress(100 * MB, device="cpu", reserve=MB)
    assert found.fits
    # Its resident memory, including what its own code added.
    assert 100 * MB <= found.held_bytes < 130 * MB
    assert found.device == "cpu"
    assert "fits" in found.describe()
    assert psutil.Process().memory_info().rss < before + 50 * MB


def test_a_plan_beyond_what_is_free_ends_before_others_want() -> None:
    # Enough stays free that the child may take about 200 MB.
    reserve = free_memory_bytes() - 200 * MB
    found = stress(10**14, device="cpu", reserve=reserve)
    assert not found.fits
    # Other processes may free memory in the meantime.
    assert found.held_bytes < 1500 * MB
    assert "left to others" in found.because
    assert "does not fit" in found.describe()


def test_no_room_beside_the_reserve_and_no_gpu_are_one_line() -> None:
    with pytest.raises(InputError, match="leaves 1000 TB to others"):
        stress(MB, device="cpu", reserve=10**15)
    with pytest.raises(InputError, match="no CUDA device"):
        stress(MB, device="cuda")


class Memory:
    """A memory of `size` bytes. If it `swaps`, some bytes are swapped out when it runs short."""

    def __init__(self, size: int, swaps: bool = False, fails_at: int | None = None) -> None:
        self.size, self.taken, self.swaps, self.fails_at = size, 0, swaps, fails_at

    def take(self, size: int) -> None:
        if self.fails_at is not None and self.taken + size > self.fails_at:
            raise RuntimeError("CUDA out of memory")
        self.taken += size

    def free(self) -> int:
        return self.size - self.taken

    def swapped(self) -> int:
        return 5 * self.taken if self.swaps and self.taken > self.size // 2 else 0


@pytest.mark.parametrize(
    ("memory", "planned", "reserve", "held", "because"),
    [
        (Memory(1000), 500, 100, 500, "all of the plan fits"),
        (Memory(1000), 505, 100, 505, "all of the plan fits"),
        (Memory(1000), 1000, 100, 900, "left to others"),
        (Memory(1000, swaps=True), 1000, 0, 510, "began to swap"),
        (Memory(1000, fails_at=333), 1000, 0, 330, "the allocator gave no more"),
    ],
)
def test_it_ends_at_the_first_bound(memory: Memory, planned: int, reserve: int, held: int, because: str) -> None:
    told: list[int] = []
    found = fill(
        planned,
        reserve,
        take=memory.take,
        free=memory.free,
        swapped=memory.swapped,
        on_step=told.append,
        step=10,
    )
    assert found[0] == held == memory.taken
    assert because in found[1]
    assert told[-1] == held


def test_an_estimate_is_put_to_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_teacher(tmp_path / "model")
    found = ad.estimate(model, training=64, context=256, stress=True).document["stress"]
    assert found["plans"].keys() >= {"serving", "training, all kept", "training, checkpointing"}
    assert found["planned_bytes"] == max(found["plans"].values())
    assert all(found["fit"].values())
    assert main(["estimate", str(model), "--context", "256", "--stress"]) == 0
    assert "fits here" in capsys.readouterr().out
    assert main(["estimate", str(model), "--context", "256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stress"] is None


def test_another_device_cannot_be_filled_from_here(tmp_path: Path) -> None:
    model = save_tiny_teacher(tmp_path / "model")
    with pytest.raises(InputError, match="memory of this machine"):
        ad.estimate(model, device="4090", stress=True)
