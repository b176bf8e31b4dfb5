"""Nothing but the result reaches stdout, whoever prints; libraries are quiet, and offline where nothing is on a hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.cli.streams import quiet_libraries, stdout_reserved


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
