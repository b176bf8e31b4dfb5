"""What each of several GPUs holds, against values by hand for a small shape; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.advisor.describe import deployment_named, shape
from autodistill.advisor.estimate import appraise, training_parts, undivided_bytes
from autodistill.advisor.gpu_parts import running_parts
from autodistill.api.estimates import estimate
from autodistill.cli.hardware_summary import appraisal_text
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.testing import save_tiny_teacher
from autodistill.units import format_bytes

MODEL = shape({"layers": 10, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1024, "vocab": 32000}, tied=True)


def test_each_gpu_holds_its_part_of_matrices_and_cache_and_whole_norms() -> None:
    found = running_parts(MODEL.spec, 4, context=256, batch=2)
    matrices = 32000 * 512 + 10 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    norms = 21 * 512
    assert found["count"] == 4
    assert found["alone"]["weights_bytes"] == 2 * matrices + 4 * norms
    assert found["each"]["weights_bytes"] == 2 * matrices // 4 + 4 * norms
    # Keys and values of two sequences, with two bytes each.
    assert found["alone"]["kv_cache_bytes"] == 2 * 2 * 10 * 256 * 256 * 2 == 4 * found["each"]["kv_cache_bytes"]
    assert found["each"]["overhead_bytes"] == TRAINING_PROCESS_BYTES
    for parts in (found["alone"], found["each"]):
        assert parts["total_bytes"] == sum(size for name, size in parts.items() if name != "total_bytes")


def test_training_is_divided_too_and_shown_for_each_gpu() -> None:
    alone, each = training_parts(MODEL.spec, 256), training_parts(MODEL.spec, 256, 4)
    for way, parts in each.items():
        assert parts["gradients_bytes"] == alone[way]["gradients_bytes"] // 4
        assert parts["total_bytes"] < alone[way]["total_bytes"]
    document = appraise(MODEL, deployment_named("gguf-q8_0"), training=256, gpus=4)
    text = appraisal_text(document)
    assert "training on each of 4 GPUs" in text
    assert "each of 4" in text
    assert appraise(MODEL, deployment_named("gguf-q8_0"))["gpus"] is None


def test_no_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        running_parts(MODEL.spec, 0, context=256, batch=1)


def test_heads_that_do_not_divide_are_refused_unless_training_is_asked_for() -> None:
    """FSDP2 divides rows of each matrix, whatever its heads."""
    sizes = {"layers": 10, "width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152}
    with pytest.raises(InputError, match="--gpus 4: its 9 attention heads do not divide over 4: give"):
        estimate(gpus=4, **sizes)
    found = estimate(training=1024, gpus=4, **sizes).document
    assert found["training"]["gpus"] == 4
    assert found["gpus"]["each"] is None
    assert "is not divided over 4 GPUs: its 9 attention heads do not divide over 4." in appraisal_text(found)


def test_a_strategy_is_trained_on_any_number_of_gpus(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", width=96, heads=3, kv_heads=1)
    found = estimate(str(teacher), strategy="logit_kd", gpus=4, runs=tmp_path).document
    assert found["training"]["gpus"] == 4
    assert found["gpus"]["not_divided"] is not None


def test_what_no_number_of_gpus_divides_is_told() -> None:
    """With more and more GPUs, each GPU's need approaches this: whole tables and layers, and its own pass."""
    least = undivided_bytes(MODEL.spec, 256)
    totals = [
        min(parts["total_bytes"] for parts in training_parts(MODEL.spec, 256, gpus).values()) for gpus in (2, 8, 512)
    ]
    assert totals == sorted(totals, reverse=True)
    assert least < totals[-1]
    # Only weights, gradients and two moments of a byte each, with their scales, are divided.
    assert totals[-1] - least < 12 * MODEL.spec.parameters / 512
    table = MODEL.spec.vocabulary * MODEL.spec.width
    assert least > 4 * 2 * table
    document = appraise(MODEL, deployment_named("gguf-q8_0"), training=256, gpus=4)
    assert document["training"]["undivided_bytes"] == least
    assert f"{format_bytes(least)} stay on each" in appraisal_text(document)
