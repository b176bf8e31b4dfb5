"""Runs command lines fast: a process imports everything once, and forks itself for each of them.

A child does what `python -m autodistill` does, in a folder of its own. It is killed with everything that it started if
it takes too much time or memory. A child may also become that command itself, and import everything again. A different
result then is hidden, or caused, by the process that forks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import typer

from tests.hostile.cases import Case

SECONDS = 20.0
"""CPU seconds that a command may take.

Its wall time may be three times as long, and longer on a busy machine while it works: a command that has done nothing
for that long hangs.
"""
MEMORY = 1_500_000_000
"""Bytes that a command may take in addition to what it starts with."""
LINE = 1_000
"""Characters of an error's line. A longer line hides what is wrong."""
_PROGRESS = ("search", "distill", "write")
_ROOT = Path(__file__).parents[2]
_MAKING = threading.Lock()  # what cases share is made when a case first needs it


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command ended.

    Attributes:
        code: Its exit code, or None if it was killed because of time or memory.
        why: "time" or "memory" if it was killed, else "".
        stdout, stderr: What it printed.
        seconds: Wall time.
    """

    code: int | None
    why: str
    stdout: str
    stderr: str
    seconds: float

    def fault(self, case: Case) -> str | None:
        """Return what is wrong with the ending, or None if nothing is."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        if self.why:
            return f"ended for its {self.why} after {self.seconds:.1f}s; {' | '.join(lines[-3:])[-500:]}"
        if "Traceback (most recent call last)" in self.stderr:
            return f"traceback: {lines[-1][:300]}"
        if self.code not in case.codes:
            return f"exit code {self.code}, not {case.codes}: {' | '.join(lines[-3:])[-500:]}"
        if self.code == 0 or (case.command == "doctor" and self.stdout):
            return None  # doctor reports what is not ready, whatever its code
        if not lines or not lines[-1].startswith("error: "):
            return f"no error line: {self.stderr[-500:]!r}"
        if len(lines) > 1 and case.command not in _PROGRESS:
            return f"{len(lines)} lines: {' | '.join(lines)[:500]}"
        if len(lines[-1]) > LINE:
            return f"a line of {len(lines[-1])} characters: {lines[-1][:200]}"
        return None


class Server:
    """The process that forks. Use it as a context."""

    def __enter__(self) -> Server:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONDEVMODE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.server"],
            cwd=_ROOT,
            env=plain | offline,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, case: Case, folder: Path, fresh: bool = False) -> Ending:
        """Make the files of a case in an empty folder, and run its command there.

        Args:
            case: The case to run.
            folder: Folder that does not exist yet.
            fresh: Whether to run in a process that has imported nothing before.
        """
        folder.mkdir(parents=True)
        with _MAKING:
            case.make(folder)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": case.argv, "folder": str(folder), "fresh": fresh}) + "\n")
        self._process.stdin.flush()
        return Ending(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        replies.write(json.dumps(_forked(**json.loads(line))) + "\n")
        replies.flush()


def _import_all() -> None:
    """Import everything that a command may import, so that no child does it again.

    What is imported is excluded from garbage collection. A collection in a child would write to all of it, and so copy
    it.
    """
    gc.disable()
    from autodistill.cli.streams import quiet_libraries

    quiet_libraries()
    import importlib

    for name in (
        "autodistill.advisor.estimate",
        "autodistill.cli.app",
        "autodistill.advisor.describe",
        "autodistill.cli.doctor",
        "autodistill.evaluators.accuracy",
        "autodistill.cli.hardware_summary",
        "autodistill.cli.live",
        "autodistill.advisor.measure",
        "autodistill.advisor.pick",
        "autodistill.advisor.candidates",
        "autodistill.search.explain",
        "autodistill.search.finish.export_run",
        "autodistill.search.search",
        "autodistill.search.solve.run",
        "autodistill.advisor.estimate",
        "autodistill.distillation.teacher.write_data",
        "datasets",
        "evaluate",
        "gguf",
        "huggingface_hub.repocard",
        "jinja2.sandbox",
        "numba",
        "pyarrow.parquet",
        "pydoc_data.topics",
        "scipy.stats",
        "transformers.integrations.gguf.gguf_tokenizer_mapping",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.processing_auto",
        "transformers.models.gpt2.tokenization_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
        "transformers.pipelines",
    ):
        importlib.import_module(name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from autodistill.cli.app import main

    with contextlib.redirect_stdout(sys.stderr), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        typer.main.get_command = functools.cache(typer.main.get_command)
        main(["spaces", "no-such-space"])  # the parser of the command line is only made now, once for all children
    gc.freeze()
    gc.enable()


def _forked(argv: list[str], folder: str, fresh: bool = False) -> dict[str, Any]:
    out, err = Path(f"{folder}.stdout"), Path(f"{folder}.stderr")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_command(argv, folder, out, err, fresh)
    base, why, status = _resident(child), "", None
    worked, until = 0.0, 3 * SECONDS
    while status is None:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
            break
        spent = time.monotonic() - began
        if spent > 3 * SECONDS and (used := _used(child)) > worked:
            worked, until = used, spent + SECONDS
        why = "time" if spent > until else "memory" if _resident(child) - base > MEMORY else ""
        if why:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        time.sleep(0.005 if spent < 1 else 0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # processes that it started and left
    code: int | None = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        code, why = None, why or "time"
    texts = {
        name: path.read_text(encoding="utf-8", errors="replace") for name, path in (("stdout", out), ("stderr", err))
    }
    for path in (out, err):
        path.unlink()
    return {"code": code, "why": why, "seconds": time.monotonic() - began} | texts


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _used(process: int) -> float:
    """Return the CPU seconds that a process and those that it started have taken."""
    try:
        family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
        return sum(one.cpu_times().user + one.cpu_times().system for one in family)
    except psutil.Error:
        return 0.0


def _become_command(argv: list[str], folder: str, out: Path, err: Path, fresh: bool) -> None:
    """Turn this child into `python -m autodistill`."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ.update(
            HOME=folder, XDG_CACHE_HOME=f"{folder}/.cache", XDG_CONFIG_HOME=f"{folder}/.config", COLUMNS="200"
        )
        with open(os.devnull) as nothing, out.open("w") as stdout, err.open("w") as stderr:
            for file, number in ((nothing, 0), (stdout, 1), (stderr, 2)):
                os.dup2(file.fileno(), number)
        if fresh:
            os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            os.execv(sys.executable, [sys.executable, "-m", "autodistill", *argv])
        for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
            setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors=errors))
        sys.stdin = os.fdopen(os.dup(0), encoding="utf-8")
        sys.argv = ["autodistill", *argv]
        from autodistill.cli.app import main

        before = set(sys.modules)
        code = main()
        if os.environ.get("HOSTILE_IMPORTS"):
            print(*sorted(set(sys.modules) - before), file=sys.stderr)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
