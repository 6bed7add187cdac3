"Grad-CAM: the authors' fixture, maps that are known in advance, the model afterwards, and the benchmark."

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_vlm import byte_tokenizer, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.testing import assert_close
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from delta_llava.collator import Collator
from delta_llava.config import ProjectorConfig
from delta_llava.conversations import load_conversations
from delta_llava.gradcam import (
    CAM_METHODS,
    Word,
    answer_cam,
    attention_map,
    blurred,
    deletion_insertion,
    denormalize_pixels,
    draw_answer,
    draw_cams,
    find_phrase,
    find_projector,
    frozen_eval,
    grad_cam,
    infer_grid,
    leaf_output,
    library_cam,
    mark_phrases,
    minmax,
    pointing_game,
    relative,
    reshape_transform,
    shuffled_weights,
    token_map,
    upsample,
    visual_effects,
    word_cams,
    words_of,
)
from delta_llava.processor import build_processor
from delta_llava.scenes import write_scenes
from delta_llava.tower import vision_features
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

IMAGE = 3


# --- the authors' numbers -------------------------------------------------------------------------


def fixture(config):
    folder = Path(config.getoption("--parity-dir"))
    return json.loads((folder / "gradcam.json").read_text()), load_file(folder / "gradcam.safetensors")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    cases = fixture(metafunc.config)[0]["cases"]
    metafunc.parametrize("case", cases, ids=[c["name"] for c in cases])


@pytest.fixture
def stored(request):
    return fixture(request.config)


def differences(case, tensors, scale=1.0):
    "Largest absolute difference to each stored result, given the stored tokens and gradients."
    name, grid = case["name"], tuple(case["grid"])
    cam = grad_cam(scale * tensors[f"in.{name}.feats"], tensors[f"in.{name}.grads"])
    ours = {"cam_tokens": cam, "norm": minmax(cam.reshape(grid))}
    prefix = f"out.{name}."
    stored = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for key in stored:
        if "_30x42" in key:
            mode = key.split("_")[0]
            ours[key] = minmax(upsample(cam[0], (30, 42), mode))  # the authors stretch after up-sampling
    assert set(ours) == set(stored)
    return {k: (v - stored[k]).abs().max().item() for k, v in ours.items()}


def test_parity(case, stored):
    found = differences(case, stored[1])
    if case["grid"] == [1, 1]:
        # min-max stretches the rounding noise of a constant map to 0..1, which differs between machines
        noise = found.pop("bilinear_30x42")
        cam = grad_cam(stored[1][f"in.{case['name']}.feats"], stored[1][f"in.{case['name']}.grads"])
        assert_close(upsample(cam[0], (30, 42), "bilinear"), cam.expand(30, 42), rtol=1e-6, atol=0)
        assert noise <= 1
    assert max(found.values()) < 1e-5, found


def test_parity_notices_scaled_inputs(case, stored):
    assert differences(case, stored[1], 1.01)["cam_tokens"] > 1e-5


def test_grid_table(stored, case):
    assert infer_grid(case["grid"][0] * case["grid"][1]) == tuple(case["grid"])
    assert {v: list(infer_grid(int(v))) for v in stored[0]["infer_grid_hw"]} == stored[0]["infer_grid_hw"]


# --- a model --------------------------------------------------------------------------------------


def tiny_llava(seed=0):
    "Stock LLaVA of random weights: 4×4 patches, 16 visual tokens."
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def sample(rows=1, seed=1):
    torch.manual_seed(seed)
    text = torch.randint(10, 100, (rows, 7))
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), torch.full((rows, 16), IMAGE), text], 1)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(rows, 3, 32, 32))


def mark(ids, *positions):
    words = torch.zeros(1, *ids.shape, dtype=torch.bool)
    words[..., list(positions)] = True
    return words


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def by_hand(model, inputs, score):
    "Grad-CAM in plain form: vision tower and projector, the LLM on a leaf, @eq-gradcam as an einsum."
    model.eval()
    with torch.no_grad():
        A = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    A.requires_grad_()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], A)
    out = model.lm_head(
        model.get_decoder()(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    )
    (grads,) = torch.autograd.grad(score(out), A)
    model.train()
    return torch.einsum("bvd,bd->bv", A, grads.mean(1)).relu().detach()


def test_first_answer_token_as_the_authors_do(model):
    """They run the prompt alone and take the last position's logit of the first generated token.

    We use one pass over prompt and answer.
    """
    inputs = sample()
    prompt = {k: v[:, :20] if v.ndim == 2 else v for k, v in inputs.items()}
    first = inputs["input_ids"][0, 20]
    expected = by_hand(model, prompt, lambda logits: logits[0, -1, first])
    assert expected.max() > 1e-3
    assert_close(answer_cam(model, inputs, mark(inputs["input_ids"], 20))[0], expected)


@pytest.mark.parametrize("log_prob", [False, True])
def test_word_of_several_tokens(model, log_prob):
    inputs = sample()
    ids = inputs["input_ids"][0]

    def score(logits):
        z = logits[0].log_softmax(-1) if log_prob else logits[0]
        return z[20, ids[21]] + z[21, ids[22]]

    assert_close(
        answer_cam(model, inputs, mark(inputs["input_ids"], 21, 22), log_prob=log_prob)[0],
        by_hand(model, inputs, score),
    )


def test_scores_differ(model):
    "Logits and log-probabilities give different maps."
    inputs = sample()
    words = mark(inputs["input_ids"], 21, 22)
    logits = answer_cam(model, inputs, words)
    log_probs = answer_cam(model, inputs, words, log_prob=True)
    assert (logits - log_probs).abs().max() > 1e-3


def test_words_in_one_pass_equal_words_alone(model):
    inputs = sample()
    words = torch.cat([mark(inputs["input_ids"], *p) for p in ((20,), (21, 22), (23,))])
    together = answer_cam(model, inputs, words)
    assert together.shape == (3, 1, 16)
    for word, cam in zip(words, together, strict=True):
        assert_close(answer_cam(model, inputs, word[None])[0], cam)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_rows_together_equal_rows_alone(model):
    "A left-padded batch, each row with its own word."
    inputs = sample(2)
    short = {k: v[1:, :-2] if v.ndim == 2 else v[1:] for k, v in inputs.items()}
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        second = torch.nn.functional.pad(short[name], (2, 0))
        padded[name] = torch.cat([inputs[name][:1], second])
    words = torch.cat([mark(inputs["input_ids"][:1], 20), mark(inputs["input_ids"][:1], 22, 23)], 1)
    cams = answer_cam(model, padded, words)[0]
    first = {k: v[:1] for k, v in inputs.items()}
    assert_close(cams[:1], answer_cam(model, first, mark(first["input_ids"], 20))[0])
    assert_close(
        cams[1:], answer_cam(model, short, mark(short["input_ids"], 20, 21))[0], rtol=1e-4, atol=1e-5
    )


def test_later_words_do_not_matter(model):
    "Attention is causal: a word's map does not depend on later words."
    inputs = sample()
    cut = {k: v[:, :22] if v.ndim == 2 else v for k, v in inputs.items()}
    assert_close(
        answer_cam(model, inputs, mark(inputs["input_ids"], 21)),
        answer_cam(model, cut, mark(cut["input_ids"], 21)),
    )


def test_labels_are_ignored(model):
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    assert_close(
        answer_cam(model, inputs | {"labels": inputs["input_ids"]}, words), answer_cam(model, inputs, words)
    )


def test_bfloat16():
    model = tiny_llava()
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    full = answer_cam(model, inputs, words)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    half = answer_cam(model.bfloat16(), inputs, words)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.cat([full[0], half[0]]))[0, 1] > 0.98
    assert_close(library_cam(model, inputs, words[0]), half[0])


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_other_weights_give_other_maps(model, part):
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    other = tiny_llava()
    getattr(other.model, part).load_state_dict(getattr(tiny_llava(1).model, part).state_dict())
    maps = torch.cat([answer_cam(m, inputs, words)[0] for m in (model, other)])
    assert torch.corrcoef(maps)[0, 1] < 0.9


# --- pytorch-grad-cam -----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(20,), (21, 22, 23)])
def test_equals_pytorch_grad_cam(model, positions):
    inputs = sample(2)
    words = mark(inputs["input_ids"], *positions)
    ours = answer_cam(model, inputs, words)[0]
    assert ours.max() > 1e-3
    assert_close(ours, library_cam(model, inputs, words[0]), rtol=0, atol=1e-6)


def test_library_keeps_a_one_token_map():
    "The library's own result is min-max stretched to 0; `library_cam` returns the map before that step."
    model = tiny_llava()
    append_to_projector(model, Mean())
    ids = torch.tensor([[1, IMAGE, 20, 21, 22]])
    for seed in range(4):  # the ReLU makes a negative map 0: at least one of these is positive
        inputs = dict(input_ids=ids, pixel_values=sample(seed=seed)["pixel_values"])
        ours = answer_cam(model, inputs, mark(ids, 4))[0]
        assert_close(ours, library_cam(model, inputs, mark(ids, 4)[0]))
        if ours.item() > 0:
            return
    pytest.fail("no image gave a positive map")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


def append_to_projector(model, layer):
    "Put a layer behind the projector of a stock LLaVA."
    model.model.multi_modal_projector = nn.Sequential(find_projector(model), layer)


# --- the model is the same afterwards -------------------------------------------------------------


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def one_word_library_cam(model, inputs, words):
    "The library's map with the signature of `answer_cam`."
    return library_cam(model, inputs, words[0])


def flags(model):
    "Number of hooks, modes of the modules, and which parameters are trainable."
    modes = [m.training for m in model.modules()]
    return hooks(model), modes, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("make_cam", [answer_cam, one_word_library_cam], ids=["ours", "library"])
def test_model_is_unchanged(make_cam):
    model = tiny_llava()
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    model(**inputs)  # transformers adds hooks of its own in the first pass
    model.model.vision_tower.eval().requires_grad_(False)  # as in stage 1
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = flags(model)
    make_cam(model, inputs, words)
    assert flags(model) == before
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert model.lm_head.weight.grad.eq(1).all()


@pytest.mark.parametrize("make_cam", [answer_cam, one_word_library_cam], ids=["ours", "library"])
def test_model_is_unchanged_after_an_error(make_cam):
    model = tiny_llava()
    inputs = sample()
    model(**inputs)
    before = flags(model)
    wrong = inputs | {"pixel_values": torch.randn(2, 3, 32, 32)}
    with pytest.raises(ValueError) as error:
        make_cam(model, wrong, mark(inputs["input_ids"], 21))
    assert error.tb  # keeps the frames alive, so that garbage collection cannot remove a hook
    assert flags(model) == before


def test_dropout_is_off():
    "Two maps of one word are equal also for a model with dropout in training mode."
    model = tiny_llava()
    inputs = sample()
    append_to_projector(model, nn.Dropout(0.5))
    words = mark(inputs["input_ids"], 21)
    assert_close(answer_cam(model, inputs, words), answer_cam(model, inputs, words), rtol=0, atol=0)


def test_works_without_gradient_mode(model):
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    with torch.no_grad():
        without_grad = answer_cam(model, inputs, words)
    assert_close(without_grad, answer_cam(model, inputs, words))


# --- maps that are known in advance, drawing, scores ----------------------------------------------


class Reader(nn.Module):
    "A model in which the score of word 5+k is channel k of the mean visual token."

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.multi_modal_projector = nn.Identity()

    def forward(self, input_ids, features, logits_to_keep, use_cache):
        score = self.multi_modal_projector(features).mean(1, keepdim=True)
        logits = torch.cat([torch.zeros(len(score), 1, 5), score], -1)
        return SimpleNamespace(logits=logits.expand(-1, len(logits_to_keep), -1))


@pytest.mark.parametrize("v", [4, 12, 16, 144])
def test_planted(v):
    "Channel k is positive at token k+1 only, so the map of word k has its one value there."
    features = torch.zeros(2, v, 3)
    for k in range(3):
        features[:, k + 1, k] = k + 1.0
    features[:, 0] = -1.0  # lowers every score
    ids = torch.tensor([[1, 5, 6, 7]]).expand(2, 4)
    words = torch.eye(4, dtype=torch.bool)[1:, None].expand(3, 2, 4)
    cams = answer_cam(Reader(), dict(input_ids=ids, features=features), words)
    expected = torch.zeros(3, 2, v)
    for k in range(3):
        expected[k, :, k + 1] = (k + 1) / v
    assert_close(cams, expected)


def test_errors_of_answer_cam(model):
    inputs = sample()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="empty word"):
        answer_cam(model, inputs, torch.cat([mark(ids, 20), mark(ids)]))
    with pytest.raises(ValueError, match="position 0"):
        answer_cam(model, inputs, mark(ids, 0))
    with pytest.raises(ValueError, match="words mark"):
        answer_cam(model, inputs, mark(ids[:, 1:], 20))
    no_image = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="ran 0 times"):
        answer_cam(model, no_image, mark(ids, 20))


def test_gradients_stop_at_the_leaf():
    "The module's parameters get no gradient, also if they are trainable."
    layer = nn.Linear(3, 2)
    with leaf_output(layer) as outputs:
        layer(torch.ones(1, 3)).square().sum().backward()
    (output,) = outputs
    assert layer.weight.grad is None
    assert output.is_leaf
    assert_close(output.grad, 2 * output.detach())


def test_hooks_and_flags_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), leaf_output(layer):
        raise RuntimeError
    assert not layer._forward_hooks
    with pytest.raises(RuntimeError), frozen_eval(layer):
        raise RuntimeError
    assert layer.training
    assert layer.weight.requires_grad


def test_nearest_keeps_the_values():
    "Every pixel of a token's cell has the token's value."
    cams = torch.rand(2, 16)
    pixels = upsample(cams, (32, 64))
    assert_close(pixels[:, 4::8, 8::16].reshape(2, 16), cams, rtol=0, atol=0)
    assert_close(pixels.reshape(2, 4, 8, 4, 16).amax((2, 4)), pixels.reshape(2, 4, 8, 4, 16).amin((2, 4)))


def test_bilinear_does_not_move_the_peak():
    for seed in range(20):
        torch.manual_seed(seed)
        cam = torch.rand(16)
        peak = upsample(cam, (36, 36), "bilinear").argmax().item()  # 9 px a cell: each center is a pixel
        row, column = divmod(peak, 36)
        assert (row // 9) * 4 + column // 9 == cam.argmax()


def test_relative_has_mean_one():
    cams = torch.rand(3, 5, 64)
    assert_close(relative(cams).mean(-1), torch.ones(3, 5))
    assert relative(torch.zeros(2, 9)).eq(0).all()


def drawn_maps(axes):
    "Every map in these axes: not the images, and not the gray image below an overlay."
    images = [im for ax in axes for im in ax.images]
    return [im for im in images if im.get_cmap().name == "viridis" and im.get_array().ndim == 2]


@pytest.mark.parametrize("raw", [False, True])
def test_one_color_scale(raw):
    image = Image.new("RGB", (60, 60), "gray")
    cams = {144: torch.rand(144), 16: torch.rand(16), 1: torch.rand(1), "word": torch.rand(64)}
    fig = draw_cams(image, cams, raw=raw, boxes=[(1, 2, 30, 40)])
    values = {k: m if raw else relative(m) for k, m in cams.items()}
    maps = drawn_maps(fig.axes[:-1])
    assert len(maps) == 8
    assert {im.get_clim() for im in maps} == {(0, max(m.max().item() for m in values.values()))}
    assert fig.axes[-1].get_ylabel()  # the color bar has a label
    assert fig.axes[0].get_ylabel() == "144 tokens"
    assert fig.axes[9].get_ylabel() == "word"
    assert_close(torch.from_numpy(maps[0].get_array().data), values[144].reshape(12, 12))
    plt.close(fig)


def test_minmax_reaches_both_ends():
    "Also where the smallest value is not 0, as it is in every stored map."
    low, high = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[-2.0, 0.0], [2.0, 6.0]])
    expected = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    assert_close(minmax(torch.stack([low, high])), torch.stack([expected, expected]))


def test_zero_maps_can_be_drawn():
    fig = draw_cams(Image.new("RGB", (20, 20)), {4: torch.zeros(4)})
    fig.canvas.draw()
    assert fig.axes[1].images[0].get_clim() == (0, 1)


def by_sampling(cam, box, size, n=200):
    "Energy and box area from the map's values at n×n points."
    h, w = infer_grid(len(cam))
    y, x = ((torch.arange(n) + 0.5) / n * s for s in size)
    values = cam.reshape(h, w).repeat_interleave(n // h, 0).repeat_interleave(n // w, 1)
    inside_y = (y >= box[1]) & (y < box[3])
    inside_x = (x >= box[0]) & (x < box[2])
    inside = inside_y[:, None] & inside_x
    return (values * inside).sum() / values.sum(), inside.float().mean()


def centers_inside(box, g, size):
    "For each cell of a g×g grid whether its center is inside the box."
    inside = []
    for y in range(g):
        for x in range(g):
            center_x, center_y = (x + 0.5) * size[1] / g, (y + 0.5) * size[0] / g
            inside.append(bool(box[0] <= center_x < box[2]) and bool(box[1] <= center_y < box[3]))
    return inside


@pytest.mark.parametrize("v", [4, 16, 25, 64, 100])
def test_pointing_game_against_sampling(v):
    torch.manual_seed(v)
    cams = torch.rand(5, v) ** 4
    size = (200, 400)
    low = torch.rand(5, 2) * torch.tensor([300.0, 150.0])
    boxes = torch.cat([low, low + 10 + torch.rand(5, 2) * torch.tensor([90.0, 40.0])], 1).round()
    game = pointing_game(cams, boxes, size)
    g = infer_grid(v)[0]
    for i in range(5):
        energy, box_area = by_sampling(cams[i], boxes[i], size, 40 * g)
        assert abs(game.energy[i] - energy) < 0.01
        assert abs(game.box_area[i] - box_area) < 0.01
        inside = centers_inside(boxes[i], g, size)
        assert game.hit[i] == inside[cams[i].argmax()]
        assert_close(game.chance[i].item(), sum(inside) / v)


def test_constant_maps_score_chance():
    "One token, a uniform map and a map of zeros score exactly chance."
    torch.manual_seed(0)
    low = torch.rand(50, 2) * 60
    boxes = torch.cat([low, low + 10 + torch.rand(50, 2) * 30], 1)
    for cams in (torch.rand(50, 1), torch.full((50, 16), 0.3), torch.zeros(50, 64)):
        game = pointing_game(cams, boxes, (100, 100))
        assert_close(game.hit, game.chance)
        assert_close(game.energy, game.box_area)


def test_random_peaks_hit_at_chance():
    cams = torch.eye(64)  # every token is the peak once
    box = torch.tensor([[20.0, 30.0, 61.0, 77.0]])
    game = pointing_game(cams, box.expand(64, 4), (100, 100))
    assert_close(game.hit.mean(), game.chance[0])
    assert 0 < game.chance[0] < 1
    assert game.means()["hit"] == game.hit.mean().item()


@pytest.mark.parametrize("box", [(5, 0, 5, 10), (0, 9, 5, 3), (-1, 0, 5, 5), (0, 0, 41, 5), (0, 0, 5, 31)])
def test_bad_boxes(box):
    good = torch.tensor([0.0, 0.0, 40.0, 30.0])
    with pytest.raises(ValueError, match=r"boxes\[1\]"):
        pointing_game(torch.rand(2, 4), torch.stack([good, torch.tensor(box).float()]), (30, 40))


def test_find_phrase():
    texts = "A Hot Dog and a hot dog by a dog".split()
    words = [Word(text, i, i + 1) for i, text in enumerate(texts)]
    assert find_phrase(words, "hot dog") == Word("hot dog", 5, 7)
    assert find_phrase(words, "DOG").start == 9
    assert find_phrase(words[:3], "hot dog") == Word("Hot Dog", 1, 3)
    for missing in ("cat", "hot cat", ""):
        with pytest.raises(ValueError, match="is not in the answer"):
            find_phrase(words, missing)


# --- words ----------------------------------------------------------------------------------------


def letters():
    "A byte-level tokenizer without merges: one token a byte."
    pieces = ["<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<image>"],
    )


def test_words_of_bytes():
    "Characters of two and three bytes, punctuation, apostrophes, special tokens."
    tok = letters()
    ids = tok("<s>Été: isn't a 狐 well-known fox?</s>")["input_ids"]
    words = words_of(ids, tok)
    assert [w.text for w in words] == ["Été", "isn't", "a", "狐", "well-known", "fox"]
    assert [tok.decode(ids[w.start : w.stop]) for w in words] == [w.text for w in words]
    assert [w.stop - w.start for w in words] == [5, 5, 1, 3, 10, 3]


def test_words_of_pieces():
    "SentencePiece style: the space belongs to the next piece, and one piece may be a whole word."
    vocab = {"<unk>": 0, "▁a": 1, "▁un": 2, "us": 3, "ual": 4, "▁dog": 5, ".": 6, "</s>": 7}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.decoder = decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", unk_token="<unk>")
    assert words_of([1, 2, 3, 4, 5, 6, 7], tok) == [Word("a", 0, 1), Word("unusual", 1, 4), Word("dog", 4, 5)]


def test_mark_phrases():
    tok = letters()
    texts = ["what fox? a red fox.", "a hot dog"]
    rows = tok(texts, padding=True, padding_side="left", return_tensors="pt")["input_ids"]
    marks = mark_phrases(rows, ["fox", "Hot Dog"], tok)
    assert [tok.decode(row[mark]) for row, mark in zip(rows, marks, strict=True)] == ["fox", "hot dog"]
    assert marks[0].nonzero().flatten().tolist() == [16, 17, 18]  # the last fox


# --- Delta-LLaVA ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def delta():
    "Delta-LLaVA of random weights on 7×7 patches, with its processor."
    torch.manual_seed(0)
    projector = ProjectorConfig(grid=7, tokens=16, levels=(1, 2, 3, 4), d_vision=128, d_llm=64, rank=4)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
    )
    tok = letters()
    text = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = DeltaLlavaForConditionalGeneration(
        DeltaLlavaConfig(
            vision_config=vision, text_config=text, projector=projector.to_dict(), image_token_id=2
        )
    )
    for p in model.get_decoder().parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model, build_processor(CLIPImageProcessorPil(), tok, tokens=16, template="v1")


IMAGE_224 = Image.linear_gradient("L").resize((224, 224)).convert("RGB")
CONVERSATION = [dict(role="user", content="<image>\nWhat?"), dict(role="assistant", content="A red fox.")]


@pytest.mark.parametrize("tokens", [49, 16, 9, 4, 1])
def test_delta_at_every_budget(delta, tokens):
    "`word_cams` equals `answer_cam` on patch tokens, and the library's map."
    model, processor = delta
    result = word_cams(model, processor, IMAGE_224, "What?", answer="A red fox.", tokens=tokens)
    assert [w.text for w in result.words] == ["A", "red", "fox"]
    assert result.answer == "A red fox."
    assert result.cams.shape == (3, tokens)
    row = processor.encode_conversation(CONVERSATION, tokens)
    ids = torch.tensor([row["input_ids"]])
    pixels = processor.image_processor(IMAGE_224, return_tensors="pt").pixel_values
    levels = tuple(model.config.vision_feature_layer)
    with torch.no_grad():
        features = vision_features(model.vision_tower, pixels, levels).levels
    fox = mark_phrases(ids, ["fox"], processor.tokenizer)
    assert processor.tokenizer.decode(ids[fox]) == "fox"
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), vision_features=features, tokens=tokens)
    assert_close(answer_cam(model, inputs, fox[None])[0, 0], result["fox"])
    assert_close(library_cam(model, inputs, fox)[0], result["FOX"])
    assert torch.equal(result["fox"], result.cams[2])


def test_delta_in_training_mode(delta):
    "The model is unchanged afterwards, and DropPath is off inside."
    model, processor = delta
    model.train()
    result = word_cams(model, processor, IMAGE_224, "What?", answer="A red fox.")
    assert model.multi_modal_projector.training
    assert not model.vision_tower.training
    assert not model.multi_modal_projector._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.multi_modal_projector.parameters())
    again = word_cams(model, processor, IMAGE_224, "What?", answer="A red fox.")
    assert_close(again.cams, result.cams, rtol=0, atol=0)
    model.eval()


def test_answers_are_generated_in_evaluation_mode(delta):
    model, processor = delta
    model.train()
    modes = []
    projector = model.multi_modal_projector
    handle = projector.register_forward_hook(lambda module, args, output: modes.append(module.training))
    try:
        word_cams(model, processor, IMAGE_224, "Tell me.", max_new_tokens=12)
    except ValueError:
        pass  # random weights may answer without a letter
    finally:
        handle.remove()
    assert modes
    assert not any(modes)
    assert model.training
    model.eval()


QUESTIONS = ("What?", "Who?", "Why is it?", "Where to?", "Tell me.")


def answer_with_words(model, processor):
    "The first question that random weights answer with a letter: question, inputs, answer ids and words."
    for question in QUESTIONS:
        messages = [dict(role="user", content=f"<image>\n{question}")]
        prompt = processor(IMAGE_224, processor.apply_chat_template(messages, add_generation_prompt=True))
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        ids = output[0, prompt.input_ids.shape[1] :]
        words = words_of(ids.tolist(), processor.tokenizer)
        if words:
            return question, prompt, ids, words
    return pytest.fail("no question was answered with a letter")


def test_own_answer(delta):
    "Without an answer, the model's own greedy one is mapped."
    model, processor = delta
    question, prompt, answer_ids, words = answer_with_words(model, processor)
    result = word_cams(model, processor, IMAGE_224, question, max_new_tokens=12)
    assert list(result.words) == words
    assert result.answer == processor.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
    ids = torch.cat([prompt.input_ids, answer_ids[None]], 1)
    start = prompt.input_ids.shape[1]
    first = mark(ids, *range(start + words[0].start, start + words[0].stop))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values)
    assert_close(answer_cam(model, inputs, first)[0, 0], result.cams[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "v_proj"], use_dora=True),
        dict(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]),
    ],
    ids=str,
)
def test_word_cams_of_a_model_in_pefts_wrapper(delta, options):
    "The maps are those of the model with its adapters merged; they change with the adapters."
    model, processor = copy.deepcopy(delta[0]).eval(), delta[1]
    question_and_answer = dict(image=IMAGE_224, question="What?", answer="A red fox.")
    plain = word_cams(model, processor, **question_and_answer)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    cams = word_cams(wrapped, processor, **question_and_answer)
    assert not torch.allclose(cams.cams, plain.cams, rtol=1e-2)
    assert [w.text for w in cams.words] == ["A", "red", "fox"]
    assert word_cams(wrapped, processor, **question_and_answer, phrases=["red"]).cams.shape == (1, 16)
    merged = word_cams(wrapped.merge_and_unload(), processor, **question_and_answer)
    assert_close(cams.cams, merged.cams, rtol=1e-3, atol=1e-6)


def test_denormalize_pixels(delta):
    "The image that is drawn is the crop that the vision tower received."
    processor = delta[1].image_processor
    wide = Image.effect_noise((448, 224), 60).convert("RGB")
    shown = denormalize_pixels(processor(wide, return_tensors="pt").pixel_values[0], processor)
    assert shown.tobytes() == wide.crop((112, 0, 336, 224)).tobytes()


def test_errors_of_word_cams(delta):
    model, processor = delta
    with pytest.raises(ValueError, match="image is 'None'"):
        word_cams(model, processor, None, "What?", answer="A red fox.")
    with pytest.raises(ValueError, match="'cat' is not in the answer"):
        word_cams(model, processor, IMAGE_224, "What?", ["cat"], answer="A red fox.")
    with pytest.raises(ValueError, match="holds no word"):
        word_cams(model, processor, IMAGE_224, "What?", answer="...")
    with pytest.raises(ValueError, match="is a string"):
        word_cams(model, processor, IMAGE_224, "What?", "fox", answer="A red fox.")
    result = word_cams(model, processor, IMAGE_224, "What?", ["red fox"], answer="A red fox.")
    with pytest.raises(ValueError, match="'fox' has no map"):
        result["fox"]


def test_a_word_that_occurs_twice(delta):
    result = word_cams(*delta, IMAGE_224, "What?", answer="A fox, a fox.")
    assert torch.equal(result["fox"], result.cams[3])
    assert not torch.equal(result.cams[1], result.cams[3])


# --- deletion and insertion, attention, shuffled weights ------------------------------------------


def distinct(rows=2, v=16, seed=3):
    "Maps without equal cells."
    maps = []
    for i in range(rows):
        generator = torch.Generator().manual_seed(seed + i)
        maps.append(torch.randperm(v, generator=generator).float())
    return torch.stack(maps)


def word_log_prob(model, inputs, word):
    "The word's log-probability, from all logits."
    model.eval()
    with torch.no_grad():
        log_probs = model(**inputs).logits.log_softmax(-1)
    sums = []
    for row, ids, mark in zip(log_probs, inputs["input_ids"], word, strict=True):
        sums.append(sum(row[t - 1, ids[t]] for t in mark.nonzero().flatten()))
    return torch.stack(sums)


def with_pixels(inputs, pixels):
    return inputs | dict(pixel_values=pixels)


def replace_cells(pixels, source, cells):
    "Copy these cells of a 4×4 grid from another image."
    for cell in cells:
        y, x = 8 * (cell // 4), 8 * (cell % 4)
        pixels[:, y : y + 8, x : x + 8] = source[:, y : y + 8, x : x + 8]


def test_deletion_insertion_by_hand(model):
    "Each point of both curves, with the cells replaced one by one."
    inputs = sample(2)
    pixels = inputs["pixel_values"]
    cams = distinct()
    word = mark(inputs["input_ids"], 20, 21)[0]
    curve = deletion_insertion(model, inputs, word, cams, steps=4)
    assert curve.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    removed = blurred(pixels)
    for j, k in enumerate((0, 4, 8, 12, 16)):
        without = pixels.clone()
        alone = removed.clone()
        for row in range(2):
            cells = cams[row].argsort(descending=True)[:k].tolist()
            replace_cells(without[row], removed[row], cells)
            replace_cells(alone[row], pixels[row], cells)
        assert_close(curve.deletion[:, j], word_log_prob(model, with_pixels(inputs, without), word))
        assert_close(curve.insertion[:, j], word_log_prob(model, with_pixels(inputs, alone), word))
    assert curve.deletion.std(-1).min() > 1e-4  # the image has an effect
    assert_close(curve.areas()["deletion"], (curve.deletion[:, 1:] + curve.deletion[:, :-1]).mean(-1) / 2)


def test_deletion_equals_the_librarys(model):
    "The same deletion by pytorch-grad-cam's RemoveMostRelevantFirst, at one threshold."
    from pytorch_grad_cam.metrics.perturbation_confidence import (
        PerturbationConfidenceMetric,
        RemoveMostRelevantFirst,
    )

    inputs = sample(2)
    pixels = inputs["pixel_values"]
    cams = distinct()
    word = mark(inputs["input_ids"], 20)[0]
    removed_of = {}
    for image, removed in zip(pixels, blurred(pixels), strict=True):
        removed_of[image.numpy().tobytes()] = removed

    def impute(image, keep):
        return torch.where(keep.bool(), image, removed_of[image.numpy().tobytes()])

    library = PerturbationConfidenceMetric(RemoveMostRelevantFirst(75, impute))(
        pixels,
        upsample(cams, (32, 32)).numpy(),
        [lambda output: output] * 2,
        lambda batch: word_log_prob(model, with_pixels(inputs, batch), word),
        return_diff=False,
    )
    ours = deletion_insertion(model, inputs, word, cams, steps=4).deletion[:, 1]
    assert_close(ours, torch.from_numpy(library))


def test_equal_cells_are_removed_in_random_order(model):
    "For a constant map the order depends on the seed alone, and is not the order of the cells."
    inputs = sample(1)
    word = mark(inputs["input_ids"], 20)[0]

    def deletion(cams, seed=0):
        return deletion_insertion(model, inputs, word, cams, seed=seed).deletion

    zero = deletion(torch.zeros(1, 16), seed=1)
    constant = deletion(torch.full((1, 16), 0.3), seed=1)
    assert torch.equal(zero, constant)
    assert not torch.equal(constant, deletion(torch.full((1, 16), 0.3), seed=2))
    assert not torch.equal(constant, deletion(-torch.arange(16.0)[None]))


def test_deletion_insertion_of_one_token(model):
    "The one cell is the whole image."
    inputs = sample(1)
    curve = deletion_insertion(model, inputs, mark(inputs["input_ids"], 20)[0], torch.ones(1, 1))
    assert curve.share.tolist() == [0, 1]
    assert torch.equal(curve.deletion.flip(-1), curve.insertion)


def test_blurred_removes_detail():
    fields = (np.indices((64, 64)) // 4).sum(0) % 2  # a checkerboard of 4 px
    board = torch.from_numpy(fields).float().expand(1, 3, 64, 64)
    smooth = blurred(board)
    assert smooth[..., 16:-16, 16:-16].std() < 0.01 * board.std()
    assert abs(smooth.mean() - 0.5) < 0.01
    assert_close(blurred(torch.full((1, 3, 32, 48), 0.3)), torch.full((1, 3, 32, 48), 0.3))


def layer_attentions(model, inputs):
    "Attention of each layer, with the slow kernel that returns it."
    kind = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return model.eval()(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({"text_config": kind})


def test_attention_map(model):
    "Words of several tokens; the attention implementation is the same afterwards."
    inputs = sample(2)
    kind = model.config.text_config._attn_implementation
    words = torch.cat([mark(inputs["input_ids"], 20, 22), mark(inputs["input_ids"], 23)])
    found = attention_map(model, inputs, words)
    assert found.shape == (2, 2, 16)
    assert model.config.text_config._attn_implementation == kind != "eager"
    layers = layer_attentions(model, inputs)
    terms = [a[:, :, t - 1, 1:17].mean(1) for a in layers for t in (20, 22)]
    assert_close(found[0], sum(terms) / len(terms))
    with pytest.raises(ValueError, match="position 0"):
        attention_map(model, inputs, mark(inputs["input_ids"], 0))


def test_attention_map_of_padded_rows(model):
    inputs = sample(2)
    words = mark(inputs["input_ids"], 20, 22)
    pad = torch.nn.functional.pad
    padded = {k: pad(v, (3, 0)) if v.ndim == 2 else v for k, v in inputs.items()}
    assert_close(attention_map(model, padded, pad(words, (3, 0))), attention_map(model, inputs, words))


def test_shuffled_weights_are_restored(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    part = find_projector(model)
    with pytest.raises(KeyError), shuffled_weights(part):
        inside = {k: v.clone() for k, v in model.state_dict().items()}
        raise KeyError
    for k, v in before.items():
        assert torch.equal(model.state_dict()[k], v)
        assert torch.equal(inside[k].flatten().sort().values, v.flatten().sort().values)  # the same values
        unchanged = "multi_modal_projector" not in k or v.unique().numel() == 1
        assert torch.equal(inside[k], v) == unchanged
    with shuffled_weights(part, 1):
        assert not torch.equal(part.linear_1.weight, inside["model.multi_modal_projector.linear_1.weight"])


@pytest.mark.parametrize("tokens", [49, 16, 1])
def test_methods_on_delta_at_every_budget(delta, tokens, tmp_path):
    "`attention_map` and `deletion_insertion` accept the inputs of `answer_cam`, from pixels."
    model, processor = delta
    IMAGE_224.save(tmp_path / "a.png")
    row = dict(id="a", image=str(tmp_path / "a.png"), conversations=CONVERSATION)
    batch = Collator(processor=processor, tokens=tokens)([row, row])
    fox = mark_phrases(batch["input_ids"], ["fox"] * 2, processor.tokenizer)
    assert answer_cam(model, batch, fox[None]).shape == (1, 2, tokens)
    assert attention_map(model, batch, fox[None]).shape == (1, 2, tokens)
    curve = deletion_insertion(model, batch, fox, torch.rand(2, tokens))
    assert curve.deletion.shape == (2, 1 + min(8, tokens))
    assert torch.equal(curve.deletion[:, 0], curve.insertion[:, -1])


def test_draw_answer(delta):
    "A row for each word, a column for each budget, one color scale, each box in the row of its word."
    results = {}
    for v in (4, 16):
        results[v] = word_cams(*delta, IMAGE_224, "What?", ["red", "fox"], answer="A red fox.", tokens=v)
    fig = draw_answer(results, boxes={"fox": (10, 20, 50, 80)})
    grid = fig.axes[:-1]
    assert len(grid) == 6
    assert [ax.get_title() for ax in grid[:3]] == ["image", "4 tokens", "16 tokens"]
    assert [ax.get_ylabel() for ax in grid[::3]] == ["red", "fox"]
    assert len({im.get_clim() for im in drawn_maps(grid)}) == 1
    bounds = [{p.get_bbox().bounds for p in ax.patches} for ax in grid]
    assert bounds == [set()] * 3 + [{(10, 20, 40, 60)}] * 3
    plt.close(fig)


def test_errors_of_draw_answer(delta):
    results = {}
    for v, phrases in ((4, ["red", "fox"]), (1, ["red"])):
        results[v] = word_cams(*delta, IMAGE_224, "What?", phrases, answer="A red fox.", tokens=v)
    with pytest.raises(ValueError, match="different answers"):
        draw_answer(results)
    with pytest.raises(ValueError, match="empty"):
        draw_answer({})


# --- benchmarks/gradcam.py ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gradcam.py"))


def test_center_map(benchmark):
    center_map = benchmark["center_map"]
    assert center_map(9).argmax() == 4
    cells = center_map(36)
    assert len(cells.unique()) == 6
    assert (cells == cells.max()).sum() == 4


def test_box_map(benchmark):
    "The covered share of each cell: here of columns 1 to 3, and of rows 0, 1 and 40 % of row 2."
    cells = benchmark["box_map"](torch.tensor([[25.0, 0.0, 100.0, 60.0]]), 16, (100, 100)).view(4, 4)
    expected = torch.tensor([1.0, 1.0, 0.4, 0.0])[:, None] * torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert_close(cells, expected)


def test_bootstrap_interval(benchmark):
    interval = benchmark["interval"]
    mean, low, high = interval(np.random.default_rng(0).normal(3, 1, 400))
    assert low < 3 < high
    assert abs(high - low - 4 * 0.05) < 0.05
    assert interval([0.5, 0.5]) == [0.5] * 3


@pytest.fixture(scope="module")
def benchmark_scores(benchmark, tmp_path_factory):
    "Scores of six images by a model of random weights, in two batches; four images have curves."
    model = tiny("clip_b32_224")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    processor = build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=16, template="v1")
    options = dict(tasks=("caption",), paraphrase=False, min_side=56)
    folder = tmp_path_factory.mktemp("scenes")
    rows = list(load_conversations(write_scenes(folder, 6, "heldout_scenes", 0, (2, 3), 168, **options)))
    found = []
    for first in (0, 3):
        counts = dict(first=first, curve_images=4)
        part = rows[first : first + 3]
        settings = dict(image_size=168, tokens=16, seed=0)
        found += benchmark["score_batch"](model, processor, part, 16, settings, **counts)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the shuffled weights are restored
    return found


def test_benchmark_scores_of_known_maps(benchmark_scores):
    "The true box wins the pointing game, and a uniform map scores chance."
    assert [row["image"] for row in benchmark_scores] == list(range(6))
    assert ["deletion" in row["scores"]["box"] for row in benchmark_scores] == [True] * 4 + [False] * 2
    for row in benchmark_scores:
        uniform, box, gradcam = (row["scores"][method] for method in ("chance", "box", "gradcam"))
        assert uniform.get("deletion", 0) == uniform.get("insertion", 0) == uniform["correlation"] == 0
        assert box["energy"] > uniform["energy"] > 0
        assert abs(uniform["other"] - uniform["other_area"]) < 1e-6
        assert box["other"] < box["energy"]
        assert abs(gradcam["correlation"] - (not gradcam["empty"])) < 1e-6


def test_benchmark_summary_keeps_every_score(benchmark, benchmark_scores):
    set_name = "several"
    rows = []
    for seed in (0, 1):
        about = dict(compressor="delta", seed=seed, set=set_name, tokens=16)
        rows += [about | row for row in benchmark_scores]
    (summary,) = benchmark["summarize_all"](rows)
    assert (summary["set"], summary["images"], summary["seeds"]) == (set_name, 6, [0, 1])
    methods = summary["methods"]
    assert list(methods) == list(benchmark["METHODS"])
    attention = np.mean([row["scores"]["attention"]["energy"] for row in benchmark_scores])
    gradcam = np.mean([row["scores"]["gradcam"]["energy"] for row in benchmark_scores])
    assert abs(methods["attention"]["energy"][0] - attention) < 1e-3
    assert methods["box"]["hit"][0] > 0.5
    difference, low, high = methods["attention"]["gradcam minus"]["energy"]
    assert abs(difference - (gradcam - attention)) < 1e-3
    assert low <= difference <= high
    for checked in ("gradcam", "saliency"):
        assert methods[checked][f"{checked} minus"]["hit"] == [0] * 3
    assert "deletion" not in methods["center"]
    json.dumps(summary, allow_nan=False)


def test_the_only_named_object_is_the_target(benchmark):
    objects = [dict(name=name, box=[0, 0, 9, 9 + i]) for i, name in enumerate(("cat", "dog", "owl"))]

    def target(number, answer):
        row = dict(objects=objects, conversations=[{}, {"value": answer}])
        return benchmark["choose_targets"]([row], number, 1.0).names

    assert [target(i, "Owl") for i in (0, 1)] == [["owl"], ["owl"]]
    assert [target(i, "A cat, a dog and an owl.") for i in (0, 1)] == [["cat"], ["dog"]]


@pytest.mark.parametrize("name, fewest", [("several", 2), ("odd", 3)])
def test_benchmark_rows_are_one_question_about_a_scene(benchmark, tmp_path, name, fewest):
    rows = benchmark["write_set"](tmp_path, name, 3, 168)
    assert len(rows) == 3
    for row in rows:
        question, answer = row["conversations"]
        assert question["value"].count("<image>") == 1
        assert len(row["objects"]) >= fewest
        named = [o for o in row["objects"] if o["name"].casefold() in answer["value"].casefold()]
        assert len(named) == (1 if name == "odd" else len(row["objects"]))


# --- other maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CAM_METHODS)
def test_maps_are_those_of_one_gradient(delta, method):
    "Of several words, whose maps need one forward pass, and of each word alone."
    options = dict(answer="A red fox.", tokens=4, method=method)
    together = word_cams(*delta, IMAGE_224, "What?", ["red", "fox"], **options)
    alone = [word_cams(*delta, IMAGE_224, "What?", [word], **options).cams[0] for word in ("red", "fox")]
    assert_close(together.cams, torch.stack(alone))
    assert together.method == method
    assert (together.cams >= 0).all() and together.cams.any()


@pytest.mark.slow  # the library takes seconds to import
def test_hirescam_is_that_of_the_library():
    from pytorch_grad_cam import HiResCAM

    layer = nn.Linear(1, 1)
    library = HiResCAM(layer, [layer])
    tokens, grads = torch.randn(2, 2, 16, 8).unbind()
    as_image = [reshape_transform(x).numpy() for x in (tokens, grads)]
    expected = library.get_cam_image(None, None, None, *as_image, None)
    ours = token_map(tokens, grads, "hirescam")
    assert_close(ours, torch.from_numpy(expected).flatten(1).relu(), rtol=1e-4, atol=1e-5)


def test_saliency_is_the_size_of_a_small_change():
    "The steepest change of a score by a change of one token alone, found by differences."
    torch.manual_seed(0)
    tokens, direction = torch.randn(1, 4, 3, dtype=torch.double), torch.randn(4, 3, dtype=torch.double)
    score = lambda x: (direction * x).sin().sum()  # noqa: E731
    leaf = tokens.clone().requires_grad_()
    (grads,) = torch.autograd.grad(score(leaf), leaf)
    for token in range(4):
        steps = torch.zeros(3, *tokens.shape, dtype=torch.double)
        steps[:, 0, token] = 1e-6 * torch.eye(3, dtype=torch.double)
        slopes = torch.stack([score(tokens + s) - score(tokens - s) for s in steps]) / 2e-6
        assert_close(
            token_map(tokens, grads, "saliency")[0, token].double(), slopes.norm(), rtol=1e-5, atol=0
        )


def test_the_image_decides_no_word_if_the_model_does_not_see_it(delta):
    model, processor = delta
    with shuffled_weights(model.multi_modal_projector):
        for p in model.multi_modal_projector.parameters():
            p.data.zero_()
        effects = visual_effects(model, processor, IMAGE_224, "What?", answer="A red fox.", tokens=4)
    assert effects == dict(A=0, red=0, fox=0)
    effects = visual_effects(model, processor, IMAGE_224, "What?", answer="A red fox.", tokens=4)
    assert all(effect != 0 for effect in effects.values())
