"""What a server reports about itself: the counters of llama.cpp and vLLM, under common names."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from autodistill.errors import ServiceError

# One sample of Prometheus's text format: a name, labels (samples that differ only in these are added up), and a value.
_SAMPLE = re.compile(r'^([a-zA-Z_:][\w:]*)(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)', re.MULTILINE)

_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama.cpp": {
        "prompt_tokens": "llamacpp:prompt_tokens_total",
        "answer_tokens": "llamacpp:tokens_predicted_total",
        "running": "llamacpp:requests_processing",
        "waiting": "llamacpp:requests_deferred",
        "drafted": "llamacpp:spec_decode_num_draft_tokens_total",
        "accepted": "llamacpp:spec_decode_num_accepted_tokens_total",
    },
    "vllm": {
        "prompt_tokens": "vllm:prompt_tokens_total",
        "answer_tokens": "vllm:generation_tokens_total",
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    },
}


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The counters of a server.

    Attributes:
        runtime: "llama.cpp" or "vllm".
        prompt_tokens, answer_tokens: Tokens read and written since the server started.
        running, waiting: Requests that are being answered, and requests that wait for a slot.
        drafted, accepted: Tokens that a draft model proposed since the server started, and how many of them were
            accepted; 0 without a draft.
    """

    runtime: str
    prompt_tokens: float
    answer_tokens: float
    running: float
    waiting: float
    drafted: float
    accepted: float

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted, or None if none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


def read_counters(text: str) -> Counters:
    """Read a page of metrics.

    Raises:
        ServiceError: The page is neither llama.cpp's nor vLLM's.
    """
    sums: dict[str, float] = defaultdict(float)
    for name, value in _SAMPLE.findall(text):
        sums[name] += _number(value)
    for runtime, names in _NAMES.items():
        if names["answer_tokens"] in sums:
            return Counters(runtime=runtime, **{field: sums.get(name, 0.0) for field, name in names.items()})
    raise ServiceError("its /metrics are neither llama.cpp's nor vLLM's: name the address of such a server")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
