"""The server of federated distillation. It has no model and no text, and pools the clients' predictions."""

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
    connect_seconds: float = 600.0,
    certificates: tuple[bytes, bytes, bytes] | None = None,
    on_round: Callable[[str], None] = print,
) -> Predictions:
    """Run the server of federated distillation, and return the pooled predictions of the last round.

    Args:
        address: Where to listen, as host:port. Use 0.0.0.0 for clients on other machines.
        clients: Number of clients that must connect before the first round.
        rounds: Number of rounds. In each, every client trains, sends predictions, and receives the mean of all.
        round_seconds: Time that a round waits for its clients. Those that are late or gone are left out of it.
        connect_seconds: Time in which that number of clients must connect.
        certificates: CA, server certificate and its key in PEM. Without them nothing is encrypted.
        on_round: Called with a line for each round.

    Raises:
        InputError: A number is not positive, too few clients connected, none of them ever sent predictions, or Flower
            is not installed.
    """
    check_numbers(clients, rounds, round_seconds, connect_seconds)
    return server_of(address, clients, rounds, (connect_seconds, round_seconds), certificates, on_round)


def check_numbers(clients: int, rounds: int, round_seconds: float, connect_seconds: float) -> None:
    """Refuse numbers that are not positive.

    Args:
        clients, rounds, round_seconds, connect_seconds: As for `serve`.

    Raises:
        InputError: One of them is not positive.
    """
    if clients < 1 or rounds < 1:
        raise InputError(f"federated distillation takes at least one client and one round, not {clients} and {rounds}")
    if not (round_seconds > 0 and connect_seconds > 0):
        least = min(round_seconds, connect_seconds)
        raise InputError(f"to connect, and a round, take more than {least:g} seconds: give positive numbers")
