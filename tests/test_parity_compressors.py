"""Each compressor against its reference's numbers: every case of the fixtures in `--parity-dir`.

`references.py` describes how a compressor is built and run; the comparisons are the same for all."""

import pytest
import torch
from parity import cases, close, gradient, info, tensors, under
from references import REFERENCES, parameters, real_module, real_outputs, state_size
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, from_reference, to_reference

BY_FIXTURE = {reference.fixture: reference for reference in REFERENCES}
WITH_REAL = [reference for reference in REFERENCES if reference.real is not None]


def real_reference(case):
    return next(r for r in WITH_REAL if case["name"].startswith(r.real.cases))


def pytest_generate_tests(metafunc):
    def compared(name, case):
        return BY_FIXTURE[name].where(case)

    def with_gradients(name, case):
        return compared(name, case) and case.get("grads", False)

    def real(name, case):
        return any(case["name"].startswith(reference.real.cases) for reference in WITH_REAL)

    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc, *BY_FIXTURE, where=compared))
    if "gradient_case" in metafunc.fixturenames:
        metafunc.parametrize("gradient_case", cases(metafunc, *BY_FIXTURE, where=with_gradients))
    if "real_case" in metafunc.fixturenames:
        metafunc.parametrize("real_case", cases(metafunc, "real_shapes", where=real))


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.name)
def test_every_fixture_has_a_case(pytestconfig, reference):
    "A fixture that is missing must not pass as nothing to compare."
    folder = pytestconfig.getoption("--parity-dir")
    assert any(reference.where(case) for case in info(folder, reference.fixture)["cases"])
    if reference.real is not None:
        real = [case["name"] for case in info(folder, "real_shapes")["cases"]]
        assert any(name.startswith(reference.real.cases) for name in real)


def test_some_case_has_gradients_and_intermediates(pytestconfig):
    folder = pytestconfig.getoption("--parity-dir")
    assert any(case.get("grads") for case in info(folder, "tokenpacker")["cases"])
    for case in info(folder, "quecc")["cases"]:
        assert under(folder, "quecc", f"mid.{case['name']}.")


def test_output(case):
    folder, fixture, case = case
    reference = BY_FIXTURE[fixture]
    with torch.no_grad():
        ours = reference.outputs(folder, case)
    expected = reference.expected(folder, case)
    assert set(ours) == set(expected)
    assert list(ours["out"].shape) == case.get("out_shape", list(expected["out"].shape))
    for key in ours:
        close(ours[key], expected[key], key)


def test_output_notices_one_percent(case):
    "A comparison that a wrong state could pass would prove nothing."
    folder, fixture, case = case
    reference = BY_FIXTURE[fixture]
    with torch.no_grad():
        ours = reference.outputs(folder, case, 1.01)
    expected = reference.expected(folder, case)
    for key in ours:
        with pytest.raises(AssertionError):
            close(ours[key], expected[key], key)


def test_count(case):
    folder, fixture, case = case
    reference = BY_FIXTURE[fixture]
    module = reference.load(folder, case)
    for count, expected in reference.count(folder, case).items():
        assert count(module) == expected, count.__name__


@pytest.mark.parametrize("with_prefix", [False, True])
def test_state_round_trip(case, with_prefix):
    folder, fixture, case = case
    reference = BY_FIXTURE[fixture]
    module = reference.load(folder, case)
    prefix = module.prefix if with_prefix else ""
    reference_state = {
        prefix + reference.prefix_in_reference + k: v for k, v in reference.state(folder, case).items()
    }
    again = build_compressor(reference.name, module.config)
    again.load_state_dict(from_reference(reference_state, again.state_dict_map, again.prefix))
    back = to_reference(again.state_dict(), again.state_dict_map, prefix)
    assert set(back) == set(reference_state)
    for key, tensor in reference_state.items():
        assert_close(back[key], tensor, rtol=0, atol=0)


def backward(reference, folder, case, scale=1.0):
    "Gradients of inputs (`gin`) and parameters (`gp`, by the reference's names) of `(out·cot).sum()`."
    module = reference.load(folder, case, scale)
    inputs = {k: v.clone().requires_grad_() for k, v in reference.inputs(folder, case).items()}
    out = reference.run(module, inputs, case)["out"]
    (out * tensors(folder, reference.fixture)[f"cot.{case['name']}"]).sum().backward()
    by_parameter = {name: gradient(p) for name, p in module.named_parameters()}
    return dict(
        gin={k: gradient(v) for k, v in inputs.items()}, gp=to_reference(by_parameter, module.state_dict_map)
    )


def stored_gradients(reference, folder, case) -> dict:
    return {kind: under(folder, reference.fixture, f"{kind}.{case['name']}.") for kind in ("gin", "gp")}


def test_gradients(gradient_case):
    folder, fixture, case = gradient_case
    reference = BY_FIXTURE[fixture]
    ours = backward(reference, folder, case)
    stored = stored_gradients(reference, folder, case)
    assert set(stored["gin"]) == set(ours["gin"])
    for kind, gradients in stored.items():
        for key, expected in gradients.items():
            close(ours[kind][key], expected, f"gradient of {key}")


def test_gradients_notice_one_percent(gradient_case):
    folder, fixture, case = gradient_case
    reference = BY_FIXTURE[fixture]
    ours = backward(reference, folder, case, 1.01)
    for kind, gradients in stored_gradients(reference, folder, case).items():
        for key, expected in gradients.items():
            with pytest.raises(AssertionError):
                close(ours[kind][key], expected, key)


def close_to_stored(out, folder, case):
    "The stored corner, the norm of every token, mean and standard deviation."
    stored = under(folder, "real_shapes", f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 70, in steps of 8e-6
    statistics = torch.stack([out.mean(), out.std()])
    close(statistics, torch.tensor([case["mean"], case["std"]]), "mean and standard deviation")


def test_true_widths(real_case):
    folder, _, case = real_case
    reference = real_reference(case)
    close_to_stored(real_outputs(reference, case), folder, case)
    module = real_module(reference.name, reference.real.config(case))
    if "trainable" in case:
        assert (state_size(module), parameters(module)) == (case["param_count"], case["trainable"])
    else:
        assert parameters(module) == case["param_count"]
    with pytest.raises(AssertionError):
        close_to_stored(real_outputs(reference, case, 1.01), folder, case)
