"""A torch device without a GPU: its memory is separate from the CPU's, as CUDA's is, and the CPU computes on it.

Tensors of the device "pretend" are plain tensors whose storage, for torch, is on another device. They use the
experimental `torch.utils.backend_registration._setup_privateuseone_for_python_backend`. Every kernel of the device is
one function. It checks where the arguments are, computes on the same bytes as CPU tensors, and returns the outputs as
tensors of the device. Everything above the kernels is torch's own: autograd with its thread for the device, views,
version counters, refusing `.numpy()`, moving modules, saving. The device is registered for the whole process and before
any backward pass, so tests with it have a separate process.

It cannot show what CUDA's kernels compute, streams and asynchrony, memory limits, pinned memory, or code branches that
ask for the name "cuda".

`tests/distillation/test_on_device.py` runs the tests of this folder; otherwise none of them is collected. With
`AUTODISTILL_TEST_DEVICE=cuda` the same tests run on a GPU, except those that count transfers between the two.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.conftest import Workshop, make_workshop

NAME = "pretend"
_DEVICE_KEY, _AUTOCAST_KEY = "PrivateUse1", "AutocastPrivateUse1"
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_WITHOUT_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

# Operations for which CUDA accepts indices that are CPU tensors of one or more dimensions.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
# In addition to pointwise operations, these accept a number that is a tensor on the CPU.
_NUMBERS = ("aten::fill_", "aten::fill", "aten::masked_fill_", "aten::masked_fill", *_INDEXING)
# Operations that wait for the device to know the size of their output, or its value.
_WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::repeat_interleave",
)
# From the lists in ATen/autocast_mode.h, what language models use: computed in the autocast type, or in float32.
_LOWER = ("linear", "matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_FLOAT32 = (
    *("exp", "log", "log2", "pow", "reciprocal", "rsqrt", "softplus", "layer_norm", "norm", "logsumexp", "mse_loss"),
    *("softmax", "log_softmax", "cumsum", "sum", "prod"),
)


_WHICH = os.environ.get("AUTODISTILL_TEST_DEVICE")
collect_ignore_glob = [] if _WHICH in (NAME, "cuda") else ["test_*.py"]


class Traffic(NamedTuple):
    """Lines of the package that waited for the device, or sent to it, and how often. One "line" is "transformers"."""

    waits: Counter[str]
    sent: Counter[str]


_counted: list[Traffic] = []
# Registrations end when their libraries are deleted.
_libraries: list[torch.library.Library] = []


class _Backend(_DummyBackendModule):
    """What torch needs from a device's module `torch.pretend`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @contextmanager
    def device(self, index: Any) -> Iterator[None]:
        yield

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def register() -> None:
    """Add the device to this process, once."""
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    # A module that moves to CUDA keeps its parameters, and therefore its ties. With a device like this one, it keeps
    # them only in this way.
    torch.__future__.set_swap_module_params_on_conversion(True)
    kernels, casts = torch.library.Library("_", "IMPL"), torch.library.Library("_", "IMPL")
    kernels.fallback(_kernel, _DEVICE_KEY)
    casts.fallback(torch.library.fallthrough_kernel, _AUTOCAST_KEY)
    lists = torch.library.Library("aten", "IMPL")
    for names, cast in ((_LOWER, _in_autocast_type), (_FLOAT32, _in_float32)):
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" not in overload and "dimname" not in overload.lower():
                    op = getattr(packet, overload)
                    lists.impl(op.name(), cast(op), _AUTOCAST_KEY)
    _libraries.extend((kernels, casts, lists))


@pytest.fixture(scope="session")
def device() -> str:
    """Name of a device that is not the CPU."""
    if _WHICH == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA GPU here")
        return "cuda"
    register()
    return NAME


class _DefaultGenerator:
    """Torch's default generator, because a device that is made in Python cannot have its own."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generator, and return what represents it in an operation."""
        torch.manual_seed(seed)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with few layers: each operation of the device is a Python call, and more layers show no more."""
    return make_workshop(tmp_path_factory.mktemp("workshop"), layers=3)


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow generators of the device to be made."""

    def made(device: Any = "cpu", real: type[torch.Generator] = torch.Generator) -> Any:
        return _DefaultGenerator() if torch.device(device).type == NAME else real(device)

    monkeypatch.setattr(torch, "Generator", made)


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    """Transfers between the CPU and the device in a test. After it is cleared, it counts from zero."""
    if _WHICH == "cuda":
        pytest.skip("what goes between is counted on the pretended device alone")
    _counted.append(Traffic(Counter(), Counter()))
    yield _counted[-1]
    _counted.pop()


def _count(kind: str) -> None:
    if not _counted:
        return
    frame: Any = sys._getframe(2)
    while frame is not None and not any(
        f"/{name}/" in frame.f_code.co_filename for name in ("autodistill", "transformers")
    ):
        frame = frame.f_back
    where = "elsewhere"
    if frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/autodistill/")
        where = f"{file}:{frame.f_lineno}" if folder else "transformers"
    getattr(_counted[-1], kind)[where] += 1


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value of torch's schemas with each of its parts changed."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(item, change) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _as_declared(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn numbers into tensors if the operation is declared to take tensors. They arrive as plain numbers."""
    return tuple(
        torch.tensor(value) if isinstance(value, int | float) and str(declared.type) == "Tensor" else value
        for value, declared in zip(args, op._schema.arguments, strict=False)
    )


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operation with an argument or the output on the device."""
    name = op._schema.name
    if name == "aten::_copy_from":
        return _copy(*args)
    _check(op, name, args, kwargs)
    if name in _WAITING or (name in _INDEXING and _by_mask(args[1])):
        _count("waits")
    ours: list[tuple[Tensor, Tensor]] = []

    def down(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == NAME else value
        if not isinstance(value, Tensor) or not _is_here(value):
            return value
        ours.append((_bytes_of(value), value))
        return ours[-1][0]

    def up(value: Any) -> Any:
        return _outside(value, ours) if isinstance(value, Tensor) else value

    target = kwargs.get("device")
    found = op(*_as_declared(op, _mapped(args, down)), **_mapped(kwargs, down))
    return found if target is not None and torch.device(target).type != NAME else _mapped(found, up)


def _check(op: Any, name: str, args: Any, kwargs: Any) -> None:
    """Refuse what CUDA refuses: CPU arguments, except numbers and indices, and generators of the CPU."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}': {op}")
    pointwise = torch.Tag.pointwise in op.tags or name in _NUMBERS
    for place, value in enumerate((*args, *kwargs.values())):
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, Tensor) or _is_here(item):
                continue
            if (pointwise and item.ndim == 0) or (name in _INDEXING and place == 1):
                continue
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"{item.device}! (in {op}, argument {place})"
            )


def _by_mask(indices: Any) -> bool:
    return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in indices)


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices. No other operation does this."""
    if not _is_here(target):
        _count("waits")
    elif not _is_here(source):
        _count("sent")
    ours, theirs = (_bytes_of(one) if _is_here(one) else one for one in (target, source))
    ours.copy_(theirs)
    return target


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the same bytes as a CPU tensor."""
    owner = tensor.untyped_storage().owner  # type: ignore[attr-defined]
    return torch.empty(0, dtype=tensor.dtype).set_(owner, tensor.storage_offset(), tensor.shape, tensor.stride())


def _outside(found: Tensor, ours: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return an output on the device: an argument, a view of an argument, or a new tensor."""
    for inner, outer in ours:
        if found is inner:
            # An output that was passed in may have got another shape.
            return outer if inner.shape == outer.shape and inner.stride() == outer.stride() else _point(outer, inner)
    for inner, outer in ours:
        if found.untyped_storage()._cdata == inner.untyped_storage()._cdata:
            assert found.dtype == outer.dtype
            shape, stride = list(found.shape), list(found.stride())
            return torch.ops.aten.as_strided.default.redispatch(_ON_CPU, outer, shape, stride, found.storage_offset())
    return _point(torch._C._acc.create_empty_tensor([0], found.dtype), found)


def _point(outer: Tensor, inner: Tensor) -> Tensor:
    """Make a tensor of the device show the bytes of a CPU tensor, which live as long as the tensor does."""
    owner = inner.untyped_storage()
    storage: Any = torch._C._construct_storage_from_data_pointer(
        owner.data_ptr(), torch.device(NAME, 0), owner.nbytes()
    )
    storage.owner = owner
    shape, stride, start = list(inner.shape), list(inner.stride()), inner.storage_offset()
    set_storage: Any = torch.ops.aten.set_.source_Storage_storage_offset
    set_storage.redispatch(_ON_CPU, outer, storage, start, shape, stride)
    return outer


def _in_autocast_type(op: Any) -> Callable[..., Any]:
    return _casting(op, lambda: torch.get_autocast_dtype(NAME))


def _in_float32(op: Any) -> Callable[..., Any]:
    return _casting(op, lambda: torch.float32)


def _casting(op: Any, wanted: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """Cast floating-point arguments, except float64, to another type, as autocast does."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_WITHOUT_AUTOCAST):
            dtype = wanted()

            def cast(value: Any) -> Any:
                casts = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
                return value.to(dtype) if casts and _is_here(value) else value

            return op(*_mapped(args, cast), **_mapped(kwargs, cast))

    return run
