"""Scores cuts of a teacher in KL to it: narrower FFNs, fewer heads, fewer layers. Scores are made once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodistill import inference, quantization
from autodistill.data.dataset import Prepared, load_split
from autodistill.distillation import student
from autodistill.distillation.student.build import cut_student, kept_layers
from autodistill.distillation.student.repair import HeldMoments, Moments, Refit, last_matrices, part_moments, refit
from autodistill.distillation.student.shapes import MULTIPLE
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.errors import InputError
from autodistill.estimates.solving import CUT_TOKENS
from autodistill.evaluation.base import Scoring
from autodistill.inference.blocks import embedded, only_blocks, through_block
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.scoring import score
from autodistill.models.config import spec_from_config
from autodistill.models.families import Axis
from autodistill.quantization.grids import Scales
from autodistill.search.solve.bench import Bench, Measured, Sample, measured
from autodistill.search.solve.disk_limit import mark_used
from autodistill.search.solve.library import Score, code_of, moved
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json, write_json

_SCORED = (0.7, 0.4)  # fractions of an FFN whose cost is scored by gradients
_DOUBT = 0.2  # relative error of costs by gradients: SmolLM2's were so far from what was measured
_POWERS = (1.0, 4.0)  # bounds of the exponent with which a cost grows in the share that is cut
_LEAST = 1e-12  # lower bound of a cost before its logarithm is taken
_IN_16_BITS = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
_REMEMBERED = 6  # students whose scales stay in memory
_SPANS = 3  # blocks of layers of each length that are measured: those that change the direction of the states least

MUCH = 0.03
"""A cut is measured if it costs more nats than this by gradients."""


class Shapes:
    """Holds the scores of a teacher's cuts on a text, in a file that grows with each score.

    A cut FFN is repaired by least squares, which changes only its last matrix. So one pass of gradients gives the costs
    of two widths of each FFN, like the costs of types. If a cost is high, or the solver needs narrower widths, the cut
    FFN is put into its layer, and this layer and those above it are computed again. Other widths follow from the scored
    ones: the cost grows with a power of the share that is cut. Blocks of layers are left out and measured.

    Args:
        path: The file.
        bench: The teacher.
        sample: The text.
        calibration: The importance of the teacher's parts, which decides what is cut. Its text is used for repairs.
        notify: Called with messages about progress.
        much: Nats by gradients above which a cut is measured.
        moments: Activations of the teacher's parts, if others that cut the teacher share them.
    """

    def __init__(
        self,
        path: Path,
        bench: Bench,
        sample: Sample,
        calibration: PartImportance,
        notify: Callable[[str], None] = lambda _: None,
        much: float = MUCH,
        moments: HeldMoments | None = None,
    ) -> None:
        self._path, self._bench, self._calibration, self._notify = path, bench, calibration, notify
        self._weighed, self._text = sample.data, sample.data.head(CUT_TOKENS)
        self._reference: TeacherReference = sample.reference.head(self._text.predicted)
        self._held, self._much = _read(path), much
        self._students: dict[Init, Bench] = {}
        self._scales: dict[Init, dict[tuple[str, str], Scales]] = {}
        self._held_moments = moments or HeldMoments()

    @property
    def widths(self) -> tuple[int, ...]:
        """The possible FFN widths of a layer, the whole width first."""
        return ffn_widths(self._bench.spec.ffn_width)

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Widths that are scored, each a multiple of 64 below the whole width, the wider first."""
        whole = self._bench.spec.ffn_width
        near = (max(MULTIPLE, round(share * whole / MULTIPLE) * MULTIPLE) for share in _SCORED)
        return tuple(dict.fromkeys(width for width in near if width < whole))

    @cached_property
    def _states(self) -> list[list[Tensor]]:
        """The inputs of each layer, by sequence."""
        model, device = self._bench.model, self._bench.device
        with self._bench.shown({}), self._bench.scored():
            found = [embedded(model, self._text.tokens, device)]
            for index in range(self._bench.spec.layers - 1):
                found.append([one.after for one in through_block(model, index, found[-1], device=device)])
        return found

    @property
    def _moments(self) -> Iterable[Moments] | None:
        """Second moments of each layer's parts, or None if they take too much memory."""
        bench = self._bench
        with bench.shown({}):
            return self._held_moments.of(lambda: bench.model, bench.spec, self._calibration.text, bench.device)

    def _read_moments(self) -> Iterable[Moments]:
        """Return the same, read again if they are not held."""
        held, bench = self._moments, self._bench
        return part_moments(bench.model, self._calibration.text, bench.device) if held is None else held

    def build(self) -> None:
        """Score two widths of each FFN, unless they are in the file already."""
        cuts = [(layer, width) for layer in range(self._bench.spec.layers) for width in self.scored]
        if not self._held["gradients"].keys() | self._held["ffn"].keys() >= {_ffn_key(*cut) for cut in cuts}:
            self._by_gradients(cuts)
        self.measure(cut for cut in cuts if self.ffn(*cut).kl > self._much)

    def _by_gradients(self, cuts: Sequence[tuple[int, int]]) -> None:
        """Score all cuts together to second order, by the change that each makes to the last matrix of its FFN."""
        bench, spec = self._bench, self._bench.spec
        self._notify("scoring narrower FFNs of all layers by gradients")
        names, tokens = last_matrices(spec, Axis.FFN), torch.from_numpy(self._text.tokens.astype(np.int64))
        taken = {name: one for part in bench.watched(names, tokens, 0) for name, one in part.items()}
        with bench.shown({}):
            for layer, moments in enumerate(self._read_moments()):
                matrix, seen = bench.master(names[layer]), taken.pop(names[layer])
                for width in (width for one, width in cuts if one == layer):
                    change = _as_wide(refit(moments[Axis.FFN], matrix, width, matrix.shape[1]), matrix) - matrix
                    sums = np.array([apart for apart, _ in moved(seen, change[None])]) / (2 * tokens.shape[1])
                    error = float(sums.std(ddof=1)) / math.sqrt(len(sums)) if len(sums) > 1 else math.inf
                    kl = float(sums.mean())
                    scored = {"kl": kl, "stderr": math.hypot(error, _DOUBT * kl) if math.isfinite(error) else None}
                    self._held["gradients"][_ffn_key(layer, width)] = scored
        self._save()

    def measure(self, cuts: Iterable[tuple[int, int]]) -> None:
        """Measure cuts that are not in the file yet. The file is written after each layer.

        Args:
            cuts: Pairs of a layer and the number of neurons that it keeps.
        """
        spec, bench = self._bench.spec, self._bench
        missing: dict[int, list[int]] = {}
        for layer, width in cuts:
            if width < spec.ffn_width and _ffn_key(layer, width) not in self._held["ffn"]:
                missing.setdefault(layer, []).append(width)
        if not missing:
            return
        self._notify("reading the activations of the FFNs")
        assert self._states  # computed with the unchanged teacher, before any weights are replaced
        names = last_matrices(spec, Axis.FFN)
        with bench.shown({}):
            matrices = [bench.master(name) for name in names]
            for layer, moments in enumerate(self._read_moments()):
                if layer not in missing:
                    continue
                self._notify(f"scoring narrower FFNs of layer {layer + 1} of {spec.layers}")
                for width in missing[layer]:
                    matrix = matrices[layer]
                    whole = _as_wide(refit(moments[Axis.FFN], matrix, width, matrix.shape[1]), matrix)
                    with bench.replaced([(names[layer], whole)]):
                        cut = self._from_layer(layer, range(layer, spec.layers))
                    self._held["ffn"][_ffn_key(layer, width)] = cut.to_json()
                self._save()

    def _from_layer(self, first: int, kept: Iterable[int]) -> Measured:
        """Measure the teacher with the layers below `first` and those in `kept`."""
        bench = self._bench
        with bench.scored(), only_blocks(bench.model, set(kept)):
            scores, _ = score(bench.model, self._text, self._reference, device=bench.device, begun=self._states[first])
        return measured(scores)

    def ffn(self, layer: int, width: int) -> Score:
        """Return the cost if a layer keeps so many FFN neurons: scored, or else from the nearest scored widths."""
        whole = self._bench.spec.ffn_width
        if width == whole:
            return Score(kl=0.0, stderr=0.0, exact=True)
        held = self._scores_of(layer)
        if width in held:
            return held[width]
        near = min(held, key=lambda one: (abs(one - width), one))
        power, others = 2.0, sorted(held, key=lambda one: abs(one - width))
        beside = [one for one in others if (one - width) * (near - width) < 0] or others[1:]
        if beside:
            pair = held[near].kl, held[beside[0]].kl
            rise = math.log(max(pair[1], _LEAST) / max(pair[0], _LEAST))
            power = rise / math.log((whole - beside[0]) / (whole - near))
            power = min(max(power, _POWERS[0]), _POWERS[1])
        factor = ((whole - width) / (whole - near)) ** power
        found = held[near]
        return Score(kl=factor * found.kl, stderr=factor * found.stderr, exact=False)

    def _scores_of(self, layer: int) -> dict[int, Score]:
        """Return the scores of a layer by width. A measured score replaces one by gradients."""
        prefix, found = _ffn_key(layer, ""), {}
        for key, one in self._held["gradients"].items():
            if key.startswith(prefix):
                error = math.inf if one["stderr"] is None else one["stderr"]
                found[int(key[len(prefix) :])] = Score(kl=one["kl"], stderr=error, exact=False)
        for key, one in self._held["ffn"].items():
            if key.startswith(prefix):
                found[int(key[len(prefix) :])] = Score.of(Measured.from_json(one))
        return found

    def spans(self, count: int) -> tuple[tuple[int, Score], ...]:
        """Return the first layers of some blocks of `count` layers, with the costs of leaving them out, least first.

        The blocks that change the direction of the states least are measured, on demand.
        """
        layers = self._bench.spec.layers
        similarity = self._calibration.similarity
        firsts = sorted(range(1, layers - count), key=lambda first: -float(similarity[first, first + count]))
        found = [(first, self.span(first, count)) for first in firsts[:_SPANS]]
        return tuple(sorted(found, key=lambda one: one[1].kl))

    def span(self, first: int, count: int) -> Score:
        """Return the cost of leaving out `count` layers from `first` on; measured on demand."""
        key, layers = f"{first}+{count}", self._bench.spec.layers
        if key not in self._held["spans"]:
            self._notify(f"scoring {Init(depth=1.0, dropped=(first, count)).describe()}")
            with self._bench.shown({}):
                found = self._from_layer(first, [layer for layer in range(first, layers) if layer >= first + count])
            self._held["spans"][key] = found.to_json()
            self._save()
        return Score.of(Measured.from_json(self._held["spans"][key]))

    def groups(self, count: int) -> Score:
        """Return the cost if every layer keeps `count` groups of heads that share keys and values, and is repaired.

        It is measured on demand, without building the student: the output of a head that is left out is not read.
        """
        spec, bench, key = self._bench.spec, self._bench, str(count)
        if key not in self._held["groups"]:
            self._notify(f"scoring attention with {count} of {spec.kv_heads} groups of heads in all layers")
            names = last_matrices(spec, Axis.QUERIES)
            assert self._states  # computed with the unchanged teacher, before any weights are replaced
            with bench.shown({}):
                cuts = []
                for name, moments in zip(names, self._read_moments(), strict=True):
                    made = refit(moments[Axis.QUERIES], bench.master(name), count, spec.kv_heads)
                    cuts.append((name, _as_wide(made, bench.master(name))))
                with bench.replaced(cuts):
                    found = self._from_layer(0, range(spec.layers))
            self._held["groups"][key] = found.to_json()
            self._save()
        return Score.of(Measured.from_json(self._held["groups"][key]))

    def joint(self, init: Init, deployment: Deployment, sample: Sample) -> Measured:
        """Return the measurement of the student that `init` makes, in a deployment. It is made once and kept."""
        key = f"{sample.name} {content_hash([init.to_json(), deployment.to_json()], 16)}"
        if key not in self._held["joint"]:
            self._notify(f"measuring {init.describe()} as {deployment.name} on {sample.name} text")
            found = self.student(init).measure(deployment, sample)
            if not math.isfinite(found.kl) or not math.isfinite(found.nll):
                raise InputError(f"the student {init.describe()} gives no finite likelihoods: choose another teacher")
            self._held["joint"][key] = found.to_json()
            self._save()
        return Measured.from_json(self._held["joint"][key])

    def whole(self, init: Init, sample: Sample) -> Score:
        """Return the cost of the student that any `init` makes, in 16 bits. It is measured once and kept."""
        return Score.of(self.joint(init, _IN_16_BITS, sample))

    def kept_layers(self, init: Init) -> tuple[int, ...]:
        """Return the teacher's layers that a student keeps."""
        return kept_layers(init, self._bench.spec.layers, self._calibration)

    def student(self, init: Init) -> Bench:
        """Return the student that `init` makes, as a search builds it.

        The last one stays in memory. Of the last few, the scales do that were searched for, which take most of the time
        if a student is made again.
        """
        if init not in self._students:
            bench = self._bench
            with bench.shown({}):
                moments = self._moments if init.repair else None
                model, _ = cut_student(bench.model, init, self._calibration, moments, bench.device)
            model.to(bench.device)
            spec = spec_from_config(model.config.to_dict())
            made = Bench(model, spec, {}, bench.device, cut=True, scoring=bench.scoring)
            if bench.weighed:
                made.weigh(self._weighed)
                scales = {one: self._scales[one] for one in list(self._scales)[1 - _REMEMBERED :] if one != init}
                self._scales = scales | {init: self._scales.get(init, {})}
                made.share_scales(self._scales[init])
            self._students = {init: made}
        return self._students[init]

    def _save(self) -> None:
        """Write the scores, and keep those that another process wrote meanwhile.

        If the disk is full, they stay in memory, as in a `Library`.
        """
        try:
            with exclusive(self._path):
                for name, scores in _read(self._path).items():
                    self._held[name] = scores | self._held[name]
                write_json(self._path, self._held, compact=True)
        except (OSError, InputError) as error:
            self._notify(f"scores of cuts cannot be kept in {self._path} ({error}): a later call will make these again")


def ffn_widths(whole: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """Return the widths that an FFN may have: the whole, then the multiples of `multiple` neurons down to an eighth."""
    least = max(multiple, whole // 8)
    return (whole, *(width for width in range(whole - 1, least - 1, -1) if width % multiple == 0))


def open_shapes(
    cache: Path,
    bench: Bench,
    sample: Sample,
    teacher: str,
    data: Prepared,
    tokens: tuple[int, ...],
    notify: Callable[[str], None],
    moments: HeldMoments | None = None,
) -> Shapes:
    """Return the scores of a teacher's cuts that are known. The importance of its parts is measured if it is missing.

    Args:
        cache: Root of caches.
        bench: The teacher.
        sample: The calibration text.
        teacher: The teacher's fingerprint.
        data: The data that the text is from.
        tokens: As for `shapes_file`.
        notify: Called with messages about progress.
        moments: As for `Shapes`.
    """
    with bench.shown({}):
        importance = ensure_importance(
            lambda: bench.model,
            teacher_fingerprint=teacher,
            data_fingerprint=data.fingerprint,
            data=load_split(data.folder, "train"),
            root=cache / "calibrations",
            device=bench.device,
        )
    path = shapes_file(cache, teacher, data.fingerprint, tokens, bench.scoring)
    mark_used(path)
    return Shapes(path, bench, sample, PartImportance.load(importance), notify, moments=moments)


def shapes_file(cache: Path, teacher: str, data: str, tokens: tuple[int, ...], scoring: Scoring = "float32") -> Path:
    """Return the file of the scores of a teacher's cuts on a text. Its name also depends on the code that makes them.

    Args:
        cache: Root of caches.
        teacher, data: Fingerprints.
        tokens: Number of tokens of the calibration sample, of the held-out sample and of a sequence.
        scoring: Precision of products.
    """
    code = code_of((quantization, inference, student), ("bench", "library", "shapes"))
    return cache / "solve" / f"{content_hash([teacher, data, list(tokens), code, scoring], 16)}-shapes.json"


def _read(path: Path) -> dict[str, Any]:
    """Return the file's scores, or empty ones if it is missing or damaged. It is then made again."""
    try:
        held = read_json(path)
    except InputError:
        held = {}
    return {name: held.get(name, {}) for name in ("gradients", "ffn", "groups", "spans", "joint")}


def _as_wide(made: Refit | None, matrix: Tensor) -> Tensor:
    """Return the last matrix of a cut FFN or attention, with zeros for the removed neurons or heads."""
    assert made is not None
    found = torch.zeros_like(matrix)
    found[:, made.columns] = made.matrix
    return found


def _ffn_key(layer: int, width: int | str) -> str:
    return f"{layer}={width}"
