"Words of visual tokens: brute force on random tensors, and a small model with every budget."

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer, tiny
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from delta_llava.processor import build_processor
from delta_llava.token_words import (
    llm_outputs,
    logit_lens,
    name_shares,
    nearest_words,
    says_name,
    tokens_inside,
    tokens_outside,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny().eval()


@pytest.fixture(scope="module")
def processor():
    return build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=49, template="v1")


def test_nearest_words_one_pair_at_a_time():
    torch.manual_seed(0)
    visual, table = torch.randn(2, 3, 8), torch.randn(11, 8) + 4
    found = nearest_words(visual, table, k=3)
    center = table.mean(0)
    for image, of_image in zip(visual, found, strict=True):
        for token, ids in zip(image, of_image, strict=True):
            cosines = torch.stack([F.cosine_similarity(token - center, row - center, dim=0) for row in table])
            assert ids.tolist() == cosines.argsort(descending=True)[:3].tolist()


def test_nearest_words_in_half_precision():
    "A bfloat16 model: the mean of many rows must not lose its digits."
    torch.manual_seed(0)
    table = (torch.randn(400, 16) + 8).bfloat16()
    assert nearest_words(table[:20], table, k=1)[:, 0].tolist() == list(range(20))


@pytest.mark.parametrize("k", [0, -1, 12])
def test_k_that_is_not_possible(k):
    with pytest.raises(ValueError, match=rf"k={k} must lie in 1..11"):
        nearest_words(torch.randn(1, 8), torch.randn(11, 8), k=k)


@pytest.mark.parametrize("v, size", [(16, (80, 80)), (144, (168, 168)), (12, (160, 90)), (1, (10, 20))])
def test_tokens_of_boxes_by_their_pixels(v, size):
    "Against overlaps computed cell by cell."
    rows, columns = {16: (4, 4), 144: (12, 12), 12: (3, 4), 1: (1, 1)}[v]
    generator = torch.Generator().manual_seed(v)
    for _ in range(20):
        corners = torch.rand(2, 2, generator=generator).sort(0).values * torch.tensor(size)
        (x0, y0), (x1, y1) = corners.tolist()
        box = (x0, y0, x1 + 1, y1 + 1)
        box = (box[0], box[1], min(box[2], size[0]), min(box[3], size[1]))
        (inside,) = tokens_inside([box], v, size)
        touched = set()
        for i in range(v):
            left, top = i % columns * size[0] / columns, i // columns * size[1] / rows
            overlaps_x = left < box[2] and box[0] < left + size[0] / columns
            overlaps_y = top < box[3] and box[1] < top + size[1] / rows
            if overlaps_x and overlaps_y:
                touched.add(i)
        assert inside in touched
        assert set(tokens_outside([box], v, size)) == set(range(v)) - touched


def test_words_that_hold_a_name():
    assert says_name(["the", "Guitar"], "guitar") and says_name(["gui"], "guitar")
    assert not says_name(["gu", "tar", "guitars", ""], "guitar") and not says_name([], "guitar")


def test_chance_takes_absent_names_of_every_kind():
    "With words that hold one absent name, chance lies at the share of this name among the absent ones."
    names = ["owl", "fox", "crab", "lion", "drum"]
    scene = SimpleNamespace(size=80, objects=[SimpleNamespace(name="owl", box=(10, 10, 20, 20))])
    shares = name_shares([scene] * 40, [[["fox"]] * 16] * 40, names)
    assert (shares.inside, shares.outside) == (0, 0) and shares.chance == 0.25


@pytest.mark.parametrize("tokens", [49, 16, 1])
def test_outputs_of_the_llm(model, processor, tokens):
    images = [Image.new("RGB", (224, 224), color) for color in ("red", "blue")]
    before = [p.requires_grad for p in model.parameters()]
    out, at = llm_outputs(model, processor, images, "What?", tokens, attentions=True)
    layers = model.config.text_config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
    assert len(at) == tokens and at.diff().eq(1).all()
    with torch.no_grad():
        visual = model.get_image_features(
            processor.image_processor(images, return_tensors="pt").pixel_values, tokens=tokens
        )
    visual = torch.stack(list(getattr(visual, "pooler_output", visual)))
    torch.testing.assert_close(out.hidden_states[0][:, at], visual.reshape(2, tokens, -1))
    assert logit_lens(model, out.hidden_states[1][:, at], k=4).shape == (2, tokens, 4)
    assert [p.requires_grad for p in model.parameters()] == before
