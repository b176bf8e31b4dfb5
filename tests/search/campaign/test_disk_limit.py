"""Which checkpoints a limit keeps: always those in use and the best. Of the others, the least valuable go first."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.runs.checkpoints import open_stages
from autodistill.runs.results.row import Status
from autodistill.search.campaign.disk_limit import StageKeeper
from autodistill.search.campaign.state import Candidate, TrialState
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan

PLAN = small_plan()  # rungs 1024, 3072, 9216: decays branch off at 768, 2560 and 7424
POINTS = (768, 2560, 7424)
DEPLOYMENTS = load_space("declared").deployments


def trial(name: str, stage: str, rung: int = -1, value: float | None = None, **fields: object) -> TrialState:
    straight = bool(fields.pop("straight", False))
    task = TrialTask(
        id=name,
        strategy=Strategy(),
        seed=0,
        deployments=DEPLOYMENTS,
        probe=DEPLOYMENTS[0],
        straight=straight,
        stage=stage,
    )
    known = {
        "number": 0,
        "kind": "student",
        "name": name,
        "point": None,
        "candidate": Candidate(strategy=Strategy()),
        "rung": rung,
        "value": value,
        "judged": value,
    }
    return TrialState(task=task, **(known | fields))  # type: ignore[arg-type]


def store(folder: Path, **stages: tuple[int, ...]) -> None:
    """Save checkpoints of 100 bytes each."""
    for stage, tokens in stages.items():
        for point in tokens:
            open_stages(folder).save(stage, point, lambda path: path.write_bytes(b"x" * 100) and None)


def keeper(folder: Path, limit: int | None, direction: str = "max") -> StageKeeper:
    return StageKeeper(open_stages(folder), limit, PLAN, direction)  # type: ignore[arg-type]


def removed(found: list) -> list[tuple[str, int]]:
    return [(item.stage, item.tokens) for item in found]


# Three trials that are best and three that are not. One test adds "nobody", a stage without a trial.
TRIALS = [
    trial("b000", "base", 2, 0.30, status=Status.COMPLETED),
    trial("t000", "good", 2, 0.50, status=Status.COMPLETED),
    trial("t001", "fine", 1, 0.40),
    trial("t002", "poor", 0, 0.10),
    trial("t003", "fair", 0, 0.20),
    trial("t004", "odd", 0, None),
]
HELD = {"base": POINTS, "good": POINTS, "fine": POINTS[:2], "poor": POINTS[:1], "fair": POINTS[:1], "odd": POINTS[:1]}


def test_within_the_limit_nothing_goes(tmp_path: Path) -> None:
    store(tmp_path, **HELD)
    assert keeper(tmp_path, 1100).surplus(TRIALS, ()) == []
    assert keeper(tmp_path, None).surplus(TRIALS, ()) == []


def test_the_least_valuable_goes_first_and_no_more_than_needed(tmp_path: Path) -> None:
    store(tmp_path, **HELD, nobody=(768,))
    order = [("nobody", 768), ("odd", 768), ("poor", 768), ("fair", 768)]
    for count in range(1, 5):
        assert removed(keeper(tmp_path, 1200 - 100 * count).surplus(TRIALS, ())) == order[:count]
    # The best few are kept even if they exceed the limit.
    assert removed(keeper(tmp_path, 1).surplus(TRIALS, ())) == order


def test_where_less_is_better_the_others_are_the_best_few(tmp_path: Path) -> None:
    store(tmp_path, **HELD)
    found = removed(keeper(tmp_path, 1, "min").surplus(TRIALS, ()))
    assert {stage for stage, _ in found} == {"odd", "fine", "good"}
    assert found == [("odd", 768), ("fine", 768), ("fine", 2560), *(("good", point) for point in POINTS)]


def test_what_a_trial_goes_on_from_is_never_removed(tmp_path: Path) -> None:
    store(tmp_path, **HELD | {"fair": POINTS[:2]})
    running = [*TRIALS[:3], trial("t002", "poor", 0, 0.1, running=True), *TRIALS[4:]]
    # One trial runs, and one may be promoted. Its second rung does not need the shorter checkpoint.
    assert removed(keeper(tmp_path, 1).surplus(running, {"t003"})) == [("odd", 768), ("fair", 768)]
    straight = [*TRIALS[:5], trial("t004", "odd", running=True, straight=True)]
    assert ("odd", 768) not in removed(keeper(tmp_path, 1).surplus(straight, ()))


def test_a_trial_of_its_own_stage_is_protected_by_its_name(tmp_path: Path) -> None:
    store(tmp_path, t000=(768,), t001=(768,))
    trials = [trial("t000", "", 0, 0.5), trial("t001", "", 0, 0.4, running=True)]
    assert removed(keeper(tmp_path, 1).surplus(trials, ())) == [("t000", 768)]


def test_at_the_end_the_best_few_are_left(tmp_path: Path) -> None:
    store(tmp_path, **HELD)
    found = keeper(tmp_path, None).spare(TRIALS)
    assert {stage for stage, _ in removed(found)} == {"poor", "fair", "odd"}


@pytest.mark.parametrize(
    ("other", "waits"),
    [
        (trial("t008", "poor", 0, 0.2, running=True), True),  # on its way to the second rung
        (trial("b000", "poor", running=True, straight=True), True),
        (trial("t008", "poor", -1, running=True), False),  # it only goes to the first rung, which is passed
        (trial("t008", "poor", 0, 0.2), False),
        (trial("t008", "poor", 1, 0.2, running=True), False),  # its checkpoint exists
        (trial("t008", "fair", 0, 0.2, running=True), False),
    ],
)
def test_a_stretch_that_is_being_trained_is_waited_for(tmp_path: Path, other: TrialState, waits: bool) -> None:
    one = trial("t002", "poor", 0, 0.1)
    assert keeper(tmp_path, None).busy(one, [one, other]) == waits
