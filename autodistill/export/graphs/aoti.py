"""Exporter to a library that AOTInductor compiles for this machine's CPU, and that only needs torch to run."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.base import Artifact, Label
from autodistill.export.graphs.torch_module import PREFIX, Logits, TorchExporter, exported
from autodistill.models.families import FAMILIES
from autodistill.strategy.deployment import Deployment

_LINES = 3  # last lines of a compiler's output that a message has
LEAST_TOKENS = 2
"""The shortest sequence that such a library reads. torch would treat a length of one token as a constant."""


class AotiExporter(TorchExporter):
    """Writes `student_aoti.pt2`, which is compiled code with float32 weights in it, and the tokenizer."""

    name = "aoti"
    file = "student_aoti.pt2"

    @property
    def notes(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What the library was compiled for, and what it cannot read."""
        capability = torch.backends.cpu.get_cpu_capability()
        return {
            "compiled_for": f"{platform.system()} on {platform.machine()} CPUs with {capability}, by torch "
            f"{torch.__version__}; other machines export their own",
            "shortest_sequence": f"{LEAST_TOKENS} tokens",
        }

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Accept what `TorchExporter` accepts if there is a compiler."""
        return super().refuses(student, deployment) or _no_compiler()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Compile the student and write it, and its tokenizer, into the folder `out`; the card names its teacher.

        Raises:
            InputError: The student cannot be read, or `out` cannot be written.
            MissingDependencyError: There is no C++ compiler.
        """
        if missing := _no_compiler():
            raise MissingDependencyError(missing)
        return super().export(student, deployment, out, **label)

    def write(self, module: Logits, example: Tensor, path: Path) -> None:
        """Compile the module with both dimensions of its input dynamic."""
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_cache

        program = exported(module, example, least_tokens=LEAST_TOKENS)
        failed: BaseException | None = None
        # The compiler's cache takes as much disk space as the weights, and is not needed again. It would be kept if an
        # error or an interrupt left this block.
        with fresh_cache():
            try:
                aoti_compile_and_package(program, package_path=str(path))
            except BaseException as error:
                failed = error
        if failed is not None:
            raise _explained(failed)

    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the constants with which the library computes."""
        from torch._C._aoti import AOTIModelContainerRunnerCpu

        with tempfile.TemporaryDirectory(prefix="autodistill-aoti-") as folder, zipfile.ZipFile(path) as archive:
            library = next(name for name in archive.namelist() if name.endswith(".so"))
            # The constants lie in the memory of the loaded library.
            loaded = AOTIModelContainerRunnerCpu(archive.extract(library, folder), 1)
            found = loaded.extract_constants_map(False)
            # Keep only weights: rotary frequencies and other constants are among them.
            kept = {name: one.clone() for name, one in found.items() if name.endswith((".weight", ".bias"))}
        head = f"{PREFIX}lm_head.weight"
        body = next(name for name in kept if ".layers." in name).removeprefix(PREFIX).partition(".layers.")[0]
        family = next(one for one in FAMILIES.values() if one.body == body)
        table = f"{PREFIX}{body}.{family.embedding}.weight"
        if table not in kept:  # a tied table and head are one constant with the head's name
            kept[table] = kept.pop(head)
        return kept


def _explained(error: BaseException) -> BaseException:
    """Return an error of compiling as one of one line, if it is of the disk or of the compiler, and else as it is."""
    from torch._inductor.exc import CppCompileError, InductorError

    cause = error.inner_exception if isinstance(error, InductorError) else error
    if isinstance(cause, CppCompileError):
        said = " / ".join(cause.output.strip().splitlines()[-_LINES:])
        return VerificationError(f"{_compiler()} could not compile the student: {said}")
    if isinstance(cause, OSError):
        return InputError(
            f"cannot write to {tempfile.gettempdir()}, where AOTInductor compiles: {cause.strerror}; make room there, "
            "or name another folder in TMPDIR"
        )
    return error


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _no_compiler() -> str:
    compiler = _compiler()
    if shutil.which(compiler):
        return ""
    return f"AOTInductor compiles with {compiler}, which is not installed: install g++, or export to pt2 instead"
