"""In which types a model is stored within three budgets, and what that costs, without training."""

from collections.abc import Sequence
from typing import Any

import autodistill as ad

BUDGETS = ("150MB", "175MB", "200MB")


def main(teacher: str = "smollm2", budgets: Sequence[str] = BUDGETS, **options: Any) -> list[ad.Solution]:
    """Solve for each budget, and print the solution beside its rivals; options are those of `ad.solve`."""
    solutions = []
    for budget in budgets:
        solution = ad.solve(teacher, budget=budget, **options).best
        solutions.append(solution)
        memory = f"{solution.memory_bytes / 1e6:.0f} MB"
        print(f"{budget}: {solution.deployment.name}, KL {solution.kl} nats a token in {memory}")
        for rival in solution.rivals:
            if rival.fits:
                print(f"    beside it: {rival.deployment.name}, KL {rival.kl}")
    return solutions


if __name__ == "__main__":
    main()
