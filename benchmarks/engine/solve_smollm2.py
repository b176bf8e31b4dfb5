"""How good is `solve` within tight budgets, on SmolLM2 or another teacher, compared with storages that need no search?

    python -m benchmarks.engine.solve_smollm2 [--data DIR] [--budgets 175MB,150MB] [--tokens 2048] [--export DIR]

The data is any plain text, by default the language reference of Python. `--data DIR` names another one, such as the
documentation of PostgreSQL as text. Nothing is trained. Scores are kept in the cache, so a run can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autodistill.hardware.budget import Budget
from autodistill.options import cache_folder
from autodistill.report.solved import curve, write_chart
from autodistill.search.solve import SolveRequest, solve
from autodistill.units import format_bytes, parse_bytes
from benchmarks.common import program, report

BUDGETS = "175MB,150MB"


def lines(document: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table: the solution and its rivals."""
    for found in document["solutions"]:
        limit = format_bytes(found["budget"]["memory_bytes"])
        yield [limit, f"**solved: {found['solution']['name']}**", *_figures(found["solution"]), "-"]
        for rival in found["rivals"]:
            if rival["kl"] is not None:
                above = f"{rival['kl_above_solution']:+.4f} ± {rival['kl_above_solution_stderr']:.4f}"
                fits = "" if rival["fits"] else ", does not fit"
                yield [limit, f"{rival['name']} ({rival['what']}{fits})", *_figures(rival), above]


def _figures(one: Mapping[str, Any]) -> list[str]:
    kl, nll = (f"{one[name]:.4f} ± {one[f'{name}_stderr']:.4f}" for name in ("kl", "nll"))
    return [format_bytes(one["bytes"]), f"{one['predicted_kl']:.4f}", kl, nll]


def said(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe each solution, and how accurate its prediction was."""
    for found in document["solutions"]:
        one, types = found["solution"], found["solution"]["types"]
        matrices = ", ".join(f"{count} in {kind}" for kind, count in sorted(types["matrices"].items()))
        tables = ", ".join(f"{name} in {kind}" for name, kind in types["tables"].items())
        good = f" As good within the error, and plainer: {found['as_good']}." if found["as_good"] else ""
        good = f" It is itself plain ({found['plain']})." if found["plain"] else good
        yield (
            f"- {format_bytes(found['budget']['memory_bytes'])}: {tables}; matrices {matrices}; cache keys in "
            f"{types['cache_keys']}, values in {types['cache_values']}. On calibration text {one['predicted_kl']:.4f} "
            f"was predicted and {one['calibration_kl']:.4f} measured.{good}"
        )


def main() -> None:
    """Solve each budget, measure the usual storages too, and write the report and its chart."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--budgets", default=BUDGETS, help=f"parted by commas, {BUDGETS} by default")
    parser.add_argument("--context", type=program.token_count, default=2048)
    parser.add_argument("--tokens", type=program.token_count, default=2048)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--export", type=Path, default=None, help="folder that the last solution is written to")
    parser.add_argument("--report", default="solve-smollm2", help="name of the report")
    small = {"budgets": "27MB", "context": 256, "tokens": 256, "sequence_length": 64}
    arguments = program.parse(parser, **small)
    if arguments.smoke:
        arguments.teacher = program.tiny_teacher(layers=2, width=128, heads=2, kv_heads=1)
        arguments.data = program.tiny_data()
    solved: dict[str, Any] = {}
    limits = [parse_bytes(text) for text in arguments.budgets.split(",")]
    for limit in limits:
        request = SolveRequest(
            budgets=(Budget(memory_bytes=limit, context=arguments.context),),
            cache=arguments.cache or cache_folder(),
            teacher=arguments.teacher,
            data=arguments.data,
            tokens=arguments.tokens,
            sequence_length=arguments.sequence_length,
            out=arguments.export,
            export=arguments.export is not None and limit == limits[-1],
        )
        document = solve(request, lambda line: print(line, flush=True))
        solved = {**document, "solutions": [*solved.get("solutions", ()), *document["solutions"]]}
    kept = {name: value for name, value in (solved["exported"] or {}).items() if name not in ("path", "serve")}
    report.note("solved", solved | {"exported": kept or None})
    sections = [
        f"{solved['teacher']['name']}, context {arguments.context}, text {solved['data']['name']}: calibrated on "
        f"{solved['calibration_tokens']:,} tokens, KL to the teacher and NLL in nats a token on "
        f"{solved['held_out_tokens']:,} held-out tokens (± standard error over documents). The teacher's own NLL is "
        f"{solved['teacher_nll']:.4f}. Nothing is trained.",
        report.table(
            ["budget", "storage", "memory", "predicted KL", "KL", "NLL", "KL above the solution, paired"], lines(solved)
        ),
        "\n".join(said(solved)),
        "The picture beside this report, of the same name, has KL against memory.",
    ]
    if exported := solved["exported"]:
        sections.append(
            f"Exported, the last one is a file of {format_bytes(exported['size_bytes'])}. llama.cpp, with its cache, "
            f"has {exported['proof']}, and takes {format_bytes(exported['memory_bytes'])}, as measured."
        )
    path = report.write(arguments.report, f"{solved['teacher']['name']} solved for tight budgets", sections)
    write_chart(curve(solved), path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
