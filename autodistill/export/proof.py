"""Outputs of the evaluated student, computed in torch, which an export must reproduce here and on other machines."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.errors import VerificationError
from autodistill.export.base import PROMPT_TOKENS, Expected, TokenIds
from autodistill.export.huggingface import chosen, greedy, torch_threads
from autodistill.export.student_reader import StudentFiles
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.models.loading import held, load_model, stock_model
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes
from autodistill.utils.json_files import replacing

FILE = "proof.npz"
"""A file next to an export: the tokens that were read, and the evaluated student's outputs for them."""
_MOST_BYTES = 500_000_000  # limit of the unpacked size, far more than a proof has


def deployed_model(student: Path, files: StudentFiles) -> Any:
    """Load a student in float32 with the weights that a runtime reads from its packed form.

    Args:
        student: The student's folder.
        files: That folder's files under the scheme by which they are packed. If the scheme pads layers, the model has
            the padding zeros.
    """
    model: Any = load_model(student, torch.float32)
    if not files.spec.ffn_widths:
        model = stock_model(model)
    parameters = held(model)
    for name in files.specs:
        weight = parameters[name]
        weight.data = torch.from_numpy(np.array(files.deployed(name))).view(weight.shape)
    return model


def simulate(student: Path, deployment: Deployment, sequences: TokenIds, threads: int) -> Expected:
    """Return what a student chooses, loses and writes under a deployment.

    Args:
        student: The student's folder of float32 weights.
        deployment: How it is packed, and the types of its cache.
        sequences: int [sequences, tokens], at least two tokens each.
        threads: CPU threads.
    """
    with StudentFiles(student, deployment) as files:
        model = deployed_model(student, files)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    with torch_threads(threads), torch.inference_mode(), quantized_cache(model, deployment.cache_types):
        top1, nll, leads = (np.stack(part) for part in zip(*(chosen(model, row) for row in tokens), strict=True))
        written = greedy(model, tokens[:1, :PROMPT_TOKENS])
    return Expected(sequences, top1, nll, leads, written)


def save(expected: Expected, folder: Path) -> None:
    """Write the expected outputs of an export into its folder."""
    arrays: dict[str, Any] = {
        "sequences": expected.sequences.astype(np.int32),
        "top1": expected.top1.astype(np.int32),
        "nll": expected.nll.astype(np.float32),
        "leads": expected.leads.astype(np.float32),
        "written": np.array(expected.written, np.int64),
    }
    with replacing(folder / FILE) as temporary:
        np.savez_compressed(temporary, **arrays)


def load(folder: Path) -> Expected:
    """Read the expected outputs of an export.

    Raises:
        VerificationError: The file is not a valid proof.
    """
    try:
        with zipfile.ZipFile(folder / FILE) as whole:
            if sum(part.file_size for part in whole.infolist()) > _MOST_BYTES:
                raise ValueError(f"it holds more than {format_bytes(_MOST_BYTES)}")
        with np.load(folder / FILE, allow_pickle=False) as found:
            arrays = dict(found)
        count, length = arrays["sequences"].shape
        if count == 0 or length < 2:
            raise ValueError(f"sequences of the shape {[count, length]}")
        places = (count, length), *[(count, length - 1)] * 3, (arrays["written"].size,)
        _check(arrays, ("sequences", "top1", "nll", "leads", "written"), places, "iiffi")
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise VerificationError(f"{folder / FILE} cannot be read: {error}") from error
    told = arrays["sequences"], arrays["top1"], arrays["nll"], arrays["leads"]
    return Expected(*told, written=tuple(arrays["written"].tolist()))


def _check(arrays: dict[str, Any], names: Sequence[str], shapes: Sequence[tuple[int, ...]], kinds: str) -> None:
    """Check the shapes of arrays, and that they hold tokens ("i") or numbers ("f")."""
    for name, shape, kind in zip(names, shapes, kinds, strict=True):
        values = arrays[name]
        if values.shape != shape or values.dtype.kind != kind:
            raise ValueError(f"{name} is {values.dtype} of the shape {list(values.shape)}")
        if not (values < np.inf if kind == "f" else (values >= 0) & (values < 2**31)).all():
            raise ValueError(f"{name} has values that are not valid")
