"""What a model takes and how fast it would run, as one document."""

from __future__ import annotations

import pytest

from autodistill.appraisal import appraise
from autodistill.described import deployment_named, shape
from autodistill.devices import devices, find_device
from autodistill.errors import InputError
from autodistill.hardware_summary import appraisal_text

MODEL = shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000})
Q4 = deployment_named("gguf-q4_0")
KNOWN = devices()


def test_the_document_has_the_parts_and_one_device_s_speed() -> None:
    document = appraise(MODEL, Q4, context=1024, batch=2, devices=[find_device("t4", KNOWN)])
    parts = ("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes")
    assert sum(document[name] for name in parts) == document["total_bytes"]
    assert (document["runtime"], document["context"], document["batch"]) == ("llama.cpp", 1024, 2)
    assert document["source"] == "predicted"
    assert document["tokens_per_second"] == document["devices"][0]["tokens_per_second"] > 0
    assert document["time_to_first_token_ms"] > 0


def test_without_one_device_the_speed_is_left_open_and_all_are_listed() -> None:
    assert appraise(MODEL, Q4)["tokens_per_second"] is None
    document = appraise(MODEL, Q4, devices=KNOWN)
    assert document["tokens_per_second"] is None
    assert [one["device"] for one in document["devices"]] == [device.name for device in KNOWN]
    for one, device in zip(document["devices"], KNOWN, strict=True):
        assert one["fits"] == (document["total_bytes"] <= device.usable_bytes)
    text = appraisal_text(document)
    assert all(device.name in text for device in KNOWN)
    assert "predicted" in text


@pytest.mark.parametrize("prompt", [0, 2049])
def test_a_prompt_that_is_no_part_of_the_context_is_refused(prompt: int) -> None:
    with pytest.raises(InputError, match="--prompt must be 1 to the context"):
        appraise(MODEL, Q4, prompt=prompt)
