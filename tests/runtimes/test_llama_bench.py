"""The script's output, with a stand-in for llama-bench that prints its format, becomes figures or is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.runtimes.llama_bench import Bench, parse_result


def bench(student: Path, **changes: object) -> Bench:
    asked = Bench(student="abc", student_bytes=student.stat().st_size, prompt=100, decoded=20, repetitions=2, threads=1)
    return replace(asked, **changes)  # type: ignore[arg-type]


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(["sh", "-s", *arguments], input=script, capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student.gguf"
    path.write_text("weights", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, llama_bench: Path) -> str:
    """The script's output for one student. Tests that only read it share it."""
    student = tmp_path_factory.mktemp("said") / "student.gguf"
    student.write_text("weights", encoding="utf-8")
    return run(bench(student).script(), str(student), str(llama_bench))


def test_the_script_brings_back_what_the_bench_and_the_board_say(said: str) -> None:
    found = parse_result(said, "x")
    assert (found.student, found.build, found.threads) == ("abc", "8cf427ff (5163)", 1)
    assert (found.prompt, found.decoded) == (100, 20)
    assert found.prompt_ms == (200.0, 200.0)
    assert found.step_ms == (2.0, 2.0)
    assert found.machine
    assert found.cores >= 1


REAL = Path(__file__).with_name("llama_bench_11434")
"""Output of llama.cpp's llama-bench, build 11434, for a tiny student: 100 tokens read, 20 written, on one thread."""


def test_what_the_program_itself_prints_is_read_as_it_counts(student: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    shown = f"case $* in *'-p 0 '*) cat '{REAL}/decode.json' ;; *) cat '{REAL}/prompt.json' ;; esac"
    program.write_text(f"#!/bin/sh\n{shown}", encoding="utf-8")
    program.chmod(0o755)
    found = parse_result(run(bench(student).script(), str(student), str(program)), "x")
    (prompt,), (decode,) = (json.loads((REAL / f"{name}.json").read_text()) for name in ("prompt", "decode"))
    assert found.build == "unknown (11434)"  # it was built without its repository
    assert (found.prompt, found.decoded) == (100, 20)
    # The program's own tokens per second for each repetition.
    assert [100 / ms * 1e3 for ms in found.prompt_ms] == pytest.approx(prompt["samples_ts"], rel=1e-4)
    assert [1e3 / ms for ms in found.step_ms] == pytest.approx(decode["samples_ts"], rel=1e-4)


def test_the_stand_in_prints_what_the_program_itself_does(student: Path, llama_bench: Path) -> None:
    asked = {"prompt": ("100", "0"), "decode": ("0", "20")}
    for name, (prompt, decoded) in asked.items():
        line = [str(llama_bench), "-m", str(student), "-o", "json", "-r", "3", "-t", "1", "-p", prompt, "-n", decoded]
        (made,) = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
        (real,) = json.loads((REAL / f"{name}.json").read_text())
        for key, value in made.items():
            assert type(value) is type(real[key]), key
        assert [made[key] for key in ("n_prompt", "n_gen", "n_threads")] == [
            real[key] for key in ("n_prompt", "n_gen", "n_threads")
        ]
        assert len(made["samples_ns"]) == len(real["samples_ns"]) == 3


def test_the_script_leaves_nothing_behind(
    student: Path, llama_bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    assert "end=ok" in run(bench(student).script(), str(student), str(llama_bench))
    assert list(scratch.iterdir()) == []


# The name of a fan matters if no firmware answers.
@pytest.mark.parametrize(
    ("fan", "firmware", "slowed"),
    [
        *((fan, "", slowed) for fan in ("pwm-fan", "Fan", "gpio_fan") for slowed in (False, True)),
        ("Fan", "throttled=0x0", True),
        ("Fan", "throttled=0x4", False),
    ],
)
def test_a_fan_that_turns_is_no_throttling(
    student: Path,
    llama_bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fan: str,
    firmware: str,
    slowed: bool,
) -> None:
    thermal, programs = tmp_path / "thermal", tmp_path / "programs"
    for index, kind in enumerate((fan, "cpufreq-cpu0")):
        device = thermal / f"cooling_device{index}"
        device.mkdir(parents=True)
        (device / "type").write_text(f"{kind}\n", encoding="utf-8")
        (device / "cur_state").write_text("0\n", encoding="utf-8")
    programs.mkdir()
    turned = f"echo 3 > {thermal}/cooling_device0/cur_state\n"
    hot = f"echo 1 > {thermal}/cooling_device1/cur_state\n" if slowed else ""
    for name, body in {
        "llama-bench": f'{turned}{hot}exec {llama_bench} "$@"\n',
        "vcgencmd": f'[ "$1" = get_throttled ] && [ -n "{firmware}" ] && echo {firmware}\n',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    script = bench(student).script().replace("/sys/class/thermal", str(thermal)).replace("/sys/devices", str(tmp_path))
    found = parse_result(run(script, str(student), str(programs / "llama-bench")), "x")
    # If the firmware answers, only its answer counts.
    assert found.throttled == (firmware == "throttled=0x4" if firmware else slowed)


@pytest.mark.parametrize("slowed", [False, True])
def test_a_board_is_asked_whether_it_slows_down_while_it_works(
    student: Path, llama_bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowed: bool
) -> None:
    """A Raspberry Pi that was too hot earlier has the upper bits before and after, and the lower ones while hot."""
    working, then = tmp_path / "working", "throttled=0xe0008" if slowed else "throttled=0xe0000"
    for name, body in {
        "llama-bench": f'touch {working}\nsleep 0.5\nrm {working}\nexec {llama_bench} "$@"\n',
        "vcgencmd": f"[ $1 = get_throttled ] || exit 1\n[ -f {working} ] && echo {then} || echo throttled=0xe0000\n",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = run(bench(student).script(), str(student), str(tmp_path / "llama-bench"))
    assert parse_result(said, "x").throttled == slowed
    # However long it takes, each answer is reported once.
    assert all(line.count("throttled=0xe0000") <= 1 for line in said.splitlines())


# tegrastats of a Jetson AGX Orin 64GB and of an Orin Nano: current and average milliwatts.
AGX = (
    "RAM 3207/62780MB (lfb 1x4MB) GR3D_FREQ 99% VDD_GPU_SOC 9140mW/9140mW VDD_CPU_CV 2180mW/2180mW "
    "VIN_SYS_5V0 4330mW/4330mW NC 0mW/0mW VDDQ_VDD2_1V8AO 1000mW/1000mW"
)
NANO = "RAM 2/7620MB VDD_IN 5335mW/5335mW VDD_CPU_GPU_CV 1126mW/1126mW VDD_SOC 1484mW/1484mW"


@pytest.mark.parametrize(
    ("said", "watts", "labels"),
    [
        *((AGX, 9.14 + 2.18 + 4.33, labels) for labels in (False, True)),
        (NANO, 5.335, False),
        ("RAM 2/7620MB", None, False),
    ],
)
def test_the_rails_of_a_jetson_make_up_its_input(
    student: Path,
    llama_bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    watts: Any,
    labels: bool,
) -> None:
    hwmon, powercap, programs = tmp_path / "hwmon", tmp_path / "powercap", tmp_path / "programs"
    programs.mkdir()
    if labels:
        # tegrastats reads sensors, and the kernel may show these too.
        (hwmon / "hwmon0").mkdir(parents=True)
        pairs = re.findall(r"(V\w+) (\d+)mW", said)
        for index, (rail, milliwatts) in enumerate(pairs, start=1):
            for name, value in (("in", 1000), ("curr", milliwatts)):
                (hwmon / "hwmon0" / f"{name}{index}_input").write_text(f"{value}\n", encoding="utf-8")
            (hwmon / "hwmon0" / f"in{index}_label").write_text(f"{rail}\n", encoding="utf-8")
    else:
        (programs / "tegrastats").write_text(f"#!/bin/sh\necho '{said}'\n", encoding="utf-8")
        (programs / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    slow = programs / "llama-bench"
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {llama_bench} "$@"\n', encoding="utf-8")
    slow.chmod(0o755)
    script = bench(student).script()
    for real, made in (("/sys/class/hwmon", hwmon), ("/sys/class/powercap", powercap)):
        script = script.replace(real, str(made))
    found = parse_result(run(script, str(student), str(slow)), "x")
    assert found.watts == (None if watts is None else pytest.approx(watts))


def test_the_energy_of_a_platform_is_not_added_to_that_of_its_packages(
    student: Path, llama_bench: Path, tmp_path: Path
) -> None:
    for index, (name, energy) in enumerate((("package-0", 5_000_000), ("psys", 9_000_000), ("package-1", 2_000_000))):
        zone = tmp_path / f"intel-rapl:{index}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n", encoding="utf-8")
        (zone / "energy_uj").write_text(f"{energy}\n", encoding="utf-8")
    script = bench(student).script().replace("/sys/class/powercap", str(tmp_path))
    said = run(script, str(student), str(llama_bench))
    assert "decode.energy_before_uj=7000000" in said.splitlines()


@pytest.mark.parametrize("shell", ["dash", "busybox", "bash"])
def test_the_script_is_of_any_posix_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    words = [shell, "sh"] if shell == "busybox" else [shell]
    script = Bench(student="abc", student_bytes=1).script()
    assert subprocess.run([*words, "-n"], input=script, capture_output=True, text=True).stderr == ""


def test_what_goes_wrong_on_the_board_is_said(student: Path, llama_bench: Path) -> None:
    program = str(llama_bench)
    for script, arguments, said in (
        (bench(student).script(), (str(student), "/nowhere/llama-bench"), "no program '/nowhere/llama-bench'"),
        (bench(student).script(), ("/nowhere.gguf", program), "there is no file '/nowhere.gguf'"),
        (
            bench(student, student_bytes=9).script(),
            (str(student), program),
            "7 bytes and not 9: copy it again",
        ),
    ):
        with pytest.raises(InputError, match=f"board: .*{said}"):
            parse_result(run(script, *arguments), "board")
    student.write_text("broken", encoding="utf-8")
    with pytest.raises(InputError, match="llama-bench ended with 1: llama_bench: error: failed to load model"):
        parse_result(run(bench(student).script(), str(student), program), "board")


def test_a_result_that_is_cut_off_anywhere_is_refused(said: str) -> None:
    lines = said.splitlines()
    for count in range(len(lines)):
        with pytest.raises(InputError):
            parse_result("\n".join(lines[:count]), "x")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("autodistill-bench=1", "autodistill-bench=7", "no result of autodistill measure --script"),
        ('"n_gen": 20,', "", "lacks n_prompt, n_gen, samples_ns: update llama.cpp"),
        ('"n_gen": 20,', '"n_gen": "20",', "no whole numbers"),
        ("[ 40000000, 40000000 ]", "[]", "timed nothing"),
        ("[ 40000000, 40000000 ]", "[0]", "numbers above zero"),
        ("[ 40000000, 40000000 ]", "[NaN]", "numbers above zero"),
        ("[ 40000000, 40000000 ]", "[40000000", "cut off or no JSON"),
    ],
)
def test_a_damaged_result_says_what_is_wrong(said: str, old: str, new: str, complaint: str) -> None:
    assert old in said
    with pytest.raises(InputError, match=complaint):
        parse_result(said.replace(old, new), "x")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # A Raspberry Pi: bits 16 to 19 show what has happened since it booted, bits 0 to 3 what is happening now.
        ({"throttled_before": "throttled=0x0", "throttled_after": "throttled=0x50005"}, {"throttled": True}),
        ({"throttled_before": "throttled=0x50000", "throttled_after": "throttled=0x50000"}, {"throttled": False}),
        ({"throttled_before": "throttled=0x0", "throttled_after": "throttled=0x50000"}, {"throttled": True}),
        ({"throttled_before": "throttled=0x20000", "throttled_after": "throttled=0x60000"}, {"throttled": True}),
        ({"throttled_before": "throttled=0x0", "throttled_after": "throttled=x"}, {"throttled": False}),
        # Bits that were set before show nothing about this run, so the state is also read under load.
        (
            {
                "throttled_before": "throttled=0x50000",
                "throttled_meanwhile": "throttled=0x50000 throttled=0x50005",
                "throttled_after": "throttled=0x50000",
            },
            {"throttled": True},
        ),
        ({"throttled_before": "3", "throttled_after": "4"}, {"throttled": True}),
        ({"throttled_before": "3", "throttled_meanwhile": "3 5", "throttled_after": "3"}, {"throttled": True}),
        ({"throttled_before": "3", "throttled_meanwhile": "3", "throttled_after": "3"}, {"throttled": False}),
        ({"throttled_before": "", "throttled_after": ""}, {"throttled": None}),
        ({"temperature_mc": "61500"}, {"temperature": 61.5}),
        ({"power_uw": "5000000"}, {"watts": 5.0, "joules_per_token": 0.01}),
        (
            {
                "power_uw": "5",
                "energy_before_uj": "1000000",
                "energy_after_uj": "31000000",
                "began": "10",
                "ended": "13",
            },
            {"watts": 10.0, "joules_per_token": 0.02},
        ),
        ({"energy_before_uj": "9", "energy_after_uj": "1", "began": "10", "ended": "13"}, {"watts": None}),
        ({"peak_kb": "2048"}, {"peak_bytes": 2 * 2**20}),
    ],
)
def test_sensors_are_read_where_the_board_has_them(
    said: str, facts: dict[str, str], expected: dict[str, object]
) -> None:
    told = [f"decode.{name}={value}" for name, value in facts.items()]
    prompt = said[said.index("prompt.json\n") : said.index("prompt.json-end\n")] + "prompt.json-end"
    decode = said[said.index("decode.json\n") : said.index("decode.json-end\n")] + "decode.json-end"
    text = "\n".join(["autodistill-bench=1", *told, prompt, decode, "end=ok"])
    found = parse_result(text, "x")
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)


def test_what_a_gpu_holds_is_not_told_as_a_process_s_peak(said: str) -> None:
    """No process's resident pages contain CUDA's memory, not even on a Jetson, whose processor and GPU share memory."""
    # The stand-in may end before the script looks at it once, so the value that it would have seen is inserted.
    seen = re.sub(r"peak_kb=\d+", "peak_kb=2048", said)
    assert parse_result(seen, "x").peak_bytes == 2 * 2**20
    assert '"gpu_info": ""' in seen
    assert parse_result(seen.replace('"gpu_info": ""', '"gpu_info": "Orin"'), "x").peak_bytes is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(0, 400), st.integers(0, 40))
def test_any_change_is_a_result_or_is_refused(noise: str, place: int, removed: int) -> None:
    text = "\n".join(
        [
            *("autodistill-bench=1", "student=a", "threads=1", "cores=2", "decode.power_uw=1"),
            *("prompt.json", '[{"n_prompt": 5, "n_gen": 0, "samples_ns": [5]}]', "prompt.json-end"),
            *("decode.json", '[{"n_prompt": 0, "n_gen": 5, "samples_ns": [5]}]', "decode.json-end", "end=ok"),
        ]
    )
    with contextlib.suppress(InputError):
        found = parse_result(text[:place] + noise + text[place + removed :], "x")
        assert min(found.step_ms) > 0


@pytest.mark.parametrize("changes", [{"prompt": 0}, {"decoded": -1}, {"repetitions": 0}, {"threads": -1}])
def test_numbers_that_cannot_be_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        Bench(**({"student": "a", "student_bytes": 1} | changes))  # type: ignore[arg-type]
