"""An endpoint for Prometheus with what llama.cpp's own lacks: percentiles of latency, memory, and the promise."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from autodistill.errors import InputError, MissingDependencyError
from autodistill.service.monitor import Report
from autodistill.service.window import PERCENTILES, Times


class Endpoint:
    """Serves the latest report on the loopback, within a `with` block.

    Args:
        port: Port to listen on; 0 takes any free one, which the attribute `port` then names.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
        InputError: The port is in use, or is not a valid port.
    """

    def __init__(self, port: int) -> None:
        if find_spec("prometheus_client") is None:
            raise MissingDependencyError(
                "--prometheus needs one more package: pip install 'autodistill-search[monitor]'"
            )
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(self)
        self._report: Report | None = None
        self._totals = {"first_token": (0, 0.0), "token": (0, 0.0)}
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OverflowError:
            raise InputError(f"--prometheus must be 0 to 65535, not {port}") from None
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            why = "is in use" if used else f"cannot be listened on ({error.strerror})"
            raise InputError(f"port {port} {why}: give another --prometheus") from None
        self.port = int(self._server.server_port)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def show(self, report: Report) -> None:
        """Show this report from now on, and add its last probe to the counts and sums."""
        last = report.last
        first = () if last.first_seconds is None else (last.first_seconds,)
        for name, found in (("first_token", first), ("token", last.token_seconds)):
            count, total = self._totals[name]
            self._totals[name] = (count + len(found), total + sum(found))
        self._report = report

    def describe(self) -> list[Any]:
        """Return nothing: the names of the metrics are only known after the first report."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics, as the registry asks for them."""
        from prometheus_client.core import GaugeMetricFamily

        report = self._report
        if report is None:
            return
        figures = report.figures
        yield self._summary("first_token", "Time to the first token of a probe, in seconds.", figures.first_token)
        yield self._summary("token", "Time of each later token of a probe, in seconds.", figures.token)
        gauges = (
            ("memory_bytes", "Resident memory of the server's processes.", figures.memory_bytes),
            ("tokens_per_second", "Tokens that it wrote a second, of all answers together.", figures.tokens_per_second),
            ("requests_waiting", "Requests that waited for a slot.", figures.waiting),
        )
        for name, help_text, value in gauges:
            if value is not None:
                yield GaugeMetricFamily(f"autodistill_{name}", help_text, value=value)
        known = [one for one in report.judged if one.kept is not None]
        if known:
            kept = GaugeMetricFamily(
                "autodistill_promise_kept",
                "Whether a figure of the promise is kept (1) or broken (0).",
                labels=["figure"],
            )
            for one in known:
                kept.add_metric([one.figure], float(bool(one.kept)))
            yield kept

    def _summary(self, name: str, help_text: str, times: Times) -> Any:
        """Return percentiles of the window, with count and sum since the start."""
        from prometheus_client import Metric

        found = Metric(f"autodistill_{name}_seconds", help_text, "summary")
        for percentile in PERCENTILES:
            value = getattr(times, f"p{percentile}")
            if value is not None:
                found.add_sample(found.name, {"quantile": f"{percentile / 100:g}"}, value)
        count, total = self._totals[name]
        found.add_sample(f"{found.name}_count", {}, count)
        found.add_sample(f"{found.name}_sum", {}, total)
        return found
