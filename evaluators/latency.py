"""Latency of the exported student in the runtime that serves it: first tokens, later tokens and whole answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autodistill.evaluation.base import Direction, Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.hardware.budget import DeviceBudget
from autodistill.hardware.machine import detect
from autodistill.runtimes.timing import Load, installed, time_serving
from autodistill.strategy.deployment import Deployment

_SECONDS = 60.0  # limit for all rounds on a slow machine, because a search has its own time budget
_LIMITED_PROMPT = 512  # tokens of the prompts if the first token is limited: predictions assume the same length


class Latency(Evaluator):
    """Measures latency at one stream, and the budget's latency limits at their numbers of streams.

    At one stream it measures "latency_ms" (95th percentile of decode time per token), "ttft_ms" (median), "answer_ms"
    (median) and "tokens_per_second".

    Decoding is greedy. After a short warm-up, five answers of 48 tokens follow a prompt of 64, or of 512 if the budget
    limits the first token. If this would take more than a minute, there are fewer answers, but at least one.

    The detail of each measurement has all that was timed: first tokens by length of prompt, percentiles and rates by
    number of streams, the number of rounds, the budget's limits, threads, context, machine and runtime. It also says if
    figures are doubtful, because other work ran at the same time, or because rounds differ or are few. Nothing of this
    project runs at the same time: a search measures after its trials and workers have ended.
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
            ("ttft_ms", timed.first_token_ms(50), "ms", "min"),
            ("answer_ms", alone.answer_ms, "ms", "min"),
            ("tokens_per_second", alone.tokens_per_second, "tokens/s", "max"),
            *((name, milliseconds, "ms", "min") for name, milliseconds in limited.items()),
        )
        return tuple(
            Measurement(name=name, value=value, unit=unit, direction=direction, source="measured", detail=detail)
            for name, value, unit, direction in figures
        )

    def supports(self, deployment: Deployment) -> bool:
        """Return whether the deployment's runtime is available on this machine."""
        if deployment.runtime == "vllm" and not detect().accelerator:
            return False
        return installed(deployment.runtime)
