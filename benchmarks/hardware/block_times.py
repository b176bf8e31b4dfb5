"""How well do times of blocks and the roofline predict whole models in llama.cpp, and which FFN widths are slow?

python -m benchmarks.hardware.block_times [--models 0.13B 0.09B] [--context 2048] [--rounds 3] [--shared]

Blocks are timed as in `autodistill measure MODEL --blocks`. Then another library writes whole models of other storages
and widths. Their times are predicted and measured: a token at a full context, and a prompt of 512.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autodistill.advisor.blocks.timing import Clock, serve, time_blocks
from autodistill.advisor.describe import spec_of
from autodistill.estimates.block_times import PARTS, BlockTimes, liked_multiple
from autodistill.estimates.speed import speed
from autodistill.hardware.device import Device
from autodistill.hardware.local import local_device
from autodistill.hardware.machine import cores, detect
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid
from autodistill.quantization.scheme import scheme_by_tensor
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from benchmarks.common import program, report
from benchmarks.common.model_files import Case, write_gguf
from benchmarks.hardware.latency_roofline import SHAPES, one_core

TINY = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 128, "vocabulary": 512}
CHUNKS, STEPS, WARM = 4, 16, 4  # numbers of tokens for a whole model
PREDICTORS = ("blocks", "roofline", "roofline, scaled")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole model: its name, its sizes, and how it is stored."""

    name: str
    case: Case
    deployment: Deployment

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return spec_of(self.case.config())


def wholes(case: Case, kinds: Sequence[str]) -> list[Whole]:
    """Return whole models.

    The first has the reference's type, which scales the roofline. The others differ in type and width.
    """
    plain = [(kind, case, _mixed(spec_of(case.config()), [kind], 0)) for kind in ("q8_0", "q4_0", "q5_1")]
    narrow = replace(case, ffn=case.ffn * 3 // 4 // 64 * 64)
    mixed = [
        ("mixed", case, _mixed(spec_of(case.config()), kinds, 1)),
        ("mixed again, cache in q8_0", case, _cached(_mixed(spec_of(case.config()), kinds, 2), "q8_0", "q8_0")),
        (
            f"mixed, FFNs of {narrow.ffn}, cache in q8_0 and q4_0",
            narrow,
            _cached(_mixed(spec_of(narrow.config()), kinds, 3), "q8_0", "q4_0"),
        ),
    ]
    return [Whole(name=name, case=one, deployment=deployment) for name, one, deployment in (*plain, *mixed)]


def _mixed(spec: ModelSpec, kinds: Sequence[str], seed: int) -> Deployment:
    """Return a deployment with every matrix in a random type, among those whose blocks divide its rows."""
    dice, chosen = np.random.default_rng(seed), {}
    for tensor in spec.tensors:
        if tensor.role in (Role.LINEAR, Role.EMBEDDING, Role.HEAD):
            held = [kind for kind in kinds if not isinstance(one := TYPES[kind], Grid) or one.divides(tensor.shape[1])]
            chosen[tensor] = held[dice.integers(len(held))]
    scheme = scheme_by_tensor(chosen)
    return Deployment(
        runtime="llama.cpp",
        format=scheme.format,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        types=scheme.types,
    )


def _cached(deployment: Deployment, keys: str, values: str) -> Deployment:
    return replace(deployment, cache_type_k=keys, cache_type_v=values)


class CpuClock(Clock):
    """Times llama.cpp's one thread in CPU seconds. Tokens get their mean."""

    def prompt(self, server: LlamaServer, ids: list[int]) -> float:
        """Return the CPU seconds of reading a prompt."""
        began = _cpu_seconds(server)
        server.begin([ids])
        return _cpu_seconds(server) - began

    def tokens(self, server: LlamaServer, count: int) -> list[float]:
        """Return the mean CPU seconds of a further token, once for each token."""
        began = _cpu_seconds(server)
        super().tokens(server, count)
        return [(_cpu_seconds(server) - began) / count]


def _cpu_seconds(server: LlamaServer) -> float:
    return time.clock_gettime(~server.pid << 3 | 2)  # Linux's clock of another process


def measured(one: Whole, folder: Path, times: BlockTimes, clock: Clock) -> tuple[float, float]:
    """Return the seconds of a token at the full context, and of a prompt, taken in the same way as those of blocks."""
    path = folder / "whole.gguf"
    write_gguf(one.case, one.spec, one.deployment, path)
    context = int(times.key["context"])
    with serve(path, context, int(times.key["threads"]), *one.deployment.cache_types) as server:
        ids = [2 + 7 * index % (one.case.vocabulary - 2) for index in range(context)]
        clock.prompt(server, ids[:32])
        first = clock.prompt(server, ids[: times.prompt.tokens])
        clock.prompt(server, ids)
        clock.tokens(server, WARM)
        return float(np.median([step for _ in range(CHUNKS) for step in clock.tokens(server, STEPS)])), first


def predicted(one: Whole, times: BlockTimes, device: Device) -> dict[str, tuple[float, float]]:
    """Return the seconds of a token and of a prompt by each of the first two predictors."""
    context, prompt = int(times.key["context"]), times.prompt.tokens
    token = times.seconds(one.spec, one.deployment, times.decode, context)
    first = times.seconds(one.spec, one.deployment, times.prompt, prompt)
    assert token is not None
    assert first is not None
    guess = speed(one.spec, one.deployment, device, context=context, prompt=prompt)
    return {"blocks": (token, first), "roofline": (guess.decode_ms / 1e3, guess.time_to_first_token_ms / 1e3)}


def section(
    name: str, sizes: Mapping[str, int], context: int, rounds: int, *, alone: bool, kinds: Sequence[str]
) -> str:
    """Time the blocks of a model and whole models, and return a section that compares both."""
    case = Case(family="llama", tied=True, **sizes)
    spec = spec_of(case.config())
    device = local_device(Path(tempfile.mkdtemp()), replace(detect(), cpus=cores() if alone else 1, gpus=()))
    if not alone:
        found = one_core()
        device = replace(device, bandwidth=found["bandwidth"], rates=found["rates"])
    clock, threads = (Clock(), 0) if alone else (CpuClock(), 1)
    times = time_blocks(spec, name, context, rounds, print, kinds=kinds, threads=threads, clock=clock)
    models = wholes(case, [kind for kind in TYPES if kind in kinds])
    taken: dict[str, list[tuple[float, float]]] = {one.name: [] for one in models}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for one in models:
                taken[one.name].append(measured(one, Path(folder), times, clock))
    guesses = {one.name: predicted(one, times, device) for one in models}
    real = {
        name: tuple(statistics.median(values) for values in zip(*turns, strict=True)) for name, turns in taken.items()
    }
    # One measurement of a whole model corrects the roofline, as in `pick`.
    first = models[0].name
    scale = [real[first][index] / guesses[first]["roofline"][index] for index in (0, 1)]
    for guess in guesses.values():
        guess["roofline, scaled"] = tuple(scale[index] * guess["roofline"][index] for index in (0, 1))  # type: ignore[assignment]
    report.note(name, {"times": times.to_json(), "taken": taken, "predicted": guesses, "device": device.to_json()})
    return "\n\n".join(
        [
            f"## {name}",
            f"Blocks were timed in {times.layers} of {spec.layers} layers; {_machine(times, alone=alone)}",
            _whole_table(real, taken, guesses, 0, 1e3, f"a token at {context}, ms"),
            _whole_table(real, taken, guesses, 1, 1e3, f"a prompt of {times.prompt.tokens}, ms"),
            _error_summary(real, guesses, first),
            _blocks(times),
            _widths(times),
        ]
    )


def _machine(times: BlockTimes, *, alone: bool) -> str:
    if alone:
        return f"all {times.key['threads']} cores, by the clock."
    return "CPU time of one thread, as other work shared the machine."


def _whole_table(
    real: Mapping[str, tuple[float, ...]],
    taken: Mapping[str, Sequence[tuple[float, float]]],
    guesses: Mapping[str, Mapping[str, tuple[float, float]]],
    index: int,
    unit: float,
    what: str,
) -> str:
    lines = []
    for name, seconds in real.items():
        turns = [turn[index] for turn in taken[name]]
        spread = (max(turns) - min(turns)) / 2 / seconds[index]
        cells = [f"{guesses[name][one][index] / seconds[index] - 1:+.1%}" for one in PREDICTORS]
        lines.append([name, f"{unit * seconds[index]:.4g} ± {spread:.1%}", *cells])
    return report.table([f"{what}", "measured", *PREDICTORS], lines)


def _error_summary(
    real: Mapping[str, tuple[float, ...]], guesses: Mapping[str, Mapping[str, tuple[float, float]]], first: str
) -> str:
    said = []
    for index, what in ((0, "token"), (1, "prompt")):
        for one in PREDICTORS:
            errors = [abs(guesses[name][one][index] / real[name][index] - 1) for name in real if name != first]
            said.append(f"{what}, {one}: {statistics.median(errors):.1%}, {max(errors):.1%} at most")
    return f"Median errors, without {first}, by which the roofline is scaled: {'; '.join(said)}."


def _blocks(times: BlockTimes) -> str:
    lines = []
    for kind in (kind for kind in TYPES if any(kind in times.decode.parts[part] for part in PARTS)):
        cells = []
        for part in PARTS:
            for one, unit in ((times.decode, 1e6), (times.prompt, 1e3)):
                found = one.parts[part].get(kind)
                cells.append("" if found is None else f"{unit * found.seconds:.3g} ± {unit * found.spread:.1g}")
        lines.append([kind, *cells])
    titles = ["type", *(f"{part}, {what}" for part in PARTS for what in ("token, us", "prompt, ms"))]
    return f"Of a layer, and of the whole head:\n\n{report.table(titles, lines)}"


def _widths(times: BlockTimes) -> str:
    lines = [
        [
            one.neurons,
            one.multiple,
            one.kind,
            f"{one.decode:+.1%} ± {one.decode_spread:.1%}",
            f"{one.prompt:+.1%} ± {one.prompt_spread:.1%}",
        ]
        for one in times.widths
    ]
    if not lines:
        return "No odd widths were timed: the FFN is too narrow."
    liked = liked_multiple(times.widths)
    table = report.table(["neurons", "multiple of", "type", "token", "prompt"], lines)
    return f"What an FFN takes beyond its share, as a share of it; multiples of {liked} are not slow:\n\n{table}"


def main() -> None:
    """Time blocks and whole models, and write the report of how well the sums predict."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, "tiny"], default=["0.13B", "0.09B"], help="sizes")
    parser.add_argument("--context", type=program.token_count, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=3, help="how often all is timed")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES), help="that are timed")
    parser.add_argument("--shared", action="store_true", help="CPU time of one thread, where other work runs")
    small = {"models": ["tiny"], "context": 64, "rounds": 1, "types": ["q8_0", "q4_0", "q5_1"], "shared": True}
    given = program.parse(parser, **small)
    sections = [
        section(name, SHAPES.get(name, TINY), given.context, given.rounds, alone=not given.shared, kinds=given.types)
        for name in given.models
    ]
    print(report.write("block-times", "Times of blocks and the roofline, held against whole models", sections))


if __name__ == "__main__":
    main()
