"""DiT's table of sizes and costs, from its shapes alone."""

import pytest

from armillary.models.graph.diffusion import operations, parameters, published
from armillary.sim.operation import Kind, total


@pytest.mark.parametrize("name", published())
def test_the_papers_table(name):
    known = published()[name]
    assert parameters(known.model) / 1e6 == pytest.approx(known.millions, rel=0.002, abs=0.5)
    assert total(operations(known.model)).flops / 2e9 == pytest.approx(known.giga_macs, rel=1e-3, abs=0.0051)


def test_the_table_is_whole():
    assert len(published()) == 13
    assert published()["dit-xl/2"].model.tokens == 256
    assert published()["dit-xl/2-512"].model.tokens == 1024


def test_a_forward_pass_reads_each_matrix_once():
    model = published()["dit-b/4"].model
    held = total(operation for operation in operations(model, 8) if operation.kind is Kind.GEMM).weight_bytes
    labels = 1001 * model.hidden_size  # looked up
    assert held == 2 * (parameters(model) - labels)
    one, eight = total(operations(model)), total(operations(model, 8))
    assert (eight.flops, eight.weight_bytes) == (8 * one.flops, one.weight_bytes)
