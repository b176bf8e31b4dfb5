"""The wire between clients of federated distillation and a server."""

from __future__ import annotations

import socket

import pytest

from tests.federated.wire import Wire


@pytest.fixture
def wire() -> tuple[str, Wire]:
    """The address where a server should listen, and the wire to it."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    return f"127.0.0.1:{port}", Wire(port)
