"""What `armillary simulate serve` tells: what came, how long it took, how busy the devices were, what it costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from armillary.cli.workload import Coming, percentiles, told

if TYPE_CHECKING:
    from armillary.plan.objective import Objective
    from armillary.serve.simulation.phases import Phases
    from armillary.serve.simulation.scenario import Run, Scenario


def facts(simulated: Scenario | Phases, run: Run, coming: Coming, objective: Objective | None) -> dict[str, Any]:
    """Everything as plain values; times in ns. `busy`: the share of the time in which an engine has an iteration. `model_flops_utilization`: two
    FLOPs a parameter that a token passes through, of the devices' peak; without attention."""
    from armillary.models.graph.parameters import active_parameters
    from armillary.serve.simulation.phases import Phases

    apart: dict[str, Any] = {}
    if isinstance(simulated, Phases):
        scenario, engines = simulated.decode, simulated.prefill.replicas + simulated.decode.replicas
        size = int(run.result.prompt[run.result.answer > 1].sum()) * simulated.token_bytes
        apart = {
            "prefill_workers": simulated.prefill.replicas, "decode_workers": simulated.decode.replicas, "link": simulated.link.name,
            "link_bandwidth": simulated.link.bandwidth, "moved_bytes": size, "prefill_layout": _degrees(simulated.prefill),
            "decode_layout": _degrees(simulated.decode),
        }  # fmt: skip
    else:
        scenario, engines = simulated, simulated.replicas
    result, devices = run.result, simulated.devices

    device, span = scenario.deployment.device, max(1, result.makespan)
    flops = 2 * active_parameters(scenario.deployment.model) * run.stats.scheduled_tokens
    attained = flops / (span / 1e9 * devices * device.peak(scenario.deployment.product_dtype))
    price = device.price
    hours = result.makespan / 3.6e12 * devices
    return {
        "model": scenario.deployment.model.name, "device": device.name, "devices": devices,
        "replicas": simulated.replicas if not apart else 0,
        "scheduling": scenario.settled.scheduling, "kv_blocks": run.blocks, "requests": len(result.arrival),
        "workload": coming.facts(result),
        "prompt_tokens": int(result.prompt.sum()), "generated_tokens": int(result.answer.sum()), "makespan": result.makespan, "ends": int(result.finished.max(initial=0)),
        "wait": percentiles(result.waits), "first_token": percentiles(result.first_tokens), "per_token": percentiles(result.per_token),
        "gap": {f"p{percent}": result.gap(percent) for percent in (50, 90, 99)}, "throughput": result.throughput,
        "throughput_per_device": result.throughput / devices,
        "busy": run.busy / span / engines, "model_flops_utilization": attained,
        "slo": None if objective is None else {"text": objective.text, "attainment": objective.met(result), "each": objective.each(result)},
        "iterations": run.stats.iterations, "preemptions": run.stats.preemptions,
        "drafts": _drafts(scenario, run), "second_copies": None if run.tail is None else dataclasses.asdict(run.tail),
        "prefix_hit_rate": run.stats.reused_tokens / run.stats.sought_tokens if run.stats.sought_tokens else None,
        "dollars_per_million_tokens": None if price is None else hours * price / max(1, int(result.answer.sum())) * 1e6,
        "wall_seconds": run.wall, **apart,
    }  # fmt: skip


def _degrees(scenario: Scenario) -> dict[str, int]:
    layout = scenario.deployment.layout
    return {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel}


def _drafts(scenario: Scenario, run: Run) -> dict[str, Any] | None:
    """What became of them; `tokens_a_pass` beside the first token of each answer. None where nobody drafts."""
    if scenario.acceptance is None:
        return None
    drafting, stats = scenario.drafting, run.stats
    passes = stats.generated_tokens - stats.accepted_tokens - len(run.result.arrival)
    assert drafting is not None
    return {
        "by": drafting.cost.name if drafting.cost is not None else "earlier text, at no cost", "acceptance": str(scenario.acceptance),
        "verified": stats.drafted_tokens, "accepted": stats.accepted_tokens, "tokens_a_pass": 1 + stats.accepted_tokens / max(1, passes),
    }  # fmt: skip


def tell(simulated: Scenario | Phases, run: Run, coming: Coming, objective: Objective | None) -> None:
    from armillary.cli.terminal import table
    from armillary.core.units import format_bytes, format_count, format_duration, format_rate
    from armillary.serve.simulation.phases import Phases

    said = facts(simulated, run, coming, objective)
    scenario = simulated.decode if isinstance(simulated, Phases) else simulated
    config = scenario.settled
    if isinstance(simulated, Phases):
        engines = f"{_many(simulated.prefill, 'prefill worker')}, {_many(simulated.decode, 'decode worker')}"
    else:
        engines = _many(scenario, "replica")
    print(
        f"{said['model']} in {scenario.deployment.precision.weights} on {said['devices']} x {said['device']} "
        f"({engines}), {said['scheduling']}, "
        f"{config.max_batch_tokens} tokens an iteration, {said['kv_blocks']:,} KV blocks of {config.block_size} tokens "
        f"a {'decode worker' if isinstance(simulated, Phases) else 'replica'}\n"
        f"durations: {scenario.priced.name}"
    )
    drafts = said["drafts"]
    if drafts is not None:
        print(
            f"drafts: {drafts['by']}; {drafts['verified']:,} were verified and {drafts['accepted']:,} right, {drafts['tokens_a_pass']:.2f} tokens a pass"
        )
    print("\n" + told(said["workload"]) + "\n")
    names = (
        ("wait", "wait in the queue"),
        ("first_token", "time to first token"),
        ("per_token", "time a token after it, by request"),
        ("gap", "time between tokens"),
    )
    rows = [(words, *(format_duration(said[name][column]) for column in ("p50", "p90", "p99"))) for name, words in names]
    table(("", "p50", "p90", "p99"), rows)
    dollars, found = said["dollars_per_million_tokens"], said["prefix_hit_rate"]
    print(
        f"\n{said['requests']:,} requests, {format_count(said['prompt_tokens'])} prompt and {format_count(said['generated_tokens'])} generated tokens "
        f"in {format_duration(said['makespan'])}: {said['throughput']:,.0f} tokens a second, {said['throughput_per_device']:,.0f} a device"
        + (f", ${dollars:,.2f} a million generated tokens" if dollars is not None else "")
        + f"; {said['iterations']:,} iterations, {said['preemptions']:,} preemptions"
        + (f"; {found:.1%} of the prompts' tokens were in the prefix cache" if found else "")
    )
    print(
        f"an engine has an iteration {said['busy']:.1%} of the time; products with weights are {said['model_flops_utilization']:.1%} of the devices' peak"
    )
    if objective is not None:
        each = ", ".join(f"{name} {share:.1%}" for name, share in said["slo"]["each"].items())
        print(f"{said['slo']['attainment']:.1%} of the requests keep the objective ({each}); wanted: {objective}")
    if isinstance(simulated, Phases):
        moved = said["moved_bytes"]
        print(
            f"keys and values: {format_bytes(moved)} moved over {simulated.link.name} ({format_rate(simulated.link.bandwidth, 'B')}), "
            f"{format_bytes(simulated.token_bytes)} a prompt token"
        )


def _many(scenario: Scenario, what: str) -> str:
    layout = scenario.deployment.layout
    flying = f", {scenario.in_flight} batches in flight" if layout.pipeline_parallel > 1 else ""
    return f"{scenario.replicas} {what}{'s' if scenario.replicas != 1 else ''} of {layout.tensor_parallel} x {layout.pipeline_parallel} devices{flying}"
