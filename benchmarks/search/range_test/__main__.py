"""Which learning rate do a few steps choose for a longer training, and what is lost against the best rate at its end?

    python -m benchmarks.search.range_test [--seeds 1] [--smollm2 whole narrow] [--small-lm] [--time 10m]

Students are trained for some steps, and for many more, at rates from far too low to far too high. Their teachers are
small ones of three families and three widths, SmolLM2 with --smollm2, and the small language model with --small-lm.
Rules that only see the short trainings then choose a rate. The students of sums are those that `math_table` recorded.
Measurements are kept, and the same command continues them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.search.prior.tried_rates import (
    FACTOR,
)
from autodistill.utils.hashing import content_hash
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of, token_count
from benchmarks.search.range_test.found import Found, measured, of_sums
from benchmarks.search.range_test.rules import best_table, rules_table
from benchmarks.search.range_test.students import (
    BATCH,
    FAMILIES,
    FFN,
    LENGTH,
    LONG,
    Q4_0,
    RECIPE,
    SHAPES,
    TEACHER_STEPS,
    WIDTHS,
    cases,
    small_lm_case,
    smollm2_cases,
)


def main() -> None:
    """Test and train the students that are not stored yet, and write the report of the rates chosen."""
    parser = parser_of(__doc__, seeds=1, time=True)
    parser.add_argument("--students", type=int, default=None, help="how many small ones, of all by default")
    parser.add_argument("--report", action="store_true", help="only the report of the students that are there")
    shapes = tuple(SHAPES)
    parser.add_argument(
        "--smollm2",
        nargs="+",
        choices=shapes,
        default=(),
        help="students of SmolLM2 too: some 10 minutes of a core each",
    )
    parser.add_argument("--small-lm", action="store_true", help="the small language model too: 5 minutes of a core")
    parser.add_argument("--steps", type=int, default=LONG, help="of a long training of a small student")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="of a small teacher's training")
    parser.add_argument("--eval-tokens", type=token_count, default=4096, help="held-out tokens that are read")
    arguments = parse(parser, steps=32, teacher_steps=4, eval_tokens=256)
    torch.set_num_threads(1)
    keep_freed_memory()
    wanted = cases(arguments.seeds, arguments.steps)[: arguments.students]
    if arguments.smoke:
        wanted = [replace(wanted[0], powers=(-1, 0, 1), short=(4,))]
    wanted += [case for case in smollm2_cases() if case.shape in arguments.smollm2]
    wanted += [small_lm_case()] if arguments.small_lm else []
    source = content_hash(
        [FFN, RECIPE.to_json(), Q4_0.to_json(), BATCH, LENGTH, arguments.teacher_steps, arguments.eval_tokens]
    )
    kept = report.Kept("range-test", source, -1.0 if arguments.report else arguments.time)
    found = []
    for case in wanted:
        try:
            found.append(measured(case, kept, arguments.teacher_steps, arguments.eval_tokens))
        except SystemExit:
            if not arguments.report:
                raise
    alone = wanted and all(case.folder for case in wanted)
    found += [] if alone else of_sums()
    title = "Which learning rate do a few steps choose for a longer training?"
    print(report.write("range-test-small-lm" if alone else "range-test", title, sections(found)))


def sections(found: Sequence[Found]) -> list[str]:
    """Return the parts of the report."""
    small = next(one for one in found if one.counts)
    families, widths = ", ".join(FAMILIES), ", ".join(map(str, WIDTHS))
    return [
        f"Students of small teachers ({families}; widths {widths}), whole or with half of their FFN neurons, learn a "
        f"text of the kind that the teacher was trained on, in steps of {BATCH} tokens; those of SmolLM2 learn the "
        "default text, in steps of 256, and the small language model PostgreSQL's manual, by the scales of its codes. "
        f"The decay is on Q4_0, and in Q4_0 they are judged, on {sum(small.counts):,} held-out tokens of "
        f"{len(small.counts)} documents. Rates lie {FACTOR:.3g} times apart. The students of sums "
        "are those of `math_table`: 100 steps, rates twice apart, and the logarithm of accuracy stands for nats.",
        "## Rules\n\nEach rule knows trainings of a quarter of the steps or fewer, at all rates. Thousandths of a nat "
        "per held-out token that it loses at the end of the long training against the best rate there: the mean, the "
        "most, and how many students end more than two standard errors below what they were untrained. In brackets "
        "the number of students.\n\n" + rules_table(found),
        "## Students\n\nThe best rates are tops of parabolas through the gains, within the rates that were tried.\n\n"
        + best_table(found),
    ]


if __name__ == "__main__":
    main()
