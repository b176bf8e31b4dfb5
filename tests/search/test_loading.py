"""What is said of a teacher once it is loaded, and what a worker takes with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.distillation.teacher import Teacher, resolve_teacher
from autodistill.errors import InputError
from autodistill.estimate import spec_from_config
from autodistill.hardware import Machine
from autodistill.search import loading
from autodistill.search.loading import Place, _main_bytes, _memory, _told_of_teacher, load
from autodistill.search.share import Share, share_out
from autodistill.strategy import Distillation
from autodistill.testing import save_tiny_teacher
from autodistill.training_fit import TeacherFit


def test_a_teacher_whose_file_is_quantised_is_said_to_be() -> None:
    def notes(quantised: str | None) -> tuple[str, ...]:
        return _told_of_teacher(Teacher(folder=Path(), fingerprint="1", name="big", licence=None, quantised=quantised))

    assert notes(None) == ()
    (note,) = notes("Q4_1")
    assert note.startswith("the teacher's file is quantised (Q4_1) and was dequantised")


QWEN_1_5B = {
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


@pytest.mark.parametrize(
    ("signal", "beside", "workers"),
    [("top-k", 0, 6), ("states", 4 * 151936 * 1536, 5), ("online", 4 * 1_543_714_304, 3)],
)
def test_workers_on_a_cpu_have_room_for_the_teacher_that_each_loads(signal: str, beside: int, workers: int) -> None:
    """Four fifths of 64 GB, by 8.5 GB of training and what lies beside it in float32."""
    machine = Machine(cpus=8, memory_bytes=64 * 10**9)
    recipe = Distillation(signal=signal, signal_tokens=64 if signal == "top-k" else 0)
    space: Any = SimpleNamespace(signal_cases=lambda: (recipe,))
    teacher = TeacherFit(held="float32", stored="bfloat16", weights_bytes=8 * 1_543_714_304, pass_bytes=0)
    fit: Any = SimpleNamespace(total_bytes=8_500_000_000)
    place = Place(here=machine, machines=(machine,), share=Share())
    spec = spec_from_config(QWEN_1_5B)
    main = _main_bytes(space, _memory(place, spec, teacher), spec.parameters, teacher, fit)
    assert main == 8_500_000_000 + beside
    assert share_out([machine], main, "ray").count == workers


def test_a_model_of_another_tokenizer_is_refused_before_any_weights_are_obtained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model = (save_tiny_teacher(tmp_path / str(size), vocabulary=size) for size in (300, 280))
    monkeypatch.setattr(loading, "materialise", lambda *_: pytest.fail("weights were obtained"))
    checked: Any = SimpleNamespace(
        teacher=resolve_teacher(str(teacher)), request=None, space=SimpleNamespace(models=(str(model),))
    )
    with pytest.raises(InputError, match=f"needs one vocabulary: {model} lacks"):
        load(checked, Place(here=Machine(cpus=1, memory_bytes=1), machines=(), share=Share()))
