"""A student measured on this machine, by a script, and over ssh. Results are kept and read again."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor import measure as module
from autodistill.advisor.describe import describe
from autodistill.advisor.measure import MeasureRequest, fingerprint, measure
from autodistill.advisor.measurements import correction, read_measured
from autodistill.cli.hardware_summary import measured_text
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.background_load import Noise
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import spec_from_config
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.runtimes.ssh import Board
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
QUIET = Noise(load_average=0.0, others=0.0, steal=0.0, doubts=())
PI = find_device("pi 5", devices())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("student"), architecture="qwen2")


@pytest.fixture(scope="module")
def student(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GgufExporter().export(folder, Q8, tmp_path_factory.mktemp("gguf")).path


def request(student: Path, out: Path, **changes: Any) -> MeasureRequest:
    small: dict[str, Any] = {} if "result" in changes else {"prompt": 16, "decoded": 4, "rounds": 2, "threads": 1}
    small |= {} if {"on", "script", "result"} & changes.keys() else {"context": 64}
    return MeasureRequest(student=student, runs=out, **(small | changes))


@pytest.fixture(scope="module")
def printed(student: Path, tmp_path_factory: pytest.TempPathFactory, llama_bench: Path) -> str:
    """Return what a board's script printed on this machine about the student.

    It runs once for all tests that only read it.
    """
    script = tmp_path_factory.mktemp("printed") / "bench.sh"
    assert measure(request(student, script.parent, script=script))["script"] == str(script)
    return subprocess.run(["sh", script, student, llama_bench], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", ["file", pytest.param("folder", marks=pytest.mark.slow)])
def test_here_it_is_timed_in_its_own_runtime(
    kind: str, folder: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_load", lambda threads: QUIET)
    path = student if kind == "file" else folder
    found = measure(request(path, tmp_path, streams=(1, 2)))
    measured = found["measured"]
    assert measured["deployment"]["runtime"] == ("llama.cpp" if kind == "file" else "transformers")
    assert [load["streams"] for load in measured["loads"]] == [1, 2]
    assert measured["peak_bytes"] > 10**7
    # llama.cpp reserves the whole context. transformers holds a prompt of 16 tokens and the three fed after it.
    held, model = 64 if kind == "file" else 19, describe(str(path))
    deployment = Deployment.from_json(measured["deployment"])
    need = memory(model.spec, deployment, context=held, batch=2, weights=model.weights_bytes)
    assert found["predicted"]["memory_bytes"] == need.total_bytes
    (kept,) = read_measured(tmp_path)
    assert kept.to_json() == json.loads(json.dumps(measured))
    config = json.loads((folder / "config.json").read_text())
    assert spec_from_config(kept.shape).tensors == spec_from_config(config).tensors


@pytest.mark.slow
def test_a_packed_folder_is_measured_as_what_it_is_packed_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_load", lambda threads: QUIET)
    packed = Deployment(runtime="transformers", format="compressed-tensors", bits=4, group_size=32)
    exported = CompressedTensorsExporter().export(folder, packed, tmp_path / "packed").path
    measured = measure(request(exported, tmp_path))["measured"]
    assert Deployment.from_json(measured["deployment"]) == packed


def test_the_default_context_is_what_the_student_reads_and_an_asked_one_is_not_lowered(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_load", lambda threads: QUIET)
    found = measure(request(student, tmp_path, context=None))["measured"]
    assert found["board"]["context"] == 512
    with pytest.raises(InputError, match="has a context of 512 tokens: give --context 512 or less"):
        measure(request(student, tmp_path, context=513))
    for name, asked, said in (("prompt", 61, "--prompt 60 or less"), ("decoded", 33, "--decoded 32 or less")):
        with pytest.raises(InputError, match=f"a context of 64 tokens is too short for --{name} {asked}.*give {said}"):
            measure(request(student, tmp_path, **{name: asked}))


def test_a_busy_machine_is_refused_unless_that_is_accepted(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Noise(load_average=9.0, others=2.0, steal=0.0, doubts=("other work took 2.0 of 2 cores",))
    monkeypatch.setattr(module, "current_load", lambda threads: busy)
    with pytest.raises(InputError, match=r"is busy .other work took 2\.0 of 2 cores.: .* or accept it with --busy"):
        measure(request(student, tmp_path))
    assert measure(request(student, tmp_path, busy=True))["measured"]["tpot_ms"] > 0


def test_more_threads_than_cores_are_refused_for_what_they_are(
    student: Path, tmp_path: Path, llama_bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_load", lambda threads: QUIET)
    with pytest.raises(InputError, match=f"--threads {10**4} is more than the cores here, .*: give .* or less"):
        measure(request(student, tmp_path, threads=10**4, busy=True))
    script, result = tmp_path / "bench.sh", tmp_path / "result.txt"
    measure(request(student, tmp_path, script=script, threads=10**4))
    said = subprocess.run(["sh", script, student, llama_bench], capture_output=True, text=True, check=True)
    result.write_text(said.stdout, encoding="utf-8")
    doubts = measure(request(student, tmp_path, result=result))["measured"]["doubts"]
    assert [doubt for doubt in doubts if "10000 threads shared the board's" in doubt]
    assert not [doubt for doubt in doubts if "busy" in doubt]


def carried(student: Path, tmp_path: Path, printed: str, **changes: Any) -> dict[str, Any]:
    """Measure from a script's output, as if a user had carried it over."""
    result = tmp_path / "result.txt"
    result.write_text(printed, encoding="utf-8")
    return measure(request(student, tmp_path, result=result, **changes))


def test_a_script_that_was_carried_brings_back_a_measurement(student: Path, tmp_path: Path, printed: str) -> None:
    measured = carried(student, tmp_path, printed, device="pi 5")["measured"]
    assert (measured["machine"], measured["student"]) == (PI.name, fingerprint(student))
    assert (measured["ttft_ms"], measured["tpot_ms"], measured["tokens_per_second"]) == (32.0, 2.0, 500.0)
    assert measured["how"].startswith("llama-bench 8cf427ff")


@pytest.mark.parametrize(
    ("system", "gpu", "device"),
    [
        (("Raspberry Pi 5 Model B Rev 1.0", 4, 8_245_148, "ondemand"), "", PI.name),
        (("Raspberry Pi 5 Model B Rev 1.1", 4, 2_060_000, "ondemand"), "", "Raspberry Pi 5 2GB"),
        (("Raspberry Pi Compute Module 5 Rev 1.0", 4, 4_140_000, "ondemand"), "", "Raspberry Pi 5 4GB"),
        (("Raspberry Pi 500 Rev 1.0", 4, 8_245_148, "ondemand"), "", PI.name),
        (("NVIDIA Jetson Orin Nano Developer Kit", 6, 7_802_188, "7W"), "Orin", "Jetson Orin Nano 8GB 7W"),
        (("12th Gen Intel(R) Core(TM) i5-12400", 12, 32_000_000, ""), "NVIDIA GeForce RTX 4090", "4090"),
        (("AMD EPYC 7763 64-Core Processor", 2, 8_000_000, ""), "", None),
        (("Radxa ROCK 5B", 8, 16_000_000, ""), "", None),
    ],
)
def test_a_board_is_the_device_that_its_system_calls_it_or_one_that_is_to_be_named(
    system: tuple[str, int, int, str], gpu: str, device: str | None, student: Path, tmp_path: Path, printed: str
) -> None:
    said, result = printed, tmp_path / "result.txt"
    facts = dict(zip(("machine", "cores", "memory_kb", "power_mode"), system, strict=True))
    for name, value in facts.items():
        said = re.sub(rf"^{name}=.*$", f"{name}={value}", said, flags=re.MULTILINE)
    result.write_text(said.replace('"gpu_info": ""', f'"gpu_info": "{gpu}"'), encoding="utf-8")
    found = measure(request(student, tmp_path, result=result))
    expected = device and find_device(device, devices()).name
    assert found["device"] == expected
    assert found["measured"]["machine"] == (expected or system[0])
    assert found["measured"]["board"]["machine"] == system[0]
    hint = f"No known device is called {system[0]}, so pick does not use this: say which of autodistill devices"
    assert (hint in measured_text(found)) == (device is None)


def test_what_was_measured_corrects_what_is_predicted_there_and_nowhere_else(
    student: Path, tmp_path: Path, printed: str
) -> None:
    measured = carried(student, tmp_path, printed, device="pi 5")["measured"]
    kept = read_measured(tmp_path)
    spec = spec_from_config(measured["shape"])
    found = correction(kept, PI, "llama.cpp")
    step = speed(spec, Q8, PI, context=measured["context"], weights=measured["size_bytes"]).decode_ms
    assert found.decode == pytest.approx(2.0 / step)
    assert found.count == 1
    other = find_device("pi 4", devices())
    assert correction(kept, other, "llama.cpp").count == correction(kept, PI, "vllm").count == 0


@pytest.mark.slow
def test_over_ssh_it_is_the_same(board: Board, student: Path, tmp_path: Path, llama_bench: Path) -> None:
    found = measure(
        request(student, tmp_path, on=board.name, ssh_config=board.config, bench=str(llama_bench), device="pi 5")
    )
    assert found["measured"]["tokens_per_second"] == 500.0
    assert found["predicted"]["tpot_ms"] > 0
    with pytest.raises(InputError, match=r"ssh://.*: there is no program '/nowhere'"):
        measure(request(student, tmp_path, on=board.name, ssh_config=board.config, bench="/nowhere"))


@pytest.mark.slow
def test_what_may_be_left_on_a_board_is_said(
    near: Board, student: Path, tmp_path: Path, llama_bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(student, tmp_path, on=near.name, bench=str(llama_bench), device="pi 5")
    whole = measure(asked)
    assert whole["left"] is None
    monkeypatch.setenv("LOST", "rm -rf")
    found = measure(asked)
    assert found["measured"]["tokens_per_second"] == 500.0
    assert measured_text(found).splitlines()[-1] == f"{found['left']}."
    assert "may still be on the board" in found["left"]
    assert "None" not in measured_text(whole)


def test_what_cannot_be_measured_is_said_before_anything_runs(
    folder: Path, student: Path, tmp_path: Path, printed: str
) -> None:
    torn, other, result = tmp_path / "torn.gguf", tmp_path / "other.gguf", tmp_path / "result.txt"
    torn.write_bytes(student.read_bytes()[:3000])
    other.write_bytes(student.read_bytes() + b"more")
    carried(student, tmp_path, printed)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((folder / "config.json").read_text())
    for asked, said in (
        ((tmp_path / "none.gguf", {}), "there is no student"),
        ((torn, {}), "torn.gguf"),
        ((empty, {}), "has no safetensors"),
        ((folder, {"on": "ssh://pi"}), "a board runs a GGUF file"),
        ((other, {"result": result}), "is for another student"),
        ((student, {"result": torn}), "no result of autodistill measure --script"),
        ((student, {"result": tmp_path / "none"}), "cannot read"),
        ((student, {"script": tmp_path / "no" / "x.sh"}), "cannot write"),
        ((student, {"on": "pi"}), "is no board"),
        ((student, {"on": "ssh://pi", "result": result}), "--on and --result each say"),
        ((student, {"on": "ssh://pi", "device": "zx 81"}), "there is no device 'zx 81'"),
        ((student, {"on": "ssh://pi", "context": 64}), "--context changes nothing in a measurement by --on"),
        ((student, {"script": result, "device": "pi 5"}), "--device changes nothing in a measurement by --script"),
        ((student, {"result": result, "prompt": 16}), "--prompt changes nothing in a measurement by --result"),
        ((student, {"device": "pi 5"}), "--device changes nothing in a measurement here"),
        ((student, {"ssh_config": result}), "--ssh-config changes nothing in a measurement here"),
        ((student, {"result": result, "rounds": 10}), "--rounds changes nothing in a measurement by --result"),
        ((student, {"result": result, "threads": 4}), "--threads changes nothing in a measurement by --result"),
        ((student, {"result": result, "timeout": 9.0}), "--timeout changes nothing in a measurement by --result"),
        ((student, {"script": result, "timeout": 9.0}), "--timeout changes nothing in a measurement by --script"),
        ((student, {"timeout": 9.0}), "--timeout changes nothing in a measurement here"),
        ((student, {"streams": (0,)}), "--streams must be"),
        ((student, {"context": 1}), "--context must be at least 2"),
        ((student, {"prompt": 0}), "--prompt must be at least 1"),
        ((student, {"decoded": 1}), "--decoded must be at least 2"),
        ((student, {"rounds": 0}), "--rounds must be at least 1"),
    ):
        with pytest.raises(InputError, match=said):
            measure(request(asked[0], tmp_path, **asked[1]))


def test_a_file_is_timed_as_its_serve_json_says_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_load", lambda threads: QUIET)
    told: list[dict[str, Any]] = []
    real = module.time_serving
    monkeypatch.setattr(module, "time_serving", lambda *given, **more: told.append(more) or real(*given, **more))
    # Its heads have 32 dimensions, which the blocks of a quantised cache divide.
    wide = save_tiny_teacher(tmp_path / "wide", layers=2, heads=2, kv_heads=1)
    file = GgufExporter().export(wide, Q8, tmp_path / "gguf").path
    cached = replace(Q8, cache_type_k="q8_0", cache_type_v="q4_0")
    write_launch_files(file, cached, 128, 2)
    found = measure(request(file, tmp_path, context=None))
    assert [(one["context"], one["slots"]) for one in told] == [(128, 2)]
    assert [(one["cache_types"], one["flash_attention"]) for one in told] == [(("q8_0", "q4_0"), "on")]
    measured = found["measured"]
    assert Deployment.from_json(measured["deployment"]) == cached
    said = {name: measured["board"][name] for name in ("context", "slots", "flash_attention")}
    assert said == {"context": 128, "slots": 2, "flash_attention": "on"}
    assert [load["streams"] for load in measured["loads"]] == [1, 2]
    assert "2 x 128 tokens, cache in q8_0 and q4_0, flash attention on" in measured_text(found)
    model = describe(str(file))
    need = memory(model.spec, cached, context=128, batch=2, weights=model.weights_bytes)
    assert found["predicted"]["memory_bytes"] == need.total_bytes
    # Options take precedence over the file's settings.
    asked = measure(request(file, tmp_path, context=64, streams=(1,)))["measured"]
    assert (asked["board"]["context"], asked["board"]["slots"]) == (64, 1)
    assert [load["streams"] for load in asked["loads"]] == [1]


def test_llama_bench_is_told_the_cache_and_what_it_had_is_recorded(
    folder: Path, tmp_path: Path, llama_bench: Path
) -> None:
    file = GgufExporter().export(folder, Q8, tmp_path / "gguf").path
    write_launch_files(file, replace(Q8, cache_type_k="q8_0", cache_type_v="q8_0"), 128, 2)
    script, given = tmp_path / "bench.sh", tmp_path / "given"
    spy = tmp_path / "llama-bench"
    said = '"type_k": "q8_0", "type_v": "q4_0"'
    spy.write_text(f'#!/bin/sh\necho "$@" >> {given}\n{llama_bench} "$@" | sed \'s/"n_gen"/{said}, &/\'\n')
    spy.chmod(0o755)
    measure(request(file, tmp_path, script=script))
    printed = subprocess.run(["sh", script, file, spy], capture_output=True, text=True, check=True).stdout
    assert all("-ctk q8_0 -ctv q8_0 -fa 1" in line for line in given.read_text().splitlines())
    (result := tmp_path / "result.txt").write_text(printed)
    measured = measure(request(file, tmp_path, result=result))["measured"]
    assert Deployment.from_json(measured["deployment"]).cache_types == ("q8_0", "q4_0")
    result.write_text(printed.replace('"type_v": "q4_0"', '"type_v": "q9_0"'))
    with pytest.raises(InputError, match="held its cache in 'q9_0'"):
        measure(request(file, tmp_path, result=result))
