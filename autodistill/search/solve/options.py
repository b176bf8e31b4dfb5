"""The options for storing a model: the types of each matrix and of the cache, with their bytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product

from autodistill.distillation.student.shapes import MULTIPLE
from autodistill.errors import InputError
from autodistill.estimates.block_times import BlockTimes
from autodistill.estimates.fit import check_holds, latencies
from autodistill.estimates.serving_memory import MemoryEstimate, check_evaluated_cache, memory, onnx_bytes
from autodistill.export.graphs.onnx_graph import data_bytes
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit, TierBudget, on_gpu
from autodistill.hardware.catalog import device_classes
from autodistill.hardware.device import DISCRETE
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.formats import CACHE_BYTES, INTEGER_TYPES, TYPES, as_held, tensor_bytes, weights_bytes
from autodistill.quantization.grids import Grid, Storage
from autodistill.quantization.scheme import QuantizationScheme, scheme_by_tensor
from autodistill.strategy.deployment import FUSED, IN_16_BITS, Deployment, serving
from autodistill.strategy.restriction import Restriction

KEYS, VALUES, CACHE = "cache keys", "cache values", "cache"
"""Names of the two halves of the cache, and of both together, in a choice."""

_IN_A_LAYER = re.compile(r"\.\d+\.(.+?)(?:\.weight)?$")


def _kernels(storage: Storage) -> bool:
    """Return whether vLLM computes with a type of compressed-tensors and transformers loads it in a mixture."""
    if not isinstance(storage, Grid):
        return True
    if not storage.symmetric:
        return False
    bits, group_size, symmetric = storage.bits, storage.group_size, storage.symmetric
    scheme = QuantizationScheme(format="compressed-tensors", bits=bits, group_size=group_size, symmetric=symmetric)
    return "vllm" in serving(scheme)


_IN_VLLM: Mapping[str, Storage] = {kind: one for kind, one in INTEGER_TYPES.items() if _kernels(one)}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One choice of types for the tables and the cache. All solutions with this choice form a family.

    Attributes:
        tables: Type of each table, by name.
        cache_types: Types of keys and values.
        bytes: Memory of the process with the smallest types for all other matrices.
        weights_bytes: The part of it that all weights take.
    """

    tables: Mapping[str, str]
    cache_types: tuple[str, str]
    bytes: int
    weights_bytes: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """The types in which a runtime can hold each matrix and the cache of a model.

    Attributes:
        spec: The model's shape.
        budget: The budget, with the context and the batch for its memory and the device that the memory belongs to.
        cache_type: The only type of keys and values that may be chosen; None for all.
        without_caches: Pairs of types of keys and values that may not be chosen.
        limits: Restrictions by a space.
        fixed: The only storage that may be chosen, regardless of all else; None if types are chosen.
        file_bytes: Limit of the bytes of all weights in a file; None for no limit.
        cuts: Whether students that are cut from the model may be chosen.
        times: Times of the model's blocks on the budget's device, if they were measured.
        runtime: One of `solve_request.RUNTIMES`. In vLLM tables and cache have 16 bits, and fused layers have one type.
            In ONNX Runtime codes have 4 or 8 bits, and the cache has no choice of types.
    """

    spec: ModelSpec
    budget: Budget
    cache_type: str | None = None
    without_caches: frozenset[tuple[str, str]] = frozenset()
    limits: Restriction = field(default_factory=Restriction)
    fixed: Deployment | None = None
    file_bytes: int | None = None
    cuts: bool = True
    times: BlockTimes | None = None
    runtime: str = "llama.cpp"

    @property
    def held(self) -> Mapping[str, Storage]:
        """The types in which the runtime holds matrices, by name, the most bits first."""
        return _IN_VLLM if self.runtime == "vllm" else TYPES

    def size(self, tensor: TensorSpec, kind: str) -> int:
        """Return the bytes that a matrix of a type takes in the runtime."""
        if self.runtime == "onnxruntime":
            return onnx_bytes(tensor, self.held[kind], tied=self.spec.tied)
        return tensor_bytes(tensor, self.held[kind])

    @property
    def multiple(self) -> int:
        """FFN widths are multiples of so many neurons, for full speed on the budget's device (64 if unknown)."""
        if isinstance(self.budget, DeviceBudget):
            return self.budget.device.kind.ffn_multiple
        return device_classes()[DISCRETE].ffn_multiple if on_gpu(self.budget) else MULTIPLE

    @property
    def free(self) -> Options:
        """The same options without a space's restrictions. All of these are scored."""
        return replace(self, limits=Restriction(), fixed=None)

    @property
    def _listed(self) -> tuple[Deployment, ...]:
        """The storages that a space lists, or none if one of them is fixed already."""
        return (self.limits.fixed or ()) if self.fixed is None else ()

    def variants(self) -> tuple[Options, ...]:
        """Return options for each listed storage that can hold the model, or only these options if none are listed."""
        if not self._listed:
            return (self,)
        found = []
        for one in self._listed:
            with suppress(InputError):
                (variant := replace(self, fixed=one)).check()
                found.append(variant)
        return tuple(found)

    @cached_property
    def matrices(self) -> dict[str, TensorSpec]:
        """The matrices of linear layers, by name."""
        return {tensor.name: tensor for tensor in self.spec.tensors if tensor.role is Role.LINEAR}

    @cached_property
    def tables(self) -> dict[str, TensorSpec]:
        """The embedding and an untied head, by name."""
        return {tensor.name: tensor for tensor in self.spec.tensors if tensor.role in (Role.EMBEDDING, Role.HEAD)}

    def kinds(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return the types that a matrix may have and whose blocks divide its rows, the most bits first.

        If a space allows only types with large blocks that do not divide the rows, llama.cpp's fallback types are
        allowed.
        """
        if self.fixed is not None:
            return self._of_storages({self.fixed.storage(tensor)}, tensor)
        linear, row = tensor.role is Role.LINEAR, tensor.shape[1]
        if (linear, row) not in self._kinds:
            self._kinds[linear, row] = self._of_storages(self._storages(tensor), tensor)
        return self._kinds[linear, row]

    @cached_property
    def _kinds(self) -> dict[tuple[bool, int], tuple[str, ...]]:
        """Cache of `kinds`, which is called very often. Its keys are whether a layer is linear, and the row length."""
        return {}

    def _storages(self, tensor: TensorSpec) -> set[Storage]:
        if self.runtime == "vllm" and tensor.role is not Role.LINEAR:
            return {"bf16"}
        if self.limits.kinds is None or tensor.role is not Role.LINEAR:
            return set(self.held.values())
        allowed = {TYPES[kind] for kind in self.limits.kinds}
        dividing = {one for one in allowed if _divides(one, tensor)}
        return dividing or {one.fallback for one in allowed if isinstance(one, Grid) and one.fallback}

    def _of_storages(self, storages: set[Storage], tensor: TensorSpec) -> tuple[str, ...]:
        return tuple(kind for kind, one in self.held.items() if one in storages and _divides(one, tensor))

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The names of the linear layers' matrices, in sets that must share one type."""
        sets: dict[str, list[str]] = {}
        for name in self.matrices:
            layer, _, part = name.removesuffix(".weight").rpartition(".")
            fused = next((one for one in FUSED if part in one), None) if self.runtime == "vllm" else None
            sets.setdefault(f"{layer}.{fused[0]}" if fused else name, []).append(name)
        return tuple(map(tuple, sets.values()))

    def allows(self, deployment: Deployment) -> bool:
        """Return whether a storage may be chosen."""
        if self.limits.fixed is not None:
            return deployment in self.limits.fixed
        types = self.types(deployment)
        return all(types[name] in self.kinds(tensor) for name, tensor in (self.matrices | self.tables).items())

    @cached_property
    def caches(self) -> tuple[tuple[str, str], ...]:
        """Pairs of types for keys and values whose blocks divide a head.

        On a GPU both have the same type, since llama.cpp's usual builds have no kernels for other pairs.
        """
        if self.fixed is not None:
            return (self.fixed.cache_types,)
        if self.runtime != "llama.cpp":
            return (("f16", "f16"),)
        found = []
        for pair in ((keys, values) for keys in CACHE_BYTES for values in CACHE_BYTES):
            try:
                check_evaluated_cache(self.spec, "llama.cpp", pair)
            except InputError:
                continue
            if pair in self.without_caches or (self.cache_type is not None and pair != (self.cache_type,) * 2):
                continue
            if pair[0] == pair[1] or not (on_gpu(self.budget) or self.spec.latent):
                found.append(pair)
        return tuple(found)

    def smallest_types(self) -> dict[str, str]:
        """Return the type with the fewest bytes for every matrix."""
        found: dict[str, str] = {}
        least: dict[tuple[Role, tuple[int, ...], tuple[str, ...]], str] = {}  # of matrices that differ only in names
        for name, tensor in (self.matrices | self.tables).items():
            key = (tensor.role, tensor.shape, self.kinds(tensor))
            if key not in least:
                least[key] = min(key[2], key=lambda kind: self.size(tensor, kind))
            found[name] = least[key]
        return found

    def families(self) -> tuple[Family, ...]:
        """Return every choice of types for tables and cache, whether the budget holds it or not."""
        anywhere = Budget(memory_bytes=1, context=self.budget.context, batch=self.budget.batch)
        if on_gpu(self.budget):
            anywhere = TierBudget(memory_bytes=1, context=anywhere.context, batch=anywhere.batch, tier_bytes=1)
        return _families(replace(self, budget=anywhere, file_bytes=None, cuts=True, times=None))

    def deployment(self, types: Mapping[str, str], cache_types: tuple[str, str]) -> Deployment:
        """Return the deployment with a type for every matrix, by name, and two types for the cache."""
        if self.fixed is not None:
            return self.fixed
        tensors = self.matrices | self.tables
        by_tensor = {tensors[name]: kind for name, kind in types.items()}
        if self.runtime == "vllm":
            if set(types.values()) == {"bf16"}:
                return replace(IN_16_BITS, runtime="vllm")
            scheme = scheme_by_tensor(by_tensor, "compressed-tensors")
        else:
            scheme = scheme_by_tensor(by_tensor)
        return Deployment(
            runtime=self.runtime,
            format=scheme.format,
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            types=scheme.types,
            cache_type_k=cache_types[0],
            cache_type_v=cache_types[1],
        )

    def types(self, deployment: Deployment) -> dict[str, str]:
        """Return the type of every matrix in a deployment, by name: the inverse of `deployment`."""
        names = {storage: kind for kind, storage in self.held.items()}
        return {name: names[deployment.storage(tensor)] for name, tensor in (self.matrices | self.tables).items()}

    def memory(self, deployment: Deployment, weights: int | None = None) -> MemoryEstimate:
        """Return the memory of the process, or of the GPU. `weights` is the bytes of all tensors, if they are known."""
        budget = self.budget
        return memory(
            self.spec,
            deployment,
            context=budget.context,
            batch=budget.batch,
            weights=weights,
            on_gpu=on_gpu(budget),
        )

    def file_sizes(self, deployment: Deployment) -> tuple[int, int]:
        """Return the bytes of all weights in the file, and in a GGUF file of the same types."""
        held = as_held(self.spec, deployment).tensors
        usual = weights_bytes(held, deployment)
        return (data_bytes(held, deployment) if self.runtime == "onnxruntime" else usual), usual

    def fits(self, deployment: Deployment, limit: int | None = None) -> bool:
        """Return whether a storage is within the limits of memory, file size and latency.

        Args:
            deployment: The storage.
            limit: Limit of memory in bytes; by default the budget's.
        """
        return self.fits_memory(deployment, limit) and self.in_time(deployment)

    def fits_memory(self, deployment: Deployment, limit: int | None = None) -> bool:
        """Return whether a storage is within the limits of memory and file size."""
        need = self.memory(deployment)
        held = need.total_bytes <= (self.budget.memory_bytes if limit is None else limit)
        return held and self.fits_file(need.weights_bytes)

    def fits_file(self, weights: int) -> bool:
        """Return whether so many bytes of weights are within the limit of the file size."""
        return self.file_bytes is None or weights <= self.file_bytes

    def in_time(self, deployment: Deployment) -> bool:
        """Return whether a storage is predicted to keep to the budget's limits of latency."""
        return all(seconds <= one.seconds for one, seconds in self.latencies(deployment).items())

    def latencies(self, deployment: Deployment) -> dict[LatencyLimit, float]:
        """Return the predicted seconds of a storage for each of the budget's limits of latency."""
        return latencies(self.spec, deployment, self.budget, self.times)

    def shares(self, base: Deployment, limits: Collection[LatencyLimit]) -> dict[tuple[str, str], float]:
        """Return the change of latency, as a share of its limits, if one part of a storage had another type.

        Args:
            base: The storage.
            limits: Limits whose shares are summed.

        Returns:
            Changes by name and type. The name is the first matrix of a set that shares one type, or a table, or
            `CACHE`. For `CACHE` the type is those of keys and values with a comma between them.
        """

        def taken(deployment: Deployment) -> float:
            found = self.latencies(deployment)
            return sum(found[limit] / limit.seconds for limit in limits)

        whole, types = taken(base), self.types(base)
        found: dict[tuple[str, str], float] = {}
        first: dict[tuple[str, tuple[int, ...]], tuple[str, ...]] = {}
        changes: dict[tuple[tuple[str, ...], str], float] = {}
        for names in (*self.tied, *((name,) for name in self.tables)):
            tensor = (self.matrices | self.tables)[names[0]]
            # Matrices of the same name and shape in all layers take equally long, so only one of them is timed.
            one = first.setdefault((alike(names[0]), tensor.shape), names)
            for kind in self.kinds(tensor):
                if (one, kind) not in changes:
                    changed = self.deployment(types | dict.fromkeys(one, kind), base.cache_types)
                    changes[one, kind] = taken(changed) - whole
                found[names[0], kind] = changes[one, kind]
        for pair in self.caches:
            found[CACHE, ",".join(pair)] = taken(self.deployment(types, pair)) - whole
        return found

    def fastest(self, limit: LatencyLimit) -> Deployment:
        """Return the storage with the least latency for one limit, regardless of its memory."""
        base = self.smallest()[0]
        shares = self.shares(base, (limit,))
        best: dict[str, str] = {}
        for name, kind in shares:
            if name not in best or shares[name, kind] < shares[name, best[name]]:
                best[name] = kind
        keys, values = best.pop(CACHE).split(",")
        every = {name: best[names[0]] for names in self.tied for name in names}
        return self.deployment(every | {name: best[name] for name in self.tables}, (keys, values))

    def smallest(self) -> tuple[Deployment, MemoryEstimate]:
        """Return the storage with the least memory, and its memory."""
        return self._smallest

    @cached_property
    def _smallest(self) -> tuple[Deployment, MemoryEstimate]:
        if self._listed:
            return min((one.smallest() for one in self.variants()), key=lambda one: one[1].total_bytes)
        family = min(self.families(), key=lambda one: one.bytes)
        found = self.deployment(self.smallest_types() | dict(family.tables), family.cache_types)
        return found, self.memory(found)

    def check(self) -> None:
        """Refuse a model that the runtime cannot hold in any of the types.

        Raises:
            InputError: The runtime does not compute a part of the model. Or no type's blocks divide the rows of a
                matrix, or the cache's blocks do not divide a head.
        """
        if self._listed:
            if not self.variants():
                for one in self._listed:
                    replace(self, fixed=one).check()
            return
        for name, tensor in (self.matrices | self.tables).items():
            if not self.kinds(tensor):
                raise InputError(
                    f"the space allows no type for {name}, since its rows of {tensor.shape[1]} weights cannot be "
                    f"divided into blocks of {', '.join(self.limits.kinds or ())}: allow other types in finishing"
                )
        kind = self.cache_type or "f16"
        check_holds(self.spec, self.deployment(self.smallest_types(), (kind, kind)))


@lru_cache(128)  # a search asks for the families of the same few shapes again and again
def _families(options: Options) -> tuple[Family, ...]:
    smallest = options.smallest_types()
    stored = []
    for kinds in product(*(options.kinds(tensor) for tensor in options.tables.values())):
        tables = dict(zip(options.tables, kinds, strict=True))
        deployment = options.deployment(smallest | tables, ("f16", "f16"))
        stored.append((tables, deployment, weights_bytes(as_held(options.spec, deployment).tensors, deployment)))
    found = []
    for cache_types in options.caches:
        for tables, deployment, weights in stored:
            cached = deployment if options.fixed is not None else with_cache(deployment, cache_types)
            need = options.memory(cached, weights)
            family = Family(
                tables=tables, cache_types=cache_types, bytes=need.total_bytes, weights_bytes=need.weights_bytes
            )
            found.append(family)
    return tuple(found)


def _divides(storage: Storage, tensor: TensorSpec) -> bool:
    return not isinstance(storage, Grid) or storage.divides(tensor.together)


def alike(name: str) -> str:
    """Return the part of a matrix's name that all layers have in common, like "mlp.down_proj"."""
    found = _IN_A_LAYER.search(name)
    return found[1] if found else name


def with_cache(deployment: Deployment, cache_types: tuple[str, str]) -> Deployment:
    """Return the deployment of the same weights with another cache."""
    return replace(deployment, cache_type_k=cache_types[0], cache_type_v=cache_types[1])
