"""The dashboard of a search, and the scrape configuration of its gauges."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from autodistill.dashboards.grafana import Panel, dashboard
from autodistill.dashboards.prometheus import Job, scrape
from autodistill.errors import InputError
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing, unwritable

PORT = 9464
"""Port that the examples give to `--metrics-port`: the usual one of programs that Prometheus scrapes."""

PANELS = (
    Panel(
        "Best so far",
        "The metric that ranks, on validation text: of the best row, and of the best that needs no training.",
        "short",
        {"{{of}}, {{metric}}": "autodistill_search_best"},
        least=None,
    ),
    Panel(
        "Negative log-likelihood of the best",
        "Nats for each token of validation text.",
        "short",
        {"best": "autodistill_search_best_nll_nats"},
        least=None,
    ),
    Panel("Trials", "Number of trials by their outcome.", "short", {"{{state}}": "autodistill_search_trials"}),
    Panel(
        "Training tokens a second",
        "Of all workers together, over the segments that are done.",
        "short",
        {"tokens a second": "autodistill_search_tokens_per_second"},
    ),
    Panel(
        "Share of the time in the final student",
        "Training of the best student beyond the plan's tokens, as a share of the time budget.",
        "percentunit",
        {"share": "autodistill_search_final_student_share"},
    ),
    Panel(
        "Memory of the best against the budget",
        "Inference memory of the deployed student.",
        "bytes",
        {"best": "autodistill_search_best_memory_bytes", "budget": "autodistill_search_budget_bytes"},
    ),
    Panel(
        "Cached outputs of teachers",
        "Disk space that they take, and their limit.",
        "bytes",
        {"taken": "autodistill_search_cache_bytes", "limit": "autodistill_search_cache_limit_bytes"},
    ),
    Panel(
        "Running",
        "1 while the search runs, 0 once it has ended; no value if the program no longer listens.",
        "short",
        {"running": "autodistill_search_running"},
    ),
)


def write_dashboards(out: Path, port: int = PORT) -> dict[str, Path]:
    """Write `search.json` for Grafana and `prometheus.yml` for Prometheus.

    Args:
        out: The folder. It is created if missing.
        port: Port that the search gets as `--metrics-port`.

    Returns:
        Paths by what they are for.

    Raises:
        InputError: One of the files exists already, or the folder cannot be written.
    """
    files = {
        "grafana": (
            out / "search.json",
            json.dumps(dashboard("autodistill-search", "A search", PANELS), indent=2) + "\n",
        ),
        "prometheus": (
            out / "prometheus.yml",
            yaml.safe_dump(scrape([Job(name="autodistill-search", target=f"127.0.0.1:{port}")]), sort_keys=False),
        ),
    }
    for path, _ in files.values():
        if path.exists():
            raise InputError(f"{path} exists: name another folder with --out, or remove it")
    try:
        make_folder(out.absolute())
        for path, text in files.values():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error) from error
    return {name: path for name, (path, _) in files.items()}
