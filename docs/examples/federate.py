"""Federated distillation: each client trains on text of its own, and shares predictions on a public text alone.

    python docs/examples/federate.py serve 127.0.0.1:8080 --clients 2 --rounds 5
    python docs/examples/federate.py join 127.0.0.1:8080 --model ./student --data ./own --public ./public --out ./new
    python docs/examples/federate.py run ./a ./b ./c --model ./student --public ./public --out ./new --rounds 5

Run `join` once for each client, in another terminal or on another machine. `run` starts the server and all clients, on
Ray: here, or with --ray-address on the nodes of a cluster that have the clients' texts. Needs the extra `federated`.
"""

import argparse
import sys

from autodistill.errors import AutoDistillError
from autodistill.federated import join, run, serve


def main(arguments=None):
    """Lead, or take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    leading = what.add_parser("serve")
    leading.add_argument("address")
    for name in ("clients", "rounds"):
        leading.add_argument(f"--{name}", type=int, required=True)
    taking = what.add_parser("join")
    taking.add_argument("address")
    for name in ("model", "data", "public", "out"):
        taking.add_argument(f"--{name}", required=True)
    running = what.add_parser("run")
    running.add_argument("clients", nargs="+", metavar="TEXT", help="the text of each client")
    for name in ("model", "public", "out"):
        running.add_argument(f"--{name}", required=True)
    running.add_argument("--rounds", type=int, required=True)
    running.add_argument("--ray-address", metavar="auto|HOST:PORT", help="a running cluster (default: this machine)")
    for one in (taking, running):
        one.add_argument("--steps", type=int, default=50, help="of each round")
        one.add_argument("--length", type=int, default=128, help="tokens of a sequence, the same for all clients")
    options = vars(parser.parse_args(arguments))
    action = {"serve": serve, "join": join, "run": run}[options.pop("what")]
    where = options.pop("clients") if action is run else options.pop("address")
    try:
        action(where, **options)
    except AutoDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
