"""A model over two or three gloo processes against the same model in one: logits, bytes, and a sudden end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.importance import measure_importance
from autodistill.errors import AutoDistillError
from autodistill.estimates.divided import indivisible, part_bytes, splits
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.export.huggingface import greedy
from autodistill.inference.generation import write
from autodistill.inference.half_precision import load_held
from autodistill.inference.likelihood import continuations
from autodistill.inference.scoring import score_teacher
from autodistill.inference.tensor_parallel import is_divided, leave, load_teacher
from autodistill.models.config import spec_from_config
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

SHAPE: dict[str, Any] = {"layers": 2, "width": 192, "heads": 6, "kv_heads": 3, "ffn": 384, "head_dim": 32}
# Only the table is odd: of its 301 tokens, one process has fewer.
CASES = {
    "llama in two": ({"architecture": "llama", "vocabulary": 301} | SHAPE | {"kv_heads": 2}, 2),
    "gemma in three": ({"architecture": "gemma3_text", "vocabulary": 301} | SHAPE, 3),
}
Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
CACHE = Deployment(
    runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32, cache_type_k="q8_0", cache_type_v="q8_0"
)


# Each of three processes loads torch again.
@pytest.fixture(scope="module", params=["llama in two", pytest.param("gemma in three", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, int]]:
    """The model in one process, the divided model, and the number of its processes."""
    shape, processes = CASES[request.param]
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), **shape)
    divided = load_teacher(folder, "bfloat16", processes=processes)
    yield load_held(folder, "bfloat16"), divided, processes
    leave(divided)
    assert not dist.is_initialized()


def tokens() -> TokenSet:
    ids = np.random.default_rng(0).integers(3, 300, (3, 16)).astype(np.int32)
    return TokenSet(tokens=ids, documents=np.zeros_like(ids))


def test_its_logits_and_scores_are_those_of_one_process(pair: tuple[Any, Any, int]) -> None:
    one, divided, _ = pair
    assert is_divided(divided)
    ids = torch.from_numpy(tokens().tokens.astype(np.int64))
    with torch.no_grad():
        expected = one(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(divided(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    (scores, reference), (theirs, other) = score_teacher(divided, tokens()), score_teacher(one, tokens())
    np.testing.assert_allclose(scores.nll, theirs.nll, rtol=1e-4)
    np.testing.assert_array_equal(reference.top1, other.top1)
    spec = spec_from_config(one.config.to_dict())
    for deployment in (Q4, CACHE):
        with deployed_weights(divided, spec, deployment), deployed_weights(one, spec, deployment), torch.no_grad():
            expected = one(input_ids=ids, use_cache=False).logits
            found = divided(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_its_activations_are_seen_whole(pair: tuple[Any, Any, int]) -> None:
    one, divided, _ = pair
    found, expected = measure_importance(divided, tokens()), measure_importance(one, tokens())
    for name in ("similarity", "neurons", "groups", "channels"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_it_writes_and_judges_without_a_cache_of_keys_and_values(pair: tuple[Any, Any, int]) -> None:
    one, divided, _ = pair
    prompts = [[5, 6, 7, 8], [9, 10]]
    written = [sorted(write(model, prompts, stops=[1], max_tokens=6)) for model in (divided, one)]
    assert written[0] == written[1]
    with torch.inference_mode():
        ours, theirs = (greedy(model, torch.tensor([[5, 6, 7, 8]])) for model in (divided, one))
    assert ours == theirs
    asked = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12, 13])]
    for found, expected in zip(continuations(divided, asked), continuations(one, asked), strict=True):
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
        assert (found.tokens, found.greedy) == (expected.tokens, expected.greedy)


def test_a_process_holds_the_bytes_that_are_predicted(pair: tuple[Any, Any, int]) -> None:
    one, divided, processes = pair

    def held(model: Any) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    spec = spec_from_config(one.config.to_dict())
    # Gemma's scaled table is in float32.
    wide = 4 if spec.architecture == "gemma3_text" else 2

    def predicted(count: int) -> int:
        return part_bytes(spec, count, lambda one: 4 if len(one.shape) == 1 else wide if "embed" in one.name else 2)

    assert held(one) == predicted(1)
    assert held(divided) == pytest.approx(predicted(processes), rel=0.05)


@pytest.mark.slow
def test_a_process_that_ends_is_told_in_one_line(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path, layers=1)
    model = load_teacher(folder, "bfloat16", processes=2)
    (other,) = model._divided._processes
    other.send_signal(signal.SIGKILL)
    other.wait()
    with pytest.raises(AutoDistillError, match=r"divided over 2 processes, cannot go on .*choose a smaller teacher"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert not dist.is_initialized()


def test_heads_and_groups_that_do_not_divide_are_said(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192}
    config |= {
        "num_hidden_layers": 1,
        "intermediate_size": 384,
        "vocab_size": 300,
        "head_dim": 32,
        "max_position_embeddings": 128,
    }
    spec = spec_from_config(config)
    assert indivisible(spec, 3) == ""
    assert indivisible(spec, 2) == "its 3 key-value heads do not divide over 2"
    assert indivisible(spec, 4) == "its 6 attention heads do not divide over 4"
    # 192 inputs of queries over 3 processes are 64. Groups of 32 divide them, and blocks of 256 do not.
    assert not splits(spec, Q4, 3)
    assert splits(spec, Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32), 12)
