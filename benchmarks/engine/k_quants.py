"""K-quants packed here against llama.cpp's own quantiser: losses of weights and of a model, and times.

    python -m benchmarks.engine.k_quants [--teacher smollm2] [--tokens 1024] [--millions 135]

llama.cpp's quantiser is called in the library that the xllamacpp package ships, without an importance matrix. It
minimises errors weighted by the size of weights, and ours plain errors. So the model's divergence decides between them.
If rows are no multiples of 256, both get the grids that replace super-blocks.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import xllamacpp

from autodistill.advisor.describe import deployment_named
from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.training import fake_quantize as quantization
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.inference.scoring import score, score_teacher
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.options import cache_folder
from autodistill.quantization.formats import weights_bytes
from autodistill.quantization.grids import Q2_K, Q3_K, Q4_0, Q4_K, Q5_K, Q6_K, Floats, Grid
from autodistill.quantization.packing import deployed, pack
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json
from benchmarks.common import report
from benchmarks.common.model_files import Case, milliseconds
from benchmarks.common.program import parse, parser_of, tiny_teacher, token_count
from benchmarks.engine.qat_step import FINISHINGS, SCALES, measure

GRIDS = (Q6_K, Q5_K, Q4_K, Q3_K, Q2_K)
FORMS = (
    "gguf-q8_0",
    "gguf-q6_k",
    "gguf-q5_k_m",
    "gguf-q5_k",
    "gguf-q5_1",
    "gguf-q4_k_m",
    "gguf-q4_k",
    "gguf-q5_0",
    "gguf-q4_0",
    "gguf-q3_k",
    "gguf-q2_k",
)
FINISHED: Mapping[str, Mapping[str, Any]] = {
    "Q4_0": FINISHINGS["Q4_0"],
    "Q4_K": {"format": "gguf-q4_k", "bits": 4, "group_size": 32, "symmetric": False},
    "Q6_K": {"format": "gguf-q6_k", "bits": 6, "group_size": 16},
}
SERVED = {"layers": 12, "width": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocabulary": 16000}
TRAINED = {"layers": 10, "width": 768, "heads": 12, "kv_heads": 4, "ffn": 2048}


def _quantizer() -> Callable[..., int]:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    found = library.ggml_quantize_chunk
    found.restype = ctypes.c_size_t
    found.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return found  # type: ignore[no-any-return]


def packed_by_llama_cpp(weights: Floats, grid: Grid) -> tuple[npt.NDArray[np.uint8], gguf.GGMLQuantizationType]:
    """Return the bytes that llama.cpp's quantiser makes from [out, in], and their type."""
    kind = gguf.GGMLQuantizationType[grid.name.removeprefix("gguf-").upper()]
    size, count = gguf.GGML_QUANT_SIZES[kind]
    packed = np.empty((len(weights), weights.shape[1] // size * count), np.uint8)
    weights = np.ascontiguousarray(weights)
    _quantizer()(int(kind), weights.ctypes.data, packed.ctypes.data, 0, *weights.shape, None)
    return packed, kind


def by_llama_cpp(weights: Floats, grid: Grid) -> Floats:
    """Return the values of weights [out, in] that llama.cpp's quantiser packed."""
    packed, kind = packed_by_llama_cpp(weights, grid)
    return np.asarray(gguf.quants.dequantize(packed, kind), np.float32)


def by_ends(weights: Floats, grid: Grid) -> Floats:
    """Return the values of weights [out, in] whose codes span each group: the rules of Q4_1 and Q4_0.

    Scales are in float32.
    """
    groups = weights.reshape(-1, grid.group_size)
    if grid.symmetric:
        first = np.abs(groups).argmax(-1)[:, None]
        scale = np.take_along_axis(groups, first, -1) / np.float32(grid.qmin)
        return (np.rint(groups / scale).clip(grid.qmin, grid.qmax) * scale).reshape(weights.shape)
    low = groups.min(-1, keepdims=True).clip(None, 0)
    scale = (groups.max(-1, keepdims=True) - low) / np.float32(grid.qmax)
    return (np.rint((groups - low) / scale) * scale + low).reshape(weights.shape)


def draws(folder: Path) -> dict[str, Floats]:
    """Return the weights that are packed, by name: trained ones and random ones."""
    random = np.random.default_rng(0)
    model = load_model(folder, torch.float32)
    layers = model.model.layers
    # They are taken as columns, because the rows of the teacher's file are already in groups of 32 on a 4-bit grid.
    trained = [layers[index].mlp.up_proj.weight.detach().numpy().T for index in range(0, len(layers), 6)]
    whole = [matrix[:, : matrix.shape[1] // 256 * 256] for matrix in trained]
    gridded = [layers[index].mlp.down_proj.weight.detach().numpy() for index in range(0, len(layers), 6)]
    return {
        "normal": random.standard_normal((1024, 2048)).astype(np.float32),
        "Student's t, 4 degrees": random.standard_t(4, (1024, 2048)).astype(np.float32),
        "the model's, transposed": np.ascontiguousarray(np.concatenate(whole)),
        "the model's, as they are: on 4 bits": np.ascontiguousarray(np.concatenate(gridded)),
    }


def losses(found: Mapping[str, Floats]) -> str:
    """Return the table of errors of weights."""
    lines = []
    for grid in GRIDS:
        for name, weights in found.items():
            ours, theirs, ends = (
                float(np.square(rule(weights, grid) - weights).mean() / np.square(weights).mean())
                for rule in (deployed, by_llama_cpp, by_ends)
            )
            kind = grid.name.removeprefix("gguf-").upper()
            report.note(f"squared error, {kind} of {name}: here, llama.cpp, codes by ends", [ours, theirs, ends])
            lines.append(
                [kind, name, f"{ours:.3e}", f"{theirs:.3e}", *(_more(ours, other) for other in (theirs, ends))]
            )
    return "## Squared error, as a share of the weights' squares\n\n" + report.table(
        ["grid", "weights", "here", "llama.cpp", "here / llama.cpp", "here / codes that span the group"], lines
    )


def _more(ours: float, other: float) -> str:
    """Describe how much larger an error is than another. The other is 0 if the weights are on its grid."""
    return f"{ours / other - 1:+.1%}" if other > 0 else "the other is 0"


def seconds(millions: int) -> str:
    """Return the table of times of packing."""
    weights = np.random.default_rng(0).standard_normal((2048, 4096)).astype(np.float32)
    times = millions * 1e6 / weights.size
    lines = []
    for grid in (*GRIDS, Q4_0):
        taken = []
        for rule in (pack, packed_by_llama_cpp):
            rounds = []
            for _ in range(3):
                began = time.process_time()
                rule(weights, grid)
                rounds.append(time.process_time() - began)
            taken.append(min(rounds) * times)
        report.note(f"seconds to pack, {grid.name}: here, llama.cpp", taken)
        lines.append([grid.name.removeprefix("gguf-").upper(), *(f"{one:.1f}" for one in taken)])
    return f"## Seconds of one core to pack {millions} million weights\n\nThe least of three.\n\n" + report.table(
        ["grid", "here", "llama.cpp"], lines
    )


def _theirs(model: Any, spec: ModelSpec, form: str) -> dict[str, torch.Tensor]:
    """Return the weights that llama.cpp's quantiser would give a model on the grids of a format."""
    deployment, found = deployment_named(form), {}
    parameters = dict(model.named_parameters())
    for tensor in spec.tensors:
        storage = deployment.storage(tensor)
        if isinstance(storage, Grid):
            found[tensor.name] = torch.from_numpy(by_llama_cpp(parameters[tensor.name].detach().numpy(), storage))
    return found


def divergences(folder: Path, tokens: int, forms: Sequence[str]) -> str:
    """Return the table of what a model loses."""
    model = load_model(folder, torch.float32)
    spec = spec_from_config(read_json(folder / "config.json"))
    text = prepare(
        resolve_data("pydoc"),
        folder,
        tokenizer_fingerprint(folder),
        256,
        Path(tempfile.gettempdir()) / "autodistill-k-quants",
    ).folder
    data = load_split(text, "validation").head(tokens)
    own, reference = score_teacher(model, data)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lines = []
    for form in forms:
        deployment, figures = deployment_named(form), []
        with deployed_weights(model, spec, deployment):
            figures.append(score(model, data, reference)[0])
        for name, values in _theirs(model, spec, form).items():
            model.get_parameter(name).data = values
        figures.append(score(model, data, reference)[0])
        for name, values in kept.items():
            model.get_parameter(name).data = values
        blocks = sum(
            int(np.prod(tensor.shape))
            for tensor in spec.tensors
            if isinstance(grid := deployment.storage(tensor), Grid) and grid.block_size and tensor.role is Role.LINEAR
        )
        linears = sum(int(np.prod(tensor.shape)) for tensor in spec.tensors if tensor.role is Role.LINEAR)
        for one, whose in zip(figures, ("here", "llama.cpp"), strict=True):
            report.note(f"KL and NLL, {form}, {whose}", [np.mean(one.divergence), one.nll.mean()])
        lines.append(
            [
                form,
                f"{weights_bytes(spec.tensors, deployment) / 1e6:.1f} MB",
                f"{blocks / linears:.0%}",
                *(f"{np.mean(one.divergence):.4f}" for one in figures),
                *(f"{np.exp(one.nll.mean()):.2f}" for one in figures),
            ]
        )
    return (
        f"## What is lost of the model\n\nKL from the model in float32, in nats, and perplexity (in float32 "
        f"{np.exp(own.nll.mean()):.2f}), over {data.predicted} tokens of documentation.\n\n"
        + report.table(
            [
                "format",
                "weights",
                "linear weights in super-blocks",
                "KL, here",
                "llama.cpp",
                "perplexity, here",
                "llama.cpp",
            ],
            lines,
        )
    )


def steps(folder: Path, sizes: Mapping[str, int]) -> str:
    """Return the table of training steps on the grids."""
    teacher = save_tiny_teacher(folder / "teacher", **sizes)
    found = measure(teacher, 1024, 3, 1, False, {"": quantization}, SCALES, FINISHED)
    report.note("seconds of steps", found)
    plain = found.pop("plain")
    lines = [
        [name, f"{statistics.median(one / other - 1 for one, other in zip(values, plain, strict=True)):+.0%}"]
        for name, values in found.items()
    ]
    return (
        "## Training on the grid\n\nWhat it adds to a step of 1,024 tokens by cross-entropy, of CPU time on one core, "
        "the median of three rounds; 8 layers of width 768, of which every row is in super-blocks.\n\n"
        + report.table(["grid, scales", "added"], lines)
    )


def speeds(folder: Path, sizes: Mapping[str, int], forms: Sequence[str]) -> str:
    """Return the table of speeds in llama.cpp."""
    lines = []
    for form in forms:
        case = Case(family="llama", tied=True, form=form, **sizes)
        rounds = [milliseconds(case, folder, prompt) for prompt in (32, 512) for _ in range(2)]
        steps, firsts = zip(*rounds, strict=True)
        report.note(f"milliseconds of a token and of a prompt, {form}", rounds)
        lines.append([form, f"{min(steps[:2]):.1f}", f"{min(steps[2:]):.1f}", f"{min(firsts[2:]):.0f}"])
    return (
        "## Served by llama.cpp on one core\n\nMilliseconds of CPU, the least of two, of a model of 12 layers, width "
        "1024 and a vocabulary of 16,000.\n\n"
        + report.table(["format", "a token behind 32", "behind 512", "a prompt of 512"], lines)
    )


def main() -> None:
    """Pack weights and a model with both quantisers, and write the report of losses and times."""
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2", help="a reference, as `search` takes it")
    parser.add_argument("--tokens", type=token_count, default=1024, help="that the model is judged on")
    parser.add_argument("--millions", type=int, default=135, help="of weights that are packed")
    arguments = parse(parser, tokens=256, millions=1)
    served, trained, forms = SERVED, TRAINED, FORMS
    if arguments.smoke:
        arguments.teacher = tiny_teacher(width=256, ffn=512)
        served, trained, forms = SERVED | {"layers": 2}, TRAINED | {"layers": 4, "ffn": 256}, ("gguf-q4_k",)
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = materialize(resolve_teacher(arguments.teacher), cache_folder()).folder
    head = (
        f"The model is {arguments.teacher}, whose own file has its weights in Q4_1. llama.cpp's quantiser is that of "
        f"xllamacpp {xllamacpp.__version__}, without an importance matrix."
    )
    sections = [head, losses(draws(folder)), seconds(arguments.millions), divergences(folder, arguments.tokens, forms)]
    with tempfile.TemporaryDirectory() as temporary:
        sections += [speeds(Path(temporary), served, forms), steps(Path(temporary), trained)]
    print(report.write("k-quants", "K-quants, against llama.cpp's own quantiser", sections))


if __name__ == "__main__":
    main()
