"""A GGUF file of a model that is never cut: checks if it is possible, writes it, and reads it back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFWriter

from autodistill.errors import VerificationError
from autodistill.export.base import Artifact, Label
from autodistill.export.gguf_tokenizer import add_tokenizer
from autodistill.export.gguf_writing import (
    FILE,
    FILE_TYPES,
    KINDS,
    STORAGES,
    add_general,
    add_kind,
    add_sampling,
    write_tensor,
)
from autodistill.export.student_reader import StudentFiles, replacing
from autodistill.export.whole.gemma4 import GEMMA4
from autodistill.export.whole.graph import Graph, Part
from autodistill.export.whole.mixtures import MIXTURES
from autodistill.export.whole.qwen3_5 import QWEN3_5
from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.quantization.formats import tensor_bytes
from autodistill.quantization.grids import Floats, Scales, Storage
from autodistill.quantization.packing import pack, unpack
from autodistill.strategy.deployment import Deployment

GRAPHS: Mapping[str, Graph] = {**MIXTURES, "qwen3_5_text": QWEN3_5, "gemma4_text": GEMMA4}
"""Graphs by transformers' `model_type`."""


def cannot_write(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """Return why no GGUF file can be written of a model that cannot be cut; "" if one can, or if it can be cut."""
    name = spec.architecture
    if name not in GRAPHS:
        known = f"no GGUF file is written of {name[:60]!r}; of models of no family, {', '.join(GRAPHS)} are"
        return "" if name in FAMILIES else known
    return GRAPHS[name].refuses(spec, config)


def column_orders(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the column order in a file for each matrix in which it differs from that of transformers."""
    graph = GRAPHS.get(spec.architecture)
    found = {tensor.name: graph.columns(tensor.name, config) for tensor in spec.tensors} if graph else {}
    return {name: order for name, order in found.items() if order is not None}


def write_whole(
    values: Callable[[str], Floats],
    scales: Callable[[str], Scales | None],
    spec: ModelSpec,
    config: Mapping[str, Any],
    deployment: Deployment,
    text: Path,
    out: Path,
    **label: Unpack[Label],
) -> Artifact:
    """Write a model to `out/student.gguf`, one tensor in memory at a time.

    Args:
        values: Returns a tensor in float32. Experts are [experts, out, in]. Columns are as in `column_orders`, else as
            in transformers.
        scales: Returns the scales with which a tensor is packed, or None if they follow from the weights alone.
        spec, config: Description and config of a model that `cannot_write` accepts.
        deployment: How each tensor is stored.
        text: Folder with the tokenizer and the sampling settings.
        out: Folder that the file goes into.
        label: As for `GgufExporter.export`.

    Raises:
        InputError: GGUF cannot hold the tokenizer, or `out` cannot be written.
    """
    graph = GRAPHS[spec.architecture]
    with replacing(out) as partial:
        writer = GGUFWriter(os.fspath(partial / FILE), graph.name)
        try:
            add_kind(writer, FILE_TYPES[deployment.format])
            graph.add_settings(writer, spec, config)
            add_general(writer, spec, **label)
            add_sampling(writer, text)
            add_tokenizer(writer, text, spec.vocabulary)
            _write_tensors(writer, values, scales, graph, spec, config, deployment)
        finally:
            writer.close()
    return Artifact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)


def write_student(
    files: StudentFiles, deployment: Deployment, text: Path, out: Path, **label: Unpack[Label]
) -> Artifact:
    """Write a student of a family that is trained whole to `out/student.gguf`; see `write_whole`.

    Args:
        files: The student under the deployment.
        deployment: How each tensor is stored.
        text: The student's folder.
        out: Folder that the file goes into.
        label: As for `GgufExporter.export`.

    Raises:
        InputError: As `write_whole`.
    """
    orders = column_orders(files.spec, files.config)

    def values(name: str) -> Floats:
        """Return a tensor's values in the order of the file's columns."""
        read = files.read(name)
        return read if name not in orders else read[:, orders[name]]

    def scales(name: str) -> Scales | None:
        """Return a matrix's learned scales in the order of the file's columns."""
        found = files.scales(name)
        if found is None or name not in orders:
            return found
        # Groups divide the columns that stay together, so whole groups move.
        order = orders[name].reshape(found.scales.shape[1], -1)
        groups = order[:, 0] // order.shape[1]
        return Scales(found.scales[:, groups], None if found.offsets is None else found.offsets[:, groups])

    return write_whole(values, scales, files.spec, files.config, deployment, text, out, **label)


def held_of_student(files: StudentFiles) -> dict[str, Callable[[], Floats]]:
    """Return the tensors that the file of a student holds, by GGUF's names, each with a function for its values."""
    orders = column_orders(files.spec, files.config)

    def values(tensor: TensorSpec, place: int) -> Floats:
        stored = files.deployed(tensor.name)
        stored = stored[:, orders[tensor.name]] if tensor.name in orders else stored
        return list(_made(tensor, stored, GRAPHS[files.spec.architecture], files.spec, files.config))[place][1]

    graph = GRAPHS[files.spec.architecture]

    def more(name: str) -> Floats:
        return graph.more(files.spec, files.config)[name]

    held: dict[str, Callable[[], Floats]] = {name: partial(more, name) for name in graph.more(files.spec, files.config)}
    return held | {
        part.name: partial(values, tensor, place)
        for tensor in files.spec.tensors
        for place, part in enumerate(graph.parts(tensor, files.spec, files.config))
    }


def read_whole(path: Path) -> Iterator[tuple[str, Floats]]:
    """Yield each tensor of a file under GGUF's name, dequantised; the matrices of experts are stacked by rows.

    Raises:
        VerificationError: The file holds a tensor of a type that no export writes.
    """
    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type not in STORAGES:
            raise VerificationError(f"{path} holds {tensor.name} as {tensor.tensor_type.name}: not an export")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        shape = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else shape
        data = tensor.data.reshape(shape[0], -1) if len(shape) > 1 else tensor.data
        yield tensor.name, unpack({"data": data}, STORAGES[tensor.tensor_type], shape)


def _write_tensors(
    writer: GGUFWriter,
    values: Callable[[str], Floats],
    scales: Callable[[str], Scales | None],
    graph: Graph,
    spec: ModelSpec,
    config: Mapping[str, Any],
    deployment: Deployment,
) -> None:
    more = graph.more(spec, config)
    for name, data in more.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes)
    for tensor in spec.tensors:
        storage, parts = deployment.storage(tensor), graph.parts(tensor, spec, config)
        dtype, size = np.dtype(np.float32 if storage == "f32" else np.float16), tensor_bytes(tensor, storage)
        for part in parts:
            writer.add_tensor_info(part.name, part.shape, dtype, size // len(parts), raw_dtype=KINDS[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in more.values():
        write_tensor(writer, data)
    for tensor in spec.tensors:
        given = scales(tensor.name)
        for part, rows in _made(tensor, values(tensor.name), graph, spec, config):
            own = None if given is None else part.scales(given)
            write_tensor(writer, pack(rows, deployment.storage(tensor), own)["data"])


def _made(
    tensor: TensorSpec, values: Floats, graph: Graph, spec: ModelSpec, config: Mapping[str, Any]
) -> Iterator[tuple[Part, Floats]]:
    """Yield the file's tensors that are made from one transformers tensor, with their values as rows."""
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values
    for part in graph.parts(tensor, spec, config):
        yield part, np.ascontiguousarray(part.of(rows))


def verify_whole(
    artifact: Path,
    values: Callable[[str], Floats],
    spec: ModelSpec,
    config: Mapping[str, Any],
    deployment: Deployment,
) -> int:
    """Compare every tensor of a file with the intended values, and return the number of tensors.

    Args:
        artifact: The file.
        values: As for `write_whole`, but with the values after storage.
        spec, config, deployment: As for `write_whole`.

    Raises:
        VerificationError: A tensor differs or is missing; the message names the first one.
    """
    graph = GRAPHS[spec.architecture]
    stored = {tensor.name: tensor for tensor in GGUFReader(artifact).tensors}
    count = 0

    def compare(name: str, storage: Storage, rows: Floats) -> None:
        """Compare one tensor of the file with its values."""
        held = stored.get(name)
        if held is None:
            raise VerificationError(f"{artifact} lacks {name}")
        own: Storage = STORAGES[held.tensor_type]
        found = unpack({"data": held.data.reshape(len(rows), -1) if rows.ndim > 1 else held.data}, own, rows.shape)
        if own != storage or not np.array_equal(found, rows):
            raise VerificationError(f"{artifact} holds other values of {name} than were measured")

    for name, data in graph.more(spec, config).items():
        compare(name, "f32", data)
        count += 1
    for tensor in spec.tensors:
        for part, rows in _made(tensor, values(tensor.name), graph, spec, config):
            compare(part.name, deployment.storage(tensor), rows)
            count += 1
    if count < len(stored):
        raise VerificationError(f"{artifact} holds {len(stored) - count} tensors too many")
    return count
