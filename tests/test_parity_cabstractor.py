"Honeybee's C-Abstractor: what holds for it alone; see `test_parity_compressors.py` for the comparison."
from dataclasses import replace

import pytest
import torch
from references import SIZES, small_inputs, small_module
from torch.testing import assert_close

SMALL = SIZES["cabstractor"].config


def test_end_tokens_come_last_and_do_not_depend_on_the_image():
    config = replace(SMALL, eos=2, tokens=11)
    module = small_module("cabstractor", config)
    out = module(small_inputs("cabstractor", config)["features"])
    assert_close(out[:, 9:], module.eos_tokens.expand(2, -1, -1))


def test_positions_of_another_grid_are_resized():
    module = small_module("cabstractor", SMALL)
    out = module(torch.zeros(1, 16, 64), tokens=16)
    assert (out[0, 0] - out[0, -1]).abs().max() > 1e-3, "only the positions distinguish the patches"


def test_a_budget_for_each_square():
    for grid in (1, 4, 6, 7):
        assert SMALL.budgets(grid) == [g*g for g in range(1, grid+1)]


@pytest.mark.parametrize("fields,message", [
    (dict(tokens=8), r"use one of \[1, 4, 9, 16, 25, 36\]"),
    (dict(eos=2), r"use one of \[3, 6, 11, 18, 27, 38\]"),
    (dict(depth=-1), "depth=-1"), (dict(eos=-1), "eos=-1"),
    (dict(hidden=0), "hidden=0 must be a positive"), (dict(mlp_depth=0), "mlp_depth=0"),
    (dict(hidden=8, depth=0), "hidden=8 with depth=0")])
def test_refused_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
