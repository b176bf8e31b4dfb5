"""Reads the commands of a page's shell blocks, and types them one after the other as a reader does."""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autodistill.cli.app import main

ROOT = Path(__file__).parents[2]
# README.zh-CN.md has the code of README.md (tests/benchmarks/test_translation.py), and docs/decisions have none.
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "decisions"]
_BLOCK = re.compile(r"^( *)```(sh|console)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^\(exit code (\d+)\)$", re.MULTILINE)
_SERVED = "web page: "
_STARTING_SECONDS = 300.0


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        place: Its page and line, such as "docs/start.md:5".
        words: Its words.
        code: The exit code that the page shows, 0 if it shows none.
    """

    place: str
    words: tuple[str, ...]
    code: int = 0

    @property
    def verb(self) -> str:
        """The command of `autodistill` that it is, or ""."""
        ours = self.words[0].rpartition("/")[2] == "autodistill" and len(self.words) > 1
        return self.words[1] if ours else ""

    @property
    def text(self) -> str:
        """The words as they are typed."""
        return shlex.join(self.words)


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page's blocks in order.

    In a `sh` block each line is typed. In a `console` block a line after "$ " is typed, and the rest is what is
    printed; a last line "(exit code N)" is its exit code.
    """
    text = page.read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(3)) + 1
        shown = _CODE.search(block[3])
        for number, line in enumerate(textwrap.dedent(block[3]).splitlines(), first):
            if block[2] == "console" and not line.startswith("$ "):
                continue
            place = f"{page.relative_to(ROOT)}:{number}"
            for words in _parted(line.removeprefix("$ ")):
                yield Command(place, words, int(shown[1]) if shown else 0)


def _parted(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command of a line, without the file that its input is."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    reader.whitespace_split = True
    words: list[str] = []
    for word in itertools.chain(reader, ";"):
        if word in ("&&", ";", "&"):
            if words:
                yield tuple(words)
            words = []
        elif word == "<":
            next(reader)
        elif set(word) <= set("&|;<>"):
            raise ValueError(f"{word} of {line!r} is not understood here")
        else:
            words.append(word)


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the words without some options and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word not in options:
            kept.append(word)
        skip = not skip and word in options
    return kept


@dataclass
class Reader:
    """Types commands in a folder, which is the working folder. Servers run until `leave`, others to their end.

    Attributes:
        folder: The folder.
        patch: Sets what a page exports.
        env: The environment of other processes.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    env: Mapping[str, str]
    _servers: list[tuple[str, subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def types(self, words: Sequence[str], stdin: str = "") -> tuple[int | None, str]:
        """Run a command and return its exit code, None of a server, and the end of what it printed."""
        if words[0] == "export":
            for word in words[1:]:
                self.patch.setenv(*word.split("=", 1))
            return 0, ""
        if words[0] == "autodistill" and words[1] != "serve":
            return self._runs(words[1:], stdin)
        if words[0] == "autodistill":
            return self._serves(words)
        raise ValueError(f"{words[0]} is no command of ours")

    def _runs(self, words: Sequence[str], stdin: str) -> tuple[int, str]:
        """Run a command of ours in this process."""
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            code = main(words)
        return code, printed.getvalue()[-3000:]

    def _serves(self, words: Sequence[str]) -> tuple[int | None, str]:
        """Start a server, and wait until it answers."""
        log = self.folder / f"served-{len(self._servers)}"
        call = [sys.executable, "-m", "autodistill", *words[1:]]
        with log.open("wb") as file:
            server = subprocess.Popen(call, stdout=file, stderr=file, env={**os.environ, **self.env})
        self._servers.append((shlex.join(words), server, log))
        ends = time.monotonic() + _STARTING_SECONDS
        while _SERVED not in log.read_text() and server.poll() is None and time.monotonic() < ends:
            time.sleep(0.1)
        return server.poll(), log.read_text()[-3000:]

    def leave(self) -> dict[str, tuple[int, str]]:
        """Press Ctrl-C in each server, and return its exit code and the end of what it printed."""
        for _, server, _ in self._servers:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
        return {text: (server.wait(60), log.read_text()[-3000:]) for text, server, log in self._servers}
