"""Pope et al.'s partitions: the closed forms, table 1 and the choices of table 2, nothing better among those tried, and words for what cannot be."""

import json
from dataclasses import replace

import pytest

from armillary.cli.main import MISUSED, run
from armillary.cluster.cluster import cluster
from armillary.core.errors import CapacityError, InputError
from armillary.models.graph import partition
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.models.graph.spread import Spread, collectives
from armillary.plan.frontier import frontier, points
from armillary.plan.partition import Problem, mesh
from armillary.sim.collectives import terms

CUBE, PALM = cluster("tpu-v4-cube"), architecture("palm-540b")


def palm(weights="bf16"):
    return Problem(PALM, CUBE, mesh(CUBE), Precision(weights, "bf16", "bf16"))


@pytest.mark.parametrize("split", [(1, 64, 1), (4, 16, 1), (16, 4, 1), (1, 16, 4), (1, 1, 64)])
def test_an_mlp_s_collectives_are_the_closed_form_s(split):
    """Without gates, and each collective's (k - 1) / k put back."""
    spread, model, tokens = Spread(*split), replace(PALM, gated=False, parallel=False), 4096
    moved = sum(one.elements for one in list(collectives(model, spread, tokens, 1))[5:10] if one.ranks > 1)
    sides = model.hidden_size, model.intermediate_size
    if spread.gathered > 1:
        expected = partition.gathered(tokens, *sides, 64, spread.gathered)
        expected -= 0 if spread.inner > 1 else 2 * tokens * sides[0] / 64  # on its own no chip reduces
    elif spread.hidden == 1:
        expected = partition.stationary_1d(tokens, sides[0])
    else:
        expected = partition.stationary_2d(tokens, *sides, 64, spread.hidden)
    assert moved == pytest.approx(expected)
    assert {terms(one.name, one.ranks)[1] for one in collectives(model, spread, tokens, 1)} <= {0.0, *((k - 1) / k for k in (4, 16, 64))}


@pytest.mark.parametrize(
    ("attention", "batch", "paper"), [("heads", 128, 660), ("heads", 512, 165), ("batch", 128, 43_000), ("batch", 512, 10_700)]
)
def test_the_longest_contexts_are_table_1_s(attention, batch, paper):
    assert palm().context(Spread(1, 64, 1, attention), batch, 0.3) == pytest.approx(paper, rel=0.01)


@pytest.mark.parametrize(
    ("phase", "batch", "weights", "name", "attention"),
    [
        ("prefill", 1, "int8", "2D weight-stationary, 4 x 16", "heads"),
        ("decode", 64, "int8", "2D weight-stationary, 4 x 16", "batch"),
        ("prefill", 512, "bf16", "weight-gathered", None),
        ("decode", 512, "bf16", "2D weight-stationary, 4 x 16", "batch"),
    ],
)
def test_the_choices_are_table_2_s(phase, batch, weights, name, attention):
    best = palm(weights).ranked(phase, batch, 2048)[0]
    assert best.spread.name.startswith(name)
    assert best.spread.attention == attention or attention is None


def test_nothing_that_fits_is_quicker_and_everything_at_once_is():
    problem = palm("int8")
    for phase, batch in (("prefill", 8), ("decode", 32)):
        best = problem.ranked(phase, batch, 2048)
        for spread in problem.spreads(batch):
            one = problem.price(spread, phase, batch, 2048)
            assert one.hidden <= one.seconds
            assert one.seconds >= best[0].seconds or not problem.fits(one)
        assert all(problem.fits(one) for one in best)
    fewer = Problem(PALM, CUBE, mesh(CUBE, 32), Precision("int8", "bf16", "bf16"))
    assert fewer.mesh.shape == (4, 4, 2)
    assert fewer.ranked("decode", 64, 2048)[0].seconds > problem.ranked("decode", 64, 2048)[0].seconds


def test_the_axes_that_gain_most_lie_within_a_node():
    """Four nodes of eight: an axis of eight is within one, an axis of sixteen is not, and no network is quicker than one domain of all."""
    model, precision, place = architecture("llama-2-70b"), Precision("bf16", "bf16", "bf16"), cluster("dgx-h100:4")
    problem = Problem(model, place, mesh(place), precision)
    flat = Problem(model, place, replace(problem.mesh, near=None), precision)
    whole = Problem(model, place, replace(problem.mesh, link=problem.mesh.near, near=None), precision)
    for spread in problem.spreads(64):
        times = [one.price(spread, "decode", 64, 2048).network for one in (whole, problem, flat)]
        assert times == sorted(times)
        assert (times[1] < times[2]) == any(1 < size <= 8 for size in (spread.hidden, spread.inner, spread.gathered))
    assert problem.price(Spread(4, 8), "decode", 64, 2048).moved == flat.price(Spread(4, 8), "decode", 64, 2048).moved


def test_the_frontier_has_what_nothing_beats():
    tried = points(PALM, CUBE, Precision("bf16", "bf16", "bf16"), "decode", 2048, weights=("bf16", "int8"), most_sequences=256)
    best = frontier(tried)
    assert {one.plan.spread.chips for one in tried} == {32, 64}  # weights do not fit fewer, and not 32 in 16 bits
    for one in tried:
        beaten = [other for other in tried if other.latency <= one.latency and other.cost < one.cost]
        assert (one in best) == (not beaten)


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(CapacityError, match=r"104 GB more than .* at least 35 of them"):
        Problem(PALM, CUBE, mesh(CUBE, 8), Precision("bf16", "bf16", "bf16")).ranked("decode", 1, 2048)
    with pytest.raises(CapacityError, match=r"44 GB too much: what fits: contexts of 14,\d+ tokens, 64 sequences"):
        palm().ranked("decode", 512, 60_000)
    with pytest.raises(InputError, match="no part of a torus"):
        mesh(CUBE, 48)
    with pytest.raises(InputError, match="mixture of experts"):
        Problem(architecture("mixtral-8x7b"), CUBE, mesh(CUBE), Precision())


def test_the_verb_tells_the_choice_and_writes_the_page(capsys, tmp_path):
    page = tmp_path / "report.html"
    arguments = ["plan", "partition", "palm-540b", "--cluster", "tpu-v4-cube", "--batch", "64", "--weights", "int8"]
    assert run([*arguments, "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "decode, one token of 64 sequences of 2,048: 2D weight-stationary, 4 x 16, cache by batch" in told
    assert f"wrote {page}" in told
    assert "Plotly.newPlot" in page.read_text()
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["decode"][0]["seconds"] == pytest.approx(palm("int8").ranked("decode", 64, 2048)[0].seconds)
    for wrong, says in (
        (["--batch", "0"], "give 1 to"),
        (["--batch", "1", "--kv-share", "2"], "at most 1"),
        (["--batch", "1", "--chips", "65"], "fewer"),
    ):
        assert run([*arguments[:5], *wrong]) == MISUSED
        assert says in capsys.readouterr().err
