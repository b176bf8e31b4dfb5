"""Training is made to fit by the cheapest way that works, and refused if none does."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest

from autodistill.errors import InputError, MissingDependencyError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.training_fit import Training, TrainingFit, fit_training, training_fits
from autodistill.models.config import spec_from_config
from autodistill.strategy.recipe import Lora

QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def training(**how: Any) -> Training:
    """Return the training of a 1.5B student on sequences of 256 tokens, of all weights by default."""
    return Training(spec=spec_from_config(QWEN_1_5B), sequence_length=256, **how)


def test_each_way_is_smaller_than_the_one_before() -> None:
    ways = list(training_fits(training(sequences=5)))
    # Micro-batches of 3 and 2 hold 6.2 GB of gradients in addition to 4.2 and 2.8 GB of activations. That is more than
    # the 7.0 GB of activations that 5 keep. With checkpointing, 5 keep no more than the gradients take.
    assert [(way.micro_batch, way.checkpointing, way.optimizer_state) for way in ways] == [
        (5, False, "float32"),
        (1, False, "float32"),
        (5, True, "float32"),
        (5, True, "bfloat16"),
        (5, True, "int8"),
    ]
    assert all(one.estimate.total_bytes > other.estimate.total_bytes for one, other in pairwise(ways))


def test_the_parts_of_a_1_5b_student_by_hand() -> None:
    # 1,543,714,304 weights, including the table of 233,373,696; 28 layers of width 1536.
    fit = fit_training(training(sequences=1), 24 * 10**9)
    weights = 1_543_714_304
    assert (fit.checkpointing, fit.optimizer_state) == (True, "int8")
    assert fit.estimate.weights_bytes == fit.estimate.gradients_bytes == 4 * weights
    assert fit.estimate.optimizer_bytes == 2 * weights + 8 * weights // 256
    assert fit.estimate.logits_bytes == 4 * 256 * 151936
    layer = 6 * 1536 + 2 * (12 * 128 + 2 * 128) + 4 * 8960
    assert fit.estimate.activations_bytes == 4 * 256 * (28 * 1536 + layer)


def test_the_first_that_fits_is_taken() -> None:
    for device, more in (("cpu", 1.30), ("cuda", 1.10)):
        ways = list(training_fits(training(sequences=4, device=device)))
        for way in ways:
            limit = int(more * way.estimate.total_bytes)
            assert fit_training(training(sequences=4, device=device), limit) == way
        # If nothing is to spare, the way that takes least is the most likely to fit.
        for way in ways[-2:]:
            limit = way.estimate.total_bytes
            found = fit_training(training(sequences=4, device=device), limit)
            assert found == ways[-1]
    least = ways[-1].estimate.total_bytes
    with pytest.raises(InputError, match="even one sequence at a time"):
        fit_training(training(sequences=4), least - 1)


def test_eight_bit_states_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    *_, half, least = (way.estimate.total_bytes for way in training_fits(training(sequences=1)))
    with pytest.raises(MissingDependencyError, match="8bit"):
        fit_training(training(sequences=1), least)
    with pytest.raises(MissingDependencyError, match="8bit"):
        fit_training(training(sequences=1), half - 1)
    # 16-bit states need no package. With the package, a way with something to spare would be preferred.
    fit = fit_training(training(sequences=1), half)
    assert (fit.checkpointing, fit.optimizer_state, fit.estimate.total_bytes) == (True, "bfloat16", half)


def test_sixteen_bit_states_are_taken_before_eight_bit_ones_which_round_more() -> None:
    # For 1,543,714,304 weights: two moments of two bytes each instead of four.
    *_, single, half, _ = (way.estimate for way in training_fits(training(sequences=1)))
    assert half.optimizer_bytes == single.total_bytes - half.total_bytes == 4 * 1_543_714_304
    for spare, state in ((1.31, "bfloat16"), (1.29, "int8")):  # on a CPU 30% is kept
        limit = int(spare * half.total_bytes)
        assert fit_training(training(sequences=1), limit).optimizer_state == state


def test_several_processes_share_weights_and_sequences_but_not_what_is_whole_for_a_moment() -> None:
    alone = list(training_fits(training(sequences=8)))
    together = list(training_fits(training(sequences=8, processes=4)))
    assert [(way.micro_batch, way.checkpointing, way.optimizer_state) for way in together] == [
        (2, False, "float32"),
        (1, False, "float32"),
        (2, True, "float32"),
        (2, True, "bfloat16"),
        (2, True, "int8"),
    ]
    weights, table = 1_543_714_304, 233_373_696
    layer = (weights - table) // 28
    least = together[2].estimate
    assert least.weights_bytes == weights + 4 * (2 * table + 3 * layer)
    assert (least.gradients_bytes, least.optimizer_bytes) == (weights, 2 * weights)
    # For two sequences, each process keeps a quarter of what all eight take alone.
    assert 4 * together[2].estimate.activations_bytes == alone[-1].estimate.activations_bytes
    # Four bytes per weight; or two, and two scales of four bytes in each block of 256.
    assert together[3].estimate.optimizer_bytes == weights
    assert together[-1].estimate.optimizer_bytes == (2 * weights + 2 * 4 * weights // 256) // 4

    # Four GPUs can train a student that one GPU of 24 GB cannot train with float32 states.
    def fit(gigabytes: float, processes: int) -> TrainingFit:
        return fit_training(training(sequences=8, processes=processes, device="cuda"), int(gigabytes * 1e9))

    assert fit(24, 4).micro_batch == 2
    assert fit(8.2, 4).optimizer_state == "int8"
    with pytest.raises(InputError, match=r"training a student of 28 layers takes .* over 2 processes"):
        fit(9, 2)
    # Any number of processes may train it, but one evaluates it.
    with pytest.raises(InputError, match=r"evaluating a student of 28 layers takes 8\.15 GB in one process"):
        fit(7, 4)


def test_an_evaluation_takes_the_weights_and_packed_values_which_on_a_gpu_lie_there_once() -> None:
    weights, table = 1_543_714_304, 233_373_696
    # Three copies of a sequence's logits, and its activations in one layer, in addition to the process itself.
    read = 4 * 256 * (3 * 151936 + 4 * 1536 + 3 * 8960)
    lora = Lora(rank=16)

    def way(device: str, threads: int = 1, processes: int = 1) -> TrainingFit:
        more = {"device": device, "threads": threads, "processes": processes}
        *_, last = training_fits(training(sequences=8, lora=lora, train_embeddings=False, **more))
        return last

    assert way("cpu").evaluation_bytes == 8 * weights + read + TRAINING_PROCESS_BYTES
    assert way("cpu", threads=4).evaluation_bytes == 8 * weights + 4 * read + TRAINING_PROCESS_BYTES
    # On a GPU, weights are packed tensor by tensor, and the table is the largest tensor.
    expected = 4 * (weights + table) + read + TRAINING_PROCESS_BYTES
    for processes in (1, 4):
        assert way("cuda", threads=4, processes=processes).evaluation_bytes == expected
    # Low-rank changes take less memory to train than to evaluate on a CPU, which must hold both.
    low = way("cpu")
    assert low.estimate.total_bytes < low.evaluation_bytes == low.total_bytes
    most = next(training_fits(training(sequences=8)))
    assert most.total_bytes == most.estimate.total_bytes > most.evaluation_bytes
    limit = (low.estimate.total_bytes + low.evaluation_bytes) // 2
    with pytest.raises(InputError, match=r"evaluating a student of 28 layers takes 13\.4 GB in one process"):
        fit_training(training(sequences=8, lora=lora, train_embeddings=False), limit)


def test_several_processes_each_have_all_of_the_low_rank_changes() -> None:
    lora = Lora(rank=16, layers="attention")
    ways = training_fits(training(sequences=8, lora=lora, train_embeddings=False, processes=4))
    weights, table = 1_543_714_304, 233_373_696
    layer = (weights - table) // 28
    # In each layer: queries and output [1536, 1536], keys and values [256, 1536].
    changes = 28 * 16 * (2 * (1536 + 1536) + 2 * (256 + 1536))
    estimate = next(ways).estimate
    assert estimate.weights_bytes == weights + 4 * changes + 4 * (2 * table + 3 * layer)
    assert (estimate.gradients_bytes, estimate.optimizer_bytes) == (4 * changes, 8 * changes)


def test_a_pass_has_at_least_one_sequence_and_at_most_what_is_asked_for() -> None:
    def sizes(sequences: int, processes: int = 1, at_once: int | None = None) -> list[int]:
        ways = training_fits(
            training(sequences=sequences, processes=processes), setups=[(False, "float32")], at_once=at_once
        )
        return [way.micro_batch for way in ways]

    assert sizes(2, processes=4) == sizes(1) == [1]
    assert sizes(8, processes=4)[0] == 2
    assert sizes(8, at_once=3)[0] == 3
    assert sizes(2, at_once=3)[0] == 2


def test_bytes_of_a_process_are_whole_numbers() -> None:
    """Three processes divide nothing evenly, and 16-bit states make half of what float32 ones take."""
    lora = Lora(rank=3, layers="attention")
    for state, each in (("float32", 8), ("bfloat16", 4)):
        ways = training_fits(
            training(sequences=7, lora=lora, train_embeddings=False, processes=3), setups=[(True, state)]
        )
        estimate = next(ways).estimate
        changes = 28 * 3 * (2 * (1536 + 1536) + 2 * (256 + 1536))
        assert estimate.optimizer_bytes == each * changes
        parts = [getattr(estimate, field.name) for field in fields(estimate) if field.name.endswith("_bytes")]
        assert {type(part) for part in parts} == {int}
