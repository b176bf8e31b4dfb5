"""Builds a teacher's output cache by passes over the training sequences, within a disk limit."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.distillation.losses.hidden_states import rms_normalize
from autodistill.distillation.teacher.output_cache import FILE, META, CacheSettings, TeacherCache, id_type, part_hashes
from autodistill.errors import DamagedError, InputError
from autodistill.inference.batching import by_length, logit_rows, map_batches, pass_tokens
from autodistill.models.loading import watched_layers
from autodistill.units import format_bytes, written_bytes
from autodistill.utils.file_locks import exclusive, try_lock
from autodistill.utils.hashing import content_hash

_VERSION = 3
_PARTIAL = ".partial-"
# A writer that has written nothing for this long counts as killed.
_ABANDONED_SECONDS = 3600
# Rows of logits per chunk for the logsumexp on a CPU: 32 rows of 50,000 float32 logits are 6 MB.
_CHUNK_ROWS = 32
# Rows of logits that each CPU thread holds at a time; at least one sequence.
_CPU_ROWS = 256


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
    """Return the folder of a complete cache for the sequences of `data`, computed if no valid one is on disk.

    A cache of the same teacher, data and settings over more sequences is also valid. An incomplete or altered cache is
    removed and computed again. If the limit requires it, other caches under `root` are removed, the least recently used
    first.

    Args:
        load_teacher: Called only if the teacher must run. Returns the model in float32 on the CPU.
        teacher_fingerprint, data_fingerprint: Content hashes. The data's covers tokenisation and sequence length.
        data: The training sequences, in the order of the split.
        vocabulary, width: The teacher's vocabulary size and hidden width.
        settings: Which outputs to store.
        root: Folder of all caches.
        limit_bytes: Most bytes on disk for all caches together.
        device: Where the teacher runs.
        progress: Called with the numbers of finished and of all sequences.

    Raises:
        InputError: The cache alone would exceed the limit.
    """
    sequences, length = data.tokens.shape
    need = settings.bytes_of(sequences, length, vocabulary, width)
    if need > limit_bytes:
        raise InputError(
            f"the teacher cache needs {format_bytes(need)}, above its limit of {format_bytes(limit_bytes)}: "
            f"lower --tokens, or give --cache-limit {written_bytes(need)} or more"
        )
    key = content_hash(
        {
            "version": _VERSION,
            "teacher": teacher_fingerprint,
            "data": data_fingerprint,
            "settings": asdict(settings),
        },
        16,
    )
    with exclusive(root / key):
        for folder in sorted(root.glob(f"{key}-*")):
            if int(folder.name.rpartition("-")[2]) < sequences:
                continue
            if _is_whole(folder):
                os.utime(folder)
                return folder
            shutil.rmtree(folder, ignore_errors=True)
        _make_room(root, limit_bytes - need)
        batches = _teacher_batches(load_teacher(), data, settings, device, progress)
        return _write(root, f"{key}-{sequences}", sequences, settings, batches, data_fingerprint)


def writing_rate(model: Any, data: TokenSet, settings: CacheSettings, root: Path, device: str) -> float:
    """Measure the tokens per second at which outputs are computed and written, after one warm-up.

    Args:
        model: The teacher, which stays on `device`.
        data: Enough sequences for a pass or two.
        settings: Which outputs to store.
        root: Folder of all caches. The measurement leaves no files in it.
        device: Where the teacher runs.
    """
    root.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root) as folder:
        for name in ("first", "second"):
            began = time.perf_counter()
            batches = _teacher_batches(model, data, settings, device, lambda done, total: None)
            _write(Path(folder), name, len(data.tokens), settings, batches, "")
            seconds = time.perf_counter() - began
    return float(data.tokens.size / seconds)


def _is_whole(folder: Path) -> bool:
    """Return whether both files of a cache have exactly the bytes that were written."""
    try:
        TeacherCache(folder).check()
    except DamagedError:
        return False
    return True


def _make_room(root: Path, allowed: int) -> None:
    """Remove leftovers of killed writers, then the least recently used caches, until `allowed` bytes remain.

    A cache that another search holds is kept, whatever the limit, because its workers may still have to map it.
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
        with try_lock(path / META) as free:
            if removable and free:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]


def _write(
    root: Path, name: str, sequences: int, settings: CacheSettings, batches: Iterator[pa.RecordBatch], data: str
) -> Path:
    temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
    try:
        first = next(batches)
        ends = []
        with pa.OSFile(str(temporary / FILE), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_batch(batch)
                ends.append(sink.tell())
        with (temporary / FILE).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as written:
            ends.append(len(written))
            hashes = part_hashes(written, [0, *ends])
        meta = {
            "sequences": sequences,
            "settings": asdict(settings),
            "data": data,
            # Ends and hashes have an entry for each sequence, and one for the rest of the file: the schema and the
            # places of the sequences.
            "ends": ends,
            "hashes": hashes,
        }
        (temporary / META).write_text(json.dumps(meta | {"checksum": content_hash(meta)}))
        try:
            temporary.rename(root / name)
        except OSError:
            # Another search may have just finished the same cache.
            if not _is_whole(root / name):
                raise
        return root / name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _teacher_batches(
    model: Any, data: TokenSet, settings: CacheSettings, device: str, progress: Callable[[int, int], None]
) -> Iterator[pa.RecordBatch]:
    """Yield one record batch for each sequence, with a row for each predicted token."""
    model.to(device).eval()
    # Sequences run in parallel, so each thread needs its own states.
    local = threading.local()

    def keep(layer: int, output: Tensor) -> None:
        local.states[layer] = output

    def pass_over(batch: range) -> list[pa.RecordBatch]:
        """Return the outputs of some sequences, as the cache stores them."""
        local.states = {}
        tokens = np.array(data.tokens[batch.start : batch.stop], dtype=np.int64)
        with torch.no_grad():
            with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.bf16):
                hidden = model.base_model(input_ids=torch.from_numpy(tokens).to(device), use_cache=False)
            rows = hidden.last_hidden_state[:, :-1].float()
            columns: list[dict[str, pa.Array]] = [{} for _ in batch]
            if settings.top_k or settings.draws:
                head = model.get_output_embeddings()
                at_once = max(1, (_CPU_ROWS if device == "cpu" else logit_rows(head.out_features)) // rows.shape[1])
                for start in range(0, len(batch), at_once):
                    part = rows[start : start + at_once]
                    found = _sparse_outputs(head(part.flatten(0, 1)), settings, batch[start : start + at_once])
                    columns[start : start + at_once] = found
            states = {f"state_{layer}": local.states[layer][:, :-1].float() for layer in settings.states}
            kept = {"final": rows.half()} if settings.final else {}
            for name, state in states.items():
                kept[name] = rms_normalize(state).half()
                kept[name.replace("state", "size")] = state.square().mean(dim=2).sqrt()
        for name, values in kept.items():
            for own, one in zip(columns, values.cpu().numpy(), strict=True):
                own[name] = _arrow(one)
        return [pa.record_batch(own) for own in columns]

    sequences, length = data.tokens.shape
    take, done = by_length([length] * sequences), 0
    with watched_layers(model, settings.states, keep):
        for found in map_batches(pass_over, sequences, take, pass_tokens(model, device), device):
            for columns in found:
                yield columns
                done += 1
                progress(done, sequences)


def _sparse_outputs(logits: Tensor, settings: CacheSettings, sequences: Sequence[int]) -> list[dict[str, pa.Array]]:
    """Return the columns of each sequence, from float32 logits [sequences x tokens, vocab].

    Logits are stored relative to their row's maximum. float16 then stores those of large probabilities most exactly.
    The logarithm of the row's sum of exponentials, at each temperature, is relative to the maximum too.

    Args:
        logits: The logits, which are changed in place.
        settings: Which outputs to store.
        sequences: Numbers of the sequences. Each is the seed of its draws.
    """
    logits -= logits.amax(dim=1, keepdim=True)
    token, length = id_type(logits.shape[1]), len(logits) // len(sequences)
    parts = logits.split(_CHUNK_ROWS if logits.device.type == "cpu" else len(logits))
    columns: list[dict[str, pa.Array]] = [{} for _ in sequences]

    def add(name: str, values: npt.NDArray[Any]) -> None:
        for own, one in zip(columns, values.reshape(len(sequences), length, -1), strict=True):
            own[name] = _arrow(one)

    add("log_sum", torch.cat([_log_sums(rows, settings.temperatures) for rows in parts]).cpu().numpy())
    if settings.top_k:
        top = logits.topk(min(settings.top_k, logits.shape[1]), dim=1)
        add("ids", top.indices.cpu().numpy().astype(token))
        add("below_maximum", top.values.half().cpu().numpy())
    for draws in settings.draws:
        generators = [torch.Generator().manual_seed(seed) for seed in sequences]
        offsets = torch.cat([torch.rand(length, 1, generator=one, dtype=torch.float64) for one in generators])
        drawn = [_draw(rows, draws, offset) for rows, offset in zip(parts, offsets.split(len(parts[0])), strict=True)]
        counts, ids, below = (torch.cat(found).cpu().numpy() for found in zip(*drawn, strict=True))
        ends = np.concatenate([[0], counts.cumsum()])
        for place, own in enumerate(columns):
            offsets_of = ends[place * length : (place + 1) * length + 1]
            entries = slice(offsets_of[0], offsets_of[-1])
            values = pa.StructArray.from_arrays([ids[entries].astype(token), below[entries]], ["ids", "below_maximum"])
            starts = pa.array((offsets_of - offsets_of[0]).astype(np.int32))
            own[f"drawn_{draws}"] = pa.ListArray.from_arrays(starts, values)
    return columns


def _draw(shifted: Tensor, draws: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample tokens from each row's distribution. Return their number in each row, their ids and their float16 logits.

    The draws are `draws` evenly spaced points of the cumulative distribution, with one random offset per row. A token
    is drawn with probability min(1, draws * p). Weighted by the inverse of that probability, a sum over drawn tokens is
    unbiased (Horvitz and Thompson). Independent draws, as in Sparse Logit Sampling (arXiv 2503.16870), have the same
    mean but a larger variance: the number of times that they draw a likely token is random.

    Args:
        shifted: float32 [rows, vocab], logits minus their row's largest one.
        draws: Number of draws for each row.
        offset: float64 [rows, 1] on the CPU, from 0 to below 1.
    """
    cumulative = shifted.double().exp_().cumsum_(dim=1)
    points = (torch.arange(draws, device=shifted.device) + offset.to(shifted.device)) / draws * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, points, right=True).clamp_(max=shifted.shape[1] - 1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return first.sum(dim=1), ids[first], shifted.gather(1, ids)[first].half()


def _log_sums(shifted: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Return the log-sum-exp at each of the temperatures, [rows, temperatures].

    At half a temperature, the exponentials are squared. That is faster than new exponentials, at an error of a few
    units in the last place.

    Args:
        shifted: float32 [rows, vocab], logits minus their row's largest one.
        temperatures: Temperatures, without repetition.
    """
    found: dict[float, Tensor] = {}
    for temperature in sorted(temperatures, reverse=True):
        if temperature not in found:
            exponential = (shifted / temperature).exp_()
            while temperature in temperatures:
                found[temperature] = exponential.sum(dim=1).log_()
                temperature /= 2
                if temperature in temperatures:
                    exponential.square_()
    return torch.stack([found[temperature] for temperature in temperatures], dim=1)


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
