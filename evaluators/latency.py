"""Latency of the exported student in llama.cpp: time to first token, and decode time of each token after it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import psutil

from autodistill.contracts import Measurement, Needs, Quantity, Subject
from autodistill.llama_cpp import LlamaServer
from autodistill.strategy import Deployment

_PROMPT_TOKENS = 128
_DECODED_TOKENS = 64
_ROUNDS = 3


class Latency:
    """Measures "latency_ms" (95th percentile of decode time per token), "ttft_ms" (median) and "tokens_per_second".

    One stream, greedy, three rounds of a prompt of 128 tokens and 64 decoded ones, after one that warms up. llama.cpp's
    threads wait for each other, so the figures hold only where nothing else runs on their cores: the detail states the
    load average from before the measurement, beside threads and context.
    """

    name = "latency"
    needs: Needs = "artefact"
    measures: Mapping[str, Quantity] = {
        "latency_ms": Quantity("ms", "min"),
        "ttft_ms": Quantity("ms", "min"),
        "tokens_per_second": Quantity("tokens/s", "max"),
    }

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Times the artefact.

        Raises:
            VerificationError: llama.cpp cannot load the artefact.
        """
        if subject.artefact is None:
            raise ValueError("latency is measured on an artefact, and the subject has none")
        load = psutil.getloadavg()[0]
        prompt = [index % subject.spec.vocabulary for index in range(_PROMPT_TOKENS)]
        with LlamaServer(subject.artefact, subject.budget.context, subject.threads) as server:
            _, *rounds = [server.time_tokens(prompt, _DECODED_TOKENS) for _ in range(_ROUNDS + 1)]
        steps = np.array([step for timing in rounds for step in timing.step_ms])
        p50, p95 = (float(value) for value in np.percentile(steps, (50, 95)))
        detail = {
            "runtime": "llama.cpp",
            "threads": subject.threads,
            "context": subject.budget.context,
            "streams": 1,
            "prompt_tokens": _PROMPT_TOKENS,
            "decoded_tokens": steps.size,
            "p50_ms": p50,
            "p95_ms": p95,
            "load_average": load,
        }
        first = float(np.median([timing.prompt_ms for timing in rounds]))
        rate = 1000 / float(np.mean(steps))
        return (
            Measurement(name="latency_ms", value=p95, unit="ms", direction="min", source="measured", detail=detail),
            Measurement(name="ttft_ms", value=first, unit="ms", direction="min", source="measured", detail=detail),
            Measurement(
                name="tokens_per_second",
                value=rate,
                unit="tokens/s",
                direction="max",
                source="measured",
                detail=detail,
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Whether llama.cpp serves the deployment."""
        return deployment.runtime == "llama.cpp"
