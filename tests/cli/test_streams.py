"""Only the result reaches stdout, whoever prints. Libraries are quiet, and offline if no input lies on a hub."""

import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from autodistill.cli.printing import line_width, table_width
from autodistill.cli.streams import quiet_libraries, stdout_reserved, terminal_width


def test_what_is_printed_meanwhile_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_reserved():
        print("by python")
        os.write(1, b"by a library\n")
        subprocess.run([sys.executable, "-c", "print('by a child')"], check=True)
    print("the result")
    captured = capfd.readouterr()
    assert captured.out == "the result\n"
    for words in ("by python", "by a library", "by a child"):
        assert words in captured.err


def test_the_width_is_that_of_the_terminal_that_stdout_is_though_stderr_is_a_wider_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table is made while stdout is reserved. Its descriptor is then that of stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)
    wide, narrow = (os.openpty() for _ in range(2))
    kept = [os.dup(1), os.dup(2)]
    try:
        for (_, terminal), columns in ((wide, 150), (narrow, 90)):
            termios.tcsetwinsize(terminal, (24, columns))
        os.dup2(narrow[1], 1)
        os.dup2(wide[1], 2)
        with stdout_reserved():
            on_terminal = (terminal_width(), line_width(), table_width())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with stdout_reserved():
            elsewhere = (terminal_width(), line_width(), table_width())
    finally:
        for place, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, place)
            os.close(descriptor)
        for descriptor in (*wide, *narrow):
            os.close(descriptor)
    assert on_terminal == (90, 90, 90)
    assert elsewhere == (None, 120, None)


def test_stdout_is_given_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with stdout_reserved():
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"


@pytest.mark.parametrize(
    ("references", "offline"),
    [
        ((), True),
        ((None, None), True),
        (("smollm2", "pydoc"), True),
        (("@", None), True),
        (("@", "reasoning-gym:chain_sum"), True),
        (("@", "owner/name"), False),
    ],
)
def test_a_hub_is_asked_only_for_what_is_on_one(
    references: tuple[str | None, ...], offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"TRANSFORMERS_VERBOSITY": "info"}
    monkeypatch.setattr(os, "environ", environ)
    quiet_libraries(*(str(tmp_path) if ref == "@" else ref for ref in references))
    assert (environ.get("HF_HUB_OFFLINE") == "1") == offline
    assert environ["TRANSFORMERS_VERBOSITY"] == "info", "a person's own setting goes before"
    assert environ["TOKENIZERS_PARALLELISM"] == "false"
