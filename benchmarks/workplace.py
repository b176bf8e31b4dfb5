"""This machine as the place of a search."""

from __future__ import annotations

from autodistill.hardware import detect
from autodistill.search.loading import Place
from autodistill.search.share import check_share


def here() -> Place:
    """This machine, with a trial a worker, as a search without options has it."""
    machine = detect()
    return Place(here=machine, machines=(machine,), share=check_share((machine,), None, None, "inline"))
