"""The server of federated distillation: it has no model and no text, and pools what clients predict."""

from __future__ import annotations

from collections.abc import Callable

from autodistill.errors import InputError
from autodistill.federated.flower import server_of
from autodistill.federated.predictions import Predictions


def serve(
    address: str = "127.0.0.1:8080",
    *,
    clients: int,
    rounds: int,
    round_seconds: float = 600.0,
    certificates: tuple[bytes, bytes, bytes] | None = None,
    told: Callable[[str], None] = print,
) -> Predictions:
    """Lead federated distillation, and return what all clients predict together at the end.

    Args:
        address: Where to listen, as host:port; 0.0.0.0 for clients on other machines.
        clients: That are waited for before the first round.
        rounds: In each of which every client trains, sends predictions, and is sent the mean of all.
        round_seconds: That a round waits for its clients; whoever is late or gone is left out of it.
        certificates: CA, server certificate and its key in PEM; without them nothing is encrypted.
        told: Is given a line for each round.

    Raises:
        InputError: Numbers that are none; no client ever sent predictions; or Flower is not installed.
    """
    if clients < 1 or rounds < 1:
        raise InputError(f"federated distillation takes at least one client and one round, not {clients} and {rounds}")
    if not round_seconds > 0:
        raise InputError(f"a round takes more than {round_seconds:g} seconds: give a positive number")
    return server_of(address, clients, rounds, round_seconds, certificates, told)
