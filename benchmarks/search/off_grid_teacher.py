"""Continue the default teacher's training until its weights have left the grid that its file was rounded to.

    python -m benchmarks.search.off_grid_teacher [--rate 5e-4] [--steps 4000] [--threads 1]

SmolLM2 is distributed with 4 and 8 bits a weight, so any result for it in 4 bits is about rounding twice. The program
fine-tunes it on documentation, in the plainest way, until quantising its weights again moves them as much as weights
that never saw the grid. It measures each matrix's error, under the scales that fit best, relative to that of a uniform
error in a step. It measures the same for normal weights with as many rows. Then the rate decays to zero. Figures before
and after are in the report, and in `training.json` of the folder in the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from autodistill.distillation.teacher.own_scales import own_scales
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model, save_model
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.options import cache_folder
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import deployed, quantize
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json
from benchmarks.common import debian_texts, report
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher

TEACHER, RATE, STEPS = "smollm2", 5e-4, 4000
SEQUENCE, WARMUP, DECAY, EVERY = 128, 10, 60, 10
# The grids of the file: for matrices, and for the table.
MATRICES, TABLE = "q4_1", "q8_0"
# The share of normal weights' error at which weights count as off the grid, and the rows of a matrix that are read.
NORMAL, _ROWS = 0.95, 32
TEST_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the teacher's training continues. It ends at the step after which the weights are off the grid.

    Attributes:
        teacher: Reference of the teacher, as for a search.
        rate: Peak rate of AdamW.
        steps: The most steps before the decay.
        sequence: Tokens of a step.
    """

    teacher: str = TEACHER
    rate: float = RATE
    steps: int = STEPS
    sequence: int = SEQUENCE

    @property
    def folder(self) -> Path:
        """The folder that keeps the teacher."""
        parts = [self.teacher, self.rate, self.steps, self.sequence, WARMUP, DECAY, EVERY, NORMAL]
        return cache_folder() / "benchmarks" / f"off-grid-teacher-{content_hash(parts)}"


def errors(model: Any, spec: ModelSpec) -> dict[str, tuple[float, float]]:
    """Return packing's squared error relative to a uniform one, for matrices and table, and for normal weights."""
    parameters, dice = dict(model.named_parameters()), np.random.default_rng(0)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for tensor in spec.tensors:
        if tensor.role not in (Role.LINEAR, Role.EMBEDDING):
            continue
        kind = MATRICES if tensor.role is Role.LINEAR else TABLE
        storage = TYPES[kind]
        assert isinstance(storage, Grid)
        places = np.linspace(0, tensor.shape[0] - 1, min(_ROWS, tensor.shape[0])).astype(int)
        rows = parameters[tensor.name].detach()[torch.from_numpy(places)].float().numpy()
        normal = dice.normal(scale=rows.std(), size=rows.shape).astype(np.float32)
        found = [*_error(rows, storage), *_error(normal, storage)]
        sums[kind] = sums.get(kind, np.zeros(4)) + np.array(found)
    return {kind: (float(one[0] / one[1]), float(one[2] / one[3])) for kind, one in sums.items()}


def _error(rows: npt.NDArray[np.float32], grid: Grid) -> tuple[float, float]:
    """Return the squared error under the best scales, and the error of weights spread evenly between two codes."""
    _, rule = quantize(rows, grid)
    moved = np.square(deployed(rows, grid, own_scales(rows, grid)) - rows, dtype=np.float64).sum()
    steps = np.square(rule.scales, dtype=np.float64).sum() * grid.group(rows.shape[1])
    return float(moved), float(steps) / 12


def off_grid(found: dict[str, tuple[float, float]]) -> bool:
    """Return whether all errors are those of normal weights."""
    return all(error >= NORMAL * normal for error, normal in found.values())


def trained(recipe: Recipe, train: Iterator[str], test: Iterator[str]) -> dict[str, Any]:
    """Train the teacher, write it, and return how it left the grid.

    Raises:
        SystemExit: Its weights are still on the grid at the end.
    """
    cache = cache_folder()
    start = materialize(resolve_teacher(recipe.teacher), cache).folder
    spec = spec_from_config(read_json(start / "config.json"))
    tokenizer = AutoTokenizer.from_pretrained(start)
    model: Any = load_model(start, torch.float32)
    held_out = _rows(test, tokenizer, recipe.sequence)
    unseen = torch.stack([next(held_out) for _ in range(max(1, TEST_TOKENS // recipe.sequence))])
    curve: list[dict[str, Any]] = [{"step": 0, "errors": errors(model, spec), "test_nll": _nll(model, unseen)}]
    print(curve[-1], file=sys.stderr, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.0, fused=True)
    rows, began, end, step = _rows(train, tokenizer, recipe.sequence), time.monotonic(), None, 0
    while end is None or step < end:
        share = 1.0 if end is None else (end - step) / DECAY
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / WARMUP) * share
        ids = next(rows)[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if end is None and step % EVERY == 0:
            curve.append({"step": step, "errors": errors(model, spec), "train_loss": float(loss.detach())})
            print(curve[-1], file=sys.stderr, flush=True)
            if off_grid(curve[-1]["errors"]):
                end = step + DECAY
            elif step >= recipe.steps:
                sys.exit(f"after {step} steps the weights are still on the grid: give more --steps, or a higher --rate")
    # It is kept in 16 bits, so it is measured in 16 bits.
    model = model.to(torch.bfloat16)
    last = {"errors": errors(model, spec), "test_nll": _nll(model.float(), unseen)}
    curve.append({"step": step, **last})
    told = {
        "teacher": recipe.teacher,
        "rate": recipe.rate,
        "tokens": step * recipe.sequence,
        "seconds": time.monotonic() - began,
        "curve": curve,
        "off_grid": off_grid(curve[-1]["errors"]),
        "made": report.stamp(),
    }
    _write(model.to(torch.bfloat16), tokenizer, told, recipe.folder)
    return told


def _write(model: Any, tokenizer: Any, told: dict[str, Any], folder: Path) -> None:
    """Write the teacher completely, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".off-grid-", dir=folder.parent))
    try:
        model.config.quantization_config = None
        del model.config.quantization_config
        save_model(model, partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(texts: Iterator[str], tokenizer: Any, length: int) -> Iterator[torch.Tensor]:
    """Yield rows of tokens. Documents follow one another, each with an end token."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
        while len(ids) >= length:
            yield torch.tensor(ids[:length])
            ids = ids[length:]


@torch.no_grad()
def _nll(model: Any, rows: torch.Tensor) -> float:
    return float(np.mean([float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]))


def off_grid_teacher() -> Path:
    """Return the teacher's folder.

    Raises:
        SystemExit: It is not trained yet.
    """
    folder = Recipe().folder
    if not folder.exists():
        sys.exit("the teacher off its grid is not trained yet: run python -m benchmarks.search.off_grid_teacher first")
    return folder


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _files(folder: Path) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def sections(told: dict[str, Any]) -> list[str]:
    """Return the parts of the report."""
    first, last = told["curve"][0], told["curve"][-1]
    head = (
        f"{told['teacher']} trained on for {last['step']} steps of {told['tokens'] // last['step']} tokens "
        f"({told['tokens']:,} in all, {told['seconds']:.0f} s) at a rate of {told['rate']:g}, {DECAY} steps of them a "
        f"decay. NLL of unseen documents: {first['test_nll']:.4f} before, {last['test_nll']:.4f} after."
    )
    rows = []
    for one in told["curve"]:
        cells = [f"{one['errors'][kind][part]:.4f}" for kind in (MATRICES, TABLE) for part in (0, 1)]
        rows.append([one["step"], *cells])
    titles = ["step"]
    for kind, what in ((MATRICES, "matrices"), (TABLE, "table")):
        titles += [f"{what} on {kind}", "normal weights"]
    said = (
        f"Squared error of packing over that of a uniform error in a step, of {_ROWS} rows of each tensor. From "
        f"{NORMAL:g} of normal weights on, weights count as off the grid."
    )
    end = "The weights are off the grid." if told["off_grid"] else "**The weights are not off the grid.**"
    return [head, report.table(titles, rows), f"{said} {end}"]


def main() -> None:
    """Train the teacher unless it exists, and write the report."""
    parser = parser_of(__doc__)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--steps", type=int, default=STEPS, help="at the most, beside the decay")
    parser.add_argument("--threads", type=int, default=1, help="on a busy machine more than one wait for each other")
    arguments = parse(parser, rate=1e-2, steps=EVERY)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.smoke:
        # Weights that never saw a grid are off it at the first check.
        recipe = Recipe(teacher=tiny_teacher(layers=1), rate=arguments.rate, steps=arguments.steps, sequence=64)
        text = Path(tiny_data(60))
        told = trained(recipe, _files(text), _files(text))
    else:
        recipe = Recipe(rate=arguments.rate, steps=arguments.steps)
        texts = debian_texts.debian_texts()
        known = recipe.folder / "training.json"
        told = (
            read_json(known)
            if known.exists()
            else trained(recipe, _lines(texts.train), _files(texts.folder / "manuals-test"))
        )
    report.note("off-grid-teacher", told, told["made"])
    made_by = f"-m benchmarks.search.off_grid_teacher --rate {arguments.rate:g} --steps {arguments.steps}"
    title = "The default teacher off the grid of its file"
    print(report.write("off-grid-teacher", title, sections(told), made_by=made_by))


if __name__ == "__main__":
    main()
