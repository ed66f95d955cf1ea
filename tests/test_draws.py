"""Streams of random numbers: independent, repeatable, and numbers as promised."""

import numpy as np
import pytest

from train.draws import Draws, bell, unit


def test_words_are_those_of_philox_at_explicit_counters():
    """The words behind the golden digests; numpy promises never to change them."""
    words = Draws(7, 3, 1).words(2, 2)
    assert words.dtype == np.uint64
    again = np.random.Philox(key=7, counter=[0, 1, 3, 0]).random_raw(4)
    np.testing.assert_array_equal(words, again.reshape(2, 2))
    assert words[0, 0] == 12905894811985665595


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_index_and_purpose_give_streams_that_share_no_word(other):
    assert not np.isin(Draws(*other).words(1000), Draws(0, 0, 0).words(1000)).any()


def test_unit_numbers_fill_the_interval_without_one():
    extremes = unit(np.array([0, 2**64 - 1], np.uint64))
    assert extremes[0] == 0 and extremes[1] == 1 - 2.0**-53
    assert abs(unit(Draws(0, 0, 0).words(10_000)).mean() - 0.5) < 0.01


def test_bell_numbers_have_mean_0_and_variance_1():
    numbers = bell(Draws(0, 0, 0).words(20_000))
    assert abs(numbers.mean()) < 0.02 and abs(numbers.var() - 1) < 0.03
    assert np.abs(bell(np.array([0, 2**64 - 1], np.uint64))).max() < 3.47


def test_single_numbers_continue_the_stream_past_a_block():
    draws = Draws(0, 0, 0)
    numbers = [draws.between(-2.0, 3.0) for _ in range(200)]
    assert len(set(numbers)) == 200 and min(numbers) >= -2 and max(numbers) < 3


def test_chance_and_pick_keep_their_odds():
    draws = Draws(0, 0, 0)
    assert abs(sum(draws.chance(0.25) for _ in range(4000)) / 4000 - 0.25) < 0.03
    assert {draws.pick("abc") for _ in range(100)} == set("abc")
