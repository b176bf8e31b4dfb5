"""Observations of a server with known figures and of a real one: verdicts, bounds of the probes, and Prometheus."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from autodistill.errors import InputError, MissingDependencyError, ServiceError
from autodistill.service.client import Answer, Client
from autodistill.service.launch import Service
from autodistill.service.metrics import Counters
from autodistill.service.monitor import Monitor
from autodistill.service.prometheus import Endpoint
from autodistill.service.promise import Limit, Promise


class Told(Client):
    """A server whose figures a test sets, with a clock that the test moves."""

    def __init__(self) -> None:
        self.url = "http://192.0.2.1:1"
        self.now = 0.0
        self.probe_seconds = 0.1
        self.first, self.later, self.running, self.written = 0.05, 0.01, 0.0, 0.0
        self.fails = False
        self.size: tuple[int, int] | None = (512, 2)
        self.prompts: list[list[int]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def counters(self) -> Counters:
        if self.fails:
            raise ServiceError("gone")
        return Counters(
            runtime="llama.cpp",
            prompt_tokens=0.0,
            answer_tokens=self.written,
            running=self.running,
            waiting=1.0,
            drafted=0.0,
            accepted=0.0,
        )

    def room(self) -> tuple[int, int] | None:
        return self.size

    def complete(self, prompt: Sequence[int], tokens: int, *, reuse: bool = False) -> Answer:
        self.prompts.append(list(prompt))
        self.now += self.probe_seconds
        self.written += tokens
        return Answer(tokens=tokens, first_seconds=self.first, token_seconds=(self.later,) * (tokens - 1))


def limit(quantity: str, percentile: int | None, most: float, streams: int = 4, **more: Any) -> Limit:
    return Limit(quantity=quantity, percentile=percentile, most=most, streams=streams, **more)


def promise(*limits: Limit) -> Promise:
    return Promise(of="t001", context=512, streams=2, limits=limits)


def watched(server: Told, held: Promise | None = None, **more: float) -> Monitor:
    return Monitor(server, held, clock=server.clock, sleep=server.sleep, **{"window": 60.0, "every": 5.0, **more})


def test_a_promise_is_kept_until_a_figure_breaks_it_and_the_verdict_says_which() -> None:
    server = Told()
    server.running = 1.0
    monitor = watched(server, promise(limit("ttft", 95, 0.1), limit("tpot", 99, 0.02, streams=3)))
    assert monitor.look().verdict == "OK"
    server.later = 0.03
    report = monitor.look()
    assert (report.verdict, [one.figure for one in report.broken]) == ("BROKEN", ["tpot_p99"])
    assert "30.0ms of 20.0ms" in report.broken[0].comparison
    document = report.to_json()
    assert (document["verdict"], document["broken"]) == ("BROKEN", ["tpot_p99"])
    # Observations that are too old no longer count.
    server.later = 0.01
    server.now += 61
    assert monitor.look().verdict == "OK"


def test_what_is_promised_for_fewer_sequences_than_there_are_is_not_judged() -> None:
    server = Told()
    server.running = 5.0
    report = watched(server, promise(limit("tpot", 95, 0.001, streams=4))).look()
    assert (report.verdict, report.judged[1].kept) == ("UNKNOWN", None)
    assert "more than 4 sequences" in report.judged[1].comparison
    server.running = 2.0
    assert watched(server, promise(limit("tpot", 95, 0.001, streams=4))).look().verdict == "BROKEN"


def test_a_server_that_gives_no_answer_breaks_its_promise_and_is_looked_at_again() -> None:
    server = Told()
    monitor = watched(server, promise(limit("tpot", 95, 1.0)))
    server.fails = True
    report = monitor.look()
    assert (report.up, report.verdict, [one.figure for one in report.broken]) == (False, "BROKEN", ["answers"])
    server.fails = False
    report = monitor.look()
    assert (report.verdict, report.figures.probes, report.figures.failed) == ("OK", 2, 1)


def test_probes_take_a_tenth_of_the_time_at_most_and_none_is_helped_by_the_last_one() -> None:
    server = Told()
    server.probe_seconds = 3.0
    assert len(list(watched(server).watch(300.0))) == 10
    assert len({tuple(one[:1]) for one in server.prompts}) == len(server.prompts)
    assert {len(one) for one in server.prompts} == {64}
    server = Told()
    assert len(list(watched(server).watch(60.0))) == 12
    # As long as the prompts for which the first token is limited, within the server's room.
    for size, length in (((2048, 1), 512), ((64, 1), 64 - 16 - 1), (None, 512)):
        server = Told()
        server.size = size
        watched(server, promise(limit("ttft", 95, 1.0, prompt=512))).look()
        assert len(server.prompts[0]) == length
    with pytest.raises(InputError, match="--window"):
        watched(server, window=5.0)


def test_memory_of_more_room_than_promised_is_not_judged() -> None:
    server = Told()
    server.size = (4096, 8)
    report = watched(server, promise(limit("memory", None, 1.0))).look()
    assert report.judged[1].kept is None
    assert "8 x 4096" in report.judged[1].comparison
    server.size = (512, 2)
    assert "not seen from here" in watched(server, promise(limit("memory", None, 1.0))).look().judged[1].comparison


def test_a_real_server_is_seen_with_its_memory_and_held_to_it(service: Service) -> None:
    resident = psutil.Process(service.pid).memory_info().rss
    # An interpreter with as few imports takes as much memory.
    program = "import json, os, signal, sys, psutil; print(psutil.Process().memory_info().rss)"
    alone = int(subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, check=True).stdout)
    held = promise(limit("memory", None, 3 * resident, streams=2), limit("tpot", 95, 60.0))
    with service.client() as client:
        monitor = Monitor(client, held, window=60.0, every=0.1)
        monitor.look()
        report = monitor.look()
        assert (report.up, report.runtime, report.verdict) == (True, "llama.cpp", "OK")
        figures = report.figures
        assert figures.probes == 2
        assert figures.token.count == figures.probes * 15
        assert figures.memory_bytes == pytest.approx(resident - alone, rel=0.2)
        assert figures.tokens_per_second is not None
        assert figures.tokens_per_second > 0
        tight = promise(limit("memory", None, resident / 2, streams=2), limit("tpot", 95, 60.0))
        assert [one.figure for one in Monitor(client, tight).look().broken] == ["memory"]


def test_prometheus_reads_what_the_window_holds() -> None:
    server = Told()
    monitor = watched(server, promise(limit("ttft", 95, 0.1), limit("tpot", 99, 0.001)))
    with Endpoint(0) as endpoint:
        address = f"http://127.0.0.1:{endpoint.port}/metrics"
        assert urllib.request.urlopen(address).read() == b""
        for _ in range(2):
            endpoint.show(monitor.look())
            server.now += 5
        text = urllib.request.urlopen(address).read().decode()
        with pytest.raises(InputError, match="in use"):
            Endpoint(endpoint.port)
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for quantile in ("0.5", "0.95", "0.99"):
        assert samples["autodistill_first_token_seconds", ("quantile", quantile)] == pytest.approx(0.05)
        assert samples["autodistill_token_seconds", ("quantile", quantile)] == pytest.approx(0.01)
    assert samples["autodistill_first_token_seconds_count",] == 2
    assert samples["autodistill_token_seconds_sum",] == pytest.approx(2 * 15 * 0.01)
    assert samples["autodistill_promise_kept", ("figure", "ttft_p95")] == 1
    assert samples["autodistill_promise_kept", ("figure", "tpot_p99")] == 0
    assert samples["autodistill_promise_kept", ("figure", "answers")] == 1
    assert samples["autodistill_requests_waiting",] == 1
    assert samples["autodistill_tokens_per_second",] == pytest.approx(16 / 5.1)
    # The memory of a remote server is not known.
    assert ("autodistill_memory_bytes",) not in samples
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert types["autodistill_first_token_seconds"] == "summary"


def test_without_its_package_prometheus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.service.prometheus.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"autodistill-search\[monitor\]"):
        Endpoint(0)


def test_a_wrong_key_is_told(service: Service, tmp_path: Path) -> None:
    with Client(service.setting.url, "wrong") as client:
        report = Monitor(client).look()
    assert not report.up
    assert "refused the key (401)" in report.why
