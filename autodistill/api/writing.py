"""`write`: save a teacher's answers as training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autodistill.api.parameters import takes
from autodistill.data.documents import check_prompts_reference
from autodistill.distillation.teacher.resolve import locate
from autodistill.distillation.teacher.write_request import WriteRequest


@takes(WriteRequest, "write")
def write(*, notify: Callable[[str], None] = lambda line: None, **options: Any) -> dict[str, Any]:
    """Let a teacher answer prompts, as training data. An endpoint's key is read from AUTODISTILL_API_KEY.

    Returns:
        Plain data: how many prompts were answered, and what happened to the others.

    Raises:
        InputError: There are no such prompts, there is no such teacher, or arguments contradict each other.
    """
    request = WriteRequest(**options)
    check_prompts_reference(str(request.prompts))
    if request.teacher is not None:
        locate(str(request.teacher))
    # Prompts and teacher exist. Only now import the engines, which takes seconds.
    from autodistill.distillation.teacher.write_data import write_data

    return write_data(request, notify)
