"""Nodes are rented whole, bare devices one by one, and engines are put together as well as they fit."""

import itertools
import random

import pytest

from armillary.cluster.cluster import cluster
from armillary.plan.rent import DEVICES, Rent, rent


def fewest(groups, size):
    """By trying everything."""
    items = sorted((devices for count, devices in groups for _ in range(count)), reverse=True)
    best = len(items)

    def place(rest, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if not rest:
            best = len(bins)
            return
        for index in {left: index for index, left in enumerate(bins)}.values():
            if bins[index] >= rest[0]:
                place(rest[1:], [*bins[:index], bins[index] - rest[0], *bins[index + 1 :]])
        place(rest[1:], [*bins, size - rest[0]])

    place(items, [])
    return best


def test_powers_of_two_are_packed_as_well_as_can_be():
    generator = random.Random(1)
    for _ in range(200):
        groups = [(generator.randint(1, 4), size) for size in generator.sample((1, 2, 4, 8), generator.randint(1, 2))]
        assert Rent(8, 1.0).packages(*groups) == fewest(groups, 8)


def test_no_package_has_more_than_it_holds():
    for counts in itertools.product(range(4), repeat=3):
        groups = [(count, size) for count, size in zip(counts, (3, 5, 6), strict=True) if count]
        taken = Rent(8, 1.0).packages(*groups)
        assert fewest(groups, 8) <= taken <= 11 / 9 * fewest(groups, 8) + 1


def test_what_is_rented_together_is_paid_together():
    nodes = Rent(8, 40.0)
    assert (nodes.cost((1, 2)), nodes.cost((4, 2)), nodes.cost((5, 2)), nodes.cost((1, 16)), nodes.cost((1, 12), (2, 2))) == (
        40,
        40,
        80,
        80,
        80,
    )
    assert (nodes.share(2), nodes.share(3), nodes.share(16)) == (10, 20, 80)
    assert (nodes.most(2, 79), nodes.most(2, 80), nodes.most(16, 170), nodes.most(2, 39)) == (4, 8, 2, 0)
    assert DEVICES.cost((3, 2), (1, 4)) == 10
    assert Rent(8, None).cost((1, 1)) is None


def test_hardware_is_rented_as_it_is_written():
    one, node = rent(cluster("h100")), rent(cluster("dgx-h100"))
    assert one == Rent(1, cluster("h100").device.price)
    assert node == Rent(8, pytest.approx(8 * one.price))
    assert rent(cluster("h100x4")).devices == 4
    assert rent(cluster("dgx-h100:16")) == node
    assert rent(cluster("gb200-nvl72:2")).devices == 72
