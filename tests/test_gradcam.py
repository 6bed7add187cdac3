"Grad-CAM: the authors' fixture, the planted answers, and that nothing is left behind."

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
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

from delta_llava.config import ProjectorConfig
from delta_llava.collator import Collator
from delta_llava.gradcam import (
    Word,
    answer_cam,
    attention_map,
    blurred,
    deletion_insertion,
    denormalize_pixels,
    draw_answer,
    draw_cams,
    find_phrase,
    grad_cam,
    infer_grid,
    leaf_output,
    library_cam,
    mark_phrases,
    minmax,
    pointing_game,
    relative,
    shuffled_weights,
    frozen_eval,
    upsample,
    word_cams,
    words_of,
)
from delta_llava.processor import build_processor
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
    "Largest absolute difference to each stored result, from our functions on the stored tokens and gradients."
    name, grid = case["name"], tuple(case["grid"])
    cam = grad_cam(scale * tensors[f"in.{name}.feats"], tensors[f"in.{name}.grads"])
    ours = {"cam_tokens": cam, "norm": minmax(cam.reshape(grid))}
    for key in (
        k.removeprefix(f"out.{name}.") for k in tensors if k.startswith(f"out.{name}.") and "_30x42" in k
    ):
        ours[key] = minmax(
            upsample(cam[0], (30, 42), key.split("_")[0])
        )  # the stored pictures were stretched after up-sampling
    assert set(ours) == {k.removeprefix(f"out.{name}.") for k in tensors if k.startswith(f"out.{name}.")}
    return {k: (v - tensors[f"out.{name}.{k}"]).abs().max().item() for k, v in ours.items()}


def test_parity(case, stored):
    found = differences(case, stored[1])
    if (
        case["grid"] == [1, 1]
    ):  # a constant map: its smoothed picture is rounding noise stretched to 0..1, and differs between machines
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
    "Grad-CAM written out: tower and projector first, then the language model on a leaf, then @eq-gradcam with einsum."
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
    "They run the prompt alone and take the last position's logit of the first generated token; ours reads prompt and answer in one pass."
    inputs = sample()
    prompt = {k: v[:, :20] if v.ndim == 2 else v for k, v in inputs.items()}
    first = inputs["input_ids"][0, 20]
    theirs = by_hand(model, prompt, lambda logits: logits[0, -1, first])
    assert theirs.max() > 1e-3
    assert_close(answer_cam(model, inputs, mark(inputs["input_ids"], 20))[0], theirs)


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
    "Logits and log-probabilities are two different questions."
    inputs = sample()
    words = mark(inputs["input_ids"], 21, 22)
    assert (
        answer_cam(model, inputs, words) - answer_cam(model, inputs, words, log_prob=True)
    ).abs().max() > 1e-3


def test_words_in_one_pass_equal_words_alone(model):
    inputs = sample()
    words = torch.cat([mark(inputs["input_ids"], *p) for p in ((20,), (21, 22), (23,))])
    together = answer_cam(model, inputs, words)
    assert together.shape == (3, 1, 16)
    for word, cam in zip(words, together):
        assert_close(answer_cam(model, inputs, word[None])[0], cam)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_rows_together_equal_rows_alone(model):
    "A left-padded batch, each row with its own word."
    inputs = sample(2)
    pad = dict(
        input_ids=torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.zeros(1, 2, dtype=torch.long)
    )
    short = {k: v[1:, :-2] if v.ndim == 2 else v[1:] for k, v in inputs.items()}
    padded = {
        k: torch.cat([v[:1], torch.cat([pad[k], short[k]], 1)]) if k in pad else v for k, v in inputs.items()
    }
    words = torch.cat([mark(inputs["input_ids"][:1], 20), mark(inputs["input_ids"][:1], 22, 23)], 1)
    cams = answer_cam(model, padded, words)[0]
    first = {k: v[:1] for k, v in inputs.items()}
    assert_close(cams[:1], answer_cam(model, first, mark(first["input_ids"], 20))[0])
    assert_close(
        cams[1:], answer_cam(model, short, mark(short["input_ids"], 20, 21))[0], rtol=1e-4, atol=1e-5
    )


def test_later_words_do_not_matter(model):
    "Causal attention: a word's map is the same whether or not the answer goes on."
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
    model, inputs = tiny_llava(), sample()
    words = mark(inputs["input_ids"], 21)
    full = answer_cam(model, inputs, words)
    half = answer_cam(model.bfloat16(), inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}, words)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.cat([full[0], half[0]]))[0, 1] > 0.98
    assert_close(
        library_cam(model, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}, words[0]), half[0]
    )


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
    "The library's own result would be min-max stretched to 0; the bridge returns what was before."
    model = tiny_llava()
    model.multi_modal_projector = nn.Sequential(model.multi_modal_projector, Mean())
    ids = torch.tensor([[1, IMAGE, 20, 21, 22]])
    for seed in range(4):  # a negative map is 0 by its ReLU: one of these is not
        inputs = dict(input_ids=ids, pixel_values=sample(seed=seed)["pixel_values"])
        ours = answer_cam(model, inputs, mark(ids, 4))[0]
        assert_close(ours, library_cam(model, inputs, mark(ids, 4)[0]))
        if ours.item() > 0:
            return
    pytest.fail("no picture gave a positive map")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


# --- nothing is left behind -----------------------------------------------------------------------


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


@pytest.mark.parametrize(
    "look", [answer_cam, lambda m, i, w: library_cam(m, i, w[0])], ids=["ours", "library"]
)
def test_no_trace(look):
    model, inputs = tiny_llava(), sample()
    words = mark(inputs["input_ids"], 21)
    model(**inputs)  # transformers puts hooks of its own on the first pass
    model.vision_tower.eval().requires_grad_(False)  # a model in the middle of stage 1
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = (
        hooks(model),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    look(model, inputs, words)
    assert (
        hooks(model),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    ) == before
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert model.lm_head.weight.grad.eq(1).all()


@pytest.mark.parametrize(
    "look", [answer_cam, lambda m, i, w: library_cam(m, i, w[0])], ids=["ours", "library"]
)
def test_no_trace_after_an_error(look):
    model, inputs = tiny_llava(), sample()
    model(**inputs)
    before = hooks(model)
    with pytest.raises(ValueError) as error:
        look(model, inputs | {"pixel_values": torch.randn(2, 3, 32, 32)}, mark(inputs["input_ids"], 21))
    assert error.tb  # it keeps the frames alive, so that nothing is released by mere garbage collection
    assert hooks(model) == before and model.training and all(p.requires_grad for p in model.parameters())


def test_dropout_is_off():
    "Two maps of one word are equal even if the model is training with dropout."
    model, inputs = tiny_llava(), sample()
    model.multi_modal_projector = nn.Sequential(model.multi_modal_projector, nn.Dropout(0.5))
    words = mark(inputs["input_ids"], 21)
    assert_close(answer_cam(model, inputs, words), answer_cam(model, inputs, words), rtol=0, atol=0)


def test_works_without_gradient_mode(model):
    inputs = sample()
    words = mark(inputs["input_ids"], 21)
    with torch.no_grad():
        quiet = answer_cam(model, inputs, words)
    assert_close(quiet, answer_cam(model, inputs, words))


# --- planted answers, pictures, scores ------------------------------------------------------------


class Reader(nn.Module):
    "Word 5+k reads channel k of the mean visual token."

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
    "Channel k speaks at token k only, so word k's map is token k, of the height that was planted."
    features = torch.zeros(2, v, 3)
    for k in range(3):
        features[:, k + 1, k] = k + 1.0
    features[:, 0] = -1.0  # speaks against every word
    ids = torch.tensor([[1, 5, 6, 7]]).expand(2, 4)
    words = torch.eye(4, dtype=torch.bool)[1:, None].expand(3, 2, 4)
    cams = answer_cam(Reader(), dict(input_ids=ids, features=features), words)
    expected = torch.zeros(3, 2, v)
    for k in range(3):
        expected[k, :, k + 1] = (k + 1) / v
    assert_close(cams, expected)


def test_what_answer_cam_refuses(model):
    inputs = sample()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="empty word"):
        answer_cam(model, inputs, torch.cat([mark(ids, 20), mark(ids)]))
    with pytest.raises(ValueError, match="position 0"):
        answer_cam(model, inputs, mark(ids, 0))
    with pytest.raises(ValueError, match="words mark"):
        answer_cam(model, inputs, mark(ids[:, 1:], 20))
    blind = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="ran 0 times"):
        answer_cam(model, blind, mark(ids, 20))


def test_gradients_stop_at_the_leaf():
    "Also for a module that is being trained: its parameters get nothing."
    layer = nn.Linear(3, 2)
    with leaf_output(layer) as caught:
        layer(torch.ones(1, 3)).square().sum().backward()
    assert layer.weight.grad is None and caught[0].is_leaf
    assert_close(caught[0].grad, 2 * caught[0].detach())


def test_leaf_output_leaves_on_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), leaf_output(layer):
        raise RuntimeError
    assert not layer._forward_hooks
    with pytest.raises(RuntimeError), frozen_eval(layer):
        raise RuntimeError
    assert layer.training and layer.weight.requires_grad


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
        row, column = divmod(
            upsample(cam, (36, 36), "bilinear").argmax().item(), 36
        )  # 9 px a cell: each centre is a pixel
        assert (row // 9) * 4 + column // 9 == cam.argmax()


def test_relative_has_mean_one():
    cams = torch.rand(3, 5, 64)
    assert_close(relative(cams).mean(-1), torch.ones(3, 5))
    assert relative(torch.zeros(2, 9)).eq(0).all()


def test_one_colour_scale():
    import matplotlib

    matplotlib.use("Agg")
    image = Image.new("RGB", (60, 60), "gray")
    cams = {144: torch.rand(144), 16: torch.rand(16), 1: torch.rand(1), "word": torch.rand(64)}
    for raw in (False, True):
        fig = draw_cams(image, cams, raw=raw, boxes=[(1, 2, 30, 40)])
        maps = [
            im
            for ax in fig.axes[:-1]
            for im in ax.images
            if im.get_cmap().name == "viridis" and im.get_array().ndim == 2
        ]
        top = max((m if raw else relative(m)).max().item() for m in cams.values())
        assert len(maps) == 8 and {im.get_clim() for im in maps} == {(0, top)}
        assert fig.axes[-1].get_ylabel()  # the colour bar has a label
        assert fig.axes[0].get_ylabel() == "144 tokens" and fig.axes[9].get_ylabel() == "word"
        assert_close(
            torch.from_numpy(maps[0].get_array().data),
            (cams[144] if raw else relative(cams[144])).reshape(12, 12),
        )
        matplotlib.pyplot.close(fig)


def test_minmax_reaches_both_ends():
    "Also where the smallest value is not 0, as it is in every stored map."
    low, high = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[-2.0, 0.0], [2.0, 6.0]])
    assert_close(
        minmax(torch.stack([low, high])), torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.25], [0.5, 1.0]]])
    )


def test_zero_maps_can_be_drawn():
    fig = draw_cams(Image.new("RGB", (20, 20)), {4: torch.zeros(4)})
    fig.canvas.draw()
    assert fig.axes[1].images[0].get_clim() == (0, 1)


def monte_carlo(cam, box, size, n=200):
    "The same four scores by painting the map on n×n points."
    h, w = infer_grid(len(cam))
    y, x = ((torch.arange(n) + 0.5) / n * s for s in size)
    painted = cam.reshape(h, w).repeat_interleave(n // h, 0).repeat_interleave(n // w, 1)
    inside = ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))
    return (painted * inside).sum() / painted.sum(), inside.float().mean()


@pytest.mark.parametrize("v", [4, 16, 25, 64, 100])
def test_pointing_game_against_painting(v):
    torch.manual_seed(v)
    cams, size = torch.rand(5, v) ** 4, (200, 400)
    low = torch.rand(5, 2) * torch.tensor([300.0, 150.0])
    boxes = torch.cat([low, low + 10 + torch.rand(5, 2) * torch.tensor([90.0, 40.0])], 1).round()
    game = pointing_game(cams, boxes, size)
    g = infer_grid(v)[0]
    n = 40 * g
    for i in range(5):
        energy, area = monte_carlo(cams[i], boxes[i], size, n)
        assert abs(game.energy[i] - energy) < 0.01 and abs(game.area[i] - area) < 0.01
        inside = [
            bool(boxes[i, 0] <= (k % g + 0.5) * 400 / g < boxes[i, 2])
            and bool(boxes[i, 1] <= (k // g + 0.5) * 200 / g < boxes[i, 3])
            for k in range(v)
        ]
        assert game.hit[i] == inside[cams[i].argmax()]
        assert_close(game.chance[i].item(), sum(inside) / v)


def test_constant_maps_score_chance():
    "One token, an even map, a map of zeros: none of them knows a place."
    torch.manual_seed(0)
    low = torch.rand(50, 2) * 60
    boxes = torch.cat([low, low + 10 + torch.rand(50, 2) * 30], 1)
    for cams in (torch.rand(50, 1), torch.full((50, 16), 0.3), torch.zeros(50, 64)):
        game = pointing_game(cams, boxes, (100, 100))
        assert_close(game.hit, game.chance)
        assert_close(game.energy, game.area)


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
    words = [Word(t, i, i + 1) for i, t in enumerate("A Hot Dog and a hot dog by a dog".split())]
    assert find_phrase(words, "hot dog") == Word("hot dog", 5, 7)
    assert find_phrase(words, "DOG").start == 9
    assert find_phrase(words[:3], "hot dog") == Word("Hot Dog", 1, 3)
    for missing in ("cat", "hot cat", ""):
        with pytest.raises(ValueError, match="was not said"):
            find_phrase(words, missing)


# --- words ----------------------------------------------------------------------------------------


def letters():
    "A byte-level tokenizer without merges: one token a byte."
    vocab = {
        c: i for i, c in enumerate(["<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<image>"],
    )


def test_words_of_bytes():
    "Characters of two and three bytes, punctuation, apostrophes, special tokens."
    tok, text = letters(), "<s>Été: isn't a 狐 well-known fox?</s>"
    ids = tok(text)["input_ids"]
    words = words_of(ids, tok)
    assert [w.text for w in words] == ["Été", "isn't", "a", "狐", "well-known", "fox"]
    assert [tok.decode(ids[w.start : w.stop]) for w in words] == [w.text for w in words]
    assert [w.stop - w.start for w in words] == [5, 5, 1, 3, 10, 3]


def test_words_of_pieces():
    "Sentence-piece style: the space belongs to the next piece, one piece may hold it all."
    vocab = {"<unk>": 0, "▁a": 1, "▁un": 2, "us": 3, "ual": 4, "▁dog": 5, ".": 6, "</s>": 7}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.decoder = decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", unk_token="<unk>")
    assert words_of([1, 2, 3, 4, 5, 6, 7], tok) == [Word("a", 0, 1), Word("unusual", 1, 4), Word("dog", 4, 5)]


def test_mark_phrases():
    tok = letters()
    rows = tok(["what fox? a red fox.", "a hot dog"], padding=True, padding_side="left", return_tensors="pt")[
        "input_ids"
    ]
    marks = mark_phrases(rows, ["fox", "Hot Dog"], tok)
    assert [tok.decode(r[m]) for r, m in zip(rows, marks)] == ["fox", "hot dog"]
    assert marks[0].nonzero().flatten().tolist() == [16, 17, 18]  # the last fox


# --- the whole road -------------------------------------------------------------------------------


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


PICTURE = Image.linear_gradient("L").resize((224, 224)).convert("RGB")


@pytest.mark.parametrize("tokens", [49, 16, 9, 4, 1])
def test_delta_at_every_budget(delta, tokens):
    "The call on pixels equals the low road on patch tokens, and the library's map."
    model, processor = delta
    result = word_cams(model, processor, PICTURE, "What?", answer="A red fox.", tokens=tokens)
    assert (
        [w.text for w in result.words] == ["A", "red", "fox"]
        and result.answer == "A red fox."
        and result.cams.shape == (3, tokens)
    )
    row = processor.encode_conversation(
        [dict(role="user", content="<image>\nWhat?"), dict(role="assistant", content="A red fox.")], tokens
    )
    ids = torch.tensor([row["input_ids"]])
    pixels = processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = vision_features(
            model.vision_tower, pixels, tuple(model.config.vision_feature_layer)
        ).levels
    fox = mark_phrases(ids, ["fox"], processor.tokenizer)
    assert processor.tokenizer.decode(ids[fox]) == "fox"
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), vision_features=features, tokens=tokens)
    assert_close(answer_cam(model, inputs, fox[None])[0, 0], result["fox"])
    assert_close(library_cam(model, inputs, fox)[0], result["FOX"])
    assert torch.equal(result["fox"], result.cams[2])


def test_delta_in_training_leaves_no_trace(delta):
    model, processor = delta
    model.train()
    result = word_cams(model, processor, PICTURE, "What?", answer="A red fox.")
    assert model.multi_modal_projector.training and not model.vision_tower.training
    assert not model.multi_modal_projector._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.multi_modal_projector.parameters())
    assert_close(
        word_cams(model, processor, PICTURE, "What?", answer="A red fox.").cams, result.cams, rtol=0, atol=0
    )  # DropPath was off
    modes = []
    handle = model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: modes.append(module.training)
    )
    try:
        word_cams(model, processor, PICTURE, "Tell me.", max_new_tokens=12)
    except ValueError:
        pass  # random weights may answer without a letter
    finally:
        handle.remove()
    assert (
        modes and not any(modes) and model.training
    )  # the answer itself was not said in training mode either
    model.eval()


def test_own_answer(delta):
    "Without an answer the model's own greedy one is mapped: its first token scores as at the prompt's last position."
    model, processor = delta
    for question in (
        "What?",
        "Who?",
        "Why is it?",
        "Where to?",
        "Tell me.",
    ):  # random weights may answer without a letter
        prompt = processor(
            PICTURE,
            processor.apply_chat_template(
                [dict(role="user", content=f"<image>\n{question}")], add_generation_prompt=True
            ),
        )
        said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
        words = words_of(said.tolist(), processor.tokenizer)
        if words:
            break
    result = word_cams(model, processor, PICTURE, question, max_new_tokens=12)
    assert list(result.words) == words
    assert result.answer == processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    ids = torch.cat([prompt.input_ids, said[None]], 1)
    start = prompt.input_ids.shape[1]
    mine = mark(ids, *range(start + words[0].start, start + words[0].stop))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values)
    assert_close(answer_cam(model, inputs, mine)[0, 0], result.cams[0])


def test_seen_picture(delta):
    "The picture that is drawn is the crop that entered the tower."
    processor = delta[1].image_processor
    wide = Image.effect_noise((448, 224), 60).convert("RGB")
    seen = denormalize_pixels(processor(wide, return_tensors="pt").pixel_values[0], processor)
    assert seen.tobytes() == wide.crop((112, 0, 336, 224)).tobytes()


def test_what_word_cams_refuses(delta):
    model, processor = delta
    with pytest.raises(ValueError, match="'cat' was not said"):
        word_cams(model, processor, PICTURE, "What?", ["cat"], answer="A red fox.")
    with pytest.raises(ValueError, match="holds no word"):
        word_cams(model, processor, PICTURE, "What?", answer="...")
    result = word_cams(model, processor, PICTURE, "What?", ["red fox"], answer="A red fox.")
    with pytest.raises(ValueError, match="'fox' has no map"):
        result["fox"]


def test_a_word_said_twice(delta):
    result = word_cams(*delta, PICTURE, "What?", answer="A fox, a fox.")
    assert torch.equal(result["fox"], result.cams[3]) and not torch.equal(result.cams[1], result.cams[3])


# --- does the word need what the map shows? -------------------------------------------------------


def distinct(rows=2, v=16, seed=3):
    return torch.stack(
        [torch.randperm(v, generator=torch.Generator().manual_seed(seed + i)) for i in range(rows)]
    ).float()


def says(model, inputs, word):
    "The word's log-probability, from all logits."
    model.eval()
    with torch.no_grad():
        logp = model(**inputs).logits.log_softmax(-1)
    return torch.stack(
        [
            sum(logp[r, t - 1, inputs["input_ids"][r, t]] for t in word[r].nonzero().flatten())
            for r in range(len(word))
        ]
    )


def test_erasing_by_hand(model):
    "Each point of both curves, with the cells painted one by one."
    inputs, cams = sample(2), distinct()
    word = mark(inputs["input_ids"], 20, 21)[0]
    curve = deletion_insertion(model, inputs, word, cams, steps=4)
    assert curve.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    gone = blurred(inputs["pixel_values"])
    for j, k in enumerate((0, 4, 8, 12, 16)):
        without, alone = inputs["pixel_values"].clone(), gone.clone()
        for r in range(2):
            for cell in cams[r].argsort(descending=True)[:k].tolist():
                y, x = 8 * (cell // 4), 8 * (cell % 4)
                without[r, :, y : y + 8, x : x + 8] = gone[r, :, y : y + 8, x : x + 8]
                alone[r, :, y : y + 8, x : x + 8] = inputs["pixel_values"][r, :, y : y + 8, x : x + 8]
        assert_close(curve.deletion[:, j], says(model, inputs | dict(pixel_values=without), word))
        assert_close(curve.insertion[:, j], says(model, inputs | dict(pixel_values=alone), word))
    assert curve.deletion.std(-1).min() > 1e-4  # the picture matters
    assert_close(curve.areas()["deletion"], (curve.deletion[:, 1:] + curve.deletion[:, :-1]).mean(-1) / 2)


def test_erasing_is_the_librarys(model):
    "The same deletion by pytorch-grad-cam's RemoveMostRelevantFirst, at one threshold."
    from pytorch_grad_cam.metrics.perturbation_confidence import (
        PerturbationConfidenceMetric,
        RemoveMostRelevantFirst,
    )

    inputs, cams = sample(2), distinct()
    word, gone = mark(inputs["input_ids"], 20)[0], blurred(inputs["pixel_values"])
    of = {p.numpy().tobytes(): g for p, g in zip(inputs["pixel_values"], gone)}
    remove = RemoveMostRelevantFirst(75, lambda p, keep: torch.where(keep.bool(), p, of[p.numpy().tobytes()]))
    model.eval()
    theirs = PerturbationConfidenceMetric(remove)(
        inputs["pixel_values"],
        upsample(cams, (32, 32)).numpy(),
        [lambda out: out] * 2,
        lambda p: says(model, inputs | dict(pixel_values=p), word),
        return_diff=False,
    )
    assert_close(
        deletion_insertion(model, inputs, word, cams, steps=4).deletion[:, 1], torch.from_numpy(theirs)
    )


def test_equal_cells_are_erased_at_random(model):
    "A constant map is chance: its order depends on the seed alone, and is not the order of the cells."
    inputs = sample(1)
    word = mark(inputs["input_ids"], 20)[0]
    orders = [
        deletion_insertion(model, inputs, word, torch.full((1, 16), c), seed=s).deletion
        for c, s in ((0.0, 1), (0.3, 1), (0.3, 2))
    ]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(
        orders[1], deletion_insertion(model, inputs, word, -torch.arange(16.0)[None]).deletion
    )
    one = deletion_insertion(model, inputs, word, torch.ones(1, 1))
    assert one.share.tolist() == [0, 1] and torch.equal(
        one.deletion.flip(-1), one.insertion
    )  # one cell is the whole picture


def test_blurred_shows_no_things():
    board = (
        torch.from_numpy((np.indices((64, 64)) // 4).sum(0) % 2).float().expand(1, 3, 64, 64)
    )  # fields of 4 px
    assert (
        blurred(board)[..., 16:-16, 16:-16].std() < 0.01 * board.std()
        and abs(blurred(board).mean() - 0.5) < 0.01
    )
    assert_close(blurred(torch.full((1, 3, 32, 48), 0.3)), torch.full((1, 3, 32, 48), 0.3))


def test_attention_map(model):
    "Rows with padding, words of several tokens, and the attention kernel that was there before."
    inputs = sample(2)
    kind, words = model.config.text_config._attn_implementation, mark(inputs["input_ids"], 20, 22)
    found = attention_map(model, inputs, torch.cat([words, mark(inputs["input_ids"], 23)]))
    assert found.shape == (2, 2, 16) and model.config.text_config._attn_implementation == kind != "eager"
    padded = {k: torch.nn.functional.pad(v, (3, 0)) if v.ndim == 2 else v for k, v in inputs.items()}
    assert_close(attention_map(model, padded, torch.nn.functional.pad(words, (3, 0))), found[:1])
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            layers = model.eval()(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({"text_config": kind})
    assert_close(
        found[0], sum(a[:, :, t - 1, 1:17].mean(1) for a in layers for t in (20, 22)) / (2 * len(layers))
    )
    with pytest.raises(ValueError, match="position 0"):
        attention_map(model, inputs, mark(inputs["input_ids"], 0))


def test_shuffled_weights_come_back(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    part = model.multi_modal_projector
    with pytest.raises(KeyError), shuffled_weights(part):
        inside = {k: v.clone() for k, v in model.state_dict().items()}
        raise KeyError
    for k, v in before.items():
        assert torch.equal(model.state_dict()[k], v)
        assert torch.equal(inside[k].flatten().sort().values, v.flatten().sort().values)  # the same values
        assert torch.equal(inside[k], v) == (("multi_modal_projector" not in k) or v.unique().numel() == 1)
    with shuffled_weights(part, 1):
        assert not torch.equal(part.linear_1.weight, inside["model.multi_modal_projector.linear_1.weight"])


@pytest.mark.parametrize("tokens", [49, 16, 1])
def test_truth_of_delta_at_every_budget(delta, tokens, tmp_path):
    "Attention and erasing take what `answer_cam` takes, from pixels."
    model, processor = delta
    PICTURE.save(tmp_path / "a.png")
    batch = Collator(processor=processor, tokens=tokens)(
        [
            dict(
                id="a",
                image=str(tmp_path / "a.png"),
                conversations=[
                    dict(role="user", content="<image>\nWhat?"),
                    dict(role="assistant", content="A red fox."),
                ],
            )
        ]
        * 2
    )
    fox = mark_phrases(batch["input_ids"], ["fox"] * 2, processor.tokenizer)
    assert (
        answer_cam(model, batch, fox[None]).shape
        == attention_map(model, batch, fox[None]).shape
        == (1, 2, tokens)
    )
    curve = deletion_insertion(model, batch, fox, torch.rand(2, tokens))
    assert curve.deletion.shape == (2, 1 + min(8, tokens)) and torch.equal(
        curve.deletion[:, 0], curve.insertion[:, -1]
    )


def test_draw_answer(delta):
    "A row for each word, a column for each budget, one colour scale."
    results = {
        v: word_cams(*delta, PICTURE, "What?", ["red", "fox"], answer="A red fox.", tokens=v) for v in (4, 16)
    }
    fig = draw_answer(results, boxes={"fox": (10, 20, 50, 80)})
    grid = fig.axes[:-1]
    assert (
        len(grid) == 6
        and [ax.get_title() for ax in grid[:3]] == ["picture", "4 tokens", "16 tokens"]
        and [ax.get_ylabel() for ax in grid[::3]] == ["red", "fox"]
    )
    assert (
        len(
            {
                im.get_clim()
                for ax in grid
                for im in ax.images
                if im.get_cmap().name == "viridis" and im.get_array().ndim == 2
            }
        )
        == 1
    )
    assert [{p.get_bbox().bounds for p in ax.patches} for ax in grid] == [set()] * 3 + [
        {(10, 20, 40, 60)}
    ] * 3
    with pytest.raises(ValueError, match="different answers"):
        draw_answer(
            results | {1: word_cams(*delta, PICTURE, "What?", ["red"], answer="A red fox.", tokens=1)}
        )
    with pytest.raises(ValueError, match="empty"):
        draw_answer({})
