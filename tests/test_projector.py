"What must hold for the projector whatever its sizes and switches: invariants, identities and the folded form."
import copy
from dataclasses import replace
import pytest
import torch
from torch.testing import assert_close
from delta_llava.config import (ProjectorConfig, ablation_config, clip_b32_224, clip_b32_384, clip_l14_224, clip_l14_336, dinov2_s14, paper_text_config,
                                relative_levels, siglip_so400m_384)
from delta_llava.grid import VisionFeatures, interpolate, pos_embed, to_windows
from delta_llava.projector import DeltaProjector, from_authors_state, to_authors_state

SMALL = ProjectorConfig(grid=6, tokens=9, levels=(1, 3, 4), d_vision=32, d_llm=24, rank=4, heads=4, head_dim=8)
VARIANTS = {
    "authors": SMALL, "paper": paper_text_config(SMALL), "mean": replace(SMALL, query_pool="mean"), "standardize": replace(SMALL, standardize=True),
    "project-mix": replace(SMALL, order="project-mix"), "bare": replace(SMALL, activate=False), "share_base": replace(SMALL, share_base=True),
    "residual_mlp": replace(SMALL, residual_mlp=True), "raster": replace(SMALL, kv_reduction=2), "square": replace(SMALL, kv_reduction=2, kv_pool="square"),
    "scale": replace(SMALL, kv_reduction="scale", kv_pool="square"), "one level": replace(SMALL, levels=(4,)),
    "no EMHSA": ablation_config(SMALL, "EMHSA"), "no TB": ablation_config(SMALL, "TB"), "no MHCA": ablation_config(SMALL, "TB", "mhca"),
    "linear": ablation_config(SMALL, "DeltaProj"), "base": ablation_config(SMALL, "DeltaProj", "base"), "tokenpacker": ablation_config(SMALL, "DeltaProj", "tokenpacker"),
    "paper, standardized": replace(paper_text_config(SMALL), standardize=True), "paper, no TB": ablation_config(paper_text_config(SMALL), "TB"),
    "paper, no DeltaProj": ablation_config(paper_text_config(SMALL), "DeltaProj"), "shared, activated, Eq. 11": replace(SMALL, share_base=True, residual_mlp=True),
}
BUDGETS = (36, 25, 16, 9, 4, 1)
variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def shaken(config):
    "A projector whose every parameter and statistic is random, so that none hides behind a 0 or a 1."
    torch.manual_seed(0)
    module = DeltaProjector(config).eval()
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn_like(p)*.1)
    if config.standardize: module.fit_statistics(torch.randn(8, 36, config.d_levels)*2 + 1)
    return module


def features(config, batch=2): return torch.randn(batch, config.grid**2, config.d_levels, generator=torch.Generator().manual_seed(1))


@variant
def test_every_budget_has_its_shape_and_moves_with_the_picture(config):
    module, x = shaken(config), features(config)
    for tokens in BUDGETS:
        out = module(x, tokens=tokens)
        assert out.shape == (2, tokens, 24)
        assert (out[0] - out[1]).abs().max() > 1e-3


@variant
def test_images_of_a_batch_do_not_meet(config):
    module, x = shaken(config), features(config)
    assert_close(module(x)[1:], module(x[1:]), rtol=1e-4, atol=1e-5)


@variant
def test_every_parameter_learns(config):
    module = shaken(config).train()
    module.config = replace(module.config, drop_path=0)
    (module(features(config)).square().sum()).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@variant
def test_state_survives_a_round_trip(config):
    module, other = shaken(config), DeltaProjector(config).eval()
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert_close(other(features(config)), module(features(config)), rtol=0, atol=0)
    pointers = [t.data_ptr() for t in module.state_dict().values()]
    assert len(pointers) == len(set(pointers)), "safetensors stores each tensor once"


@variant
def test_reset_redoes_the_whole_start(config):
    module = DeltaProjector(config)
    with torch.no_grad():
        for t in module.state_dict().values(): t.fill_(float("nan"))
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    torch.manual_seed(3)
    twin = DeltaProjector(config)
    twin.reset_parameters()
    torch.manual_seed(3)
    twin.reset_parameters()
    for k, v in twin.state_dict().items(): assert_close(module.state_dict()[k], v, rtol=0, atol=0)


@variant
def test_folded_is_the_same_function(config):
    if config.projection == "tokenpacker":
        with pytest.raises(ValueError, match="tokenpacker"): DeltaProjector(config).fold()
        return
    module, x = shaken(config), features(config)
    folded = module.fold()
    for tokens in BUDGETS: assert_close(folded(x, tokens=tokens), module(x, tokens=tokens), rtol=0, atol=1e-5)
    other_grid = VisionFeatures(torch.randn(1, 81, config.d_levels), 9)
    for tokens in (81, 49, 9): assert_close(folded(other_grid, tokens=tokens), module(other_grid, tokens=tokens), rtol=0, atol=1e-5)


def test_folding_leaves_the_projector_as_it_was():
    module, x = shaken(SMALL), features(SMALL)
    before, state = module(x), copy.deepcopy(module.state_dict())
    folded = module.fold()
    with torch.no_grad():
        for t in folded.state_dict().values(): t.zero_()
    assert_close(module(x), before, rtol=0, atol=0)
    for k, v in state.items(): assert_close(module.state_dict()[k], v, rtol=0, atol=0)


def test_folded_in_bfloat16_is_as_close_as_bfloat16_allows():
    module, x = shaken(SMALL), features(SMALL)
    exact = module(x)
    plain = (module.bfloat16()(x.bfloat16()).float() - exact).abs().max()
    folded = (module.fold()(x.bfloat16()).float() - exact).abs().max()
    assert folded < 3*plain + 1e-3


def test_switches_change_the_function():
    "Same weights, same features: every switch that leaves the parameters alone must still be heard."
    x = features(SMALL)
    reference = shaken(SMALL)
    for name in ("mean", "project-mix", "raster", "square"):
        other = DeltaProjector(VARIANTS[name]).eval()
        other.load_state_dict(reference.state_dict())
        assert (other(x, tokens=4) - reference(x, tokens=4)).abs().max() > 1e-3, name


def test_reduction_can_follow_the_scale():
    "With `kv_reduction='scale'` EMHSA pools by s, here 2, and by no more than there are queries."
    fixed, scale = shaken(VARIANTS["square"]), DeltaProjector(VARIANTS["scale"]).eval()
    scale.load_state_dict(fixed.state_dict())
    x = features(SMALL)
    assert_close(scale(x, tokens=9), fixed(x, tokens=9), rtol=0, atol=0)  # s=2
    assert (scale(x, tokens=36) - shaken(SMALL)(x, tokens=36)).abs().max() < 1e-6  # s=1: nothing is pooled
    assert scale(x, tokens=1).isfinite().all()  # s=6, but one query only


def test_last_step_is_equation_11():
    module = shaken(replace(SMALL, residual_mlp=True))
    x = torch.randn(2, 9, 32)
    lifted = module.mlp.lift(x)
    first, _, second = module.mlp.mlp
    wanted = lifted + second(torch.nn.functional.gelu(first(module.mlp.norm(lifted))))
    assert_close(module.mlp(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", [clip_l14_336, clip_l14_224, clip_b32_224, clip_b32_384, siglip_so400m_384, dinov2_s14], ids=lambda p: p.__name__)
def test_presets_run_at_their_true_grid(preset):
    true = preset()
    config = replace(true, d_vision=32, d_llm=24, heads=4, head_dim=8, rank=4)
    out = DeltaProjector(config)(torch.randn(1, config.grid**2, config.d_levels))
    assert out.shape == (1, true.tokens, 24)
    with torch.device("meta"): assert sum(p.numel() for p in DeltaProjector(true).parameters()) > 1e6


def test_levels_of_any_depth():
    assert relative_levels(24) == (12, 16, 22, 23)
    assert all(len(set(relative_levels(d))) == 4 and max(relative_levels(d)) == d - 1 and min(relative_levels(d)) >= 0 for d in range(4, 64))


def test_query_level_is_the_last_one():
    "A window of one patch has no use for the query level; a window of four moves with it when keys and values are held."
    module, x = shaken(SMALL), features(SMALL)
    moved = x.clone()
    moved[..., :-32] = torch.randn_like(moved[..., :-32])
    assert_close(module.queries(x[..., -32:], 3), module.queries(moved[..., -32:], 3), rtol=0, atol=0)
    g = SMALL.g
    held = module.project(x, torch.randn_like(x[..., -32:]), g)
    assert (held - module.project(x, x[..., -32:], g)).abs().max() > 1e-4
    assert_close(module.project(x, torch.randn_like(x[..., -32:]), 6), module.project(x, x[..., -32:], 6), rtol=0, atol=1e-6)


def test_windows_that_do_not_divide():
    x = torch.randn(1, 49, 3)
    resized = interpolate(x, 8)
    assert_close(to_windows(x, 4), to_windows(resized, 4), rtol=0, atol=0)


def test_positions_do_not_remember_a_context():
    "A table first asked for under inference_mode or on the meta device serves training afterwards."
    with torch.inference_mode(), torch.device("meta"): table = pos_embed(6, 5, 20)
    assert table.device.type == "cpu" and not table.is_inference() and table.isfinite().all()
    assert pos_embed(6, 5, 20, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_start_is_the_authors():
    torch.manual_seed(0)
    state = DeltaProjector(ProjectorConfig(d_vision=256, d_llm=512)).state_dict()
    for name in ("q.base.weight", "k.base.weight", "mlp.0.weight", "attend.out.weight", "mix.emhsa.qkv.weight"):
        assert state[name].std().item() == pytest.approx(.02, rel=.05), name
    assert state["attend.qkv.weight"].std().item() == pytest.approx((2/(256 + 3*256))**.5, rel=.05)  # Xavier over the stack
    assert state["k.U"].std().item() == pytest.approx((2/(1024 + 16))**.5, rel=.05)
    assert state["mix.far.weight"].std().item() == pytest.approx((1/(3*256))**.5, rel=.05)  # a convolution's default
    assert not state["mlp.0.bias"].any() and not state["attend.qkv.bias"].any() and not state["mix.emhsa.out.bias"].any()


def test_authors_names_are_strict():
    state = to_authors_state(shaken(SMALL).state_dict())
    assert len(state) == 45
    with pytest.raises(ValueError, match=r"missing \['k_proj_1.V'\]"): from_authors_state({k: v for k, v in state.items() if k != "k_proj_1.V"})
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"): from_authors_state(state | {"extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"): DeltaProjector(replace(SMALL, d_llm=25)).load_state_dict(from_authors_state(state))


@pytest.mark.parametrize("bad, message", [
    (torch.randn(2, 36, 64), "features have 64 channels; this projector reads 3 levels × 32 = 96"),
    (torch.randn(2, 37, 96), "37 tokens form no square grid"),
    (torch.randn(2, 96, 6, 6), r"\[batch, patches, levels·channels\]"),
])
def test_bad_features(bad, message):
    for module in (DeltaProjector(SMALL), DeltaProjector(SMALL).fold()):
        with pytest.raises(ValueError, match=message): module(bad)


@pytest.mark.parametrize("tokens", [0, -1, 2, 35, 49, 9., True, "9"])
def test_bad_budgets(tokens):
    with pytest.raises((ValueError, TypeError), match="tokens"): DeltaProjector(SMALL)(features(SMALL), tokens=tokens)


def test_autocast_and_compile_free_of_buffers():
    module, x = shaken(SMALL), features(SMALL)
    assert list(module.named_buffers()) == []
    with torch.autocast("cpu", torch.bfloat16): out = module(x)
    assert (out.float() - module(x)).abs().max() < .1*module(x).abs().max()
