"""Which student is the best draft for SmolLM2 in 16 bits: how much of it is accepted, and how fast is it in llama.cpp?

    python -m benchmarks.hardware.drafts [--students FILE ...] [--prompts 8] [--decoded 64] [--threads N]

The drafts are the teacher itself in fewer bits, its even half as a student that is cut and not trained, and the
students that are named. `autodistill drafts` tries each: acceptance by llama.cpp's own counters, and speed against the
target alone with the same beginnings. Acceptance and tokens a pass do not depend on the machine. On a busy machine, the
speeds should not be quoted, and the report says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autodistill.advisor.describe import deployment_named
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.background_load import Watch
from autodistill.hardware.machine import cores
from autodistill.options import cache_folder
from autodistill.service.drafts import drafts
from autodistill.service.request import DraftsRequest
from autodistill.strategy.strategy import Init
from benchmarks.common import program, report

TARGET = "gguf-f16"
QUANTISED = ("gguf-q8_0", "gguf-q4_1", "gguf-q4_0")
HALF = "gguf-q8_0"


def packed(folder: Path, name: str, to: Path, called: str = "") -> Path:
    """Export a transformers folder as a GGUF file in a format, and name the file after it."""
    made = GgufExporter().export(folder, deployment_named(name), to / name).path
    return made.rename(to / f"{called or name.removeprefix('gguf-')}.gguf")


def students(teacher: Path, folder: Path) -> Iterator[Path]:
    """Yield the teacher in fewer bits, and its half."""
    for name in QUANTISED:
        yield packed(teacher, name, folder)
    half, _ = build_student(teacher, Init(depth=0.5))
    save_student(half, teacher, folder / "half")
    yield packed(folder / "half", HALF, folder, "half-q8_0")


def lines(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a table line for each draft."""
    for one in found:
        share, error = 100 * one["acceptance"], one["acceptance_stderr"]
        yield [
            Path(one["draft"]).stem,
            f"{one['size_bytes'] / 1e6:.1f}",
            f"{share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"),
            f"{one['accepted']:,} of {one['drafted']:,}",
            f"{one['tokens_per_pass']:.2f}",
            f"{one['cost']:.2f}",
            f"{one['expected']:.2f}",
            f"{one['speed']:.2f}" + ("" if one["speed_stderr"] is None else f" ± {one['speed_stderr']:.2f}"),
            f"{one['same']} of {one['answers']}",
        ]


def main() -> None:
    """Try the drafts, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--students", nargs="+", type=Path, default=[], help="GGUF files of trained students")
    parser.add_argument("--prompts", type=int, default=8, help="beginnings, 8 by default")
    parser.add_argument(
        "--decoded", type=program.token_count, default=64, help="tokens that continue each, 64 by default"
    )
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp; all cores by default")
    given = program.parse(parser, prompts=2, decoded=8, threads=1)
    with tempfile.TemporaryDirectory(prefix="drafts-") as place:
        folder = Path(place)
        if given.smoke:
            teacher = Path(program.tiny_teacher())
        else:
            teacher = materialize(resolve_teacher("smollm2"), cache_folder()).folder
        target = packed(teacher, TARGET, folder)
        tried = [str(one) for one in (*students(teacher, folder), *given.students)]
        asked = {"prompts": given.prompts, "decoded": given.decoded, "threads": given.threads, "time": "1h"}
        with Watch(given.threads or cores()) as watch:
            document = drafts(DraftsRequest(target, drafts=tried, runs=folder, **asked), print)
    found = [one | {"draft": Path(one["draft"]).name, "target": target.name} for one in document["drafts"]]
    report.note("drafts", {"tokens_per_second": document["tokens_per_second"], "drafts": found})
    report.note("load_average", watch.noise.load_average)
    busy = watch.noise.load_average > cores() / 2
    doubt = (
        f" Other work ran meanwhile (a load of {watch.noise.load_average:.0f} before it): the speeds are no figures to "
        "quote; what was taken does not depend on it."
        if busy
        else ""
    )
    text = (
        f"SmolLM2-135M in 16 bits continues {given.prompts} beginnings of the text that ships by {given.decoded} "
        "tokens, greedily, alone and with each draft, which proposes three tokens at once. Cost is the time of a "
        "draft's token over the target's; expected is what the tokens a pass give if a pass over four tokens lasts as "
        f"long as one over a single token.{doubt}"
    )
    titles = ["draft", "MB", "taken, %", "tokens", "a pass", "cost", "expected, times", "speed, times", "the same"]
    print(report.write("drafts", "Students as drafts of their teacher", [text, report.table(titles, lines(found))]))


if __name__ == "__main__":
    main()
