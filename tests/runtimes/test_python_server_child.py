"""The share of a GPU that vLLM gets if others hold a part of it. A stand-in replaces the engine."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from autodistill.runtimes.python_server_child import Vllm, gpu_share


@pytest.mark.parametrize(("used", "share"), [(0, 0.9), (3, 0.9), (7, 0.9), (8, 71 / 80), (30, 49 / 80), (70, 9 / 80)])
def test_what_is_free_is_shared_with_room_for_a_context(used: int, share: float) -> None:
    """Of 80 GB, the share is what is unused minus 1 GB for the engine's context, and at most nine tenths."""
    assert gpu_share(80 * 10**9, used * 10**9) == pytest.approx(share)


def test_a_gpu_that_is_full_is_said_to_be() -> None:
    with pytest.raises(SystemExit, match="79,000,000,000 are in use, which leaves vLLM no room"):
        gpu_share(80 * 10**9, 79 * 10**9)


def test_the_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def arguments(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return options

    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    engine = SimpleNamespace(from_engine_args=lambda options: None)
    vars(vllm).update(EngineArgs=arguments, LLMEngine=engine, SamplingParams=lambda **options: None)
    vars(platforms).update(current_platform=SimpleNamespace(get_device_total_memory=lambda index: 80 * 10**9))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 30 * 10**9)
    Vllm({"path": "x", "context": 256, "parallel": 2})
    assert asked["gpu_memory_utilization"] == pytest.approx(49 / 80)
