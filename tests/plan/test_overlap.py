"""NanoFlow's search: the parts make the whole, results lie between the bounds, the optimum is the paper's; and words for what cannot be."""

import json

import pytest

from armillary.cli.main import MISUSED, run
from armillary.cli.plan_overlap import gantt
from armillary.cluster.cluster import cluster
from armillary.core.errors import CapacityError
from armillary.core.trace import Trace
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.models.graph.work import operations
from armillary.plan.overlap import Load, Machine, search, splits, trace
from armillary.sim.interference import FREE, NANOFLOW
from armillary.sim.operation import Kind

LOAD = Load(2048, 512, 512)


@pytest.fixture(scope="module")
def machine():
    return Machine(Deployment(architecture("llama-2-70b"), cluster("dgx-a100"), Layout(tensor_parallel=8), Precision()), 260e12)


def test_a_layer_is_that_of_the_sequences_one_by_one(machine):
    """1,024 of 2,048 tokens are two prompts, the others decodes after 768 tokens."""
    those = operations(machine.deployment.model, [(512, 0)] * 2 + [(1, 768)] * 1024, layout=machine.deployment.layout)[0]
    expected = [(one.name, machine.cost(one)[1]) for one in those if one.repeat == 80 and one.kind is not Kind.MEMORY]
    found = machine.layer(LOAD)
    assert [name for name, _, _ in found] == [name for name, _ in expected]
    assert [seconds for _, _, seconds in found] == pytest.approx([seconds for _, seconds in expected])
    assert {name: resource for name, resource, _ in found}["decode_attention"] == "memory"


def test_parts_compute_what_the_whole_does_and_read_weights_again(machine):
    """Where nothing is bound by its weights: halves of the arithmetic, and no less of everything."""
    halves, quarter = machine.layer(LOAD, 0.5), machine.layer(LOAD, 0.0625)
    for (name, resource, whole), (_, _, half), (_, _, part) in zip(machine.layer(LOAD), halves, quarter, strict=True):
        if resource == "compute":
            assert 2 * half == pytest.approx(whole)
        assert 16 * part >= whole * (1 - 1e-9), name


def test_the_search_lies_between_its_bounds_and_more_nano_batches_do_not_hurt_where_nothing_interferes(machine):
    found = search(machine, LOAD, NANOFLOW, parts=2, layers=1)
    free = search(machine, LOAD, FREE, parts=2, layers=1)
    for result in (found, free):
        for one in result.tried:
            assert sum(one.sizes) == 2048
            assert one.bound * (1 - 1e-9) <= one.order.makespan <= one.execution.makespan * (1 + 1e-6)
            assert one.least * (1 - 1e-6) <= one.execution.makespan <= one.sequential * (1 + 1e-9)
        assert result.tried[0].execution.makespan == pytest.approx(result.whole)  # a chain has nothing beside it
        assert result.best.execution.makespan < result.whole
    assert free.best.execution.makespan == pytest.approx(free.best.order.makespan)
    assert free.best.execution.makespan < found.best.execution.makespan
    assert machine.optimum == pytest.approx(1857, rel=0.02)
    assert found.throughput(found.best.execution.makespan, unfused=True) < found.throughput(found.best.execution.makespan) < machine.optimum
    drawn = trace(found.best, "a layer")
    assert {span.lane for span in drawn.spans()} == {"compute", "memory", "network"}
    assert [len(line) for line in gantt(found.best, 60)] == [68] * 3


def test_splits_are_of_whole_grains_and_each_once():
    assert list(splits(2048, 1)) == [(2048,)]
    assert list(splits(512, 3)) == [(128, 128, 256)]
    assert len(set(splits(2048, 4))) == len(list(splits(2048, 4))) == 34  # partitions of 16 into 4
    assert list(splits(300, 2)) == [(128, 172)]
    assert list(splits(200, 2)) == []


def test_keys_that_do_not_fit_say_by_how_much_and_what_would(machine):
    with pytest.raises(CapacityError, match=r"2\.53 GB a device more .* --batch 1,957"):
        search(machine, Load(2048, 512, 1024), NANOFLOW)


def test_the_verb_draws_the_schedule_and_writes_trace_and_page(capsys, tmp_path):
    saved, page = tmp_path / "schedule.json", tmp_path / "report.html"
    arguments = ["plan", "overlap", "llama-2-70b", "--cluster", "a100x8", "--tp", "8", "--parts", "2", "--layers", "1", "--flops", "260e12"]
    assert run([*arguments, "--save", str(saved), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "compute |" in told
    assert "measured on an A100" in told
    assert len(Trace.load(saved)) > 10
    assert "armillaryGantt(" in page.read_text()
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 1 < facts["speedup"] < 1.3
    for wrong, says in (
        (["--lengths", "many"], "write PROMPT+ANSWER"), (["--parts", "9"], "give 1 to 4"), (["--interference", "luck"], "nanoflow-a100"),
        (["--batch", "0"], "give 1 to"), (["--lengths", "512+1024"], "a device more"), (["--save", "/nowhere/x.json"], "does not exist"),
    ):  # fmt: skip
        assert run([*arguments[:7], *wrong]) == MISUSED
        assert says in capsys.readouterr().err
