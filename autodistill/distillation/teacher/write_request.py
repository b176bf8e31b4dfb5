"""The request of the `write` command. Its fields are the options of the command line and of Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from autodistill.errors import InputError
from autodistill.hardware.budget import check_streams
from autodistill.options import TEACHER, Cache, Option, counts_tokens, read_texts
from autodistill.units import parse_duration

_MOST_LOGPROBS = 20  # most log-probabilities per token that the endpoint's protocol allows


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """Describes what a teacher writes: the prompts, the file for the answers, the writer and the sampling."""

    prompts: Annotated[
        str | Path,
        Option(
            help="Prompts to answer: a .jsonl file, a .txt file with one prompt per line, or reasoning-gym:TASK.",
            metavar="REF",
        ),
    ]
    out: Annotated[
        str | Path, Option(help="The .jsonl file to write; answers already in it are kept.", metavar="FILE", typed=Path)
    ]
    teacher: Annotated[str | Path | None, TEACHER] = None
    endpoint: Annotated[
        str | None, Option(help="Address of an OpenAI-compatible API, like http://localhost:8000/v1.", metavar="URL")
    ] = None
    model: Annotated[str | None, Option(help="Name of the model at the endpoint.", metavar="NAME")] = None
    max_tokens: Annotated[
        str | int, counts_tokens("Longest answer; answers cut off here are not trained on.", minimum=1)
    ] = 256
    temperature: Annotated[float, Option(help="Sampling temperature; 0 takes the most likely token.", metavar="T")] = (
        0.0
    )
    top_p: Annotated[
        float, Option(help="Sample from the most likely tokens that add up to this probability.", metavar="P")
    ] = 1.0
    seed: Annotated[int, Option(help="Seed of the sampling.", metavar="N", minimum=0)] = 0
    top_k: Annotated[
        int, Option(help="Number of log-probabilities to request from the endpoint for each token.", metavar="N")
    ] = 0
    batch: Annotated[
        int | None,
        Option(
            help="Number of answers written at once (default: 8 at an endpoint, what suits the device here).",
            metavar="N",
        ),
    ] = None
    timeout: Annotated[
        str | float | None,
        Option(
            help="Give up a request to the endpoint after this long (default: 5m).",
            metavar="TIME",
            parse=parse_duration,
        ),
    ] = None
    cache: Cache = None

    def __post_init__(self) -> None:
        read_texts(self)
        if self.batch is not None:
            check_streams(self.batch, "--batch")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"--temperature must be 0 (the most likely token) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.top_k <= _MOST_LOGPROBS:
            raise InputError(f"--top-k must be 0 to {_MOST_LOGPROBS}, not {self.top_k}")
        if (self.endpoint is None) != (self.model is None):
            raise InputError("--endpoint and --model belong together: give both, or neither for a local teacher")
        if Path(self.out).suffix.lower() != ".jsonl":
            raise InputError(f"--out is a .jsonl file, not {self.out}")
        if self.endpoint is None and self.top_k:
            raise InputError(
                "--top-k is asked of an endpoint: a local teacher's outputs are cached when it is distilled"
            )
        if self.endpoint is None and self.timeout is not None:
            raise InputError("--timeout applies to requests to an endpoint: give --endpoint, or leave it out")
        for name in ("teacher", "cache") if self.endpoint is not None and not self.top_k else ():
            if getattr(self, name) is not None:
                raise InputError(f"--{name} is not used if an endpoint writes: leave it out, or ask it for --top-k")
