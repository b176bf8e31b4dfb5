"""What clients of federated distillation send to a server, and a check that none of their text is in it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from autodistill.data.tokenization import encode, load_tokenizer


class Wire:
    """A proxy that records everything that clients send to a server."""

    def __init__(self, port: int) -> None:
        self.sent = bytearray()
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:  # the server has ended, or is not up yet
                near.close()
                continue
            threading.Thread(target=self._pass, args=(near, far, self.sent), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, bytearray()), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while found := source.recv(65536):
                kept += found
                target.sendall(found)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def check_no_text(sent: bytes, model: Path, public: Path, texts: Sequence[Path]) -> None:
    """Check that what was sent has no piece of private texts: neither characters nor tokens."""
    tokenizer = load_tokenizer(model)
    known = "".join(file.read_text() for file in sorted(public.iterdir()))
    for folder in texts:
        for own in (file.read_text() for file in folder.iterdir()):
            pieces = [own[at : at + 24] for at in range(0, len(own) - 24, 24)]
            assert [piece for piece in pieces if piece.encode() in sent and piece not in known] == []
            ids = encode(tokenizer, [own])[0]
            for kind in (np.int16, np.int32, np.int64):
                runs = [ids[at : at + 12].astype(kind).tobytes() for at in range(0, len(ids) - 12, 12)]
                assert not [run for run in runs if run in sent]
