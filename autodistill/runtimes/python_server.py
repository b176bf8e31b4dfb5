"""A folder served by transformers, vLLM or ONNX Runtime in a child process, to measure its time and memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from autodistill.errors import InputError, MissingDependencyError
from autodistill.hardware.process_memory import forget_peak, peak_memory
from autodistill.runtimes.json_child import JsonChild

_CHILD = Path(__file__).with_name("python_server_child.py")
RUNTIMES = ("transformers", "vllm", "onnxruntime")


class PythonServer:
    """A folder loaded by transformers, vLLM or ONNX Runtime, for use in a `with` statement.

    Nothing is downloaded: the libraries of the hubs are set to offline, and no remote code runs.

    Args:
        path: The folder.
        runtime: One of `RUNTIMES`.
        context: Tokens of context of each sequence.
        threads: CPU threads.
        parallel: Sequences served at once.

    Raises:
        MissingDependencyError: The runtime is not installed.
        VerificationError: On entry, the folder could not be loaded; later, the runtime died. The message has its last
            words.
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
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = os.environ | offline | {"OMP_NUM_THREADS": str(self._settings["threads"])}
        failure = f"{self._runtime} could not load {self._path.name}"
        self._child = JsonChild(_CHILD, self._settings, environment, failure, _last_words)
        try:
            forget_peak(self._child.pid)
        except BaseException:
            self._child.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    @property
    def accelerated(self) -> bool:
        """Whether a GPU runs the model."""
        return bool(self._child.ready["device"] != "cpu")

    def begin(self, prompts: Sequence[Sequence[int]]) -> float:
        """Read prompts of one length that arrive at once.

        Returns:
            Seconds until each prompt has its first token.
        """
        return float(self._ask({"do": "begin", "prompts": [list(prompt) for prompt in prompts]})["seconds"])

    def step(self) -> float:
        """Add a token to each stream that was begun.

        Returns:
            Seconds that the step took.
        """
        return float(self._ask({"do": "step"})["seconds"])

    def used_seconds(self) -> float:
        """Return the CPU seconds that the runtime and this process have used."""
        return self._child.used_seconds()

    def peak_bytes(self) -> int:
        """Return the peak memory since loading: the GPU's if one is used, otherwise the process's."""
        found = self._ask({"do": "nothing"})["peak_bytes"]
        return peak_memory(self._child.pid) if found is None else int(found)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._child.ask(request, f"{self._runtime} died while it ran {self._path.name}")
        return answer


def _last_words(log: str) -> str:
    lines = log.strip().splitlines()
    return lines[-1].strip() if lines else "it left no log"
