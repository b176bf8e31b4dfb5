"""The request to solve. This file loads no torch, so a typing error is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from autodistill.errors import InputError
from autodistill.evaluation.base import Scoring
from autodistill.hardware.budget import Budget, DeviceBudget
from autodistill.utils.plain_dataclass import check_choice, check_no_blank

RUNTIMES = ("llama.cpp", "onnxruntime", "vllm")
"""Runtimes that `solve` supports: by GGUF files, ONNX folders and compressed-tensors folders."""
_MOST_TOKENS = 10**16  # the same limit as for a search, far above any sensible value


@dataclass(frozen=True, kw_only=True)
class SolveRequest:
    """What to solve, for which budgets, and where the solution goes.

    Attributes:
        budgets: Limits of the process's memory at one context and batch, and perhaps on a device.
        cache: Folder of teachers, data and scores.
        teacher: A reference that `resolve_teacher` accepts.
        data: A reference that `resolve_data` accepts.
        tokens: Tokens of the calibration text, of which `coarse` reads a quarter. The held-out text has twice as many.
        coarse: Whether a first answer is enough: a quarter of the text is read, fewer shapes are measured, no types
            are exchanged, and the solution's errors are not compensated.
        sequence_length: Length of the sequences of both texts. Each sequence is read on its own. Longer sequences show
            more of the effect of the cache's types.
        out: Folder for the document, and for the solution if it is exported. None keeps nothing.
        export: Whether the solution is written and verified in its runtime.
        candidates: GGUF files of the same model. They are measured like the solution, and one may replace it.
        file_bytes: Limit of the weights in a file, or None for no limit.
        memory_bytes: Memory that solving itself may take, or None for all of this machine's or its GPU's.
        runtime: The runtime that will serve the solution, one of `RUNTIMES`.
        scoring: Precision of matrix products when text is scored.
        context_by_default: Whether the budgets' context is only the default, which a model's shorter context replaces.
    """

    budgets: tuple[Budget, ...]
    cache: Path
    teacher: str = "smollm2"
    data: str = "pydoc"
    tokens: int = 2048
    coarse: bool = False
    sequence_length: int = 256
    out: Path | None = None
    export: bool = False
    candidates: tuple[Path, ...] = ()
    file_bytes: int | None = None
    memory_bytes: int | None = None
    runtime: str = "llama.cpp"
    scoring: Scoring = "float32"
    context_by_default: bool = False

    def __post_init__(self) -> None:
        check_no_blank(self)
        if not self.budgets:
            raise InputError(
                "solve takes a budget: give --budget like 200MB, --sweep like 100MB..400MB, --device or --tiers"
            )
        if self.export and (self.out is None or len(self.budgets) > 1):
            raise InputError(
                "--export writes the solution of one budget into a folder: give --budget or --device, and --out"
            )
        if self.read_tokens < 2 * self.sequence_length or self.sequence_length < 2:
            read = f", a quarter of --tokens {self.tokens}," if self.coarse else ""
            raise InputError(
                f"{self.read_tokens} tokens{read} are fewer than two sequences of {self.sequence_length}, and an "
                "error needs two: give more --tokens"
            )
        if self.tokens > _MOST_TOKENS:
            raise InputError(f"--tokens must be at most {_MOST_TOKENS:,}")
        check_solved_for(self.runtime)
        check_choice("--scoring", self.scoring, get_args(Scoring))
        if self.candidates and self.runtime != "llama.cpp":
            raise InputError(f"candidates are GGUF files, which {self.runtime} does not serve: leave --candidate out")
        if self.file_bytes is not None and self.runtime == "onnxruntime":
            raise InputError(
                "ONNX Runtime holds weights in other bytes than its file does: leave --file-size out, a --budget "
                "limits what it holds"
            )
        for budget in self.budgets:
            if isinstance(budget, DeviceBudget) and (lacks := budget.device.lacks(self.runtime)):
                raise InputError(f"solutions are of {self.runtime}, and {lacks}: name another --device or --runtime")

    @property
    def read_tokens(self) -> int:
        """Tokens of the calibration text."""
        return self.tokens // 4 if self.coarse else self.tokens

    @property
    def thorough(self) -> bool:
        """Whether types are exchanged, more shapes measured, and errors compensated: for a single budget."""
        return len(self.budgets) == 1 and not self.coarse


def check_solved_for(runtime: str) -> None:
    """Refuse a runtime that `solve` does not support.

    Raises:
        InputError: The message names the supported runtimes.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"types are solved for {', '.join(RUNTIMES)}, not for {runtime!r}: name one of them")
