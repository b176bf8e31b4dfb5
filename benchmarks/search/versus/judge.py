"""Scores a student that an arm exported: likelihoods of unseen text, and its distance from the teacher."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.hardware.budget import Budget
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.strategy.deployment import Deployment
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Unseen text, and the teacher's outputs for it.

    Attributes:
        teacher: The teacher's folder.
        test, general: Folders of documents.
        sequence: Tokens that are read at once.
        test_tokens, general_tokens: The most tokens of each text.
        cache: Where tokens and the teacher's outputs are kept.
    """

    teacher: Path
    test: Path
    general: Path
    sequence: int
    test_tokens: int
    general_tokens: int
    cache: Path

    def teacher_itself(self) -> dict[str, Any]:
        """Return the figures of the teacher."""
        model = load_model(self.teacher, torch.float32).eval()
        return self._read(model, ("f16", "f16")) | {"bytes": None, "weights": None}

    def judge(self, file: Path, deployment: Deployment, budget: Budget) -> dict[str, Any]:
        """Return the figures of an exported file, with the cache types that it is served with."""
        with tempfile.TemporaryDirectory() as unpacked:
            folder = materialize(resolve_teacher(str(file)), Path(unpacked)).folder
            model = load_model(folder, torch.float32).eval()
            spec = spec_from_config(read_json(folder / "config.json"))
        need = memory(spec, deployment, context=budget.context, batch=1)
        found = self._read(model, deployment.cache_types)
        return found | {
            "bytes": need.total_bytes,
            "weights": need.weights_bytes,
            "kv_cache": need.kv_cache_bytes,
            "fits": need.total_bytes <= budget.memory_bytes,
            "file": file.stat().st_size,
            "parameters": spec.parameters,
        }

    @torch.no_grad()
    def _read(self, model: Any, cache_types: tuple[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, folder, tokens in (
            ("test", self.test, self.test_tokens),
            ("general", self.general, self.general_tokens),
        ):
            data = self._data(folder, tokens)
            reference = self._reference(data)
            with quantized_cache(model, cache_types):
                scores, _ = score(model, data, reference)
            assert scores.divergence is not None
            found[name] = {
                "nll": clustered_mean(scores.nll, scores.documents),
                "accuracy": clustered_mean(scores.correct, scores.documents),
                "kl": clustered_mean(scores.divergence, scores.documents),
                "documents": {
                    "count": per_document(scores.nll, scores.documents)["count"],
                    "nll": per_document(scores.nll, scores.documents)["sum"],
                    "correct": per_document(scores.correct, scores.documents)["sum"],
                    "kl": per_document(scores.divergence, scores.documents)["sum"],
                },
            }
        return found

    def _data(self, folder: Path, tokens: int) -> TokenSet:
        """Return the first sequences, from many documents.

        They are of AutoDistill's largest split. No arm is given these documents.
        """
        prepared = prepare(
            resolve_data(str(folder)), self.teacher, tokenizer_fingerprint(self.teacher), self.sequence, self.cache
        )
        return load_split(prepared.folder, "train").head(tokens)

    def _reference(self, data: TokenSet) -> TeacherReference:
        key = content_hash([str(self.teacher), content_hash(np.asarray(data.tokens).tolist())])
        path = self.cache / "references" / f"{key}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _, reference = score_teacher(load_model(self.teacher, torch.float32).eval(), data)
            reference.save(path)
        return TeacherReference.load(path)
