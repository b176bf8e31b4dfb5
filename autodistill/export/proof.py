"""What the evaluated student does, computed in torch, as an export is held to it here and wherever it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodistill.errors import VerificationError
from autodistill.export.base import PROMPT_TOKENS, Expected
from autodistill.export.huggingface import greedy, likeliest, torch_threads
from autodistill.export.student_reader import StudentFiles
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.models.loading import load_model, stock_model
from autodistill.strategy.deployment import Deployment

FILE = "proof.npz"
"""Lies beside an export: what was read, and what the evaluated student does after it."""


def deployed_model(student: Path, files: StudentFiles) -> Any:
    """Load a student in float32 with the weights that a runtime reads from what is packed.

    Args:
        student: Its folder.
        files: Of that folder, under the scheme that it is packed by. Where that pads layers, the model has the zeros.
    """
    model: Any = load_model(student, torch.float32)
    if not files.spec.ffn_widths:
        model = stock_model(model)
    parameters = dict(model.named_parameters())
    for name in files.specs:
        parameters[name].data = torch.from_numpy(np.array(files.deployed(name)))
    return model


def simulate(student: Path, deployment: Deployment, sequences: npt.NDArray[np.integer[Any]], threads: int) -> Expected:
    """Return what a student does under a deployment, with its likeliest tokens and what it writes.

    Args:
        student: Its folder of float32 weights.
        deployment: How it is packed, and what its cache holds.
        sequences: int [sequences, tokens].
        threads: CPU threads.
    """
    with StudentFiles(student, deployment) as files:
        model = deployed_model(student, files)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    found, leads = [], []
    with torch_threads(threads), torch.inference_mode(), quantized_cache(model, deployment.cache_types):
        for row in tokens:
            logits = model(row[None]).logits[0]
            best, second = logits.topk(2, dim=-1).values.unbind(-1)
            found.append(likeliest(logits))
            leads.append((best - second).numpy())
        written = greedy(model, tokens[:1, :PROMPT_TOKENS])
    kept = tuple(np.stack(part) for part in zip(*found, strict=True))
    return Expected(sequences, kept[0][..., 0], np.stack(leads), (kept[0], kept[1]), written)


def save(expected: Expected, folder: Path) -> None:
    """Write what is expected of an export into its folder."""
    arrays: dict[str, Any] = {
        "sequences": expected.sequences.astype(np.int32),
        "top1": expected.top1.astype(np.int32),
        "leads": expected.leads.astype(np.float32),
        "written": np.array(expected.written, np.int64),
    }
    if expected.likeliest is not None:
        arrays |= {"likeliest": expected.likeliest[0], "log_probs": expected.likeliest[1]}
    np.savez_compressed(folder / FILE, **arrays)


def load(folder: Path) -> Expected:
    """Read what is expected of an export.

    Raises:
        VerificationError: The file is not one of these.
    """
    try:
        with np.load(folder / FILE, allow_pickle=False) as found:
            kept = (found["likeliest"], found["log_probs"]) if "likeliest" in found else None
            written = tuple(int(one) for one in found["written"])
            expected = Expected(found["sequences"], found["top1"], found["leads"], kept, written)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise VerificationError(f"{folder / FILE} cannot be read: {error}") from error
    return expected
