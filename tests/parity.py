"""Fixtures of the reference implementations: NAME.json (constructor arguments, cases) with NAME.safetensors (states, inputs, outputs, gradients).

Cases are discovered from the JSON, so another folder of the same form can be given with `--parity-dir`."""
import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close


def close(ours, theirs, what):
    "Equal within 1e-5 of the largest reference value, or of 1: sums in another order differ by that much on another processor."
    atol = 1e-5*max(1., theirs.abs().max().item() if theirs.numel() else 0.)
    assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@cache
def info(folder: Path, name: str) -> dict:
    path = folder/f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": []}


@cache
def tensors(folder: Path, name: str) -> dict:
    return load_file(folder/f"{name}.safetensors")


def under(folder: Path, name: str, prefix: str) -> dict:
    "Tensors of one fixture below `prefix`, which is cut off."
    return {k.removeprefix(prefix): v for k, v in tensors(folder, name).items() if k.startswith(prefix)}


def cases(metafunc, *names, where=lambda name, case: True) -> list:
    "Parameters `(folder, name, case)` for each case of the fixtures."
    folder = metafunc.config.getoption("--parity-dir")
    return [pytest.param((folder, n, c), id=f"{n}-{c['name']}") for n in names for c in info(folder, n)["cases"] if where(n, c)]
