"""A teacher that is too large for one device: several processes each hold a part of each matrix, and act as one model.

This process is the first of them. It has the model that callers use, whose body and head send their arguments to the
other processes. The plan is transformers' own (`tp_plan="auto"`). Each process has some rows of the queries', keys' and
values' matrices and of the FFN's first matrices. It has some columns of the matrices that read their outputs, and the
partial products are summed. It has some tokens of the table.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodistill.errors import AutoDistillError
from autodistill.inference.divided_part import gathering, own_part, own_scales
from autodistill.inference.half_precision import held_as_deployed, load_held
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import HeldType
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.strategy.deployment import Deployment

# Only a process that reads its part from a slow disk takes nearly as long.
_LONGEST_WAIT = timedelta(hours=1)
_LEAVING_SECONDS = 10.0
_MEMBER = "from autodistill.inference.tensor_parallel import member; member()"
_STATE = "_divided"
# The arguments with which the last divided model was loaded, and that model if it still exists.
_open: tuple[Any, Callable[[], Any]] = ((), lambda: None)


def load_teacher(folder: Path, held_type: HeldType, device: str = "cpu", processes: int = 1) -> Any:
    """Load a teacher for inference in float32, over as many devices as needed.

    Args:
        folder: transformers' folder.
        held_type: Type of the matrices.
        device: Device of this process: "cpu", or "cuda", in which case the first `processes` GPUs are used.
        processes: Number of processes that share the weights; 1 gives the model of `load_held`. They end with the
            model. There is only one divided model at a time: the same arguments return the existing one, and others
            replace it.

    Raises:
        AutoDistillError: One of the processes ended.
    """
    global _open
    if processes == 1:
        return load_held(folder, held_type, device)
    key = (folder, held_type, device, processes)
    known, model = _open
    if known == key and (found := model()) is not None:
        return found
    if (found := model()) is not None:
        leave(found)
    others = _OtherProcesses(folder, held_type, device, processes)
    try:
        model = own_part(folder, held_type, device, 0, processes)
    except Exception as error:
        raise others.failed(error) from error
    setattr(model, _STATE, others)
    # The parts of a divided model are already on their devices.
    model.to = lambda *where, **how: model
    body, head = model.base_model, model.get_output_embeddings()
    body.forward = partial(others.call, "body", body.forward)
    head.forward = partial(others.call, "head", head.forward)
    weakref.finalize(model, others.close)
    _open = key, weakref.ref(model)
    return model


def leave(model: Any) -> None:
    """End the other processes of a divided model, which cannot be used afterwards."""
    getattr(model, _STATE).close()


def is_divided(model: Any) -> bool:
    """Return whether a model's weights are divided over several processes, which keep no cache of keys and values."""
    return hasattr(model, _STATE)


@contextmanager
def deployed_in_all(
    model: Any, deployment: Deployment, scales: Mapping[str, Scales] | None
) -> Iterator[Mapping[str, Scales] | None]:
    """Let the other processes of a divided model compute with a deployment's values too.

    Args:
        model: A model of `load_teacher`.
        deployment: How the model is packed.
        scales: The teacher's own scales, which each process reads from the teacher's folder, or None.

    Yields:
        The scales of this process's part.
    """
    if not is_divided(model):
        yield scales
        return
    others = getattr(model, _STATE)
    others.tell({"do": "deploy", "deployment": deployment.to_json(), "own": scales is not None})
    try:
        yield own_scales(model, scales)
    finally:
        others.tell({"do": "restore"})


@contextmanager
def inputs_gathered(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Let `whole_input` return the whole inputs of a divided model's linear layers, in all processes.

    Args:
        model: A model of `load_teacher`.
        names: Names of its modules that each read a divided input.
    """
    if not is_divided(model):
        yield
        return
    others = getattr(model, _STATE)
    others.tell({"do": "gather", "names": list(names)})
    try:
        with gathering(model, names):
            yield
    finally:
        others.tell({"do": "restore"})


class _OtherProcesses:
    """The other processes of a divided model. Each is a child of this process, and ends when its stdin is closed.

    Args:
        folder, held_type, device, processes: As for `load_teacher`.
    """

    def __init__(self, folder: Path, held_type: HeldType, device: str, processes: int) -> None:
        meeting = tempfile.TemporaryDirectory(prefix="autodistill-")
        self._meeting: tempfile.TemporaryDirectory[str] | None = meeting
        place = Path(meeting.name)
        # Calls of several threads must run one after another, because all processes take part in each.
        self._lock = threading.RLock()
        self._errors = [place / f"error.{rank}" for rank in range(1, processes)]
        settings = {
            "folder": str(folder.resolve()),
            "held": held_type,
            "device": device,
            "meeting": str(place / "store"),
        }
        self._processes = []
        for rank, errors in enumerate(self._errors, start=1):
            with errors.open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-c", _MEMBER],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=os.environ | _names(rank, processes),
                    # Ctrl-C goes only to this process, which ends the others.
                    start_new_session=True,
                )
            self._processes.append(child)
        try:
            self.tell(settings | {"threads": torch.get_num_threads()})
            _meet(device, place / "store", 0, processes)
        except Exception as error:
            raise self.failed(error) from error

    def call(self, what: str, run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a part of the model in all processes with the arguments of this one.

        Raises:
            AutoDistillError: The call failed in one of them.
        """
        named |= dict(zip(("input_ids" if what == "body" else "input",), arguments, strict=False))
        tensors = {name: value.contiguous() for name, value in named.items() if isinstance(value, Tensor)}
        assert not named.get("use_cache"), "a divided model keeps no cache"
        with self._lock:
            device = next(iter(tensors.values())).device.type
            shapes = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}
            products = {"bf16": torch.is_autocast_enabled(device), "tf32": torch.backends.cuda.matmul.allow_tf32}
            self.tell({"do": what, "tensors": shapes, **products})
            try:
                for value in tensors.values():
                    dist.broadcast(value, 0)
                return run(**(named | tensors))
            except Exception as error:
                raise self.failed(error) from error

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message to all processes, in the order of calls.

        Raises:
            AutoDistillError: One of the processes ended.
        """
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for process in self._processes:
                assert process.stdin is not None
                try:
                    process.stdin.write(line)
                    process.stdin.flush()
                except OSError as error:
                    raise self.failed(error) from error

    def failed(self, error: Exception) -> AutoDistillError:
        """End all processes, because none can continue without the others; return an error with a short reason."""
        said = [" ".join(str(error).split())[:200]]
        for process, errors in zip(self._processes, self._errors, strict=True):
            with suppress(subprocess.TimeoutExpired):
                # The process that caused the failure ends before those that wait for it.
                process.wait(0.5)
            if process.returncode:
                said = errors.read_text(errors="replace").split("\n")[-2:-1] or said
                break
        count = len(self._processes) + 1
        if self._meeting is not None:
            self._end(kill=True)
        return AutoDistillError(
            f"the teacher, divided over {count} processes, cannot go on ({said[0]}): free memory of the devices, or "
            "choose a smaller teacher"
        )

    def close(self) -> None:
        """Let all processes leave, unless they have left already."""
        if self._meeting is not None:
            self._end(kill=False)

    def _end(self, kill: bool) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):
                if not kill:
                    process.stdin.write(b'{"do": "leave"}\n')
                process.stdin.close()
            if kill:
                process.kill()
        if dist.is_initialized() and not kill:
            dist.destroy_process_group()
        for process in self._processes:
            try:
                process.wait(_LEAVING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.cleanup()


def member() -> None:
    """Act as one of the other processes: follow the first one's messages on stdin, one JSON line each, to the end."""
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    settings = lines.get()
    rank, count, device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), settings["device"]
    torch.set_num_threads(settings["threads"])
    _meet(device, Path(settings["meeting"]), rank, count)
    folder = Path(settings["folder"])
    model = own_part(folder, settings["held"], device, rank, count)
    parts: Mapping[str, Any] = {"body": model.base_model, "head": model.get_output_embeddings()}
    changed = ExitStack()
    while (asked := lines.get())["do"] != "leave":
        if asked["do"] in parts:
            tensors = {}
            for name, (kind, *shape) in asked["tensors"].items():
                tensors[name] = torch.empty(shape, dtype=getattr(torch, kind), device=device)
                dist.broadcast(tensors[name], 0)
            more = {"use_cache": False} if asked["do"] == "body" else {}
            torch.backends.cuda.matmul.allow_tf32 = asked["tf32"]
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=asked["bf16"]):
                parts[asked["do"]](**tensors, **more)
        elif asked["do"] == "deploy":
            deployment = Deployment.from_json(asked["deployment"])
            scales = read_scales(folder, deployment) if asked["own"] else None
            storages = {one.name: deployment.storage(one) for one in spec_from_config(model.config.to_dict()).tensors}
            changed.enter_context(held_as_deployed(model, storages, own_scales(model, scales)))
            changed.enter_context(quantized_cache(model, deployment.cache_types))
        elif asked["do"] == "gather":
            changed.enter_context(gathering(model, asked["names"]))
        else:
            changed.close()
    dist.destroy_process_group()
    # Skip destructors, because gloo's threads may still hold gathered tensors.
    os._exit(0)


def _listen(lines: queue.Queue[dict[str, Any]]) -> None:
    """Queue the messages of the first process, and end this process with it, even in the middle of a collective."""
    said: dict[str, Any] = {}
    for line in sys.stdin:
        lines.put(said := json.loads(line))
    if said.get("do") != "leave":
        os._exit(0)


def _names(rank: int, count: int) -> dict[str, str]:
    """Return the environment of a process with its rank; gloo and NCCL may only connect within this machine."""
    inside = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return inside | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}


def _meet(device: str, store: Path, rank: int, count: int) -> None:
    os.environ.update({name: value for name, value in _names(rank, count).items() if name.endswith("IFNAME")})
    if device == "cuda":
        torch.cuda.set_device(rank)
    # Meet through a file. A port would be open to others.
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=_LONGEST_WAIT,
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )
