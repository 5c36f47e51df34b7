"""The processes of a job, as far as one process can show it."""

import sys

import pytest

from chargpt.compute.world import ALONE, World, interface_to


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_of_all_ranks_are_the_whole_in_order(size: int) -> None:
    for count in (size, size + 1, 16, 100):
        shares = [World(rank=rank, size=size).share(count) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_decides_alone() -> None:
    assert ALONE.on_first(lambda: 3) == 3
    assert ALONE.total(1.5, 2) == [1.5, 2.0]
    assert ALONE.highest(-1.5) == [-1.5]


@pytest.mark.skipif(sys.platform != "linux", reason="the name of loopback differs")
def test_the_interface_is_the_one_that_routes_to_the_host() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no such host") is None
