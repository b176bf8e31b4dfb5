"""The best stored student for three GPUs, chosen from a leaderboard without training."""

from collections.abc import Sequence
from pathlib import Path

import autodistill as ad

GPUS = ("rtx 3060 12gb", "rtx 4060 ti 16gb", "rtx 4090")
REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def main(
    runs: Path = REFERENCE, gpus: Sequence[str] = GPUS, context: int = 4096, streams: int = 4
) -> dict[str, ad.Pick]:
    """Pick for each GPU, and print the rows.

    Args:
        runs: Folder that holds runs; those that come with the project by default.
        gpus: Names that `ad.devices` knows.
        context: Tokens of each sequence that must fit.
        streams: Sequences at once.
    """
    found = {}
    for gpu in gpus:
        try:
            found[gpu] = ad.pick(device=gpu, context=context, streams=streams, runs=runs)
        except ad.NothingFitsError as error:
            print(f"{gpu}: {error}")
            continue
        student = found[gpu].student
        print(f"{gpu}: {student.id}, {student.metrics['accuracy']} of next tokens in {student.deployment.name}")
    return found


if __name__ == "__main__":
    main()
