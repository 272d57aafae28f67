"""What `armillary plan serve` tells: options with their numbers, what was not pursued, the first by its arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.plan.demand import Demand
    from armillary.plan.disaggregation import Apart
    from armillary.plan.file import Plan
    from armillary.plan.search import Found, Option


def _option(option: Option | Apart, found: Found) -> dict[str, Any]:
    from armillary.plan.file import per_million, sustained
    from armillary.plan.search import Option

    assert found.rate is not None
    counts = option.counts(found.rate)
    groups = option.groups(counts)
    first = option.candidate if isinstance(option, Option) else option.prefill.candidate
    hourly, devices = first.rent.cost(*groups), sum(count * size for count, size in groups)
    each = sustained(option, counts)
    config = first.scenario.config if isinstance(option, Option) else option.phases.prefill.config
    probes = option.capacity.probes if option.capacity is not None else ()
    at = option.capacity.at if option.capacity is not None else None
    told = {
        "name": option.name, "cluster": first.cluster, "devices": devices, "policy": config.policy, "max_batch_tokens": config.max_batch_tokens,
        "max_running": config.max_running, "weights": first.deployment.precision.weights, "capacity": each,
        "capacity_per_device": each / (first.devices if isinstance(option, Option) else devices),
        "ttft_ms_p": None if at is None else at.first_token[1] / 1e6, "tpot_ms_p": None if at is None else at.per_token[1] / 1e6,
        "replicas": " + ".join(map(str, counts)), "dollars_per_hour": hourly,
        "dollars_per_million_tokens": None if hourly is None else per_million(hourly, found.rate, found.moments.answer),
        "curve": [{"rate": one.rate, "attainment": one.attainment, "holds": one.holds} for one in sorted(probes, key=lambda p: p.rate)],
    }  # fmt: skip
    if isinstance(option, Option):
        return told | {"replicas": counts[0], "ceiling": option.ceiling.rate}
    return told | {"prefill_workers": counts[0], "decode_workers": counts[1], "link": option.link.name, "algorithm": option.algorithm}


def facts(file: Plan, found: Found) -> dict[str, Any]:
    from armillary.plan.arithmetic import arithmetic

    options = [_option(one, found) | {"arithmetic": dict(arithmetic(one, found.moments, found.rate))} for one in found.options]
    pruned = [{name: getattr(one, name) for name in one.__dataclass_fields__} for one in found.pruned]
    return {"plan": file.model_dump(mode="json"), "options": options, "pruned": pruned}


def tell(file: Plan, found: Found, demand: Demand) -> None:
    from armillary.cli.terminal import table
    from armillary.plan.arithmetic import arithmetic
    from armillary.plan.candidates import REASONS
    from armillary.plan.objective import parse

    def dollars(value: float | None) -> str:
        return "-" if value is None else f"{value:,.2f}"

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g} ms"

    high = parse(file.workload.slo).percentile
    rows = [_option(one, found) for one in found.options]
    table(
        ("candidate", "req/s a replica", "a device", f"TTFT {high}", f"TPOT {high}", "replicas", "$/hour", "$/M tokens"),
        [
            (
                row["name"], f"{row['capacity']:.3g}", f"{row['capacity_per_device']:.3g}", ms(row["ttft_ms_p"]), ms(row["tpot_ms_p"]),
                row["replicas"], dollars(row["dollars_per_hour"]), dollars(row["dollars_per_million_tokens"]),
            )
            for row in rows
        ],
    )  # fmt: skip
    counts: Counter[str] = Counter()
    for one in found.pruned:
        counts[one.reason] += one.count
    first = {reason: next(one for one in found.pruned if one.reason == reason) for reason in counts}
    if counts:
        print(f"\n{sum(counts.values())} others were not pursued:")
        for reason, count in counts.most_common():
            print(f"  {count:>4}  {REASONS[reason]}; such as {first[reason].name}: {first[reason].detail}")
    print("\nthe first, by its arithmetic:")
    for what, how in arithmetic(found.options[0], found.moments, found.rate):
        print(f"  {what}: {how}")
    seen, hardware = file.predicted, file.hardware
    money = "" if seen.dollars_per_hour is None else f", ${seen.dollars_per_hour:,.2f} an hour"
    print(
        f"\nplan: {_engines(file)}{money}: of {seen.requests:,} requests of "
        f"{demand.lengths.name} at {file.workload.rate:.4g} a second {seen.attainment:.1%} keep {file.workload.slo}; "
        f"TTFT {seen.ttft_ms_p50:.0f} ms median, {seen.ttft_ms_p:.0f} ms {high}; TPOT {seen.tpot_ms_p50:.1f} ms, {seen.tpot_ms_p:.1f} ms"
        f"{_faster(file, demand)}\ndurations: {file.provenance.cost_model}"
    )
    if hardware.rented > 1 and hardware.dollars_per_hour is not None:
        print(f"{hardware.cluster} is rented whole, {hardware.rented} devices at a time; name its device to rent devices one by one")


def _faster(file: Plan, demand: Demand) -> str:
    """Of a trace: how many times as fast it is served, by the plan and at most by one replica."""
    from armillary.plan.recorded import RecordedDemand

    if not isinstance(demand, RecordedDemand):
        return ""
    one = file.predicted.capacity_per_replica / demand.rate
    return f"\nthe trace came at {demand.rate:.3g} a second: this is {file.workload.rate / demand.rate:.3g} times as fast, and a replica alone keeps the objective up to {one:.3g} times"


def _engines(file: Plan) -> str:
    from armillary.core.units import format_rate

    device, apart = file.hardware.device, file.disaggregation
    if apart is None:
        return f"{file.replicas} x {file.hardware.devices} {device} behind {file.router}"
    return (
        f"{apart.prefill.count} x {apart.prefill.devices} {device} for prompts and {apart.decode.count} x {apart.decode.devices} for answers, "
        f"{format_rate(apart.bytes_per_second)} of keys and values over {apart.link}"
    )
