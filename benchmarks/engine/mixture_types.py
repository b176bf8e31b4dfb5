"""Write the tensor types that llama.cpp's own quantiser uses in its mixtures of types, as a reference for the tests.

    python -m benchmarks.engine.mixture_types --library .../libllama.so --release v0.4.0

Tiny models of random weights are exported in 16 bits, and quantised by llama.cpp (`common.llama_quantizer`).
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf

from autodistill.advisor.describe import deployment_named
from autodistill.export.gguf import GgufExporter
from autodistill.testing import save_tiny_teacher
from benchmarks.common import program
from benchmarks.common.llama_quantizer import FILE_TYPES, load_quantizer, quantize

OUT = Path(__file__).parents[2] / "tests" / "quantization" / "llama_cpp_mixtures.json"
FORMS = {"gguf-q4_k_m": FILE_TYPES["Q4_K_M"], "gguf-q5_k_m": FILE_TYPES["Q5_K_M"]}
# Llamas: many numbers of layers, up to more than two eighths, and rows that super-blocks divide only in part. Other
# families: tensors that their graphs name otherwise.
CASES: tuple[dict[str, Any], ...] = (
    *({"architecture": "llama", "layers": layers} for layers in range(1, 19)),
    {"architecture": "llama", "layers": 33},
    {"architecture": "llama", "layers": 9, "tied": False},
    {"architecture": "llama", "layers": 9, "tied": False, "width": 192},
    {"architecture": "llama", "layers": 9, "width": 192},
    {"architecture": "llama", "layers": 9, "tied": False, "ffn": 192},
    {"architecture": "mistral", "layers": 9, "tied": False},
    {"architecture": "qwen2", "layers": 11},
    {"architecture": "qwen3", "layers": 10, "tied": False},
    {"architecture": "gemma3_text", "layers": 13},
    {"architecture": "gpt_neox", "layers": 12, "tied": False},
)


def stored(library: ctypes.CDLL, model: Path, file_type: int, out: Path) -> dict[str, str | list[str]]:
    """Return the types of a quantised file's matrices, by name.

    A block's matrix has a list of types by layer if they differ.
    """
    quantize(library, model, out, file_type)
    found: dict[str, dict[int, str]] = {}
    for tensor in gguf.GGUFReader(out).tensors:
        if len(tensor.shape) > 1:
            place, _, part = tensor.name.removeprefix("blk.").partition(".")
            name, layer = (part, int(place)) if place.isdigit() else (tensor.name, 0)
            found.setdefault(name.removesuffix(".weight"), {})[layer] = tensor.tensor_type.name
    by_layer = {name: [types[layer] for layer in sorted(types)] for name, types in sorted(found.items())}
    return {name: types[0] if len(set(types)) == 1 else types for name, types in by_layer.items()}


def cases(library: ctypes.CDLL, asked: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the type in which llama.cpp stores each tensor, case by case."""
    for case in asked:
        sizes = {"width": 256, "ffn": 256, "tied": True} | case
        with tempfile.TemporaryDirectory() as folder:
            teacher = save_tiny_teacher(Path(folder) / "teacher", **sizes)
            model = GgufExporter().export(teacher, deployment_named("gguf-f16"), Path(folder) / "gguf").path
            for form, file_type in FORMS.items():
                types = stored(library, model, file_type, Path(folder) / "quantised.gguf")
                yield sizes | {"format": form, "types": types}


def main() -> None:
    """Ask llama.cpp for the type of each tensor, and write the cases that the tests compare with."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--library", type=Path, required=True, help="libllama, beside the libraries that it loads")
    parser.add_argument("--release", required=True, help="which release of llama.cpp it is of")
    given = program.parse(parser)
    made = cases(load_quantizer(given.library), CASES[:1] if given.smoke else CASES)
    out = program.REPORTS / OUT.name if given.smoke else OUT
    lines = ",\n".join(json.dumps(case) for case in made)
    out.write_text(f'{{"release": {json.dumps(given.release)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
