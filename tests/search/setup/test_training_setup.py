"""The memory that a trial of a space takes where it runs, and what its processes have room for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.estimates.teacher_fit import TeacherFit
from autodistill.hardware.machine import Gpu, Machine
from autodistill.models.config import spec_from_config
from autodistill.search.planning.placement import Place, Share, share_out
from autodistill.search.setup.loading import _training_of
from autodistill.search.setup.training_setup import _lora, main_memory, memory_of_trials
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Strategy
from tests.estimates.test_training_fit import QWEN_1_5B


@pytest.mark.parametrize(
    ("signal", "beside", "workers"),
    [("top-k", 0, 6), ("states", 4 * 151936 * 1536, 5), ("online", 4 * 1_543_714_304, 3)],
)
def test_workers_on_a_cpu_have_room_for_the_teacher_that_each_loads(signal: str, beside: int, workers: int) -> None:
    """Four fifths of 64 GB are divided by 8.5 GB of training plus the teacher's part in float32."""
    machine = Machine(cpus=8, memory_bytes=64 * 10**9)
    recipe = Distillation(signal=signal, signal_tokens=64 if signal == "top-k" else 0)
    space = replace(load_space("declared"), dimensions=(), baselines={"one": Strategy(distillation=recipe)})
    teacher = TeacherFit(
        held_type="float32",
        stored="bfloat16",
        weights_bytes=8 * 1_543_714_304,
        pass_bytes=0,
        held_bytes=4 * 1_543_714_304,
        limit_bytes=10**12,
    )
    fit: Any = SimpleNamespace(total_bytes=8_500_000_000)
    place = Place(here=machine, machines=(machine,), share=Share())
    spec = spec_from_config(QWEN_1_5B)
    main = main_memory(space, memory_of_trials(place, spec, teacher), spec.parameters, teacher, fit)
    assert main == 8_500_000_000 + beside
    assert share_out([machine], main, "ray").count == workers


def test_a_trial_that_shares_a_gpu_fits_what_its_process_may_allocate() -> None:
    """A quarter of 100 GB less a context of 600 MB and a quarter of the search's; a whole GPU less both contexts."""
    spec, gpus = spec_from_config(QWEN_1_5B), (Gpu(name="made up", memory_bytes=10**11),)
    machine = Machine(cpus=2, memory_bytes=10**11, gpus=gpus)
    for share, expected in ((Share(gpus=0.25), 24.25e9), (Share(), 98.8e9), (Share(processes=2), 98.8e9)):
        place = Place(here=machine, machines=(machine,), share=share)
        held = TeacherFit(
            held_type="float32", stored="float32", weights_bytes=0, pass_bytes=0, held_bytes=0, limit_bytes=10**12
        )
        assert memory_of_trials(place, spec, held).limit_bytes == expected


def test_a_trial_has_what_others_leave_free() -> None:
    """On a GPU, a trial has the free memory less its own context. In main memory, it has all that is free.

    The search's own context is not part of the free memory.
    """
    spec, held = (
        spec_from_config(QWEN_1_5B),
        TeacherFit(
            held_type="float32", stored="float32", weights_bytes=0, pass_bytes=0, held_bytes=0, limit_bytes=10**12
        ),
    )
    for gpus, share, expected in (
        ((Gpu(name="a", memory_bytes=10**11, free_bytes=4 * 10**10),), Share(), 39.4e9),
        ((Gpu(name="a", memory_bytes=10**11, free_bytes=4 * 10**10),), Share(gpus=0.5), 19.4e9),
        ((), Share(), 3e9),
    ):
        machine = Machine(cpus=2, memory_bytes=10**11, gpus=gpus, free_bytes=3 * 10**9)
        place = Place(here=machine, machines=(machine,), share=share)
        assert memory_of_trials(place, spec, held).limit_bytes == expected
    assert share_out([machine], 10**9, "ray").count == 2


def test_low_rank_changes_count_where_every_trial_trains_them() -> None:
    strategies = {name: load_strategy(name) for name in ("lora", "logit_kd")}
    wider = replace(strategies["lora"], distillation=replace(strategies["lora"].distillation, lora=Lora(rank=32)))
    space = replace(load_space("declared"), dimensions=())
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    spec = spec_from_config({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 512, **sizes})
    for baselines, expected in (
        ({"a": strategies["lora"]}, Lora(rank=16)),
        ({"a": strategies["lora"], "b": wider}, Lora(rank=32)),
        (strategies, None),
    ):
        assert _lora(replace(space, baselines=baselines), spec, spec) == expected


def test_students_that_one_gpu_cannot_train_have_the_fewest_that_can() -> None:
    """The smallest student has 1.2 billion weights. With their gradients they take 9.6 GB: more than one GPU of 10 GB
    leaves, and less than two do. One GPU of 16 GB is enough, so four train four trials."""
    spec = spec_from_config(QWEN_1_5B)
    space = replace(load_space("declared"), dimensions=(), baselines={"one": load_strategy("logit_kd")})
    held = TeacherFit(
        held_type="float32", stored="bfloat16", weights_bytes=0, pass_bytes=0, held_bytes=0, limit_bytes=10**12
    )

    def trained(gigabytes: int, **more: Any) -> dict[str, Any]:
        gpus = (Gpu(name="made up", memory_bytes=gigabytes * 10**9),) * 4
        machine = Machine(cpus=32, memory_bytes=10**12, gpus=gpus, bf16=True)
        given = {"step_tokens": None, "stored": None, "runner": "ray", "gpus_per_trial": None, "cpus_per_trial": None}
        config: Any = SimpleNamespace(space=space, sequence_length=256, **(given | more))
        share = Share(gpus=more.get("gpus_per_trial") or 1.0)
        return _training_of(config, Place(here=machine, machines=(machine,), share=share), spec, held)

    found = trained(10)
    assert (found["workers"].processes, found["workers"].count, found["memory"].processes) == (2, 2, 2)
    assert found["step_tokens"] == 2 * 256
    assert "each trial is trained on 2 (FSDP2)" in found["divided"]
    alone = trained(16)
    assert (alone["workers"].processes, alone["workers"].count) == (1, 4)
    assert alone["divided"] == ""
    # A resumed run keeps its number.
    stored = {"plan": {"batch_tokens": 1024, "processes": 2}}
    assert trained(16, stored=stored)["workers"].processes == 2
    for more in ({"gpus_per_trial": 1.0}, {"runner": "inline"}, {"step_tokens": 256}):
        with pytest.raises(InputError, match=r"takes 11\.\d GB .* this machine has 8\.80 GB free"):
            trained(10, **more)
