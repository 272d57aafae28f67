"""The arithmetic behind an option, line by line, so that a reader can redo it."""

from __future__ import annotations

from armillary.core.units import format_bytes, format_duration, format_rate
from armillary.plan.bounds import Ceiling
from armillary.plan.candidates import Candidate
from armillary.plan.demand import Moments
from armillary.plan.disaggregation import Apart
from armillary.plan.file import per_million
from armillary.plan.rent import Rent
from armillary.plan.search import Option


def arithmetic(option: Option | Apart, moments: Moments, rate: float | None) -> list[tuple[str, str]]:
    """(what, how) from memory to money."""
    return _replicas(option, moments, rate) if isinstance(option, Option) else _instances(option, moments, rate)


def _replicas(option: Option, moments: Moments, rate: float | None) -> list[tuple[str, str]]:
    candidate, served, most = option.candidate, option.capacity.rate, option.ceiling
    each = candidate.devices
    lines = [
        ("memory of a device", f"{_memory(candidate)} a replica"),
        _request(moments),
        (
            "alone",
            f"first token {format_duration(option.alone.first_token)}, at least {format_duration(option.alone.per_token)} a token after it",
        ),
        ("ceiling", f"{_most(most)} a replica"),
        ("capacity", f"{served:.4g} requests a second a replica ({served / most.rate:.0%} of the ceiling), {served / each:.4g} a device"),
    ]
    replicas = option.replicas(rate)
    if rate is not None:
        lines.append(("replicas", f"ceil({rate:g} / {served:.4g}) = {replicas} by capacity alone: {replicas * each} devices"))
    return [*lines, *_money(option, candidate.rent, moments, rate, served)]


def _instances(option: Apart, moments: Moments, rate: float | None) -> list[tuple[str, str]]:
    phases, counts = option.phases, option.counts(rate)
    prefill, decode = option.prefill, option.decode
    size = moments.prompt * phases.token_bytes
    lines = [_request(moments)]
    for name, one in (("prefill", prefill), ("decode", decode)):
        known = f"{one.rate:.4g} requests a second by itself" if one.capacity is not None else f"at most {one.bound:.4g} requests a second"
        lines.append((f"memory of a {name} device", f"{_memory(one.candidate)} an instance"))
        lines.append(
            (f"{name} instance", f"{one.candidate.place}: {known}, {one.rate / one.candidate.devices:.4g} a device; {_most(one.ceiling)}")
        )
    lines.append(
        (
            "keys and values",
            f"{moments.prompt:,.0f} prompt tokens x {format_bytes(phases.token_bytes)} = {format_bytes(size)} a request over {option.link.name} "
            f"({format_rate(option.link.bandwidth)}): {format_duration(option.link.latency + size / option.link.bandwidth * 1e9)}"
            + (f"; at {rate:g} requests a second {format_rate(rate * size)} in all" if rate is not None else ""),
        )
    )
    if option.pair is not None:
        lines.append(("a pair", f"{option.pair:.4g} requests a second together, simulated"))
    devices = sum(count * size for count, size in option.groups(counts))
    if rate is not None:
        rates = (option.pair, option.pair) if option.pair is not None else (prefill.rate, decode.rate)
        said = " and ".join(
            f"ceil({rate:g} / {each:.4g}) = {count} {name}" for each, count, name in zip(rates, counts, ("prefill", "decode"), strict=True)
        )
        lines.append(("instances", f"{said} by capacity alone: {devices} devices, {rate / devices:.4g} requests a second a device"))
    served = option.pair if option.pair is not None else min(prefill.rate, decode.rate)
    return [*lines, *_money(option, prefill.candidate.rent, moments, rate, served)]


def _memory(candidate: Candidate) -> str:
    deployment, config = candidate.deployment, candidate.scenario.settled
    assert config.kv_blocks is not None
    return (
        f"{format_bytes(deployment.usable)} usable of {format_bytes(deployment.device.memory)}: {format_bytes(deployment.weight_bytes)} weights, "
        f"{format_bytes(deployment.kv_memory)} left for keys and values: {config.kv_blocks:,} blocks x {config.block_size} = "
        f"{config.kv_blocks * config.block_size:,} tokens"
    )


def _request(moments: Moments) -> tuple[str, str]:
    return (
        "a request, on average",
        f"{moments.prompt:,.0f} prompt tokens, {moments.answer:,.1f} generated; its decodes read {moments.read:,.0f} cached tokens",
    )


def _most(most: Ceiling) -> str:
    return (
        f"{most.iterations:.4g} iterations of its own a request ({most.bound}), at least {format_duration(most.ns)} each: "
        f"at most {most.rate:.4g} requests a second"
    )


def _money(option: Option | Apart, rent: Rent, moments: Moments, rate: float | None, served: float) -> list[tuple[str, str]]:
    if rent.price is None:
        return []
    groups = option.groups(option.counts(rate))
    packages, hourly, load = rent.packages(*groups), rent.cost(*groups), rate if rate is not None else served
    assert hourly is not None
    what = "devices, rented one by one" if rent.devices == 1 else f"x {rent.devices} devices, rented whole"
    return [
        (
            "money",
            f"{packages} {what}, x ${rent.price:,.2f} = ${hourly:,.2f} an hour; / 3600 / ({load:.4g} x {moments.answer:,.1f} tokens a second) = "
            f"${per_million(hourly, load, moments.answer):,.3f} a million generated tokens",
        )
    ]
