"""The page of a transcript says what was printed, without this machine's paths, and whether the promise was kept."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.program import ROOT
from benchmarks.documents.transcript import Folder, Told, page


def told(name: str, printed: str = "", code: int | None = 0, load: float = 0.5) -> Told:
    return Told(words=(name, "x"), printed=printed, code=code, load=load)


def test_paths_colours_and_overwritten_lines_are_left_out(tmp_path: Path) -> None:
    text = f"\x1b[1mone\x1b[0m  \n50%\r100%\n{tmp_path}/runs/first and {ROOT}/docs, {tmp_path}, {Path.home()}/.cache"
    assert Folder(tmp_path).plain(text) == "one\n100%\nruns/first and docs, ., ~/.cache"


def test_the_page_says_whether_the_promise_was_kept_and_how_busy_the_machine_was() -> None:
    rest = [told("search", "found"), told("serve", "served", None)]
    last = [told("serve", "stopped"), told("bundle", "21 files"), told("bundle", "as they were")]
    kept = page([*rest, told("monitor", "OK"), told("load", "kept"), *last], 2)
    assert "`monitor` says that it was kept and `load` says that it was kept. Nothing else ran" in kept
    assert "```console\n$ autodistill serve x &\nserved\n```" in kept
    assert "exit code" not in kept
    busy = page([*rest, told("monitor", "OK", 4, 9.0), told("load", "no answer", 1), *last], 2)
    assert "`monitor` says that it was broken and `load` says that it was not judged (exit code 1)" in busy
    assert "up to 9 processes wanted the 2 cores" in busy
    assert "OK\n(exit code 4)\n```" in busy
    assert "^C\nstopped\n```\n\n## Hand it to others" in busy
    assert busy.rstrip().endswith(
        "$ autodistill bundle x\n21 files\n```\n\n```console\n$ autodistill bundle x\nas they were\n```"
    )
