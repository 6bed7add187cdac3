"""Fixtures of the reference implementations: NAME.json (constructor arguments, cases) with NAME.safetensors
(states, inputs, outputs, gradients).

Cases are discovered from the JSON, so another folder of the same form can be given with `--parity-dir`."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close


def close(ours, reference, what):
    "Equal within 1e-5 of the largest reference value, or of 1: the order of sums differs between processors."
    largest = reference.abs().max().item() if reference.numel() else 0.0
    assert_close(ours, reference, rtol=0, atol=1e-5 * max(1.0, largest), msg=lambda m: f"{what}: {m}")


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    "The gradient of a parameter or an input; `None` counts as the zeros that a reference may have computed."
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@cache
def info(folder: Path, name: str) -> dict:
    "What the JSON of a fixture says; without the file there are no cases."
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": []}


@cache
def tensors(folder: Path, name: str) -> dict:
    "All tensors of a fixture."
    return load_file(folder / f"{name}.safetensors")


def under(folder: Path, name: str, prefix: str) -> dict:
    "Tensors of one fixture below `prefix`, which is removed."
    return {k.removeprefix(prefix): v for k, v in tensors(folder, name).items() if k.startswith(prefix)}


def cases(metafunc, *names, where=lambda name, case: True) -> list:
    "Parameters `(folder, name, case)` for each case of the fixtures."
    folder = metafunc.config.getoption("--parity-dir")
    found = []
    for name in names:
        for case in info(folder, name)["cases"]:
            if where(name, case):
                found.append(pytest.param((folder, name, case), id=f"{name}-{case['name']}"))
    return found
