"""Does `autodistill serve` survive a long load, malformed requests, wrong keys, and SIGKILL?

    python -m benchmarks.reliability.soak [--student EXPORT] [--time 10m] [--streams 4] [--threads N]

The server is a process of its own, as a user starts it. A supervisor starts it again whenever it ends, as systemd's
`Restart=always` does. First its capacity is measured: the answers a second if all streams ask again and again. Then the
streams ask at an even pace for the given time, all together at 60% of the capacity. Failed requests, latency and memory
are recorded, and the slope of the memory after the first tenth. Then come 1,000 requests that are malformed or have a
wrong key; each must get a certain status. Finally the server's process is killed with SIGKILL, which `serve` itself
repairs, and then `serve`, which the supervisor restarts. Each time the program waits for the first right answer.
Without `--student` the student is the 135M teacher in its own types, untrained.

Targets, written before the first run: no failed request; memory flat within 1% of its mean over the time; every status
as it must be; a right answer after each kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from autodistill.advisor.describe import deployment_named, describe
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import ServiceError
from autodistill.export.gguf import GgufExporter
from autodistill.options import cache_folder
from autodistill.service.client import Answer, Client, memory_of, server_processes
from autodistill.service.load import run_level, varied_prompt
from autodistill.service.served import find_served
from autodistill.service.window import times
from autodistill.units import format_bytes, format_duration, parse_duration
from benchmarks.common import program, report

SHARE = 0.6  # of the capacity
PROMPT, DECODED = 64, 32  # tokens
LOOK_SECONDS = 2.0  # between two measurements of the memory
STARTING_SECONDS = 120.0
MOST_SLOPE = 0.01  # as a share of the mean memory


class Supervisor:
    """Starts `autodistill serve` within a `with` block, and again whenever it ends."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self.starts = 0
        self.exit_code: int | None = None

    def _keep(self) -> None:
        while not self._over.is_set():
            self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.starts += 1
            self.exit_code = self.process.wait()

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.process.terminate()
        self._thread.join()


@dataclass
class Soaked:
    """What was recorded under load."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def main() -> None:
    """Load a served student, write the report, and exit with 1 if it missed a target."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--student", default="", help="a .gguf file, an exported folder, a run or a row")
    parser.add_argument("--time", type=parse_duration, default=600.0, help="under load, 10m by default")
    parser.add_argument("--streams", type=int, default=4, help="sequences at once, 4 by default")
    parser.add_argument("--threads", type=int, default=0, help="of the server; all cores by default")
    parser.add_argument("--malformed", type=int, default=1000, help="malformed requests, 1000 by default")
    arguments = program.parse(parser, time=4.0, streams=2, threads=1, malformed=60)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        student = _student(arguments.student, Path(folder), tiny=arguments.smoke)
        found = run(student, Path(folder), arguments)
    report.note("soak", found)
    path = report.write("soak", "A served student under load, malformed requests and kills", _sections(found))
    print(path)
    if found["broken"]:
        sys.exit(f"targets missed: {'; '.join(found['broken'])}")


def _student(reference: str, folder: Path, *, tiny: bool) -> Path:
    """Return the file that is served: the one that was named, or the default teacher unchanged."""
    if reference:
        return find_served(reference, Path("results/runs")).path
    if tiny:
        teacher, name = Path(program.tiny_teacher()), "gguf-q8_0"
    else:
        teacher, name = materialize(resolve_teacher("smollm2"), cache_folder()).folder, "gguf-q4_1"
    return GgufExporter().export(teacher, deployment_named(name), folder / "gguf").path


def run(student: Path, folder: Path, arguments: Any) -> dict[str, Any]:
    """Serve a student for the whole time, and return counts of requests and faults."""
    port, key_file = _free_port(), folder / "key"
    command = [sys.executable, "-m", "autodistill", "serve", str(student), "--port", str(port)]
    command += ["--key-file", str(key_file), "--streams", str(arguments.streams), "--threads", str(arguments.threads)]
    vocabulary = describe(str(student)).spec.vocabulary
    url = f"http://127.0.0.1:{port}"
    with Supervisor(command) as supervisor:
        started = _until_it_answers(url, key_file, vocabulary)
        key = key_file.read_text().strip()
        with Client(url, key) as client:
            level = run_level(client, arguments.streams, PROMPT, DECODED, vocabulary, 60.0, 8)
            capacity = len(level.answers) / level.seconds
            print(f"capacity {capacity:.3g} answers/s; loading for {format_duration(arguments.time)}", flush=True)
            soaked = soak(client, arguments.streams, SHARE * capacity, arguments.time, vocabulary)
            expected = client.complete(varied_prompt(PROMPT, vocabulary, 0), 8)
        statuses = malformed(url, key, vocabulary, arguments.malformed)
        kills = {
            "the server": _killed(server_processes(url)[0].pid, url, key_file, vocabulary),
            "serve itself": _killed(supervisor.process.pid, url, key_file, vocabulary),
        }
        starts = supervisor.starts
    found = _document(student, soaked, arguments) | {
        "started_seconds": started,
        "capacity": capacity,
        "streams": arguments.streams,
        "expected_tokens": expected.tokens,
        "malformed": statuses,
        "restarted_seconds": kills,
        "starts": starts,
        "exit_code": supervisor.exit_code,
    }
    return found | {"broken": _broken(found)}


def soak(client: Client, streams: int, rate: float, seconds: float, vocabulary: int) -> Soaked:
    """Ask at an even pace, and measure the memory from time to time.

    Args:
        client: Client of the server.
        streams: Number of streams that ask in turn.
        rate: Requests a second of all streams together.
        seconds: Duration.
        vocabulary: Prompts have token ids below it.
    """
    found, lock = Soaked(), threading.Lock()
    began = time.monotonic()

    def ask(stream: int) -> None:
        """Ask at the times of one stream. A late request is sent at once, and the pace is not exceeded later."""
        number = stream
        while (due := began + number / rate) < began + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                answer = client.complete(varied_prompt(PROMPT, vocabulary, number), DECODED)
                with lock:
                    found.answers.append(answer)
            except ServiceError as error:
                with lock:
                    found.failures.append(str(error))
            number += streams

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in range(streams)]
    for one in threads:
        one.start()
    processes = server_processes(client.url)
    while any(one.is_alive() for one in threads):
        memory = memory_of(processes)
        if memory is not None:
            found.memory.append((time.monotonic() - began, memory))
        time.sleep(min(LOOK_SECONDS, seconds / 10))
    for one in threads:
        one.join()
    return found


def malformed(url: str, key: str, vocabulary: int, count: int) -> list[dict[str, Any]]:
    """Send wrong requests, each kind in turn, and count the statuses of each.

    Returns:
        For each kind: its name, the right statuses, and how often each status came. Status 0 means that there was none.
    """
    right = {"Authorization": f"Bearer {key}"}
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    path, whole = "/v1/completions", {"prompt": [5, 6], "max_tokens": 1}
    kinds: list[tuple[str, tuple[int, ...], Callable[[httpx2.Client], httpx2.Response]]] = [
        ("no key", (401,), lambda http: http.post(path, json=whole)),
        ("a wrong key", (401,), lambda http: http.post(path, json=whole, headers={"Authorization": "Bearer wrong"})),
        ("metrics with no key", (401,), lambda http: http.get("/metrics")),
        ("no JSON", (400,), lambda http: http.post(path, content=b"{", headers=right)),
        ("an empty body", (400,), lambda http: http.post(path, content=b"", headers=right)),
        ("bytes that are no text", (400,), lambda http: http.post(path, content=b"\xff\xfe{}", headers=right)),
        ("a list for an object", (400,), lambda http: http.post(path, json=[1, 2], headers=right)),
        ("no prompt", (400,), lambda http: http.post(path, json={"max_tokens": 1}, headers=right)),
        ("a prompt of another type", (400,), lambda http: http.post(path, json={**whole, "prompt": 7}, headers=right)),
        (
            "tokens beyond the vocabulary",
            (400,),
            lambda http: http.post(path, json={**whole, "prompt": [vocabulary + 9]}, headers=right),
        ),
        (
            "a prompt beyond the context",
            (400,),
            lambda http: http.post(path, json={**whole, "prompt": [5] * 20000}, headers=right),
        ),
        (
            "messages of another type",
            (400,),
            lambda http: http.post("/v1/chat/completions", json={**chat, "messages": "x"}, headers=right),
        ),
        (
            "a role that is none",
            (400, 200),  # a template may take any role
            lambda http: http.post("/v1/chat/completions", json={**chat, "messages": [{"role": 1}]}, headers=right),
        ),
        ("a path that is none", (404,), lambda http: http.post("/v1/nothing", json=whole, headers=right)),
    ]
    counts: list[Counter[int]] = [Counter() for _ in kinds]
    with httpx2.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        for number in range(count):
            place = number % len(kinds)
            try:
                counts[place][kinds[place][2](http).status_code] += 1
            except httpx2.HTTPError:
                counts[place][0] += 1
    return [
        {"kind": kind, "right": list(statuses), "came": {str(status): times for status, times in came.items()}}
        for (kind, statuses, _), came in zip(kinds, counts, strict=True)
    ]


def _killed(pid: int, url: str, key_file: Path, vocabulary: int) -> float:
    """Kill a process, and return the seconds until there is a right answer again."""
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with suppress(psutil.Error):
        psutil.Process(pid).wait(10)
    _until_it_answers(url, key_file, vocabulary)
    return time.monotonic() - began


def _until_it_answers(url: str, key_file: Path, vocabulary: int) -> float:
    """Wait for a whole answer, and return the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < STARTING_SECONDS:
        if key_file.is_file() and (key := key_file.read_text().strip()):
            with suppress(ServiceError), Client(url, key, timeout=10.0) as client:
                client.complete(varied_prompt(PROMPT, vocabulary, 1), 4)
                return time.monotonic() - began
        time.sleep(0.05)
    sys.exit(f"{url} gave no answer in {format_duration(STARTING_SECONDS)}")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _document(student: Path, soaked: Soaked, arguments: Any) -> dict[str, Any]:
    first = times([one.first_seconds for one in soaked.answers])
    later = times([step for one in soaked.answers for step in one.token_seconds])
    settled = [one for one in soaked.memory if one[0] > 0.1 * arguments.time]
    slope = None
    if len(settled) > 2:
        at, held = (np.array(column, float) for column in zip(*settled, strict=True))
        slope = float(np.polyfit(at, held, 1)[0] * (at[-1] - at[0]) / held.mean())
    return {
        "student": student.name,
        "size_bytes": student.stat().st_size,
        "seconds": arguments.time,
        "answered": len(soaked.answers),
        "failed": len(soaked.failures),
        "failures": sorted(set(soaked.failures))[:5],
        "first_token": first,
        "token": later,
        "memory_bytes": float(np.mean([held for _, held in soaked.memory])) if soaked.memory else None,
        "memory_slope": slope,
        "memory": soaked.memory[:: max(1, len(soaked.memory) // 300)],
    }


def _broken(found: dict[str, Any]) -> list[str]:
    said = []
    if found["failed"]:
        said.append(f"{found['failed']} requests failed: {found['failures'][0]}")
    if found["memory_slope"] is not None and abs(found["memory_slope"]) > MOST_SLOPE:
        said.append(f"memory changed by {found['memory_slope']:+.1%}")
    for one in found["malformed"]:
        wrong = {status: times for status, times in one["came"].items() if int(status) not in one["right"]}
        if wrong:
            said.append(f"{one['kind']} was answered {wrong}")
    if found["exit_code"]:
        said.append(f"serve ended with {found['exit_code']} at SIGTERM")
    return said


def _sections(found: dict[str, Any]) -> list[str]:
    slope = "not known" if found["memory_slope"] is None else f"{found['memory_slope']:+.2%}"
    first, later = found["first_token"], found["token"]

    def row(name: str, one: Any) -> str:
        cells = [format_duration(value) for value in (one.p50, one.p95, one.p99) if value is not None]
        return f"| {name} | {' | '.join(cells)} | {one.count} |"

    memory = "not seen" if found["memory_bytes"] is None else format_bytes(found["memory_bytes"])
    return [
        f"{found['student']} ({format_bytes(found['size_bytes'])}), {found['streams']} streams, prompts of {PROMPT} "
        f"tokens and answers of {DECODED}.",
        f"Capacity: {found['capacity']:.3g} answers a second. At {SHARE:.0%} of it, for "
        f"{format_duration(found['seconds'])}: {found['answered']} requests answered, {found['failed']} failed. Memory "
        f"of the server's process: {memory}, changed by {slope} over that time after its first tenth.",
        "\n".join(
            [
                "| | p50 | p95 | p99 | times |",
                "| --- | --- | --- | --- | --- |",
                row("first token", first),
                row("each later token", later),
            ]
        ),
        "After SIGKILL, until a right answer: "
        + ", ".join(f"{name} {format_duration(one)}" for name, one in found["restarted_seconds"].items())
        + f" (first start {format_duration(found['started_seconds'])}). At SIGTERM it ended with {found['exit_code']}.",
        "\n".join(
            ["| malformed | right | came |", "| --- | --- | --- |"]
            + [
                f"| {one['kind']} | {' or '.join(map(str, one['right']))} | "
                f"{', '.join(f'{status}: {times}' for status, times in one['came'].items())} |"
                for one in found["malformed"]
            ]
        ),
        "Targets: " + ("all met." if not found["broken"] else f"missed: {'; '.join(found['broken'])}."),
    ]


if __name__ == "__main__":
    main()
