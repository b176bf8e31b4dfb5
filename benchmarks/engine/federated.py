"""What do clients of skewed topics gain by sharing predictions on a public text, and how many bytes does it take?

    python -m benchmarks.engine.federated [--seeds 5] [--rounds 5]

Four clients have the pages of Python's language reference of one kind each (statements, expressions, types, the rest);
every fifth page of each kind is public, and every fifth held out. All begin with one small model that was trained on
the public pages. Compared by next-token accuracy on the held-out pages of all kinds, at equal steps on own text: each
client alone; clients that agree on the public text after each round; and one model of all text, which no client may
see. Predictions are exchanged within this process; a test runs the same over Flower, and reads what goes over the wire.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodistill.federated.client import Client, sequences
from autodistill.federated.predictions import pool
from autodistill.models.loading import load_model
from autodistill.testing import save_tiny_teacher, tiny_tokenizer
from benchmarks.common import report
from benchmarks.common.over_seeds import mean
from benchmarks.common.program import parse, parser_of

LENGTH, STEPS, BATCH, RATE = 64, 25, 8, 2e-3
HELD_OUT = 128  # sequences
KINDS = {
    "statements": "assert assignment augassign break class compound continue del exec for function global if import "
    "nonlocal pass return try while with yield raise",
    "expressions": "atom attribute await binary bitwise boolean call comparison conversion exprlists identifiers in "
    "lambda lists naming numbers operator power shifting slicings strings subscriptions unary formatstrings",
    "types": "bltin types typesseq typesmapping typesmethods typesfunctions typesmodules string specialattrs numeric "
    "context sequence callable object",
}


def pages() -> dict[str, list[str]]:
    """The pages of each kind, in the order of their names; a page belongs to the first kind whose word begins it."""
    found: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "the rest")}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        kind = next(
            (kind for kind, words in KINDS.items() if name.lower().startswith(tuple(words.split()))), "the rest"
        )
        found[kind].append(text)
    return found


def accuracy(model: Any, held_out: npt.NDArray[np.int64]) -> float:
    """The share of next tokens that are a model's likeliest."""
    rows = torch.from_numpy(held_out)
    model.eval()
    with torch.no_grad():
        found = [
            model(input_ids=some[:, :-1], use_cache=False).logits.argmax(-1) == some[:, 1:] for some in rows.split(32)
        ]
    return float(torch.cat(found).double().mean())


def compared(start: Any, own: list[Any], public: Any, held_out: Any, seed: int, rounds: int) -> dict[str, Any]:
    """The accuracies of one seed, and the bytes that clients sent and were sent."""

    def client(text: Any, offset: int = 0) -> Client:
        return Client(copy.deepcopy(start), text, public, rate=RATE, steps=STEPS, batch=BATCH, seed=100 * seed + offset)

    alone = [client(text, offset) for offset, text in enumerate(own)]
    together = [client(text, offset) for offset, text in enumerate(own)]
    pooled = client(np.concatenate(own))
    agreed, sent = None, 0
    for _ in range(rounds):
        for one in (*alone, pooled):
            one.round(None)
        sent += 0 if agreed is None else len(own) * agreed.bytes
        predictions = [one.round(agreed) for one in together]
        agreed = pool(predictions)
        sent += sum(one.bytes for one in predictions)
    return {
        "start": accuracy(start, held_out),
        "alone": [accuracy(one.model, held_out) for one in alone],
        "federated": [accuracy(one.model, held_out) for one in together],
        "pooled": accuracy(pooled.model, held_out),
        "bytes": sent,
    }


def first_model(folder: Path, public: npt.NDArray[np.int64], seed: int) -> Any:
    """The model that all begin with, trained on the public pages."""
    save_tiny_teacher(folder, layers=2, width=96, heads=4, kv_heads=2, ffn=256, vocabulary=300, seed=seed)
    begun = Client(
        load_model(folder, torch.float32), public, public, rate=RATE, steps=2 * STEPS, batch=BATCH, seed=seed
    )
    begun.round(None)
    return begun.model


def main() -> None:
    """Train all arms, and write the report."""
    parser = parser_of(__doc__, seeds=5)
    parser.add_argument("--rounds", type=int, default=5, help="of training (default: 5)")
    arguments = parse(parser, seeds=1, rounds=1)
    tokenizer, kinds = tiny_tokenizer(300), pages()
    split = [[page for index, page in enumerate(found) if index % 5 not in (3, 4)] for found in kinds.values()]
    own = [sequences(tokenizer, texts, LENGTH) for texts in split]
    shared, held = ([page for found in kinds.values() for page in found[place::5]] for place in (3, 4))
    public, held_out = sequences(tokenizer, shared, LENGTH), sequences(tokenizer, held, LENGTH)
    # Evenly over all pages.
    public, held_out = (
        text[:: max(1, len(text) // count)][:count] for text, count in ((public, 64), (held_out, HELD_OUT))
    )
    found = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            start = first_model(Path(folder), public, seed)
        found.append(compared(start, own, public, held_out, seed, arguments.rounds))
        print(seed, found[-1], flush=True)
    report.note("seeds", found)
    weights = sum(parameter.numel() for parameter in start.parameters())
    print(
        report.write(
            "federated",
            "Federated distillation of four clients",
            sections(found, own, public, weights, arguments.rounds),
        )
    )


def sections(found: list[dict[str, Any]], own: list[Any], public: Any, weights: int, rounds: int) -> list[str]:
    """The text and tables of the report."""
    arms = {"the model that all begin with": "start", "each client alone": "alone", "federated": "federated"}
    arms["one model of all text"] = "pooled"
    values = {name: [float(np.mean(one[key])) for one in found] for name, key in arms.items()}
    rows = [(name, mean(several, 2, factor=100)) for name, several in values.items()]
    gain = [
        federated - alone for federated, alone in zip(values["federated"], values["each client alone"], strict=True)
    ]
    short = [
        pooled - federated
        for pooled, federated in zip(values["one model of all text"], values["federated"], strict=True)
    ]
    sent = np.mean([one["bytes"] for one in found])
    sizes = ", ".join(f"{text.size:,}" for text in own)
    head = (
        f"{len(found)} seeds; mean and standard error over them, of clients their mean. In {rounds} rounds of {STEPS} "
        f"steps of {BATCH} sequences of {LENGTH} tokens (bytes, mostly). The clients have {sizes} tokens of their own, "
        f"and all {public.size:,} public ones. The model has {weights:,} weights."
    )
    told = (
        f"Federated less alone, paired by seed: {mean(gain, 2, factor=100)} points. One model of all text less "
        f"federated: {mean(short, 2, factor=100)} points.\n\n"
        f"All clients together sent and were sent {sent / 1e6:.2f} MB of predictions a seed. Weights in float32, sent "
        f"and returned in each round, would have been {2 * len(own) * 4 * weights * rounds / 1e6:.2f} MB."
    )
    return [head, report.table(("arm", "next tokens right, %"), rows), told]


if __name__ == "__main__":
    main()
