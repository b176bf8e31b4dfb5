"""What a user reads about devices."""

from __future__ import annotations

from autodistill.advisor.describe import deployment_named, shape
from autodistill.advisor.estimate import appraise
from autodistill.cli.hardware_summary import appraisal_text, devices_table
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device


def test_a_device_is_a_line_with_its_figures() -> None:
    known = devices()
    head, line, _, note = devices_table([find_device("4090", known), find_device("t4", known)]).splitlines()
    figures = ["25.8", "GB", "25.2", "GB", "1.01", "TB/s", "82.6", "165", "165", "661", "330"]
    assert line.split() == ["NVIDIA", "GeForce", "RTX", "4090", "discrete-gpu", *figures]
    assert head.split()[:2] == ["device", "class"]
    assert "autodistill devices NAME" in note


def test_a_narrow_terminal_shows_what_devices_hold_before_what_they_compute() -> None:
    known = devices()
    narrow, whole = devices_table(known, 80), devices_table(known)
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.splitlines()[0].split() == ["device", "memory", "usable", "bandwidth"]
    assert "Left out: class, fp32, fp16, bf16, int8, fp8; a wider terminal shows them." in narrow
    assert whole.splitlines()[0].split()[-5:] == ["fp32", "fp16", "bf16", "int8", "fp8"]
    (one,) = (find_device("4090", known),)
    assert max(map(len, devices_table([one], 80).splitlines())) <= 80
    assert "fp16" in devices_table([one], 80).splitlines()[0], "a shorter name leaves room for rates"


def test_of_a_single_device_it_is_told_where_its_figures_are_from() -> None:
    device = find_device("4090", devices())
    text = devices_table([device])
    assert f"serves with: {', '.join(device.runtimes)}" in text
    assert all(source in text for source in device.sources.values())


def test_a_speed_that_rests_on_no_measurement_is_marked_and_told_why() -> None:
    known, model = devices(), shape({"layers": 4, "width": 256, "heads": 4, "ffn": 512, "vocab": 1000})
    chosen = (find_device("4090", known),)
    texts = [
        appraisal_text(appraise(model, deployment_named(form), devices=chosen)) for form in ("gguf-f16", "huggingface")
    ]
    why = chosen[0].shares("transformers").assumed
    assert [f"* Assumed, with a wide range: {why}." in text for text in texts] == [False, True]
    cells = [next(line for line in text.splitlines() if "RTX 4090" in line).split() for text in texts]
    assert [any(cell.endswith("*") for cell in line) for line in cells] == [False, True]


def test_what_measured_students_changed_is_a_part_where_they_changed_it() -> None:
    model = shape({"layers": 4, "width": 256, "heads": 4, "ffn": 512, "vocab": 1000})
    document = appraise(model, deployment_named("gguf-f16"))
    texts = [
        appraisal_text(document | {"memory_overhead": {"pairs": 1, "correction_bytes": more, "margin_bytes": 0}})
        for more in (0, 5_000_000)
    ]
    assert ["by measured students" in text for text in texts] == [False, True]
