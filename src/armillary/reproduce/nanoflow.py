"""NanoFlow (Zhu et al., OSDI 2025): the most that a device can serve, and a layer whose nano-batches use different parts of it at once."""

from __future__ import annotations

from typing import Final

from armillary.cluster.cluster import cluster
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.parameters import parameters
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.plan.overlap import Found, Load, Machine, search, trace
from armillary.reproduce.registry import Experiment, Result, Row
from armillary.sim.interference import NANOFLOW
from armillary.sim.overlap import greedy

COMPUTE: Final = 260e12  # FLOP/s of an A100's products, as the paper profiled them
PARAMETERS: Final = 70e9
GPUS: Final = 8
LAYERS: Final = 2  # that are scheduled together
ALL_THREE: Final = Load(1920, 512, 1024)  # of 2,048 tokens the keys and values do not fit beside the weights in nine tenths of the memory
TWO: Final = Load(2048, 512, 0)


def optimum(compute: float, parameters: float) -> float:
    """Tokens a second and device that nothing exceeds where compute is what is short: Compute / (2 P) (equation 5)."""
    return compute / (2 * parameters)


def found(load: Load, layers: int = LAYERS) -> Found:
    """`armillary plan overlap` of LLaMA-2-70B on 8 A100s, up to two nano-batches: their programs are solved to the end."""
    deployment = Deployment(architecture("llama-2-70b"), cluster("dgx-a100"), Layout(tensor_parallel=GPUS), Precision())
    return search(Machine(deployment, COMPUTE), load, NANOFLOW, parts=2, layers=layers, seconds=20.0)


def run() -> Result:
    three, two = found(ALL_THREE), found(TWO)
    halves = three.tried[-1]
    own, alone = three.best.execution.makespan / three.best.layers, three.whole / three.best.layers
    rows = (
        Row("tokens a second and A100 at most, LLaMA-2-70B", "1/s", 1857, "section 3.3, equation 5", optimum(COMPUTE, PARAMETERS), 1856.5, 1857.5, "its last digit"),
        Row(
            "the same with all of the model's parameters", "1/s", 1857, "equation 5", optimum(COMPUTE, parameters(architecture("llama-2-70b"))),
            1857.0, 1900.0, "2 %: it has 69.0 billion",
        ),
        Row(
            "compute, memory and network at once over one after another, prompts of 512 and answers of 1,024", "x", 1.17, "section 6, ablation, figure 9",
            three.whole / three.best.execution.makespan, 1.17 * 0.9, 1.17 * 1.1, "10 %, set when the planner had been tried on these cases; nothing is fitted", after=True,
        ),
        Row(
            "compute and network at once over one after another, prompts of 512 alone", "x", 1.07, "section 6, ablation, figure 9",
            two.whole / two.best.execution.makespan, 1.07 * 0.9, 1.07 * 1.1, "10 %, set when the planner had been tried on these cases; nothing is fitted", after=True,
        ),
        Row(
            "the same of the first case without interference", "x", 1.17, "section 4.1.2: the search's first stage", three.whole / halves.order.makespan,
            three.whole / three.best.execution.makespan, three.whole / halves.bound, "between with interference and the busiest part alone",
        ),
        Row(
            "share of the optimum that the first case reaches, norms, rotations and sums unfused", "", 0.685, "section 6: 50 to 72 %, 68.5 % for this model",
            three.throughput(own, unfused=True) / optimum(COMPUTE, PARAMETERS), 0.5, 0.8, "0.5 to 0.8: no launches, no batch formation", after=True,
        ),
        Row(
            "the same one after another", "", 0.378, "section 6: TensorRT-LLM, prompts and answers of 512", three.throughput(alone, unfused=True) / optimum(COMPUTE, PARAMETERS),
            0.378, 0.685, "between the best baseline and NanoFlow: a roofline has none of the baseline's other losses",
        ),
        Row(
            "two nano-batches one after another over an unsplit batch", "x", 1 / (1 - 0.132), "section 6, ablation: 13.2 % fewer tokens a second",
            halves.sequential / three.whole, 1.0, 1 / (1 - 0.132), "1 to the paper's: weights are read twice, and a roofline knows no small product's kernel",
        ),
        Row(
            "the mixed-integer program's order over a greedy one", "x", 1.0, "section 4.1.2", halves.order.makespan / greedy(halves.tasks).makespan, 0.0, 1.0 + 1e-9,
            "1 or less",
        ),
    )  # fmt: skip
    return Result(
        rows,
        (
            (
                f"{LAYERS} layers for nano-batches of {' and '.join(map(str, halves.sizes))} tokens, by the part of the GPU that they need",
                trace(halves, "nano-batches"),
            ),
        ),
    )


EXPERIMENT: Final = Experiment(
    name="nanoflow",
    title="NanoFlow: towards optimal serving throughput",
    paper="Zhu et al., OSDI 2025",
    claim="1.91x the throughput of the best baseline, 50 to 72 % of the optimum, 1.17x by overlap alone",
    setup=f"a closed form; then {LAYERS} layers of LLaMA-2-70B over 8 A100s, batches of {ALL_THREE.tokens:,} tokens (512 + 1,024) and {TWO.tokens:,} (512 + 0), operations at a roofline with "
    "260 TFLOP/s, two nano-batches ordered by a mixed-integer program, then shares of the device by the paper's table of interference",
    takes="5 seconds",
    run=run,
)
