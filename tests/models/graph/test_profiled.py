"""A deployment by a profile: what was measured is looked up, the rest is the roofline's, and what was not measured for is refused."""

import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.profiled import covered, profiled
from armillary.models.graph.published import architecture
from armillary.sim.batch import Batch
from armillary.sim.costs.profile import packaged


def deployment(model="llama-2-7b", where="dgx-a100", precision=None, **layout):
    return Deployment(architecture(model), cluster(where), Layout(**layout), precision or Precision())


def test_many_decodes_are_each_to_the_ns():
    cost = profiled(deployment(tensor_parallel=2), packaged("a100"), host=1234.5, host_per_sequence=3.3)
    assert cost.decodes(7, 1001, 40).tolist() == [cost.iteration(Batch((), 7, 1001 + 7 * index, 7)) for index in range(40)]


def test_everything_is_either_measured_or_at_the_roofline():
    one = deployment(tensor_parallel=2)
    cost, whole, batch = profiled(one, packaged("a100")), one.roofline(), Batch(((300, 0),), 5, 900, 6)
    part = one.roofline(without=lambda row: not covered(row)).ns(batch)
    assert cost.iteration(batch) == round(cost.linear(305) + one.roofline(without=covered).ns(batch))
    assert part + one.roofline(without=covered).ns(batch) == pytest.approx(whole.ns(batch))


def test_a_layer_is_what_the_profile_says():
    """Llama-2-7B on an A100: the sums of a layer that Vidur measured, 1.05 ms at 512 tokens, 4.20 at 2,048."""
    cost = profiled(deployment(), packaged("a100"))
    assert [cost.linear(tokens) / 32e6 for tokens in (512, 2048)] == pytest.approx([1.05, 4.20], rel=0.02)


@pytest.mark.parametrize(
    ("made", "device", "said"),
    [
        (lambda: deployment(where="dgx-h100"), "a100", "measured on a100-80g-sxm"),
        (lambda: deployment("llama-2-13b"), "a100", "no layer as llama-2-13b's"),
        (lambda: deployment(tensor_parallel=16, where="dgx-a100:2"), "a100", "over 16 devices"),
        (lambda: deployment(precision=Precision("int8", "fp16")), "a100", "16-bit weights"),
    ],
)
def test_what_was_not_measured_for_is_refused(made, device, said):
    with pytest.raises(InputError, match=said):
        profiled(made(), packaged(device))
