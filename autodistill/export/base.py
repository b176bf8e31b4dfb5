"""What an exporter is: it writes a student in one container format, and reads back what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from autodistill.plugins import load
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An exported student on disk.

    Attributes:
        path: The file a runtime is given (GGUF), or the folder.
        size_bytes: Bytes of the files that hold weights.
    """

    path: Path
    size_bytes: int


class Exporter(Protocol):
    """Writes a student in one container format, and reads back what was written. Constructed without arguments."""

    name: str
    formats: tuple[str, ...]

    def export(
        self,
        student: Path,
        deployment: Deployment,
        out: Path,
        *,
        teacher: str | None = None,
        license: str | None = None,
        name: str | None = None,
    ) -> Artifact:
        """Packs `student`, a folder of transformers, into the folder `out`: a student's, or the teacher's own.

        What the model is called, what it is of, and the licence that it inherits, are written down where the container
        has a place for them and they are known. Without a name it is called the student of its teacher.
        """
        ...

    def unpack(self, artifact: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yields each stored tensor by transformers' name, dequantised from the bytes on disk."""
        ...


def load_exporter(name: str) -> Exporter:
    """Makes the installed exporter of a name.

    Raises:
        InputError: As `plugins.load`.
    """
    made: Exporter = load("exporters", name)
    return made
