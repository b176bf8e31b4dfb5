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
        Plain data: the measurements and the predictions. With `script`: where the script was written. With `blocks`:
        the times of a model's blocks.

    Raises:
        InputError: The student cannot be read, an argument has no effect here, or the machine is busy.
        RemoteError: The board cannot be reached, or fails.
    """
    request = MeasureRequest(**options)
    from autodistill.advisor.measure import measure as measured

    return measured(request, notify)


@takes(ProfileRequest, "profile")
def profile(*, notify: Callable[[str], None] = lambda line: None, **options: Any) -> dict[str, Any]:
    """Trace a training step or serving: where the time goes, how far that is from a lower bound, and what to do.

    Returns:
        Plain data: the time of each part with the lower bound on this machine, counts, and advice. `profile.json`, next
        to the trace, has the same data.

    Raises:
        InputError: There is no such strategy or model, the folder cannot be written, or sizes do not fit each other.
    """
    return profiled(ProfileRequest(**options), notify)
