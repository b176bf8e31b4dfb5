"""Blocks of the comparison: a teacher, a text, a budget and a seed, as named in `blocks.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autodistill.units import parse_bytes
from autodistill.utils.hashing import content_hash
from autodistill.utils.yaml_files import read_yaml

FILE = Path(__file__).with_name("blocks.yaml")


@dataclass(frozen=True, kw_only=True)
class Block:
    """What all arms of a comparison have in common.

    Attributes:
        teacher, text: Names of the teacher and of the text.
        budget: Share of the whole teacher's weights and cache at 4 and 8 bits; above 1, the process's bytes.
        seed: Seed of data order and proposals.
        context: Tokens for which memory is counted.
        sequence: Tokens of a sequence.
        box: Seconds of an arm.
        arms: Names of the arms.
    """

    teacher: str
    text: str
    budget: float
    seed: int
    context: int
    sequence: int
    box: float
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that `--only` takes, like "small-manuals-0.8-0"."""
        return f"{self.cell}-{self.seed}"

    @property
    def cell(self) -> str:
        """Teacher, text and budget in one word."""
        size = f"{self.budget:g}" if self.budget <= 1 else f"{self.budget / 1e6:g}MB"
        return f"{self.teacher}-{self.text}-{size}"

    def key(self, arm: str) -> str:
        """Return the key of an arm's row. It does not depend on the other arms."""
        own = {name: value for name, value in asdict(self).items() if name != "arms"}
        return f"{self.name}/{arm} {content_hash(own)}"


def read_blocks(path: Path = FILE) -> dict[str, Any]:
    """Return the content of the file of blocks."""
    found = read_yaml(path)
    return dict(found)


def blocks(asked: Mapping[str, Any], box: float | None = None) -> Iterator[Block]:
    """Yield all blocks: those of the core first, and the cheaper teacher's first.

    Args:
        asked: The file's content.
        box: Seconds of each arm, instead of the file's.
    """
    arms = (*asked["arms"], *asked.get("beside", ()))
    for teacher, sizes in asked["teachers"].items():
        yield from _blocks({**asked, **sizes, "teachers": [teacher], "arms": arms}, box)
    for part in asked.get("further", {}).values():
        yield from _blocks(part, box)


def _blocks(part: Mapping[str, Any], box: float | None) -> Iterator[Block]:
    for teacher in part["teachers"]:
        for seed in part["seeds"]:
            for text in part["texts"]:
                for budget in part["budgets"]:
                    yield Block(
                        teacher=teacher,
                        text=text,
                        budget=float(parse_bytes(budget) if isinstance(budget, str) else budget),
                        seed=seed,
                        context=part["context"],
                        sequence=part["sequence"],
                        box=float(box or part["box"]),
                        arms=tuple(part["arms"]),
                    )
