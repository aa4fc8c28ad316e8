"""Seeds: a number for every purpose and place, the same on every machine."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kleash.seeds import derived_seed, generator_for

places = st.lists(st.integers(0, 10**6), max_size=3)
purposes = st.sampled_from(["sampling", "minibatches", "prompts", "update"])


def test_a_derived_seed_is_the_same_number_for_ever():
    # A resumed run on another machine or version draws on: these numbers are part of the checkpoint format.
    assert derived_seed(0, "sampling", 1) == 2841739436065113520
    assert derived_seed(7, "minibatches", 3, 0, 1) == 7367130231095797447


@given(st.integers(0, 2**32), purposes, places)
def test_a_derived_seed_fits_every_generator(seed, purpose, indices):
    assert 0 <= derived_seed(seed, purpose, *indices) < 2**63
    generator_for(seed, purpose, *indices)


@given(st.lists(st.tuples(st.integers(0, 50), purposes, places.map(tuple)), unique=True, min_size=2, max_size=20))
def test_every_purpose_and_place_has_a_seed_of_its_own(asked):
    assert len({derived_seed(seed, purpose, *indices) for seed, purpose, indices in asked}) == len(asked)


def test_neighbouring_indices_are_not_run_together():
    assert derived_seed(1, "x", 12, 3) != derived_seed(1, "x", 1, 23)
    assert derived_seed(11, "x") != derived_seed(1, "1x")


def test_what_was_drawn_before_changes_nothing():
    first = torch.rand(5, generator=generator_for(3, "sampling", 4))
    torch.rand(100)
    torch.rand(100, generator=generator_for(3, "sampling", 5))
    again = generator_for(3, "sampling", 4)
    assert torch.equal(torch.rand(5, generator=again), first)
    assert not torch.equal(torch.rand(5, generator=again), first)
