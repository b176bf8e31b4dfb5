"""A real server: its key, its answers and its end, and one line for each reason why it does not start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import psutil
import pytest

from autodistill.advisor.describe import deployment_named
from autodistill.errors import InputError, MissingDependencyError, ServiceError
from autodistill.export.gguf import GgufExporter
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.service import launch
from autodistill.service.client import Client, server_processes
from autodistill.service.launch import Service, child_settings, command, environment, settle
from autodistill.service.request import ServeRequest
from autodistill.testing import save_tiny_teacher

PROMPT = [20, 41, 7, 299, 150, 33, 88]


def asked(export: Path, **options: object) -> ServeRequest:
    return ServeRequest(export, **{"port": 0, "threads": 1, **options})  # type: ignore[arg-type]


def test_it_answers_as_the_runtime_does_to_who_has_the_key(service: Service, student: Path) -> None:
    with service.client() as client:
        assert client.room() == (512, 2)
        assert client.model() == student.stem
        assert client.model_path() == student.resolve()
        answer = client.complete(PROMPT, 12)
        assert (answer.tokens, len(answer.token_seconds)) == (12, 11)
        counted = client.counters()
        assert counted.answer_tokens >= 12
    url, key = service.setting.url, service.setting.key
    with LlamaServer(student, 512, 1) as runtime:
        written = runtime.complete(PROMPT, 12, ignore_end=True).tokens
    right = {"Authorization": f"Bearer {key}"}
    body = {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    assert httpx2.post(f"{url}/completion", json=body, headers=right).json()["tokens"] == list(written)
    for path in ("/v1/models", "/props", "/slots", "/metrics"):
        wrong = httpx2.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code
        assert (path, wrong) in ((path, 401), ("/v1/models", 200))
    assert httpx2.post(f"{url}/completion", json=body).status_code == 401
    assert "<html" in httpx2.get(f"{url}/").text.lower()


def test_its_key_is_in_no_command_line(service: Service) -> None:
    for process in (psutil.Process(), *server_processes(service.setting.url)):
        assert service.setting.key not in " ".join(process.cmdline())
    assert server_processes(service.setting.url)[0].pid == service.pid


def test_a_port_is_never_shared_with_a_server_that_took_it_in_the_meantime(service: Service, student: Path) -> None:
    late = replace(settle(asked(student)), port=service.setting.port)
    with pytest.raises(ServiceError, match=r"cannot serve at http://127.0.0.1:\d+: Address already in use"):
        Service(late).__enter__()
    assert [process.pid for process in server_processes(service.setting.url)] == [service.pid]


def test_the_system_gives_a_port_to_no_other_while_its_server_loads(student: Path) -> None:
    setting = settle(asked(student))
    with launch._held_port(setting), socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((setting.host, setting.port))


def test_a_key_is_kept_in_a_file_of_its_owner_alone(export: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    first = settle(asked(export, key_file=file)).key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert settle(asked(export, key_file=file)).key == first == file.read_text().strip()
    for text, words in (("short", "16 or more"), ("two words are no key at all", "one word"), ("", "one word")):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            settle(asked(export, key_file=file))
    assert settle(asked(export)).key != settle(asked(export)).key


def test_a_server_that_is_killed_serves_again(export: Path) -> None:
    said: list[str] = []
    with Service(settle(asked(export)), said.append) as service:
        threading.Thread(target=service.watch, daemon=True).start()
        first = service.pid
        os.kill(first, signal.SIGKILL)
        ends = time.monotonic() + 60
        while service.restarts == 0 and time.monotonic() < ends:
            time.sleep(0.05)
        assert service.restarts == 1
        with service.client() as client:
            assert client.complete(PROMPT, 2).tokens == 2
        assert service.pid != first
        assert any("it serves again after" in line and "exit status -9" in line for line in said)
    assert not psutil.pid_exists(service.pid)


def test_one_that_dies_again_and_again_is_given_up(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(settle(asked(export))) as service:
        monkeypatch.setattr(launch, "_MOST_DEATHS", 0)
        os.kill(service.pid, signal.SIGKILL)
        with pytest.raises(ServiceError, match="1 times in a minute, and is not started again"):
            service.watch()


def test_what_cannot_be_loaded_is_told_in_the_runtimes_own_words(export: Path) -> None:
    setting = settle(asked(export))
    damaged = export.parent / "damaged.gguf"
    (file,) = export.glob("*.gguf")
    damaged.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    broken = replace(setting, served=replace(setting.served, path=damaged))
    with pytest.raises(ServiceError, match=r"could not serve damaged\.gguf: .+") as failure, Service(broken):
        pass
    assert "\n" not in str(failure.value)


def test_a_port_in_use_is_one_line(export: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            settle(asked(export, port=port))
    with pytest.raises(InputError, match="0 to 65535"):
        asked(export, port=70000)


def test_beyond_the_loopback_it_needs_to_be_said_and_a_key_that_is_kept(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say so with --public"):
        settle(asked(export, host="0.0.0.0"))
    with pytest.raises(InputError, match="needs --key-file"):
        settle(asked(export, host="0.0.0.0", public=True))
    setting = settle(asked(export, host="0.0.0.0", public=True, key_file=tmp_path / "key"))
    assert setting.url == f"http://127.0.0.1:{setting.port}"
    with pytest.raises(InputError, match="changes nothing"):
        asked(export, public=True)
    with pytest.raises(InputError, match="no address"):
        settle(asked(export, host="nowhere.invalid", public=True, key_file=tmp_path / "key"))
    assert settle(asked(export, host="localhost")).host == "localhost"


def test_a_socket_that_was_left_is_removed_and_one_that_is_used_is_not(export: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    said: list[str] = []
    setting = settle(asked(export, host=str(path)), said.append)
    assert said == [f"removed {path}, left behind by a server that has ended"]
    with Service(setting) as service:
        with service.client() as client:
            assert client.url == f"unix:{path}"
            assert client.complete(PROMPT, 2).tokens == 2
            assert server_processes(client.url)[0].pid == service.pid
        with pytest.raises(InputError, match="a server answers on"):
            settle(asked(export, host=str(path)))
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(InputError, match="is no socket"):
        settle(asked(export, host=str(path)))
    for host, words in ((f"/{'x' * 120}.sock", "at most 107"), (str(tmp_path / "gone" / "a.sock"), "no folder")):
        with pytest.raises(InputError, match=words):
            settle(asked(export, host=host))


def test_a_student_larger_than_the_free_memory_is_refused(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GPU_DEVICES", ())
    monkeypatch.setattr(launch, "free_memory_bytes", lambda: 10**6)
    with pytest.raises(InputError, match=r"needs about .* and 1.00 MB are free.*fewer --streams"):
        settle(asked(export))


def test_a_draft_proposes_what_the_student_would_write_and_is_counted(
    export: Path, student: Path, tmp_path: Path
) -> None:
    setting = settle(asked(export, draft=student, streams=1))
    with Service(setting) as service, service.client() as client:
        drafted = client.complete(PROMPT, 24)
        summary = service.summary()
    # A copy of the student is right about nearly everything that it proposes.
    assert drafted.drafted > 0
    assert drafted.accepted / drafted.drafted > 0.7
    assert summary["acceptance"] == pytest.approx(summary["accepted"] / summary["drafted"])
    assert summary["answer_tokens"] == 24
    other = save_tiny_teacher(tmp_path / "teacher", layers=2, vocabulary=350)
    file = GgufExporter().export(other, deployment_named("gguf-q8_0"), tmp_path / "gguf").path
    with pytest.raises(InputError, match="a draft with the same tokenizer"):
        settle(asked(export, draft=file))


def test_vllm_is_given_its_arguments_and_its_key_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Path
) -> None:
    folder = save_tiny_teacher(tmp_path / "student", layers=2)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        settle(asked(folder))
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("")
    setting = settle(asked(folder, streams=3, context=128))
    words = command(setting)
    assert words[:3] == [str(program), "serve", str(folder.resolve())]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given == {
        "--served-model-name": "student",
        "--host": "127.0.0.1",
        "--port": str(setting.port),
        "--max-model-len": "128",
        "--max-num-seqs": "3",
        "--generation-config": "vllm",
    }
    assert environment(setting)["VLLM_API_KEY"] == setting.key
    assert setting.key not in words
    with pytest.raises(InputError, match=r"--draft is for llama\.cpp"):
        settle(asked(folder, draft=export))


PRETENDED = """#!{python}
import http.server, json, os, sys
given = dict(zip(sys.argv[3::2], sys.argv[4::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers.get("Authorization") == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if right or self.path == "/health" else 401)
        self.end_headers()
        self.wfile.write(b"vllm:generation_tokens_total 5\\nvllm:prompt_tokens_total 7\\n")
        if self.path == "/metrics":
            print("WARNING: only pretended", flush=True)
    def log_message(self, *words): pass
http.server.HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


def test_a_pretended_vllm_is_started_watched_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_teacher(tmp_path / "student", layers=2)
    program = tmp_path / "vllm"
    program.write_text(PRETENDED.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said: list[str] = []
    with Service(settle(asked(folder)), said.append) as service:
        summary = service.summary()
        assert (summary["prompt_tokens"], summary["answer_tokens"]) == (7, 5)
    assert "vllm: WARNING: only pretended" in said
    assert not psutil.pid_exists(service.pid)


def test_what_the_child_is_told_is_what_serve_json_says(export: Path, tmp_path: Path) -> None:
    # Blocks of 32 divide its heads.
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=2, heads=2, kv_heads=1)
    folder = GgufExporter().export(teacher, deployment_named("gguf-q8_0"), tmp_path / "gguf").path.parent
    shutil.copy(export / "serve.json", folder)
    document = json.loads((folder / "serve.json").read_text())
    document |= {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attention": "on"}
    (folder / "serve.json").write_text(json.dumps(document))
    told = child_settings(settle(asked(folder)))
    assert (told["context"], told["streams"], told["cache_type_k"], told["flash_attention"]) == (512, 2, "q8_0", "on")
    with Service(settle(asked(folder))) as service, service.client() as client:
        assert client.complete(PROMPT, 2).tokens == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_in_order(export: Path, tmp_path: Path, sent: signal.Signals) -> None:
    words = [sys.executable, "-m", "autodistill", "serve", str(export), "--port", "0", "--threads", "1", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    while not said or "web page" not in said[-1]:
        said.append(process.stderr.readline())
        assert said[-1], said
    key = next(line for line in said if line.startswith("key: ")).split()[1]
    url = said[0].split(" at ")[1].split()[0]
    with Client(url, key) as client:
        client.complete(PROMPT, 3)
        (server, *_) = server_processes(url)
    process.send_signal(sent)
    out, left = process.communicate(timeout=30)
    assert process.returncode == 0, left
    assert json.loads(out)["answer_tokens"] == 3
    assert not server.is_running()


def test_the_server_ends_with_a_command_that_is_killed(export: Path) -> None:
    words = [sys.executable, "-m", "autodistill", "serve", str(export), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    pid = int(process.stderr.readline().split("process ")[1])
    process.kill()
    process.communicate()
    ends = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < ends:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
