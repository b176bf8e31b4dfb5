"""Holds every figure that README and docs quote to the tracked report it is from, or puts it in.

    python -m benchmarks.reliability.figures [--write]

Each quote in `figures.yaml` names a document, a sentence of it with `{}` for each figure, a report in `reports/`, and a
passage of that with `{}` for the same figures. A figure may be rounded to fewer digits than the report has. A code
block behind a line like `<!-- leaderboard NAME ROWS -->` has the first rows of a reference run, and its gain on test;
of a name that two folders of `results/` have, NAME is `FOLDER/NAME`.
Without `--write` whatever differs is named, and the program ends with 1.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from pathlib import Path

import yaml

from autodistill.cli.tables import leaderboard_table
from autodistill.runs.results.gains import Gains
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import leaderboard_of
from benchmarks.common.program import ROOT, parse, parser_of

QUOTES = Path(__file__).with_name("figures.yaml")
_BOARD = re.compile(r"<!-- leaderboard (\S+) (\d+) -->\n```\n(.*?)```", re.DOTALL)
_FIGURE = r"([+-]?\d[\d,]*(?:\.\d+)?)"


@dataclass(frozen=True, kw_only=True)
class Quote:
    """Figures of one sentence.

    Attributes:
        document: A file that quotes, from the root of the repository.
        says: Its sentence, each figure as `{}`; line breaks of the file count as spaces.
        report: File in `benchmarks/reports/`, or as it is found from there.
        where: The report's passage, with as many `{}`.
        times: What the report's figures are multiplied with, such as 100 for percent.
    """

    document: str
    says: str
    report: str
    where: str
    times: int = 1

    def figures(self) -> list[str]:
        """The figures as the report has them.

        Raises:
            SystemExit: The report has no such passage, or more than one.
        """
        text = (ROOT / "benchmarks" / "reports" / self.report).read_text(encoding="utf-8")
        found = [*pattern(self.where).finditer(text)]
        if len(found) != 1:
            sys.exit(f"{self.report} has {len(found)} passages like {self.where!r}: it needs one")
        return [str(Decimal(text.replace(",", "")) * self.times) for text in found[0].groups()]


def pattern(template: str) -> re.Pattern[str]:
    """What a sentence with `{}` matches, however its lines are broken."""
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in template.split("{}")]
    return re.compile(_FIGURE.join(parts))


def same(shown: str, exact: str) -> bool:
    """Whether a figure is another one rounded to as many digits; a tie may be rounded either way."""
    mine, theirs = (Decimal(text.replace(",", "")) for text in (shown, exact))
    unit = Decimal(1).scaleb(int(mine.as_tuple().exponent))
    return mine in {theirs.quantize(unit, rounding) for rounding in (ROUND_HALF_EVEN, ROUND_HALF_UP)}


def rounded(shown: str, exact: str) -> str:
    """The exact figure with as many digits behind the point as the shown one, and its sign where that has one."""
    digits = len(shown.partition(".")[2])
    value = Decimal(exact.replace(",", "")).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
    return f"{value:{'+' if shown.startswith('+') else ''}{',' if ',' in shown else ''}.{digits}f}"


def quotes(path: Path = QUOTES) -> list[Quote]:
    """Return the figures that pages quote."""
    return [Quote(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def check(found: list[Quote], write: bool = False) -> Iterator[str]:
    """Sentences on each quote whose document says something else; with `write` the document is mended."""
    for quote in found:
        path = ROOT / quote.document
        text = path.read_text(encoding="utf-8")
        places = [*pattern(quote.says).finditer(text)]
        if len(places) != 1:
            yield f"{quote.document} has {len(places)} sentences like {quote.says!r}: it needs one"
            continue
        (place,) = places
        exact = quote.figures()
        wrong = [index for index, one in enumerate(place.groups()) if not same(one, exact[index])]
        if wrong and not write:
            shown, meant = place.group(wrong[0] + 1), exact[wrong[0]]
            yield f"{quote.document} says {shown} in {quote.says!r}; {quote.report} has {meant}"
        for index in reversed(wrong if write else []):
            start, end = place.span(index + 1)
            text = text[:start] + rounded(place.group(index + 1), exact[index]) + text[end:]
        if write and wrong:
            path.write_text(text, encoding="utf-8")


def boards(documents: Iterable[str] = ("README.md", "docs/first-run.md"), write: bool = False) -> Iterator[str]:
    """Sentences on each leaderboard that a document shows otherwise than the run has it; with `write` it is mended."""
    for document in documents:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        for place in reversed([*_BOARD.finditer(text)]):
            name, rows, shown = place.groups()
            exact = board(name, int(rows))
            if shown == exact:
                continue
            if write:
                text = text[: place.start(3)] + exact + text[place.end(3) :]
                path.write_text(text, encoding="utf-8")
            else:
                yield f"{document} shows another leaderboard than the run {name} in results has"


def board(name: str, rows: int) -> str:
    """The first rows of a reference run's leaderboard, and what it gained on the test split."""
    (folder,) = (ROOT / "results").glob(name if "/" in name else f"*/{name}")
    run = RunFolder.open(folder.parent, folder.name)
    ranked, metric = leaderboard_of(run)
    lines = leaderboard_table(ranked[:rows], metric, 110, legend=0).splitlines()[: rows + 1]
    gains = Gains.from_json(run.asked())
    return "\n".join([*lines, *(["...", *textwrap.wrap(gains.describe(), 110)] if gains is not None else [])]) + "\n"


def main() -> None:
    """Print the figures that are not those of their reports and exit with 1, or write them into the pages."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help="put the reports' figures into the documents")
    arguments = parse(parser)
    found = quotes()
    faults = [*check(found, arguments.write), *boards(write=arguments.write)]
    if faults:
        sys.exit("\n".join(faults))
    print(
        f"{sum(quote.says.count('{}') for quote in found)} figures in {len(found)} sentences agree with their reports"
    )


if __name__ == "__main__":
    main()
