"""Debian's Prometheus on this machine, for the tests that are marked `system`."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bundle.conftest import free_port, gguf, packed  # noqa: F401  (fixtures)


class Prometheus:
    """A running Prometheus.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        """Return the `data` that its API answers."""
        address = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """Return the series that an expression gives at this moment."""
        return list(self.get("query", query=expr)["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {one["labels"]["alertname"] for one in self.get("alerts")["alerts"] if one["state"] == "firing"}


def until(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Return whether a condition comes to hold in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if holds():
                return True
        except OSError:
            pass
        time.sleep(0.3)
    return False


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any], log: Path) -> Iterator[Prometheus]:
    """Run Prometheus with a configuration while the block lasts. It scrapes every second.

    Args:
        folder: Folder of the files that the configuration names.
        config: The configuration, as a bundle or `dashboards` wrote it.
        log: File for its output.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed (Debian: prometheus)")
    quick = {**config, "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    path, port = folder / "quick.yml", free_port()
    path.write_text(yaml.safe_dump(quick))
    listen = f"127.0.0.1:{port}"
    words = [f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={listen}"]
    with log.open("wb") as said:
        server = subprocess.Popen([program, *words], stdout=said, stderr=said)
    try:
        found = Prometheus(f"http://{listen}")
        assert until(lambda: bool(found.get("status/buildinfo"))), log.read_text()
        yield found
    finally:
        server.terminate()
        server.wait(20)
