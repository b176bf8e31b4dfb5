"""A teacher is held in float32 if memory allows that, else in 16 bits."""

from __future__ import annotations

import pytest

from autodistill.errors import InputError
from autodistill.estimates.teacher_fit import TeacherFit, fit_teacher
from autodistill.hardware.machine import Gpu, Machine
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import HeldType
from tests.estimates.test_training_fit import QWEN_1_5B

QWEN_7_6B = QWEN_1_5B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def _machine(memory: float, *gpus: float) -> Machine:
    found = tuple(Gpu(name="", memory_bytes=int(gpu)) for gpu in gpus)
    return Machine(cpus=2, memory_bytes=int(memory), gpus=found)


@pytest.mark.parametrize(
    ("config", "stored", "machine", "held", "rounded"),
    [
        (QWEN_1_5B, "bfloat16", _machine(24e9), "float32", False),
        (QWEN_7_6B, "bfloat16", _machine(24e9), "bfloat16", False),
        (QWEN_7_6B, "float16", _machine(24e9), "float16", False),
        (QWEN_7_6B, "float32", _machine(24e9), "bfloat16", True),
        (QWEN_7_6B, "bfloat16", _machine(128e9, 24e9), "bfloat16", False),
        (QWEN_7_6B, "bfloat16", _machine(24e9, 80e9), "bfloat16", False),
        (QWEN_7_6B, "bfloat16", _machine(128e9, 80e9), "float32", False),
    ],
)
def test_a_teacher_is_held_in_float32_where_that_fits_twice(
    config: dict[str, object], stored: HeldType, machine: Machine, held: str, rounded: bool
) -> None:
    fit = fit_teacher(spec_from_config(config), stored=stored, sequence_length=256, machine=machine)
    assert (fit.held_type, fit.rounded) == (held, rounded)
    assert fit.of("abc") == ("abc-bfloat16" if rounded else "abc")
    assert (fit.note is None) == (held == "float32")


def test_a_7_6b_teachers_bytes_by_hand() -> None:
    spec = spec_from_config(QWEN_7_6B)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    matrices = 2 * 152064 * 3584 + 28 * layer
    vectors = 57 * 3584 + 28 * (3584 + 2 * 512)
    assert spec.parameters == matrices + vectors == 7_615_616_512
    fit = fit_teacher(spec, stored="bfloat16", sequence_length=256, machine=_machine(24e9))
    assert fit.weights_bytes == fit.held_bytes == 2 * matrices + 4 * vectors
    with pytest.raises(InputError, match="even in 16 bits"):
        fit_teacher(spec, stored="bfloat16", sequence_length=256, machine=_machine(16e9))


def test_a_pass_runs_on_every_core_or_once_on_a_gpu() -> None:
    """Compared with the same machine with one core: each pass takes what it needs in addition to the weights."""

    def passes(cpus: int, *gpus: Gpu, memory: float = 24e9) -> int:
        machine = Machine(cpus=cpus, memory_bytes=int(memory), gpus=gpus)
        spec = spec_from_config(QWEN_7_6B)
        return fit_teacher(spec, stored="bfloat16", sequence_length=256, machine=machine).pass_bytes

    layer = 256 * (8 * 3584 + 4 * 18944)
    assert passes(1) > 4 * layer
    assert passes(4) - passes(1) == 3 * (passes(2) - passes(1)) > 3 * 4 * layer
    gpu = Gpu(name="", memory_bytes=24 * 10**9)
    assert passes(4, gpu, memory=128e9) == passes(1, gpu, memory=128e9) == passes(1)
    whole = fit_teacher(spec_from_config(QWEN_1_5B), stored="bfloat16", sequence_length=256, machine=_machine(24e9))
    assert whole.weights_bytes == 2 * whole.held_bytes == 8 * spec_from_config(QWEN_1_5B).parameters
    assert isinstance(whole.held_bytes, int)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (_machine(16e9), "and this machine has 16"),
        (_machine(128e9, 8e9), "and this machine has 8"),
        (_machine(128e9, *[3e9] * 4), r"and \S+ GB on each of 4 GPUs, of which the first has 3"),
        (_machine(4e9, *[8e9] * 4), "and this machine has 4"),
        (_machine(128e9, 15e9, 4e9, 15e9), r"and \S+ GB on each of 2 GPUs, of which the first has 15"),
    ],
)
def test_a_teacher_that_all_gpus_together_do_not_hold_is_refused_in_one_line(machine: Machine, said: str) -> None:
    with pytest.raises(InputError, match=f"{said}.*choose a smaller teacher, or let it write"):
        fit_teacher(spec_from_config(QWEN_7_6B), stored="bfloat16", sequence_length=256, machine=machine)


def test_a_teacher_whose_heads_do_not_divide_is_not_divided() -> None:
    spec = spec_from_config(QWEN_7_6B | {"num_key_value_heads": 7})
    said = r"one GPU of this machine's 3 \(its 28 attention heads do not divide over 3\) has 15"
    with pytest.raises(InputError, match=said):
        fit_teacher(spec, stored="bfloat16", sequence_length=256, machine=_machine(128e9, *[15e9] * 3))


def test_a_teacher_is_divided_over_the_fewest_gpus_that_hold_it() -> None:
    spec = spec_from_config(QWEN_7_6B)

    def fit(memory: float, stored: HeldType = "bfloat16") -> TeacherFit:
        machine = _machine(128e9, *[memory] * 4)
        return fit_teacher(spec, stored=stored, sequence_length=256, machine=machine)

    # By hand: half of the matrices and of the biases of queries, keys and values. Norms are whole.
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    matrices, biases, norms = 2 * 152064 * 3584 + 28 * layer, 28 * (3584 + 2 * 512), 57 * 3584
    two, four = fit(12e9), fit(8e9)
    assert (two.processes, two.held_type, two.rounded) == (2, "bfloat16", False)
    assert two.weights_bytes == matrices + 2 * biases + 4 * norms
    assert two.held_bytes == 2 * matrices + 4 * (biases + norms)
    assert "on each of 2 GPUs, over which it is divided as no one of them holds it" in str(two.note)
    # 28 heads can be divided by 4, but not by 3.
    assert four.processes == 4
    assert four.weights_bytes == matrices // 2 + biases + 4 * norms
    assert fit(12e9, "float32").of("abc") == "abc-bfloat16"
