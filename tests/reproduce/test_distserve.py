"""DistServe: the closed forms' rows hold, vLLM is as its authors recorded it, apart keeps an SLO that together breaks."""

import pytest

from armillary.core.units import MS
from armillary.reproduce import distserve, distserve_lines


def test_the_closed_forms_and_constants_are_the_published_ones():
    assert [row.quantity for row in distserve._closed_forms() if not row.holds] == []


def test_vllm_serves_the_recorded_requests_as_it_did():
    rows = list(distserve._recorded())
    assert [row.quantity for row in rows if not row.holds] == []
    assert rows[-1].ours == pytest.approx(rows[-1].published, abs=2)  # of 100 requests


def test_gpus_for_each_phase_keep_an_slo_that_as_many_for_both_break():
    """Figure 1's case at 3 a second and GPU: the experiment's comparison, without its searches."""
    case, blocks = distserve.FIGURE, distserve.blocks("opt-13b", 1)
    both = distserve.together(case.coming(3.0, 150), distserve_lines.VLLM_13B, blocks).attainment(case.first_token, case.per_token)
    split = distserve.Apart(distserve_lines.VLLM_13B, 2, blocks, distserve_lines.VLLM_13B, 1, blocks, 3, distserve.token_bytes("opt-13b"))
    apart, simulation = split.run(case.coming(9.0, 150))
    assert both < 0.9 <= apart.attainment(case.first_token, case.per_token)
    assert len(simulation.moved) == len({one.request_id for one in simulation.moved}) == int((apart.answer > 1).sum())


def test_attainment_grows_with_the_slo():
    times = distserve.decode_only(distserve.CHAT.coming(6.0, 100), distserve_lines.OPT_13B, distserve.blocks("opt-13b", 1))
    attained = [times.attainment(per_token=bound * MS) for bound in (20, 30, 50, 100, 1000)]
    assert attained == sorted(attained)
    assert attained[-1] == 1.0
