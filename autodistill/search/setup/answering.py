"""Times the questions of tasks at an evaluation, and the making of the teacher's cached outputs and answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from autodistill.data.dataset import load_split
from autodistill.distillation.teacher.build_cache import writing_rate
from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.inference.batching import pass_tokens
from autodistill.inference.generation import BATCH_ON_ACCELERATOR, answer
from autodistill.inference.torch_memory import give_back_memory
from autodistill.search.planning.durations import Speed
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded
from autodistill.search.setup.teacher_phase import cache_settings
from autodistill.strategy.deployment import IN_16_BITS

# Share of the time budget that the tasks of one evaluation may take on a worker, in addition to scoring its tokens.
_ASKED_SHARE = 0.02

# Sequences whose questions are answered. In most data these are enough for a batch.
_ANSWERED = 16


def time_asked(
    config: SearchConfig, loaded: Loaded, teacher: Any, speed: Speed, time_budget: float | None
) -> tuple[Speed, float, tuple[str, ...]]:
    """Time a few examples of each task on the teacher, and decide how many examples an evaluation has time for.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        teacher: The model.
        speed: The measured speed.
        time_budget: Seconds of the time budget, or None.

    Returns:
        The speed with the seconds that tasks take in an evaluation, the share of the examples that is read, and notes.
    """
    asking = [item for item in config.requested.evaluators if not isinstance(item, str)]
    if not asking:
        return speed, 1.0, ()
    give_back_memory()
    model = teacher.to(loaded.device)
    data = load_split(loaded.data.folder, "validation").head(config.sequence_length)
    threads = torch.get_num_threads()
    torch.set_num_threads(loaded.workers.threads)
    fixed = scaled = 0.0
    notes = []

    def timed(item: Any, share: float) -> tuple[float, list[Measurement]]:
        """Return the seconds that an evaluator takes for a share of its examples, and its measurements."""
        began = time.perf_counter()
        evaluation, _ = evaluate(
            model,
            Subject(spec=loaded.spec, deployment=IN_16_BITS, budget=config.budget),
            data,
            None,
            evaluators=(item,),
            device=loaded.device,
            share=share,
            tokenizer=loaded.teacher.folder,
            scoring=config.scoring,
        )
        return time.perf_counter() - began, list(evaluation.measurements.values())

    try:
        for item in asking:
            seconds, found = timed(item, 0.0)
            counts = [one.detail["of"] for one in found if "of" in one.detail]
            if counts and loaded.device != "cpu":
                # On an accelerator a whole batch takes about as long as a few examples.
                seconds, found = timed(item, min(1.0, BATCH_ON_ACCELERATOR / max(counts)))
            for measurement in found:
                read, all_of = measurement.detail.get("examples"), measurement.detail.get("of")
                if all_of is None:
                    fixed += seconds
                else:
                    scaled += seconds * all_of / read
    except TrialFailedError as error:
        raise InputError(f"the metric command does not work on the teacher: {error}") from error
    finally:
        torch.set_num_threads(threads)
    share = (
        1.0 if time_budget is None or not scaled else min(1.0, max(0.0, _ASKED_SHARE * time_budget - fixed) / scaled)
    )
    if share < 1:
        notes.append(
            f"an evaluation reads {share:.0%} of the tasks' examples, 8 at least of each: the time budget allows no "
            "more; give it more --time"
        )
    return replace(speed, asked=fixed + scaled * share), share, tuple(notes)


@dataclass(frozen=True, kw_only=True)
class OutputsPace:
    """The measured pace of the teacher's outputs.

    Attributes:
        cache: Tokens per second that are written to the cache, or None if nothing is cached.
        answering: Seconds per validation token for answering questions; 0 if none are answered.
    """

    cache: float | None
    answering: float

    def into(self, speed: Speed) -> Speed:
        """Return the speed with these figures instead of those of a forward pass alone."""
        return replace(
            speed,
            cache=self.cache or speed.cache,
            score=1 / (1 / speed.score + self.answering),
            worker_score=1 / (1 / speed.worker_score + self.answering),
        )


def time_outputs(config: SearchConfig, loaded: Loaded, teacher: Any) -> OutputsPace:
    """Time caching and answering on the first sequences of the data. Only the figures are kept.

    Args:
        config: The checked request.
        loaded: Teacher and data; `loaded.device` is an accelerator.
        teacher: The model, which is left on that device.
    """
    teacher.to(loaded.device)
    settings = cache_settings(config.space, loaded.spec, loaded.workers.bf16 and loaded.bf16, None)
    cache, answering = None, 0.0
    if not settings.empty:
        some = load_split(loaded.data.folder, "train").head(pass_tokens(teacher, loaded.device))
        root = config.cache / "teacher-outputs"
        cache = writing_rate(teacher, some, settings, root, loaded.device)
    if config.requested.written:
        asked = load_split(loaded.data.folder, "validation").head(_ANSWERED * config.sequence_length)
        if asked.questions is not None:
            began = time.perf_counter()
            answer(teacher, asked.questions, context=config.budget.context, device=loaded.device)
            answering = (time.perf_counter() - began) / asked.tokens.size
    return OutputsPace(cache=cache, answering=answering)
