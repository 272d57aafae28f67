"""The arithmetic behind an option, line by line, so that a reader can redo it."""

from __future__ import annotations

from armillary.core.units import format_bytes, format_duration
from armillary.plan.demand import Moments
from armillary.plan.file import per_million
from armillary.plan.search import Option


def arithmetic(option: Option, moments: Moments, rate: float | None) -> list[tuple[str, str]]:
    """(what, how) from memory to money."""
    candidate, deployment, config = option.candidate, option.candidate.deployment, option.candidate.scenario.settled
    assert config.kv_blocks is not None
    each, most, served = candidate.devices, option.ceiling, option.capacity.rate
    device = deployment.device
    lines = [
        (
            "memory of a device",
            f"{format_bytes(deployment.usable)} usable of {format_bytes(device.memory)}: {format_bytes(deployment.weight_bytes)} weights, "
            f"{format_bytes(deployment.kv_memory)} left for keys and values: {config.kv_blocks:,} blocks x {config.block_size} = "
            f"{config.kv_blocks * config.block_size:,} tokens a replica",
        ),
        (
            "a request, on average",
            f"{moments.prompt:,.0f} prompt tokens, {moments.answer:,.1f} generated; its decodes read {moments.read:,.0f} cached tokens",
        ),
        (
            "alone",
            f"first token {format_duration(option.alone.first_token)}, at least {format_duration(option.alone.per_token)} a token after it",
        ),
        (
            "ceiling",
            f"{most.iterations:.4g} iterations of its own a request ({most.bound}), at least {format_duration(most.ns)} each: "
            f"at most {most.rate:.4g} requests a second a replica",
        ),
        ("capacity", f"{served:.4g} requests a second a replica ({served / most.rate:.0%} of the ceiling), {served / each:.4g} a device"),
    ]
    replicas = option.replicas(rate)
    if rate is not None:
        lines.append(("replicas", f"ceil({rate:g} / {served:.4g}) = {replicas} by capacity alone: {replicas * each} devices"))
    if candidate.price is not None:
        hourly = candidate.price * replicas
        load = rate if rate is not None else served
        lines.append(
            (
                "money",
                f"{replicas} x ${candidate.price:,.2f} = ${hourly:,.2f} an hour; / 3600 / ({load:.4g} x {moments.answer:,.1f} tokens a second) = "
                f"${per_million(hourly, load, moments.answer):,.3f} a million generated tokens",
            )
        )
    return lines
