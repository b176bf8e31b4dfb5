"""Learned scales next to a student's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autodistill.models.config import spec_from_config
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales, stored_alike, write_scales
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Finishing
from autodistill.testing import tiny_config

INT4 = {"format": "compressed-tensors", "bits": 4, "group_size": 32, "symmetric": False}


def test_scales_are_read_under_their_own_packing_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scales = {
        "a.weight": Scales(random.random((4, 2), np.float32), np.float32([[0, 1], [2, 3], [-8, 7], [5, -5]])),
        "b.weight": Scales(random.random((3, 1), np.float32)),
    }
    write_scales(tmp_path, Finishing(**INT4, scales="learned", keep=("head", "attention")), scales)
    same = Deployment(runtime="vllm", **INT4, keep=("attention", "head"))
    found = read_scales(tmp_path, same)
    assert set(found) == set(scales)
    for name, (values, offsets) in scales.items():
        np.testing.assert_array_equal(found[name].scales, values)
        if offsets is None:
            assert found[name].offsets is None
        else:
            np.testing.assert_array_equal(found[name].offsets, offsets)
    for other in (
        Deployment(runtime="vllm", **INT4),
        QuantizationScheme(**INT4 | {"bits": 3}, keep=("attention", "head")),
    ):
        assert read_scales(tmp_path, other) == {}


@pytest.mark.parametrize(
    "scheme", [QuantizationScheme(**INT4), QuantizationScheme(format="gguf-q4_0", bits=4, group_size=32)]
)
def test_a_student_without_learned_scales_has_no_file(tmp_path: Path, scheme: QuantizationScheme) -> None:
    write_scales(tmp_path, scheme, {})
    assert list(tmp_path.iterdir()) == []
    assert read_scales(tmp_path, scheme) == {}


def test_two_schemes_with_types_store_alike_what_has_one_type_in_both() -> None:
    spec = spec_from_config(tiny_config())
    names = [tensor.name for tensor in spec.tensors]
    plain = QuantizationScheme(format="gguf-q4_0", bits=4, group_size=32)
    mixed = QuantizationScheme(format="gguf-q4_0", bits=4, group_size=32, types=(("attention", "q8_0"),))
    others = [name for name in names if "self_attn" not in name]
    assert 0 < len(others) < len(names)
    assert stored_alike(names, spec, plain, mixed) == stored_alike(names, spec, mixed, plain) == others
    assert stored_alike(names, spec, mixed, mixed) == names
    assert stored_alike(names, spec, plain, QuantizationScheme(**INT4)) == []
