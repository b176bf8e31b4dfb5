"""Batches are as large as allowed, smaller if memory runs out, and one sequence each on a CPU."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings
from autodistill.inference import batching as parallel
from autodistill.inference.batching import by_length, map_batches, pass_tokens
from autodistill.inference.likelihood import rolling
from autodistill.inference.scoring import choices, score

DEVICE = "an accelerator"


def batches(lengths, tokens, device=DEVICE, holds=10**9):
    """Return the items of each computed batch and of each tried batch, on a device with room for `holds` tokens."""
    tried = []

    def work(batch):
        tried.append(list(batch))
        if len(batch) * lengths[batch.start] > holds:
            raise torch.OutOfMemoryError("out of memory")
        return list(batch)

    return list(map_batches(work, len(lengths), by_length(lengths), tokens, device)), tried


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([8] * 5, 16, [[0, 1], [2, 3], [4]]),
        ([8] * 5, 100, [[0, 1, 2, 3, 4]]),
        ([8] * 2, 1, [[0], [1]]),
        ([9, 8, 2, 2, 2, 1], 10, [[0], [1], [2, 3, 4, 5]]),
        ([], 10, []),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_a_batch_has_as_many_as_its_tokens_hold_and_one_at_least(lengths, tokens, expected, device):
    assert batches(lengths, tokens, device)[0] == expected


def test_where_memory_runs_out_a_batch_is_halved_and_all_that_follow_with_it():
    found, tried = batches([8] * 10, 64, holds=24)
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert tried[:3] == [list(range(8)), list(range(4)), [0, 1]]
    assert tried[2:] == found
    # As many shorter sequences are taken as memory holds.
    assert batches([8, 8, 8, 8, 2, 2, 2, 2, 2], 32, holds=16)[0] == [[0, 1], [2, 3], [4, 5, 6, 7, 8]]


def test_a_single_item_that_does_not_fit_and_other_errors_are_told():
    with pytest.raises(torch.OutOfMemoryError):
        batches([8] * 4, 32, holds=4)

    def fail(batch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(map_batches(fail, 4, by_length([8] * 4), 32, DEVICE))


def test_a_pass_has_what_half_of_the_free_memory_holds(workshop, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32)
    config = model.config
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    each = 4 * (8 * config.hidden_size + 4 * config.intermediate_size + 2 * keys)
    for free, expected in ((None, parallel.PASS_TOKENS), (10**12, parallel.PASS_TOKENS), (2000 * each, 1000), (1, 1)):
        monkeypatch.setattr(parallel, "free_bytes", lambda device, free=free: free)
        assert pass_tokens(model, DEVICE) == expected
    assert pass_tokens(model, "cpu") == parallel.CPU_PASS_TOKENS


def test_on_a_cpu_a_pass_has_a_few_hundred_tokens(workshop, tmp_path, monkeypatch):
    length = workshop.data.tokens.shape[1]
    monkeypatch.setattr(parallel, "CPU_PASS_TOKENS", 3 * length)
    model = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32).eval()
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda module, arguments, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    count = len(workshop.data.tokens)
    score(model, workshop.data)
    choices(model, workshop.data)
    ensure_cache(
        lambda: model,
        teacher_fingerprint="t",
        data_fingerprint="d",
        data=workshop.data,
        vocabulary=300,
        width=64,
        settings=CacheSettings(top_k=4),
        root=tmp_path,
        limit_bytes=10**8,
    )
    assert sorted(shapes) == sorted(3 * [*(count // 3 * [(3, length)]), *([(count % 3, length)] if count % 3 else [])])
    shapes.clear()
    monkeypatch.setattr(parallel, "CPU_PASS_TOKENS", 40)
    rolling(model, [np.arange(50).tolist(), [1, 2, 3]], window=16, stride=8)
    # Sequences are padded at the end to the longest of the pass. Passes run in parallel and end in any order.
    assert sorted(shapes) == [(1, 3), (2, 16), (2, 16), (2, 16)]
