"""Torch graphs compute what transformers does, in a process without it, for any number and length of texts."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.graphs.aoti import AotiExporter
from autodistill.export.graphs.pt2 import Pt2Exporter
from autodistill.export.graphs.torch_module import TorchExporter
from autodistill.export.graphs.torchscript import TorchScriptExporter
from autodistill.export.verify import verify
from autodistill.models.loading import load_model
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neox")
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
INT4 = Deployment(runtime="transformers", format="compressed-tensors", bits=4, group_size=32)
SHAPES = ((1, 2), (3, 40), (2, 100))
# Loads each given file, keeps its logits for some tokens, and prints whether transformers is loaded.
PROGRAM = """
import sys, numpy, torch
from torch._inductor import aoti_load_package
for line in sys.stdin:
    path, given, found = line.rstrip("\\n").split("\\t")
    if path.endswith("_aoti.pt2"):
        module = aoti_load_package(path)
    else:
        module = torch.jit.load(path) if path.endswith(".pt") else torch.export.load(path).module()
    tokens = numpy.load(given)
    with torch.no_grad():
        numpy.savez(found, **{name: module(torch.from_numpy(tokens[name])).numpy() for name in tokens.files})
    print("transformers" in sys.modules, flush=True)
"""


@pytest.fixture(scope="module")
def apart() -> Iterator[subprocess.Popen[str]]:
    """A process that runs files without transformers. All tests share it, because importing torch takes long."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    with (
        tempfile.TemporaryDirectory() as folder,  # nothing of ours can be imported from here
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process,
    ):
        yield process
        assert process.stdin is not None
        process.stdin.close()


def check(
    apart: subprocess.Popen[str], tmp_path: Path, exporter: TorchExporter, deployment: Deployment, **changes: Any
) -> None:
    sizes: dict[str, Any] = {"layers": 3, "width": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "seed": 1}
    student = save_tiny_teacher(tmp_path / "student", **(sizes | changes))
    artifact = exporter.export(student, deployment, tmp_path / "out")
    verify(exporter, artifact, student, deployment)
    drawn = np.random.default_rng(0)
    shapes = SHAPES if isinstance(exporter, AotiExporter) else ((1, 1), *SHAPES)
    tokens = {f"{rows}x{length}": drawn.integers(3, 300, (rows, length)) for rows, length in shapes}
    np.savez(tmp_path / "tokens.npz", **tokens)
    paths = [artifact.path / exporter.file, tmp_path / "tokens.npz", tmp_path / "found.npz"]
    assert apart.stdin is not None
    assert apart.stdout is not None
    print(*paths, sep="\t", file=apart.stdin, flush=True)
    assert apart.stdout.readline().strip() == "False", "it failed, or loaded transformers"
    model = load_model(student, torch.float32)
    weights = {name: torch.from_numpy(np.array(one)) for name, one in exporter.unpack(artifact.path)}
    narrow = {name: one[tuple(map(slice, dict(model.named_parameters())[name].shape))] for name, one in weights.items()}
    model.load_state_dict(narrow, strict=False)
    with np.load(tmp_path / "found.npz") as found, torch.inference_mode():
        for name, one in tokens.items():
            np.testing.assert_allclose(found[name], model(torch.from_numpy(one)).logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[1:])])
def test_torchscript_of_every_family(apart: subprocess.Popen[str], tmp_path: Path, family: str) -> None:
    check(apart, tmp_path, TorchScriptExporter(), Q4_0, architecture=family, tied=family not in ("gpt_neox", "qwen2"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_archives_of_torch_export_of_every_family(apart: subprocess.Popen[str], tmp_path: Path, family: str) -> None:
    check(apart, tmp_path, Pt2Exporter(), Q4_0, architecture=family, tied=family not in ("gpt_neox", "qwen2"))


def test_layers_of_their_own_width_and_codes_of_another_container(apart: subprocess.Popen[str], tmp_path: Path) -> None:
    check(apart, tmp_path / "own", TorchScriptExporter(), Q4_0, ffn=(64, 160, 32))
    # Zeros fill the narrower layers.
    check(apart, tmp_path / "int4", TorchScriptExporter(), INT4, ffn=(64, 160, 32))


def test_torchscript_is_said_to_be_deprecated_and_code() -> None:
    assert "deprecates" in TorchScriptExporter.notes["deprecated"]
    assert TorchScriptExporter.is_code
    assert Pt2Exporter.is_code
    assert AotiExporter.is_code


COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@COMPILED
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_libraries_of_aotinductor_of_every_family(apart: subprocess.Popen[str], tmp_path: Path, family: str) -> None:
    check(apart, tmp_path, AotiExporter(), Q4_0, architecture=family, tied=family not in ("gpt_neox", "qwen2"))


@COMPILED
@pytest.mark.system
@pytest.mark.slow
def test_a_library_of_layers_of_their_own_width_leaves_no_cache(
    apart: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    check(apart, tmp_path, AotiExporter(), INT4, ffn=(64, 160, 32))
    assert not any((tmp_path / "cache").glob("**/*.so"))


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    student = save_tiny_teacher(tmp_path / "student")
    said = "AOTInductor compiles with no-such-compiler, which is not installed: install g\\+\\+, or export to pt2"
    with pytest.raises(MissingDependencyError, match=said):
        AotiExporter().export(student, Q4_0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "no-such-compiler" in AotiExporter().refuses(student, Q4_0)


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (
            OSError(errno.ENOSPC, "full"),
            InputError,
            r"cannot write to .*, where AOTInductor compiles: full",
        ),
        (
            CppCompileError(["g++"], "1\n2\n3\nkilled\n"),
            VerificationError,
            r"could not compile .*: 2 / 3 / killed",
        ),
    ],
    ids=["full disk", "compiler"],
)
def test_a_compilation_that_fails_is_one_line(
    cause: Exception, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **more: Any) -> None:
        raise InductorError(cause, None)

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    monkeypatch.setattr("autodistill.export.graphs.aoti._no_compiler", lambda: "")
    with pytest.raises(kind, match=said) as caught:
        AotiExporter().export(save_tiny_teacher(tmp_path / "student"), Q4_0, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []
