"""Exporter to a library that AOTInductor compiles for this machine's CPU, which torch alone runs."""

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

from autodistill.errors import MissingDependencyError
from autodistill.export.base import Artifact, Label
from autodistill.export.graphs.torch_module import PREFIX, Logits, TorchExporter, exported
from autodistill.models.families import FAMILIES
from autodistill.strategy.deployment import Deployment

LEAST_TOKENS = 2
"""The shortest sequence that such a library reads: torch takes one token for a constant of the graph."""


class AotiExporter(TorchExporter):
    """Writes `student_aoti.pt2`, compiled code with float32 weights in it, and the tokenizer."""

    name = "aoti"
    file = "student_aoti.pt2"

    @property
    def notes(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What it was compiled for, and what it does not read."""
        capability = torch.backends.cpu.get_cpu_capability()
        return {
            "compiled_for": f"{platform.system()} on {platform.machine()} CPUs with {capability}, by torch "
            f"{torch.__version__}; other machines export their own",
            "shortest_sequence": f"{LEAST_TOKENS} tokens",
        }

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Hold every row where there is a compiler."""
        return _no_compiler()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Compile the student and write it, and its tokenizer, into the folder `out`; the card names its teacher.

        Raises:
            InputError: The student cannot be read, or `out` not be written.
            MissingDependencyError: There is no C++ compiler.
        """
        if missing := _no_compiler():
            raise MissingDependencyError(missing)
        return super().export(student, deployment, out, **label)

    def write(self, module: Logits, example: Tensor, path: Path) -> None:
        """Compile the module with both dimensions of its input free."""
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_cache

        program = exported(module, example, least_tokens=LEAST_TOKENS)
        # What is compiled takes as much disk as the weights, and nobody compiles it again.
        with fresh_cache():
            aoti_compile_and_package(program, package_path=str(path))

    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the library's constants, as it computes with them."""
        from torch._C._aoti import AOTIModelContainerRunnerCpu

        with tempfile.TemporaryDirectory(prefix="autodistill-aoti-") as folder, zipfile.ZipFile(path) as archive:
            library = next(name for name in archive.namelist() if name.endswith(".so"))
            # The constants lie in its memory.
            loaded = AOTIModelContainerRunnerCpu(archive.extract(library, folder), 1)
            found = loaded.extract_constants_map(False)
            # Rotary frequencies and the like are among them.
            kept = {name: one.clone() for name, one in found.items() if name.endswith((".weight", ".bias"))}
        head = f"{PREFIX}lm_head.weight"
        body = next(name for name in kept if ".layers." in name).removeprefix(PREFIX).partition(".layers.")[0]
        family = next(one for one in FAMILIES.values() if one.body == body)
        table = f"{PREFIX}{body}.{family.embedding}.weight"
        if table not in kept:  # one constant for a table that is also the head, by the head's name
            kept[table] = kept.pop(head)
        return kept


def _no_compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler):
        return ""
    return f"AOTInductor compiles with {compiler}, which is not installed: install g++, or export to pt2 instead"
