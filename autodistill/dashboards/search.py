"""The dashboard of a search, and the scrape configuration of its gauges."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from autodistill.dashboards.grafana import Panel, Query, dashboard
from autodistill.dashboards.prometheus import Job, scrape
from autodistill.errors import InputError
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing, unwritable

PORT = 9464
"""That `--metrics-port` is given in examples: the usual one of programs that Prometheus scrapes."""

PANELS = (
    Panel(
        title="Best so far",
        about="The metric that ranks, on validation text: of the best row, and of the best that needs no training.",
        unit="short",
        queries=(Query(expr="autodistill_search_best", legend="{{of}}, {{metric}}"),),
        least=None,
    ),
    Panel(
        title="Negative log-likelihood of the best",
        about="Nats for each token of validation text.",
        unit="short",
        queries=(Query(expr="autodistill_search_best_nll_nats", legend="best"),),
        least=None,
    ),
    Panel(
        title="Trials",
        about="By what became of them.",
        unit="short",
        queries=(Query(expr="autodistill_search_trials", legend="{{state}}"),),
    ),
    Panel(
        title="Training tokens a second",
        about="Of all workers together, over the segments that are done.",
        unit="short",
        queries=(Query(expr="autodistill_search_tokens_per_second", legend="tokens a second"),),
    ),
    Panel(
        title="Share of the time in the final student",
        about="Training of the best student beyond the plan's tokens, as a share of the time budget.",
        unit="percentunit",
        queries=(Query(expr="autodistill_search_final_student_share", legend="share"),),
    ),
    Panel(
        title="Memory of the best against the budget",
        about="Inference memory of the deployed student.",
        unit="bytes",
        queries=(
            Query(expr="autodistill_search_best_memory_bytes", legend="best"),
            Query(expr="autodistill_search_budget_bytes", legend="budget"),
        ),
    ),
    Panel(
        title="Cached outputs of teachers",
        about="Disk that they take, and may take.",
        unit="bytes",
        queries=(
            Query(expr="autodistill_search_cache_bytes", legend="taken"),
            Query(expr="autodistill_search_cache_limit_bytes", legend="limit"),
        ),
    ),
    Panel(
        title="Running",
        about="1 while the search runs, 0 once it has ended; nothing where nobody listens any more.",
        unit="short",
        queries=(Query(expr="autodistill_search_running", legend="running"),),
    ),
)


def write_dashboards(out: Path, port: int = PORT) -> dict[str, Path]:
    """Write `search.json` for Grafana and `prometheus.yml` for Prometheus.

    Args:
        out: Folder; it is made where it is not there.
        port: That the search is given as `--metrics-port`.

    Returns:
        Paths by what they are.

    Raises:
        InputError: One of the files is there already, or the folder cannot be written.
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
