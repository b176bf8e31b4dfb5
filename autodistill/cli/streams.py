"""Keeps stdout for the one result, and stderr for what a person should read."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from autodistill.data.reasoning_gym import is_task

# Read by the libraries when they are imported, here and in workers; a person's own settings go before.
_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",  # or each retry of a dead connection is a line
    "KINETO_LOG_LEVEL": "6",  # of torch's profiler, which else says on stderr that it begins and ends
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_BUILT_IN = ("smollm2", "pydoc")
# The descriptor of the real stdout, which is another one while that is reserved.
_stdout = 1


def _local(reference: str) -> bool:
    return reference in _BUILT_IN or is_task(reference) or os.path.exists(os.path.expanduser(reference))


def quiet_libraries(*references: str | None) -> None:
    """Silence warnings and progress bars of the libraries; called before they are imported.

    Args:
        references: Of all that will be read, None for a default. Where none of them may lie on a hub, no hub is asked
            anything.
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
    """Characters of a line of the terminal that stdout is; None where it is none, as in a pipe or a file."""
    with suppress(OSError):
        return os.get_terminal_size(_stdout).columns or None
    return None


@contextmanager
def stdout_reserved() -> Iterator[None]:
    """Send to stderr what this process, its libraries and its children print to stdout within the block."""
    global _stdout
    sys.stdout.flush()
    saved = _stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = 1
        # C libraries that buffer write here, before stdout is the result's again.
        with suppress(OSError):
            sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)
