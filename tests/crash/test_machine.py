"""A whole search under Ray, on a machine whose clock changes meanwhile or whose memory a control group limits."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autodistill.runs.results.row import Row
from benchmarks.reliability.kill import differences
from tests.search.test_kill import command, events, inputs, reports, rows, start

__all__ = ["inputs"]
_DAY = 86_400
_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that a process loads first. It shifts the clock by the offset in a file."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True)
    return library


def ended(words: list[str], folder: Path, offset: int, clock: Path, patch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Run a search whose clock is shifted after its first trial. Return its rows of validation and test."""
    folder.mkdir()
    file = folder / "offset"
    file.write_bytes(struct.pack("=q", 0))
    with patch.context() as environment:
        environment.setenv("LD_PRELOAD", str(clock))
        environment.setenv("CLOCK_OFFSET", str(file))
        process = start(words, folder, cores=1)
    while process.poll() is None and not reports(folder):
        time.sleep(0.05)
    with file.open("r+b") as there:  # the processes of the search see the change at once
        there.write(struct.pack("=q", offset))
    return rows(process, folder)


@pytest.mark.crash
def test_a_clock_that_jumps_a_day_either_way_changes_no_row(
    inputs: tuple[Path, Path], clock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock changes in all processes of the search, including Ray's."""
    words = command(inputs, "ray")
    whole = ended(words, tmp_path / "whole", 0, clock, monkeypatch)
    for name, offset in (("back", -_DAY), ("forward", _DAY)):
        assert [*differences(ended(words, tmp_path / name, offset, clock, monkeypatch), whole)] == []
        times = [float(str(event["time"])) for event in events(tmp_path / name)]
        assert times == sorted(times)
        assert times[-1] - times[0] < _DAY / 2


@pytest.mark.crash
def test_a_time_budget_ends_though_the_clock_is_a_day_back(
    inputs: tuple[Path, Path], clock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extended training gets the rest of the time budget. It would otherwise run for a day."""
    assert ended(command(inputs, "ray", "--time", "3m"), tmp_path / "back", -_DAY, clock, monkeypatch)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 1, which limits the memory of the processes in it."""
    made = _GROUPS / f"autodistill-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    yield made
    made.rmdir()


@pytest.mark.crash
@pytest.mark.parametrize(("limit", "codes"), [(700 * 10**6, (2,)), (1_300 * 10**6, (0, 2))], ids=["700MB", "1.3GB"])
def test_a_control_group_without_memory_ends_in_one_line_or_costs_trials_alone(
    limit: int, codes: tuple[int, ...], inputs: tuple[Path, Path], group: Path, tmp_path: Path
) -> None:
    """With the smaller limit the teacher does not fit. With the larger one the kernel kills workers again and again."""
    (group / "memory.limit_in_bytes").write_text(str(limit))
    inside = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
    process = start([*inside, *command(inputs, "ray")], tmp_path, cores=1)
    output, errors = process.communicate()
    said = errors.decode()
    assert process.returncode in codes, said
    assert "Traceback" not in said
    if process.returncode:
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert re.search(r"takes .* MB .* and this machine has .* MB free: ", line)
    else:
        for failed in json.loads(output)["failed"]:
            assert failed["reason"].endswith("since the machine's memory was short")
