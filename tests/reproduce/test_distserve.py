"""DistServe: the closed forms' rows hold, answers alone never wait for prompts, and a looser SLO never serves fewer."""

from armillary.core.units import MS
from armillary.reproduce import distserve


def test_the_closed_forms_and_constants_are_the_published_ones():
    assert [row.quantity for row in distserve._closed_forms() if not row.holds] == []


def test_gpus_for_each_phase_keep_an_slo_that_as_many_for_both_break():
    """Conversations, at 0.8 a second and GPU: the experiment's last comparison, without its searches."""
    case, rate = distserve.CHAT, 0.8
    together = distserve.colocated(case.coming(rate, 150)).attainment(case.first_token, case.per_token)
    apart, simulation = distserve.disaggregated(case.coming(4 * rate, 150), 3, 1)
    assert together < 0.9 <= apart.attainment(case.first_token, case.per_token)
    assert len(simulation.moved) == len({one.request_id for one in simulation.moved}) == int((apart.answer > 1).sum())


def test_attainment_grows_with_the_slo():
    times = distserve.decode_only(distserve.CHAT.coming(6.0, 100))
    attained = [times.attainment(per_token=bound * MS) for bound in (20, 30, 50, 100, 1000)]
    assert attained == sorted(attained)
    assert attained[-1] == 1.0


def test_a_split_gives_each_phase_what_it_needs():
    assert distserve.split(5.6, 10.0) == (2, 1)
    assert distserve.split(10.0, 10.0) == (1, 1)
