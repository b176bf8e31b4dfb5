"""Latency of the exported student in the runtime that serves it: first tokens, tokens after them, whole answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autodistill.evaluation.base import Direction, Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.hardware.budget import DeviceBudget
from autodistill.hardware.machine import detect
from autodistill.runtimes.timing import Load, installed, time_serving
from autodistill.strategy.deployment import Deployment

_SECONDS = 60.0  # for all rounds, where a machine is starved: a search has a time of its own
_LIMITED_PROMPT = 512  # of prompts whose first token is limited, as is predicted of them


class Latency(Evaluator):
    """Measures "latency_ms" (95th percentile of decode time per token), "ttft_ms" (median), "answer_ms" (median) and
    "tokens_per_second" at one stream, and what the budget limits at its streams.

    Greedy, three answers of 48 tokens to a prompt of 64, after a short one that warms up; a budget that limits the
    first token has prompts of 512. Where these would take more than a minute, there are fewer, and one at least. The
    detail of each has all that was timed: first tokens by length of prompt, percentiles and rates by number of streams,
    in how many rounds, what the budget limits, threads, context, machine and runtime, and why the figures are doubtful
    where other work ran meanwhile, rounds differ or are few. Nothing of this project runs beside it: a search measures
    once its trials have ended and their workers are gone.
    """

    name = "latency"
    needs: Needs = "artifact"
    measures: Mapping[str, Quantity] = {
        "latency_ms": Quantity("ms", "min"),
        "ttft_ms": Quantity("ms", "min"),
        "answer_ms": Quantity("ms", "min"),
        "tokens_per_second": Quantity("tokens/s", "max"),
    }

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Measure the artifact's latency.

        Raises:
            VerificationError: The runtime cannot load the artifact.
        """
        if subject.artifact is None:
            raise ValueError("latency is measured on an artifact, and the subject has none")
        limits = subject.budget.latency if isinstance(subject.budget, DeviceBudget) else ()
        load = Load(seconds=_SECONDS, streams=tuple(sorted({1, *(limit.streams for limit in limits)})))
        if any(limit.quantity == "ttft" for limit in limits):
            load = replace(load, prompt=_LIMITED_PROMPT)
        timed = time_serving(
            subject.artifact,
            subject.deployment.runtime,
            load,
            vocabulary=subject.spec.vocabulary,
            context=min(subject.budget.context, subject.spec.max_context),
            threads=subject.threads,
            cache_types=subject.deployment.cache_types,
        )
        limited = {limit.name: 1e3 * timed.seconds(limit) for limit in limits}
        detail = timed.to_json() | {"limits": limited}
        alone = timed.alone
        figures: tuple[tuple[str, float, str, Direction], ...] = (
            ("latency_ms", alone.tpot_ms(95), "ms", "min"),
            ("ttft_ms", alone.ttft_ms(50), "ms", "min"),
            ("answer_ms", alone.answer_ms, "ms", "min"),
            ("tokens_per_second", alone.tokens_per_second, "tokens/s", "max"),
            *((name, milliseconds, "ms", "min") for name, milliseconds in limited.items()),
        )
        return tuple(
            Measurement(name=name, value=value, unit=unit, direction=direction, source="measured", detail=detail)
            for name, value, unit, direction in figures
        )

    def supports(self, deployment: Deployment) -> bool:
        """Return whether the runtime that serves the deployment is here."""
        if deployment.runtime == "vllm" and not detect().accelerator:
            return False
        return installed(deployment.runtime)
