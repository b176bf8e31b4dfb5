"""Base of exporters to phone runtimes: a cache of fixed length, and a list of where tensors lie in the file."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.base import Artifact, Label, Ran, TokenIds
from autodistill.export.graphs.child import run_alone
from autodistill.export.graphs.onnx import rotary_of
from autodistill.export.graphs.onnx_decoder import unsupported
from autodistill.export.phones.cached_decoder import CachedDecoder, Update
from autodistill.export.phones.stored import Stored, places_of, read_at
from autodistill.export.student_reader import StudentFiles, copy_tokenizer, no_graph, read_json, replacing
from autodistill.hardware.runtime import Runtime
from autodistill.models.config import spec_from_config
from autodistill.quantization.formats import Format
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment

CONTEXT = 1024
"""Most tokens of prompt and answer together; the cache always has this length, even if it is empty."""
CHUNK = 64
"""Most tokens that are read at once."""
MANIFEST = "weights.json"
"""The list of where each tensor lies in the file (`Place`)."""


class PhoneExporter(ABC):
    """Writes one file for a phone runtime, and the tokenizer; it computes in float32, and can hold any row."""

    name: ClassVar[str]
    file: ClassVar[str]
    extra: ClassVar[str]
    most_bytes: ClassVar[float] = float("inf")
    formats: tuple[Format, ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    runs_in: str
    is_code = False
    packages: tuple[str, ...]
    modules: ClassVar[tuple[str, ...]]
    notes: Mapping[str, Any] = {"context": f"{CONTEXT} tokens at most", "read_at_once": f"{CHUNK} tokens at most"}

    @abstractmethod
    def write(self, decoder: CachedDecoder, stored: Mapping[str, Stored], out: Path) -> None:
        """Write a student's graph, with its tensors stored as given, into a folder that has its tokenizer."""

    def held(self, files: StudentFiles, name: str, deployment: Deployment, values: Floats) -> Stored:
        """Return how the file holds a tensor; by default, as the float32 values that its codes stand for."""
        return Stored.plain(values)

    @property
    @abstractmethod
    def update(self) -> Update:
        """The function that writes into the cache as the runtime does."""

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return what its graphs do not compute, or that the student is too large, or "".

        Raises:
            MissingDependencyError: A package that converts or runs it is not installed.
        """
        self._check_installed()
        if reason := no_graph(student):
            return reason
        config = read_json(student / "config.json")
        if reason := unsupported(config):
            return f"{self.name} cannot hold this {config['model_type']}: {reason}; export to pt2 or gguf instead"
        size = 4 * spec_from_config(config).parameters
        if size > self.most_bytes:
            return (
                f"{self.name} cannot hold {size / 1e9:.1f} GB of float32 weights, its files end at "
                f"{self.most_bytes / 1e9:.1f} GB: export to onnx or gguf instead, which keep the codes"
            )
        return ""

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the student's graph and its tokenizer into the folder `out`; the card names its teacher.

        Raises:
            InputError: The student cannot be read or cannot be held, or `out` cannot be written.
            MissingDependencyError: A package that converts or runs it is not installed.
        """
        self._check_installed()
        with StudentFiles(student, deployment) as files:
            if reason := self.refuses(student, deployment):
                raise InputError(reason)
            weights = {one: np.array(files.deployed(one)) for one in files.specs}
            stored = {one: self.held(files, one, deployment, values) for one, values in weights.items()}
            context = min(files.spec.max_context, CONTEXT)
            decoder = CachedDecoder(
                weights, files.spec, files.config, rotary_of(files.config), context, self.update
            ).eval()
            with replacing(out) as partial:
                copy_tokenizer(student, partial)
                self.write(decoder, stored, partial)
                places = places_of(partial / self.file, stored)
                (partial / MANIFEST).write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")
        return Artifact(path=out, size_bytes=(out / self.file).stat().st_size)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, from the bytes of the file.

        Raises:
            VerificationError: The list of places is invalid, or names a place outside the file.
        """
        data = np.memmap(artifact / self.file, np.uint8, "r")
        try:
            places = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
            for name, place in places.items():
                yield name, read_at(data, place, f"{name} in {artifact / MANIFEST}").values()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError) as error:
            raise VerificationError(f"{artifact / MANIFEST} cannot be read: {error}") from error

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the file in its runtime, in a separate process; see `Exporter.run`."""
        self._check_installed()
        if sequences.shape[1] > CONTEXT:
            raise VerificationError(
                f"{self.name} reads {CONTEXT} tokens at most, and the run's texts have {sequences.shape[1]}: export "
                "to onnx or gguf instead, or give --unverified"
            )
        return run_alone(self.name, artifact / self.file, artifact, sequences, threads)

    def _check_installed(self) -> None:
        if any(importlib.util.find_spec(one) is None for one in self.modules):
            raise MissingDependencyError(
                f"{self.name} needs {' and '.join(self.packages)}, not installed here: "
                f"pip install 'autodistill-search[{self.extra}]'"
            )
