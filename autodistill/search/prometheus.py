"""The gauges of a search for Prometheus, over HTTP on this machine alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autodistill.errors import InputError, MissingDependencyError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.callbacks import Callback, SearchFinished, SearchStarted
from autodistill.search.gauges import PREFIX, SearchGauges

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

HOST = "127.0.0.1"


class Endpoint(Callback):
    """Serves the gauges of one search over HTTP on loopback, from its creation until `close`.

    Before the search has a folder, only `autodistill_search_running` is served. The gauges of a resumed search continue
    from their last values.

    Args:
        port: The port to listen on, or 0 for any free port.
        cache: Folder that holds the teachers' outputs.
        cache_limit: Bytes that the teachers' outputs may take.

    Attributes:
        url: The address for Prometheus to read.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
        InputError: The port is in use, or is not a valid port.
    """

    def __init__(self, port: int, cache: Path, cache_limit: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise MissingDependencyError(
                "--metrics-port needs prometheus-client: pip install 'autodistill-search[monitor]'"
            ) from None
        self._gauges: SearchGauges | None = None
        self._running = 1
        self._reading = threading.Lock()
        self._cache, self._cache_limit = cache, cache_limit
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=HOST, registry=registry)
        except OverflowError:
            raise InputError(f"--metrics-port must be 0 to 65535, not {port}") from None
        except OSError as error:
            raise InputError(
                f"--metrics-port {port} cannot be listened on ({error.strerror}): stop the program that uses it, or "
                "give another port"
            ) from None
        self.url = f"http://{HOST}:{self._server.server_port}/metrics"

    def search_started(self, event: SearchStarted) -> None:
        """Read the log of the search's folder from now on."""
        run = RunFolder(event.run.parent, event.run.name)
        self._gauges = SearchGauges(run, self._cache, self._cache_limit)

    def search_finished(self, event: SearchFinished) -> None:
        """Mark the search as ended. Its last figures stay available."""
        self._running = 0

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Announce no gauges. Without this method, a registry would collect all gauges to find their names."""
        return ()

    def collect(self) -> list[GaugeMetricFamily]:
        """Return every gauge by the log at this moment."""
        with self._reading:  # each request runs in its own thread
            return list(self._families())

    def _families(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily(f"{PREFIX}running", "1 while the search runs, 0 once it has ended", self._running)
        for gauge in self._gauges.read() if self._gauges else ():
            family = GaugeMetricFamily(gauge.name, gauge.about, labels=gauge.labels)
            for key, value in gauge.values.items():
                family.add_metric(key, value)
            yield family
