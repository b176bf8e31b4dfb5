"""Federated distillation: each client trains on text of its own, and shares predictions on a public text alone.

    python docs/examples/federate.py serve 127.0.0.1:8080 --clients 2 --rounds 5
    python docs/examples/federate.py join 127.0.0.1:8080 --model ./student --data ./own --public ./public --out ./new

Run `join` once for each client, in another terminal or on another machine. Needs the extra `federated`.
"""

import argparse

from autodistill.federated import join, serve


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
    taking.add_argument("--steps", type=int, default=50, help="of each round")
    taking.add_argument("--length", type=int, default=128, help="tokens of a sequence, the same for all clients")
    options = vars(parser.parse_args(arguments))
    (serve if options.pop("what") == "serve" else join)(options.pop("address"), **options)


if __name__ == "__main__":
    main()
