"""Quality at equal bytes: one model in every 4-bit form of this project, and in those of other tools.

    python -m benchmarks.engine.export_quality [--tokens 1000] [--calibration 2000] [--seeds 3] [--models permuted]
    python -m benchmarks.engine.export_quality --models small --small FOLDER

Each form and seed is a line of `reports/export-quality.jsonl`. Existing lines are not judged again.

The model is SmolLM2-135M. In its package, its codes are Q4_1 with a table in Q8_0. That form is exact, so any form that
keeps these codes loses nothing. So all forms are judged on a second model too. It computes the same and is on no grid:
its channels, neurons and values within heads are in another order, so each group has weights from many groups of the
package. Forms of this project:

- plain: scales follow from the weights;
- importance: scales are searched for by the mean square of each input (`weighted_scales`), as in `solve`;
- compensated: the same scales, and later columns compensate each column's error (`compensated`);
- for the first model also the solution of `solve` for 175 MB in the tracked run `postgresql-175MB`.

Other forms:

- llama.cpp's own kernels (`ggml_quantize_chunk` of xllamacpp's library) with an importance matrix, the mean square of
  each input over the same text, as llama-imatrix computes it. Types are those that its quantiser picks.
- ONNX Runtime's own kernel (`quantize_matmul_4bits`, blocks of 32, symmetric) for products and the table, which is the
  rule of onnxruntime-genai's builder.
- AutoRound, Olive, Model Optimizer and onnxruntime-genai's builder, as they are published (`export_rivals`). Each needs
  its own package. If it is not installed, it is named and left out.

AutoRound runs with its light recipe, which takes a quarter of an hour for SmolLM2 on a busy core, and without tuning
steps, as it recommends itself for GGUF. All forms are judged on a small model too, which is on no grid: the one of
`search.small_teacher`, with 2.3M weights, in the folder that --small names.

The files of Q4_0 and Q8_0 are also run by llama.cpp, and by ONNX Runtime with the same codes.

The text is Python's language reference. A seed chooses the calibration text, the judged text, and the channels' order.
A rival is compared with this project's forms on its own seeds, and the difference is paired by seed.
KL is over the whole vocabulary, and next tokens are those of the text. For speed and bytes on disk in the runtimes, see
`export_formats`.

Targets, written before the first run: a form of this project loses less than each of the others at no more bytes. The
codes of onnx and gguf are equal, so they differ only by what their runtimes compute: ONNX Runtime finds at most 0.2
points fewer or more of the next tokens than llama.cpp, and its file is no larger.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from autodistill.advisor.describe import deployment_named
from autodistill.data.tokenization import load_tokenizer
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.export.base import load_exporter
from autodistill.export.gguf_writing import KINDS
from autodistill.export.student_reader import StudentFiles, copy_tokenizer
from autodistill.models.loading import load_model, save_model
from autodistill.models.tensors import Role, TensorSpec
from autodistill.options import cache_folder
from autodistill.quantization.error_compensation import compensated
from autodistill.quantization.formats import tensor_bytes
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.quantization.weighted_scales import weighted_scales
from autodistill.strategy.deployment import Deployment
from benchmarks.common import over_seeds, program, report
from benchmarks.common.reordered import reorder
from benchmarks.engine.export_rivals import ARMS, Arm, Weights, missing

STORE = "export-quality.jsonl"
LENGTH = 100
OURS = ("gguf-q4_1", "gguf-q4_0", "gguf-iq4_nl", "gguf-q4_k_m", "compressed-tensors-int4-g32-asym")
LLAMA = ("gguf-q4_0", "gguf-iq4_nl", "gguf-q4_k_m")
MODELS = {
    "package": "as packaged, on the grid of Q4_1",
    "permuted": "with its channels in another order, on no grid",
    "small": "of 2.3M weights, on no grid",
}
SOLVED = program.ROOT / "results" / "postgresql" / "postgresql-175MB" / "search.json"
RUN = {"gguf": "llama.cpp", "onnx": "ONNX Runtime"}
RUN_TYPES = ("gguf-q4_0", "gguf-q8_0")
NEAR = 0.002
"""By which share of the next tokens the runtimes may differ."""
_RUN = "run: "
_MATRICES = (Role.LINEAR, Role.EMBEDDING, Role.HEAD)


def texts(folder: Path, calibration: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens to calibrate on and tokens to judge on, int [sequences, LENGTH] each, from different topics."""
    from pydoc_data.topics import topics

    names = np.random.default_rng(seed).permutation(sorted(topics))
    tokenizer, parts = load_tokenizer(folder), []
    for half, wanted in ((names[: len(names) // 2], calibration), (names[len(names) // 2 :], tokens)):
        rows, whole = -(-wanted // LENGTH), "\n\n".join(topics[name] for name in half)
        found = tokenizer(whole[: 10 * rows * LENGTH])["input_ids"][: rows * LENGTH]
        parts.append(torch.tensor(found).reshape(rows, LENGTH))
    return parts[0], parts[1]


def moments_of(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean product of each pair of inputs of each matrix, float32 [columns, columns], by its name."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def add(_: Any, given: tuple[torch.Tensor, ...], key: str = f"{name}.weight") -> None:
                rows = given[0].flatten(0, -2)
                found = rows.T @ rows
                sums[key] = sums[key] + found if key in sums else found

            hooks.append(module.register_forward_pre_hook(add))
    with torch.inference_mode():
        for row in tokens:
            model.base_model(row[None])
    for hook in hooks:
        hook.remove()
    return {name: found.clone() / tokens.numel() for name, found in sums.items()}


def llama_kernel() -> Callable[[np.ndarray, Any, np.ndarray | None], np.ndarray]:
    """Return a function that rounds a matrix to a type as llama.cpp does, by the importance of its columns."""
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None
    assert found.origin is not None
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]

    def rounded(matrix: np.ndarray, kind: Any, weights: np.ndarray | None) -> np.ndarray:
        """Return a matrix's values as llama.cpp rounds them, with or without the importance of its columns."""
        rows, columns = matrix.shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        source = np.ascontiguousarray(matrix, np.float32)
        out = np.empty((rows, columns // block * size), np.uint8)
        own = None if weights is None else np.ascontiguousarray(weights, np.float32)
        given = None if own is None else own.ctypes.data
        library.ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, given)
        return np.asarray(gguf.quants.dequantize(out, kind)).reshape(rows, columns)

    return rounded


class Files(StudentFiles):
    """A model's tensors, and how a scheme stores them."""

    def storage(self, name: str) -> Any:
        """Return the storage of one tensor."""
        return self._scheme.storage(self.specs[name])


def by_importance(files: Files, moments: Mapping[str, torch.Tensor], *, compensate: bool) -> Weights:
    """Return weights whose scales are searched for by importance, with or without compensated errors."""
    found: Weights = {}
    for name in files.specs:
        storage = files.storage(name)
        if not isinstance(storage, Grid) or name not in moments:
            found[name] = files.deployed(name)
            continue
        weight = torch.from_numpy(files.read(name))
        scales, offsets = weighted_scales(weight, storage, moments[name].diagonal())
        given = Scales(scales.numpy(), None if offsets is None else offsets.numpy())
        found[name] = compensated(weight, moments[name], storage, scales=given)[0] if compensate else None
        if not compensate:
            found[name] = deploy_tensor(weight, storage, given)
    return found


def by_llama(files: Files, known: Mapping[str, np.ndarray]) -> Weights:
    """Return weights as llama.cpp's quantiser leaves them, in the types of a format."""
    rounded = llama_kernel()
    found = {}
    for name, tensor in files.specs.items():
        storage = files.storage(name)
        head = "lm_head.weight" if tensor.role is Role.EMBEDDING else name
        # An importance matrix has no entry for the head of a tied table, because its products are not counted.
        weights = known.get(name) if head == name else None
        found[name] = rounded(files.read(name), KINDS[storage], weights) if isinstance(storage, Grid) else None
    return {name: values for name, values in found.items() if values is not None}


def onnx_bytes(files: Files) -> int:
    """Return the bytes on ONNX Runtime's own grid: half a byte per weight, and a float32 scale for each block."""
    sizes = ((tensor, int(np.prod(tensor.shape))) for tensor in files.specs.values())
    return sum(count // 2 + count // 8 if tensor.role in _MATRICES else 4 * count for tensor, count in sizes)


def by_onnx(files: Files) -> Weights:
    """Return weights on ONNX Runtime's own 4-bit grid, the table too."""
    from onnxruntime.capi import _pybind_state as kernels

    found = {}
    for name, tensor in files.specs.items():
        if tensor.role not in _MATRICES:
            continue
        rows, columns = tensor.shape
        blocks = columns // 32
        codes, scales = np.zeros((rows, blocks, 16), np.uint8), np.zeros(rows * blocks, np.float32)
        zeros = np.zeros(rows * ((blocks + 1) // 2), np.uint8)
        matrix = np.ascontiguousarray(files.read(name).T, np.float32)
        kernels.quantize_matmul_4bits(codes, matrix, scales, zeros, 32, rows, columns, True)
        low, high = codes & np.uint8(15), codes >> np.uint8(4)
        steps = np.stack([low, high], -1).reshape(rows, blocks, 32).astype(np.float32) - 8
        found[name] = (steps * scales.reshape(rows, blocks, 1)).reshape(rows, columns)
    return found


def stored_bytes(files: Files) -> int:
    """Return the bytes of all tensors."""

    def size(tensor: TensorSpec) -> int:
        return tensor_bytes(tensor, files.storage(tensor.name))

    return sum(map(size, files.specs.values()))


def forms(
    student: Path, moments: Mapping[str, torch.Tensor], tokens: torch.Tensor, *, solved: bool
) -> Iterator[tuple[str, Callable[[], tuple[Weights, int]]]]:
    """Yield each form's name, and a function that returns the weights that differ from the model's and the bytes.

    Args:
        student: The model.
        moments: Second moments of the inputs of its matrices.
        tokens: Calibration tokens, int [sequences, LENGTH].
        solved: Whether the model is the one that the tracked run solved.
    """
    known = {name: one.diagonal().numpy() for name, one in moments.items()}
    ours = {name: deployment_named(name) for name in OURS}
    width = json.loads((student / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    table = "q5_1" if width % 256 else "q6_k"  # like the table of other tools, whose files are as small
    for name in ("gguf-q4_0", "gguf-iq4_nl"):
        ours[f"{name}, table in {table}"] = replace(deployment_named(name), types=(("embeddings", table),))
    if solved:
        found = json.loads(SOLVED.read_text(encoding="utf-8"))["constructions"][0]
        one = Deployment.from_json(found["deployment"])
        ours[f"solved, {one.name}"] = one
    for name, deployment in ours.items():
        with Files(student, deployment) as files:
            size = stored_bytes(files)
            yield (
                f"ours: {name}",
                lambda files=files, size=size: ({one: files.deployed(one) for one in files.specs}, size),
            )
            for how in ("importance", "compensated"):

                def made(files: Files = files, size: int = size, how: str = how) -> tuple[Weights, int]:
                    return by_importance(files, moments, compensate=how == "compensated"), size

                yield f"ours: {name}, {how}", made
    for form in LLAMA:
        with Files(student, deployment_named(form)) as files:
            name = f"llama.cpp: {form}, importance"
            yield name, lambda files=files: (by_llama(files, known), stored_bytes(files))
    if importlib.util.find_spec("onnxruntime"):
        with Files(student, deployment_named("gguf-q4_0")) as files:
            yield "ONNX Runtime: int4, blocks of 32", lambda: (by_onnx(files), onnx_bytes(files))
    for name, arm in ARMS.items():
        if missing(arm):
            continue

        def run(arm: Arm = arm) -> tuple[Weights, int]:
            with tempfile.TemporaryDirectory() as out:
                return arm.make(student, Path(out), tokens)

        yield name, run


def judged(model: Any, tokens: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """Return KL to the teacher, and the shares of the text's and the teacher's next tokens that are the most likely."""
    total = text = same = 0.0
    with torch.inference_mode():
        for row, theirs in zip(tokens, teacher, strict=True):
            ours = model(row[None]).logits[0].log_softmax(-1)
            total += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
            text += float((ours[:-1].argmax(-1) == row[1:]).float().mean())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    count = len(tokens)
    return {"kl": total / count, "text": text / count, "same": same / count}


def in_runtime(form: str, container: str, folder: Path, tokens: torch.Tensor) -> dict[str, float]:
    """Run a file of a type in its runtime. Return the file's bytes, and the share of the text's next tokens."""
    deployment, read, exporter = deployment_named(form), tokens.numpy(), load_exporter(container)
    with tempfile.TemporaryDirectory() as out:
        artifact = exporter.export(folder, deployment, Path(out, container))
        top1 = exporter.run(artifact.path, read, 1, folder, deployment).top1
    return {"bytes": artifact.size_bytes, "text": float((top1 == read[:, 1:]).mean())}


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Describe for each rival which form of ours loses least at no more bytes, on the rival's own seeds.

    Args:
        found: By form, its `bytes` and its `kl` by seed.
    """
    for name, rival in found.items():
        if name.startswith("ours"):
            continue
        seeds = sorted(rival["kl"])
        theirs = [rival["kl"][seed] for seed in seeds]
        best = [
            (float(np.mean([one["kl"][seed] for seed in seeds])), mine)
            for mine, one in found.items()
            if mine.startswith("ours") and one["bytes"] <= 1.001 * rival["bytes"] and one["kl"].keys() >= set(seeds)
        ]
        if not best:
            yield f"- {name}: nothing of ours that was judged with its seeds is as small"
            continue
        least, mine = min(best)
        loss, less = float(np.mean(theirs)), over_seeds.paired(rival["kl"], found[mine]["kl"])
        kept = "kept" if least < loss else "missed"
        if least < loss and len(seeds) > 1 and not over_seeds.is_clear(less):
            kept = "not clear"
        by = f"{over_seeds.mean(less, 6 if loss < 0.01 else 4)} less ({_seeds(len(seeds))})"
        yield f"- {name} loses {loss:.4g} nats; {mine}, no larger, {least:.4g}, which is {by}: {kept}"


def beside(ran: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Compare the two files of each type that were run: next tokens of the text, and bytes.

    Args:
        ran: By form, its `bytes` and its `text` by seed.
    """
    for form in RUN_TYPES:
        theirs, ours = (ran.get(f"{_RUN}{form} in {runtime}") for runtime in RUN.values())
        if theirs and ours:
            more = over_seeds.paired(ours["text"], theirs["text"])
            near = "kept" if abs(float(np.mean(more))) <= NEAR else "missed"
            size = ours["bytes"] / theirs["bytes"]
            yield (
                f"- {form}: ONNX Runtime finds {over_seeds.mean(more, 4)} more of the next tokens than llama.cpp "
                f"({_seeds(len(more))}): {near}; its file has {size:.3f} of the bytes: "
                f"{'kept' if size <= 1 else 'missed'}"
            )


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def judge_all(given: argparse.Namespace, kind: str, seed: int) -> None:
    """Judge every form of a model that is not in the store."""
    teacher = given.small if kind == "small" else "smollm2"
    if given.smoke:
        teacher = program.tiny_teacher(layers=2, width=256, ffn=256)
    folder = materialize(resolve_teacher(teacher), cache_folder()).folder
    model: Any = load_model(folder, torch.float32).eval()
    calibration, tokens = (
        one % model.config.vocab_size for one in texts(folder, given.calibration, given.tokens, seed)
    )
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        if kind == "permuted":
            before = model(tokens[:1]).logits
            reorder(model, seed)
            moved = float((model(tokens[:1]).logits - before).abs().max())
            assert moved < 1e-3 * float(before.abs().max()), f"logits moved by {moved}"
            save_model(model, Path(scratch))
            copy_tokenizer(folder, Path(scratch))  # its GGUF file holds the tokenizer
            folder = Path(scratch)
        key = {"model": kind, "seed": seed, "tokens": given.tokens, "calibration": given.calibration}
        solved = kind == "package" and not given.smoke
        names = [name for name, _ in forms(folder, {}, calibration, solved=solved)]
        if any(_wanted(given, key | {"form": name}) for name in names):
            own = {name: one.detach().clone() for name, one in model.named_parameters()}
            said = torch.stack([model(row[None]).logits[0].log_softmax(-1) for row in tokens])
            moments = moments_of(model, calibration)
            for name, make in forms(folder, moments, calibration, solved=solved):
                if not _wanted(given, key | {"form": name}):
                    continue
                with torch.enable_grad():  # AutoRound trains
                    weights, size = make()
                for part, parameter in model.named_parameters():
                    parameter.data = torch.from_numpy(np.array(weights[part])) if part in weights else own[part]
                _keep(key | {"form": name, "bytes": size} | judged(model, tokens, said))
        for form in RUN_TYPES:
            for container, runtime in RUN.items():
                if _wanted(given, key | {"form": (name := f"{_RUN}{form} in {runtime}")}):
                    _keep(key | {"form": name} | in_runtime(form, container, folder, tokens))


def _wanted(given: argparse.Namespace, key: dict[str, Any]) -> bool:
    """Return whether a form is asked for and is not in the store."""
    known = report.lines_of(program.REPORTS / STORE)
    return bool(re.search(given.only, key["form"])) and not any(key.items() <= one.items() for one in known)


def _keep(found: dict[str, Any]) -> None:
    print(found, flush=True)
    report.add_line(program.REPORTS / STORE, found)


def section(given: argparse.Namespace, kind: str) -> list[str]:
    """Return the part of the report about one model."""
    found: dict[str, dict[str, Any]] = {}
    for one in report.lines_of(program.REPORTS / STORE):
        if (one.get("model"), one["tokens"], one.get("calibration")) == (kind, given.tokens, given.calibration):
            kept = found.setdefault(one["form"], {"bytes": one["bytes"], "kl": {}, "text": {}, "same": {}})
            for key in ("kl", "text", "same"):
                kept[key] |= {one["seed"]: one[key]} if key in one else {}

    def shown(one: dict[str, Any], key: str, digits: int) -> str:
        """Return the mean over the seeds of a form."""
        return over_seeds.mean([*one[key].values()], digits)

    ran = {name: found.pop(name) for name in sorted(found) if name.startswith(_RUN)}
    digits = 6 if kind == "small" else 4
    rows = [
        [
            *(kind, name, f"{one['bytes'] / 1e6:.{3 if kind == 'small' else 1}f}", shown(one, "kl", digits)),
            *(shown(one, "same", 4), shown(one, "text", 4), str(len(one["kl"]))),
        ]
        for name, one in sorted(found.items(), key=lambda pair: float(np.mean([*pair[1]["kl"].values()])))
    ]
    titles = ["model", "form", "MB", "KL to the model, nats", "tokens as the model's", "tokens of the text", "seeds"]
    files = [
        f"- {name}: {one['bytes'] / 1e6:.3f} MB of file, {shown(one, 'text', 4)} of the text's next tokens "
        f"({_seeds(len(one['text']))})"
        for name, one in ran.items()
    ]
    told = [*verdicts(found), *files, *beside(ran)]
    return [f"## The model {MODELS[kind]}", report.table(titles, rows), "\n".join(told)]


def main() -> None:
    """Make and judge every form of the models and write the report, or only write the report of earlier results."""
    parser = program.parser_of(__doc__, seeds=1)
    parser.add_argument("--tokens", type=program.token_count, default=1000, help="that are judged by")
    parser.add_argument("--calibration", type=program.token_count, default=2000, help="tokens that are calibrated on")
    parser.add_argument("--only", default="", help="a regular expression of the names of the forms that are judged")
    parser.add_argument("--models", default="package,permuted", help="that are judged, separated by commas")
    parser.add_argument("--small", default="", help="the folder of the small model, that `search.small_teacher` wrote")
    parser.add_argument("--render", action="store_true", help="write the report of what was judged, and judge nothing")
    given = program.parse(parser, tokens=100, calibration=200)
    torch.set_num_threads(1)
    if "small" in given.models.split(",") and not (given.small or given.smoke):
        parser.error("--models small takes --small FOLDER")
    for seed in range(0 if given.render else given.seeds):
        for kind in given.models.split(","):
            judge_all(given, kind, seed)
    absent = [f"{name}: {said}" for name, arm in ARMS.items() if (said := missing(arm))]
    told = (
        f"SmolLM2-135M, and a small model, {given.calibration} tokens to calibrate on and {given.tokens} to judge by "
        "with each seed. The last column has the number of seeds, and ± is the standard error over them. One seed is "
        "the first of them, so rows of one and of more seeds are not compared. Bytes are of the tensors. What was "
        "solved was so on another text (PostgreSQL's manual). A form that a table lacks was not judged at these sizes. "
        f"{'. '.join(absent)}"
    ).strip()
    sections = [told, *(part for kind in MODELS for part in section(given, kind))]
    store = program.REPORTS / STORE
    print(report.write("export-quality", "One model in every 4-bit form, at equal bytes", sections, store))


if __name__ == "__main__":
    main()
