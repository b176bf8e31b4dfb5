"""Are students of several widths better trained as one model, each a part of the next wider one, or separately?

    python -m benchmarks.engine.nested_students [--seeds 5] [--steps 150] [--time 20m]

A search for several budgets trains a student for each. Nested students share their weights instead. The neurons of each
FFN are sorted by importance, and a narrower student has the first of them. A step trains all widths on the same
sequences and adds their gradients. So it costs what a step of each student costs by itself, and needs no more data or
teacher outputs. Both ways have the same sequences, rates and number of steps. Half of the loss is from labels, and half
from a teacher of sums. Students that are trained separately begin as they are cut, or repaired by least squares, as in
a search. NLL of labels and KL from the teacher are for questions that were in no training.

Nested students are kept only if, in the mean over widths, their NLL is ahead of repaired ones by more than two errors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.build import cut_student
from autodistill.distillation.teacher.importance import PartImportance, measure_importance
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.loading import decoder_layers, load_model
from autodistill.strategy.strategy import Init
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report
from benchmarks.common.over_seeds import error, is_clear
from benchmarks.engine import on_policy
from benchmarks.engine.heal import replace_text

# FFNs are cut to multiples of 64 neurons, so the teacher has many.
SHAPE = {**on_policy.SHAPE, "intermediate_size": 512}
WIDTHS = (0.75, 0.5, 0.25)
BATCH, RATE, WARMUP = 64, 1e-3, 10
CUT, REPAIRED, NESTED = "apart, as cut", "apart, repaired", "nested"


@contextmanager
def narrowed(model: Any, neurons: int) -> Iterator[None]:
    """Let each FFN of a model compute only with its first neurons."""

    def forward(mlp: Any, states: Tensor) -> Tensor:
        gate, up = (functional.linear(states, one.weight[:neurons]) for one in (mlp.gate_proj, mlp.up_proj))
        return functional.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight[:, :neurons])

    mlps = [layer.mlp for layer in decoder_layers(model)]
    for mlp in mlps:
        mlp.forward = partial(forward, mlp)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


@torch.no_grad()
def sort_neurons(model: Any, importance: PartImportance) -> None:
    """Sort the neurons of each FFN by importance. The model computes the same as before."""
    for layer, neurons in zip(decoder_layers(model), importance.neurons, strict=True):
        order = torch.argsort(neurons, descending=True, stable=True)
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.copy_(part.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


class Bench:
    """The teacher of sums, its text, and the questions that judge students.

    Args:
        steps: Steps of the teacher's training.
        size: Number of questions.
        held_out: Number of held-out sequences on which students are judged.
    """

    def __init__(self, steps: int, size: int, held_out: int) -> None:
        made = on_policy.teacher_of(steps, size, SHAPE)
        self.folder, self.train = made.folder, made.train
        self.teacher = load_model(made.folder, torch.float32).eval()
        self.importance = replace_text(measure_importance(self.teacher, made.train), made.train, 256)
        self._test = made.test.head(held_out * made.test.tokens.shape[1])

    def separate(self, share: float, *, repair: bool) -> Any:
        """Return a student of this width, cut from the teacher. It shares no tensor with it, because it is trained."""
        return deepcopy(cut_student(self.teacher, Init(depth=1.0, ffn=share, repair=repair), self.importance)[0])

    def nested(self) -> Any:
        """Return the teacher with its neurons sorted by importance. Its narrower parts are the students."""
        model = load_model(self.folder, torch.float32)
        sort_neurons(model, self.importance)
        return model

    def neurons(self, share: float) -> int:
        """Return the number of FFN neurons for this share of the teacher's."""
        return int(decoder_layers(self.separate(share, repair=False))[0].mlp.gate_proj.weight.shape[0])

    def judged(self, model: Any) -> tuple[float, float]:
        """Return NLL of labels and KL from the teacher, in nats per scored token."""
        ids, mask = _batch(self._test, range(len(self._test.tokens)))
        with torch.no_grad():
            wanted, found = (_log_p(one, ids)[mask] for one in (self.teacher, model))
        labels = ids[:, 1:][mask]
        nll = float(functional.nll_loss(found, labels))
        return nll, float((wanted.exp() * (wanted - found)).sum(-1).mean())

    def trained(self, model: Any, widths: Sequence[int | None], steps: int, seed: int) -> None:
        """Train a model in full width (None) or in several widths at once, on the same sequences in all ways."""
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        draws = np.random.default_rng(seed)
        for step in range(steps):
            warm = min(1.0, (step + 1) / WARMUP)
            optimizer.param_groups[0]["lr"] = RATE * warm * (1 - step / steps)
            ids, mask = _batch(self.train, draws.integers(len(self.train.tokens), size=BATCH))
            with torch.no_grad():
                wanted = _log_p(self.teacher, ids)[mask]
            for neurons in widths:
                if neurons is None:
                    _loss(model, ids, mask, wanted).backward()
                else:
                    with narrowed(model, neurons):
                        _loss(model, ids, mask, wanted).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()


def _batch(data: TokenSet, places: Sequence[int] | Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of some sequences, and which of the predicted tokens count."""
    index = np.asarray(places)
    ids = torch.from_numpy(data.tokens[index].astype(np.int64))
    scored = data.scored
    mask = np.ones(ids[:, 1:].shape, bool) if scored is None else scored[index, 1:]
    return ids, torch.from_numpy(np.ascontiguousarray(mask))


def _log_p(model: Any, ids: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)


def _loss(model: Any, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    found = _log_p(model, ids)[mask]
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return 0.5 * functional.nll_loss(found, ids[:, 1:][mask]) + 0.5 * divergence


def measured(bench: Bench, way: str, steps: int, seed: int) -> list[tuple[float, float]]:
    """Return NLL and KL of each width after training in one way."""
    if way != NESTED:
        found = []
        for share in WIDTHS:
            student = bench.separate(share, repair=way == REPAIRED)
            bench.trained(student, [None], steps, seed)
            found.append(bench.judged(student))
        return found
    model, widths = bench.nested(), [bench.neurons(share) for share in WIDTHS]
    bench.trained(model, widths, steps, seed)
    found = []
    for neurons in widths:
        with narrowed(model, neurons):
            found.append(bench.judged(model))
    return found


def main() -> None:
    """Measure what is missing, and write the report."""
    parser = program.parser_of(__doc__, seeds=5, time=True)
    parser.add_argument("--steps", type=int, default=150, help="of each width")
    parser.add_argument("--teacher-steps", type=int, default=600)
    arguments = program.parse(parser, seeds=2, steps=3, teacher_steps=4)
    torch.set_num_threads(1)
    keep_freed_memory()
    bench = Bench(arguments.teacher_steps, 2000 if arguments.smoke else on_policy.SIZE, 20 if arguments.smoke else 400)
    source = [bench.folder.name, WIDTHS, BATCH, RATE, file_hash(Path(__file__))]
    kept = report.Kept("nested", content_hash(source), arguments.time)
    found: dict[str, list[Any]] = {}
    for seed in range(arguments.seeds):
        for way in (CUT, REPAIRED, NESTED):
            make = partial(measured, bench, way, arguments.steps, seed)
            found.setdefault(way, []).append(kept.get(f"{way}, {arguments.steps} steps, seed {seed}", make))
            print(f"{way}, seed {seed}: {found[way][-1]}", file=sys.stderr, flush=True)
    title = "Students of several widths: nested, or trained apart"
    print(report.write("nested-students", title, _sections(found, arguments.steps, arguments.seeds)))


def _sections(found: Mapping[str, list[Any]], steps: int, seeds: int) -> list[str]:
    values = {way: np.asarray(rows, float) for way, rows in found.items()}  # [seeds, widths, NLL and KL]
    lines = []
    for place, share in enumerate(WIDTHS):
        for way, rows in values.items():
            cells = [f"{rows[:, place, what].mean():.4f} ± {error(rows[:, place, what]):.4f}" for what in (0, 1)]
            gaps = rows[:, place, 0] - values[REPAIRED][:, place, 0]
            less = "" if way == REPAIRED else f"{gaps.mean():+.4f} ± {error(gaps):.4f}"
            lines.append([f"{100 * share:g}%", way, *cells, less])
    gaps = (values[NESTED] - values[REPAIRED])[:, :, 0].mean(axis=1)
    ahead = gaps.mean() < 0 and is_clear(gaps)
    verdict = "kept" if ahead else "not kept"
    return [
        f"{seeds} seeds, {steps} steps of {BATCH} sequences for each width; ± is a standard error over seeds.",
        report.table(["FFN", "way", "NLL", "KL from the teacher", f"NLL less {REPAIRED}"], lines),
        f"Over all widths, nested students are {-gaps.mean():+.4f} ± {error(gaps):.4f} nats ahead of those that are "
        f"trained apart and repaired: {verdict}.",
    ]


if __name__ == "__main__":
    main()
