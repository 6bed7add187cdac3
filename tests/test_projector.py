"What must hold for the projector at all sizes and switches: invariants, identities and the folded form."

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from delta_llava.config import (
    ProjectorConfig,
    ablation_config,
    clip_b32_224,
    clip_b32_384,
    clip_l14_224,
    clip_l14_336,
    dinov2_s14,
    paper_text_config,
    relative_levels,
    siglip_so400m_384,
)
from delta_llava.delta import DeltaProjection, _GELULayerNorm, gelu_layer_norm
from delta_llava.grid import VisionFeatures, interpolate, pos_embed, sincos_2d, to_windows
from delta_llava.mixing import NTB, DropPath, rename_legacy_keys
from delta_llava.projector import DeltaProjector, from_authors_state, to_authors_state

SIZES = dict(grid=6, tokens=9, levels=(1, 3, 4), d_vision=32, d_llm=24, rank=4, heads=4, head_dim=8)
SMALL = ProjectorConfig(**SIZES)
PAPER = paper_text_config(SMALL)
VARIANTS = {
    "authors": SMALL,
    "paper": PAPER,
    "mean": replace(SMALL, query_pool="mean"),
    "standardize": replace(SMALL, standardize=True),
    "project-mix": replace(SMALL, order="project-mix"),
    "bare": replace(SMALL, activate=False),
    "share_base": replace(SMALL, share_base=True),
    "residual_mlp": replace(SMALL, residual_mlp=True),
    "raster": replace(SMALL, kv_reduction=2),
    "square": replace(SMALL, kv_reduction=2, kv_pool="square"),
    "scale": replace(SMALL, kv_reduction="scale", kv_pool="square"),
    "one level": replace(SMALL, levels=(4,)),
    "no EMHSA": ablation_config(SMALL, "EMHSA"),
    "no TB": ablation_config(SMALL, "TB"),
    "no MHCA": ablation_config(SMALL, "TB", "mhca"),
    "linear": ablation_config(SMALL, "DeltaProj"),
    "base": ablation_config(SMALL, "DeltaProj", "base"),
    "tokenpacker": ablation_config(SMALL, "DeltaProj", "tokenpacker"),
    "paper, standardized": replace(PAPER, standardize=True),
    "paper, no TB": ablation_config(PAPER, "TB"),
    "paper, no DeltaProj": ablation_config(PAPER, "DeltaProj"),
    "shared, activated, Eq. 11": replace(SMALL, share_base=True, residual_mlp=True),
}
BUDGETS = (36, 25, 16, 9, 4, 1)
variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def randomized(config):
    "A projector whose every parameter and statistic is random, so that none is hidden by a 0 or a 1."
    torch.manual_seed(0)
    module = DeltaProjector(config).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if config.standardize:
        module.fit_statistics(torch.randn(8, 36, config.d_levels) * 2 + 1)
    return module


def features(config, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.grid**2, config.d_levels, generator=generator)


@variant
def test_every_budget_has_its_shape_and_depends_on_the_image(config):
    module = randomized(config)
    x = features(config)
    for tokens in BUDGETS:
        out = module(x, tokens=tokens)
        assert out.shape == (2, tokens, 24)
        assert (out[0] - out[1]).abs().max() > 1e-3


@variant
def test_images_of_a_batch_do_not_affect_each_other(config):
    module = randomized(config)
    x = features(config)
    assert_close(module(x)[1:], module(x[1:]), rtol=1e-4, atol=1e-5)


@variant
def test_every_parameter_learns(config):
    module = randomized(replace(config, drop_path=0)).train()
    module(features(config)).square().sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@variant
def test_state_survives_a_round_trip(config):
    module = randomized(config)
    other = DeltaProjector(config).eval()
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert_close(other(features(config)), module(features(config)), rtol=0, atol=0)
    pointers = [t.data_ptr() for t in module.state_dict().values()]
    assert len(pointers) == len(set(pointers)), "safetensors stores each tensor once"


@variant
def test_reset_initializes_everything(config):
    module = DeltaProjector(config)
    with torch.no_grad():
        for t in module.state_dict().values():
            t.fill_(float("nan"))
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    twin = DeltaProjector(config)
    torch.manual_seed(3)
    twin.reset_parameters()
    for k, v in twin.state_dict().items():
        assert_close(module.state_dict()[k], v, rtol=0, atol=0)


@variant
def test_folded_is_the_same_function(config):
    if config.projection == "tokenpacker":
        with pytest.raises(ValueError, match="tokenpacker"):
            DeltaProjector(config).fold()
        return
    module = randomized(config)
    x = features(config)
    folded = module.fold()
    for tokens in BUDGETS:
        assert_close(folded(x, tokens=tokens), module(x, tokens=tokens), rtol=0, atol=1e-5)
    other_grid = VisionFeatures(torch.randn(1, 81, config.d_levels), 9)
    for tokens in (81, 49, 9):
        assert_close(folded(other_grid, tokens=tokens), module(other_grid, tokens=tokens), rtol=0, atol=1e-5)


def test_folding_leaves_the_projector_as_it_was():
    module = randomized(SMALL)
    x = features(SMALL)
    before = module(x)
    state = copy.deepcopy(module.state_dict())
    folded = module.fold()
    with torch.no_grad():
        for t in folded.state_dict().values():
            t.zero_()
    assert_close(module(x), before, rtol=0, atol=0)
    for k, v in state.items():
        assert_close(module.state_dict()[k], v, rtol=0, atol=0)


def test_folded_in_bfloat16_is_as_close_as_bfloat16_allows():
    module = randomized(SMALL)
    x = features(SMALL)
    exact = module(x)
    plain = (module.bfloat16()(x.bfloat16()).float() - exact).abs().max()
    folded = (module.fold()(x.bfloat16()).float() - exact).abs().max()
    assert folded < 3 * plain + 1e-3


def test_switches_change_the_function():
    "Same weights, same features: every switch that leaves the parameters alone still changes the output."
    x = features(SMALL)
    reference = randomized(SMALL)
    for name in ("mean", "project-mix", "raster", "square"):
        other = DeltaProjector(VARIANTS[name]).eval()
        other.load_state_dict(reference.state_dict())
        assert (other(x, tokens=4) - reference(x, tokens=4)).abs().max() > 1e-3, name


def test_reduction_can_follow_the_scale():
    "With `kv_reduction='scale'` EMHSA pools by s, here 2, and by no more than there are queries."
    fixed = randomized(VARIANTS["square"])
    scale = DeltaProjector(VARIANTS["scale"]).eval()
    scale.load_state_dict(fixed.state_dict())
    x = features(SMALL)
    assert_close(scale(x, tokens=9), fixed(x, tokens=9), rtol=0, atol=0)  # s=2
    assert_close(scale(x, tokens=36), randomized(SMALL)(x, tokens=36), rtol=0, atol=1e-6)  # s=1: no pooling
    assert scale(x, tokens=1).isfinite().all()  # s=6, but one query only


def test_last_step_is_equation_11():
    module = randomized(replace(SMALL, residual_mlp=True))
    x = torch.randn(2, 9, 32)
    lifted = module.mlp.lift(x)
    first, _, second = module.mlp.mlp
    wanted = lifted + second(torch.nn.functional.gelu(first(module.mlp.norm(lifted))))
    assert_close(module.mlp(x), wanted, rtol=1e-5, atol=1e-6)


PRESETS = (clip_l14_336, clip_l14_224, clip_b32_224, clip_b32_384, siglip_so400m_384, dinov2_s14)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
def test_presets_run_at_their_true_grid(preset):
    true = preset()
    config = replace(true, d_vision=32, d_llm=24, heads=4, head_dim=8, rank=4)
    out = DeltaProjector(config)(torch.randn(1, config.grid**2, config.d_levels))
    assert out.shape == (1, true.tokens, 24)
    with torch.device("meta"):
        assert sum(p.numel() for p in DeltaProjector(true).parameters()) > 1e6


def test_levels_of_any_depth():
    assert relative_levels(24) == (12, 16, 22, 23)
    for depth in range(4, 64):
        levels = relative_levels(depth)
        assert len(set(levels)) == 4 and max(levels) == depth - 1 and min(levels) >= 0


def test_query_level_is_the_last_one():
    "A window of one patch does not use the query level; larger windows depend on it, keys and values held."
    module = randomized(SMALL)
    x = features(SMALL)
    changed = x.clone()
    changed[..., :-32] = torch.randn_like(changed[..., :-32])
    level, other_level = x[..., -32:], torch.randn_like(x[..., -32:])
    assert_close(module.queries(level, 3), module.queries(changed[..., -32:], 3), rtol=0, atol=0)
    assert (module.project(x, other_level, 3) - module.project(x, level, 3)).abs().max() > 1e-4
    assert_close(module.project(x, other_level, 6), module.project(x, level, 6), rtol=0, atol=1e-6)


def test_windows_that_do_not_divide():
    x = torch.randn(1, 49, 3)
    resized = interpolate(x, 8)
    assert_close(to_windows(x, 4), to_windows(resized, 4), rtol=0, atol=0)


# ---- positions


def test_positions_do_not_remember_a_context():
    "A table made under a mode serves nobody else."
    with torch.inference_mode(), torch.device("meta"):
        assert pos_embed(6, 5, 20).device.type == "cpu"
    with FakeTensorMode():
        pos_embed(6, 5, 20)
    table = pos_embed(6, 5, 20)
    assert type(table) is torch.Tensor and not table.is_inference() and table.isfinite().all()
    assert pos_embed(6, 5, 20, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("grid,g", [(24, 12), (24, 7), (7, 4), (6, 6), (5, 1)])
def test_positions_are_the_table_resized(grid, g):
    plain = interpolate(sincos_2d(grid, 64)[None], g, "bicubic")[0]
    assert_close(pos_embed(grid, g, 64), plain, rtol=0, atol=1e-6)


# ---- transforms of torch


@pytest.mark.parametrize("training", [False, True])
def test_export_leaves_the_projector_usable(training):
    config = replace(SMALL, drop_path=0)
    module = randomized(config).train(training)
    x = features(config)
    before = module(x)
    exported = torch.export.export(module, (x,), strict=False)
    assert_close(exported.module()(x), before, rtol=1e-5, atol=1e-5)
    assert_close(module(x), before, rtol=0, atol=0)
    assert DeltaProjector(config)(x).shape == before.shape


def test_export_with_any_batch_size():
    module = randomized(SMALL)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (features(SMALL),), dynamic_shapes=({0: batch},), strict=False)
    x = features(SMALL, batch=5)
    assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["authors", "paper", "tokenpacker"])
def test_functional_gradients(name):
    "torch.func's gradients are backward's, for a batch and for each image."
    config = VARIANTS[name]
    module = randomized(config)
    x = features(config)

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    parameters = dict(module.named_parameters())
    functional = torch.func.grad(loss)(parameters, x)
    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for name, p in parameters.items():
        assert_close(functional[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert_close(per_image[name].sum(0), p.grad, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_functional_gradient_of_a_projection():
    module = DeltaProjection(8, 6, rank=2)
    x = torch.randn(2, 5, 8)
    gradient = torch.func.grad(lambda x: module(x).square().sum())(x)
    x.requires_grad_()
    module(x).square().sum().backward()
    assert_close(gradient, x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_with_recomputation_is_the_plain_one(autocast):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)]
    results = []
    for function in (gelu_layer_norm, _GELULayerNorm.apply):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = leaves[0].bfloat16() if autocast else leaves[0]
            out = function(y, *leaves[1:], 1e-6)
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for plain, ours in zip(*results, strict=True):
        assert_close(ours, plain, rtol=0, atol=0)


# ---- statistics of the features


def test_statistics_are_unbiased():
    "Four patches in all: dividing by n and by n - 1 differ by 15 percent."
    config = ProjectorConfig(
        grid=2, tokens=1, levels=(1,), d_vision=32, d_llm=8, heads=4, head_dim=8, standardize=True
    )
    module = DeltaProjector(config)
    x = torch.randn(1, 4, 32)
    module.fit_statistics(x)
    assert_close(module.feature_mean, x[0].mean(0))
    assert_close(module.feature_std, x[0].std(0, correction=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.456, -7e4])
def test_a_constant_channel_is_not_scaled(value):
    module = DeltaProjector(replace(SMALL, standardize=True)).eval()
    x = torch.randn(50, 36, SMALL.d_levels)
    x[..., 5] = value
    module.fit_statistics(x)
    assert module.feature_std[5] == 1
    normalized = module.normalize(x)
    assert normalized[..., 5].abs().max() <= 1e-6 * max(1, abs(value))
    assert normalized[..., 6].std().item() == pytest.approx(1, rel=1e-3)
    x[..., 5] += 1.25e-4 * max(1, abs(value))  # was -125 standard deviations
    assert module.normalize(x)[..., 5].abs().max() < 1e-3 * max(1, abs(value))


def test_a_small_channel_is_scaled():
    "Small is not constant."
    module = DeltaProjector(replace(SMALL, standardize=True))
    x = torch.randn(8, 36, SMALL.d_levels)
    x[..., 5] *= 1e-4
    module.fit_statistics(x)
    assert module.normalize(x)[..., 5].std().item() == pytest.approx(1, rel=1e-3)


# ---- DropPath


def test_droppath_keeps_its_share_and_rescales():
    torch.manual_seed(0)
    drop = DropPath(0.3)
    out = drop(torch.ones(20_000, 3))
    kept = out[:, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)
    assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    assert torch.equal(out[:, 0], out[:, 2]), "whole samples are dropped"
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("mix_ratio", [0.75, 0.5])
def test_droppath_rates_of_the_block(mix_ratio):
    "As in the authors' block: the MLP has the rate, EMHSA and MHCA share it by the split of the channels."
    block = NTB(64, 64, head_dim=8, mix_ratio=mix_ratio, drop_path=0.2)
    assert block.drop_attn.rate == pytest.approx(0.2 * mix_ratio)
    assert block.drop_conv.rate == pytest.approx(0.2 * (1 - mix_ratio))
    assert block.drop_mlp.rate == 0.2


@pytest.mark.parametrize("branch", ["drop_attn", "drop_conv", "drop_mlp"])
def test_droppath_is_applied_to_each_branch(branch):
    "With one branch dropped for every sample, the block equals one that does not have it."
    torch.manual_seed(0)
    block = NTB(64, 64, head_dim=8).eval()

    class DropAll(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    x = torch.randn(2, 3, 3, 64)
    t = block.attn_branch(x)
    if branch != "drop_attn":
        t = t + block.emhsa(block.norm(t))
    p = block.conv_branch(t)
    if branch != "drop_conv":
        p = p + block.mhca(p)
    wanted = torch.cat([t, p], dim=-1)
    if branch != "drop_mlp":
        wanted = wanted + block.mlp(wanted)
    setattr(block, branch, DropAll())
    assert_close(block(x), wanted)


# ---- initialization and checkpoints


def test_initialization_is_the_authors():
    torch.manual_seed(0)
    state = DeltaProjector(ProjectorConfig(d_vision=256, d_llm=512)).state_dict()
    normal = ("q.base.weight", "k.base.weight", "mlp.0.weight", "attend.out.weight", "mix.emhsa.qkv.weight")
    for name in normal:
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
    xavier_over_stack = (2 / (256 + 3 * 256)) ** 0.5
    assert state["attend.qkv.weight"].std().item() == pytest.approx(xavier_over_stack, rel=0.05)
    assert state["k.U"].std().item() == pytest.approx((2 / (1024 + 16)) ** 0.5, rel=0.05)
    convolution_default = (1 / (3 * 256)) ** 0.5
    assert state["mix.attn_branch.weight"].std().item() == pytest.approx(convolution_default, rel=0.05)
    for name in ("mlp.0.bias", "attend.qkv.bias", "mix.emhsa.out.bias"):
        assert not state[name].any(), name


def old_names(state):
    "A state as older versions named it."
    return {
        k.replace("mix.attn_branch.", "mix.far.").replace("mix.conv_branch.", "mix.near."): v
        for k, v in state.items()
    }


def test_old_checkpoints_load():
    module = randomized(SMALL)
    old = old_names(module.state_dict())
    assert {"mix.far.weight", "mix.near.weight"} <= set(old)
    other = DeltaProjector(SMALL).eval()
    assert other.load_state_dict(copy.copy(old)).missing_keys == []
    assert_close(other(features(SMALL)), module(features(SMALL)), rtol=0, atol=0)
    assert set(rename_legacy_keys(old)) == set(module.state_dict())
    inside = nn.ModuleDict({"multi_modal_projector": DeltaProjector(SMALL)})
    inside.load_state_dict({f"multi_modal_projector.{k}": v for k, v in old.items()})
    with pytest.raises(RuntimeError, match="mix.middle.weight"):
        other.load_state_dict(old | {"mix.middle.weight": torch.zeros(1)})


def test_authors_names_are_strict():
    state = to_authors_state(randomized(SMALL).state_dict())
    assert len(state) == 45
    with pytest.raises(ValueError, match=r"missing \['k_proj_1.V'\]"):
        from_authors_state({k: v for k, v in state.items() if k != "k_proj_1.V"})
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        from_authors_state(state | {"extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        DeltaProjector(replace(SMALL, d_llm=25)).load_state_dict(from_authors_state(state))


# ---- inputs


def test_keyword_fields():
    assert DeltaProjector(**SIZES).config == SMALL
    assert DeltaProjector(grid=24, tokens=144).config == ProjectorConfig()
    with pytest.raises(ValueError, match=r"got a config and the fields \['tokens'\]"):
        DeltaProjector(SMALL, tokens=4)
    with pytest.raises(ValueError, match=r"unknown projector settings \['token'\]"):
        DeltaProjector(token=4)


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
def test_hidden_states(cls_token, kind):
    module = randomized(SMALL)
    x = features(SMALL)
    states = list(x.chunk(3, dim=-1))
    if cls_token:
        states = [torch.cat([torch.randn(2, 1, 32), state], dim=1) for state in states]
    for m in (module, module.fold()):
        assert_close(m(kind(states)), m(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.randn(2, 36, 64), "features have 64 channels; this projector reads 3 levels × 32 = 96"),
        (torch.randn(2, 37, 96), "37 tokens form no square grid"),
        (torch.randn(2, 96, 6, 6), r"\[batch, patches, levels·channels\]"),
        ([torch.randn(2, 36, 32)] * 4, r"4 hidden states were given for levels=\(1, 3, 4\)"),
        ([torch.randn(2, 41, 32)] * 3, "41 tokens form no square grid; drop the CLS token and registers"),
        ([torch.randn(36, 32)] * 3, r"one hidden state \[batch, patches, channels\] for each level"),
        (
            [torch.randn(2, 36, 32), torch.randn(2, 36, 32), torch.randn(1, 36, 32)],
            "all of one batch and grid",
        ),
    ],
)
def test_bad_features(bad, message):
    for module in (DeltaProjector(SMALL), DeltaProjector(SMALL).fold()):
        with pytest.raises(ValueError, match=message):
            module(bad)


@pytest.mark.parametrize("shape", [(16, 36), (36, 16), (1, 4)])
def test_rectangular_grids_are_refused_by_name(shape):
    "16×36 patches are as many as 24×24."
    rows, columns = shape
    patches = torch.randn(1, rows * columns, 8)
    with pytest.raises(ValueError, match=f"the grid has {rows}×{columns} patches; compressors need a square"):
        VisionFeatures.of(patches, grid=shape)
    with pytest.raises(ValueError, match=f"the grid has {rows}×{columns} patches; compressors need a square"):
        unchecked = object.__new__(VisionFeatures)  # without the type checker of these tests
        object.__setattr__(unchecked, "grid", shape)
        unchecked.__post_init__()
    with pytest.raises(
        ValueError, match=r"768 tokens form no square grid.*\(NaFlex, Qwen-VL\) are not supported"
    ):
        DeltaProjector(SMALL)(torch.randn(1, 24 * 32, SMALL.d_levels))
    with pytest.raises(ValueError, match="768 tokens form no square grid.*square images"):
        to_windows(torch.randn(1, 24 * 32, 8), 4)


@pytest.mark.parametrize("tokens", [0, -1, 2, 35, 49, 9.0, True, "9"])
def test_bad_budgets(tokens):
    with pytest.raises((ValueError, TypeError), match="tokens"):
        DeltaProjector(SMALL)(features(SMALL), tokens=tokens)


def test_autocast_and_compile_free_of_buffers():
    module = randomized(SMALL)
    x = features(SMALL)
    assert list(module.named_buffers()) == []
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert (out.float() - module(x)).abs().max() < 0.1 * module(x).abs().max()
