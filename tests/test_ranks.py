"""What tests of several ranks hear of them."""

import os
from queue import Empty

import pytest
from ranks import Failed, on_ranks


def end_without_a_word(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        os._exit(7)
    return int(os.environ["RANK"])


def raise_on_one_and_end_the_other() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    raise ValueError("the true cause")


def wait_for_ever() -> None:
    while True:
        pass


def test_a_rank_that_ends_without_a_word_is_named():
    with pytest.raises(Failed, match="rank 1 ended, exit code 7"):
        on_ranks(2, end_without_a_word, 1)
    assert on_ranks(2, end_without_a_word, 2) == [0, 1]


def test_the_rank_that_raised_counts_not_the_one_that_ended():
    with pytest.raises(Failed, match="ValueError: the true cause"):
        on_ranks(2, raise_on_one_and_end_the_other)


def test_ranks_that_take_too_long_are_ended():
    with pytest.raises(Empty):
        on_ranks(1, wait_for_ever, timeout=1)
