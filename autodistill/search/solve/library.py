"""Scores each type of each matrix and of the cache in KL to the teacher, once, and keeps the scores for all budgets."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autodistill import inference, quantization
from autodistill.errors import InputError
from autodistill.estimates.solving import BLOCK_TOKENS, PASS_TOKENS
from autodistill.evaluation.base import Scoring
from autodistill.inference.batching import map_sequences
from autodistill.inference.watching import Taken
from autodistill.search.solve.bench import Bench, Measured, Sample
from autodistill.search.solve.options import KEYS, VALUES, Options, alike
from autodistill.strategy.deployment import Deployment
from autodistill.utils.hashing import content_hash, file_hash
from autodistill.utils.json_files import read_json, write_json

_FACTORS = (0.5, 4.0)  # bounds of the factor by which scores are corrected for what tokens have in common
_SAVED_SECONDS = 10.0  # seconds between saves within a pass


@dataclass(frozen=True, kw_only=True)
class Score:
    """The cost of a type.

    Attributes:
        kl: Increase of the KL to the teacher, in nats per token.
        stderr: Its standard error over sequences or documents; infinite if there is only one.
        exact: True if the KL was measured with this type in the model, False if it is a second-order estimate from
            gradients.
    """

    kl: float
    stderr: float
    exact: bool

    @classmethod
    def of(cls, found: Measured) -> Score:
        """Return the score of a measurement."""
        return cls(kl=found.kl, stderr=math.inf if found.kl_stderr is None else found.kl_stderr, exact=True)

    @staticmethod
    def sum(scores: Sequence[Score]) -> tuple[float, float]:
        """Return the sum of scores, and its standard error if they are independent."""
        return sum(one.kl for one in scores), math.sqrt(sum(one.stderr**2 for one in scores))


class Library:
    """Holds the scores of a teacher on a text, in a file that grows with each score.

    Gradients score all matrices of linear layers at once. Let x be the inputs of a matrix, D the change that a type
    makes to it, and g the gradient at its outputs of the log-probability of tokens drawn from the teacher. To second
    order, KL then grows by half the mean square of the sum of g . D x, the Fisher information along D. If the sum goes
    over a whole sequence, it is unbiased but has a high variance. If each token is squared by itself, the variance is
    low, but what tokens have in common is left out. So each matrix gets the second estimate, times the ratio of both
    over all matrices of the same name in all layers. Types of tables and of the cache are put in and measured.

    Args:
        path: The file.
        bench: The teacher.
        options: What is scored.
        sample: The text.
        notify: Called with messages about progress.
        held_out: A text on which the best storages will be measured too. It is read beside the first one if the bench
            reads two texts together.
    """

    def __init__(
        self,
        path: Path,
        bench: Bench,
        options: Options,
        sample: Sample,
        notify: Callable[[str], None],
        held_out: Sample | None = None,
    ) -> None:
        self._path, self._bench, self._options, self._sample = path, bench, options, sample
        self._beside = (held_out,) if held_out is not None and bench.reads_together else ()
        self._notify = notify
        self._held = _read(path)
        self._gradients: dict[str, dict[str, Score]] | None = None
        self._save_failure_reported = False  # whether a message said that scores cannot be kept

    def build(self) -> None:
        """Make the scores that are not in the file yet. It is saved after each pass and every few seconds of a pass."""
        passes = list(self._passes())
        for index, part in enumerate(passes):
            known = self._held["passes"].setdefault(str(index), {})
            if known.keys() >= self._options.matrices.keys():
                continue
            self._notify(f"scoring all matrices by gradients, pass {index + 1} of {len(passes)}")
            tokens, saved = torch.from_numpy(self._sample.data.tokens[part].astype(np.int64)), time.monotonic()
            for sums in _second_order(self._bench, self._options, tokens, index, known):
                known |= sums
                if time.monotonic() > saved + _SAVED_SECONDS:
                    self._save()
                    saved = time.monotonic()
            self._save()
        for name, kind in self._exact():
            if _key(name, kind) not in self._held["exact"]:
                self._notify(f"scoring {name} in {kind}")
                self._held["exact"][_key(name, kind)] = self._measure_one(name, kind).to_json()
                self._save()

    def _passes(self) -> Iterator[slice]:
        sequences, length = self._sample.data.tokens.shape
        at_once = max(1, (BLOCK_TOKENS if self._bench.by_block else PASS_TOKENS) // length)
        return (slice(start, min(start + at_once, sequences)) for start in range(0, sequences, at_once))

    def _exact(self) -> Iterator[tuple[str, str]]:
        for name, tensor in self._options.tables.items():
            yield from ((name, kind) for kind in self._options.kinds(tensor))
        for name, half in ((KEYS, 0), (VALUES, 1)):
            kinds = dict.fromkeys(pair[half] for pair in self._options.caches)
            yield from ((name, kind) for kind in kinds if kind != "f16")

    def _measure_one(self, name: str, kind: str) -> Measured:
        cache_types = (kind if name == KEYS else "f16", kind if name == VALUES else "f16")
        storages = {name: self._options.held[kind]} if name in self._options.tables else {}
        return self._bench.measure_parts(storages, cache_types, self._sample)

    def score(self, name: str, kind: str) -> Score:
        """Return the cost of storing a matrix, or the cache's keys or values, as a type."""
        if name in (KEYS, VALUES) and kind == "f16":
            return Score(kl=0.0, stderr=0.0, exact=True)
        if name in self._options.matrices:
            if self._gradients is None:
                self._gradients = self._by_gradients()
            return self._gradients[name][kind]
        return Score.of(Measured.from_json(self._held["exact"][_key(name, kind)]))

    def _by_gradients(self) -> dict[str, dict[str, Score]]:
        found: dict[str, dict[str, Score]] = {}
        passes = [self._held["passes"][key] for key in sorted(self._held["passes"], key=int)]
        of_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, tensor in self._options.matrices.items():
            for kind in self._options.kinds(tensor):
                # The file holds null for numbers that are not finite; they become NaN here.
                apart, together = np.concatenate([one[name][kind] for one in passes], axis=1).astype(float)
                if not (np.isfinite(apart).all() and np.isfinite(together).all()):
                    raise InputError(
                        f"the teacher's gradients at {name} are no finite numbers: its weights are damaged, or too "
                        "large for float32; get the model again, or give another"
                    )
                error = float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
                found.setdefault(name, {})[kind] = Score(kl=float(apart.mean()), stderr=error, exact=False)
                of_kind[alike(name)].append((float(apart.mean()), float(together.mean())))
        sums = {name: np.sum(pairs, axis=0) for name, pairs in of_kind.items()}
        for name, scores in found.items():
            apart, together = sums[alike(name)]
            factor = float(np.clip(together / apart, *_FACTORS)) if apart > 0 else 1.0
            found[name] = {
                kind: Score(kl=factor * one.kl, stderr=factor * one.stderr, exact=False) for kind, one in scores.items()
            }
        return found

    def predict(self, deployment: Deployment) -> tuple[float, float]:
        """Return the sum of the scores of a deployment, and its standard error if scores are independent."""
        return Score.sum(self.behind(deployment))

    def behind(self, deployment: Deployment) -> list[Score]:
        """Return the scores of which the prediction for a deployment is the sum."""
        keys, values = deployment.cache_types
        chosen = [*self._options.types(deployment).items(), (KEYS, keys), (VALUES, values)]
        return [self.score(name, kind) for name, kind in chosen]

    def joint(self, deployment: Deployment, sample: Sample) -> Measured:
        """Return the measurement of a whole deployment on a sample. It is made once and kept."""
        key = content_hash(deployment.to_json(), 16)
        known = f"{sample.name} {key}" in self._held["joint"]
        samples = (sample,) if known or sample is not self._sample else (sample, *self._beside)
        return self.kept(key, deployment.name, samples, partial(self._bench.measure_all, deployment))[0]

    def kept(
        self, key: str, name: str, samples: Sequence[Sample], measure: Callable[..., Sequence[Measured]]
    ) -> tuple[Measured, ...]:
        """Return the kept measurements on samples. If any is missing, measure and keep them.

        Args:
            key: Key under which measurements are kept.
            name: Name of what is measured, for messages.
            samples: The texts.
            measure: Called with all samples as arguments; returns their measurements.
        """
        keys = [f"{sample.name} {key}" for sample in samples]
        if not self._held["joint"].keys() >= set(keys):
            self._notify(f"measuring {name} on {' and '.join(sample.name for sample in samples)} text")
            for place, found in zip(keys, measure(*samples), strict=True):
                if not math.isfinite(found.kl) or not math.isfinite(found.nll):
                    raise InputError(f"the teacher as {name} gives no finite likelihoods: choose another one")
                self._held["joint"][place] = found.to_json()
            self._save()
        return tuple(Measured.from_json(self._held["joint"][place]) for place in keys)

    def _save(self) -> None:
        """Write the scores. If the disk is full, they stay in memory, and the file keeps its earlier content."""
        try:
            write_json(self._path, self._held, compact=True)
        except (OSError, InputError) as error:
            if not self._save_failure_reported:
                said = error.strerror if isinstance(error, OSError) else error
                self._notify(f"scores cannot be kept in {self._path} ({said}): a later call will make these again")
            self._save_failure_reported = True


def library_file(
    cache: Path, teacher: str, data: str, tokens: tuple[int, ...], options: Options, scoring: Scoring = "float32"
) -> Path:
    """Return the file of a teacher's scores on a text. Its name also depends on the code that makes the scores.

    Args:
        cache: Root of caches.
        teacher, data: Fingerprints.
        tokens: Number of tokens of the calibration sample, of the held-out sample and of a sequence.
        options: What is scored.
        scoring: Precision of products.
    """
    code = code_of((quantization, inference), ("bench", "compensation", "library", "options", "streamed"))
    key = content_hash(
        [teacher, data, list(tokens), [list(pair) for pair in options.caches], code, options.runtime, scoring], 16
    )
    return cache / "solve" / f"{key}.json"


def code_of(packages: Sequence[ModuleType], names: Sequence[str]) -> list[str]:
    """Return the hashes of the source files of whole packages, and of the named files of this folder."""
    files = [path for one in packages for folder in one.__path__ for path in sorted(Path(folder).rglob("*.py"))]
    files += [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem in names]
    return [file_hash(path) for path in files]


def _read(path: Path) -> dict[str, Any]:
    """Return the file's scores, or empty ones if it is missing or damaged. It is then made again."""
    try:
        held = read_json(path)
    except InputError:
        held = {}
    return {name: held.get(name, {}) for name in ("passes", "exact", "joint")}


def _key(name: str, kind: str) -> str:
    return f"{name}={kind}"


_OfTypes: TypeAlias = dict[str, list[list[float]]]
"""By type, half the mean square of each sequence: first with each token squared alone, then with the sum squared."""

_Sums: TypeAlias = dict[str, _OfTypes]
"""The same by matrix."""


def _second_order(
    bench: Bench, options: Options, tokens: Tensor, seed: int, known: Container[str] = ()
) -> Iterator[_Sums]:
    """Yield half the mean squared change of the log-probability of drawn tokens, by matrix, type and sequence.

    Args:
        bench: The teacher.
        options: Matrices and their types.
        tokens: int64 [sequences, length].
        seed: Seed of the drawn tokens.
        known: Matrices to skip.

    Yields:
        The scores of some matrices.
    """
    for part in bench.watched(list(options.matrices), tokens, seed):
        names = [name for name in part if name not in known]
        pairs = [(name, kind) for name in names for kind in options.kinds(options.matrices[name])]

        def score(
            index: int, pairs: list[tuple[str, str]] = pairs, part: dict[str, list[Taken]] = part
        ) -> list[list[float]]:
            """Return the scores of one pair of a matrix and a type, by its index."""
            name, kind = pairs[index]
            weight = bench.master(name)
            change = bench.stored(name, options.held[kind], weight) - weight
            if not change.any():
                return [[0.0] * len(tokens)] * 2
            scale = 2 * tokens.shape[1]
            apart, together = zip(*moved(part[name], bench.matrices(name, change)), strict=True)
            return [[one / scale for one in apart], [one / scale for one in together]]

        sums: _Sums = {name: {} for name in names}
        for (name, kind), found in zip(pairs, map_sequences(score, len(pairs), bench.device), strict=True):
            sums[name][kind] = found
            if kind == options.kinds(options.matrices[name])[-1]:
                # Gradients are freed one matrix after another: together they take more memory than the scores.
                del part[name]
        if sums:
            yield sums


def moved(taken: list[Taken], changes: Tensor) -> Iterator[tuple[float, float]]:
    """Yield, for each sequence, the sum of its tokens' squared changes and the square of the sum of these changes.

    A token's change is the first-order change of its log-probability.

    Args:
        taken: Inputs and gradients of each sequence.
        changes: Changes [matrices, out, in] of one matrix or of the experts of a layer.
    """
    for one in taken:
        parts = [functional.linear(into, changes[place]).mul_(slope).sum(dim=-1) for place, into, slope in one]
        if not parts:  # no token was routed to any of these experts
            yield 0.0, 0.0
            continue
        found = torch.cat(parts).double()
        yield float(found.square().sum()), float(found.sum().square())
