"""Percentiles and rates of timed rounds, from a server with known times and from real runtimes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.hardware.budget import parse_latency
from autodistill.runtimes import timing
from autodistill.runtimes.python_server import PythonServer
from autodistill.runtimes.timing import Load, time_serving
from autodistill.testing import save_tiny_teacher
from autodistill.units import count_of


class Clockwork:
    """A server whose times follow from the requests made to it."""

    accelerated = False

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.steps = 0

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def begin(self, prompts: Any) -> float:
        assert len({prompt[0] for prompt in prompts}) == len(prompts)  # none reuses another's context
        self.begun.append((len(prompts), len(prompts[0])))
        return 0.001 * len(prompts) * len(prompts[0])

    def step(self) -> float:
        self.steps += 1
        return 0.001 * self.begun[-1][0] * (1 + self.steps % 4)

    def used_seconds(self) -> float:
        return 0.0

    def peak_bytes(self) -> int:
        return 0


def test_percentiles_are_of_all_rounds_but_the_one_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Clockwork()
    monkeypatch.setattr(timing, "serve", lambda *_, **__: server)
    load = Load(prompts=(8, 32), prompt=32, decoded=41, streams=(1, 3), rounds=2)
    found = time_serving(Path("x"), "llama.cpp", load, vocabulary=100, context=512, threads=1)
    assert found.first_ms == {8: (8.0, 8.0), 32: (32.0, 32.0)}
    one, three = found.loads
    assert one.first_ms == (32.0, 32.0)
    # Four prompts of 32 tokens were read alone: two before the answers, and two at their beginning.
    slow = replace(one, first_ms=(40.0, 60.0))
    assert replace(found, loads=(slow, three)).first_token_ms(50) == 36.0
    assert replace(found, loads=(replace(slow, prompt=16), three)).first_token_ms(50) == 50.0
    assert len(one.step_ms) == 80
    # The first of 40 steps follows the prompt of 32 tokens and one more token, and the last one follows 72 tokens.
    assert one.behind == one.to_json()["behind_tokens"] == 52
    assert three.tpot_ms(50) == pytest.approx(3 * np.percentile([1, 2, 3, 4] * 20, 50))
    assert three.tokens_per_second == pytest.approx(3 * 1000 / (3 * 2.5))
    assert one.answer_ms == pytest.approx(32 + 40 * 2.5)
    assert one.spread == 0
    (limit,) = parse_latency("tpot_p99=1s@streams=3")
    assert found.seconds(limit) == pytest.approx(0.012)
    with pytest.raises(InputError, match="5 streams were not timed"):
        found.seconds(parse_latency("1s@streams=5")[0])


def test_rounds_that_differ_are_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Clockwork()
    monkeypatch.setattr(server, "step", lambda: 0.001 * len(server.begun))
    monkeypatch.setattr(timing, "serve", lambda *_, **__: server)
    load = Load(prompts=(8,), prompt=8, decoded=5, rounds=3)
    found = time_serving(Path("x"), "llama.cpp", load, vocabulary=100, context=512, threads=1)
    assert any("rounds at 1 stream differ by" in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    ("seconds", "prompts", "answers"),
    [
        # A prompt takes one second, an answer of five tokens takes five, and the warm-up takes as long.
        (float("inf"), 3, 3),
        (22.0, 3, 2),
        (15.0, 3, 1),
        (2.5, 2, 1),
        (0.0, 1, 1),
    ],
)
def test_where_a_round_takes_long_there_are_fewer_and_each_figure_says_of_how_many_it_is(
    monkeypatch: pytest.MonkeyPatch, seconds: float, prompts: int, answers: int
) -> None:
    clock = [0.0]

    class Slow(Clockwork):
        def begin(self, prompts: Any) -> float:
            clock[0] += 1
            return super().begin(prompts)

        def step(self) -> float:
            clock[0] += 1
            return super().step()

    monkeypatch.setattr(timing, "serve", lambda *_, **__: Slow())
    monkeypatch.setattr(timing, "monotonic", lambda: clock[0])
    load = Load(prompts=(8,), prompt=8, decoded=5, rounds=3, seconds=seconds)
    found = time_serving(Path("x"), "llama.cpp", load, vocabulary=100, context=64, threads=1)
    told = found.to_json()
    assert told["ttft_rounds"] == {"8": prompts}
    assert told["loads"][0]["rounds"] == answers
    assert told["loads"][0]["decoded_tokens"] == 4 * answers
    few = [doubt for doubt in found.doubts if "take long here" in doubt]
    assert few == (
        [] if answers == 3 else [f"{count_of(answers, 'round')} of 3 at 1 stream, since they take long here"]
    )
    assert clock[0] <= max(seconds, 13) + 2, "what warms up, a prompt and an answer are always there"


def test_a_load_is_shortened_to_what_a_context_holds() -> None:
    short = Load().within(100)
    assert (short.prompts, short.prompt, short.decoded) == ((16, 52), 52, 48)
    assert Load().within(2).prompts == (1,)


@pytest.mark.slow
def test_a_folder_is_timed_in_transformers_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "model")
    load = Load(prompts=(4,), prompt=4, decoded=4, streams=(1, 2), rounds=1)
    found = time_serving(folder, "transformers", load, vocabulary=300, context=64, threads=1)
    assert [len(one.step_ms) for one in found.loads] == [3, 3]
    assert min(found.alone.step_ms) > 0
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(VerificationError, match="transformers could not load model"):
        time_serving(folder, "transformers", load, vocabulary=300, context=64, threads=1)


def test_a_runtime_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        PythonServer(tmp_path, "vllm", 64, 1)
    with pytest.raises(InputError, match="it can be transformers, vllm, onnxruntime"):
        PythonServer(tmp_path, "mlx", 64, 1)
