"""What `/metrics` says of replicas: the load and health of each, and what the router did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_GAUGES = (
    ("running", "replica_requests_running", "Requests started on the replica and not ended"),
    ("waiting", "replica_requests_waiting", "Requests sent to the replica and not started"),
    ("queued_tokens", "replica_queued_tokens", "Prompt tokens sent to the replica and not started"),
    ("blocks_used", "replica_kv_blocks_used", "KV blocks in use on the replica"),
    ("slowness", "replica_slowness", "Times to first token over what is usual for their class"),
)
_COUNTERS = (
    ("routed", "requests_routed", "Decisions of the router"),
    ("hedges", "hedges", "Requests that were late and were sent to a second replica"),
    ("hedges_won", "hedges_won", "Of these, those whose second replica gave the first token"),
    ("hedged_tokens", "hedged_tokens", "Prompt tokens of hedges"),
    ("tied", "requests_tied", "Requests that were put into two queues"),
    ("moved", "requests_moved", "Requests that went on elsewhere because their replica was dead or silent"),
    ("deaths", "replica_deaths", "Replicas that died"),
    ("convictions", "replica_convictions", "Times that a slow replica was put on probation"),
    ("transfers", "kv_transfers", "Requests whose keys and values went from a prefill to a decode worker"),
    ("transferred_bytes", "kv_transferred_bytes", "Bytes of these keys and values"),
)


def fleet_metrics(fleet: Mapping[str, Any], model: str) -> Iterator[Metric]:
    """From a snapshot's `features["fleet"]`."""
    for key, name, help_text in _GAUGES:
        gauge = GaugeMetricFamily(f"armillary_{name}", help_text, labels=["model_name", "replica", "role"])
        for replica in fleet["replicas"]:
            gauge.add_metric([model, str(replica["index"]), replica["role"]], replica[key])
        yield gauge
    up = GaugeMetricFamily("armillary_replica_up", "1 where the replica takes requests", labels=["model_name", "replica", "role"])
    for replica in fleet["replicas"]:
        up.add_metric([model, str(replica["index"]), replica["role"]], float(replica["health"] == "open"))
    yield up
    for key, name, help_text in _COUNTERS:
        counter = CounterMetricFamily(f"armillary_{name}", help_text, labels=["model_name"])
        counter.add_metric([model], fleet[key])
        yield counter
