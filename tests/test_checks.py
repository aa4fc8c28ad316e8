"""The contracts: what passes in silence, and what the message says about the rest."""

import math

import pytest
import torch

from kleash.checks import require_beta, require_between, require_mask, require_rank, require_same_shape
from kleash.errors import ShapeError, ValueRangeError


def test_tensors_of_one_shape_pass():
    require_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3), c=torch.zeros(2, 3, dtype=torch.bool))
    require_same_shape(only=torch.zeros(4))
    require_same_shape()


def test_shapes_that_would_broadcast_are_still_refused():
    with pytest.raises(ShapeError, match=r"policy_logprobs \[2, 3\], ref_logprobs \[1, 3\]"):
        require_same_shape(policy_logprobs=torch.zeros(2, 3), ref_logprobs=torch.zeros(1, 3))


def test_the_rank_is_checked_tensor_by_tensor_and_the_message_names_the_culprit():
    require_rank(1, "[batch]", scores=torch.zeros(4), lengths=torch.zeros(9))
    with pytest.raises(ShapeError, match=r"lengths as \[batch\], found shape \[9, 1\]"):
        require_rank(1, "[batch]", scores=torch.zeros(4), lengths=torch.zeros(9, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_that_is_not_bool_is_refused(dtype):
    with pytest.raises(ShapeError, match=r"dtype torch\.bool, found torch\.\w+; convert it with \.bool\(\)"):
        require_mask(torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_mask_that_is_not_batch_by_time_is_refused(shape):
    with pytest.raises(ShapeError, match=r"response_mask as \[batch, time\]"):
        require_mask(torch.ones(shape, dtype=torch.bool))


def test_a_bool_mask_passes_even_when_it_is_empty():
    require_mask(torch.ones(2, 3, dtype=torch.bool))
    require_mask(torch.ones(0, 3, dtype=torch.bool))


def test_both_ends_of_a_range_belong_to_it():
    require_between(0, 1, gamma=0.0, gae_lambda=1.0)


@pytest.mark.parametrize("number", [-1e-9, 1.1, math.nan, math.inf, -math.inf])
def test_a_number_outside_its_range_or_not_a_number_is_refused_by_name(number):
    with pytest.raises(ValueRangeError, match=f"gamma between 0 and 1, found {number:g}"):
        require_between(0, 1, gae_lambda=0.5, gamma=number)


@pytest.mark.parametrize("beta", [0, 0.0, 0.05, 1e6])
def test_beta_may_be_zero_or_any_positive_number(beta):
    require_beta(beta)


@pytest.mark.parametrize("beta", [-1e-9, math.nan, math.inf, -math.inf])
def test_a_beta_that_would_pay_for_drift_or_is_not_finite_is_refused(beta):
    with pytest.raises(ValueRangeError, match="Expected beta finite and >= 0"):
        require_beta(beta)
