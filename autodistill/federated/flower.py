"""The connection through Flower: predictions go to a server over gRPC and pooled ones return; no text, no weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from autodistill.errors import InputError, MissingDependencyError
from autodistill.federated.predictions import Predictions, pool

_WAIT_SECONDS = 30.0


def flower() -> Any:
    """Import Flower, with its usage statistics turned off.

    Raises:
        MissingDependencyError: Flower is not installed.
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    try:
        import flwr
        import flwr.client
        import flwr.server
    except ImportError as error:
        raise MissingDependencyError(
            "federated distillation needs Flower: pip install 'autodistill-search[federated]'"
        ) from error
    # Flower's log lines are about its internals, and warn every user that the interface used here is deprecated.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    return flwr


def client_of(
    train: Callable[[Predictions | None], Predictions],
    positions: int,
    address: str,
    certificate: bytes | None,
    on_round: Callable[[str], None],
) -> None:
    """Run a client until the server ends it.

    Args:
        train: Trains for a round towards the pooled predictions, if there are any, and returns the client's own.
        positions: Number of positions of the public text.
        address: Address of the server.
        certificate: The server's root certificate in PEM, or None for no encryption.
        on_round: Called with a line for each round.

    If the server vanishes after a round, the client ends as after the last round.

    Raises:
        InputError: The server does not answer, or ends before a round.
    """
    flwr = flower()
    rounds: list[int] = []

    client: Any = flwr.client.NumPyClient

    class Participant(client):
        """A client in the form that Flower calls."""

        def fit(self, parameters: Any, config: Any) -> Any:
            """Train on the pooled predictions of the previous round, and return predictions."""
            agreed = Predictions.received(parameters, positions) if parameters else None
            found = train(agreed)
            rounds.append(config["round"])
            on_round(f"round {config['round']}: {found.bytes:,} bytes of predictions sent")
            return found.arrays, len(found.tokens), {}

    try:
        flwr.client.start_client(
            server_address=address,
            client=Participant().to_client(),
            insecure=certificate is None,
            root_certificates=certificate,
            max_wait_time=_WAIT_SECONDS,
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("grpc", "flwr"):
            raise
        if not rounds:
            raise InputError(f"no server of federated distillation answers at {address}: start it first") from error
        on_round(f"the server at {address} has vanished: what was learned up to round {rounds[-1]} is kept")
    if not rounds:
        raise InputError(f"the server at {address} ended before a round: look at what it says, and start both again")


def _pooling(flwr: Any, clients: int, seconds: float, on_round: Callable[[str], None]) -> Any:
    """Return the server's strategy in the form that Flower calls. Its base class is known after Flower's import."""
    to_arrays, to_parameters = flwr.common.parameters_to_ndarrays, flwr.common.ndarrays_to_parameters
    strategy: Any = flwr.server.strategy.Strategy

    class Pooling(strategy):
        """A server in the form that Flower calls. It pools what the clients send."""

        agreed: Predictions | None = None
        missing = 0

        def initialize_parameters(self, client_manager: Any) -> Any:
            """Begin without pooled predictions, once all clients are connected, or no client came for too long."""
            if not client_manager.wait_for(clients, timeout=seconds):
                self.missing = clients - client_manager.num_available()
            return to_parameters([])

        def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            """Ask every client for predictions, and send the pooled ones. If clients are missing, ask nobody."""
            if self.missing:
                return []
            asked = flwr.common.FitIns(parameters, {"round": server_round})
            return [(one, asked) for one in client_manager.all().values()]

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            """Pool the predictions of a round."""
            came, faults = [], [str(one) for one in failures]
            for _, result in results:
                try:
                    came.append(Predictions.received(to_arrays(result.parameters)))
                    self.agreed = pool(came)
                except InputError as error:
                    came.pop()
                    faults.append(str(error))
            size = sum(one.bytes for one in came)
            less = f", {len(faults)} left out ({' '.join(faults[0].split())[:100]})" if faults else ""
            on_round(f"round {server_round}: {len(came)} clients, {size:,} bytes of predictions{less}")
            return (None if self.agreed is None else to_parameters(self.agreed.arrays)), {}

        def configure_evaluate(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            """Ask no client to evaluate."""
            return []

        def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> Any:
            """Return nothing: no client evaluates."""
            return None, {}

        def evaluate(self, server_round: int, parameters: Any) -> Any:
            """Return nothing: the server has no model."""
            return None

    return Pooling()


def server_of(
    address: str,
    clients: int,
    rounds: int,
    seconds: tuple[float, float],
    certificates: tuple[bytes, bytes, bytes] | None,
    on_round: Callable[[str], None],
) -> Predictions:
    """Pool the clients' predictions, round by round, and return the pooled predictions of the last round.

    A client that vanishes or takes too long is left out of a round. A round without any client keeps the previous
    pooled predictions.

    Args:
        address: Where to listen.
        clients: Number of clients that must connect before the first round.
        rounds: Number of training rounds.
        seconds: Times in which the clients must connect, and in which they must end a round.
        certificates: CA, server certificate and key in PEM, or None for no encryption.
        on_round: Called with a line for each round.

    Raises:
        InputError: Too few clients connected, or none of them ever sent predictions.
    """
    flwr = flower()
    to_connect, for_round = seconds
    strategy = _pooling(flwr, clients, to_connect, on_round)
    flwr.server.start_server(
        server_address=address,
        config=flwr.server.ServerConfig(num_rounds=rounds, round_timeout=for_round),
        strategy=strategy,
        certificates=certificates,
    )
    if strategy.missing:
        raise InputError(
            f"{strategy.missing} of {clients} clients did not connect within {to_connect:g} s: start them, or ask for "
            "fewer, and start the server again"
        )
    if strategy.agreed is None:
        raise InputError(
            f"none of the clients sent predictions within {for_round:g} s: look at what they say, and start again"
        )
    return strategy.agreed
