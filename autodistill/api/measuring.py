"""`measure` and `profile`: the speed and memory of a student, and where the time of training or serving goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autodistill.advisor.measure_request import MeasureRequest
from autodistill.api.parameters import takes
from autodistill.profiling.request import ProfileRequest
from autodistill.profiling.request import profile as profiled


@takes(MeasureRequest, "measure")
def measure(*, notify: Callable[[str], None] = lambda line: None, **options: Any) -> dict[str, Any]:
    """Measure a student's speed and memory, here or on a board with llama-bench. pick uses the results.

    Returns:
        Plain data: what was measured and what had been predicted; of `script`, where it was written; with `blocks`,
        the times of a model's blocks.

    Raises:
        InputError: A student that cannot be read, arguments that change nothing here, or a busy machine.
        RemoteError: A board that is not reached, or fails.
    """
    request = MeasureRequest(**options)
    from autodistill.advisor.measure import measure as measured

    return measured(request, notify)


@takes(ProfileRequest, "profile")
def profile(*, notify: Callable[[str], None] = lambda line: None, **options: Any) -> dict[str, Any]:
    """Trace a training step or serving: where the time goes, how far that is from a lower bound, and what to do.

    Returns:
        Plain data: times by part beside the least that the machine allows, counts, and advice; as `profile.json` has
        them beside the trace.

    Raises:
        InputError: No such strategy or model, a folder that cannot be written, or sizes that do not fit each other.
    """
    return profiled(ProfileRequest(**options), notify)
