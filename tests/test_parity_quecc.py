"""QueCC against its reference's numbers (fixtures in `--parity-dir`), and what must hold for any size."""
from functools import cache

import pytest
import torch
from hashfill import fill
from parity import cases, close, info, tensors, under
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.quecc import QueCC, QueCCConfig
from delta_llava.config import clip_b32_384

NAME = "quecc"
KINDS = {"output": lambda m: cases(m, NAME), "real": lambda m: cases(m, "real_shapes", where=lambda n, c: c["name"].startswith(f"{NAME}_"))}


def pytest_generate_tests(metafunc):
    for kind, found in KINDS.items():
        if f"{kind}_case" in metafunc.fixturenames: metafunc.parametrize(f"{kind}_case", found(metafunc))


# ---- the reference's numbers
def test_every_kind_has_a_case(request):
    for kind, found in KINDS.items(): assert found(request), f"no case of kind {kind!r}: a fixture that is missing proves nothing"
    folder = request.config.getoption("--parity-dir")
    assert all(under(folder, NAME, f"mid.{c['name']}.") for c in info(folder, NAME)["cases"])


def reference_state(folder, case) -> dict:
    "What all cases share, and the kernel of this one."
    return under(folder, NAME, "state.") | under(folder, NAME, f"state_{case['name']}.")


def build(folder, case, times=1.) -> QueCC:
    "Ours with the sizes of the fixture and the reference's state, scaled by `times`."
    ctor = info(folder, NAME)["ctor"]
    assert case["kernel"] == case["stride"] and ctor["ln_eps"] == 1e-6
    model = QueCC(QueCCConfig(
        grid=case["raw_grid"], tokens=(case["raw_grid"]//case["kernel"])**2, levels=tuple(range(ctor["multi_dim"]//ctor["vision_hidden"])),
        d_vision=ctor["vision_hidden"], d_llm=ctor["hidden_size"], d_text=ctor["text_dim"], heads=ctor["num_heads"]))
    assert model.config.kernel == case["kernel"]
    model.load_state_dict(from_reference({k: v*times for k, v in reference_state(folder, case).items()}, QueCC.state_dict_map, QueCC.prefix))
    return model.eval()


def run(folder, case, times=1.) -> dict:
    "Compressed and final tokens of a case."
    model, given = build(folder, case, times), under(folder, NAME, f"in.g{case['raw_grid']}.")
    compressed = model.compress(given["multi"], given["single"], given["text"])
    return dict(compressed=compressed, out=model.mlp(compressed))


def expected(folder, case) -> dict:
    return under(folder, NAME, f"mid.{case['name']}.") | dict(out=tensors(folder, NAME)[f"out.{case['name']}"])


def test_output(output_case):
    folder, _, case = output_case
    ours, theirs = run(folder, case), expected(folder, case)
    assert set(ours) == set(theirs) and list(ours["out"].shape) == case["out_shape"]
    for key in ours: close(ours[key], theirs[key], key)
    model = build(folder, case)
    assert sum(p.numel() for p in model.parameters()) == case["total_params"]
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.mlp.parameters()) == case["compressor_params"]


def test_output_notices_one_percent(output_case):
    folder, _, case = output_case
    ours, theirs = run(folder, case, 1.01), expected(folder, case)
    for key in ours:
        with pytest.raises(AssertionError): close(ours[key], theirs[key], key)


@pytest.mark.parametrize("outer", ["", QueCC.prefix])
def test_reference_round_trip(output_case, outer):
    folder, _, case = output_case
    theirs = {outer + k: v for k, v in reference_state(folder, case).items()}
    model = build(folder, case)
    model.load_state_dict(from_reference(theirs, QueCC.state_dict_map, QueCC.prefix))
    back = to_reference(model.state_dict(), QueCC.state_dict_map, outer)
    assert set(back) == set(theirs)
    for key in theirs: assert_close(back[key], theirs[key], rtol=0, atol=0)


@cache
def real_model(tokens: int, times=1.) -> QueCC:
    "True widths, filled by a closed form under the reference's names."
    with torch.device("meta"): model = QueCC(QueCCConfig(tokens=tokens))
    theirs = {k: torch.from_numpy(fill(f"{NAME}/{k}", tuple(v.shape)))*times for k, v in to_reference(model.state_dict(), QueCC.state_dict_map).items()}
    model.load_state_dict(from_reference(theirs, QueCC.state_dict_map), assign=True)
    return model.eval()


def close_to_real(out, folder, case):
    stored = under(folder, "real_shapes", f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 43, where float32 itself has steps of 4e-6
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")


def test_real_widths(real_case):
    folder, _, case = real_case
    shapes = dict(multi=(1, 576, 4096), single=(1, 576, 1024), text=(1, 1, 4096))
    given = [torch.from_numpy(fill(f"{NAME}/in.{k}", shape, kind="input")) for k, shape in shapes.items()]
    models = [real_model((24//case["kernel"])**2, times) for times in (1., 1.01)]
    with torch.no_grad(): out, off = (m.mlp(m.compress(*given)) for m in models)
    assert sum(p.numel() for p in models[0].parameters()) == case["param_count"]
    close_to_real(out, folder, case)
    with pytest.raises(AssertionError): close_to_real(off, folder, case)


# ---- any size
def small(**sizes) -> QueCC:
    torch.manual_seed(0)
    return QueCC(QueCCConfig(**dict(grid=6, tokens=9, levels=(1, 2), d_vision=32, d_llm=24, heads=4) | sizes)).eval()


def given(batch=2, grid=6, channels=64, d_text=24):
    torch.manual_seed(1)
    return torch.randn(batch, grid**2, channels), torch.randn(batch, 1, d_text)


@pytest.mark.parametrize("grid,levels,d_vision,heads,d_llm,d_text", [(6, (3,), 16, 1, 40, None), (7, (1, 2), 32, 4, 24, 10), (12, (0, 5, 9), 24, 8, 8, None)])
def test_every_budget_of_any_grid_and_width(grid, levels, d_vision, heads, d_llm, d_text):
    x, h = given(grid=grid, channels=len(levels)*d_vision, d_text=d_text or d_llm)
    for g in range(1, grid+1):
        build = lambda: small(grid=grid, tokens=g*g, levels=levels, d_vision=d_vision, heads=heads, d_llm=d_llm, d_text=d_text)
        if grid % g:
            with pytest.raises(ValueError, match="as the kernel of QueCCConfig requires; use one of"): build()
            continue
        model = build()
        assert model.config.budgets(grid) == [g*g] and model.config.kernel == grid//g
        for out in (model(x, text=h), model(x, tokens=g*g, text=h)): assert out.shape == (2, g*g, d_llm) and out.isfinite().all()


def test_another_grid_has_the_budget_that_the_kernel_makes_of_it():
    model, (x, h) = small(), given(grid=8)
    with pytest.raises(ValueError, match=r"tokens=9 is not possible for QueCCConfig on a 8×8 grid; use one of \[16\]"): model(x, text=h)
    assert model(x, tokens=16, text=h).shape == (2, 16, 24)
    with pytest.raises(ValueError, match="a kernel of 2×2 patches does not divide a 7×7 grid"): model(x[:, :49], text=h)


def test_forward_takes_the_last_level_for_its_queries():
    model, (x, h) = small(), given()
    assert_close(model(x, text=h), model.mlp(model.compress(x, x[..., 32:], h)))
    assert not torch.allclose(model(x, text=h), model.mlp(model.compress(x, x[..., :32], h)), atol=1e-6)


def test_tokens_belong_to_the_question():
    model, (x, h) = small(), given()
    assert (model(x, text=h) - model(x, text=h.flip(0))).abs().amax((1, 2)).min() > 1e-4
    one = torch.cat([h[:1], torch.randn(1, 1, 24)])
    assert_close(model(x, text=one)[0], model(x, text=h)[0], msg="the question of one row changed another's tokens")


def test_rows_of_a_batch_do_not_mix():
    model, (x, h) = small(), given(batch=3)
    assert_close(model(x, text=h)[1:2], model(x[1:2], text=h[1:2]))


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradient_reaches_every_parameter(tokens):
    model, (x, h) = small(tokens=tokens), given()
    model(x, text=h).square().sum().backward()
    unseen = {"k.3.bias"}  # adds the same to all scores of a query
    assert {n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-8} <= unseen


def test_bfloat16_and_a_question_of_another_precision():
    model, (x, h) = small(), given()
    exact = model(x, text=h)
    model.bfloat16()
    for text in (h, h.bfloat16()):
        out = model(x.bfloat16(), text=text)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < .03 * exact.norm()


def test_standardized_features():
    model, plain, (x, h) = small(standardize=True), small(), given(batch=5)
    x = 3 + 2*x
    model.fit_statistics(x)
    flat = x.flatten(0, 1)
    assert_close(model(x, text=h), plain((x - flat.mean(0)) / flat.std(0), text=h))


def test_start():
    "PyTorch's: uniform up to 1/√fan_in for weights and biases; Xavier for the attention's q, k, v, whose biases are 0, as the output's."
    model = small(d_vision=128, heads=8)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(7.)
    model.reset_parameters()
    for module, inputs in ((model.text[0], 24), (model.q[0], 128), (model.k[0], 256), (model.v[2], 128), (model.shrink, 4), (model.attend.out, 128), (model.mlp[0], 128), (model.mlp[2], 24)):
        assert module.weight.abs().max() <= inputs**-.5 and abs(module.weight.std() * (3*inputs)**.5 - 1) < .06  # a uniform one, not a normal one
        if module is not model.attend.out: assert 0 < module.bias.abs().max() <= inputs**-.5
    limit = (6 / (128 + 3*128))**.5
    assert .99*limit < model.attend.qkv.weight.abs().max() <= limit
    assert not model.attend.qkv.bias.any() and not model.attend.out.bias.any()
    for norm in (model.text[1], model.q[3], model.k[3], model.v[3]): assert (norm.weight == 1).all() and not norm.bias.any()


def test_on_the_meta_device():
    with torch.device("meta"):
        model = build_compressor(NAME, QueCCConfig(tokens=36))
        assert sum(p.numel() for p in model.parameters()) == 41_988_096
        assert model(torch.empty(2, 576, 4096), text=torch.empty(2, 1, 4096)).shape == (2, 36, 4096)


def test_config_by_name():
    config = compressor_config(NAME, clip_b32_384(tokens=16))
    assert (config.kernel, config.budgets(12), QueCCConfig.from_dict(config.to_dict())) == (3, [16], config)


def test_refusals():
    model, (x, h) = small(), given()
    for text in (None, h[:, 0], h[:1], h[..., :8], torch.cat([h, h], 1)):
        with pytest.raises(ValueError, match=r"QueCC reads the question, so it needs a question embedding \(2, 1, 24\)"): model(x, text=text)
    for tokens in (0, 4, 36, True):
        with pytest.raises(ValueError, match=r"not possible for QueCCConfig on a 6×6 grid; use one of \[9\]"): model(x, tokens=tokens, text=h)
    with pytest.raises(ValueError, match=r"tokens=16 .* use one of \[1, 4, 9, 36\]"): small(tokens=16)
    for wrong in (dict(grid=0), dict(d_text=0), dict(heads=3), dict(tokens=0), dict(tokens=True)):
        with pytest.raises(ValueError): small(**wrong)
