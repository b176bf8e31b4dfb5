"""Write docs/transcript.md: one student from its search to a service that is monitored, loaded, judged, and bundled.

    python -m benchmarks.documents.transcript [--budget 210MB] [--time 10m] [--data TEXT] [--port 8080]

The commands are run one after the other in an empty folder. The page has the output of each, without the paths of this
machine. The server runs at the same time as its clients, and is stopped as by Ctrl-C. The exit codes of `monitor` and
`load` say whether the promise was kept, and the page reports any result. It also says how busy the machine was.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.common import program, report

PAGE = program.ROOT / "docs" / "transcript.md"
PROMISE_BROKEN = 4
EXPORT = "results/runs/first/student/gguf"
_STARTING_SECONDS = 300.0
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Told:
    """A command and its result.

    Attributes:
        words: Words of the command line, without the program's name.
        printed: Both of its output streams, in order.
        code: Its exit code, or None if it still runs.
        load: Processes that wanted a core in the minute before it.
    """

    words: tuple[str, ...]
    printed: str
    code: int | None
    load: float

    def block(self) -> str:
        """Return the command as a user typed it, and its output."""
        code = f"(exit code {self.code})\n" if self.code else ""
        behind = " &" if self.code is None else ""
        return f"```console\n$ autodistill {shlex.join(self.words)}{behind}\n{self.printed.rstrip()}\n{code}```"


class Folder:
    """An empty folder in which commands run. Its path does not appear in the page.

    Args:
        path: The folder's path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
        # The commands import the same code as this program.
        self._environment["PYTHONPATH"] = os.pathsep.join([str(program.ROOT), self._environment.get("PYTHONPATH", "")])

    def begin(self, words: Sequence[str], output: int | Path) -> subprocess.Popen[str]:
        """Start a command."""
        call = [sys.executable, "-m", "autodistill", *words]
        more = {"cwd": self.path, "env": self._environment, "stdin": subprocess.DEVNULL, "text": True}
        if isinstance(output, Path):
            with output.open("w") as file:
                return subprocess.Popen(call, stdout=file, stderr=file, **more)
        return subprocess.Popen(call, stdout=output, stderr=subprocess.STDOUT, **more)

    def run(self, *words: str) -> Told:
        """Run a command to its end."""
        load = psutil.getloadavg()[0]
        with self.begin(words, subprocess.PIPE) as process:
            printed, _ = process.communicate()
        print(f"{printed}\n{words[0]} ended with {process.returncode}", file=sys.stderr, flush=True)
        return Told(words=words, printed=self.plain(printed), code=process.returncode, load=load)

    def plain(self, text: str) -> str:
        """Return text as the page shows it: without colours, overwritten lines, and paths of this machine."""
        for place in (self.path, self.path.resolve()):
            text = text.replace(f"{place}/", "").replace(str(place), ".")
        text = text.replace(f"{program.ROOT}/", "").replace(str(Path.home()), "~")
        lines = (line.rpartition("\r")[2].rstrip() for line in _ESCAPES.sub("", text).split("\n"))
        return "\n".join(lines)


def told_of(folder: Folder, search: Sequence[str], port: int, seconds: tuple[str, str]) -> list[Told]:
    """Run all commands in order: a search, its student served, monitored and loaded, stopped, and bundled for others.

    Args:
        folder: The folder in which they run.
        search: Words of the search, whose run is named "first".
        port: The server's port.
        seconds: How long the server is monitored and loaded.
    """
    found = [folder.run(*search)]
    if found[0].code:
        sys.exit(f"the search ended with {found[0].code}: {found[0].printed[-2000:]}")
    key, url, output = ("--key-file", "key"), f"http://127.0.0.1:{port}", folder.path / "served"
    words = ("serve", EXPORT, "--port", str(port), *key)
    load = psutil.getloadavg()[0]
    server = folder.begin(words, output)
    try:
        ends = time.monotonic() + _STARTING_SECONDS
        while "web page: " not in output.read_text():
            if server.poll() is not None or time.monotonic() > ends:
                sys.exit(f"nothing is served: {output.read_text()[-2000:]}")
            time.sleep(0.1)
        begun = output.read_text()
        found.append(Told(words=words, printed=folder.plain(begun), code=None, load=load))
        found.append(folder.run("monitor", url, *key, "--promise", "first", "--time", seconds[0]))
        found.append(folder.run("load", url, *key, "--promise", "first", "--streams", "1,4", "--time", seconds[1]))
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.terminate()
            raise
    left = folder.plain(output.read_text()[len(begun) :])
    found.append(Told(words=("serve", "..."), printed=left, code=server.returncode, load=psutil.getloadavg()[0]))
    found.append(folder.run("bundle", EXPORT, "--out", "bundle"))
    found.append(folder.run("bundle", "--check", "bundle"))
    return found


def page(found: Sequence[Told], cores: int) -> str:
    """Return the page: every command with its output, and what its exit code says about the promise."""
    search, serve, monitor, load, stopped, bundle, check = found
    verdicts = {PROMISE_BROKEN: "broken", 0: "kept"}
    said = [
        f"`{one.words[0]}` says that it was {verdicts.get(one.code or 0, f'not judged (exit code {one.code})')}"
        for one in (monitor, load)
    ]
    busiest = max(one.load for one in found)
    quiet = (
        "Nothing else ran meanwhile."
        if busiest < cores + 1
        else f"Other work ran meanwhile: up to {busiest:.0f} processes wanted the {cores} cores, so times are no "
        "figures to quote, and a limit of time may break that a quiet machine keeps."
    )
    stop = f"```console\n^C\n{stopped.printed.strip()}\n```"
    parts = [
        "# From a search to a service",
        f"{datetime.now(UTC):%Y-%m-%d}, {report.machine()}.\nMade by `python -m benchmarks.documents.transcript`: "
        "these commands were run one after the other, and what they printed is here as it came, without this "
        "machine's paths.",
        f"Of the promise that the student was exported with {' and '.join(said)}. {quiet}",
        "## Search",
        search.block(),
        "## Serve, with the context, slots and cache of the export",
        serve.block(),
        "## Hold it to its promise",
        monitor.block(),
        "## Under load",
        load.block(),
        "## Stop",
        stop,
        "## Hand it to others, with all that serves, limits and watches it",
        bundle.block(),
        check.block(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the commands, and write the page."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--budget", default="210MB", help="of the search, 210MB by default")
    parser.add_argument("--time", default="10m", help="of the search, 10m by default")
    parser.add_argument("--data", default="", help="its text; the one that a search takes by default")
    parser.add_argument("--port", type=int, default=8080, help="of the server, 8080 by default; 0 takes a free one")
    given = program.parse(parser, port=0)
    # A shell without job control makes its background processes ignore Ctrl-C, and the server would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    search = ["search", "--budget", given.budget, *(("--data", given.data) if given.data else ())]
    search += ["--time", given.time, "--name", "first"]
    seconds = ("40s", "2m")
    if given.smoke:
        tiny = ["--teacher", program.tiny_teacher(heads=2, kv_heads=1), "--data", program.tiny_data()]
        small = ["--trials", "1", "--tokens", "512", "--runner", "inline", "--context", "256"]
        search, seconds = ["search", "--budget", "1GB", *tiny, *small, "--name", "first"], ("6s", "6s")
    with tempfile.TemporaryDirectory(prefix="transcript-") as place:
        found = told_of(Folder(Path(place)), search, given.port or _free_port(), seconds)
    path = program.REPORTS / PAGE.name if given.smoke else PAGE
    path.write_text(page(found, psutil.cpu_count() or 1), encoding="utf-8")
    print(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
