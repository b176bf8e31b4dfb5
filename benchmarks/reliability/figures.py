"""Compare every figure quoted in README and docs with its tracked report, or update it from there.

    python -m benchmarks.reliability.figures [--write]

Each quote in `figures.yaml` names a document and one of its sentences with `{}` for each figure. It also names a report
in `reports/` and one of its passages with `{}` for the same figures. A quoted figure may be rounded to fewer digits
than the report has. A code block after a line like `<!-- leaderboard NAME ROWS -->` has the first rows of a reference
run, and its gain on test. If two folders of `results/` have the name, NAME is `FOLDER/NAME`. Every other figure with a
decimal point or an error is in `constants.yaml`, which says what it is. Without `--write`, differences and figures
without a source are named, and the program ends with 1.
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
CONSTANTS = Path(__file__).with_name("constants.yaml")
# Pages whose figures have no quotes. A decision keeps the evidence that it was made on, and names it; the transcript is
# the dated output of one run, and the reference is written from the code: nobody writes figures into these by hand.
_EXEMPT = ("docs/decisions/", "docs/transcript.md", "docs/reference/")
_BOARD = re.compile(r"<!-- leaderboard (\S+) (\d+) -->\n```\n(.*?)```", re.DOTALL)
_FIGURE = r"([+-]?\d[\d,]*(?:\.\d+)?)"
# A figure with a decimal point, which is no part of a name or an address, or one with an error.
DECIMAL = re.compile(r"(?<![A-Za-z0-9_.])\d[\d,]*\.\d+(?!\d|\.\d)|\d+(?= ± )|(?<= ± )\d+(?!\.?\d)")
# What shows no measurement: code of a language and code in a line (commands and settings), and addresses of links.
_CODE = re.compile(r"^ *```\w.*?^ *```$|`[^`\n]+`|\]\([^)\s]+\)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Quote:
    """Figures of one sentence.

    Attributes:
        document: The file that quotes them, relative to the repository's root.
        says: Its sentence, with `{}` for each figure. Line breaks of the file count as spaces.
        report: File in `benchmarks/reports/`, or a path relative to that folder.
        where: The report's passage, with as many `{}`.
        times: Factor for the report's figures, such as 100 for percent.
    """

    document: str
    says: str
    report: str
    where: str
    times: int = 1

    def figures(self) -> list[str]:
        """Return the figures as in the report.

        Raises:
            SystemExit: The report has no such passage, or more than one.
        """
        text = (ROOT / "benchmarks" / "reports" / self.report).read_text(encoding="utf-8")
        found = [*pattern(self.where).finditer(text)]
        if len(found) != 1:
            sys.exit(f"{self.report} has {len(found)} passages like {self.where!r}: it needs one")
        return [str(Decimal(text.replace(",", "")) * self.times) for text in found[0].groups()]


def pattern(template: str) -> re.Pattern[str]:
    """Return a pattern that matches a sentence with `{}` for figures, for any line breaks."""
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in template.split("{}")]
    return re.compile(_FIGURE.join(parts))


def same(shown: str, exact: str) -> bool:
    """Return whether a figure is another one rounded to as many digits. A tie may be rounded either way."""
    mine, theirs = (Decimal(text.replace(",", "")) for text in (shown, exact))
    unit = Decimal(1).scaleb(int(mine.as_tuple().exponent))
    return mine in {theirs.quantize(unit, rounding) for rounding in (ROUND_HALF_EVEN, ROUND_HALF_UP)}


def rounded(shown: str, exact: str) -> str:
    """Return the exact figure with the shown one's number of decimals, and with its plus sign if it has one."""
    digits = len(shown.partition(".")[2])
    value = Decimal(exact.replace(",", "")).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
    return f"{value:{'+' if shown.startswith('+') else ''}{',' if ',' in shown else ''}.{digits}f}"


def quotes(path: Path = QUOTES) -> list[Quote]:
    """Return the figures that pages quote."""
    return [Quote(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def check(found: list[Quote], write: bool = False) -> Iterator[str]:
    """Yield a sentence for each quote whose document differs. With `write`, the document is corrected."""
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


def boards(write: bool = False) -> Iterator[str]:
    """Yield a sentence for each leaderboard in a page that differs from its run. With `write`, it is corrected."""
    for document in pages():
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


def pages() -> list[str]:
    """Return the pages whose figures need a source. The Chinese README has the English one's: see `translation`."""
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return ["README.md", *(one for one in found if not one.startswith(_EXEMPT))]


def constants(path: Path = CONSTANTS) -> list[str]:
    """Return phrases with figures that nobody measured, such as versions and settings."""
    return [phrase for phrases in yaml.safe_load(path.read_text(encoding="utf-8")).values() for phrase in phrases]


def without_source(page: str, found: Iterable[Quote], phrases: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each figure of a page that is neither quoted, nor in a leaderboard, nor in a phrase."""
    text = (ROOT / page).read_text(encoding="utf-8")
    held = [place.span(3) for place in _BOARD.finditer(text)]
    held += [place.span() for phrase in phrases for place in pattern(phrase).finditer(text)]
    for quote in found:
        if quote.document == page:
            for place in pattern(quote.says).finditer(text):
                held += map(place.span, range(1, quote.says.count("{}") + 1))
    prose = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    for figure in DECIMAL.finditer(prose):
        if not any(begins <= figure.start() and figure.end() <= ends for begins, ends in held):
            around = " ".join(text[max(0, figure.start() - 40) : figure.end() + 20].split())
            yield f"{page} says {figure[0]} in {around!r}, which is neither in {QUOTES.name} nor in {CONSTANTS.name}"


def board(name: str, rows: int) -> str:
    """Return the first rows of a reference run's leaderboard, and its gain on the test split."""
    (folder,) = (ROOT / "results").glob(name if "/" in name else f"*/{name}")
    run = RunFolder.open(folder.parent, folder.name)
    ranked, metric = leaderboard_of(run)
    lines = leaderboard_table(ranked[:rows], metric, 110, legend=0).splitlines()[: rows + 1]
    gains = Gains.from_json(run.read_settings())
    return "\n".join([*lines, *(["...", *textwrap.wrap(gains.describe(), 110)] if gains is not None else [])]) + "\n"


def main() -> None:
    """Print the figures that differ from their reports and exit with 1, or correct them in the pages."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help="put the reports' figures into the documents")
    arguments = parse(parser)
    found = quotes()
    faults = [*check(found, arguments.write), *boards(write=arguments.write)]
    for page in pages():
        faults += without_source(page, found, constants())
    if faults:
        sys.exit("\n".join(faults))
    print(
        f"{sum(quote.says.count('{}') for quote in found)} figures in {len(found)} sentences agree with their reports"
    )


if __name__ == "__main__":
    main()
