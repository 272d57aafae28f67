"""Vidur's setup: leaps change nobody's times. How fast it is, is measured and not tested."""

from armillary.reproduce import vidur


def test_leaps_change_nothing_and_the_setup_is_vidur_s():
    one, other = (vidur.scenario(leaps=leaps).run(vidur.coming(60)) for leaps in (True, False))
    assert vidur.differing(one, other) == 0
    assert vidur.differing(one, vidur.scenario().run(vidur.coming(59))) == 60
    assert one.stats.iterations == other.stats.iterations
    assert vidur.decided(60) > 4  # iterations for each time that the scheduler is asked
    settled = vidur.scenario().settled
    assert (settled.policy, settled.max_batch_tokens, settled.max_running, settled.prefix_cache) == ("sarathi", 512, 128, "off")
