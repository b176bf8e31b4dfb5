"""What exporters to runtimes of phones share: weights in float32, a cache of a stated length, tokens to logits."""

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
from autodistill.export.graphs.cached_decoder import CachedDecoder, Update
from autodistill.export.graphs.child import run_alone
from autodistill.export.graphs.onnx import rotary_of
from autodistill.export.graphs.onnx_decoder import unsupported
from autodistill.export.student_reader import StudentFiles, copy_tokenizer, read_json, replacing
from autodistill.hardware.runtime import Runtime
from autodistill.models.config import spec_from_config
from autodistill.quantization.formats import Format
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment

CONTEXT = 1024
"""Most tokens of prompt and answer together: the cache has this length from the start, be it empty."""
CHUNK = 64
"""Most tokens that are read at once."""
MANIFEST = "weights.json"
"""Where in the file each tensor lies, in bytes, and its shape."""
_WORD = 8  # bytes that a tensor is looked for by


class PhoneExporter(ABC):
    """Writes one file that a runtime of phones runs, and the tokenizer; all weights are float32, those of any row."""

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
    def write(self, decoder: CachedDecoder, path: Path) -> None:
        """Write the graph of a student."""

    @property
    @abstractmethod
    def update(self) -> Update:
        """What writes into the cache, as the runtime does it."""

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return what its graphs do not compute, or that it is too large; else "".

        Raises:
            MissingDependencyError: What converts or runs it is not installed.
        """
        self._check_installed()
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
            InputError: The student cannot be read, or not be held, or `out` not be written.
            MissingDependencyError: What converts it is not installed.
        """
        self._check_installed()
        with StudentFiles(student, deployment) as files:
            if reason := self.refuses(student, deployment):
                raise InputError(reason)
            weights = {one: np.array(files.deployed(one)) for one in files.specs}
            context = min(files.spec.max_context, CONTEXT)
            decoder = CachedDecoder(
                weights, files.spec, files.config, rotary_of(files.config), context, self.update
            ).eval()
            with replacing(out) as partial:
                self.write(decoder, partial / self.file)
                places = located(partial / self.file, weights)
                (partial / MANIFEST).write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")
                copy_tokenizer(student, partial)
        return Artifact(path=out, size_bytes=(out / self.file).stat().st_size)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, from the bytes of the file.

        Raises:
            VerificationError: The list of places is none, or names one outside the file.
        """
        data = np.memmap(artifact / self.file, np.uint8, "r")
        try:
            places = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
            for name, (offset, shape) in places.items():
                size = 4 * int(np.prod(shape))
                yield name, np.frombuffer(data[offset : offset + size].tobytes(), np.float32).reshape(shape)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise VerificationError(f"{artifact / MANIFEST} cannot be read: {error}") from error

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the file in its runtime, in a process of its own; see `Exporter.run`."""
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


def located(path: Path, weights: Mapping[str, Floats]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Find each tensor in a file, by its bytes: where it begins, and its shape.

    Raises:
        VerificationError: The file does not have one of them, as it was given; names it.
    """
    data = np.memmap(path, np.uint8, "r")
    keys = {name: _key(values) for name, values in weights.items()}
    wanted = np.array(sorted({word for word, _ in keys.values()}), np.uint64)
    places: dict[int, list[int]] = {}
    for shift in range(0, _WORD, 4):  # a file may hold float32 values at any multiple of their own 4 bytes
        words = data[shift : shift + (len(data) - shift) // _WORD * _WORD].view(np.uint64)
        for place in np.flatnonzero(np.isin(words, wanted)):
            places.setdefault(int(words[place]), []).append(shift + _WORD * int(place))
    found = {}
    for name, values in weights.items():
        raw, (word, ahead) = np.ascontiguousarray(values).view(np.uint8).ravel(), keys[name]
        begins = (place - ahead for place in places.get(word, ()) if place >= ahead)
        begin = next((one for one in begins if np.array_equal(data[one : one + len(raw)], raw)), None)
        if begin is None:
            raise VerificationError(f"{path} does not have {name} as it was evaluated: the converter changed it")
        found[name] = (begin, values.shape)
    return found


def _key(values: Floats) -> tuple[int, int]:
    """Return the first bytes of a tensor that are not all zeros, as a number, and how many lie ahead of them."""
    raw = np.ascontiguousarray(values).view(np.uint8).ravel()
    words = raw[: len(raw) // _WORD * _WORD].view(np.uint64)
    place = int(np.argmax(words != 0))
    return int(words[place]), _WORD * place
