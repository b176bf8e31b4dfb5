"""Puts a model into one storage after another and measures how far each is from the teacher on some text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.any_model import load_any, transposed
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.evaluation.base import Scoring
from autodistill.evaluation.precision import multiplying_in, scored_in
from autodistill.evaluation.statistics import clustered_mean, paired_bootstrap
from autodistill.export.whole.file import column_orders
from autodistill.inference.batching import map_sequences
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import choices, score, score_teacher
from autodistill.inference.watching import Taken, chances_of, of_drawn_tokens, watched, watched_by_block
from autodistill.models.families import FAMILIES, get_family
from autodistill.models.loading import held
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Floats, Grid, Scales, Storage
from autodistill.quantization.learned_scales import read_scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.quantization.weighted_scales import weighted_scales
from autodistill.strategy.deployment import Deployment
from autodistill.utils.plain_dataclass import ToJson


@dataclass(frozen=True, kw_only=True)
class Measured(ToJson):
    """How a storage changes a teacher on some text, per predicted token.

    Attributes:
        kl: KL(teacher || stored teacher) in nats, over the teacher's likeliest tokens, with the rest as one outcome.
        nll: Negative log-likelihood of the text in nats.
        accuracy: Share of the tokens that are the likeliest ones.
        kl_stderr, nll_stderr, accuracy_stderr: Standard errors over documents, or None if there is only one document.
        counts, kl_sums, nll_sums: The number of tokens, the KL and the NLL of each document, for paired comparisons.
    """

    kl: float
    nll: float
    accuracy: float
    kl_stderr: float | None
    nll_stderr: float | None
    accuracy_stderr: float | None
    counts: tuple[float, ...]
    kl_sums: tuple[float, ...]
    nll_sums: tuple[float, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**fields)

    def kl_above(self, other: Measured) -> tuple[float, float]:
        """Return how far this KL is above another one on the same text, and the standard error of the difference."""
        gaps = np.array([np.subtract(self.kl_sums, other.kl_sums)])
        found, errors = paired_bootstrap(gaps, np.array(self.counts))
        return float(found[0]), float(np.nan_to_num(errors[0]))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some sequences and the teacher's own predictions for them.

    Attributes:
        name: "calibration" or "held-out".
        data: The sequences.
        reference: The teacher's predictions.
        teacher: Figures of the unchanged teacher.
    """

    name: str
    data: TokenSet
    reference: TeacherReference
    teacher: Measured


class Bench:
    """Holds a teacher in float32, and lets it compute with the weights as a deployment stores them.

    Only tensors whose storage changes are rounded again. Until `weigh` is called, scales depend on the weights alone.

    Args:
        model: The teacher in float32, on `device`.
        spec: Its shape.
        own: How the teacher's own file stores each tensor, and the scales there, by name. Empty if the file's weights
            lie on no grid.
        device: The device of the model.
        cut: Whether the model is a cut student, which differs from the teacher in every storage.
        keep: Whether to keep scales that were searched for. They take a few bits for each weight and type.
        columns: The order in which a file holds the columns of single matrices, by name. These matrices are rounded in
            this order.
        scoring: Precision of products when text is scored. `choices` and `weigh` always use float32.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        own: Mapping[str, tuple[Storage, Scales]],
        device: str = "cpu",
        *,
        cut: bool = False,
        keep: bool = True,
        scoring: Scoring = "float32",
        columns: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> None:
        self.model, self.spec, self.device, self.cut, self.scoring = model, spec, device, cut, scoring
        self._own = own
        self._columns = {name: torch.from_numpy(order).to(device) for name, order in (columns or {}).items()}
        self._parameters = held(model)
        self._transposed = transposed(model)
        self._reshaped = {name for name, one in self._parameters.items() if one.dim() == 3 or name in self._transposed}
        self._masters: dict[str, Tensor] = {}
        self._shown: dict[str, Storage] = {}
        self._importance: dict[str, Tensor] = {}
        self._searched: dict[tuple[str, str], Scales] | None = {} if keep else None

    @property
    def by_block(self) -> bool:
        """Whether gradients are taken block by block, with those of only one block in memory."""
        return self.spec.architecture in FAMILIES

    @property
    def weighed(self) -> bool:
        """Whether rounding takes the importance of columns into account."""
        return bool(self._importance)

    def weigh(self, data: TokenSet) -> None:
        """From now on, round matrices by the importance of their columns: the mean square of each input on some text.

        A tied table is read as a head and by rows. In a look-up by rows all columns have the same importance, so a tied
        table gets the mean of both.
        """
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        tables = {id(self.model.get_input_embeddings().weight)}
        sums: dict[str, Tensor] = {}
        lock, hooks = Lock(), []
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in names:
                name = names[id(module.weight)]

                def add(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                    # float64 sums hardly round, so the order of the threads does not matter.
                    found = given[0].detach().float().square().flatten(0, -2).sum(0).double()
                    with lock:  # sequences are read on several threads
                        sums[name] = sums[name] + found if name in sums else found

                hooks.append(module.register_forward_pre_hook(add))
        tied = {names[one] for one in tables if one in names}
        try:
            with self.shown({}):
                self.choices(data)
        finally:
            for hook in hooks:
                hook.remove()
        means = {
            name: (found / found.mean().clamp(min=torch.finfo(found.dtype).tiny)).float()
            for name, found in sums.items()
        }
        self._importance = {name: one + 1 if name in tied else one for name, one in means.items()}
        if self._searched is not None:
            self._searched.clear()

    def share_scales(self, found: dict[tuple[str, str], Scales]) -> None:
        """Use scales that were searched for the same model before, by name and storage, and add new ones to them."""
        self._searched = found

    def importance(self, name: str) -> Tensor:
        """Return the importance of each column of a matrix: float32 [in], with a mean of about 1. Needs `weigh`."""
        return self._importance[name]

    def sample(self, name: str, data: TokenSet) -> Sample:
        """Read text with the unchanged teacher."""
        with self.shown({}), self.scored(), self.reading(data) as begun:
            scores, reference = score_teacher(self.model, data, device=self.device, begun=begun)
        return Sample(name=name, data=data, reference=reference, teacher=measured(scores))

    @property
    def reads_together(self) -> bool:
        """Whether it takes much less time to measure a storage on two texts at once than one after the other."""
        return False

    def measure(self, deployment: Deployment, sample: Sample) -> Measured:
        """Return how a deployment of all matrices and the cache changes the teacher."""
        return self.measure_all(deployment, sample)[0]

    def measure_all(self, deployment: Deployment, *samples: Sample) -> tuple[Measured, ...]:
        """Return the same for each of several samples."""
        storages = {tensor.name: deployment.storage(tensor) for tensor in self.spec.tensors}
        return tuple(self.measure_parts(storages, deployment.cache_types, sample) for sample in samples)

    def measure_parts(self, storages: Mapping[str, Storage], cache_types: tuple[str, str], sample: Sample) -> Measured:
        """Return the same if only some tensors, by name, are stored in another way.

        If this leaves the teacher unchanged, its known figures are returned and no text is read.
        """
        with self.shown(storages), quantized_cache(self.model, cache_types):
            if not self.cut and cache_types == ("f16", "f16") and self._is_itself():
                return sample.teacher
            return self._measured(sample)

    def _is_itself(self) -> bool:
        """Return whether the weights in use equal the teacher's own."""
        return all(self._parameters[name].data.equal(master) for name, master in self._masters.items())

    def _measured(self, sample: Sample) -> Measured:
        with self.scored(), self.reading(sample.data) as begun:
            scores, _ = score(self.model, sample.data, sample.reference, device=self.device, begun=begun)
        return measured(scores)

    def scored(self) -> AbstractContextManager[None]:
        """Within the context, products are computed in the precision of `scoring`."""
        return scored_in(self.model, self.scoring, self.device)

    @contextmanager
    def reading(self, data: TokenSet) -> Iterator[Sequence[Tensor] | None]:
        """Within the context, text is scored with the weights in use. Yields what `score` takes as `begun`, or None."""
        yield None

    def choices(self, data: TokenSet) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return what `inference.scoring.choices` does under the weights in use."""
        with self.reading(data) as begun:
            return choices(self.model, data, device=self.device, begun=begun)

    def watched(self, names: Sequence[str], tokens: Tensor, seed: int) -> Iterator[dict[str, list[Taken]]]:
        """Yield the inputs of the teacher's matrices, and gradients at their outputs.

        The gradients are of the log-probability of tokens drawn from the teacher.

        Args:
            names: Names of the matrices.
            tokens: int64 [sequences, length].
            seed: Seed of the drawn tokens.

        Yields:
            The inputs and gradients of some matrices at a time, for each matrix a list with one item per sequence. The
            weights of these matrices are in memory until the next item.
        """
        if self.by_block:
            with self.shown({}), self.scored():
                yield from watched_by_block(self.model, self._block, self.spec.layers, names, tokens, seed, self.device)
            return
        chances, tokens, model = chances_of(tokens, seed), tokens.to(self.device), self.model

        def read(index: int) -> tuple[Tensor, Callable[[], Tensor]]:
            states = model.base_model(input_ids=tokens[index : index + 1], use_cache=False).last_hidden_state
            return states, lambda: of_drawn_tokens(model, states.detach()[0], chances[index])[None]

        def begin(module: nn.Module, taken: tuple[Tensor, ...], rows: Tensor) -> Tensor:
            return rows.detach().requires_grad_()

        # `inputs_embeds` would not do: some models look their tokens up in other tables as well.
        with ExitStack() as stack:
            stack.enter_context(self.shown({}))
            stack.enter_context(self.scored())
            stack.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
            found = watched(model, names, read, len(tokens), self.device)
            yield {name: [one.pop(name, []) for one in found] for name in names}

    @contextmanager
    def _block(self, index: int) -> Iterator[list[str]]:
        """Within the context, a block has its weights. Yields their names."""
        family = get_family(self.spec.architecture)
        parts = {tensor.name: family.layer_part(tensor.name) for tensor in self.spec.tensors}
        yield [name for name, part in parts.items() if part is not None and part[0] == index]

    def measure_weights(
        self, weights: Iterable[tuple[str, Tensor]], cache_types: tuple[str, str], samples: Sequence[Sample]
    ) -> tuple[Measured, ...]:
        """Return how other weights, by name, change the teacher on each of several samples."""
        with self.replaced(weights), quantized_cache(self.model, cache_types):
            return tuple(map(self._measured, samples))

    def master(self, name: str) -> Tensor:
        """Return the teacher's own values of a tensor."""
        return self._masters.get(name, self._parameters[name].data)

    @contextmanager
    def replaced(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Within the context, the model computes with the given weights, by name, and otherwise with its own."""
        with self.shown({}):
            held: dict[str, Tensor] = {}
            try:
                for name, values in weights:
                    held[name] = self._parameters[name].data
                    self._parameters[name].data = values
                yield
            finally:
                for name, values in held.items():
                    self._parameters[name].data = values

    def stored(self, name: str, storage: Storage, weight: Tensor | None = None) -> Tensor:
        """Return the float32 values of a tensor in a storage.

        If the teacher's own file has the tensor in this storage, the file's scales are used.
        """
        master = self.master(name) if weight is None else weight
        rows = self.matrices(name, master).flatten(0, 1) if name in self._reshaped else master
        if (order := self._columns.get(name)) is not None:
            return deploy_tensor(rows[:, order], storage, self.scales(name, storage, master))[:, order.argsort()]
        found = deploy_tensor(rows, storage, self.scales(name, storage, master))
        return self._as_held(name, found) if name in self._reshaped else found

    def in_file(self, name: str, values: Tensor) -> Floats:
        """Return the values of a tensor as a GGUF file holds them; experts are [experts, out, in]."""
        found = self.matrices(name, values) if values.dim() == 3 else values
        found = found[:, self._columns[name]] if name in self._columns else found
        return np.asarray(found.cpu().numpy(), dtype=np.float32)

    def scales(self, name: str, storage: Storage, weight: Tensor | None = None) -> Scales | None:
        """Return the scales of a tensor in a storage, in the file's order of columns.

        Returns None if the scales depend on the weights alone.

        Args:
            name: Name of the tensor.
            storage: The storage.
            weight: Values of the tensor; by default the teacher's own.
        """
        kept, own = self._own.get(name, (None, None))
        if kept == storage:
            return own
        importance = self._importance.get(name)
        if importance is None or not isinstance(storage, Grid) or storage.bits > _MOST_BITS:
            return None
        known = None if self._searched is None else self._searched.get((name, storage.name))
        if known is not None:
            return known
        values = self.master(name) if weight is None else weight
        if (order := self._columns.get(name)) is not None:
            values, importance = values[:, order], importance[order]
        scales, offsets = weighted_scales(values, storage, importance)
        found = Scales(scales.cpu().numpy(), None if offsets is None else offsets.cpu().numpy())
        if self._searched is not None:
            self._searched[name, storage.name] = found
        return found

    def keeps(self, name: str, storage: Storage) -> bool:
        """Return whether a storage leaves a tensor unchanged."""
        return self.stored(name, storage).equal(self.master(name))

    def matrices(self, name: str, values: Tensor) -> Tensor:
        """Return the values of a matrix, or of the experts of a layer, as [matrices, out, in]."""
        found = values.transpose(-1, -2) if name in self._transposed else values
        return found[None] if found.dim() == 2 else found

    def _as_held(self, name: str, rows: Tensor) -> Tensor:
        """Return rows of matrices in the layout of the model's parameter."""
        held = self._parameters[name].shape
        turned = (*held[:-2], held[-1], held[-2]) if name in self._transposed else held
        found = rows.view(turned)
        return found.transpose(-1, -2).contiguous() if name in self._transposed else found

    @contextmanager
    def shown(self, storages: Mapping[str, Storage]) -> Iterator[None]:
        """Within the context, the model computes with the given tensors as stored, and otherwise with its own."""
        for name in [name for name, storage in self._shown.items() if storages.get(name) != storage]:
            self._parameters[name].data = self._masters.pop(name)
            del self._shown[name]
        # The largest first, so that no thread is left with a table at the end.
        missing = [(name, storage) for name, storage in storages.items() if name not in self._shown]
        missing.sort(key=lambda one: -self._parameters[one[0]].numel())
        rounded = map_sequences(lambda index: self.stored(*missing[index]), len(missing), self.device)
        for (name, storage), values in zip(missing, rounded, strict=True):
            self._masters[name] = self._parameters[name].data
            self._parameters[name].data = values
            self._shown[name] = storage
        with torch.no_grad():
            yield


def copying(bench: Bench, text: TokenSet, length: int) -> Sample:
    """Return a sequence that repeats itself, and whose second half is scored. A model that looks back can copy it.

    Short text does not show how a low-bit cache or a removed layer affects the attention to distant tokens.

    Args:
        bench: The teacher.
        text: Text whose distinct tokens are drawn at random.
        length: Length of the sequence in tokens.
    """
    half = length // 2
    drawn = np.random.default_rng(0).choice(np.unique(text.tokens), half).astype(np.int32)
    tokens = np.concatenate([drawn, drawn])[None]
    scored = np.concatenate([np.zeros(half, dtype=bool), np.ones(half, dtype=bool)])[None]
    # The scored half is divided into `_PARTS` documents, so that there is a standard error over them.
    documents = (np.arange(2 * half, dtype=np.int32) // max(1, half // _PARTS))[None]
    return bench.sample("copying", TokenSet(tokens=tokens, documents=documents, answers=scored))


_PARTS = 8


def speeds(types: Mapping[str, Storage] = TYPES, scoring: Scoring = "float32") -> tuple[float, dict[str, float]]:
    """Return this machine's operations per second in matrix products, and the seconds to round one weight to each type.

    Products are timed in the precision in which text is scored.
    """
    device = compute_device()
    rows, weights = torch.ones(_MULTIPLIED, _MULTIPLIED, device=device), torch.randn(*_ROUNDED, device=device)

    def takes(work: Callable[[], Any], times: int) -> float:
        """Return the seconds that some work takes, after an untimed first run."""
        work()
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    with multiplying_in(scoring, device):
        rate = 2 * _MULTIPLIED**3 / takes(lambda: rows @ rows, 10)
    kinds = {kind: takes(partial(_rounded, weights, storage), 2) for kind, storage in types.items()}
    return rate, {kind: seconds / weights.numel() for kind, seconds in kinds.items()}


def _rounded(weights: Tensor, storage: Storage) -> Tensor:
    """Round weights as a bench does that takes the importance of columns into account."""
    if not isinstance(storage, Grid) or storage.bits > _MOST_BITS:
        return deploy_tensor(weights, storage)
    scales, offsets = weighted_scales(weights, storage, torch.ones(weights.shape[1], device=weights.device))
    given = Scales(scales.cpu().numpy(), None if offsets is None else offsets.cpu().numpy())
    return deploy_tensor(weights, storage, given)


# Scales are searched for types of up to so many bits. With more bits the error is small, but the search takes as long.
_MOST_BITS = 5
_MULTIPLIED, _ROUNDED = 1024, (256, 2048)  # sizes of the matrices that are multiplied and rounded to time a machine


def load_bench(teacher: Teacher, spec: ModelSpec, own: Deployment | None, scoring: Scoring = "float32") -> Bench:
    """Load a teacher in float32, on an accelerator if there is one.

    Args:
        teacher: The teacher.
        spec: Its shape.
        own: The deployment that has its own codes, if its file lies on grids of GGUF.
        scoring: As for `Bench`.
    """
    device = compute_device()
    model = load_any(teacher.folder, torch.float32, device)
    columns = column_orders(spec, read_config(teacher.folder))
    return Bench(model, spec, own_scales(teacher, spec, own), device, scoring=scoring, columns=columns)


def compute_device() -> str:
    """Return the device on which teachers are scored: an accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_scales(teacher: Teacher, spec: ModelSpec, own: Deployment | None) -> dict[str, tuple[Storage, Scales]]:
    """Return how the teacher's own file stores each tensor, and the scales there, by name."""
    if own is None:
        return {}
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    return {name: (own.storage(tensors[name]), scale) for name, scale in read_scales(teacher.folder, own).items()}


def measured(scores: TokenScores) -> Measured:
    """Return the figures of single tokens, by document and as a mean. A divergence of None counts as 0."""
    nll, documents = scores.nll, scores.documents
    kl = np.zeros_like(nll) if scores.divergence is None else scores.divergence
    (mean_kl, kl_stderr), (mean_nll, nll_stderr) = clustered_mean(kl, documents), clustered_mean(nll, documents)
    accuracy, accuracy_stderr = clustered_mean(scores.correct, documents)
    _, places = np.unique(documents, return_inverse=True)
    return Measured(
        kl=mean_kl,
        nll=mean_nll,
        accuracy=accuracy,
        kl_stderr=kl_stderr,
        nll_stderr=nll_stderr,
        accuracy_stderr=accuracy_stderr,
        counts=tuple(np.bincount(places).astype(float).tolist()),
        kl_sums=tuple(np.bincount(places, weights=kl).tolist()),
        nll_sums=tuple(np.bincount(places, weights=nll).tolist()),
    )
