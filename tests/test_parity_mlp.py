"LLaVA's MLP and M3: what the shared comparison (`test_parity_compressors.py`) does not cover."

import math

import pytest
import torch
from parity import cases, close, tensors
from references import M3_REFERENCE, MLP_REFERENCE
from torch.nn.functional import avg_pool2d

from delta_llava.compressors.base import build_compressor
from delta_llava.compressors.m3 import M3Config
from delta_llava.compressors.mlp import MLP


def pytest_generate_tests(metafunc):
    if "floored_case" in metafunc.fixturenames:
        floored = cases(metafunc, "m3_pooling", where=lambda n, c: c["scale"] != c["out_tokens"])
        assert floored, "a fixture that is missing proves nothing"
        metafunc.parametrize("floored_case", floored)
    if "mlp_case" in metafunc.fixturenames:
        metafunc.parametrize("mlp_case", cases(metafunc, "llava_mlp"))


def test_a_scale_that_the_reference_floors_is_refused(floored_case):
    "It returns another number of tokens, without a warning; here that number has to be requested."
    folder, name, case = floored_case
    module = M3_REFERENCE.load(folder, case)
    x = tensors(folder, name)["in.x"]
    message = rf"tokens={case['scale']} .*use one of \[1, 4, .*{case['out_tokens']}"
    with pytest.raises(ValueError, match=message):
        module(x, tokens=case["scale"])
    close(module(x, tokens=case["out_tokens"]), tensors(folder, name)[f"out.{case['name']}"], "output")


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_m3_pools_the_output_of_the_mlp(mlp_case, tokens):
    "One checkpoint for both."
    folder, name, case = mlp_case
    mlp = MLP_REFERENCE.load(folder, case)
    m3 = build_compressor("m3", M3Config.from_dict(mlp.config.to_dict()))
    m3.load_state_dict(mlp.state_dict())
    stored = tensors(folder, name)[f"out.{case['name']}"]
    cells = avg_pool2d(stored.mT.unflatten(-1, (4, 4)), 4 // math.isqrt(tokens))
    close(m3(tensors(folder, name)["in.x"], tokens=tokens), cells.flatten(2).mT, "output")


@pytest.mark.parametrize("tokens", [0, 1, 144, True])
def test_the_mlp_refuses_every_other_budget(tokens):
    message = r"not possible for MLPConfig on a 24×24 grid; use one of \[576\]"
    with pytest.raises(ValueError, match=message):
        MLP(d_vision=8, d_llm=8)(torch.zeros(1, 576, 32), tokens=tokens)
