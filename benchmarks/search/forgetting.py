"""What keeps a student from forgetting: its teacher in the loss, or text that the teacher wrote?

    python -m benchmarks.search.forgetting [--cost 100s] [--seeds 1]

The small language model in Q3_K (its table in Q6_K) learns PostgreSQL's manual through the scales of its codes, in
steps of two sequences. In some arms, the teacher is in the loss of that text. In others, a share of the sequences is
text that the teacher wrote from nothing, at temperature 1. From that text, the student learns the teacher's
distributions, or its tokens as labels. An arm's cost is the process's CPU seconds on one core. It includes the
teacher's passes, but not its writing. Three texts are read, at the end and at points on the way from the beginning to
it: pages of the manual that no arm saw, documents of the kind that the teacher was trained on, and a text of neither
kind.
Measurements are kept, and the same command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.training.optimizers.adamw import adamw, clip
from autodistill.distillation.training.trained_scales import RATE, TrainedScales
from autodistill.evaluation.statistics import clustered_mean
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.quantization.grids import Q3_K, Q6_K, Grid
from autodistill.units import parse_duration
from autodistill.utils.hashing import content_hash
from benchmarks.common import debian_texts, program, report
from benchmarks.search.small_teacher import described, small_teacher

LENGTH, SEQUENCES = 256, 2
LEARNING_RATE = 5e-4
_WARMUP, _DECAY = 0.05, 0.3  # shares of the cost
_AT_ONCE = 64  # sequences that the teacher writes in parallel
READ = ("test", "own kind", "python")
"""The texts that are read: unseen pages of the manual, the kind that the teacher was trained on, and neither."""

SHARES = (0.5, 0.75, 1.0)
"""Points on the way from the beginning to the end of a training, as shares."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a student learns from.

    Attributes:
        taught: The teacher's share of the loss on the text.
        written: One of this many sequences is text that the teacher wrote; 0 for none.
        soft: Whether the student learns the teacher's distributions on that text, instead of its tokens.
    """

    taught: float = 0.0
    written: int = 0
    soft: bool = True


ARMS = {
    "labels alone": Arm(),
    "a quarter of the loss is the teacher's": Arm(taught=0.25),
    "half of the loss is the teacher's": Arm(taught=0.5),
    "three quarters of the loss are the teacher's": Arm(taught=0.75),
    "one of eight sequences is the teacher's text": Arm(written=8),
    "one of four sequences is the teacher's text": Arm(written=4),
    "one of four, and a quarter of the other loss": Arm(taught=0.25, written=4),
    "one of four, by its tokens alone": Arm(written=4, soft=False),
    "one of eight, by its tokens alone": Arm(written=8, soft=False),
}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The training text, and the texts on which each student is scored, with the teacher's outputs."""

    train: TokenSet
    read: dict[str, tuple[TokenSet, TeacherReference]]


def subject(smoke: bool) -> tuple[Path, dict[str, Path]]:
    """Return the teacher, and the folders of the texts to train on and to read. They are tiny in a smoke run."""
    if smoke:
        teacher = Path(program.tiny_teacher(width=256, ffn=256))
        return teacher, dict.fromkeys(("train", *READ), Path(program.tiny_data()))
    folder = debian_texts.debian_texts().folder
    names = {"train": "postgresql", "test": "postgresql-test", "own kind": "manuals-test", "python": "python"}
    return small_teacher(), {name: folder / one for name, one in names.items()}


def texts_of(teacher: Path, folders: dict[str, Path], tokens: int) -> Texts:
    """Prepare the texts in the cache, and score the teacher on the texts that students are judged on."""
    cache = cache_folder() / "benchmarks" / "forgetting"

    def split(name: str) -> TokenSet:
        source = resolve_data(str(folders[name]))
        made = prepare(source, teacher, tokenizer_fingerprint(teacher), LENGTH, cache)
        return load_split(made.folder, "train")

    model = load_model(teacher, torch.float32).eval()
    read = {}
    for name in READ:
        data = split(name).head(tokens)
        read[name] = (data, score_teacher(model, data)[1])
    return Texts(train=split("train"), read=read)


@torch.no_grad()
def written(model: Any, sequences: int, seed: int) -> Tensor:
    """Let a model write sequences from its first token, at temperature 1. Returns int64 [sequences, LENGTH]."""
    torch.manual_seed(seed)
    start = torch.full((min(_AT_ONCE, sequences), 1), int(model.config.bos_token_id or 0))
    found = [
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=LENGTH - 1,
            max_new_tokens=LENGTH - 1,
            pad_token_id=0,
        )
        for _ in range(-(-sequences // _AT_ONCE))
    ]
    return torch.cat(found)[:sequences, :LENGTH]


def trained(teacher: Path, texts: Texts, arm: Arm, seed: int, cost: float, sequences: int) -> dict[str, Any]:
    """Train a student for a cost, and score it at points on the way.

    Returns:
        The number of training tokens, and the figures of each text by share of the way.
    """
    torch.manual_seed(seed)
    guide = load_model(teacher, torch.float32).eval().requires_grad_(False)
    student = load_model(teacher, torch.float32)
    held = TrainedScales(student, partial(_grid, student))
    scales = [parameter for _, parameter in held.named_parameters()]
    others = [parameter for parameter in student.parameters() if parameter.requires_grad]
    first = [one.detach().clone() for one in others]
    optimizer = adamw([{"params": others, "factor": 1.0}, {"params": scales, "factor": RATE}], "float32")
    began = time.process_time()
    own = written(guide, sequences, seed) if arm.written else None
    writing = time.process_time() - began
    began += writing
    tokens, step = 0, 0
    order = _order(len(texts.train.tokens), seed)
    while (passed := (time.process_time() - began) / cost) < 1:
        factor = min(1.0, passed / _WARMUP + 0.02, (1 - passed) / _DECAY)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["factor"] * factor
        for place in range(step * SEQUENCES, (step + 1) * SEQUENCES):
            of_teacher = own is not None and place % arm.written == 0
            if own is not None and of_teacher:
                ids = own[place // arm.written % len(own)][None]
            else:
                ids = torch.from_numpy(np.asarray(texts.train.tokens[next(order)], np.int64))[None]
            (_loss(student, guide, ids, float(arm.soft) if of_teacher else arm.taught) / SEQUENCES).backward()
            tokens += LENGTH
        clip([*others, *scales])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    ends = [one.detach().clone() for one in (*others, *scales)]
    begun = [*first, *(torch.zeros_like(one) for one in scales)]
    found = {}
    for share in (0.0, *SHARES):
        with torch.no_grad():
            for one, start, end in zip((*others, *scales), begun, ends, strict=True):
                one.copy_(torch.lerp(start, end, share))
        found[f"{share:g}"] = read(student, texts)
    held.settle()
    return {"tokens": tokens, "writing": writing, "read": found}


def _grid(model: Any, name: str) -> Grid | None:
    if dict(model.named_parameters())[name].ndim != 2:
        return None
    return Q6_K if "embed" in name else Q3_K


def _order(sequences: int, seed: int) -> Iterator[int]:
    dice = np.random.default_rng(seed)
    while True:
        yield from dice.permutation(sequences).tolist()


def _loss(student: Any, guide: Any, ids: Tensor, taught: float) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(input_ids=ids, use_cache=False).logits[0, :-1].float()
        if taught:
            with torch.no_grad():
                target = guide(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    loss = (1 - taught) * functional.cross_entropy(logits, ids[0, 1:])
    if taught:
        kl = functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        loss = loss + taught * kl
    return loss


@torch.no_grad()
def read(model: Any, texts: Texts) -> dict[str, Any]:
    """Return a model's figures by text: nats per token, and the KL from the teacher."""
    found = {}
    for name, (data, reference) in texts.read.items():
        scores, _ = score(model.eval(), data, reference)
        assert scores.divergence is not None
        figures = {"nll": scores.nll, "kl": scores.divergence}
        found[name] = {key: clustered_mean(values, scores.documents) for key, values in figures.items()}
    return found


def main() -> None:
    """Train every arm, and write the report of what each learned and forgot."""
    parser = program.parser_of(__doc__, seeds=1)
    parser.add_argument("--cost", type=parse_duration, default=100.0, help="of an arm, like 100s, on one core")
    parser.add_argument("--eval-tokens", type=program.token_count, default=16384)
    parser.add_argument("--written", type=int, default=256, help="sequences that the teacher writes")
    arguments = program.parse(parser, cost=1.0, eval_tokens=4 * LENGTH, written=2)
    torch.set_num_threads(1)
    teacher, folders = subject(arguments.smoke)
    texts = texts_of(teacher, folders, arguments.eval_tokens)
    kept = report.Kept(
        "forgetting", content_hash([teacher.name, arguments.cost, arguments.eval_tokens, arguments.written])
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in range(arguments.seeds):
        for name, arm in ARMS.items():
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
            make = partial(trained, teacher, texts, arm, seed, arguments.cost, arguments.written)
            found[name].append(kept.get(f"{name}, seed {seed}", make))
    print(
        report.write(
            "forgetting",
            "What keeps a student from forgetting",
            [
                f"{described(teacher)}, PostgreSQL's manual, {arguments.cost:g} s of one core for each training, "
                f"{arguments.seeds} seed(s), {arguments.eval_tokens:,} tokens of each text read. Nats a token, means "
                "of the seeds, with the KL from the teacher in brackets: on unseen pages of the manual; on documents "
                "of the kind that the teacher was trained on; and on a text of neither.",
                report.table(
                    ["learns from", "tokens", *(_title(share) for share in (0.0, *SHARES))],
                    [
                        [name, _tokens(some), *(_cell(some, share) for share in (0.0, *SHARES))]
                        for name, some in found.items()
                    ],
                ),
            ],
        )
    )


def _title(share: float) -> str:
    return "beginning" if share == 0 else f"{share:.0%} of the way"


def _tokens(some: list[dict[str, Any]]) -> str:
    return f"{np.mean([one['tokens'] for one in some]):,.0f}"


def _cell(some: list[dict[str, Any]], share: float) -> str:
    def mean(text: str, figure: str) -> float:
        return float(np.mean([one["read"][f"{share:g}"][text][figure][0] for one in some]))

    return "; ".join(f"{mean(name, 'nll'):.4f} ({mean(name, 'kl'):.4f})" for name in READ)


if __name__ == "__main__":
    main()
