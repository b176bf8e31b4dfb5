"""Detects teachers whose weights are quantised already, and finds the scheme that keeps their codes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from autodistill.distillation.teacher.own_scales import lies_on, own_scales, parts_of, returns, worth_trying
from autodistill.distillation.teacher.resolve import Teacher, TeacherRef
from autodistill.errors import InputError
from autodistill.models.families import WHOLE_FAMILIES, get_family, names_of
from autodistill.models.gguf_reader import GgufFile, GgufTensor, read_gguf
from autodistill.models.model_folder import MORE_TEMPLATES, linked, weight_files
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec
from autodistill.models.whole.mixtures import stored_parts
from autodistill.quantization.formats import TYPES, Format, all_formats, weights_bytes
from autodistill.quantization.grids import Floats, Grid, Scales, Storage
from autodistill.quantization.learned_scales import SCALES_FILE, write_scales
from autodistill.quantization.packing import (
    Arrays,
    unpack_codes,
)
from autodistill.quantization.scheme import QuantizationScheme, scheme_by_tensor
from autodistill.strategy.deployment import Deployment, serving
from autodistill.utils.file_locks import exclusive
from autodistill.utils.json_files import write_json

_VERSION = 4  # of the records that this module writes: raise it with any change of them
_ROWS, _SAMPLE = 8, 2**14  # most rows, and weights, of a matrix that are sampled to detect a grid
_ROLES = {Role.LINEAR: "matrices", Role.EMBEDDING: "table", Role.HEAD: "head"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_KEEPABLE = ("attention", "embeddings", "head")


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """How the weights of an already quantised teacher are stored.

    Attributes:
        types: The types of its weights in words, like "its matrices lie on Q4_1, its table on Q8_0".
        deployment: The deployment that stores each tensor in its own type, or None if no format here can.
        exact: Whether weights packed for this deployment equal the teacher's, bit for bit.
    """

    types: str
    deployment: Deployment | None
    exact: bool

    @property
    def note(self) -> str:
        """Return what the user must know about it, as one sentence."""
        said = f"the teacher is pre-quantised: {self.types}"
        if self.deployment is None:
            return f"{said}, and no format here can give each tensor these types; {_TWICE}"
        loss = "without any loss" if self.exact else "with hardly any loss"
        return f"{said}, which {self.deployment.name} stores {loss}; {_TWICE}"

    @property
    def name(self) -> str:
        """The name of its deployment, or its types if it has no deployment."""
        return self.types if self.deployment is None else self.deployment.name


def with_own(own: Deployment, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Return the deployments, and the one with a teacher's own codes if none has its scheme.

    If all given deployments of its runtime have the same cache types, it gets these too.
    """
    others = tuple(deployments)
    caches = {one.cache_types for one in others if one.runtime == own.runtime}
    if len(caches) == 1:
        ((keys, values),) = caches
        own = replace(own, cache_type_k=keys, cache_type_v=values)
    return others if any(own.scheme == one.scheme for one in others) else (*others, own)


_TWICE = (
    "the teacher in 16 bits is the dequantised model, not the one that it was quantised from, and other quantisation "
    "schemes round it a second time"
)


def stored_as(ref: TeacherRef, teacher: Teacher, spec: ModelSpec, cache: Path) -> tuple[Teacher, StoredAs | None]:
    """Return how a teacher is stored, if it is quantised already. The result is kept next to the teachers in the cache.

    A GGUF file states the types of its tensors. In a folder, some rows of each matrix are rounded to each grid. Weights
    lie on a grid if this changes them far less than it would change normal weights. If fitted scales do not restore all
    weights, the teacher's own scales are written to the folder like learned scales (`learned_scales`).

    Args:
        ref: The reference that was found.
        teacher: The teacher that was made from it.
        spec: The teacher's shape.
        cache: Root of caches.

    Returns:
        The teacher, in a folder with its own scales if these are needed; and how it is stored, or None if its weights
            are on no grid.
    """
    record = cache / "teachers" / f"{teacher.fingerprint}.stored.json"
    with exclusive(record):
        known = _known(record, teacher, record.with_name(teacher.fingerprint))
        if known is not None:
            return known
        file = read_gguf(ref.path) if ref.kind == "gguf" and ref.path is not None else None
        found = of_gguf(file, spec) if file else of_folder(teacher.folder, spec)
        deployment, scaled = found and found.deployment, False
        if found and deployment:
            own = _own_of_gguf(file, deployment, spec) if file else _own_of_folder(teacher.folder, deployment, spec)
            found = replace(found, exact=own.exact)
            if scaled := bool(own.scales):
                teacher = _with_scales(teacher, deployment, own.scales, record.with_name(teacher.fingerprint))
        write_json(record, {"version": _VERSION, "scaled": scaled, "stored": found and _to_json(found)})
    return teacher, found


def _to_json(found: StoredAs) -> dict[str, Any]:
    deployment = found.deployment and found.deployment.to_json()
    return {**asdict(replace(found, deployment=None)), "deployment": deployment}


def _known(record: Path, teacher: Teacher, folder: Path) -> tuple[Teacher, StoredAs | None] | None:
    """Return the result of an earlier search, or None if it is missing, outdated or incomplete."""
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        if held["version"] != _VERSION or (held["scaled"] and not (folder / SCALES_FILE).is_file()):
            return None
        stored = held["stored"]
        deployment = stored and stored["deployment"] and Deployment.from_json(stored["deployment"])
        found = stored and StoredAs(**{**stored, "deployment": deployment})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (replace(teacher, folder=folder.resolve()) if held["scaled"] else teacher), found


# Schemes that store each tensor without a change.


def quantization_schemes() -> Mapping[str, QuantizationScheme]:
    """Return every scheme of every format by name, with all weights on the grid. Schemes of plug-ins come last."""
    return _schemes(tuple(all_formats().values()))


@cache
def _schemes(forms: tuple[Format, ...]) -> Mapping[str, QuantizationScheme]:
    known = {}
    for form in forms:
        for storage in form.linears:
            grid = (16, 0, True) if isinstance(storage, str) else (storage.bits, storage.group_size, storage.symmetric)
            scheme = QuantizationScheme(format=form.name, bits=grid[0], group_size=grid[1], symmetric=grid[2])
            known[scheme.name] = scheme
    return known


def stored_types(file: GgufFile, spec: ModelSpec) -> list[tuple[TensorSpec, str]]:
    """Return the ggml type of each tensor of a file.

    Empty if `spec` lacks a matrix of it, such as one of experts, or if its family is trained whole.
    """
    from gguf import GGMLQuantizationType

    if spec.architecture in WHOLE_FAMILIES:
        return []
    known, family = {tensor.name: tensor for tensor in spec.tensors}, get_family(spec.architecture)
    found = [(known.get(str(family.from_gguf_name(one.name))), one) for one in file.tensors]
    if any(tensor is None and len(one.shape) > 1 for tensor, one in found):
        return []
    return [(tensor, GGMLQuantizationType(one.type).name) for tensor, one in found if tensor is not None]


def storing(types: Sequence[tuple[TensorSpec, str]], *, keeping: bool = False) -> QuantizationScheme | None:
    """Return the GGUF scheme that stores each tensor as that ggml type, or None.

    If no row consists of whole super-blocks, a K-quant falls back to its stand-in type. The stand-in's own format is
    then preferred.

    Args:
        types: The result of `stored_types`.
        keeping: Whether the scheme may keep parts of the model off its grid, or name a type for each matrix.
    """
    of_gguf = [scheme for scheme in quantization_schemes().values() if scheme.container == "gguf" and types]
    if keeping and any(kind == "F16" for _, kind in types):
        kept = [parts for count in (1, 2, 3) for parts in combinations(_KEEPABLE, count)]
        of_gguf += [replace(one, keep=parts) for parts in kept for one in of_gguf if isinstance(one.linear, Grid)]
    known = next((scheme for scheme in of_gguf if _stores(scheme, types)), None)
    return _by_tensor(types) if known is None and keeping else known


def _by_tensor(types: Sequence[tuple[TensorSpec, str]]) -> QuantizationScheme | None:
    """Return the GGUF scheme that names these types matrix by matrix, or None if a type cannot be written here."""
    matrices = {tensor: kind.lower() for tensor, kind in types if tensor.role in _ROLES}
    if not matrices or not set(matrices.values()) <= set(TYPES):
        return None
    found = scheme_by_tensor(matrices)
    return found if _stores(found, types) else None


def _stores(scheme: QuantizationScheme, types: Iterable[tuple[TensorSpec, str]]) -> bool:
    try:
        return all(_type_name(scheme.storage(tensor)) == kind for tensor, kind in types)
    except InputError:  # its groups do not divide the rows
        return False


def _type_name(storage: Storage) -> str:
    if not isinstance(storage, Grid):
        return storage.removesuffix("_plus_1").upper()
    name = storage.name.removeprefix(f"{storage.container}-")
    return name.upper() if storage.container == "gguf" else name


def _in_words(types: Iterable[tuple[TensorSpec, str]]) -> str:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for tensor, kind in types:
        if tensor.role in _ROLES:
            found[_ROLES[tensor.role]][kind] = None
    return ", ".join(
        f"its {what} {'lie ' if what == 'matrices' else ''}on {' and '.join(kinds)}" for what, kinds in found.items()
    )


def _served(scheme: QuantizationScheme) -> Deployment:
    return Deployment(runtime=serving(scheme)[0], **asdict(scheme))


def of_gguf(file: GgufFile, spec: ModelSpec) -> StoredAs | None:
    """Return how a GGUF file stores its weights, or None if its linear layers are floating-point."""
    types = sorted(stored_types(file, spec), key=lambda one: one[0].role is not Role.LINEAR)
    if all(kind in _FLOATS for tensor, kind in types if tensor.role is Role.LINEAR):
        return None
    scheme = storing(types, keeping=True)
    return StoredAs(
        types=_in_words(types),
        deployment=_served(scheme) if scheme else None,
        exact=False,
    )


def of_folder(folder: Path, spec: ModelSpec) -> StoredAs | None:
    """Return how a folder stores its weights, judged by how little some rows change when they are quantised.

    If several schemes fit, the one with the fewest bytes is returned.
    """
    left = sorted(_schemes_on_grid(spec), key=lambda scheme: weights_bytes(spec.tensors, scheme))
    # Linear layers come first, since tables may be stored in other ways. For most teachers, one matrix decides.
    matrices = sorted((one for one in spec.tensors if len(one.shape) == 2), key=lambda one: one.role is not Role.LINEAR)
    with _opened(folder, spec) as weights:
        for tensor in matrices:
            if not left:
                return None
            sample = weights.rows(tensor)
            grids = {storage for scheme in left if isinstance(storage := scheme.storage(tensor), Grid)}
            moved = {grid for grid in grids if not lies_on(sample, grid)}
            left = [scheme for scheme in left if scheme.storage(tensor) not in moved]
    if not left:
        return None
    types = [(tensor, _type_name(left[0].storage(tensor))) for tensor in matrices]
    return StoredAs(types=_in_words(types), deployment=_served(left[0]), exact=False)


def _schemes_on_grid(spec: ModelSpec) -> Iterator[QuantizationScheme]:
    """Yield the schemes that the model's shape allows and whose linear layers are on a grid."""
    for scheme in quantization_schemes().values():
        if isinstance(scheme.linear, Grid):
            try:
                scheme.check_model(spec.tensors)
            except InputError:
                continue
            yield scheme


# The teacher's own codes.


@dataclass(frozen=True, kw_only=True)
class _OwnScales:
    """Own scales, by name, of tensors that fitted scales do not restore, and whether all tensors are restored."""

    scales: dict[str, Scales]
    exact: bool


def _own_of_gguf(file: GgufFile, scheme: QuantizationScheme, spec: ModelSpec) -> _OwnScales:
    known, own, exact = {tensor.name: tensor for tensor in spec.tensors}, dict[str, Scales](), True
    for stored in file.tensors:
        tensor = known[str(file.family.from_gguf_name(stored.name))]
        storage, values = scheme.storage(tensor), file.values(stored)
        scales = _of_blocks(file, stored, storage) if isinstance(storage, Grid) else None
        if returns(values, storage):
            continue
        if scales is not None and returns(values, storage, scales):
            own[tensor.name] = scales
        else:
            exact = False
    return _OwnScales(scales=own, exact=exact)


def _of_blocks(file: GgufFile, tensor: GgufTensor, grid: Grid) -> Scales:
    arrays: Arrays = {"data": file.blocks(tensor)}
    return unpack_codes(arrays, grid, tensor.shape)[1]


def _own_of_folder(folder: Path, scheme: QuantizationScheme, spec: ModelSpec) -> _OwnScales:
    """Return the scales with which the weights of a folder change least."""
    own, exact = dict[str, Scales](), True
    with _opened(folder, spec) as weights:
        for tensor in spec.tensors:
            storage, values = scheme.storage(tensor), weights.whole(tensor)
            if returns(values, storage):
                continue
            if isinstance(storage, Grid) and worth_trying(values[:_ROWS], storage):
                parts = [own_scales(values[rows], storage) for rows in parts_of(values)]
                joined = (np.concatenate(part) for part in zip(*parts, strict=True) if part[0] is not None)
                own[tensor.name] = Scales(*joined)
            exact = exact and tensor.name in own and returns(values, storage, own[tensor.name])
    return _OwnScales(scales=own, exact=exact)


def _with_scales(teacher: Teacher, scheme: QuantizationScheme, scales: Mapping[str, Scales], folder: Path) -> Teacher:
    """Return the teacher in a folder of the cache, with its scales. A user's files are linked, not changed."""
    partial = Path(tempfile.mkdtemp(prefix=".stored-", dir=folder.parent))
    try:
        if teacher.folder == folder.resolve():
            write_scales(partial, scheme, scales)
            os.replace(partial / SCALES_FILE, folder / SCALES_FILE)
            return teacher
        shutil.copytree(teacher.folder, partial, dirs_exist_ok=True, copy_function=linked, ignore=_not_read)
        write_scales(partial, scheme, scales)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(teacher, folder=folder.resolve())


def _not_read(folder: str, names: Sequence[str]) -> list[str]:
    """Return the entries of a teacher's folder to leave out: subfolders, and scales of another scheme."""
    return [
        name
        for name in names
        if name == SCALES_FILE or (name != MORE_TEMPLATES and os.path.isdir(os.path.join(folder, name)))
    ]


class _Weights:
    """The tensors of a folder, each read on demand.

    Args:
        files: The files that hold a tensor, with its name there, by its name in transformers. Several for the matrices
            of experts, which have as many rows each.
    """

    def __init__(self, files: Mapping[str, Sequence[tuple[Any, str]]]) -> None:
        self._files = files

    def rows(self, tensor: TensorSpec) -> Floats:
        """Return some rows of a matrix, evenly spread over it, in float32."""
        import torch  # imported here, because reading a GGUF file's types does not need it

        matrices = [file.get_slice(stored) for file, stored in self._files[tensor.name]]
        rows, columns = tensor.shape
        count = max(1, min(_ROWS, _SAMPLE // columns, rows))
        chosen = (divmod(row, rows // len(matrices)) for row in np.linspace(0, rows - 1, count).astype(int).tolist())
        parts = [matrices[place][row : row + 1] for place, row in chosen]
        values: Floats = torch.cat(parts).float().numpy()
        return values

    def whole(self, tensor: TensorSpec) -> Floats:
        """Return all values of a tensor in float32; matrices of experts are stacked by rows."""
        import torch

        parts = [file.get_tensor(stored) for file, stored in self._files[tensor.name]]
        values: Floats = torch.cat(parts).float().numpy()
        return values


@contextmanager
def _opened(folder: Path, spec: ModelSpec) -> Iterator[_Weights]:
    head = f"{names_of(spec.architecture).stored_head}.weight"
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
        held = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        names = {
            tensor.name: list(stored_parts(tensor, spec)) or [tensor.name if tensor.name in held else head]
            for tensor in spec.tensors
        }
        missing = next((name for name, parts in names.items() if not held.keys() >= {*parts}), None)
        if missing is not None:
            raise InputError(f"the weights in {folder} lack {missing}, which its config.json asks for")
        yield _Weights({name: [(held[part], part) for part in parts] for name, parts in names.items()})
