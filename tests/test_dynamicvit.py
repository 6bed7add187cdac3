"DynamicViT: what drawn decisions hide, what is removed, and gradients through the frozen tower."

from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image
from test_vlm_compressors import inputs, tiny
from tiny_stage import stage, write_parts
from tiny_vlm import byte_tokenizer
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
)

from delta_llava.adapter import CLIPImageProcessorPil, vision_blocks, vision_hidden_states
from delta_llava.compressors.base import remaining_tokens, tower_options
from delta_llava.compressors.dynamicvit import (
    DynamicViT,
    DynamicViTConfig,
    Predictor,
    draw_decisions,
    first_kept,
    mask_patches,
    masked_softmax,
    ratio_loss,
    remove_patches,
)
from delta_llava.explore import Explorer, Query
from delta_llava.flops import counted_tower, tower_flops
from delta_llava.gradcam import word_cams
from delta_llava.grid import VisionFeatures
from delta_llava.launch import meta_model, tower_bytes, tower_row_flops
from delta_llava.processor import build_processor
from delta_llava.settings import CaptionTraining, Recipe
from delta_llava.tower import cache_features, vision_features
from delta_llava.train import train_run
from delta_llava.vlm import patch_tokens, with_auxiliary_loss

SMALL = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=4, patch_size=8, image_size=32)
TOWERS = {  # config, and tokens before the patches
    "clip": (CLIPVisionConfig(**SMALL, intermediate_size=32), 1),
    "dinov2": (Dinov2Config(**SMALL), 1),
    "registers": (Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4), 5),
    "siglip": (SiglipVisionConfig(**SMALL, intermediate_size=32, vision_use_head=False), 0),
}
CONFIG = DynamicViTConfig(grid=4, levels=(4,), d_vision=16, d_llm=8, tokens=4)
each_tower = pytest.mark.parametrize("name", TOWERS)


def frozen_tower(name):
    "A tower with weights so large that patches differ."
    torch.manual_seed(0)
    tower = AutoModel.from_config(TOWERS[name][0]).eval().requires_grad_(False)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return tower


def random_module(config=CONFIG, std=0.4):
    torch.manual_seed(1)
    module = DynamicViT(config)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module


def pixels(batch=3, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))


def pass_through(tower, module, images):
    "Blocks from the first place on, places, and the tokens that enter the first of these blocks."
    reduction = module.config.tower_reduction()
    first = reduction[0][0]
    blocks = {i: vision_blocks(tower)[i] for i in range(first, module.config.levels[0])}
    placed = {b: (p, count) for (b, count), p in zip(reduction, module.predictors, strict=True)}
    return blocks, placed, vision_hidden_states(tower, images, first)[-1]


def run_block(tower, block, x):
    return block(x) if tower.config.model_type.startswith("dinov2") else block(x, attention_mask=None)


def tokens_without(tower, image, decisions, before):
    "Tokens of one image in the tower's own blocks, with the patches that decisions drop really removed."
    x = vision_hidden_states(tower, image[None], 0)[0]
    patches = list(range(16))
    placed = [block for block, _ in CONFIG.tower_reduction()]
    for number, block in enumerate(vision_blocks(tower)):
        if number in placed:
            kept = decisions[placed.index(number)]
            rows = [i for i, patch in enumerate(patches) if kept[patch] > 0.5]
            patches = [patches[i] for i in rows]
            x = x[:, [*range(before), *(before + i for i in rows)]]
        x = run_block(tower, block, x)
    return x[0, before:], patches


# ---- the parts


def test_the_predictor_equals_a_loop():
    predictor = random_module().predictors[0]
    x = torch.randn(3, 6, 16)
    kept = torch.tensor([[1.0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    found = predictor(x, kept)
    for b, i in product(range(3), range(6)):
        z = [F.gelu(predictor.local(predictor.norm(token))) for token in x[b]]
        others = [z[j][8:] for j in range(6) if kept[b, j]]
        joined = torch.cat([z[i][:8], sum(others) / len(others)])
        assert_close(found[b, i], predictor.scores(joined).log_softmax(0), rtol=1e-4, atol=1e-5)
    assert_close(found.exp().sum(-1), torch.ones(3, 6))


def test_a_predictor_without_any_kept_patch_is_finite():
    predictor = Predictor(16)
    found = predictor(torch.randn(1, 5, 16), torch.zeros(1, 5))
    found.sum().backward()
    assert found.isfinite().all() and all(p.grad.isfinite().all() for p in predictor.parameters())


@pytest.mark.parametrize("width", [5, 7, 16])
def test_a_predictor_of_any_width(width):
    assert Predictor(width)(torch.randn(2, 3, width), torch.ones(2, 3)).shape == (2, 3, 2)


def test_decisions_are_exact_and_have_torchs_values_and_gradient():
    logits = torch.randn(50, 9, 2, requires_grad=True)
    weights = torch.randn(50, 9)
    found = []
    for draw in (draw_decisions, lambda p: F.gumbel_softmax(p, hard=True)[..., 0]):
        torch.manual_seed(3)
        decisions = draw(logits.log_softmax(-1))
        (gradient,) = torch.autograd.grad((decisions * weights).sum(), logits)
        found.append((decisions.detach(), gradient))
    assert set(found[0][0].unique().tolist()) == {0.0, 1.0}
    assert_close(found[0], found[1])
    assert found[0][1].abs().min() > 0


def test_decisions_have_the_probabilities():
    torch.manual_seed(0)
    log_probs = torch.tensor([[0.9, 0.1], [0.25, 0.75]]).log().expand(20_000, 2, 2)
    assert_close(draw_decisions(log_probs).mean(0), torch.tensor([0.9, 0.25]), rtol=0, atol=0.01)


def test_the_masked_softmax_equals_a_loop():
    torch.manual_seed(0)
    scores = 4 * torch.randn(2, 3, 7, 7)
    kept = (torch.rand(2, 7) < 0.5).float()
    assert 0 < kept.sum() < 14
    found = masked_softmax(scores, kept)
    for b, h, i, j in product(range(2), range(3), range(7), range(7)):
        row = [scores[b, h, i, k].exp() for k in range(7) if k == i or kept[b, k]]
        expected = scores[b, h, i, j].exp() / sum(row) if j == i or kept[b, j] else torch.tensor(0.0)
        assert_close(found[b, h, i, j], expected)
    assert_close(masked_softmax(scores, torch.ones(2, 7)), scores.softmax(-1))
    nothing = masked_softmax(scores, torch.zeros(2, 7))
    assert_close(nothing, torch.eye(7).expand(2, 3, 7, 7))


def test_the_masked_softmax_has_the_gradient_of_its_equation():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 5, 5, dtype=torch.double, requires_grad=True)
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], dtype=torch.double, requires_grad=True)
    weights = torch.randn(1, 2, 5, 5, dtype=torch.double)

    def plain(scores, kept):
        itself = torch.eye(5, dtype=torch.double)
        weighted = scores.exp() * (kept[:, None, None] * (1 - itself) + itself)
        return weighted / weighted.sum(-1, keepdim=True)

    for found, expected in zip(
        torch.autograd.grad((masked_softmax(scores, kept) * weights).sum(), (scores, kept)),
        torch.autograd.grad((plain(scores, kept) * weights).sum(), (scores, kept)),
        strict=True,
    ):
        assert expected.abs().max() > 1e-3
        assert_close(found, expected)


def test_a_dropped_token_with_a_huge_score_neither_hides_nor_explodes():
    scores = torch.tensor([[0.0, 1e4], [0.0, 1e4]])[None, None].requires_grad_()
    kept = torch.tensor([[1.0, 0.0]], requires_grad=True)
    out = masked_softmax(scores, kept)
    assert_close(out[0, 0, 0], torch.tensor([1.0, 0.0]))
    (out * torch.randn(2, 2)).sum().backward()
    assert kept.grad.isfinite().all() and scores.grad.isfinite().all()


def test_the_ratio_loss():
    decisions = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    expected = ((0.5 - 0.75) ** 2 + (0.25 - 0.5) ** 2 + (1 - 0.75) ** 2 + (0 - 0.5) ** 2) / 4
    assert ratio_loss(decisions, (3, 2)).item() == pytest.approx(expected)
    exact = torch.tensor([[[1.0, 1, 1, 0], [1, 0, 1, 0]]])
    assert ratio_loss(exact, (3, 2)) == 0
    module = DynamicViT(replace(CONFIG, ratio_weight=3.0))
    drawn = (torch.rand(2, 3, 16) < 0.5).float()
    features = VisionFeatures(torch.zeros(2, 4, 16), 4, on_grid=False, decisions=drawn)
    assert_close(module.auxiliary_loss(features), 3 * ratio_loss(drawn, (10, 6, 4)))
    assert module.auxiliary_loss(replace(features, decisions=None)) is None


def test_the_most_probable_of_the_kept_come_first():
    x = torch.arange(6.0)[None, :, None]
    kept = torch.tensor([[0.0, 1, 0, 1, 0, 1]])
    probability = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.2, 0.2]])
    for count, expected in ((1, [3]), (2, [3, 5]), (3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        tokens, patches = first_kept(x, kept, probability, count)
        assert patches[0].tolist() == expected and tokens.flatten().tolist() == expected


# ---- through the tower


@torch.no_grad()
@each_tower
def test_hidden_patches_change_nothing_for_the_kept_ones(name):
    "The key: with hard decisions, training computes what a tower without the dropped patches computes."
    tower, module = frozen_tower(name), random_module(std=0.1)
    for predictor in module.predictors:
        predictor.bias.copy_(torch.tensor([1.0, 0.0]))  # so that no draw drops all patches
    images, before = pixels(4), TOWERS[name][1]
    blocks, placed, x = pass_through(tower, module, images)
    torch.manual_seed(5)
    masked, decisions, _ = mask_patches(blocks, placed, x, 16, 2)
    counts = decisions.sum(-1)
    assert decisions.shape == (4, 3, 16) and (counts[:, -1] < 16).all() and counts.min() > 0
    assert (decisions[:, 1:] <= decisions[:, :-1]).all()  # once dropped, always dropped
    for image, tokens, own in zip(images, masked, decisions, strict=True):
        removed, patches = tokens_without(tower, image, own, before)
        assert patches == own[-1].nonzero().flatten().tolist()
        assert_close(tokens[patches], removed, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@each_tower
def test_inference_keeps_the_most_probable_patches(name):
    tower, module = frozen_tower(name), random_module().eval()
    images, before = pixels(), TOWERS[name][1]
    found = vision_features(tower, images, (4,), **tower_options(module))
    assert (found.grid, found.on_grid, found.decisions) == (4, False, None)
    reduction = dict(module.config.tower_reduction())
    for image, tokens, patches in zip(images, found.levels, found.patches, strict=True):
        x, left = vision_hidden_states(tower, image[None], 0)[0], list(range(16))
        predictors = iter(module.predictors)
        for number, block in enumerate(vision_blocks(tower)):
            if number in reduction:
                log_probs = next(predictors)(x[:, before:], torch.ones(1, len(left)))
                ranked = sorted(range(len(left)), key=lambda i: -log_probs[0, i, 0])  # noqa: B023
                rows = sorted(ranked[: reduction[number]])
                left = [left[i] for i in rows]
                x = x[:, [*range(before), *(before + i for i in rows)]]
            x = run_block(tower, block, x)
        assert patches.tolist() == left and patches.tolist() == sorted(left)
        assert_close(tokens, x[0, before:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_training_with_certain_predictors_is_inference():
    "If the predictors leave no doubt, the draws keep what the ranking keeps."
    tower, module = frozen_tower("clip"), random_module()
    blocks, placed, x = pass_through(tower, module, pixels())

    class Certain(Predictor):
        def __init__(self, count):
            super().__init__(16)
            self.count = count

        def forward(self, x, kept):
            score = torch.where(torch.arange(x.shape[1]) < self.count, 50.0, -50.0).expand(len(x), -1)
            return torch.stack([score, -score], -1).log_softmax(-1)

    certain = {b: (Certain(count), count) for b, (_, count) in placed.items()}
    removed, patches = remove_patches(blocks, certain, x, 16)
    masked, decisions, _ = mask_patches(blocks, certain, x, 16, 2)
    assert decisions.sum(-1).tolist() == [[10.0, 6.0, 4.0]] * 3 and patches.tolist() == [[0, 1, 2, 3]] * 3
    assert_close(masked[:, :4], removed, rtol=1e-3, atol=1e-3)


@each_tower
def test_gradients_reach_all_predictors_and_no_weight_of_the_tower(name):
    tower, module = frozen_tower(name), random_module(std=0.1).train()
    torch.manual_seed(0)
    features = vision_features(tower, pixels(), (4,), **tower_options(module))
    assert features.levels.shape == (3, 4, 16) and features.decisions.shape == (3, 3, 16)
    visual = module(features)
    weights = torch.randn(visual.shape)
    (visual * weights).sum().backward()  # without the ratio loss
    for parameter_name, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, parameter_name
    assert all(p.grad is None for p in tower.parameters())


def test_the_llm_reads_zeros_where_a_draw_kept_too_few():
    module = random_module().train()
    decisions = torch.zeros(1, 3, 16)
    decisions[0, -1, [2, 7]] = 1
    patches = torch.tensor([[2, 5, 7, 9]])
    features = VisionFeatures(torch.randn(1, 4, 16), 4, on_grid=False, patches=patches, decisions=decisions)
    visual, whole = module(features), module.mlp(features.levels)
    assert_close(visual[:, [0, 2]], whole[:, [0, 2]])
    assert_close(visual[:, [1, 3]], module.mlp(torch.zeros(1, 2, 16)))


def test_the_draws_come_from_torchs_generator():
    tower, module = frozen_tower("clip"), random_module(std=0.1).train()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(vision_features(tower, pixels(), (4,), **tower_options(module)).decisions)
    assert found[0].equal(found[1]) and not found[0].equal(found[2])
    module.eval()
    state = torch.get_rng_state()
    vision_features(tower, pixels(), (4,), **tower_options(module))
    assert torch.get_rng_state().equal(state)  # nothing is drawn at inference


def test_steps_on_the_ratio_loss_lower_it():
    tower = frozen_tower("clip")
    torch.manual_seed(0)
    module = DynamicViT(replace(CONFIG, grid=8, tokens=16)).train()  # few patches would hide it in noise
    optimizer = torch.optim.AdamW(module.predictors.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        features = vision_features(tower, pixels(4, 64), (4,), **tower_options(module))
        loss = module.auxiliary_loss(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) / 4


def test_frozen_predictors_rank_in_training_too():
    tower, module = frozen_tower("clip"), random_module().train()
    module.predictors.requires_grad_(False)
    found = vision_features(tower, pixels(), (4,), **tower_options(module))
    expected = vision_features(tower, pixels(), (4,), **tower_options(module.eval()))
    assert found.decisions is None
    assert_close(found.levels, expected.levels)


def test_half_precision_in_the_tower():
    tower, module = frozen_tower("clip").bfloat16(), random_module(std=0.1).train()
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    features = vision_features(tower, pixels().bfloat16(), (4,), **tower_options(module))
    assert features.levels.dtype == torch.bfloat16 and features.decisions.dtype == torch.float32
    moved = features.to(torch.float32)
    assert moved.levels.dtype == torch.float32 and moved.decisions is features.decisions
    module(moved).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_all_patches_need_no_predictor():
    module = DynamicViT(replace(CONFIG, tokens=16))
    assert len(module.predictors) == 0 and remaining_tokens(module) is None
    features = vision_features(frozen_tower("clip"), pixels(), (4,), **tower_options(module))
    assert features.on_grid and module(features).shape == (3, 16, 8)


# ---- costs


@each_tower
@pytest.mark.parametrize("side", [32, 48])
def test_flops_of_the_tower_are_those_that_run(name, side):
    module = random_module(replace(CONFIG, grid=side // 8)).eval()
    options = tower_options(module)
    expected = tower_flops(TOWERS[name][0], 4, side, **options)
    assert expected == tower_flops(TOWERS[name][0], 4, side, **tower_options(DynamicViT, module.config))
    tower = frozen_tower(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vision_features(tower, pixels(1, side), (4,), **options)
    assert counter.get_total_flops() == expected
    assert counted_tower(TOWERS[name][0], (4,), side, **tower_options(module.to("meta"))) == expected


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def test_a_step_costs_the_backward_pass_of_the_tower(parts, tmp_path):
    run = stage("pretrain", parts, tmp_path, compressor="dynamicvit", tokens=4)
    model = meta_model(run)
    found = tower_row_flops(run, model)
    tower, projector = model.vision_tower, model.multi_modal_projector
    options = tower_options(projector)
    with FlopCounterMode(display=False) as counter:
        images = torch.zeros(1, 3, 56, 56, device="meta")
        vision_features(tower, images, projector.config.levels, **options).levels.sum().backward()
    assert counter.get_total_flops() == found
    inference = tower_flops(tower.config, projector.config.levels[0], 56, **options)
    assert found > 2 * inference and tower_bytes(run, model) > 0
    other = replace(run, compressor="evit")
    assert tower_bytes(other, meta_model(other)) == 0


# ---- in the model


def supervised(model):
    batch = inputs(model)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    return batch | dict(labels=labels)


def test_the_loss_of_the_model_has_the_ratio_loss():
    model = tiny("dynamicvit").train()
    batch = supervised(model)
    torch.manual_seed(0)
    features = patch_tokens(model, batch["pixel_values"])
    expected = model.multi_modal_projector.auxiliary_loss(features)
    losses = []
    for weight in (2.0, 0.0):
        object.__setattr__(model.multi_modal_projector.config, "ratio_weight", weight)
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    assert expected > 0
    assert_close(losses[0] - losses[1], expected, rtol=1e-3, atol=1e-5)
    object.__setattr__(model.multi_modal_projector.config, "ratio_weight", 1e6)
    model.eval()
    assert model(**batch).loss < 100  # in evaluation nothing is drawn


def test_shares_of_the_passes_of_a_step_add_up():
    class Images:
        auxiliary_loss = torch.tensor(0.7)

    first = torch.tensor([[-100, -100, 5, 6], [-100, 4, -100, -100]])
    second = torch.tensor([[-100, 1, 2, 3]])
    zero = torch.tensor(0.0)
    added = [with_auxiliary_loss(zero, Images(), labels, 6) for labels in (first, second)]
    assert_close(sum(added), torch.tensor(0.7))
    assert_close(with_auxiliary_loss(zero, Images(), first), torch.tensor(0.7))
    assert with_auxiliary_loss(zero, None, first) is zero


def test_a_batch_without_images_gives_every_weight_a_zero_gradient():
    model = tiny("dynamicvit").train()
    ids = torch.tensor([[72, 105, 63, 10]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.multi_modal_projector.parameters())


def test_features_computed_before_cannot_train_the_predictors():
    model = tiny("dynamicvit")
    batch = supervised(model)
    pixel_values = batch.pop("pixel_values")
    with torch.no_grad():
        features = patch_tokens(model, pixel_values)
    model.train()
    with pytest.raises(
        ValueError, match="vision_features do not train the layers of DynamicViT .* give pixel"
    ):
        model(**batch, vision_features=features)
    model.multi_modal_projector.predictors.requires_grad_(False)
    model(**batch, vision_features=features).loss.backward()
    assert all(p.grad is not None for p in model.multi_modal_projector.mlp.parameters())


def processor_for(model):
    tower = CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384)
    processor = build_processor(tower, byte_tokenizer(), tokens=9, template="v1")
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    return processor


def test_maps_show_dropped_patches_without_weight():
    model = tiny("dynamicvit")
    processor = processor_for(model)
    image = Image.effect_noise((384, 384), 90).convert("RGB")
    result = word_cams(model, processor, image, "What?", answer="Red fox")
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    kept = patch_tokens(model.eval(), pixel_values).patches[0].tolist()
    assert result.cams.shape == (2, 144) and len(kept) == 9
    weighted = {i for cam in result.cams for i in cam.nonzero().flatten().tolist()}
    assert weighted and weighted <= set(kept)
    explorer = Explorer({"dynamicvit": (model, processor)}, {"noise": image})
    assert explorer.non_spatial == [] and explorer.budgets("dynamicvit") == [9]
    answer = explorer.answer(Query("noise", "What?", "dynamicvit", 9, "Red fox"))
    assert_close(answer.cams, result.cams)


# ---- features on disk, and stages


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.effect_noise((32, 32), 90).convert("RGB").save(path)
    return paths


def test_stored_features_belong_to_the_weights_of_the_predictors(photos, tmp_path):
    tower, module = frozen_tower("clip"), random_module().eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    kept = dict(cache=tmp_path / "cache", dtype=torch.float32, progress=False)
    found = []
    for _ in range(2):
        options = tower_options(module)
        cached = cache_features(photos, tower, processor, (4,), **kept, **options)[range(2)]
        images = processor([Image.open(path) for path in photos], return_tensors="pt").pixel_values
        with torch.no_grad():
            assert_close(cached.levels, vision_features(tower, images, (4,), **options).levels)
        found.append(cached.levels)
        for p in module.predictors.parameters():
            torch.nn.init.normal_(p, std=0.4)
    assert not found[0].equal(found[1])
    with pytest.raises(ValueError, match="in training mode cannot be stored.*projector.eval"):
        cache_features(photos, tower, processor, (4,), **kept, **tower_options(module.train()))


def test_stages_that_store_features_are_refused(parts, tmp_path):
    words = "cache_features=True, but compressor='dynamicvit' trains layers inside the vision tower"
    with pytest.raises(ValueError, match=words):
        stage("pretrain", parts, tmp_path, compressor="dynamicvit", tokens=4, cache_features=True)
    with pytest.raises(ValueError, match="--no-cache-features"):
        CaptionTraining(compressor="dynamicvit")
    assert CaptionTraining(compressor="dynamicvit", cache_features=False).tokens == 16
    with pytest.raises(ValueError, match="features_in_memory=True, but compressor='dynamicvit'"):
        Recipe(compressor="dynamicvit")


@pytest.mark.parametrize("standardize", [False, True])
def test_a_stopped_training_continues_with_the_same_draws(parts, tmp_path, standardize):
    options = dict(
        compressor="dynamicvit", tokens=4, max_steps=4, save_steps=2, batch_size=4, standardize=standardize
    )
    options |= dict(train_budgets=(4,), eval_budgets=(), learning_rate=1e-3)
    unbroken, _, log = train_run(stage("pretrain", parts, tmp_path / "a", **options))
    broken = stage("pretrain", parts, tmp_path / "b", **options)

    class Stopped(Exception):
        pass

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Stopped

    with pytest.raises(Stopped):
        train_run(broken, callbacks=[Stop()])
    torch.manual_seed(77)
    resumed, _, _ = train_run(broken)
    state = unbroken.multi_modal_projector.state_dict()
    for key, weight in resumed.multi_modal_projector.state_dict().items():
        assert weight.equal(state[key]), key
    fresh = DynamicViT(unbroken.multi_modal_projector.config)
    assert any(not state[key].equal(w) for key, w in fresh.state_dict().items() if "predictors" in key)
    assert all(entry["loss"] > 0 for entry in log if "loss" in entry)


# ---- what is refused


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(tokens=0), "tokens=0 must lie in 1..16"),
        (dict(tokens=17), "tokens=17 must lie in 1..16"),
        (dict(blocks=(2, 1)), "must rise and lie in 0..3"),
        (dict(blocks=(4,)), "must rise and lie in 0..3"),
        (dict(levels=(0,)), "leave no block that could reduce tokens"),
        (dict(ratio_weight=-0.5), "ratio_weight=-0.5 must be 0 or more"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **fields)


def test_another_grid_or_several_levels_are_refused():
    tower, module = frozen_tower("clip"), random_module().eval()
    with pytest.raises(ValueError, match="must leave ever fewer of the 4 patches"):
        vision_features(tower, pixels(1, 16), (4,), **tower_options(module))
    with pytest.raises(ValueError, match="is read at one level"):
        vision_features(tower, pixels(1), (2, 4), **tower_options(module))
    with pytest.raises(ValueError, match="has the numbers of patches alone"):
        vision_features(tower, pixels(1), (4,), **tower_options(DynamicViT, CONFIG))
    with pytest.raises(ValueError, match="features have 16 tokens, and DynamicViT reads the 4 patches"):
        module(torch.zeros(1, 16, 16))
