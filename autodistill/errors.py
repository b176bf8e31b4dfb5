"""Exceptions that are shown to users, each with advice on what to do next."""

from __future__ import annotations

_LONGEST = 900  # characters of a message: a longer quotation of the user's input would hide what is wrong


def shortened(message: str) -> str:
    """Return the message, without its middle part if it is very long."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"


class AutoDistillError(Exception):
    """Base of all errors shown to a user as one line.

    Args:
        message: What is wrong, and what to do about it, in one line. A very long message is shortened in the middle.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class InputError(AutoDistillError):
    """Bad usage or input, found before any work was spent."""

    exit_code = 2


class MissingDependencyError(InputError):
    """An optional package is not installed. The message contains the command that installs it."""


class ShortTimeError(InputError):
    """A time budget that is too short for any training.

    Args:
        message: The message, which contains the shortest sufficient time in the form that a user types.
        seconds: The shortest sufficient time.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DamagedError(InputError):
    """A stored file is missing, or its checksum differs from when it was written."""


class LaterVersionError(InputError):
    """A stored file is intact, but a later version of autodistill wrote it."""


class NothingFitsError(AutoDistillError):
    """No student fits the budget. The message names the nearest one and the limit that it breaks."""

    exit_code = 3


class InterruptedSearchError(AutoDistillError):
    """A search was stopped by Ctrl-C. Everything finished is kept.

    The message says what was exported, and contains the command that resumes the search.
    """

    exit_code = 130


class InterruptedWritingError(AutoDistillError):
    """Writing was stopped by Ctrl-C. All answers so far are kept, and the same command continues with the rest."""

    exit_code = 130


class LostClusterError(AutoDistillError):
    """Ray itself ended during a search. Everything finished is kept. The message contains the command that resumes."""


class TrialFailedError(AutoDistillError):
    """A trial ended without a result. The search records `cause` and goes on.

    Args:
        cause: One of "nan", "out-of-memory", "disk-full", "worker-died", "refused" (by a check), "command" (the user's
            own metric), "error".
        message: What happened.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[TrialFailedError], tuple[str, str]]:
        # Exceptions cross process boundaries by pickle, which would otherwise call __init__ with only the message.
        return type(self), (self.cause, str(self))


class NotFiniteError(TrialFailedError):
    """The logits from which an answer is generated are not finite.

    Args:
        place: Index of the prompt among the given prompts.
    """

    def __init__(self, place: int) -> None:
        super().__init__("nan", "the logits that an answer is written by are not finite")
        self.place = place

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int]]:  # type: ignore[override]
        return type(self), (self.place,)


class WritingError(AutoDistillError):
    """A local teacher cannot answer a prompt. Its earlier answers are kept."""


class EndpointError(AutoDistillError):
    """An endpoint was not reached, refused, or gave an invalid answer. Its earlier answers are kept."""


class RefusedPromptError(EndpointError):
    """An endpoint refused one prompt, for example because it is too long. Other prompts may be answered."""


class ServiceError(AutoDistillError):
    """A server did not start, died repeatedly, was not reached, refused, or gave an invalid answer."""


class RemoteError(AutoDistillError):
    """A board was not reached, refused, or took too long. If it still answers, no files are left on it."""


class VerificationError(AutoDistillError):
    """An exported artifact, loaded again, differs from what was evaluated."""


class RuntimeDiffersError(VerificationError):
    """A runtime behaves differently from the evaluated student, although the exported weights are right."""
