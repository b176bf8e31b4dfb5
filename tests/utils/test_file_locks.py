"""Only one process at a time makes what the others then find."""

import threading

import pytest

from autodistill.utils.file_locks import exclusive


def test_one_at_a_time_makes_what_others_find(tmp_path):
    made, inside = [], []

    def make():
        with exclusive(tmp_path / "folder" / "thing"):
            inside.append(1)
            assert len(inside) == 1
            if not (tmp_path / "folder" / "thing").exists():
                made.append(1)
                (tmp_path / "folder" / "thing").write_text("whole")
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert inside == []
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thing"]
    with pytest.raises(KeyError), exclusive(tmp_path / "folder" / "thing"):
        raise KeyError
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thing"]
