"""Moving averages, compared with NumPy's and with counting."""

from __future__ import annotations

import numpy as np
import pytest

from autodistill.service.window import Probe, Window


def test_percentiles_and_means_are_those_of_what_lies_within_the_window() -> None:
    window = Window(10.0)
    rng = np.random.default_rng(0)
    steps = rng.gamma(2.0, 0.01, (30, 4))
    for at, times in enumerate(steps):
        window.add(
            Probe(
                at=float(at), first_seconds=float(at), token_seconds=tuple(times), memory_bytes=100 + at, waiting=at % 2
            )
        )
    figures = window.figures()
    kept = steps[-11:].ravel()
    assert figures.seconds == 10.0
    assert figures.first_token.count == figures.probes == 11
    assert figures.first_token.mean == pytest.approx(24.0)
    for percentile, found in ((50, figures.token.p50), (95, figures.token.p95), (99, figures.token.p99)):
        # The definition itself: linear interpolation between the two order statistics around (n - 1) q.
        ranked, place = np.sort(kept), (len(kept) - 1) * percentile / 100
        low = int(place)
        high = min(low + 1, len(kept) - 1)
        assert found == pytest.approx(ranked[low] + (place - low) * (ranked[high] - ranked[low]))
    assert (figures.memory_bytes, figures.most_memory_bytes) == (pytest.approx(124.0), 129)
    assert figures.waiting == pytest.approx(6 / 11)


def test_throughput_counts_what_was_written_also_when_the_server_was_started_again() -> None:
    window = Window(100.0)
    for at, counted in ((0.0, 50), (2.0, 90), (4.0, 30), (8.0, 130), (9.0, None)):
        window.add(Probe(at=at, answer_tokens=counted))
    # 40 tokens, then 30 after the restart at 0, then 100, in 8 seconds.
    assert window.figures().tokens_per_second == pytest.approx(170 / 8)


def test_times_beside_more_sequences_can_be_left_out_and_an_empty_window_says_nothing() -> None:
    window = Window(100.0)
    assert window.figures().first_token.count == 0
    assert window.figures().tokens_per_second is None
    for at, streams in enumerate((1, 4, 1, 9)):
        window.add(Probe(at=float(at), first_seconds=float(streams), token_seconds=(0.5,) * streams, streams=streams))
    window.add(Probe(at=4.0, failed=True))
    assert window.times("ttft", 1) == [1.0, 1.0]
    assert len(window.times("tpot", 4)) == 6
    assert (window.figures().probes, window.figures().failed) == (5, 1)
