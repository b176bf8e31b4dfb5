"""The panels and alerts of a served student, from its promise.

Latency, memory and the promise are gauges of `autodistill monitor`, which observes the server from outside, since
llama.cpp has none of them. Queues and tokens are the server's own metrics.
"""

from __future__ import annotations

from autodistill.dashboards.grafana import Panel
from autodistill.dashboards.prometheus import Alert
from autodistill.export.promise import Promised
from autodistill.units import format_bytes, format_duration

MONITOR, SERVER = "monitor", "student"
"""Names of the jobs of the monitor and of the server itself."""
QUANTILES = (0.5, 0.95, 0.99)
"""Quantiles that the monitor reports."""
_MARGIN = 0.25  # share above the measured figure that is allowed if no limit was asked for, the same as the monitor's
# A first token may take this much longer: only the runtime was timed, and a request also has to reach it.
_REQUEST_OVERHEAD_SECONDS = 0.01
_WAIT = "2m"
_ON_GPU = " The promise is about the GPU's memory, which the monitor does not see."
_FIGURES = {"ttft": "autodistill_first_token_seconds", "tpot": "autodistill_token_seconds"}
_WORDS = {"ttft": "first tokens take", "tpot": "later tokens take"}
_NAMES = {"ttft": "FirstTokenLate", "tpot": "TokensLate"}
_OWN = {
    "llama.cpp": {
        "written": "llamacpp:tokens_predicted_total",
        "read": "llamacpp:prompt_tokens_total",
        "running": "llamacpp:requests_processing",
        "waiting": "llamacpp:requests_deferred",
    },
    "vllm": {
        "written": "vllm:generation_tokens_total",
        "read": "vllm:prompt_tokens_total",
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
    },
}


def panels(promise: Promised, server: str) -> tuple[Panel, ...]:
    """Return the panels of a served student.

    Args:
        promise: The promise. Its limits are drawn as red lines.
        server: "llama.cpp" or "vllm".
    """
    own = _OWN[server]
    limits = {limit.quantity: limit.seconds for limit in promise.latency}
    return (
        Panel(
            "Time to the first token",
            "Of requests in the monitor's window, by quantile.",
            "s",
            {"{{instance}} {{quantile}}": _FIGURES["ttft"]},
            limit=limits.get("ttft"),
        ),
        Panel(
            "Time per later token",
            "Of requests in the monitor's window, by quantile.",
            "s",
            {"{{instance}} {{quantile}}": _FIGURES["tpot"]},
            limit=limits.get("tpot"),
        ),
        Panel(
            "Memory",
            "Of the server's process." + ("" if promise.of_process else _ON_GPU),
            "bytes",
            {"{{instance}}": "autodistill_memory_bytes"},
            limit=promise.memory_bytes if promise.of_process else None,
        ),
        Panel(
            "Promise kept",
            "1 if a figure is within its promise, 0 if the promise is broken.",
            "short",
            {"{{instance}} {{figure}}": "autodistill_promise_kept"},
        ),
        Panel(
            "Tokens a second",
            "Written and read, by the server's own counters.",
            "short",
            {
                "{{instance}} written": f"rate({own['written']}[5m])",
                "{{instance}} read": f"rate({own['read']}[5m])",
            },
        ),
        Panel(
            "Requests",
            "Being answered, and waiting for a place.",
            "short",
            {"{{instance}} answered": own["running"], "{{instance}} waiting": own["waiting"]},
        ),
    )


def alerts(promise: Promised) -> tuple[Alert, ...]:
    """Return the alerts of a served student: the server is gone, or a promised figure is broken.

    If no limit of a latency was asked for, the measured figure counts as promised, and a quarter more is allowed. It is
    the median for first tokens, and the 95th percentile for later tokens. If nothing was measured on the device that
    the student is for, there is no such alert. The memory of a GPU has none either, as the monitor sees only processes.
    """
    found = [
        Alert(
            name="StudentDown",
            expr=f'up{{job="{SERVER}"}} == 0',
            wait="1m",
            summary="the server of {{ $labels.instance }} does not answer",
        ),
        Alert(
            name="MonitorDown",
            expr=f'up{{job="{MONITOR}"}} == 0 or absent(up{{job="{MONITOR}"}})',
            wait="5m",
            summary="autodistill monitor is not running, so nothing checks whether the promise is kept",
        ),
        Alert(
            name="PromiseBroken",
            expr="autodistill_promise_kept == 0",
            wait=_WAIT,
            summary="{{ $labels.instance }} breaks what was promised for {{ $labels.figure }}",
        ),
    ]
    for quantity in _FIGURES:
        if (limited := _limit(promise, quantity)) is not None:
            quantile, seconds, source = limited
            found.append(
                Alert(
                    name=_NAMES[quantity],
                    expr=f'{_FIGURES[quantity]}{{quantile="{quantile}"}} > {seconds:.6g}',
                    wait=_WAIT,
                    summary=f"{_WORDS[quantity]} longer than {format_duration(seconds)} ({source}) on "
                    "{{ $labels.instance }}",
                )
            )
    if promise.memory_bytes is not None and promise.of_process:
        found.append(
            Alert(
                name="MemoryOverBudget",
                expr=f"autodistill_memory_bytes > {promise.memory_bytes}",
                wait=_WAIT,
                summary=f"{{{{ $labels.instance }}}} takes more than the {format_bytes(promise.memory_bytes)} promised",
            )
        )
    return tuple(found)


def _limit(promise: Promised, quantity: str) -> tuple[float, float, str] | None:
    """Return quantile, seconds and their source. A percentile between the monitor's uses the next higher one."""
    asked = next((limit for limit in promise.latency if limit.quantity == quantity), None)
    if asked is not None:
        quantile = next((one for one in QUANTILES if one >= asked.percentile / 100), QUANTILES[-1])
        return quantile, asked.seconds, f"the limit {asked.describe()}"
    name, quantile = ("ttft_p50_ms", 0.5) if quantity == "ttft" else ("tpot_p95_ms", 0.95)
    value, machine = promise.figure(name), promise.measured.get("machine")
    if value is None or promise.device not in (None, machine):
        return None  # one machine's times say nothing about another machine
    way = _REQUEST_OVERHEAD_SECONDS if quantity == "ttft" else 0.0
    return quantile, (1 + _MARGIN) * value / 1e3 + way, f"a quarter more than measured on {machine}"
