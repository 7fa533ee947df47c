"""Metrics of a policy server in Prometheus' text format, written without the client library."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from vla.runtime.machine import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_PREFIX = "bascule_"

COUNTERS = {
    "connections_total": "Connections by outcome: accepted, full, unauthorised, unknown_policy.",
    "requests_total": "Observations by policy and outcome: ok, refused (the client's fault), failed (the policy's).",
    "received_bytes_total": "Bytes of observations.",
    "closed_total": "Connections that the server closed: too slow or too long idle.",
    "reloads_total": "Checkpoints loaded again, by policy and outcome: ok, refused, failed.",
}
HISTOGRAMS = {
    "inference_seconds": ("One forward pass.", _SECONDS),
    "request_seconds": ("From an observation's arrival to its answer's departure.", _SECONDS),
    "batch_size": ("Observations answered by one forward pass, one entry for each observation.", _SIZES),
}
GAUGES = {"clients": "Connected clients.", "waiting_requests": "Observations that wait for the policy."}


class Metrics:
    """Counters and histograms by name and labels; all on one thread."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self._buckets = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}
        self._sums: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter of `COUNTERS`."""
        assert name in COUNTERS, name
        self._counts[name, _labels(labels)] += amount

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram of `HISTOGRAMS`."""
        self._buckets[name][bisect_left(HISTOGRAMS[name][1], value)] += 1
        self._sums[name] += value

    def text(self, **gauges: float) -> str:
        """All metrics in the text format, with the current values of `GAUGES`."""
        lines: list[str] = []
        for name, help_text in COUNTERS.items():
            lines += _head(name, help_text, "counter")
            lines += [f"{_PREFIX}{key}{label} {n}" for (key, label), n in sorted(self._counts.items()) if key == name]
        for name, (help_text, bounds) in HISTOGRAMS.items():
            lines += _head(name, help_text, "histogram")
            total = 0
            for bound, n in zip((*bounds, "+Inf"), self._buckets[name], strict=True):
                total += n
                edge = bound if isinstance(bound, str) else f"{bound:g}"
                lines.append(f'{_PREFIX}{name}_bucket{{le="{edge}"}} {total}')
            lines += [f"{_PREFIX}{name}_sum {self._sums[name]:.9g}", f"{_PREFIX}{name}_count {total}"]
        for name, value in gauges.items():
            lines += [*_head(name, GAUGES[name], "gauge"), f"{_PREFIX}{name} {value:g}"]
        lines += [
            "# HELP process_resident_memory_bytes Resident memory size in bytes.",
            "# TYPE process_resident_memory_bytes gauge",
            f"process_resident_memory_bytes {resident_bytes()}",
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, help_text: str, kind: str) -> list[str]:
    return [f"# HELP {_PREFIX}{name} {help_text}", f"# TYPE {_PREFIX}{name} {kind}"]


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    escaped = {k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in labels.items()}
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(escaped.items())) + "}"
