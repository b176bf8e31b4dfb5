"""The smallest search: the best student of SmolLM2-135M within 175 MB, in ten minutes."""

from typing import Any

import autodistill as ad


def main(**options: Any) -> ad.SearchResult:
    """Search, and print what was found; options are those of `ad.search`."""
    result = ad.search(**{"budget": "175MB", "time": "10m", **options})
    best = result.best
    print(f"{best.id}: {best.metrics['accuracy']} of next tokens, {best.metrics['memory_bytes']}")
    print(result.to_dataframe()[["name", "deployment", "accuracy", "memory_bytes"]].to_string())
    print(f"the file: {best.path}; a page with charts: {result.path / 'report.html'}")
    return result


if __name__ == "__main__":  # Ray starts workers, which import this file
    main()
