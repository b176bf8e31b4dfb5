"""Which family can be exported in which format: docs/formats.md has the exporters' own table, and each cell is run.

`python -m tests.export.test_matrix` rewrites the table.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.estimates.fit import cannot_hold
from autodistill.export.base import TakesAny, load_exporter
from autodistill.export.graphs.onnx_decoder import unsupported
from autodistill.export.phones.phone import PhoneExporter
from autodistill.export.proof import simulate
from autodistill.export.student_reader import no_graph
from autodistill.export.verify import prove, verify
from autodistill.models.config import resized, spec_from_config
from autodistill.models.families import FAMILIES, TRAINED
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher, tiny_config
from tests.export.phones.test_phone import installed

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- matrix: written by tests/export/test_matrix.py -->\n", "<!-- end of the matrix -->\n"
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
FORMATS = {
    "huggingface": IN_16_BITS,
    "compressed-tensors": INT4,
    **dict.fromkeys(
        ("gguf", "onnx", "onnx-f16", "pt2", "torchscript", "aoti", "litert", "litert-codes", "litertlm", "executorch"),
        Q4_0,
    ),
}
TOKENS = np.random.default_rng(0).integers(3, 300, (2, 40))


def gap(folder: Path, family: str, name: str, **changes: Any) -> str:
    """Return why a format cannot hold a family, or "" if it can."""
    # All Gemma models except one of 27B scale attention by the head dim.
    # A Gemma 4 has as many tokens in its further table as in the other.
    usual = {"gemma3_text": {"query_pre_attn_scalar": 16}, "gemma4_text": {"vocab_size_per_layer_input": 256}}
    config = tiny_config(family, **usual.get(family, {}), **changes)
    exporter = load_exporter(name)
    (folder / "config.json").write_text(json.dumps(config))
    if name == "aoti":
        return no_graph(folder)  # takes whatever torch runs, but a compiler may be missing
    if isinstance(exporter, PhoneExporter):
        # The exporter itself says the same if its packages are installed.
        return no_graph(folder) or unsupported(config)
    if isinstance(exporter, TakesAny):
        return exporter.refuses(folder, FORMATS[name])
    return cannot_hold(spec_from_config(config), FORMATS[name])


def widths(name: str) -> str:
    """Return how a format holds layers of different widths."""
    if isinstance(load_exporter(name), TakesAny):
        return "as they are"
    (held,) = {form.layer_widths for form in load_exporter(name).formats}
    spec = resized(spec_from_config(tiny_config("llama")), ffn_widths=(64, 96, 128, 192))
    assert cannot_hold(spec, FORMATS[name]) == ""
    return {"own": "as they are (Llama)", "padded": "padded with zeros", "one": "no"}[held]


def matrix(folder: Path) -> str:
    """Return the table, and its gaps with their reasons."""
    reasons: dict[str, str] = {}
    lines = [f"| family | {' | '.join(FORMATS)} |", "| --- |" + " --- |" * len(FORMATS)]
    for family in TRAINED:
        cells = []
        for name in FORMATS:
            found = {tied: gap(folder, family, name, tie_word_embeddings=tied) for tied in (False, True)}
            if not any(found.values()):
                cells.append("yes")
                continue
            said = next(filter(None, found.values()))
            if said not in reasons:
                reasons[said] = f"{name}, {family}: {said}"
            held = "no" if all(found.values()) else "untied" if found[True] else "tied"
            cells.append(f"{held} ({list(reasons).index(said) + 1})")
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines.append(f"| layers of their own width | {' | '.join(map(widths, FORMATS))} |")
    return "\n".join([*lines, "", *(f"{place}. {reason}." for place, reason in enumerate(reasons.values(), 1))]) + "\n"


def test_the_page_has_what_the_exporters_say(tmp_path: Path) -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0] == matrix(tmp_path), "write it anew: python -m tests.export.test_matrix"


def test_heads_of_qwen2_fill_the_width_in_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp's graph makes queries as wide as the model, whatever the file says, and would not load it."""
    said = gap(tmp_path, "qwen2", "gguf", head_dim=32)
    assert "takes 4 heads of qwen2 to fill its width of 64, and they have 32 channels each" in said
    assert gap(tmp_path, "qwen3", "gguf", head_dim=32) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", TRAINED)
def test_each_cell_is_exported_and_does_what_was_evaluated(tmp_path: Path, family: str, name: str) -> None:
    """The shape is odd: 3 heads that are wider than their share, one key head, 300 entries, and a width of 96."""
    if name == "aoti" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    exporter, deployment = load_exporter(name), FORMATS[name]
    if family not in FAMILIES and name not in ("huggingface", "gguf"):
        pytest.skip("the table says no")
    if isinstance(exporter, PhoneExporter) and not installed(exporter):
        pytest.skip(f"{' and '.join(exporter.packages)} is not installed")
    shape: dict[str, Any] = {
        "layers": 3 if family in FAMILIES else 4,
        "width": 96,
        "heads": 3,
        "kv_heads": 1,
        "ffn": 160,
        "tied": False,
        "seed": 1,
    }
    if family not in ("gpt_neox", "llama", "gemma3_text") and (family, name) != ("qwen2", "gguf"):
        shape["head_dim"] = 64
    student = save_tiny_teacher(tmp_path / "student", architecture=family, **shape)
    artifact = exporter.export(student, deployment, tmp_path / "out")
    verify(exporter, artifact, student, deployment)
    expected = simulate(student, deployment, TOKENS, 1)
    check = prove(exporter, artifact.path, deployment, expected, 1, student)
    if isinstance(exporter, PhoneExporter) or name in ("pt2", "torchscript", "aoti"):
        assert (check.agreement, check.same_written) == (1.0, 64)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = matrix(Path(scratch))
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(f"{BEGIN}.*{END}", lambda found: BEGIN + made + END, text, flags=re.DOTALL), encoding="utf-8"
    )
