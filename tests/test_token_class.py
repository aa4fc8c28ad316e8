"""Every response token has exactly one class, and the rules apply in their order."""

import pytest
import torch
from exact import generator

from kleash.errors import ShapeError
from kleash.token_class import EOS, FIRST_TOKEN, NO_CLASS, OTHER, SPECIAL, TOKEN_CLASSES, token_classes


def class_by_hand(token: int, position: int, *, on_mask: bool, eos: set[int], special: set[int]) -> str | None:
    if not on_mask:
        return None
    if token in eos:
        return "eos"
    if token in special:
        return "special"
    return "first_token" if position == 0 else "other"


def test_every_token_has_the_class_of_the_first_rule_that_fits():
    draw = generator(0)
    tokens = torch.randint(6, (40, 5), generator=draw)
    mask = torch.rand(40, 5, generator=draw) < 0.7
    found = token_classes(tokens, mask, eos_token_ids=[1, 4], special_token_ids=[0, 1])
    seen = set()
    for row in range(40):
        for position in range(5):
            name = class_by_hand(
                int(tokens[row, position]), position, on_mask=bool(mask[row, position]), eos={1, 4}, special={0, 1}
            )
            expected = NO_CLASS if name is None else TOKEN_CLASSES.index(name)
            assert found[row, position] == expected
            seen.add(expected)
    assert seen == {NO_CLASS, FIRST_TOKEN, EOS, SPECIAL, OTHER}


def test_a_response_that_is_only_its_end_has_no_first_token():
    found = token_classes(torch.tensor([[1]]), torch.tensor([[True]]), eos_token_ids=[1], special_token_ids=[])
    assert found.tolist() == [[EOS]]


def test_without_special_tokens_there_is_no_special_class():
    tokens = torch.arange(4).reshape(1, 4)
    found = token_classes(tokens, torch.ones(1, 4, dtype=torch.bool), eos_token_ids=[3], special_token_ids=[])
    assert found.tolist() == [[FIRST_TOKEN, OTHER, OTHER, EOS]]


def test_another_shape_or_a_mask_that_is_no_mask_is_refused():
    with pytest.raises(ShapeError, match=r"found tokens \[1, 2\], response_mask \[1, 3\]"):
        token_classes(
            torch.zeros(1, 2).long(), torch.ones(1, 3, dtype=torch.bool), eos_token_ids=[], special_token_ids=[]
        )
    with pytest.raises(ShapeError, match=r"dtype torch\.bool"):
        token_classes(torch.zeros(1, 2).long(), torch.ones(1, 2), eos_token_ids=[], special_token_ids=[])
