"""Rows of a layer's MLP, plain or gated, and of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from armillary.models.graph.rows import Device, Row
from armillary.sim.operation import Axis, Kind


def mlp(device: Device) -> Iterator[Row]:
    """Columns, then rows, split over tensor ranks. Ends with a partial sum."""
    model = device.model
    inner = model.intermediate_size // device.layout.tensor_parallel
    yield from _projections(device, "", inner, "tokens", bias=model.mlp_bias)


def mixture(device: Device) -> Iterator[Row]:
    """Router, experts and shared experts (Lepikhin et al. 2021; Jiang et al. 2024; DeepSeek-AI 2024).

    Without expert parallelism all experts are split like an MLP, and the layer ends with a partial sum. With it every expert is whole on
    one device: each device sends its share of the tokens to the devices of their experts and gets results back; the layer ends with
    complete sums of the device's share.
    """
    model, mixed = device.model, device.model.mixture
    assert mixed is not None
    spread = device.layout.expert_parallel > 1
    inner = mixed.intermediate_size // (1 if spread else device.layout.tensor_parallel)
    own = "shard" if spread else "tokens"
    exchanged = device.message("all_to_all", model.hidden_size, device.layout.expert_parallel, Axis.EXPERT, m="routed")
    router = device.gemm("router", mixed.experts, model.hidden_size, m=own)
    held = device.precision.activation_bytes(mixed.experts * (model.hidden_size + mixed.router_bias))
    yield replace(router, weight_bytes={"always": held}, resident=held)
    if spread:
        yield exchanged
    for row in _projections(device, "experts_", inner, "routed"):
        if row.kind is Kind.GEMM:
            ((_, each),) = row.weight_bytes.items()
            local = mixed.experts // device.layout.expert_parallel
            row = replace(row, weight_bytes={"experts": each}, resident=local * each, expert=True)
        yield row
    if spread:
        yield exchanged
    yield device.memory("combine", mixed.top_k * model.hidden_size, model.hidden_size, m=own)
    if mixed.shared:
        yield from _projections(device, "shared_", mixed.shared * inner, own)


def _projections(device: Device, prefix: str, inner: int, m: str, bias: bool = False) -> Iterator[Row]:
    model = device.model
    up = 2 * inner if model.gated else inner
    yield device.gemm(f"{prefix}{'gate_up' if model.gated else 'up'}", up, model.hidden_size, m=m, bias=bias)
    yield device.memory(f"{prefix}activation", up, inner, m=m)
    yield device.gemm(f"{prefix}down", model.hidden_size, inner, m=m, bias=bias)
