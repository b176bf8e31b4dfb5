"""The time of solving on a GPU that is not here, against sums that were worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autodistill as ad
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.estimates.solving_on_gpu import ROUNDING
from autodistill.quantization import loops
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Storage
from autodistill.search.solve.bench import _rounded
from autodistill.search.solve.options import _IN_VLLM
from benchmarks.hardware.solving_memory import LARGE

LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
TABLE = 128256 * 4096
NORMS = 65 * 4096
TYPES_OF_GGUF = 13
ASKED: dict[str, Any] = {"budget": "8GB", "plan": True, "solve_on": "rtx 4090"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the config of an 8B."""
    folder = tmp_path_factory.mktemp("llama") / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plan(llama: Path) -> dict[str, Any]:
    found: dict[str, Any] = ad.solve(llama, coarse=True, **ASKED).document["plan"]
    return found


def test_an_8b_on_a_gpu_of_24_gb_takes_the_time_of_its_operations_bytes_and_files(plan: dict[str, Any]) -> None:
    tokens, linear = 512, 32 * LAYER
    forward = 2 * (linear + TABLE)
    # The teacher reads its own text once, text that is kept apart twice, and once for the importance of columns. The
    # gradients take a pass forward, one back, and one more of each block; then each type moves each matrix. Types of
    # both tables, two of the cache's keys and two of its values are measured, then 7 storages, and 6 on twice the text.
    read = 4 + 2 + (2 * TYPES_OF_GGUF + 2 + 2) + 7 + 2 * 6
    products = tokens * (read * forward + 2 * linear + 2 * TYPES_OF_GGUF * linear)
    parts = plan["elsewhere"]["seconds_by_part"]
    assert parts["products"] == pytest.approx(products / (0.5 * 82.6e12))
    # All types of a matrix are rounded once. In each of 7 storages every matrix is rounded again, to any of its types.
    moved = 12 + 87 + 608 + 2 * 2609 + 2 * 2966 + 2 * 3758 + 6671 + 1060 + 3821 + 3971
    times = linear + 2 * TABLE + 7 * linear / TYPES_OF_GGUF
    assert parts["rounding"] == pytest.approx(times * moved / (0.72 * 1008e9), rel=1e-6)
    # Three readings for the texts, two for the gradients, then one for each measurement; two bytes a weight. The text
    # that is kept apart goes through the layers beside the first one.
    readings = 3 + 2 + (2 * TYPES_OF_GGUF + 4) + 7
    assert plan["elsewhere"]["readings"] == readings
    assert parts["reading"] == pytest.approx(readings * 2 * (linear + 2 * TABLE + NORMS) / 3e9)
    assert plan["seconds"] == pytest.approx(sum(parts.values()))
    assert plan["elsewhere"]["slow_seconds"] == pytest.approx(
        products / (0.15 * 82.6e12) + times * moved / (0.35 * 1008e9) + 3 * parts["reading"]
    )


def test_it_holds_one_layer_at_a_time_in_the_memory_of_its_parts(plan: dict[str, Any]) -> None:
    tokens = 512
    # Both tables, as they are and in a type; a layer, as it is and in types; the rounded copy and the error of the
    # largest matrix. Inputs and gradients of a layer's matrices, the states before each layer, the likeliest tokens of
    # both texts, and seven arrays of the logits that are computed at once.
    largest = 4096 * 14336
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    held = 2 * 2 * TABLE + 2 * LAYER + 2 * largest + tokens * sides + 32 * 4096 * tokens
    held += 3 * tokens * 2 * 256 + 7 * 2**22
    assert plan["streamed"]
    assert plan["memory_bytes"] == pytest.approx(4 * held, rel=1e-6)
    assert (
        plan["memory_bytes"] < 16e9 < plan["machine_bytes"] == 24564 * 2**20 - 600 * 10**6 < plan["memory_bytes_whole"]
    )


def test_the_plan_says_where_it_is_from_and_what_was_assumed(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["solve", str(llama), "--budget", "8GB", "--plan", "--coarse", "--solve-on", "rtx 4090"]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "on the NVIDIA GeForce RTX 4090 for the types" in said
    assert "predicted from its data sheet" in said
    assert "at an assumed 3.00 GB per second" in said
    assert "no cuts are tried" in said
    assert main([*arguments, "--memory", "12GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["machine_bytes"] == 12 * 10**9
    # Half the precision, twice the rate: bf16 runs at 165 of 82.6 tera operations.
    whole = ad.solve(llama, **ASKED).document["plan"]["elsewhere"]["seconds_by_part"]
    half = ad.solve(llama, scoring="bf16", **ASKED).document["plan"]["elsewhere"]["seconds_by_part"]
    assert half["products"] == pytest.approx(whole["products"] * 82.6 / 165)
    assert half["rounding"] == whole["rounding"]


def test_a_small_teacher_waits_for_its_operations_to_be_started(tmp_path: Path) -> None:
    # Two layers of one matrix of 64 x 64 each part: every operation costs a forty-first of a layer's 600 microseconds.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(
        json.dumps(LARGE | sizes | {"num_key_value_heads": 1, "vocab_size": 320, "tie_word_embeddings": True})
    )
    plan = ad.solve(tmp_path, **ASKED).document["plan"]
    assert not plan["streamed"]
    assert plan["elsewhere"]["readings"] == 1
    # Types whose blocks of 32 divide 64; all matrices and the table have as many columns.
    started = 2 + 21 + 774 + 757 + 774 + 1286 + 757 + 228
    matrices = 2 * 7 + 320 / 64
    assert plan["elsewhere"]["seconds_by_part"]["rounding"] == pytest.approx(matrices * started * 600e-6 / 41)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": False}, "--solve-on names a GPU that is not here, where nothing can be solved: add --plan"),
        ({"solve_on": "pi 5"}, "Raspberry Pi 5 8GB is none: name a GPU"),
        ({"solve_on": "local"}, "without it, --plan is of this machine"),
        ({"solve_on": "rtx 9999"}, "there is no device 'rtx 9999'"),
        ({"scoring": "tf32"}, "no rates of TF32"),
        ({"solve_on": "box"}, r"no fp32 rate of box: describe it with --devices FILE"),
        ({"memory": "1GB"}, r"even with one layer in memory at a time: give a --memory of \d+MB"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_a_line(
    options: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("devices: {box: {class: discrete-gpu, memory: 24GB, bandwidth: 900GB, rates: {fp16: 80}}}")
    with pytest.raises(InputError, match=said):
        ad.solve(llama, **{**ASKED, "devices": [own], **options})


def test_without_a_plan_the_program_ends_with_a_line(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(llama), "--budget", "8GB", "--solve-on", "4090"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_folder_without_weights_is_planned_and_not_solved(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \*\.safetensors file"):
        ad.solve(llama, budget="8GB")
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickles only"):
        ad.solve(folder, **ASKED)


class _Counted(TorchDispatchMode):
    """Counts the bytes that operations read and write, and the operations. Views cost nothing."""

    bytes, operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            self.operations += 1
            self.bytes += sum(map(self._of, [*args, *(kwargs or {}).values(), found]))
        return found

    def _of(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            held = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
            return math.prod(held) * value.element_size()
        return sum(map(self._of, value)) if isinstance(value, list | tuple) else 0


@pytest.mark.parametrize(("kind", "storage"), [*TYPES.items(), *_IN_VLLM.items()])
def test_rounding_moves_the_bytes_that_are_counted(
    kind: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_imported", lambda name: None)  # as on a GPU, for which no loops are compiled
    weights = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    with _Counted() as counted:
        _rounded(weights, storage)
    moved, operations = ROUNDING[kind.partition("-")[0]]
    low = 0.95 if kind.startswith("int") else 0.98
    assert low * moved < counted.bytes / weights.numel() < 1.02 * moved
    assert low * operations <= counted.operations <= operations
