"""Compare README.zh-CN.md with README.md by paragraph, and update it if no translator is needed.

    python -m benchmarks.documents.translation [--write | --done]

Above each paragraph of the translation is a comment with a hash of the English words that it translates. The hash
leaves out figures: both files have the same figures in the same order. Both have the same code, except its comments.
`--write` puts new figures and new code into the translation. If words have changed, the paragraph is named and shown.
Once it is translated, `--done` writes the new hashes. A paragraph that was added or removed in English is added or
removed by hand. A paragraph without such a comment belongs to the translation alone. If there are differences, the
program ends with 1.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from autodistill.utils.hashing import content_hash
from benchmarks.common.program import ROOT, parse, parser_of

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
_MARK = re.compile(r"<!-- en ([0-9a-f]{12}) -->")
_FIGURE = re.compile(r"(?<![A-Za-z0-9_.])\d+(?:,\d{3})*(?:\.\d+)?")  # not the 2 of a name like SmolLM2
_COMMENT = re.compile(r"(\s+# )(.*)$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """The lines between two blank lines. A code block is one paragraph.

    Attributes:
        first, last: Range of its lines in the file, from 0, without the last.
        lines: Its lines, without HTML comments.
        mark: The hash above it in a translation, or None if there is none.
        place: The line of that hash, or None.
    """

    first: int
    last: int
    lines: tuple[str, ...]
    mark: str | None
    place: int | None

    @property
    def is_code(self) -> bool:
        """Whether it is a code block."""
        return self.lines[0].startswith("```")

    @property
    def comments(self) -> list[str]:
        """The comments in its code."""
        return [found[2] for line in self.lines if (found := _comment(self, line))]

    @property
    def words(self) -> str:
        """A hash of what is translated: its words without figures, or the comments of its code."""
        text = " ".join(self.comments) if self.is_code else " ".join(" ".join(self.lines).split())
        return content_hash(_FIGURE.sub("#", text))


def paragraphs(text: str) -> list[Paragraph]:
    """Return the paragraphs of a page, including code blocks."""
    found, lines = [], text.splitlines()
    mark, place, begins, fenced = None, None, -1, False
    for number, line in enumerate([*lines, ""]):
        if (
            line.startswith("```")
            and not fenced
            and begins >= 0
            and all(_is_remark(one) for one in lines[begins:number])
        ):
            begins = number  # a comment directly above a code block belongs to the page and not to the code
        if begins < 0 and (marked := _MARK.fullmatch(line)):
            mark, place = marked[1], number
            continue
        if begins < 0 and line.strip():
            begins = number
        if line.startswith("```"):
            fenced = not fenced
        elif not line.strip() and not fenced and begins >= 0:
            own = tuple(one for one in lines[begins:number] if not _is_remark(one))
            if own:
                found.append(Paragraph(first=begins, last=number, lines=own, mark=mark, place=place))
                mark, place = None, None
            begins = -1
    return found


def _is_remark(line: str) -> bool:
    return line.startswith("<!--") and line.endswith("-->")


def _comment(paragraph: Paragraph, line: str) -> re.Match[str] | None:
    return _COMMENT.search(line) if paragraph.lines[0] == "```sh" else None


def mended(mine: Paragraph, theirs: Paragraph) -> list[str] | None:
    """Return a translated paragraph with the figures or the code of the English one, or None if they do not match."""
    if theirs.is_code != mine.is_code:
        return None
    if not theirs.is_code:
        text, figures = "\n".join(mine.lines), iter(found := _FIGURE.findall("\n".join(theirs.lines)))
        if len(_FIGURE.findall(text)) != len(found):
            return None
        return _FIGURE.sub(lambda one: next(figures), text).split("\n")
    own = iter(mine.comments)
    if len(mine.comments) != len(theirs.comments):
        return None
    return [
        _COMMENT.sub(lambda one: one[1] + next(own), line) if _comment(theirs, line) else line for line in theirs.lines
    ]


def _both(english: str, chinese: str) -> tuple[list[Paragraph], list[Paragraph]]:
    """Return the paragraphs of both that translate each other, without the line in which each file names the other."""
    theirs = [one for one in paragraphs(english) if CHINESE.name not in one.lines[0]]
    return theirs, [one for one in paragraphs(chinese) if one.mark is not None]


def compare(english: str, chinese: str) -> tuple[list[str], str]:
    """Return the differences in sentences, and the translation with the English page's figures and code.

    Args:
        english, chinese: The two texts.
    """
    theirs, mine = _both(english, chinese)
    lines, faults = chinese.splitlines(), []
    if len(theirs) != len(mine):
        known = {one.mark for one in mine}
        odd = next((one for one in theirs if one.words not in known), theirs[-1])
        faults.append(
            f"README.md has {len(theirs)} paragraphs, and README.zh-CN.md translates {len(mine)}: add or remove what "
            f"is missing, each below a line <!-- en 000000000000 -->; the first that has no translation: {odd.lines[0]}"
        )
        return faults, chinese
    for one, other in reversed([*zip(mine, theirs, strict=True)]):
        better = mended(one, other)
        if one.mark != other.words:
            faults.append(
                f"words of README.md line {other.first + 1} have changed since README.zh-CN.md line {one.first + 1} "
                f"was translated: {' '.join(other.lines)[:300]}"
            )
        elif better is None:
            faults.append(f"README.zh-CN.md line {one.first + 1} has other figures, or others than README.md has there")
        elif sorted(_LINK.findall("\n".join(better))) != sorted(_LINK.findall("\n".join(other.lines))):
            faults.append(f"README.zh-CN.md line {one.first + 1} has other links than README.md has there")
        if better is not None and one.mark == other.words:
            kept = [line for line in lines[one.first : one.last] if _is_remark(line)]
            lines[one.first : one.last] = [*kept, *better]
    return faults[::-1], "\n".join(lines) + "\n"


def done(english: str, chinese: str) -> str:
    """Return the translation with hashes of the current English page.

    Raises:
        SystemExit: The texts have different numbers of paragraphs.
    """
    theirs, mine = _both(english, chinese)
    if len(theirs) != len(mine):
        sys.exit(compare(english, chinese)[0][0])
    lines = chinese.splitlines()
    for one, other in zip(mine, theirs, strict=True):
        assert one.place is not None
        lines[one.place] = f"<!-- en {other.words} -->"
    return "\n".join(lines) + "\n"


def faults(english: Path = ENGLISH, chinese: Path = CHINESE, write: bool = False) -> list[str]:
    """Return the differences in sentences. With `write`, new figures and code are put into the translation first."""
    text = chinese.read_text(encoding="utf-8")
    found, better = compare(english.read_text(encoding="utf-8"), text)
    if better != text and write:
        chinese.write_text(better, encoding="utf-8")
    elif better != text:
        found.append("README.zh-CN.md lacks figures or code of README.md: --write puts them in")
    return found


def _texts() -> tuple[str, str]:
    return ENGLISH.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")


def main() -> None:
    """Print what the translation lacks and exit with 1, or write figures, code and hashes into it."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--write", action="store_true", help="put the figures and the code of README.md into the translation"
    )
    parser.add_argument("--done", action="store_true", help="all words are translated: write the hashes of README.md")
    arguments = parse(parser)
    if arguments.done:
        CHINESE.write_text(done(*_texts()), encoding="utf-8")
    found = faults(write=arguments.write or arguments.done)
    if found:
        sys.exit("\n".join(found))
    print(f"{len(_both(*_texts())[0])} paragraphs of README.md are translated")


if __name__ == "__main__":
    main()
