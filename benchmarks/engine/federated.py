"""What do clients with skewed topics gain by sharing predictions on a public text, and how many bytes does it take?

    python -m benchmarks.engine.federated [--seeds 5] [--rounds 5] [--time 20m]

Each of four clients has the pages of one kind from Python's language reference (statements, expressions, types, the
rest). Every fifth page of each kind is public, and every fifth is held out. All clients begin with one small model that
was trained on the public pages. The arms are compared by next-token accuracy on the held-out pages of all kinds, at
equal steps on their own text. They are: each client alone; each client alone, but trained on the public text as much as
those that agree on it; clients that agree on the public text after each round; and one model of all text, which no
client may see. Predictions are exchanged within this process. A test runs the same over Flower, and reads the traffic.
Results of seeds are kept.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodistill.federated.client import Client, sequences
from autodistill.federated.predictions import Predictions, pool
from autodistill.models.loading import load_model
from autodistill.testing import save_tiny_teacher, tiny_tokenizer
from autodistill.utils.hashing import content_hash
from benchmarks.common import report
from benchmarks.common.over_seeds import mean
from benchmarks.common.program import parse, parser_of

LENGTH, STEPS, BATCH, RATE = 64, 25, 8, 2e-3
HELD_OUT = 128  # in sequences
ALONE, LABELED = "each client alone", "alone, and the public text"
SHARED, POOLED = "federated", "one model of all text"
ARMS = ("the model that all begin with", ALONE, LABELED, SHARED, POOLED)
KINDS = {
    "statements": "assert assignment augassign break class compound continue del exec for function global if import "
    "nonlocal pass return try while with yield raise",
    "expressions": "atom attribute await binary bitwise boolean call comparison conversion exprlists identifiers in "
    "lambda lists naming numbers operator power shifting slicings strings subscriptions unary formatstrings",
    "types": "bltin types typesseq typesmapping typesmethods typesfunctions typesmodules string specialattrs numeric "
    "context sequence callable object",
}


def pages() -> dict[str, list[str]]:
    """Return the pages of each kind, in the order of their names.

    A page belongs to the first kind with a word it begins with.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "the rest")}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        kind = next(
            (kind for kind, words in KINDS.items() if name.lower().startswith(tuple(words.split()))), "the rest"
        )
        found[kind].append(text)
    return found


def accuracy(model: Any, held_out: npt.NDArray[np.int64]) -> float:
    """Return the share of next tokens that are the model's most likely ones."""
    rows = torch.from_numpy(held_out)
    model.eval()
    with torch.no_grad():
        found = [
            model(input_ids=some[:, :-1], use_cache=False).logits.argmax(-1) == some[:, 1:] for some in rows.split(32)
        ]
    return float(torch.cat(found).double().mean())


def compared(start: Any, own: list[Any], public: Any, held_out: Any, seed: int, rounds: int) -> dict[str, Any]:
    """Return the accuracies of one seed, the model's number of weights, and the bytes that clients exchanged."""

    def client(text: Any, offset: int = 0) -> Client:
        return Client(copy.deepcopy(start), text, public, rate=RATE, steps=STEPS, batch=BATCH, seed=100 * seed + offset)

    alone, labeled, together = ([client(text, offset) for offset, text in enumerate(own)] for _ in range(3))
    pooled = client(np.concatenate(own))
    following = public[:, 1:].reshape(-1, 1)
    labels = Predictions(tokens=following.astype(np.int32), probabilities=np.ones_like(following, np.float16))
    agreed, sent = None, 0
    for number in range(rounds):
        for one in (*alone, pooled):
            one.round(None)
        for one in labeled:
            one.round(labels if number else None)
        sent += 0 if agreed is None else len(own) * agreed.bytes
        predictions = [one.round(agreed) for one in together]
        agreed = pool(predictions)
        sent += sum(one.bytes for one in predictions)
    shares = [[accuracy(one.model, held_out) for one in arm] for arm in (alone, labeled, together, [pooled])]
    return {
        "weights": sum(parameter.numel() for parameter in start.parameters()),
        "bytes": sent,
        "right": dict(zip(ARMS, [[accuracy(start, held_out)], *shares], strict=True)),
    }


def first_model(folder: Path, public: npt.NDArray[np.int64], seed: int) -> Any:
    """Return the model that all clients begin with, trained on the public pages."""
    save_tiny_teacher(folder, layers=2, width=96, heads=4, kv_heads=2, ffn=256, vocabulary=300, seed=seed)
    begun = Client(
        load_model(folder, torch.float32), public, public, rate=RATE, steps=2 * STEPS, batch=BATCH, seed=seed
    )
    begun.round(None)
    return begun.model


def main() -> None:
    """Train all arms, and write the report."""
    parser = parser_of(__doc__, seeds=5, time=True)
    parser.add_argument("--rounds", type=int, default=5, help="of training (default: 5)")
    arguments = parse(parser, seeds=1, rounds=1)
    tokenizer, kinds = tiny_tokenizer(300), pages()
    split = [[page for index, page in enumerate(found) if index % 5 not in (3, 4)] for found in kinds.values()]
    own = [sequences(tokenizer, texts, LENGTH) for texts in split]
    shared, held = ([page for found in kinds.values() for page in found[place::5]] for place in (3, 4))
    public, held_out = sequences(tokenizer, shared, LENGTH), sequences(tokenizer, held, LENGTH)
    # These are spread evenly over all pages.
    public, held_out = (
        text[:: max(1, len(text) // count)][:count] for text, count in ((public, 64), (held_out, HELD_OUT))
    )

    def one(seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            start = first_model(Path(folder), public, seed)
        return compared(start, own, public, held_out, seed, arguments.rounds)

    source = [ARMS, LENGTH, STEPS, BATCH, RATE, arguments.rounds, *(text.tolist() for text in (*own, public, held_out))]
    kept = report.Kept("federated", content_hash(source), arguments.time)
    found = []
    for seed in range(arguments.seeds):
        found.append(kept.get(f"seed {seed}", partial(one, seed)))
        print(seed, found[-1], flush=True)
    title = "Federated distillation of four clients"
    print(report.write("federated", title, sections(found, own, public, arguments.rounds)))


def sections(found: list[dict[str, Any]], own: list[Any], public: Any, rounds: int) -> list[str]:
    """Return the text and tables of the report."""
    values = {name: [float(np.mean(one["right"][name])) for one in found] for name in ARMS}
    rows = [(name, mean(several, 2, factor=100)) for name, several in values.items()]

    def less(name: str, other: str) -> str:
        pairs = zip(values[name], values[other], strict=True)
        return f"{name} less {other}, {mean([one - base for one, base in pairs], 2, factor=100, sign=True)} points"

    sent, weights = np.mean([one["bytes"] for one in found]), found[0]["weights"]
    sizes = ", ".join(f"{text.size:,}" for text in own)
    head = (
        f"{len(found)} seeds; mean and standard error over them, of clients their mean. In {rounds} rounds of {STEPS} "
        f"steps of {BATCH} sequences of {LENGTH} tokens (bytes, mostly). The clients have {sizes} tokens of their own, "
        f"and all {public.size:,} public ones. The model has {weights:,} weights."
    )
    told = (
        f"Paired by seed: {less(SHARED, ALONE)}; {less(SHARED, LABELED)}; {less(POOLED, SHARED)}.\n\n"
        f"All clients together sent and were sent {sent / 1e6:.2f} MB of predictions a seed. Weights in float32, sent "
        f"and returned in each round, would have been {2 * len(own) * 4 * weights * rounds / 1e6:.2f} MB."
    )
    return [head, report.table(("arm", "next tokens right, %"), rows), told]


if __name__ == "__main__":
    main()
