"""Ray's dashboard of a search, which asks for a token. While it is open, Ray also has the search's gauges."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from autodistill.errors import InputError, MissingDependencyError
from autodistill.search.gauges import SearchGauges

HOST = "127.0.0.1"
TOKEN_FILE = "dashboard-token"
"""Name of a file in the run's folder that only its owner can read. It exists as long as the dashboard does."""

_SECONDS = 5.0  # between two readings of the gauges; Ray reads them every ten seconds


def check_dashboard() -> None:
    """Refuse a dashboard that cannot run, or that would be open to everybody on this machine.

    Raises:
        MissingDependencyError: Ray's dashboard is not installed.
        InputError: Ray was set to ask for no token.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise InputError(
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} leaves Ray's dashboard open to all users of this machine: "
            "unset it, or leave out --dashboard"
        )
    try:
        import ray.dashboard.optional_deps  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "--dashboard needs all of Ray: pip install 'autodistill-search[dashboard]'"
        ) from None


class Dashboard:
    """Tells the user where Ray's dashboard is, and gives Ray the gauges of the search.

    Args:
        folder: Folder of the run.
        gauges: Gauges of the search.
        tell: Takes lines of text for the user.
    """

    def __init__(self, folder: Path, gauges: SearchGauges, tell: Callable[[str], None]) -> None:
        self._token, self._gauges, self._tell = folder / TOKEN_FILE, gauges, tell
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def opened(self, address: str, token: str | None) -> None:
        """Tell the user where the dashboard is, and give Ray the gauges from now on.

        Args:
            address: Host and port from this process's Ray.
            token: Token that the dashboard asks for; None if the user named one in Ray's own variables.
        """
        import ray

        (node,) = ray.nodes()
        metrics = f"http://{HOST}:{node['MetricsExportPort']}/metrics"
        self._tell(f"Ray's dashboard: http://{address} asks for the token {self._place(token)}")
        self._tell(f"Ray's own metrics: {metrics} asks for none, and answers this machine alone")
        self._thread = threading.Thread(target=self._hand_on, name="ray-gauges", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the token and stop the gauges. Ray ends next."""
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        self._token.unlink(missing_ok=True)

    def _place(self, token: str | None) -> str:
        """Return where the user finds the token: its own source, or a file that only its owner can read."""
        if token is None:
            return f"in {os.environ.get('RAY_AUTH_TOKEN_PATH', 'RAY_AUTH_TOKEN')}"
        self._token.unlink(missing_ok=True)
        with open(os.open(self._token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{token}\n")
        return f"in {self._token}"

    def _hand_on(self) -> None:
        """Give Ray the gauges every few seconds, until the dashboard closes."""
        from ray.util.metrics import Gauge

        known: dict[str, Gauge] = {}
        while True:
            # A file that is incomplete now will be complete at the next reading.
            with contextlib.suppress(InputError, OSError):
                for gauge in self._gauges.read():
                    shown = known.get(gauge.name) or Gauge(gauge.name, gauge.about, gauge.labels)
                    known[gauge.name] = shown
                    for key, value in gauge.values.items():
                        shown.set(value, dict(zip(gauge.labels, key, strict=True)))
            if self._leaving.wait(_SECONDS):
                return
