"""The best stored row for given hardware, solved anew from what is on file; nothing is trained or loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from autodistill.contracts import ModelSpec
from autodistill.described import describe
from autodistill.devices import Device
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimate import spec_from_config
from autodistill.records.leaderboard import DISTILLED
from autodistill.records.measurements import Correction, Measured, correction
from autodistill.records.recalibration import Overhead, Place
from autodistill.records.row import Row, rows_of
from autodistill.records.store import RunFolder, known_runs, read_json
from autodistill.roofline import limit_seconds
from autodistill.serving_memory import memory
from autodistill.shapes import cut_spec
from autodistill.strategy import Deployment, Init
from autodistill.units import LatencyLimit, format_bytes, format_duration

TIERS = tuple(size * 10**9 for size in (4, 8, 12, 16, 24, 48, 80))
"""Classes of GPUs by memory, in bytes."""

_COLUMNS = (
    *("row_id", "trial", "kind", "name", "deployment", "status", "feasible", "strategy", "split", "params"),
    *("accuracy", "accuracy_stderr", "perplexity", "agreement", "memory_bytes", "memory_source", "size_bytes"),
    *("latency_ms", "latency_source", "machine", "shape", "context", "batch", "fidelity", "other"),
)
_CELLS = 256  # contexts that are named where a shorter one would do are multiples of this


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The hardware and the load.

    Attributes:
        memory_bytes: Limit of memory.
        context, streams: Tokens of each stream, and streams at once.
        device: For limits of latency; None where memory alone is limited.
        latency: The limits.
        measured: What was measured of students anywhere; on the device it corrects what is predicted there.
        overheads: By what predicted memory is changed, by class of devices and runtime.
        least: The least of the metric, as `min_accuracy`; None for none.
    """

    memory_bytes: int
    context: int = 2048
    streams: int = 1
    device: Device | None = None
    latency: tuple[LatencyLimit, ...] = ()
    measured: tuple[Measured, ...] = ()
    overheads: Mapping[Place, Overhead] = field(default_factory=dict)
    least: float | None = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("context", "streams"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.least is not None and not 0 <= self.least <= 1:
            raise InputError(f"--min-accuracy must be between 0 and 1, not {self.least}")

    def overhead(self, runtime: str) -> Overhead:
        """What predicted memory is raised by; without a device, where one class alone was measured, that one's."""
        kinds = {kind for kind, _ in self.overheads}
        kind = self.device.kind.name if self.device else next(iter(kinds)) if len(kinds) == 1 else ""
        return self.overheads.get((kind, runtime), Overhead())

    def correction(self, runtime: str) -> Correction:
        """What predicted times on the device are scaled by."""
        key = (id(self.measured), id(self.device), runtime)
        if key not in self._known:
            assert self.device is not None
            # What the ids are of is kept too, here and below, so that they stay theirs.
            self._known[key] = (correction(self.measured, self.device, runtime), self.measured, self.device)
        found: Correction = self._known[key][0]
        return found

    def seconds(self, spec: ModelSpec, deployment: Deployment, limit: LatencyLimit) -> float:
        """What is predicted for a limit; once for each shape, of which many rows may have the same."""
        key = (id(spec), id(self.device), deployment, limit, self.context)
        if key not in self._known:
            assert self.device is not None
            found = limit_seconds(spec, deployment, self.device, limit, context=self.context)
            self._known[key] = (found, spec, self.device)
        return float(self._known[key][0])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stored row, and the shape of its student where that can be told.

    Attributes:
        run: Name of its run.
        row: The row, without its documents.
        metric, direction: What ranked in its run.
        shape: Of the student; None where its teacher is not there any more.
    """

    run: str
    row: Row
    metric: str
    direction: str
    shape: Callable[[], ModelSpec | None]

    @property
    def worth(self) -> float:
        """The metric, more being better."""
        value = self.row.figure(self.metric)
        return -math.inf if value is None else value if self.direction == "max" else -value


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A candidate under the load that is asked.

    Attributes:
        candidate: The row.
        needs: For each limit what it needs, in bytes or seconds; for "accuracy" what it has.
        limits: The limits under the same names.
        sources: Of each of these: "measured", "predicted", or "corrected": predicted, and scaled by measurements there.
    """

    candidate: Candidate
    needs: Mapping[str, float]
    limits: Mapping[str, float]
    sources: Mapping[str, str]

    @property
    def excess(self) -> dict[str, float]:
        """log(need / limit) of each limit, above 0 where it is broken."""
        found = {}
        for name, limit in self.limits.items():
            need = self.needs[name]
            over, under = (limit, need) if name == "accuracy" else (need, limit)
            # Of nothing any limit asks infinitely more; far beyond is far enough.
            ratio = over / under if under else (math.inf if over else 1.0)
            found[name] = math.log(min(max(ratio, 1e-12), 1e12))
        return found

    @property
    def fits(self) -> bool:
        """Whether no limit is broken."""
        return max(self.excess.values()) <= 0

    def to_json(self) -> dict[str, Any]:
        """The answer as plain data: the row's figures, needs, limits and margins."""
        row = self.candidate.row
        return {
            "run": self.candidate.run,
            "row_id": row.row_id,
            "trial": row.trial,
            "kind": row.kind,
            "deployment": row.deployment_name,
            "metric": self.candidate.metric,
            "value": row.figure(self.candidate.metric),
            "stderr": row.figure(f"{self.candidate.metric}_stderr"),
            "size_bytes": row.size_bytes,
            "memory_bytes": int(self.needs["memory"]),
            "memory_source": self.sources["memory"],
            "sources": dict(self.sources),
            "needs": dict(self.needs),
            "limits": dict(self.limits),
            "margins": {name: 1 - math.exp(excess) for name, excess in self.excess.items()},
        }


def stored(out: Path, runs: Sequence[str] = ()) -> list[Candidate]:
    """The students of runs that were trained to the end, of their validation split.

    Args:
        out: Folder of the runs.
        runs: Names; all by default.

    Raises:
        InputError: No such run, none at all, or runs that ranked by different metrics.
    """
    names = list(dict.fromkeys(runs or known_runs(out)))
    if not names:
        raise InputError(f"there are no runs in {out}: make one with autodistill search, or name another --out")
    found, metrics = [], {}
    for name in names:
        run = RunFolder.open(out, name)
        asked = read_json(run.search_file)
        metrics[name] = (asked["metric"], asked["direction"])
        shapes = _Shapes(asked["teacher"]["reference"])
        found += [
            Candidate(
                run=name,
                row=row,
                metric=asked["metric"],
                direction=asked["direction"],
                shape=partial(shapes.of, strategy, shape),
            )
            for row, strategy, shape in _rows(run)
            if row.kind in DISTILLED and row.split != "test" and row.full and row.figure(asked["metric"]) is not None
        ]
    if len(set(metrics.values())) > 1:
        told = ", ".join(f"{name} by {metric}" for name, (metric, _) in metrics.items())
        raise InputError(f"runs that rank by different metrics cannot be compared ({told}): name those of one")
    return found


_Lazy = Callable[[], Mapping[str, Any] | None]


def _rows(run: RunFolder) -> Iterator[tuple[Row, _Lazy, str | None]]:
    """The rows without documents and strategies, which make up most of the file; what gives a row's strategy; and the
    text of its shape.
    """
    if not run.leaderboard_file.is_file():
        for row in rows_of(run.events.read()):
            shape = None if row.shape is None else json.dumps(row.shape)
            yield row, partial(_parsed, json.dumps(row.strategy)), shape
        return
    import pyarrow.parquet as pq

    # Not `read_table`, which imports pandas where that is installed, and takes longer than all else here.
    with pq.ParquetFile(run.leaderboard_file) as file:
        # Runs of earlier versions lack some.
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        table = file.read(columns=names, use_threads=False)
    columns = {name: table.column(name).to_pylist() for name in names}
    strategies = columns.pop("strategy")
    shapes = columns.pop("shape", [None] * len(strategies))
    for name in ("deployment", "other"):
        columns[name] = [None if text is None else _parsed(text) for text in columns[name]]
    for strategy, shape, *cells in zip(strategies, shapes, *columns.values(), strict=True):
        fields = {key: value for key, value in zip(columns, cells, strict=True) if value is not None}
        yield Row(**({"other": {}} | fields)), partial(_parsed, strategy or "null"), shape


@lru_cache(65536)
def _parsed(text: str) -> Any:
    return json.loads(text)


@lru_cache(1024)
def _deployment(text: str) -> Deployment:
    return Deployment.from_json(json.loads(text))


class _Shapes:
    """Shapes of students of one teacher, each worked out once and only where it is asked for.

    A row has its own; of rows that were stored without one it follows from the strategy and the teacher, as long as
    that is there.
    """

    def __init__(self, teacher: str) -> None:
        self._reference = teacher
        self._teacher: ModelSpec | None = None
        self._known: dict[str, ModelSpec | None] = {}
        self._sizes: dict[str, ModelSpec] = {}
        self._tried = False

    def of(self, strategy: _Lazy, stored: str | None) -> ModelSpec | None:
        """The shape of a row's student, where it can be told."""
        if stored is not None:
            if stored not in self._sizes:
                self._sizes[stored] = spec_from_config(json.loads(stored))
            return self._sizes[stored]
        init = (strategy() or {}).get("init")
        key = json.dumps(init, sort_keys=True)
        if key not in self._known:
            if not self._tried:
                self._tried = True
                try:
                    self._teacher = describe(self._reference).spec
                except InputError:
                    self._teacher = None  # rows then hold at the load that they were stored at
            whole = self._teacher is not None and init is not None and init.get("source") != "pretrained"
            self._known[key] = self._cut(Init.from_json(init)) if whole else None
        return self._known[key]

    def _cut(self, init: Init) -> ModelSpec | None:
        """The student's shape; of the many fractions that come to the same sizes it is worked out once."""
        if self._teacher is None:
            return None
        bare = cut_spec(init, replace(self._teacher, tensors=()))
        key = f"{bare.layers} {bare.width} {bare.heads} {bare.kv_heads} {bare.ffn_width}"
        if key not in self._sizes:
            self._sizes[key] = cut_spec(init, self._teacher)
        return self._sizes[key]


def solve(candidate: Candidate, wanted: Wanted) -> Solved | None:
    """What a row needs under the load that is asked; None where that cannot be told."""
    row = candidate.row
    deployment = _deployment(json.dumps(row.deployment))
    spec = candidate.shape() if wanted.latency or (row.context, row.batch) != (wanted.context, wanted.streams) else None
    found = _memory(row, deployment, spec, wanted)
    if found is None:
        return None
    needs, limits = {"memory": float(found[0])}, {"memory": float(wanted.memory_bytes)}
    sources = {"memory": found[1]}
    for limit in wanted.latency:
        time = _latency(row, deployment, spec, wanted, limit)
        if time is None:
            return None
        name = limit.describe()
        (needs[name], sources[name]), limits[name] = time, limit.seconds
    if wanted.least is not None and row.accuracy is not None:
        needs["accuracy"], limits["accuracy"], sources["accuracy"] = row.accuracy, wanted.least, "simulated"
    return Solved(candidate=candidate, needs=needs, limits=limits, sources=sources)


def _memory(row: Row, deployment: Deployment, spec: ModelSpec | None, wanted: Wanted) -> tuple[int, str] | None:
    """Bytes, and whether they were measured; what a measurement differed from the estimate by is kept."""
    if (row.context, row.batch) == (wanted.context, wanted.streams) and row.memory_bytes is not None:
        raised = 0 if row.memory_source == "measured" else wanted.overhead(deployment.runtime).total_bytes
        return row.memory_bytes + raised, row.memory_source or "predicted"
    if spec is None or wanted.context > spec.max_context:
        return None
    weights = row.size_bytes
    need = memory(spec, deployment, context=wanted.context, batch=wanted.streams, weights=weights).total_bytes
    if row.memory_source == "measured" and row.memory_bytes is not None and row.context and row.batch:
        before = memory(spec, deployment, context=row.context, batch=row.batch, weights=weights).total_bytes
        need += row.memory_bytes - before
        return need, "predicted"
    return need + wanted.overhead(deployment.runtime).total_bytes, "predicted"


def _latency(
    row: Row, deployment: Deployment, spec: ModelSpec | None, wanted: Wanted, limit: LatencyLimit
) -> tuple[float, str] | None:
    """Seconds, and how they are known.

    A measurement of the row in its runtime on the device itself goes before any prediction; one of another machine or
    runtime is never used.
    """
    device = wanted.device
    if device is None:
        raise InputError("a limit of latency holds on a device: name it with --device")
    if row.latency_source == "measured" and row.machine == device.name and row.context == wanted.context:
        milliseconds = _timed(row, limit)
        if milliseconds is not None:
            return milliseconds / 1e3, "measured"
    if spec is None:
        return None
    known = wanted.correction(deployment.runtime)
    scale = known.decode if limit.quantity == "tpot" else known.prefill
    return wanted.seconds(spec, deployment, limit) * scale, "corrected" if known.count else "predicted"


def _timed(row: Row, limit: LatencyLimit) -> float | None:
    """The percentile that the row's own timing has, at the limit's streams."""
    loads = (row.other.get("latency_detail") or {}).get("loads", ())
    name = f"{limit.quantity}_p{limit.percentile}_ms"
    return next((load[name] for load in loads if load["streams"] == limit.streams and name in load), None)


def pick(candidates: Iterable[Candidate], wanted: Wanted) -> dict[str, Any]:
    """The best row that meets all limits, the runner-up, the margins, and the limit that binds.

    What binds is the limit that the best of the better rows breaks by most; None where no better row was left out.

    Raises:
        NothingFitsError: None does; the message has the nearest, and the cheapest change that would do.
        InputError: There are no rows.
    """
    ranked = sorted(candidates, key=lambda one: (-one.worth, one.row.memory_bytes or math.inf, one.run, one.row.row_id))
    if not ranked:
        raise InputError("there is no student that was trained to the end: run autodistill search first")
    left_out: list[Solved] = []
    chosen: list[Solved] = []
    unknown = 0
    for solved in (solve(one, wanted) for one in ranked):
        if solved is None:
            unknown += 1
        elif solved.fits:
            chosen.append(solved)
            if len(chosen) == 2:
                break
        elif not chosen:
            left_out.append(solved)
    if not chosen:
        raise NothingFitsError(_nothing(left_out, unknown, wanted))
    excess = left_out[0].excess if left_out else {}
    return {
        "pick": chosen[0].to_json(),
        "runner_up": chosen[1].to_json() if len(chosen) > 1 else None,
        "binds": max(excess, key=lambda name: excess[name]) if excess else None,
        "better_left_out": left_out[0].to_json() if left_out else None,
        "unknown": unknown,
        "context": wanted.context,
        "streams": wanted.streams,
        "device": wanted.device.name if wanted.device else None,
        "memory_overhead": asdict(wanted.overhead(chosen[0].candidate.row.deployment["runtime"])),
    }


def pick_tiers(candidates: Sequence[Candidate], wanted: Wanted, tiers: Sequence[int] = TIERS) -> dict[str, Any]:
    """The best row for each amount of memory; None where nothing fits."""
    rows = []
    for size in tiers:
        try:
            answer = pick(candidates, replace(wanted, memory_bytes=size))["pick"]
        except NothingFitsError:
            answer = None
        rows.append({"memory_bytes": size, "pick": answer})
    return {"tiers": rows, "context": wanted.context, "streams": wanted.streams}


def _nothing(left_out: Sequence[Solved], unknown: int, wanted: Wanted) -> str:
    if not left_out:
        return (
            f"of {unknown} rows none can be solved at context {wanted.context} and {wanted.streams} streams: their "
            "teacher is not where it was, or their context is shorter; ask for the context that they were stored at"
        )
    nearest = min(left_out, key=lambda one: max(one.excess.values()))
    name = max(nearest.excess, key=lambda limit: nearest.excess[limit])
    need, limit = nearest.needs[name], nearest.limits[name]
    row = nearest.candidate.row
    said = f"nothing fits: the nearest, {row.row_id} of {nearest.candidate.run}, "
    if name == "accuracy":
        return f"{said}has an accuracy of {need:.4f}; lower --min-accuracy {limit:g}"
    if name != "memory":
        return f"{said}is predicted {format_duration(need)}, {need / limit:.3g} times {name}; raise --latency"
    over = f"needs {format_bytes(need)} at context {wanted.context}, {format_bytes(need - limit)} over the limit"
    return f"{said}{over}; {' or '.join(_changes(nearest.candidate, need, wanted))}"


def _changes(candidate: Candidate, need: float, wanted: Wanted) -> Iterator[str]:
    """What would make it fit, by how little it changes: fewer streams, a shorter context, more memory."""
    fewer = _most(candidate, lambda count: replace(wanted, streams=count), wanted.streams - 1)
    if fewer:
        yield f"--streams {fewer} would do"
    cells = _most(candidate, lambda count: replace(wanted, context=_CELLS * count), (wanted.context - 1) // _CELLS)
    if cells:
        yield f"--context {_CELLS * cells} would do"
    yield f"a budget of {format_bytes(need)} would do"


def _most(candidate: Candidate, asked: Callable[[int], Wanted], limit: int) -> int:
    """The largest count up to a limit with which it fits, 0 where none does; its needs only grow with the count."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        solved = solve(candidate, asked(middle))
        if solved is not None and solved.fits:
            low = middle
        else:
            high = middle - 1
    return low
