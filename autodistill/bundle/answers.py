"""The questions of a smoke test, and the answers that were recorded at the export."""

from __future__ import annotations

from typing import Any

import numpy as np

from autodistill.bundle.exported import Exported
from autodistill.export.base import PROMPT_TOKENS, WRITTEN_TOKENS

_QUESTIONS = 24
_LONGEST = 64  # tokens of a prompt
_SHORTEST = 4
_EXACT = {"llama.cpp": 1.0, "vllm": 0.9, "onnxruntime": 1.0}


def answers(exported: Exported) -> dict[str, Any]:
    """Return the content of the file that `smoke_test.py` reads.

    Each question is a prompt of tokens, and the token that the evaluated student chooses after it. The places are those
    where its lead over every other token is largest, since all processors and kernels agree there. The text that was
    written at the export is asked for again, token by token, up to where the runtime and the evaluated student differ.

    Returns:
        Plain data. "least" is the share of answers that must be the same: all in llama.cpp and ONNX Runtime, which
        compute as at the export, and nine of ten in vLLM, which computes in 16 bits.
    """
    expected, promise = exported.expected, exported.promise
    room = min(promise.context - 1, _LONGEST)
    asked = []
    for sequence, place in _clearest(expected.leads, room):
        prompt = [int(token) for token in expected.sequences[sequence][: place + 1]]
        asked.append({"prompt": prompt, "answer": int(expected.top1[sequence][place])})
    prompt = [int(token) for token in expected.sequences[0][:PROMPT_TOKENS]]
    room = max(0, promise.context - len(prompt) - 1)
    return {
        "student": exported.name,
        "runtime": exported.runtime,
        "least": _EXACT[exported.runtime],
        "questions": asked,
        "written": {"prompt": prompt, "answer": list(exported.written[: min(room, WRITTEN_TOKENS)])},
    }


def _clearest(leads: Any, room: int) -> list[tuple[int, int]]:
    """Return sequence and place of the clearest choices in their order, equally many from each sequence."""
    each = -(-_QUESTIONS // len(leads))
    found = []
    for number, row in enumerate(leads):
        first = min(_SHORTEST, len(row)) - 1
        places = first + np.argsort(-row[first:room], kind="stable")[:each]
        found += [(number, int(place)) for place in sorted(places)]
    return found[:_QUESTIONS]
