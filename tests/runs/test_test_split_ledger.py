"""The ledger that records each opening of a test split."""

from pathlib import Path

from autodistill.runs.run_folder import RunFolder
from autodistill.runs.test_split_ledger import (
    opened,
    openings_in,
    openings_of,
    record_test_opening,
    recorded_test_openings,
)


def test_every_opening_of_a_test_split_is_on_record(tmp_path: Path) -> None:
    assert recorded_test_openings(tmp_path) == []
    record_test_opening(tmp_path, run="a", data="f1")
    record_test_opening(tmp_path, run="b", data="f2")
    record_test_opening(tmp_path, run="c", data="f1")
    assert [o["run"] for o in recorded_test_openings(tmp_path)] == ["a", "b", "c"]
    assert [o["run"] for o in recorded_test_openings(tmp_path, data="f1")] == ["a", "c"]
    assert all(o["time"].endswith("+00:00") for o in recorded_test_openings(tmp_path))


def test_openings_are_counted_by_run(tmp_path):
    search = {"data": {"fingerprint": "f1"}}
    assert opened(openings_of(tmp_path, search)) == "The test split of this data has not been used here."
    assert opened({"a": 1}) == "The test split of this data has been used once here, by a."
    for run, data in (("a", "f1"), ("b", "f2"), ("c", "f1"), ("a", "f1")):
        record_test_opening(tmp_path, run=run, data=data)
    assert openings_of(tmp_path, search) == {"a": 2, "c": 1}
    said = opened(openings_of(tmp_path, search))
    assert said == "The test split of this data has been used 3 times here, by a 2, c 1."
    assert openings_of(tmp_path, {}) == {}


def test_openings_by_a_run_on_another_machine_are_those_of_its_log(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "run") as run:
        for event in ("session", "teacher-row", "test", "test", "session", "session", "test", "teacher-row", "test"):
            run.events.append({"event": event})
        assert openings_in(run.events.all()) == 2
    search = {"name": "run", "data": {"fingerprint": "f1"}}
    assert openings_of(tmp_path, search) == {"run": 2}
    # Only the ledger knows of an opening that was killed before its first row.
    for _ in range(3):
        record_test_opening(tmp_path, run="run", data="f1")
    assert openings_of(tmp_path, search) == {"run": 3}
    assert openings_of(tmp_path, {**search, "name": "gone"}) == {"run": 3}
