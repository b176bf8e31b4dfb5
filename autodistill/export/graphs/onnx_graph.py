"""Builds an ONNX graph: its nodes, and a student's weights as they were evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.formats import tensor_bytes
from autodistill.quantization.grids import Floats, FloatType, Grid, Scales
from autodistill.quantization.packing import Arrays, unpack_codes
from autodistill.quantization.scheme import QuantizationScheme

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

DATA = "model.onnx.data"
"""The file next to the graph that holds the weights."""
OPSETS = (("", 23), ("com.microsoft", 1))
"""Opset 23 has attention with a cache, whose kernel takes any head dim. `MatMulNBits` is ONNX Runtime's own."""
ACCURACY_LEVELS: Mapping[int, int] = {4: 1, 8: 4}
"""Accuracy level of `MatMulNBits` by bits of the codes. Level 1 computes products in float32. Level 4 first rounds
activations to 8 bits in blocks, as llama.cpp does. ONNX Runtime has no float32 kernel for 8-bit codes on CPUs. It would
expand the whole matrix to float32 at each product, which takes 15 times as long (SmolLM2's head)."""

_IR_VERSION = 11
_ALIGNED = 64  # bytes, the width of the widest loads
_INLINE = 64  # most values of an array that is stored in the graph itself

Value: TypeAlias = str
"""The name of a node's output."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a matrix's codes are stored: a weight is (code - 2^(bits-1)) * scale, plus its block's offset if it has one.

    Attributes:
        bits: Bits of a code, 4 or 8. Two 4-bit codes share a byte, the first in its low half.
        block: Number of consecutive weights of a row that share a scale.
        shift: A block's offset is its minimum plus this many scales. A symmetric grid has shift 0 and no minimum.
        offset: Whether blocks have minima.
    """

    bits: int
    block: int
    shift: int
    offset: bool

    @classmethod
    def of(cls, grid: Grid) -> Blocks:
        """Return how codes of one of GGUF's grids are stored: in 4 bits if the grid spans at most 16 codes."""
        bits = 4 if grid.qmax - grid.qmin < 16 else 8
        middle = 2 ** (bits - 1)
        held = -middle <= grid.qmin and grid.qmax < middle
        shift = 0 if held else middle + grid.qmin
        return cls(bits=bits, block=grid.group_size, shift=shift, offset=not grid.symmetric)

    def pack(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
        """Return the bytes of codes [rows, columns], uint8 [rows, blocks, bytes]."""
        above = (codes.astype(np.int16) - self.shift + 2 ** (self.bits - 1)).astype(np.uint8)
        blocks = above.reshape(len(codes), -1, self.block)
        return blocks if self.bits == 8 else blocks[..., 0::2] | (blocks[..., 1::2] << np.uint8(4))

    def unpack(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """The inverse of `pack`."""
        above = stored
        if self.bits == 4:
            above = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
        return (above.reshape(len(stored), -1).astype(np.int16) - 2 ** (self.bits - 1) + self.shift).astype(np.int8)

    def weights(self, codes: npt.NDArray[np.int8], scales: Scales) -> Floats:
        """Return the float32 weights [rows, columns] of codes, in the order of operations of `packing.dequantize`."""
        groups = codes.reshape(len(codes), -1, self.block).astype(np.float32) * scales.scales[..., None]
        if scales.offsets is not None:
            groups += scales.offsets[..., None]
        return groups.reshape(codes.shape)


class Graph:
    """Collects the nodes and weights of a graph.

    Args:
        data: Receives the weights, one after another.
        half: Whether activations and cache are float16 instead of float32.

    Attributes:
        type: ONNX's number of the type of activations and cache.
        blocks: How each matrix of codes is stored, by name.
    """

    def __init__(self, data: BinaryIO, *, half: bool) -> None:
        from onnx import TensorProto

        self.type: int = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.wide: int = TensorProto.FLOAT
        self.half = half
        self.blocks: dict[str, Blocks] = {}
        self._data = data
        self._nodes: list[Any] = []
        self._initializers: dict[str, TensorProto] = {}
        self._cast: dict[tuple[Value, int], Value] = {}

    def op(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> Value:
        """Add a node with one output, and return the output."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: Value, outputs: int | Sequence[Value], domain: str = "", **attributes: Any
    ) -> list[Value]:
        """Add a node, and return its outputs."""
        from onnx import helper

        name = f"{kind}_{len(self._nodes)}"
        given = [f"{name}.{place}" for place in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(kind, list(inputs), given, name=name, domain=domain, **attributes))
        return given

    def constant(self, value: Any, dtype: Any = np.int64) -> Value:
        """Return a small constant; equal constants are stored once."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        name = f"{array.dtype.name}:{'x'.join(map(str, array.shape))}:{array.ravel().tolist()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def stored(self, name: str, array: npt.NDArray[Any], *, bf16: bool = False) -> Value:
        """Write an array to the data, or a small one into the graph, and return its name; give bfloat16 as bits."""
        from onnx import TensorProto, helper, numpy_helper

        assert name not in self._initializers, name
        kind = TensorProto.BFLOAT16 if bf16 else helper.np_dtype_to_tensor_dtype(array.dtype)
        raw = np.ascontiguousarray(array)
        if array.size <= _INLINE and not bf16:
            self._initializers[name] = numpy_helper.from_array(raw, name)
            return name
        self._data.write(bytes(-self._data.tell() % _ALIGNED))
        found = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA), ("offset", self._data.tell()), ("length", raw.nbytes)):
            found.external_data.add(key=key, value=str(value))
        self._data.write(raw.data)
        self._initializers[name] = found
        return name

    def to(self, value: Value, kind: int) -> Value:
        """Return a value cast to a type; a runtime casts weights only once, when it loads them."""
        if (value, kind) not in self._cast:
            self._cast[value, kind] = self.op("Cast", value, to=kind)
        return self._cast[value, kind]

    def own(self, value: Value) -> Value:
        """Return a float32 value in the type of activations."""
        return self.to(value, self.type) if self.half else value

    def widened(self, value: Value) -> Value:
        """Return activations in float32."""
        return self.to(value, self.wide) if self.half else value

    def number(self, value: float) -> Value:
        """Return a constant in the type of activations."""
        return self.constant(value, np.float16 if self.half else np.float32)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], properties: Mapping[str, str]) -> ModelProto:
        """Return the whole graph."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, "student", inputs, outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid(*opset) for opset in OPSETS]
        made = helper.make_model(graph, opset_imports=opsets, producer_name="autodistill", ir_version=_IR_VERSION)
        helper.set_model_props(made, dict(properties))
        return made


class Weights:
    """The weights of a student in a graph; they are written once and read by the nodes that need them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._stored: dict[str, FloatType | Blocks] = {}
        self._wide: set[str] = set()  # matrices with scales that float16 cannot represent
        self._above_one: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def add(self, tensor: TensorSpec, storage: Grid | FloatType, arrays: Arrays) -> None:
        """Write one tensor with the values that were evaluated.

        Args:
            tensor: The tensor.
            storage: One of GGUF's grids, or a float type.
            arrays: The arrays from `packing.pack`.
        """
        graph, name = self._graph, tensor.name
        if tensor.role is Role.NORM_ABOVE_ONE:
            self._above_one.add(name)
        if not isinstance(storage, Grid):
            graph.stored(name, arrays["data"].reshape(tensor.shape), bf16=storage == "bf16")
            self._stored[name] = storage
            return
        form = Blocks.of(storage)
        codes, scales = unpack_codes(arrays, storage, tensor.shape)
        graph.stored(f"{name}.codes", form.pack(codes))
        factors = narrow(scales.scales)
        graph.stored(f"{name}.scales", factors)
        if scales.offsets is not None:
            graph.stored(f"{name}.minima", narrow(scales.offsets))
        if factors.dtype != np.float16:
            self._wide.add(name)
        graph.blocks[name] = form
        self._stored[name] = form

    def vector(self, name: str) -> Value:
        """Return a bias or a norm's factors in float32; if a model adds 1 to its weights, 1 is already added."""
        found = self._graph.to(name, self._graph.wide) if self._stored[name] in ("f16", "bf16") else name
        if name in self._above_one and self._stored[name] != "f32_plus_1":
            return self._graph.op("Add", found, self._graph.constant(1, np.float32))
        return found

    def table(self, name: str, ids: Value) -> Value:
        """Return the rows of an embedding table, [batch, sequence, width]."""
        graph, form = self._graph, self._stored[name]
        if not isinstance(form, Blocks):
            return graph.op("Cast", graph.op("Gather", name, ids), to=graph.type)
        codes = graph.op("Gather", f"{name}.codes", ids)
        if form.bits == 4:
            low = graph.op("BitwiseAnd", codes, graph.constant(15, np.uint8))
            high = graph.op("BitShift", codes, graph.constant(4, np.uint8), direction="RIGHT")
            ends = [graph.op("Unsqueeze", half, graph.constant([-1])) for half in (low, high)]
            codes = graph.op("Concat", *ends, axis=-1)
        middle = graph.constant(2 ** (form.bits - 1) - form.shift, np.float32)
        steps = graph.op("Sub", graph.op("Cast", codes, to=graph.wide), middle)
        blocks = graph.op("Reshape", steps, graph.constant([0, 0, -1, form.block]))
        rows = graph.op("Mul", blocks, self._rows_of(f"{name}.scales", ids))
        if form.offset:
            rows = graph.op("Add", rows, self._rows_of(f"{name}.minima", ids))
        return graph.to(graph.op("Reshape", rows, graph.constant([0, 0, -1])), graph.type)

    def _rows_of(self, name: str, ids: Value) -> Value:
        graph = self._graph
        found = graph.op("Cast", graph.op("Gather", name, ids), to=graph.wide)
        return graph.op("Unsqueeze", found, graph.constant([-1]))

    def product(self, name: str, inputs: Value, shape: tuple[int, ...]) -> Value:
        """Return the product of inputs [..., columns] and a matrix of this shape, [rows, columns]."""
        graph, form = self._graph, self._stored[name]
        if not isinstance(form, Blocks):
            own = form == ("f16" if graph.half else "f32")
            matrix = name if own else graph.to(name, graph.type)
            return graph.op("FusedMatMul", inputs, matrix, domain="com.microsoft", transB=1)
        rows, columns = shape
        # If float16 cannot represent the scales, the product is computed in float32.
        kind = graph.wide if name in self._wide else graph.type
        given = graph.to(inputs, kind) if graph.half else inputs
        product = graph.op(
            "MatMulNBits",
            given,
            f"{name}.codes",
            f"{name}.scales" if name in self._wide or graph.half else graph.to(f"{name}.scales", kind),
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=ACCURACY_LEVELS[form.bits],
        )
        if form.offset:
            # All weights of a block share an offset, so it multiplies the sum of the block's inputs. Gemm adds while it
            # multiplies. Thus a head's logits are held twice; a separate node for the addition would hold them three
            # times.
            blocks = graph.op("Reshape", given, graph.constant([-1, columns // form.block, form.block]))
            sums = graph.op("ReduceSum", blocks, graph.constant([-1]), keepdims=0)
            flat = graph.op("Reshape", product, graph.constant([-1, rows]))
            added = graph.op("Gemm", sums, graph.to(self._offsets(name, form), kind), flat, transB=1)
            product = graph.op("Reshape", added, graph.op("Shape", product))
        return graph.own(product)

    def _offsets(self, name: str, form: Blocks) -> Value:
        graph = self._graph
        minima = graph.to(f"{name}.minima", graph.wide)
        if not form.shift:
            return minima
        scales = graph.to(f"{name}.scales", graph.wide)
        return graph.op("Add", minima, graph.op("Mul", scales, graph.constant(form.shift, np.float32)))


def data_bytes(tensors: Iterable[TensorSpec], stored: QuantizationScheme) -> int:
    """Return the bytes of a model's tensors as an export stores them, without the alignment of each.

    Scales and minima have 16 bits, or 32 bits if they are products of two numbers, as in super-blocks.
    """
    total = 0
    for tensor in tensors:
        storage, count = stored.storage(tensor), math.prod(tensor.shape)
        if not isinstance(storage, Grid):
            total += tensor_bytes(tensor, storage)
            continue
        form = Blocks.of(storage)
        numbers = (4 if storage.block_size else 2) * (2 if form.offset else 1)
        total += count * form.bits // 8 + numbers * count // form.block
    return total


def narrow(values: Floats) -> npt.NDArray[Any]:
    """Return values in float16 if it represents all of them exactly, else unchanged."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else values
