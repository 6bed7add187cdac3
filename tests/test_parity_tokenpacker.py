"""TokenPacker against its reference's numbers (fixtures in `--parity-dir`), and what must hold for any size."""
from functools import cache

import pytest
import torch
from hashfill import fill
from parity import cases, close, info, tensors, under
from torch.testing import assert_close

from delta_llava.compressors import tokenpacker
from delta_llava.compressors.base import build_compressor, from_reference, to_reference
from delta_llava.compressors.tokenpacker import TokenPacker, TokenPackerConfig

NAME = "tokenpacker"
KINDS = {"output": lambda m: cases(m, NAME), "gradient": lambda m: cases(m, NAME, where=lambda n, c: c.get("grads")),
         "real": lambda m: cases(m, "real_shapes", where=lambda n, c: c["name"].startswith(f"{NAME}_"))}


def pytest_generate_tests(metafunc):
    for kind, found in KINDS.items():
        if f"{kind}_case" in metafunc.fixturenames: metafunc.parametrize(f"{kind}_case", found(metafunc))


# ---- the reference's numbers
def test_every_kind_has_a_case(request):
    for kind, found in KINDS.items(): assert found(request), f"no case of kind {kind!r}: a fixture that is missing proves nothing"


def build(folder, case, times=1.) -> TokenPacker:
    "Ours with the sizes of the fixture and the reference's state, scaled by `times`."
    ctor = info(folder, NAME)["ctor"]
    assert (ctor["kv_dim"], ctor["ln_eps"]) == (ctor["embed_dim"], 1e-6)
    model = TokenPacker(TokenPackerConfig(
        grid=case["raw_grid"], tokens=(case["raw_grid"]//case["scale_factor"])**2, levels=tuple(range(ctor["multi_dim"]//ctor["embed_dim"])),
        d_vision=ctor["embed_dim"], d_llm=ctor["hidden_size"], heads=ctor["num_heads"]))
    state = {k: v*times for k, v in under(folder, NAME, "state.").items()}
    model.load_state_dict(from_reference(state, TokenPacker.state_dict_map, TokenPacker.prefix))
    return model.eval()


def run(folder, case, times=1.):
    "Output of a case, and the inputs that it came from."
    single, multi = (tensors(folder, NAME)[k].clone().requires_grad_() for k in case["inputs"])
    return build(folder, case, times).project(multi, single, case["raw_grid"]//case["scale_factor"]), dict(single=single, multi=multi)


def test_output(output_case):
    folder, _, case = output_case
    out, _ = run(folder, case)
    assert list(out.shape) == case["out_shape"]
    close(out, tensors(folder, NAME)[f"out.{case['name']}"], "output")
    assert sum(p.numel() for p in build(folder, case).parameters()) == info(folder, NAME)["param_count"]


def test_output_notices_one_percent(output_case):
    folder, _, case = output_case
    with pytest.raises(AssertionError): close(run(folder, case, 1.01)[0], tensors(folder, NAME)[f"out.{case['name']}"], "output")


def test_gradients(gradient_case):
    folder, _, case = gradient_case
    out, given = run(folder, case)
    (out * tensors(folder, NAME)[f"cot.{case['name']}"]).sum().backward()
    stored = under(folder, NAME, f"gin.{case['name']}.")
    assert set(stored) == set(given)
    for key in stored: close(given[key].grad, stored[key], f"gradient of {key}")


def test_gradients_notice_one_percent(gradient_case):
    folder, _, case = gradient_case
    out, given = run(folder, case, 1.01)
    (out * tensors(folder, NAME)[f"cot.{case['name']}"]).sum().backward()
    for key, stored in under(folder, NAME, f"gin.{case['name']}.").items():
        with pytest.raises(AssertionError): close(given[key].grad, stored, f"gradient of {key}")


@pytest.mark.parametrize("outer", ["", TokenPacker.prefix])
def test_reference_round_trip(output_case, outer):
    folder, _, case = output_case
    theirs = {outer + k: v for k, v in under(folder, NAME, "state.").items()}
    model = build(folder, case)
    model.load_state_dict(from_reference(theirs, TokenPacker.state_dict_map, TokenPacker.prefix))
    back = to_reference(model.state_dict(), TokenPacker.state_dict_map, outer)
    assert set(back) == set(theirs)
    for key in theirs: assert_close(back[key], theirs[key], rtol=0, atol=0)


@cache
def real_model(times=1.) -> TokenPacker:
    "True widths, filled by a closed form under the reference's names."
    with torch.device("meta"): model = TokenPacker()
    theirs = {k: torch.from_numpy(fill(f"{NAME}/{k}", tuple(v.shape)))*times for k, v in to_reference(model.state_dict(), TokenPacker.state_dict_map).items()}
    model.load_state_dict(from_reference(theirs, TokenPacker.state_dict_map), assign=True)
    return model.eval()


def close_to_real(out, folder, case):
    stored = under(folder, "real_shapes", f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 43, where float32 itself has steps of 4e-6
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")


def test_real_widths(real_case):
    folder, _, case = real_case
    single, multi = (torch.from_numpy(fill(f"{NAME}/in.{k}", (1, 576, c), kind="input")) for k, c in (("single", 1024), ("multi", 4096)))
    with torch.no_grad(): out, off = (real_model(times).project(multi, single, 24//case["scale_factor"]) for times in (1., 1.01))
    assert sum(p.numel() for p in real_model().parameters()) == case["param_count"]
    close_to_real(out, folder, case)
    with pytest.raises(AssertionError): close_to_real(off, folder, case)


# ---- any size
def small(**sizes) -> TokenPacker:
    torch.manual_seed(0)
    return TokenPacker(TokenPackerConfig(**dict(grid=6, tokens=9, levels=(1, 2), d_vision=32, d_llm=24, heads=4) | sizes)).eval()


@pytest.mark.parametrize("grid,levels,d_vision,heads,d_llm", [(6, (3,), 16, 1, 40), (7, (1, 2), 32, 4, 24), (12, (0, 5, 9), 24, 8, 8)])
def test_every_budget_of_any_grid_and_width(grid, levels, d_vision, heads, d_llm):
    model = small(grid=grid, tokens=4, levels=levels, d_vision=d_vision, heads=heads, d_llm=d_llm)
    x = torch.randn(2, grid**2, len(levels)*d_vision)
    assert model.config.budgets(grid) == [g*g for g in range(1, grid+1)]
    for tokens in model.config.budgets(grid):
        out = model(x, tokens=tokens)
        assert out.shape == (2, tokens, d_llm) and out.isfinite().all()
    assert model(torch.randn(2, 9, x.shape[-1])).shape == (2, 4, d_llm), "another grid than the config's"


def test_forward_takes_the_last_level_for_its_queries():
    model, x = small(), torch.randn(2, 36, 64)
    assert_close(model(x), model.project(x, x[..., 32:], 3))
    assert not torch.allclose(model(x), model.project(x, x[..., :32], 3), atol=1e-6)


def test_rows_of_a_batch_do_not_mix():
    model, x = small(), torch.randn(3, 36, 64)
    assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_gradient_reaches_every_parameter(tokens):
    model = small()
    model(torch.randn(2, 36, 64), tokens=tokens).square().sum().backward()
    unseen = {"k.3.bias"}  # adds the same to all scores of a query
    assert {n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-8} <= unseen


def test_one_patch_for_each_token_leaves_queries_and_keys_without_effect():
    model = small()
    model(torch.randn(2, 36, 64), tokens=36).square().sum().backward()
    assert not any(p.grad.any() for part in (model.q, model.k) for p in part.parameters())
    assert model.v[0].weight.grad.any()


@pytest.mark.parametrize("tokens", [9, 16])
def test_bfloat16(tokens):
    model, x = small(), torch.randn(2, 36, 64)
    exact, out = model(x, tokens=tokens), model.bfloat16()(x.bfloat16(), tokens=tokens)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < .03 * exact.norm()


def test_query_level_is_shrunk_in_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(tokenpacker, "interpolate", lambda x, g: (seen.append(x.dtype), x[:, :g*g])[1])
    small().bfloat16()(torch.randn(1, 36, 64).bfloat16())
    assert seen == [torch.float32]


def test_standardized_features():
    model, plain = small(standardize=True), small()
    x = 3 + 2*torch.randn(5, 36, 64)
    model.fit_statistics(x)
    flat = x.flatten(0, 1)
    assert_close(model(x), plain((x - flat.mean(0)) / flat.std(0)))


def test_start():
    model = small(d_vision=256, heads=8)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(7.)
    model.reset_parameters()
    for name, p in model.named_parameters():
        norm = name in ("q.1.weight", "k.3.weight", "v.3.weight")
        if norm or name.endswith("bias"): assert (p == int(norm)).all(), name
        elif name != "attend.qkv.weight": assert abs(p.std() - .02) < .001 and abs(p.mean()) < .001, name
    limit = (6 / (256 + 3*256))**.5  # Xavier over the stacked q, k and v
    assert .99*limit < model.attend.qkv.weight.abs().max() <= limit


def test_on_the_meta_device():
    with torch.device("meta"): model = build_compressor(NAME, TokenPackerConfig())
    assert sum(p.numel() for p in model.parameters()) == 36_722_688
    assert model(torch.empty(2, 576, 4096, device="meta"), tokens=36).shape == (2, 36, 4096)


def test_refusals():
    model, x = small(), torch.randn(1, 36, 64)
    for tokens in (0, 8, 49, True):
        with pytest.raises(ValueError, match=r"not possible for TokenPackerConfig on a 6×6 grid; use one of \[1, 4, 9, 16, 25, 36\]"): model(x, tokens=tokens)
    with pytest.raises(ValueError, match="heads=3 must divide d_vision=32"): small(heads=3)
    with pytest.raises(ValueError, match="heads=0 must be a positive int"): small(heads=0)
