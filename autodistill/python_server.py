"""A folder served by transformers or vLLM, in a process of its own, for timing it and for the memory that it takes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.process_memory import forget_peak, peak_memory

_CHILD = Path(__file__).with_name("python_server_child.py")
_STOP_SECONDS = 10
RUNTIMES = ("transformers", "vllm")


class PythonServer:
    """A folder loaded by transformers or vLLM, for use in a `with` statement.

    Nothing is fetched: the hubs' libraries are told to stay offline, and no remote code is run.

    Args:
        path: The folder.
        runtime: One of `RUNTIMES`.
        context: Tokens of context of each sequence.
        threads: CPU threads.
        parallel: Sequences served at once.

    Raises:
        MissingDependencyError: The runtime is not installed.
        VerificationError: On entry, the folder could not be loaded; later, the runtime died. The message has its own
            last words.
    """

    def __init__(self, path: Path, runtime: str, context: int, threads: int, parallel: int = 1) -> None:
        if runtime not in RUNTIMES:
            raise InputError(f"no folder is served by {runtime!r} here; it can be {', '.join(RUNTIMES)}")
        if importlib.util.find_spec(runtime) is None:
            raise MissingDependencyError(f"serving this folder needs {runtime}: pip install {runtime}")
        self._path, self._runtime = path, runtime
        self._settings = {
            "path": str(path.resolve()),
            "runtime": runtime,
            "context": context,
            "threads": threads,
            "parallel": parallel,
        }

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="autodistill-serve-")
        self._log = Path(self._folder.name, "log")
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
        threads = {"OMP_NUM_THREADS": str(self._settings["threads"])}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), json.dumps(self._settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._folder.name,
                env=os.environ | offline | threads,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the caller alone, which then ends the child in order
            )
        try:
            self._device = self._answer(f"{self._runtime} could not load {self._path.name}")["device"]
            forget_peak(self._process.pid)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def accelerated(self) -> bool:
        """Whether a GPU runs it."""
        return bool(self._device != "cpu")

    def begin(self, prompts: Sequence[Sequence[int]]) -> float:
        """Reads prompts of one length that arrive at once.

        Returns:
            Seconds until each has its first token.
        """
        return float(self._ask({"do": "begin", "prompts": [list(prompt) for prompt in prompts]})["seconds"])

    def step(self) -> float:
        """Adds a token to each of the streams that were begun.

        Returns:
            Seconds that it took.
        """
        return float(self._ask({"do": "step"})["seconds"])

    def used_seconds(self) -> float:
        """CPU seconds that the runtime and this process have used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system + time.process_time()

    def peak_bytes(self) -> int:
        """The most memory that it had since it was loaded: of the GPU where one runs it, else of its process."""
        found = self._ask({"do": "nothing"})["peak_bytes"]
        return peak_memory(self._process.pid) if found is None else int(found)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        # Where the child has died, the missing answer says so, with its last words.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(f"{self._runtime} died while it ran {self._path.name}")

    def _answer(self, failure: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise VerificationError(f"{failure}: {said[-1].strip() if said else 'it left no log'} (exit status {code})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A dead child has never read what is left in the pipe.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
