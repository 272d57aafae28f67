"""NanoFlow (Zhu et al., OSDI 2025): the most that a device can serve, and a layer whose halves use different parts of it at once."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from armillary.cluster.catalogue import device, link
from armillary.core.trace import Trace
from armillary.core.units import S
from armillary.models.graph.layout import Layout
from armillary.models.graph.parameters import parameters
from armillary.models.graph.published import architecture
from armillary.models.graph.work import operations
from armillary.reproduce.registry import Experiment, Result, Row
from armillary.sim import collectives
from armillary.sim.operation import Kind, Operation
from armillary.sim.overlap import Overlap, Task, bound, greedy, overlapped, sequential

COMPUTE: Final = 260e12  # FLOP/s of an A100's products, as the paper profiled them
PARAMETERS: Final = 70e9
GPUS: Final = 8
_PROMPTS, _DECODES, _CONTEXT = 2, 1024, 768  # a batch of 2,048 tokens: prompts of 512, answers of 512 that are half done
_LAYERS: Final = 2  # that are scheduled together


def optimum(compute: float, parameters: float) -> float:
    """Tokens a second and device that nothing exceeds where compute is what is short: Compute / (2 P) (equation 5)."""
    return compute / (2 * parameters)


def layer(parts: int) -> list[tuple[str, str, float]]:
    """(operation, resource, s) of a layer of LLaMA-2-70B for one of `parts` equal parts of the batch, on one of 8 A100s.

    What takes under 1 % of the layer (norms, rotations, sums) is left out, as in the paper, which fuses it with its neighbours.
    """
    sequences = [(512, 0)] * (_PROMPTS // parts) + [(1, _CONTEXT)] * (_DECODES // parts)
    works = operations(architecture("llama-2-70b"), sequences, layout=Layout(tensor_parallel=GPUS))[0]
    names = ("qkv", "prefill_attention", "decode_attention", "o", "gate_up", "down", "all_reduce")
    ours = [one for one in works if one.repeat > 1 and one.name in names]
    return [(one.name, *_cost(one)) for one in ours]


def _cost(operation: Operation) -> tuple[str, float]:
    """Which part of the device it needs, and for how long."""
    a100, wire = device("a100-80g-sxm"), link("nvlink-3")
    if operation.kind is Kind.COLLECTIVE:
        return "network", collectives.seconds(operation.name, operation.message_bytes, operation.ranks, wire.bandwidth, wire.latency / S)
    compute, memory = operation.flops / COMPUTE, operation.bytes / a100.attainable_bandwidth
    return ("compute", compute) if compute >= memory else ("memory", memory)


def tasks(parts: int, layers: int = _LAYERS) -> list[Task]:
    """Each part's operations in a chain; the parts know nothing of each other."""
    found: list[Task] = []
    for part in range(parts):
        before: tuple[int, ...] = ()
        for number in range(layers):
            for name, resource, seconds in layer(parts):
                found.append(Task(f"{name}/{number}/{part}", resource, seconds, before))
                before = (len(found) - 1,)
    return found


def picture(overlap: Overlap, those: list[Task]) -> Trace:
    trace = Trace("two halves of a batch")
    for task, start in sorted(zip(those, overlap.starts, strict=True), key=lambda one: one[1]):
        trace.add(task.resource, task.name.split("/")[-1], round(start * S), round((start + task.duration) * S), task.name)
    return trace


def run() -> Result:
    whole, halves = tasks(1), tasks(2)
    found, quick = overlapped(halves), greedy(halves)
    alone, least = sequential(whole), bound(halves)
    busy: dict[str, float] = defaultdict(float)
    for task in whole:
        busy[task.resource] += task.duration
    rows = (
        Row("tokens a second and A100 at most, LLaMA-2-70B", "1/s", 1857, "section 3.3, equation 5", optimum(COMPUTE, PARAMETERS), 1856.5, 1857.5, "its last digit"),
        Row(
            "the same with all of the model's parameters", "1/s", 1857, "equation 5", optimum(COMPUTE, parameters(architecture("llama-2-70b"))),
            1857.0, 1900.0, "2 %: it has 69.0 billion",
        ),
        Row(
            "compute's share of a layer's operations one after another", "", 0.685, "section 6: NanoFlow reaches 68.5 % of the optimum by overlap",
            busy["compute"] / alone, 0.4, 0.9, "0.4 to 0.9: what there is to gain, by a roofline without interference",
        ),
        Row(
            "a layer of two halves at once over one after another", "x", least / alone, "no schedule is shorter: the busiest part",
            found.makespan / alone, least / alone, 1.0, "between the bound and 1",
        ),
        Row(
            "the mixed-integer program's schedule over a greedy one", "x", 1.0, "section 4.1.2", found.makespan / quick.makespan, 0.0, 1.0 + 1e-9,
            "1 or less",
        ),
        Row(
            "tokens a second over those of operations one after another", "x", 1.91, "abstract: over the best of vLLM, DeepSpeed, TensorRT-LLM",
            alone / found.makespan, 1.0, 1.91, "1 to 1.91: overlap alone, splitting reads weights twice",
        ),
    )  # fmt: skip
    return Result(
        rows,
        ((f"{_LAYERS} layers for two halves of a batch of 2,048 tokens, by the part of the GPU that they need", picture(found, halves)),),
    )


EXPERIMENT: Final = Experiment(
    name="nanoflow",
    title="NanoFlow: towards optimal serving throughput",
    paper="Zhu et al., OSDI 2025",
    claim="1.91x the throughput of the best baseline, 50 to 72 % of the optimum",
    setup=f"a closed form; then {_LAYERS} layers of LLaMA-2-70B over 8 A100s for {_PROMPTS} prompts of 512 tokens and {_DECODES:,} decodes, operations at a roofline with "
    "260 TFLOP/s and no interference, two halves of the batch scheduled by a mixed-integer program so that compute, memory and network are each used by one",
    takes="5 seconds",
    run=run,
)
