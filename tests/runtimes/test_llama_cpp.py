"""Run llama.cpp in a separate process: answers, times, memory, and its own words if it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.gguf import GgufExporter
from autodistill.runtimes import llama_cpp
from autodistill.runtimes.llama_cpp import Buffers, LlamaServer, _last_words, parse_buffers
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

PROMPT = [20, 41, 7, 299, 150, 33, 88]
F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GgufExporter().export(teacher, F16, tmp_path_factory.mktemp("gguf")).path


def test_greedy_tokens_equal_those_of_transformers(teacher: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).half().float()
    tokens = list(PROMPT)
    for _ in range(12):
        logits = model(torch.tensor([tokens])).logits[0, -1].detach()
        logits[model.config.eos_token_id] = -torch.inf
        tokens.append(int(logits.argmax()))
    with LlamaServer(file, 256, 1) as server:
        completion = server.complete(PROMPT, 12, ignore_end=True)
        assert list(completion.tokens) == tokens[len(PROMPT) :]
        assert completion.prompt_tokens == len(PROMPT)
        # One token at a time, with a context that is reused and truncated.
        assert [server.next_token(tokens[:end]) for end in (9, 8, 15, len(PROMPT))] == [
            tokens[end] for end in (9, 8, 15, len(PROMPT))
        ]


def test_prompts_that_are_read_together_go_on_as_in_transformers(teacher: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).half().float()
    rows = [[token - shift for token in PROMPT] for shift in range(3)]
    expected = [model(torch.tensor([row])).logits[0].argmax(-1).tolist() for row in rows]
    with LlamaServer(file, 256, 1, parallel=3) as server:
        for end in (3, 4, 5, len(PROMPT)):
            assert server.next_tokens([row[:end] for row in rows]) == [row[end - 1] for row in expected]
        # Fewer rows than there is room for. A single row is answered in another shape.
        assert server.next_tokens([rows[1]]) == [expected[1][-1]]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3"])
def test_sequences_that_are_read_at_once_have_the_choices_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, layers=3)
    path = GgufExporter().export(folder, F16, tmp_path / "out").path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).half().float()
    rows = [[(7 * place + shift) % 300 for place in range(90)] for shift in (3, 11)]  # longer than a part, and a window
    logits = [model(torch.tensor([row])).logits[0].detach() for row in rows]
    top1, nll = LlamaServer(path, 256, 1, whole_cache=True).read(rows)
    assert top1.shape == nll.shape == (2, 89)
    for row, chosen, lost, expected in zip(rows, top1, nll, logits, strict=True):
        best = expected[:-1].topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] > 1e-2
        assert clear.sum() > 60
        assert torch.tensor(chosen)[clear].equal(expected[:-1].argmax(-1).int()[clear])
        theirs = torch.nn.functional.cross_entropy(expected[:-1], torch.tensor(row[1:]), reduction="none")
        torch.testing.assert_close(torch.from_numpy(lost).float(), theirs, rtol=0, atol=0.02)


def test_a_library_of_another_layout_is_left_and_the_server_is_asked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [PROMPT, PROMPT[::-1], PROMPT[1:] + PROMPT[:1]]
    moved = llama_cpp._LIBRARY_CHILD.read_text(encoding="utf-8").replace('"n_seq_max": (12, 1)', '"n_seq_max": (12, 7)')
    (tmp_path / "moved.py").write_text(moved, encoding="utf-8")
    server = LlamaServer(file, 256, 1, parallel=2)
    tokens, _ = server.read(rows)
    monkeypatch.setattr(llama_cpp, "_LIBRARY_CHILD", tmp_path / "moved.py")
    with pytest.raises(VerificationError, match="settings of another layout"):
        server.read(rows)
    with server:
        assert server.choices(rows) == tokens.tolist()


def test_a_cache_of_another_type_than_was_asked_for_is_noticed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignoring = llama_cpp._LIBRARY_CHILD.read_text(encoding="utf-8").replace('"f16": 1', '"f16": 0')
    (tmp_path / "ignoring.py").write_text(ignoring, encoding="utf-8")
    monkeypatch.setattr(llama_cpp, "_LIBRARY_CHILD", tmp_path / "ignoring.py")
    with pytest.raises(VerificationError, match="with the cache that was asked for"):
        LlamaServer(file, 256, 1).read([PROMPT])


def test_one_token_more_is_one_token_read_also_below_a_sliding_window(tmp_path: Path) -> None:
    windowed = save_tiny_teacher(tmp_path / "teacher", architecture="gemma3_text", layers=3)
    path = GgufExporter().export(windowed, F16, tmp_path / "out").path
    with LlamaServer(path, 256, 1, whole_cache=True) as server:
        for end in range(4, 24):  # its window has 16 tokens
            read = server.complete((PROMPT * 4)[:end], 1, reuse=end > 4).prompt_tokens
            assert read == (4 if end == 4 else 1)


@pytest.mark.parametrize(("context", "parallel"), [(256, 1), (512, 1), (256, 3)])
def test_buffers_hold_the_arithmetic_of_the_kv_cache(file: Path, context: int, parallel: int) -> None:
    with LlamaServer(file, context, 1, parallel) as server:
        buffers = server.buffers()
    # Keys and values, 6 layers, 2 heads of 16, 16 bits. The log rounds to a hundredth of a MiB.
    assert buffers.kv_bytes == pytest.approx(2 * 6 * 2 * 16 * context * parallel * 2, abs=0.0051 * 2**20)
    assert buffers.model_bytes == pytest.approx(file.stat().st_size, abs=0.03 * 2**20)
    assert buffers.compute_bytes > 0
    assert buffers.total_bytes == sum(
        (buffers.model_bytes, buffers.kv_bytes, buffers.compute_bytes, buffers.output_bytes)
    )


def test_buffers_of_a_log_with_two_devices_and_a_second_reservation() -> None:
    log = """
    load_tensors:   CPU_Mapped model buffer size =    92.10 MiB
    load_tensors:   CPU_REPACK model buffer size =     1.90 MiB
    llama_context:        CPU  output buffer size =     0.19 MiB
    llama_kv_cache:      CUDA0 KV buffer size =    45.00 MiB
    llama_kv_cache:        CPU KV buffer size =     5.00 MiB
    sched_reserve:        CPU compute buffer size =    99.00 MiB
    sched_reserve:        CPU compute buffer size =    16.50 MiB
    sched_reserve:      CUDA0 compute buffer size =     2.50 MiB
    ~llama_context:        CPU compute buffer size is  16.6426 MiB, matches expectation of  16.6426 MiB
    """
    buffers = parse_buffers(log)
    assert buffers.model_bytes == 94 * 2**20
    assert buffers.kv_bytes == 50 * 2**20
    assert buffers.compute_bytes == 19 * 2**20
    assert buffers.output_bytes == round(0.19 * 2**20)
    with pytest.raises(VerificationError, match="no buffer sizes"):
        parse_buffers("load_tensors: done")


def test_buffers_of_a_gpu_are_told_apart_from_those_that_it_reads_in_main_memory() -> None:
    log = """
    load_tensors:    CUDA_Host model buffer size =    30.00 MiB
    load_tensors:        CUDA0 model buffer size =   120.00 MiB
    llama_context:  CUDA_Host  output buffer size =     0.50 MiB
    llama_kv_cache:      CUDA0 KV buffer size =    45.00 MiB
    sched_reserve:      CUDA0 compute buffer size =    60.00 MiB
    sched_reserve:  CUDA_Host compute buffer size =     5.00 MiB
    """
    on_gpu, beside, whole = (parse_buffers(log, on_gpu=place) for place in (True, False, None))
    mib = 2**20
    assert on_gpu == Buffers(model_bytes=120 * mib, kv_bytes=45 * mib, compute_bytes=60 * mib, output_bytes=0)
    assert beside == Buffers(model_bytes=30 * mib, kv_bytes=0, compute_bytes=5 * mib, output_bytes=mib // 2)
    assert on_gpu.total_bytes + beside.total_bytes == whole.total_bytes
    for text, accelerated in ((log, True), ("x: CUDA_Host model buffer size = 3.00 MiB\nx: CPU model buffer", False)):
        server = LlamaServer.__new__(LlamaServer)
        server._child = SimpleNamespace(log=lambda text=text: text)
        assert server.accelerated == accelerated


def test_a_log_that_lags_behind_the_model_is_waited_for() -> None:
    lines = [f"x: CPU {kind} buffer size = {size}.00 MiB\n" for kind, size in (("model", 9), ("KV", 5), ("compute", 2))]
    server = LlamaServer.__new__(LlamaServer)
    written = iter(range(len(lines) + 1))
    server._child = SimpleNamespace(log=lambda: "".join(lines[: next(written, len(lines))]))
    found = server.buffers()
    assert (found.model_bytes, found.kv_bytes, found.compute_bytes) == (9 * 2**20, 5 * 2**20, 2 * 2**20)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"hello, world", "invalid magic"),
        (b"GGUF\x03\x00\x00\x00", "failed to read header"),
    ],
)
def test_a_failed_load_repeats_the_words_of_llama_cpp(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VerificationError, match=words) as failure, LlamaServer(path, 256, 1):
        pass
    assert "could not load bad.gguf" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_request_that_does_not_fit_is_refused_and_the_next_one_answered(file: Path) -> None:
    with LlamaServer(file, 256, 1) as server:
        with pytest.raises(VerificationError, match="exceeds the available context"):
            server.complete([5] * 400, 1)
        with pytest.raises(VerificationError, match="invalid tokens"):
            server.complete([300], 1)
        assert len(server.complete(PROMPT, 3, ignore_end=True).tokens) == 3


def test_a_dead_runtime_raises_and_leaves_nothing_behind(file: Path) -> None:
    with LlamaServer(file, 256, 1) as server:
        folder = Path(server._child._folder.name)
        os.kill(server._child.pid, signal.SIGKILL)
        with pytest.raises(VerificationError, match="died"):
            server.complete(PROMPT, 1)
    assert not folder.exists()


def test_the_child_ends_with_a_killed_caller(file: Path) -> None:
    script = (
        "import os, pathlib, signal, sys; from autodistill.runtimes.llama_cpp import LlamaServer\n"
        f"with LlamaServer(pathlib.Path({str(file)!r}), 256, 1) as server:\n"
        "    print(server._child.pid, server._child._folder.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    child = Path("/proc", printed.split()[0])
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc to see whether a process lives")
    deadline = time.monotonic() + 20
    while child.exists() and child.joinpath("stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.joinpath("stat").read_text().split()[2] == "Z"


def test_the_child_imports_neither_torch_nor_this_package() -> None:
    script = (
        "import runpy, sys; import autodistill.runtimes.llama_cpp as parent\n"
        "before = set(sys.modules); runpy.run_path(str(parent._CHILD), run_name='child')\n"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] in ('torch', 'autodistill')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_and_a_missing_package_are_refused_before_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="threads of at least 1"):
        LlamaServer(tmp_path / "any.gguf", 256, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install xllamacpp"):
        LlamaServer(tmp_path / "any.gguf", 256, 1)


def test_a_very_long_line_of_the_log_is_read_as_fast_as_others() -> None:
    """With a chat template that fails, llama.cpp logs all of the template's message."""
    long = "x" * 10**6
    assert _last_words(f"0.1 I begins\n{long}\n0.2 E no template\n/a/b.c:1: GGML_ASSERT(n) failed\n{long}") == (
        "no template; /a/b.c:1: GGML_ASSERT(n) failed"
    )
    assert _last_words(f"0.1 I begins\n{long}\n") == long
