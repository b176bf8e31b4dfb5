"""A real server under load, and the record of it that `pick` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.advisor.describe import deployment_named, describe
from autodistill.advisor.measure import fingerprint
from autodistill.advisor.measurements import correction, read_measured
from autodistill.cli.app import main
from autodistill.errors import InputError, ServiceError
from autodistill.hardware.budget import parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import detect, machine_name
from autodistill.models.config import config_of
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import to_parquet
from autodistill.service.client import Answer
from autodistill.service.launch import Service
from autodistill.service.load import Level, broken, counts_of, load, run_level, stand, varied_prompt
from autodistill.service.promise import Limit, Promise
from autodistill.service.request import LoadRequest
from autodistill.utils.json_files import write_json


@pytest.fixture
def key_file(service: Service, tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(service.setting.key)
    return path


def asked(service: Service, key_file: Path, **options: Any) -> LoadRequest:
    small = {"prompt": 16, "decoded": 4, "threads": 1, "time": "20s", "key_file": key_file, "runs": key_file.parent}
    return LoadRequest(service.setting.url, **{**small, **options})


def test_it_is_loaded_as_far_as_asked_and_kept_as_pick_reads_it(
    service: Service, student: Path, key_file: Path
) -> None:
    said: list[str] = []
    found = load(asked(service, key_file, streams="2,3"), said.append)
    # A single stream is measured too, because predictions are for one stream.
    assert [one["streams"] for one in found["levels"]] == [1, 2, 3]
    assert found["streams"] == 3
    assert found["capacity"] == found["levels"][-1]["requests_per_second"]
    assert [line.split(":")[0] for line in said] == ["1 stream", "2 streams", "3 streams"]
    (kept,) = read_measured(key_file.parent)
    assert (kept.student, kept.how, kept.threads) == (fingerprint(student), "autodistill load", 1)
    assert kept.machine == machine_name(detect(), accelerated=False)
    assert (kept.runtime, kept.prompt, kept.size_bytes) == ("llama.cpp", 16, student.stat().st_size)
    assert kept.ttft_ms > 0
    assert kept.tpot_ms <= kept.tpot_p95_ms
    assert [one["streams"] for one in kept.loads] == [1, 2, 3]


def test_of_another_device_it_corrects_what_is_predicted_of_that(
    service: Service, student: Path, key_file: Path
) -> None:
    pi = find_device("pi 5 8gb", devices())
    load(asked(service, key_file, streams="1", device="pi 5 8gb", student=student))
    kept = read_measured(key_file.parent)
    assert correction(kept, pi, "llama.cpp").count == 1
    assert correction(kept, find_device("4090", devices()), "llama.cpp").count == 0


def test_pick_corrects_its_predictions_by_what_a_load_has_stored(
    service: Service, student: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = key_file.parent / "runs"
    row = Row.from_json(
        {
            "row_id": "t001-gguf-q8_0",
            "trial": "t001",
            "kind": "student",
            "name": "s",
            "deployment": deployment_named("gguf-q8_0").to_json(),
            "shape": config_of(describe(str(student)).spec),
            "status": "completed",
            "feasible": True,
            "split": "validation",
            "accuracy": 0.5,
            "memory_bytes": 10**8,
            "memory_source": "predicted",
            "context": 256,
            "batch": 1,
            "fidelity": 1.0,
        }
    )
    (runs / "one").mkdir(parents=True)
    known = {"data": {"name": "text", "fingerprint": "1"}, "teacher": {"name": "big", "fingerprint": "2"}}
    write_json(runs / "one" / "search.json", {"metric": "accuracy", "direction": "max"} | known)
    to_parquet([row], runs / "one" / "leaderboard.parquet")

    def picked() -> tuple[dict[str, float], set[str]]:
        """Return the times that `pick` reckons with, and where they come from; memory is left out."""
        words = ["--device", "pi 5 8gb", "--latency", "tpot_p50=9s,ttft_p50=9s", "--runs", str(runs), "--json"]
        assert main(["pick", *words]) == 0
        found = json.loads(capsys.readouterr().out)["pick"]
        names = [name for name in found["needs"] if name != "memory"]
        return {name[:4]: found["needs"][name] for name in names}, {found["sources"][name] for name in names}

    before, sources = picked()
    assert sources == {"predicted"}
    words = ["--key-file", str(key_file), "--runs", str(runs), "--device", "pi 5 8gb", "--student", str(student)]
    words += ["--streams", "1", "--prompt", "16", "--decoded", "4", "--time", "20s", "--threads", "1"]
    assert main(["load", service.setting.url, *words]) == 0
    capsys.readouterr()
    after, sources = picked()
    assert {one.partition(" ")[0] for one in sources} == {"corrected"}
    factors = correction(read_measured(runs), find_device("pi 5 8gb", devices()), "llama.cpp")
    assert after["tpot"] == pytest.approx(factors.decode * before["tpot"])
    assert after["ttft"] == pytest.approx(factors.prefill * before["ttft"])


def test_it_stops_at_the_first_number_of_sequences_that_breaks_a_limit(service: Service, key_file: Path) -> None:
    found = load(asked(service, key_file, latency="tpot_p95=1us", streams="1,2"))
    assert [one["streams"] for one in found["levels"]] == [1]
    assert (found["streams"], found["capacity"]) == (None, None)
    assert "tpot_p95" in found["levels"][0]["broken"][0]


def test_the_percentiles_of_a_level_are_those_of_its_answers() -> None:
    answers = tuple(
        Answer(tokens=3, first_seconds=first, token_seconds=(first / 10, first / 20)) for first in (0.1, 0.2, 0.4)
    )
    level = Level(streams=3, prompt=8, answers=answers, seconds=2.0)
    document = level.to_json()
    steps = np.array([0.01, 0.005, 0.02, 0.01, 0.04, 0.02])
    assert document["tpot_p95_ms"] == pytest.approx(1e3 * np.percentile(steps, 95))
    assert document["ttft_p50_ms"] == pytest.approx(200.0)
    assert (document["tokens_per_second"], document["requests_per_second"]) == (4.5, 1.5)
    assert document["answer_ms"] == pytest.approx(1e3 * (0.2 + 0.02 + 0.01))
    assert broken(level, parse_latency("ttft_p95=300ms,tpot_p50=1s")) == ("ttft_p95 380.0ms of 300.0ms",)
    assert broken(level, parse_latency("1s")) == ()


def test_a_level_ends_when_its_time_is_over(service: Service) -> None:
    with service.client() as client:
        level = run_level(client, 2, 16, 4, 300, seconds=0.0)
        assert level.answers == ()
        level = run_level(client, 2, 16, 4, 300, seconds=30.0, answers=3)
        assert len(level.answers) == 6


def test_a_time_that_is_over_before_any_level_is_told(service: Service, key_file: Path) -> None:
    with pytest.raises(ServiceError, match=r"gave no whole answer in .*: give more --time"):
        load(asked(service, key_file, time="1us"))
    assert not (key_file.parent / "measurements.jsonl").exists()


def test_no_prompt_begins_like_another_and_all_ids_are_words() -> None:
    prompts = [varied_prompt(40, 300, number) for number in range(200)]
    assert len({one[0] for one in prompts}) == 200
    assert all(3 <= token < 300 for one in prompts for token in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"streams": "1,x"}, "--streams"),
        ({"streams": "0"}, "--streams"),
        ({"streams": "1000"}, "at most 256"),
        ({"time": "2h"}, "--time"),
        ({"decoded": 1}, "--decoded"),
        ({"prompt": 600}, "room for 512"),
        ({"student": "gone.gguf"}, "gone.gguf, which is not here"),
        ({"device": "no such device"}, "device"),
    ],
)
def test_what_cannot_be_is_refused(service: Service, key_file: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(asked(service, key_file, **options))
    assert not (key_file.parent / "measurements.jsonl").exists()


def test_a_server_that_is_not_there_or_elsewhere_is_told(key_file: Path, service: Service) -> None:
    with pytest.raises(ServiceError, match="cannot be reached"):
        load(LoadRequest("http://127.0.0.1:9", runs=key_file.parent))
    with pytest.raises(InputError, match="another machine"):
        load(LoadRequest("http://192.0.2.1:80", runs=key_file.parent))
    with pytest.raises(InputError, match="how many --threads"):
        load(LoadRequest("http://192.0.2.1:80", device="pi 5 8gb", runs=key_file.parent))
    with pytest.raises(InputError, match="no address"):
        load(LoadRequest("ftp://127.0.0.1", runs=key_file.parent))
    wrong = key_file.with_name("wrong")
    wrong.write_text("another-key-than-that")
    with pytest.raises(ServiceError, match="refused the key"):
        load(asked(service, wrong))


def promise(*limits: Limit, streams: int = 2) -> Promise:
    return Promise(of="t001", context=512, streams=streams, limits=limits)


def limit(quantity: str, percentile: int | None, most: float, streams: int, prompt: int | None = None) -> Limit:
    return Limit(quantity=quantity, percentile=percentile, most=most, streams=streams, prompt=prompt)


def level(streams: int, first: float, later: float, memory: int | None = None) -> Level:
    answers = (Answer(tokens=3, first_seconds=first, token_seconds=(later, later)),) * 4
    return Level(streams=streams, prompt=16, answers=answers, seconds=1.0, memory_bytes=memory)


def test_a_promise_holds_for_as_many_sequences_as_it_is_of() -> None:
    levels = [level(1, 0.1, 0.01, 900), level(2, 0.2, 0.02, 1100), level(4, 9.0, 9.0, 1100)]

    def judged(*limits: Limit, of: Sequence[Level] = levels, room: tuple[int, int] = (512, 2)) -> list[Any]:
        return [(one.kept, one.value) for one in stand(promise(*limits), of, room)]

    # The results of four streams do not break a promise for two.
    assert judged(limit("ttft", 95, 0.25, 2), limit("tpot", 50, 0.015, 2)) == [(True, 0.2), (False, 0.02)]
    assert judged(limit("tpot", 50, 0.015, 1)) == [(True, 0.01)]
    # A limit that fewer streams keep says nothing about more. A limit that fewer streams break is broken.
    assert judged(limit("ttft", 95, 0.25, 2), of=levels[:1]) == [(None, 0.1)]
    assert judged(limit("ttft", 95, 0.05, 2), of=levels[:1]) == [(False, 0.1)]
    # The largest memory counts, but not that of more room than promised. A first token counts only for prompts as long.
    assert judged(limit("memory", None, 1000, 2)) == [(False, 1100.0)]
    assert judged(limit("memory", None, 1000, 2), room=(512, 4)) == [(None, None)]
    assert judged(limit("ttft", 95, 0.25, 2, prompt=16)) == [(True, 0.2)]
    assert judged(limit("ttft", 95, 0.25, 2, prompt=512)) == [(None, None)]
    assert counts_of((1, 4), promise(limit("tpot", 95, 1.0, 2), limit("memory", None, 1.0, 9))) == (1, 2, 4)
    assert counts_of((1, 4), None) == (1, 4)


def test_a_load_says_whether_the_promise_is_kept_and_by_its_exit_code_too(
    service: Service, student: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = key_file.parent / "export"
    folder.mkdir()
    shutil.copy(student, folder)
    latency = {"quantity": "ttft", "percentile": 95, "seconds": 60.0, "streams": 2, "prompt": 24}
    stored = {"context": 512, "streams": 2, "memory_bytes": 10**9, "latency": [latency], "measured": {}}
    words = ["load", service.setting.url, "--key-file", str(key_file), "--runs", str(key_file.parent)]
    words += ["--streams", "1", "--decoded", "4", "--time", "20s", "--threads", "1", "--promise", str(folder)]
    for most, code, verdict in ((10**9, 0, "OK"), (10**6, 4, "BROKEN")):
        (folder / "export.json").write_text(json.dumps({"row": "t001", "promise": stored | {"memory_bytes": most}}))
        assert main([*words, "--json"]) == code
        found = json.loads(capsys.readouterr().out)["promise"]
        assert (found["of"], found["verdict"]) == ("t001", verdict)
        assert [one["figure"] for one in found["promise"]] == ["ttft_p95", "memory"]
    assert main(words) == 4
    said = capsys.readouterr().out
    assert "The promise of t001 is BROKEN: ttft_p95 kept: " in said
    assert "of 1.00 MB at " in said
    kept = read_measured(key_file.parent)[-1]
    # Two streams are tried because that is promised, with prompts as long as those of the limit.
    assert [one["streams"] for one in kept.loads] == [1, 2]
    assert (kept.prompt, kept.board["slots"]) == (24, 2)
    assert kept.peak_bytes is not None
