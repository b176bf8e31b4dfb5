"""`write`: a teacher's answers, as training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from autodistill.api.paths import cache_folder
from autodistill.errors import InputError
from autodistill.options import TEACHER, Cache, Option
from autodistill.search.request.request import DEFAULT_TEACHER
from autodistill.units import parse_duration


def write(
    *,
    prompts: Annotated[
        str | Path,
        Option(
            help="Prompts to answer: a .jsonl file, a .txt file with one prompt per line, or reasoning-gym:TASK.",
            metavar="REF",
        ),
    ],
    out: Annotated[
        str | Path,
        Option(help="The .jsonl file to write; answers already in it are kept.", metavar="FILE", typed=Path),
    ],
    teacher: Annotated[str | Path | None, TEACHER] = None,
    endpoint: Annotated[
        str | None, Option(help="Address of an OpenAI-compatible API, like http://localhost:8000/v1.", metavar="URL")
    ] = None,
    model: Annotated[str | None, Option(help="Name of the model at the endpoint.", metavar="NAME")] = None,
    max_tokens: Annotated[
        int, Option(help="Longest answer; answers cut off here are not trained on.", metavar="N", typed=int)
    ] = 256,
    temperature: Annotated[
        float, Option(help="Sampling temperature; 0 takes the most likely token.", metavar="T", typed=float)
    ] = 0.0,
    top_p: Annotated[
        float,
        Option(help="Sample from the most likely tokens that add up to this probability.", metavar="P", typed=float),
    ] = 1.0,
    seed: Annotated[int, Option(help="Seed of the sampling.", metavar="N", typed=int, least=0)] = 0,
    top_k: Annotated[
        int,
        Option(help="Number of log-probabilities to request from the endpoint for each token.", metavar="N", typed=int),
    ] = 0,
    batch: Annotated[
        int | None,
        Option(
            help="Number of answers written at once (default: 8 at an endpoint, what suits the device here).",
            metavar="N",
            typed=int,
        ),
    ] = None,
    timeout: Annotated[
        str | float | None,
        Option(help="Give up a request to the endpoint after this long (default: 5m).", metavar="TIME"),
    ] = None,
    cache: Cache = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Let a teacher answer prompts, as training data. An endpoint's key is read from AUTODISTILL_API_KEY.

    Returns:
        Plain data: how many prompts were answered, and what became of the others.

    Raises:
        InputError: No such prompts or teacher, or arguments that contradict each other.
    """
    if endpoint is None and timeout is not None:
        raise InputError("--timeout applies to requests to an endpoint: give --endpoint, or leave it out")
    for name, value in (("teacher", teacher), ("cache", cache)) if endpoint is not None and not top_k else ():
        if value is not None:
            raise InputError(f"--{name} is not used where an endpoint writes: leave it out, or ask it for --top-k")
    seconds = 300.0 if timeout is None else parse_duration(timeout) if isinstance(timeout, str) else timeout
    from autodistill.distillation.teacher.write_data import WriteRequest, write_data
    from autodistill.inference.generation import Sampling

    request = WriteRequest(
        prompts=str(prompts),
        out=Path(out),
        teacher=DEFAULT_TEACHER if teacher is None else str(teacher),
        cache=cache_folder(cache),
        endpoint=endpoint,
        model=model,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        top_k=top_k,
        batch=batch,
        timeout=seconds,
    )
    return write_data(request, notify)
