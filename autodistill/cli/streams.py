"""Keep stdout for the one result, and stderr for what a person should read."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from autodistill.data.reasoning_gym import is_task

# Libraries read these when they are imported, here and in workers. A user's own settings take precedence.
_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",  # otherwise each retry of a dead connection prints a line
    "KINETO_LOG_LEVEL": "6",  # otherwise torch's profiler prints on stderr when it begins and ends
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_BUILT_IN = ("smollm2", "pydoc")
# The file descriptor of the real stdout. It changes while stdout is reserved.
_stdout = 1


def _local(reference: str) -> bool:
    return reference in _BUILT_IN or is_task(reference) or os.path.exists(os.path.expanduser(reference))


def quiet_libraries(*references: str | None) -> None:
    """Silence warnings and progress bars of the libraries. Call this before they are imported.

    Args:
        references: References of everything that will be read; None stands for a default. If none of them can be on a
            hub, the libraries are set to offline.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if all(ref is None or _local(ref) for ref in references):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)


def terminal_width() -> int | None:
    """Return the characters of a line of the terminal on stdout, or None if stdout is a pipe or a file."""
    with suppress(OSError):
        return os.get_terminal_size(_stdout).columns or None
    return None


@contextmanager
def stdout_reserved() -> Iterator[None]:
    """Within the block, send to stderr what this process, its libraries and its children print to stdout."""
    global _stdout
    sys.stdout.flush()
    saved = _stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = 1
        # Flush what is buffered before stdout is the result's again.
        with suppress(OSError):
            sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)
