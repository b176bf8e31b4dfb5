"""Which measurements count, and by how much predictions on a device differ from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor.describe import deployment_named, shape
from autodistill.advisor.measurements import Measured, correction, read_measured, store_measured
from autodistill.estimates.speed import speed
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import config_of
from autodistill.strategy.deployment import Deployment

PI = find_device("pi 5", devices())
SMALL = shape({"layers": 12, "width": 512, "heads": 8, "ffn": 1024, "vocab": 8000}).spec
Q8 = deployment_named("gguf-q8_0")


def measured(tpot_ms: float, **changes: Any) -> Measured:
    least: dict[str, Any] = {
        "student": "x",
        "name": "x",
        "shape": config_of(SMALL),
        "deployment": Q8.to_json(),
        "size_bytes": 1,
        "machine": PI.name,
        "how": "llama-bench",
        "threads": 4,
        "prompt": 64,
        "context": 100,
        "ttft_ms": 1.0,
        "tpot_ms": tpot_ms,
        "tpot_p95_ms": tpot_ms,
        "tokens_per_second": 1.0,
        "prompt_tokens_per_second": 1.0,
        "board": {"cores": 4},
    }
    return Measured(**least | changes)


def kept(out: Path, *found: Measured) -> list[float]:
    for one in found:
        store_measured(out, one)
    return [one.tpot_ms for one in read_measured(out)]


def test_a_later_measurement_takes_the_place_of_an_earlier_one_that_is_like_it_unless_it_is_doubtful(
    tmp_path: Path,
) -> None:
    assert kept(tmp_path, measured(5.0), measured(6.0)) == [6.0]
    # With fewer threads it is another measurement. On a busy machine it is worth less than the existing one.
    assert kept(tmp_path, measured(20.0, threads=1), measured(30.0, doubts=("busy",))) == [6.0, 20.0]
    assert kept(tmp_path, measured(7.0)) == [7.0, 20.0]


def test_of_doubtful_ones_the_last_stands_until_there_is_another(tmp_path: Path) -> None:
    busy = (measured(time, doubts=("busy",)) for time in (30.0, 31.0))
    assert kept(tmp_path, *busy) == [31.0]
    assert kept(tmp_path, measured(5.0)) == [5.0]


@pytest.mark.parametrize(
    ("others", "used"),
    [
        ([{"threads": 1}], [5.0]),
        ([{"threads": 16}], [5.0]),
        ([{"doubts": ("busy",)}], [5.0]),
        # Another student was also measured with all cores, so both count.
        ([{"student": "y"}], [5.0, 40.0]),
        ([{"threads": 1}, {"threads": 2}], [5.0]),
    ],
)
def test_predictions_are_corrected_by_what_all_cores_took(others: list[dict[str, Any]], used: list[float]) -> None:
    found = [measured(5.0, size_bytes=10**8), *(measured(40.0, size_bytes=10**8, **changes) for changes in others)]
    step = speed(SMALL, Q8, PI, context=100, weights=10**8).decode_ms
    learnt = correction(found, PI, "llama.cpp")
    assert learnt.count == len(used)
    assert learnt.decode == pytest.approx(sum(used) / len(used) / step)


def test_a_doubtful_measurement_with_all_cores_goes_before_one_with_fewer() -> None:
    found = [measured(9.0, size_bytes=10**8, doubts=("busy",)), measured(40.0, size_bytes=10**8, threads=1)]
    step = speed(SMALL, Q8, PI, context=100, weights=10**8).decode_ms
    assert correction(found, PI, "llama.cpp").decode == pytest.approx(9.0 / step)


@pytest.mark.parametrize("size_bytes", [3_970_000_000, 6_000_000_000])
def test_packed_weights_that_transformers_holds_in_16_bits_are_not_read_packed(size_bytes: int) -> None:
    big = shape({"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000}).spec
    device = find_device("4090", devices())
    deployment = deployment_named("compressed-tensors-int4-g64", "transformers")
    # By hand: all matrices except the table, and the keys and values of 100 tokens, at 0.72 of 1008 GB/s. Launching the
    # layers, 600 us each, takes a little longer.
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    seconds = max((2 * matrices + 100 * 32 * 2 * 4096 * 2) / (0.72 * 1008e9), 32 * 600e-6)
    found = measured(
        1e3 * seconds,
        shape=config_of(big),
        deployment=deployment.to_json(),
        size_bytes=size_bytes,
        machine=device.name,
    )
    assert Deployment.from_json(found.deployment) == deployment
    assert correction([found], device, "transformers").decode == pytest.approx(1.0, abs=0.01)
