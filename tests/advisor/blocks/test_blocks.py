"""Times of blocks from differences of small models: known times come back, and the models are as described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest

from autodistill.advisor import measure as module
from autodistill.advisor.blocks import timing
from autodistill.advisor.blocks.differences import blocks_of, pass_of, widths_of
from autodistill.advisor.blocks.small_models import Model, models_of, write_model
from autodistill.advisor.blocks.timing import time_blocks
from autodistill.advisor.describe import shape
from autodistill.advisor.measure import MeasureRequest, measure
from autodistill.cli.hardware_summary import measured_text
from autodistill.errors import InputError
from autodistill.estimates.block_times import ATTENTION, FFN_IN, FFN_OUT, HEAD, kept_times, part_of
from autodistill.hardware.background_load import Noise
from autodistill.hardware.machine import detect, machine_name
from autodistill.models.spec import ModelSpec
from autodistill.testing import save_tiny_teacher

SIZES = {"layers": 4, "width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 512, "vocab": 1000}
SPEC = shape(SIZES, tied=True).spec
# Seconds of a layer in 8 bits with 512 neurons, and of the head with 1,000 entries. Then the factor of each type.
KNOWN = {ATTENTION: 0.3, FFN_IN: 0.8, FFN_OUT: 0.4, HEAD: 2.0}
FACTORS = {"q8_0": 1.0, "q4_0": 0.6, "q5_1": 1.7, "q2_k": 0.5}
CONSTANT, REST, EACH = 0.9, 0.25, {"f16": 1e-3, "q8_0": 4e-3, "q4_0": 5e-3}
BEYOND, NEAR = {"f16": 0.0, "q8_0": 0.05, "q4_0": 0.08}, 512


def seconds(spec: ModelSpec, kinds: dict[str, str], cache: str, behind: int) -> float:
    """Return a model's time by an independent formula, matrix by matrix."""
    total = CONSTANT + spec.layers * (REST + BEYOND[cache] + EACH[cache] * (behind - NEAR))
    sizes = {ATTENTION: 2 * 64 * 64 + 2 * 32 * 64, FFN_IN: 2 * 512 * 64, FFN_OUT: 512 * 64, HEAD: 1000 * 64}
    for tensor in spec.tensors:
        if part := part_of(spec, tensor.name, tensor.role):
            rows, columns = tensor.shape
            kind = kinds.get(part, "q8_0")
            kind = kind if kind != "q2_k" or columns % 256 == 0 else "q8_0"
            total += KNOWN[part] * FACTORS[kind] * rows * columns / sizes[part]
    return total


def timed() -> tuple[Any, dict[Model, float]]:
    small = models_of(SPEC, tuple(FACTORS))
    times: dict[Model, float] = {}
    for model, one in small.items():
        times[model] = seconds(one.spec, dict(one.kinds), one.cache, NEAR)
        if one.far:
            times[(*model, "far")] = seconds(one.spec, dict(one.kinds), one.cache, NEAR + 1000)
    return small, times


def test_known_times_come_back_from_differences() -> None:
    small, times = timed()
    found = blocks_of(times, small, 1000)
    assert found["constant",] == pytest.approx(CONSTANT)
    for kind, factor in FACTORS.items():
        # Attention gets the rest of a layer's time. In 8 bits, the FFN's two parts divide their time by their weights.
        if kind != "q2_k":
            assert found[ATTENTION, kind] == pytest.approx(REST + KNOWN[ATTENTION] * factor)
            assert found[FFN_IN, kind] == pytest.approx(KNOWN[FFN_IN] * factor)
            assert found[HEAD, kind] == pytest.approx(KNOWN[HEAD] * factor)
        assert found[FFN_OUT, kind] == pytest.approx(KNOWN[FFN_OUT] * factor)
    for cache in EACH:
        assert found["cache", cache] == pytest.approx(BEYOND[cache], abs=1e-12)
        assert found["each", cache] == pytest.approx(EACH[cache])
    # Only the FFN's last matrix has rows that super-blocks of 256 divide.
    assert {block for block in found if block[-1] == "q2_k"} == {(FFN_OUT, "q2_k")}


def test_rounds_give_their_median_and_how_far_they_lie_apart() -> None:
    small, times = timed()
    turns = [blocks_of({model: scale * one for model, one in times.items()}, small, 1000) for scale in (1.0, 3.0, 1.1)]
    found = pass_of(turns, NEAR, 0.9)
    assert found.slow == 1.0
    assert found.constant.seconds == pytest.approx(1.1 * CONSTANT)
    assert found.constant.spread == pytest.approx(CONSTANT)
    assert found.parts[HEAD]["q4_0"].seconds == pytest.approx(1.1 * 0.6 * KNOWN[HEAD])


def test_parts_change_together_as_all_at_once_do() -> None:
    """If a part in another type is wrong, four fifths of the error are taken back.

    The reference's own errors are averaged.
    """
    small, times = timed()
    exact = blocks_of(times, small, 1000)
    wrong = times | {(HEAD, "q4_0"): times[HEAD, "q4_0"] + 0.5}
    found = blocks_of(wrong, small, 1000)
    assert found[HEAD, "q4_0"] - exact[HEAD, "q4_0"] == pytest.approx(0.4)
    whole = [sum(one[part, "q4_0"] * (1 if part == HEAD else 4) for part in KNOWN) for one in (exact, found)]
    assert whole[1] - whole[0] == pytest.approx(0.5 / 5)


def test_an_odd_width_that_is_slow_is_seen() -> None:
    assert not [model for model in models_of(SPEC) if model[0] == "width"]  # it is too narrow for a comparison
    wide = shape(SIZES | {"ffn": 1536}, tied=True).spec
    small = models_of(wide, ("q8_0",))
    times = {model: seconds(one.spec, dict(one.kinds), one.cache, NEAR) for model, one in small.items()}
    slow = {model: one + (0.4 if model[:2] == ("width", "1056") else 0.0) for model, one in times.items()}
    found = {one.neurons: one for one in widths_of(small, [times, times], [slow, slow])}
    assert set(found) == {1056, 1088, 1152}
    assert [one.decode for one in found.values()] == pytest.approx([0, 0, 0], abs=1e-9)
    ffn = 4 * (KNOWN[FFN_IN] + KNOWN[FFN_OUT]) * 1056 / 512
    assert found[1056].prompt == pytest.approx(0.4 / ffn)
    assert [one.slow for one in found.values()] == [True, False, False]


def types_of(path: Path) -> Counter[str]:
    return Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)


def test_a_small_model_is_stored_as_it_is_said_to_be(tmp_path: Path) -> None:
    small = models_of(SPEC)
    path = tmp_path / "model.gguf"

    def written() -> Iterator[tuple[Model, Counter[str]]]:
        for model in (
            ("reference",),
            (ATTENTION, "q4_0"),
            (FFN_OUT, "q2_k"),
            (HEAD, "iq4_nl"),
            ("half of the layers",),
        ):
            write_model(path, small[model])
            yield model, types_of(path)

    found = dict(written())
    assert found["reference",] == {"Q8_0": 4 * 7 + 1, "F32": 4 * 2 + 1}
    assert found[ATTENTION, "q4_0"] == {"Q4_0": 4 * 4, "Q8_0": 4 * 3 + 1, "F32": 9}
    assert found[FFN_OUT, "q2_k"] == {"Q2_K": 4, "Q8_0": 4 * 6 + 1, "F32": 9}
    assert found[HEAD, "iq4_nl"] == {"IQ4_NL": 1, "Q8_0": 4 * 7, "F32": 9}
    assert found["half of the layers",] == {"Q8_0": 2 * 7 + 1, "F32": 2 * 2 + 1}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"experts": 4, "active_experts": 2}, "mixture of experts"),
        ({"layers": 1}, "at least 2 layers"),
    ],
)
def test_what_has_no_blocks_to_time_is_refused_before_anything_runs(more: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        time_blocks(shape(SIZES | more, tied=True).spec, "it", 64)


@pytest.mark.parametrize("name", ["on", "script", "result", "runtime", "streams", "prompt", "decoded", "threads"])
def test_what_says_how_a_student_is_measured_says_nothing_of_blocks(name: str, tmp_path: Path) -> None:
    texts = {"on": "ssh://a", "runtime": "llama.cpp", "script": "it.sh", "result": "it.json"}
    given: Any = {**texts, "streams": (1,)}.get(name, 1)
    with pytest.raises(InputError, match=f"--blocks times blocks .*: leave --{name} out"):
        MeasureRequest(student="smollm2", blocks=True, runs=tmp_path, **{name: given})


@pytest.mark.slow
def test_blocks_of_a_tiny_teacher_are_timed_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Noise(load_average=0.0, others=0.0, steal=0.0, doubts=())
    monkeypatch.setattr(module, "current_load", lambda threads: quiet)
    monkeypatch.setattr(timing, "time_blocks", partial(time_blocks, kinds=("q8_0", "q4_0")))
    folder = save_tiny_teacher(tmp_path / "teacher", layers=2, width=64, heads=2, kv_heads=1, ffn=128)
    request = MeasureRequest(student=folder, blocks=True, context=64, rounds=1, cache=tmp_path / "cache")
    found = measure(request)
    spec = module.describe(str(folder)).spec
    kept = kept_times(tmp_path / "cache", machine_name(detect()), spec, 64)
    assert kept is not None
    assert kept.to_json() == found["blocks"]
    assert {*kept.decode.parts[ATTENTION]} == {"q8_0", "q4_0"}
    text = measured_text(found)
    assert "A prompt of 64 tokens" in text
    assert "for solve --latency on this machine" in text
