"""The teacher's outputs on disk: sparse logits and hidden states, computed once and memory-mapped by every trial."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from autodistill.data import TokenSet
from autodistill.distillation.alignment import rms_normalise
from autodistill.distillation.divergence import SparseTarget
from autodistill.distillation.parallel import map_sequences
from autodistill.distillation.student import decoder_layers
from autodistill.distillation.temperature import GRID
from autodistill.errors import InputError
from autodistill.strategy import content_hash
from autodistill.units import format_bytes

_VERSION = 2
_FILE = "outputs.arrow"
_META = "meta.json"
_PARTIAL = ".partial-"
# A writer that has written nothing for this long was killed.
_ABANDONED_SECONDS = 3600
# What Arrow adds to a sequence's values: the record batch's header, padding, and its place in the footer.
_BATCH_BYTES = 2048
# Rows of logits worked on at once for the logsumexp: 32 rows of 50,000 float32 logits are 6 MB.
_CHUNK_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What is kept of the teacher for each predicted token.

    Attributes:
        top_k: Number of most likely tokens whose raw logits are kept.
        states: Teacher layers whose outputs are kept, RMS-normalised in float16, and their root mean squares.
        bf16: Whether the teacher computes in bfloat16; the head always computes in float32.
    """

    top_k: int = 64
    states: tuple[int, ...] = ()
    bf16: bool = False

    def bytes_per_token(self, vocabulary: int, width: int) -> int:
        """Bytes on disk for one predicted token."""
        k = min(self.top_k, vocabulary)
        return k * (2 + _id_type(vocabulary).itemsize) + 4 + 4 * len(GRID) + (2 * width + 4) * len(self.states)


def _id_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary <= 65536 else np.uint32)


class TeacherCache:
    """Read access to one cache, memory-mapped.

    A cached sequence of `length` tokens has `length` - 1 predicted tokens: position i predicts token i + 1.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / _META).read_text())
        self.sequences: int = meta["sequences"]
        self.settings = CacheSettings(**(meta["settings"] | {"states": tuple(meta["settings"]["states"])}))
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / _FILE)))

    def _column(self, name: str, indices: Iterable[int]) -> npt.NDArray[Any]:
        parts = []
        for index in indices:
            column = self._reader.get_batch(int(index)).column(name)
            flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            parts.append(flat.to_numpy(zero_copy_only=True).reshape(len(column), -1))
        return np.concatenate(parts)

    def target(self, indices: Iterable[int], temperature: float) -> SparseTarget:
        """The teacher's outputs for the sequences `indices`, rows in their order, [sequences * (length - 1), ...].

        Args:
            indices: Sequences.
            temperature: One of the grid's temperatures.
        """
        indices = list(indices)
        maximum = self._column("maximum", indices)
        logits = maximum + self._column("below_maximum", indices).astype(np.float32)
        logsumexp = self._column("logsumexp", indices)[:, GRID.index(temperature)]
        ids = torch.from_numpy(self._column("ids", indices).astype(np.int64))
        return SparseTarget(ids, torch.from_numpy(logits), torch.from_numpy(logsumexp.copy()), temperature)

    def state(self, indices: Iterable[int], layer: int) -> Tensor:
        """RMS-normalised output of a teacher layer for the sequences `indices`, float16 [tokens, width].

        Raises:
            KeyError: The cache does not hold this layer.
        """
        return torch.from_numpy(self._column(f"state_{layer}", indices))

    def state_size(self, indices: Iterable[int], layer: int) -> Tensor:
        """Root mean squares that the states of a teacher layer had, float32 [tokens, 1], as `state`."""
        return torch.from_numpy(self._column(f"size_{layer}", indices))


def ensure_cache(
    load_teacher: Callable[[], Any],
    *,
    teacher_fingerprint: str,
    data_fingerprint: str,
    data: TokenSet,
    vocabulary: int,
    width: int,
    settings: CacheSettings,
    root: Path,
    limit_bytes: int,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Folder of a whole cache over the sequences of `data`, computed if no valid one is on disk.

    A cache of the same teacher, data and settings over more sequences serves as well. What is torn or altered is
    removed and computed again. Where the limit asks for it, other caches under `root` are removed, the one that was
    longest unused first.

    Args:
        load_teacher: Called only when the teacher must run; returns the model in float32 on the CPU.
        teacher_fingerprint, data_fingerprint: Content hashes; the data's covers tokenisation and sequence length.
        data: The training sequences, in the order of the split.
        vocabulary, width: The teacher's.
        settings: What is kept.
        root: Folder of all caches.
        limit_bytes: Disk that all caches may take together.
        device: Where the teacher runs.
        progress: Called with sequences done and in all.

    Raises:
        InputError: The cache alone would break the limit.
    """
    sequences, length = data.tokens.shape
    need = sequences * ((length - 1) * settings.bytes_per_token(vocabulary, width) + _BATCH_BYTES)
    if need > limit_bytes:
        raise InputError(
            f"the teacher cache needs {format_bytes(need)}, above its limit of {format_bytes(limit_bytes)}: "
            "lower --tokens, or raise --cache-limit"
        )
    key = content_hash(
        {
            "version": _VERSION,
            "teacher": teacher_fingerprint,
            "data": data_fingerprint,
            "settings": {**asdict(settings), "states": list(settings.states)},
            "temperatures": list(GRID),
        },
        16,
    )
    root.mkdir(parents=True, exist_ok=True)
    for folder in sorted(root.glob(f"{key}-*")):
        if int(folder.name.rpartition("-")[2]) < sequences:
            continue
        if _is_whole(folder):
            os.utime(folder)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
    _make_room(root, limit_bytes - need)
    batches = _teacher_batches(load_teacher(), data, settings, device, progress)
    return _write(root, f"{key}-{sequences}", sequences, settings, batches)


def _is_whole(folder: Path) -> bool:
    """Whether both files are, byte for byte, what was once written."""
    try:
        meta = json.loads((folder / _META).read_text())
        checksum = meta.pop("checksum")
        return bool(checksum == content_hash(meta) and meta["sha256"] == _sha256(folder / _FILE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_room(root: Path, allowed: int) -> None:
    """Removes what killed writers left, then the caches longest unused, until the others take `allowed` bytes at most.

    A file that another search has mapped outlives its name.
    """
    used = {path: path.stat().st_mtime for path in root.iterdir() if path.is_dir()}
    sizes = {path: sum(file.stat().st_size for file in path.glob("*")) for path in used}
    total = sum(sizes.values())
    for path in sorted(used, key=lambda path: (not path.name.startswith(_PARTIAL), used[path])):
        if path.name.startswith(_PARTIAL):
            written = max([used[path], *(file.stat().st_mtime for file in path.glob("*"))])
            removable = time.time() - written > _ABANDONED_SECONDS
        else:
            removable = total > allowed
        if removable:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def _write(root: Path, name: str, sequences: int, settings: CacheSettings, batches: Iterator[pa.RecordBatch]) -> Path:
    temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
    try:
        first = next(batches)
        with pa.OSFile(str(temporary / _FILE), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        meta = {"sequences": sequences, "settings": asdict(settings), "sha256": _sha256(temporary / _FILE)}
        (temporary / _META).write_text(json.dumps(meta | {"checksum": content_hash(meta)}, indent=2))
        try:
            temporary.rename(root / name)
        except OSError:
            # Another search may just have finished the same cache.
            if not _is_whole(root / name):
                raise
        return root / name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _teacher_batches(
    model: Any, data: TokenSet, settings: CacheSettings, device: str, progress: Callable[[int, int], None]
) -> Iterator[pa.RecordBatch]:
    """One record batch for each sequence, a row for each predicted token."""
    model.to(device).eval()
    layers = decoder_layers(model)
    # Sequences run side by side, each on a thread of its own.
    local = threading.local()

    def capture(index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            local.states[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def batch(index: int) -> pa.RecordBatch:
        local.states = {}
        ids = torch.from_numpy(np.array(data.tokens[index], dtype=np.int64))[None].to(device)
        with torch.no_grad():
            with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.bf16):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            columns = _sparse_outputs(model.get_output_embeddings()(hidden[0, :-1].float()), settings)
            for layer in settings.states:
                state = local.states[layer][0, :-1].float()
                columns[f"state_{layer}"] = rms_normalise(state).half().cpu().numpy()
                columns[f"size_{layer}"] = state.square().mean(dim=1).sqrt().cpu().numpy()
        return pa.record_batch({name: _arrow(values) for name, values in columns.items()})

    handles = [layers[index].register_forward_hook(capture(index)) for index in settings.states]
    try:
        for done, columns in enumerate(map_sequences(batch, len(data.tokens), device), start=1):
            yield columns
            progress(done, len(data.tokens))
    finally:
        for handle in handles:
            handle.remove()


def _sparse_outputs(logits: Tensor, settings: CacheSettings) -> dict[str, npt.NDArray[Any]]:
    """Columns for float32 logits [tokens, vocab]; the top logits are kept as distances below the row's maximum, which
    float16 holds most exactly where the probability is large.
    """
    top = logits.topk(min(settings.top_k, logits.shape[1]), dim=1)
    maximum = top.values[:, :1]
    logsumexp = torch.cat([_logsumexp(rows - rows.amax(dim=1, keepdim=True)) for rows in logits.split(_CHUNK_ROWS)])
    logsumexp += maximum / torch.tensor(GRID, device=logits.device)
    return {
        "ids": top.indices.cpu().numpy().astype(_id_type(logits.shape[1])),
        "below_maximum": (top.values - maximum).half().cpu().numpy(),
        "maximum": maximum[:, 0].cpu().numpy(),
        "logsumexp": logsumexp.cpu().numpy(),
    }


def _logsumexp(shifted: Tensor) -> Tensor:
    """Logarithms of the sums of exponentials at each of the grid's temperatures, [rows, len(GRID)].

    Halving a temperature squares the exponentials, which costs less than new ones and a few units in the last place.

    Args:
        shifted: float32 [rows, vocab], logits less their row's largest.
    """
    found: dict[float, Tensor] = {}
    for temperature in sorted(GRID, reverse=True):
        if temperature not in found:
            exponential = (shifted / temperature).exp_()
            while temperature in GRID:
                found[temperature] = exponential.sum(dim=1).log_()
                temperature /= 2
                if temperature in GRID:
                    exponential.square_()
    return torch.stack([found[temperature] for temperature in GRID], dim=1)


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
