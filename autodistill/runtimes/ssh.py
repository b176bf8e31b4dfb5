"""A board reached over ssh: copy a file to it, run a script there, and remove everything again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from autodistill.errors import InputError, MissingDependencyError, RemoteError

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}|[0-9a-fA-F:]+(?:%[\w.]+)?", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_CONNECT_SECONDS = 15
_TIDY_SECONDS = 30.0
_SSH_FAILED = 255  # ssh's own exit code; any other is the remote command's
_ADVICE = (
    ("Permission denied", "give the board your key (ssh-copy-id), or name it in an --ssh-config"),
    ("Host key verification failed", "connect to it once by hand, or check that it is the board you mean"),
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "check that it is the board you mean"),
    ("Could not resolve", "check the name"),
    ("Connection refused", "start its ssh server, or check the port"),
    ("timed out", "check that it is on and can be reached"),
    ("No route", "check that it is on and can be reached"),
)


@dataclass(frozen=True, kw_only=True)
class Board:
    """The address of a board.

    Attributes:
        host: Name or address.
        user: User name; None for ssh's default.
        port: Port; None for ssh's default.
        config: A file of ssh settings to use instead of the user's own; None for the user's own.
    """

    host: str
    user: str | None = None
    port: int | None = None
    config: Path | None = None

    @property
    def name(self) -> str:
        """The address as a user would type it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")

    def command(self, remote: str) -> list[str]:
        """Return the ssh command line that runs `remote` on the board without asking the user anything."""
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", "-T"]
        if self.config is not None:
            options += ["-F", str(self.config)]
        if self.port is not None:
            options += ["-p", str(self.port)]
        target = f"{self.user}@{self.host}" if self.user else self.host
        return ["ssh", *options, "--", target, remote]


def parse_board(text: str, config: Path | None = None) -> Board:
    """Read "ssh://[user@]HOST[:port]".

    Raises:
        InputError: The text has another form.
    """
    example = "write it like ssh://pi@raspberrypi.local or ssh://10.0.0.7:2222"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise InputError(f"{text!r} is no board: {example}") from None
    # `hostname` is in lower case, which does not matter for names. A password would show in a list of processes.
    plain = parts.scheme == "ssh" and parts.path in ("", "/") and not parts.query and not parts.fragment
    if not plain or parts.password is not None or not _HOST.fullmatch(host) or port == 0:
        raise InputError(f"{text!r} is no board: {example}")
    if parts.username is not None and not _USER.fullmatch(parts.username):
        raise InputError(f"{text!r} has no user's name before the @: {example}")
    if config is not None and not config.is_file():
        raise InputError(f"there is no file {config} of ssh's settings: give one, or leave --ssh-config out")
    return Board(host=host, user=parts.username, port=port, config=config)


def run_on(board: Board, script: str, student: Path, bench: str | None, timeout: float) -> tuple[str, str | None]:
    """Run a script on a board with the student's file as its argument. If it is given up, stop it on the board.

    Args:
        board: The board.
        script: A POSIX shell script. Its arguments are the student's file and, if given, `bench`.
        student: The file, which is copied into a new folder on the board. The folder is removed afterwards.
        bench: Path of a program on the board.
        timeout: Seconds that copying and running may each take.

    Returns:
        What the script printed, and why the folder may still be on the board, or None if it was removed.

    Raises:
        MissingDependencyError: ssh is not installed.
        RemoteError: The board cannot be reached, refuses, has no room, or takes too long.
    """
    if shutil.which("ssh") is None:
        raise MissingDependencyError("reaching a board needs ssh: install OpenSSH's client, or use --script")
    folder = _ask(board, 'd=$(mktemp -d "${TMPDIR:-/tmp}/autodistill.XXXXXX") && echo "$d"', "", timeout).strip()
    if not folder.startswith("/") or "\n" in folder:
        raise RemoteError(f"{board.name} made no folder for the student but said {folder[:80]!r}: look at its shell")
    quoted = shlex.quote(folder)
    try:
        with student.open("rb") as file:
            _finished(board, f"cat > {quoted}/student.gguf", file, timeout)
        arguments = f" {shlex.quote(bench)}" if bench else ""
        # The script prints what failed.
        run = f"echo $$ > {quoted}/pid; exec sh -s {quoted}/student.gguf{arguments}"
        said = _ask(board, run, script, timeout, failing=True)
    except BaseException:
        # When ssh ends here, nothing ends on the board. Only the first error is reported.
        with suppress(RemoteError):
            _ask(board, f"kill $(cat {quoted}/pid); rm -rf {quoted}", "", _TIDY_SECONDS, failing=True)
        raise
    try:
        _ask(board, f"rm -rf {quoted}", "", _TIDY_SECONDS)
    except RemoteError as error:
        return said, f"{folder} may still be on the board, as it could not be removed: {error}"
    return said, None


def _ask(board: Board, remote: str, given: str, timeout: float, *, failing: bool = False) -> str:
    """Return what a remote command printed; with `failing`, also if it failed."""
    try:
        done = subprocess.run(board.command(remote), input=given.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RemoteError(_slow(board, timeout)) from None
    return _checked(board, done, failing=failing)


def _finished(board: Board, remote: str, file: object, timeout: float) -> None:
    try:
        done = subprocess.run(board.command(remote), stdin=file, capture_output=True, timeout=timeout)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise RemoteError(_slow(board, timeout)) from None
    _checked(board, done, failing=False)


def _checked(board: Board, done: subprocess.CompletedProcess[bytes], *, failing: bool) -> str:
    said = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode == _SSH_FAILED:
        advice = next((what for words, what in _ADVICE if words in said), "try it with ssh by hand")
        raise RemoteError(f"{board.name} cannot be reached ({_last(said)}): {advice}")
    if done.returncode and not failing:
        raise RemoteError(f"{board.name} refused ({_last(said) or f'exit status {done.returncode}'})")
    return done.stdout.decode("utf-8", "replace")


def _last(said: str) -> str:
    return said.splitlines()[-1].strip() if said else ""


def _slow(board: Board, timeout: float) -> str:
    return f"{board.name} took longer than {timeout:.0f} s: raise --timeout, or ask for fewer tokens"
