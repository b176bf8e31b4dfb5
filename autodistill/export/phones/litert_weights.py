"""Replaces float32 weights in a LiteRT file by codes and 16-bit values, which the runtime expands to float32 again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.export.phones.stored import Stored
from autodistill.quantization.grids import Floats

_ALIGNED = 16  # bytes, LiteRT's schema requires this alignment of each buffer


def narrow_weights(path: Path, weights: Mapping[str, Floats], stored: Mapping[str, Stored]) -> None:
    """Rewrite a file so that it holds each matrix as it is stored; products still use the same float32 values.

    A matrix of codes becomes `DEQUANTIZE(codes) * DEQUANTIZE(scales) + DEQUANTIZE(minima)`, with one operation after
    another. This is the arithmetic of the evaluated student. LiteRT's own kernel for blocks of 4-bit codes accepts no
    negative scales, but half of the blocks of Q4_0 have one.

    Args:
        path: The converted file.
        weights: Its float32 values by name.
        stored: How each tensor must be stored.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    narrowed = {
        (values.shape, _digest(values)): stored[name]
        for name, values in weights.items()
        if values.ndim == 2 and (stored[name].form or stored[name].parts["values"].dtype != np.float32)
    }
    if not narrowed:
        return
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    editor, kept = _Editor(schema, model), {}
    for graph in model.subgraphs:
        for place in editor.matrices(graph):
            shape, buffer = tuple(map(int, graph.tensors[place].shape)), int(graph.tensors[place].buffer)
            if buffer not in kept:
                raw = model.buffers[buffer].data
                kept[buffer] = None if raw is None else narrowed.get((shape, hashlib.sha256(raw).digest()))
            if (held := kept[buffer]) is not None:
                editor.replace(graph, place, held)
    for buffer, one in kept.items():
        if one is not None:
            model.buffers[buffer].data = None
    builder = flatbuffers.Builder(1 << 20)
    _align_buffers(model)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


class _Editor:
    """Adds tensors and operations to a model's graphs; graphs that share a matrix share its bytes."""

    def __init__(self, schema: Any, model: Any) -> None:
        self._schema, self._model = schema, model
        self._buffers: dict[bytes, int] = {}

    def matrices(self, graph: Any) -> set[int]:
        """Return the indices of tensors that are matrices in products, or tables."""
        kinds, codes = self._schema.BuiltinOperator, self._model.operatorCodes
        wanted = (kinds.FULLY_CONNECTED, kinds.EMBEDDING_LOOKUP)
        return {int(one.inputs[1]) for one in graph.operators if codes[one.opcodeIndex].builtinCode in wanted}

    def replace(self, graph: Any, place: int, held: Stored) -> None:
        """Compute a constant from its stored form, before all other operations."""
        tensor, first = graph.tensors[place], len(graph.operators)
        tensor.buffer = 0
        if held.form is None:
            self._widened(graph, held.parts["values"], into=place)
        else:
            # A signed code minus the zero point is the grid's own code.
            codes, block = held.parts["codes"], held.form.block
            found = self._widened(graph, codes, bits=held.form.bits, zero=-held.form.shift, columns=block)
            shape = (len(codes), block)
            for part, kind in (("scales", "Mul"), ("minima", "Add")):
                if part in held.parts:
                    found = self._op(graph, kind, [found, self._widened(graph, held.parts[part])], shape)
            sizes = self._tensor(graph, "INT32", np.array(held.shape, np.int32))
            self._op(graph, "Reshape", [found, sizes], held.shape, into=place, newShape=list(held.shape))
        graph.operators[:] = graph.operators[first:] + graph.operators[:first]

    def _widened(
        self,
        graph: Any,
        raw: npt.NDArray[Any],
        *,
        bits: int = 0,
        zero: int = 0,
        columns: int = 0,
        into: int | None = None,
    ) -> int:
        """Return the float32 tensor of an array in float32 or float16, or of codes with `bits` bits."""
        if not bits and raw.dtype == np.float32:
            return self._tensor(graph, "FLOAT32", raw)
        shape = (len(raw), columns) if bits else raw.shape
        own = self._tensor(graph, f"INT{bits}" if bits else "FLOAT16", raw, shape)
        if bits:
            steps = self._schema.QuantizationParametersT()
            steps.scale, steps.zeroPoint = [1.0], [zero]
            graph.tensors[own].quantization = steps
        return self._op(graph, "Dequantize", [own], shape, into=into)

    def _tensor(self, graph: Any, kind: str, raw: npt.NDArray[Any] | None, shape: tuple[int, ...] = ()) -> int:
        """Add a tensor, which is constant if it has an array, and return its index."""
        made = self._schema.TensorT()
        made.name, made.type = f"stored_{len(graph.tensors)}", getattr(self._schema.TensorType, kind)
        made.shape, made.hasRank = list(shape if raw is None or shape else raw.shape), True
        if raw is not None:
            data = np.ascontiguousarray(raw).tobytes()
            if (key := hashlib.sha256(data).digest()) not in self._buffers:
                buffer = self._schema.BufferT()
                buffer.data = np.frombuffer(data, np.uint8)
                self._model.buffers.append(buffer)
                self._buffers[key] = len(self._model.buffers) - 1
            made.buffer = self._buffers[key]
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def _op(
        self,
        graph: Any,
        kind: str,
        inputs: list[int],
        shape: tuple[int, ...],
        *,
        into: int | None = None,
        **options: Any,
    ) -> int:
        """Add an operation, and return the index of its output."""
        out = self._tensor(graph, "FLOAT32", None, shape) if into is None else into
        made, own = self._schema.OperatorT(), getattr(self._schema, f"{kind}OptionsT")()
        for name, value in options.items():
            setattr(own, name, value)
        made.opcodeIndex = self._code(getattr(self._schema.BuiltinOperator, kind.upper()))
        made.inputs, made.outputs, made.builtinOptions = inputs, [out], own
        made.builtinOptionsType = getattr(self._schema.BuiltinOptions, f"{kind}Options")
        graph.operators.append(made)
        return out

    def _code(self, kind: int) -> int:
        codes = self._model.operatorCodes
        for place, one in enumerate(codes):
            if one.builtinCode == kind:
                return place
        made = self._schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = kind
        made.version = 6 if kind == self._schema.BuiltinOperator.DEQUANTIZE else 1  # version 6 has 4-bit codes
        codes.append(made)
        return len(codes) - 1


def _align_buffers(model: Any) -> None:
    """Align each buffer as LiteRT's schema requires; packing with the Python package does not."""
    for one in model.buffers:
        if one.data is not None:
            usual = one.Pack

            def pack(given: Any, usual: Any = usual, size: int = len(one.data)) -> Any:
                given.Prep(_ALIGNED, size)
                return usual(given)

            one.Pack = pack


def _digest(values: Floats) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).data).digest()
