"""Every exception a user meets, each with what to do next."""

from __future__ import annotations

_LONGEST = 900  # characters of a message: more of what somebody wrote buries what is wrong with it


def shortened(message: str) -> str:
    """The message without its middle, where that is very long."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"


class AutoDistillError(Exception):
    """Base of all errors shown to a user as one line.

    Args:
        message: What is wrong, and what to do about it, in one line. Of a very long one the middle is left out.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class InputError(AutoDistillError):
    """Bad usage or input, found before any work was spent."""

    exit_code = 2


class MissingDependencyError(InputError):
    """An optional package is not installed; the message holds the command that installs it."""


class ShortTimeError(InputError):
    """A time budget that holds no training at all.

    Args:
        message: With the least that would do, as it is typed.
        seconds: The least that would do.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DamagedError(InputError):
    """A file that was kept is not what was written: its checksum differs, or it is missing."""


class NothingFitsError(AutoDistillError):
    """No student fits the budget; the message names the nearest one and the limit it breaks."""

    exit_code = 3


class InterruptedSearchError(AutoDistillError):
    """A search was stopped by Ctrl-C; everything finished is kept.

    The message says what was exported, and holds the command that resumes.
    """

    exit_code = 130


class InterruptedWritingError(AutoDistillError):
    """Writing was stopped by Ctrl-C; all answers that came are kept, and the same command goes on with the rest."""

    exit_code = 130


class LostClusterError(AutoDistillError):
    """Ray itself ended under a search; everything finished is kept, and the message holds the command that resumes."""


class TrialFailedError(AutoDistillError):
    """A trial ended without a result; the search records `cause` and goes on.

    Args:
        cause: One of "nan", "out-of-memory", "disk-full", "worker-died", "refused" (by a check), "command" (a person's
            own metric), "error".
        message: What happened.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[TrialFailedError], tuple[str, str]]:
        # Exceptions cross process boundaries by pickle, which would otherwise call __init__ with the message alone.
        return type(self), (self.cause, str(self))


class NotFiniteError(TrialFailedError):
    """The logits that an answer is written by are not finite.

    Args:
        place: Of the prompt among those that were given.
    """

    def __init__(self, place: int) -> None:
        super().__init__("nan", "the logits that an answer is written by are not finite")
        self.place = place

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int]]:  # type: ignore[override]
        return type(self), (self.place,)


class WritingError(AutoDistillError):
    """A local teacher cannot answer a prompt; answers that it wrote before are kept."""


class EndpointError(AutoDistillError):
    """An endpoint was not reached, refused, or answered nonsense; answers that it gave before are kept."""


class RefusedPromptError(EndpointError):
    """An endpoint refused one prompt, as one that is too long for it; others may be answered."""


class ServiceError(AutoDistillError):
    """A server did not start, died again and again, or was not reached; or it refused or answered nonsense."""


class RemoteError(AutoDistillError):
    """A board was not reached, refused, or took too long; nothing is left behind on it where it still answers."""


class VerificationError(AutoDistillError):
    """An exported artifact, loaded again, is not what was evaluated."""


class RuntimeDiffersError(VerificationError):
    """A runtime does not do with an exported artifact, whose weights are right, what the evaluated student does."""
