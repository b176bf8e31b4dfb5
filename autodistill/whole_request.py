"""An HTTP request to one server: a deadline for all of it, where urllib's time-out is of each read; no redirections."""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from functools import partial
from typing import Any, cast


def exchange(request: urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    """The answer's status and headers, and a body that is read until the same deadline.

    A redirection is an error of its status, as any other that is none of success: urllib would turn a POST into a GET
    of whatever it names, and give that for the answer.

    Args:
        request: http or https.
        seconds: After which a read, also of the body, raises TimeoutError, however much has come.

    Raises:
        TimeoutError, OSError, http.client.HTTPException: As of `urllib.request.urlopen`.
    """
    until = time.monotonic() + seconds
    opener = urllib.request.build_opener(_Http(until), _Https(until), _NoRedirection())
    return cast(http.client.HTTPResponse, opener.open(request, timeout=seconds))


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """See `urllib.request`: no other request is made."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def http_open(self, request: urllib.request.Request) -> Any:
        """See `urllib.request`."""
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._until), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def https_open(self, request: urllib.request.Request) -> Any:
        """See `urllib.request`."""
        return self.do_open(partial(_connection, http.client.HTTPSConnection, self._until), request)


def _connection(kind: type[http.client.HTTPConnection], until: float, host: str, **options: Any) -> Any:
    connection = kind(host, **options)
    connection.response_class = partial(_Response, until=until)  # type: ignore[assignment]
    return connection


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, until: float, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock, until))


class _Until(io.RawIOBase):
    """What a socket reads, each time for as long as is left."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        self._raw, self._sock, self._until = raw, sock, until

    def readable(self) -> bool:
        """See `io`."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """See `io`; raises TimeoutError once the time is over."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        """See `io`."""
        self._raw.close()
        super().close()
