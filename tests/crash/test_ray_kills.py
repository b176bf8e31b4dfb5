"""A search under Ray, the default runner, is killed again and again during its trials and still has the same rows."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from autodistill.runs.events import RowAdded, RowTested, read_events, rows_of
from benchmarks.reliability.kill import differences, over
from tests.search.test_kill import command, events, finish, inputs, reports, start

__all__ = ["inputs"]
_KILLS, _TRIALS = 5, 5
# With one worker, trials end in a fixed order and the sampler proposes the same.
_ONE_CORE = 1


def killed(folder: Path, words: list[str], further: int, seconds: float) -> bool:
    """Start a search, and kill it with all its processes after `further` more events and some seconds.

    Returns False if the search ended before that.
    """
    process = start(words, folder, cores=_ONE_CORE)
    wanted, ends = len(events(folder)) + further, time.monotonic() + 300
    while process.poll() is None and len(events(folder)) < wanted:
        assert time.monotonic() < ends, "the search came to nothing"
        time.sleep(0.02)
    time.sleep(seconds)
    if process.poll() is not None:
        assert process.returncode == 0, process.communicate()[1].decode()
        return False
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        # In no particular order: a worker may outlive its raylet for a moment, or the other way round.
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    assert not psutil.wait_procs(family[1:], timeout=60)[1], "processes of the killed search live on"
    return True


@pytest.mark.crash
def test_a_search_killed_under_ray_while_trials_run_ends_with_the_rows_of_one_left_alone(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    words = command(inputs, "ray")
    words[words.index("--trials") + 1] = str(_TRIALS)
    finish(words, whole, cores=_ONE_CORE)
    dice, again = random.Random(0), []
    while_trials = 0
    for _ in range(_KILLS):
        # The event that starts a session, and then one to three events of its trials.
        if not killed(cut, [*words, *again], 2 + dice.randrange(3), dice.uniform(0, 1.5)):
            break
        while_trials += not over(events(cut), _TRIALS)
        again = ["--resume"]
    finish([*words, *again], cut, cores=_ONE_CORE)
    print(f"{while_trials} kills while trials ran")
    assert while_trials >= 3, "the search was over too soon: give it more trials"
    for kind in (RowAdded, RowTested):
        found = {row.row_id: row for row in rows_of(read_events(events(cut)), [kind])}
        expected = {row.row_id: row for row in rows_of(read_events(events(whole)), [kind])}
        assert [*differences(found, expected)] == []
    assert len(set(reports(cut))) == len(reports(cut)), "a segment was finished twice"
