"What must hold for every compressor at any size; `references.py` says what is special about each."

from dataclasses import replace

import pytest
import torch
from references import SIZES, small_inputs, small_module
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.config import clip_b32_224, dinov2_s14
from delta_llava.grid import VisionFeatures

ALL_CONFIGS = [
    pytest.param(name, config, id=f"{name}-{variant}")
    for name, sizes in SIZES.items()
    for variant, config in sizes.all_configs().items()
]
each = pytest.mark.parametrize("name", SIZES)
each_config = pytest.mark.parametrize("name,config", ALL_CONFIGS)


def rows(inputs: dict, chosen: slice) -> dict:
    "Some images of a batch."
    features = inputs["features"]
    if isinstance(features, VisionFeatures):
        names = ("levels", "cls_attention", "keys", "level_attention")
        parts = {name: getattr(features, name) for name in names}
        features = replace(features, **{name: x[chosen] for name, x in parts.items() if x is not None})
    else:
        features = features[chosen]
    return dict(features=features) | {k: v[chosen] for k, v in inputs.items() if k != "features"}


def batch_of(module, inputs, **options):
    inputs = dict(inputs)
    return module(inputs.pop("features"), **inputs, **options)


@each_config
@pytest.mark.parametrize("grid", (1, 2, 4, 6, 7))
def test_every_budget_of_every_grid(name, config, grid):
    "The right shape, finite, and different for different images."
    module = small_module(name, config)
    inputs = small_inputs(name, config, grid=grid)
    for v in config.budgets(grid):
        out = batch_of(module, inputs, tokens=v)
        assert out.shape == (2, v, config.d_llm) and out.isfinite().all()
        assert (out[0] - out[1]).abs().max() > 1e-3


@each
def test_the_default_budget_is_the_configs(name):
    config = SIZES[name].config
    module = small_module(name, config)
    inputs = small_inputs(name, config)
    assert_close(batch_of(module, inputs), batch_of(module, inputs, tokens=config.tokens), rtol=0, atol=0)


@each
def test_rows_of_a_batch_are_independent(name):
    config = SIZES[name].config
    module = small_module(name, config)
    inputs = small_inputs(name, config, batch=3)
    alone = batch_of(module, rows(inputs, slice(1, 2)))
    assert_close(batch_of(module, inputs)[1:2], alone, rtol=1e-4, atol=1e-5)


@each
def test_inputs_are_not_changed(name):
    config = SIZES[name].config
    inputs = small_inputs(name, config)
    levels = VisionFeatures.of(inputs["features"]).levels
    before = levels.clone()
    batch_of(small_module(name, config), inputs)
    assert_close(levels, before, rtol=0, atol=0)


@each_config
def test_every_parameter_gets_a_gradient(name, config):
    module = small_module(name, config).train()
    tokens = SIZES[name].tokens or config.tokens
    out = batch_of(module, small_inputs(name, config), tokens=tokens)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    without = {n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6}
    assert without <= SIZES[name].zero_grad_params


@each
def test_the_query_level_is_the_last_one(name):
    "A change of the last level changes the tokens."
    config = SIZES[name].config
    module = small_module(name, config)
    inputs = small_inputs(name, config)
    before = batch_of(module, inputs)
    levels = VisionFeatures.of(inputs["features"]).levels
    levels[..., -config.d_vision :] += torch.randn(config.d_vision)
    assert (batch_of(module, inputs) - before).abs().max() > 1e-4


@each
def test_bfloat16_is_near(name):
    config = SIZES[name].config
    module = small_module(name, config)
    inputs = small_inputs(name, config)
    want = batch_of(module, inputs)
    features = inputs["features"]
    if isinstance(features, VisionFeatures):
        features = replace(features, levels=features.levels.bfloat16())
    else:
        features = features.bfloat16()
    got = batch_of(module.bfloat16(), inputs | dict(features=features))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


@each_config
def test_reset_repeats_the_whole_initialization(name, config):
    module = build_compressor(name, config)
    fresh = build_compressor(name, config)
    with torch.no_grad():
        for t in module.state_dict().values():
            t.fill_(float("nan"))
    for m in (module, fresh):
        torch.manual_seed(3)
        m.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert_close(module.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@each
def test_standardized_features(name):
    "Statistics in the module equal statistics taken out of the features beforehand."
    sizes = SIZES[name]
    module = small_module(name, sizes.all_configs()["standardized"])
    plain = small_module(name, sizes.config)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("feature_")})
    inputs = small_inputs(name, sizes.config, batch=5)
    features = VisionFeatures.of(inputs["features"])
    module.fit_statistics(3 + 2 * features.levels)
    flat = 3 + 2 * features.levels.flatten(0, 1)
    shifted = replace(features, levels=3 + 2 * features.levels)
    expected = replace(features, levels=(shifted.levels - flat.mean(0)) / flat.std(0))
    assert_close(
        batch_of(module, inputs | dict(features=shifted)),
        batch_of(plain, inputs | dict(features=expected)),
        rtol=1e-4,
        atol=1e-4,
    )


@each
@pytest.mark.parametrize("like", [clip_b32_224(d_llm=64), dinov2_s14(d_llm=64)], ids=["clip", "dinov2"])
def test_by_name_with_another_tower(name, like):
    needs_divisor = name in ("mlp", "m3", "quecc", "pixelshuffle")
    tokens = like.grid**2 if needs_divisor else like.tokens  # a budget that all grids allow
    config = compressor_config(name, like, tokens=tokens)
    inputs = small_inputs(name, config, batch=1)
    assert batch_of(build_compressor(name, config.to_dict()), inputs).shape == (1, config.tokens, 64)


@each_config
def test_config_round_trip(name, config):
    assert type(config).from_dict(config.to_dict()) == config


@each
def test_on_the_meta_device(name):
    config = SIZES[name].config
    with torch.device("meta"):
        module = build_compressor(name, config)
    inputs = small_inputs(name, config)
    features = VisionFeatures.of(inputs["features"])
    features = features.to("meta")
    text = {k: v.to("meta") for k, v in inputs.items() if k == "text"}
    assert module(features, **text).shape == (2, config.tokens, config.d_llm)
    assert sum(p.numel() for p in module.parameters()) > 0


@each
def test_a_config_a_dict_and_fields_build_the_same(name):
    config = SIZES[name].config
    cls = type(build_compressor(name, config))
    for module in (cls(config), cls(**config.to_dict()), build_compressor(name, config.to_dict())):
        assert module.config == config


@each
@pytest.mark.parametrize("tokens", [0, -1, True, 10_000])
def test_impossible_budgets_are_refused(name, tokens):
    config = SIZES[name].config
    with pytest.raises(ValueError, match=f"tokens={tokens} is not possible for {type(config).__name__}"):
        batch_of(small_module(name, config), small_inputs(name, config), tokens=tokens)
