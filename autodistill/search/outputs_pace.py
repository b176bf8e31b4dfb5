"""How fast an accelerator makes a teacher's outputs: those of its cache, written, and its answers to questions.

With many sequences in a pass the model itself is the smaller part of either. On a CPU it is nearly all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from autodistill.distillation.cache_making import writing_rate
from autodistill.distillation.generation import answer
from autodistill.distillation.parallel import pass_tokens
from autodistill.search.checked import Checked
from autodistill.search.expected import Speed
from autodistill.search.loading import Loaded
from autodistill.search.teacher_outputs import cache_settings
from autodistill.token_sets import load_split

# Sequences whose questions are answered: enough of them for a batch, in most data.
_ANSWERED = 16


@dataclass(frozen=True, kw_only=True)
class OutputsPace:
    """What was timed.

    Attributes:
        cache: Tokens of the cache per second; None where nothing is cached.
        answering: Seconds for each validation token whose questions are answered; 0 where none are.
    """

    cache: float | None
    answering: float

    def into(self, speed: Speed) -> Speed:
        """The speed with this in place of what a forward pass alone takes."""
        return replace(
            speed,
            cache=self.cache or speed.cache,
            score=1 / (1 / speed.score + self.answering),
            worker_score=1 / (1 / speed.worker_score + self.answering),
        )


def time_outputs(checked: Checked, loaded: Loaded, teacher: Any) -> OutputsPace:
    """Times both on the first sequences of the data, of which no more is kept than the figures.

    Args:
        checked: What is asked.
        loaded: Teacher and data; `loaded.device` is an accelerator.
        teacher: The model, which is left on that device.
    """
    teacher.to(loaded.device)
    settings = cache_settings(checked.space, loaded.spec, loaded.workers.bf16 and loaded.bf16, None)
    cache, answering = None, 0.0
    if not settings.empty:
        some = load_split(loaded.data.folder, "train").head(pass_tokens(teacher, loaded.device))
        root = checked.request.cache / "teacher-outputs"
        cache = writing_rate(teacher, some, settings, root, loaded.device)
    if checked.asked.written:
        asked = load_split(loaded.data.folder, "validation").head(_ANSWERED * checked.sequence_length)
        if asked.questions is not None:
            began = time.perf_counter()
            answer(teacher, asked.questions, context=checked.request.budget.context, device=loaded.device)
            answering = (time.perf_counter() - began) / asked.tokens.size
    return OutputsPace(cache=cache, answering=answering)
