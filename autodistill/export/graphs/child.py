"""Runs an exported file in its runtime, in a separate process, which contains a crash of the runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import VerificationError
from autodistill.export.base import PROMPT_TOKENS, WRITTEN_TOKENS, Pace, Ran, TokenIds, check_written

_PROGRAM = Path(__file__).with_name("run_child.py")
_LINES = 3  # last lines of a runtime's output that a message has


def run_alone(runtime: str, path: Path, tokenizer: Path, sequences: TokenIds, threads: int) -> Ran:
    """Run a file that was just exported; see `Exporter.run`.

    Args:
        runtime: A runtime that `run_child.py` knows.
        path: The file.
        tokenizer: A folder with the tokenizer.
        sequences, threads: As for `Exporter.run`.

    Raises:
        VerificationError: The process failed; the message has its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="autodistill-run-") as folder:
        tokens, out = Path(folder, "tokens.npy"), Path(folder, "out.npz")
        np.save(tokens, sequences.astype(np.int64), allow_pickle=False)
        settings = {
            "runtime": runtime,
            "path": str(path.resolve()),
            "tokens": str(tokens),
            "out": str(out),
            "threads": threads,
            "prompt": PROMPT_TOKENS,
            "written": WRITTEN_TOKENS,
        }
        done = subprocess.run(
            [sys.executable, "-P", str(_PROGRAM), json.dumps(settings)],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            said = " / ".join(line.strip() for line in done.stderr.splitlines()[-_LINES:] if line.strip())
            raise VerificationError(
                f"{runtime} could not run {path} (exit status {done.returncode}): {said or 'it said nothing'}"
            )
        with np.load(out, allow_pickle=False) as found:
            top1, nll, written = (found[name] for name in ("top1", "nll", "written"))
            first, rate, used = (float(found[name]) for name in ("first_ms", "tokens_per_second", "cpu_ms"))
            pace = Pace(first, rate, used, int(found["peak_bytes"]))
    check_written(path, len(written))
    text = str(load_tokenizer(tokenizer).decode(written.tolist(), skip_special_tokens=True))
    return Ran(top1, nll, text, written=tuple(written.tolist()), pace=pace)
