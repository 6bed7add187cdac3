"Batches hold their rows to the letter, padded or packed, at any budget; every error names its row."

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer
from transformers import CLIPImageProcessorPil

from delta_llava.collator import Collator, encode_row, pack_rows
from delta_llava.conversations import load_conversations
from delta_llava.grid import VisionFeatures
from delta_llava.processor import build_processor
from delta_llava.scenes import write_scenes


@pytest.fixture(scope="module")
def processor():
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    return build_processor(image_processor, byte_tokenizer(), tokens=9, template="v1")


@pytest.fixture
def scenes(tmp_path):
    return load_conversations(write_scenes(tmp_path, 4, n_objects=(2, 3), tasks=["caption", "count"]))


def text_row(n=1, own_id="text"):
    turns = [
        {"from": "human", "value": "Tell me more. " * n},
        {"from": "gpt", "value": "Once upon a time. " * n},
    ]
    return dict(id=own_id, image=None, conversations=turns)


def image_tokens(processor, batch):
    return (batch["input_ids"] == processor.image_token_id).sum(1).tolist()


# ---------------------------------------------------------------- padding


def test_batch_is_its_rows_padded_on_the_left(processor, scenes):
    collate = Collator(processor=processor)
    batch = collate(list(scenes))
    alone = [collate([row]) for row in scenes]
    lengths = [one["input_ids"].shape[1] for one in alone]
    fills = dict(input_ids=processor.tokenizer.pad_token_id, labels=-100, attention_mask=0)
    assert len(set(lengths)) > 1 and "tokens" not in batch
    for i, one in enumerate(alone):
        for key, fill in fills.items():
            assert batch[key][i].tolist() == [fill] * (max(lengths) - lengths[i]) + one[key][0].tolist()
        assert one["attention_mask"].all()
        assert torch.equal(batch["pixel_values"][i], one["pixel_values"][0])
        labels = one["labels"][0]
        answer = scenes[i]["conversations"][1]["value"]
        assert processor.tokenizer.decode(labels[labels >= 0]).strip() == answer + "</s>"
        assert image_tokens(processor, one) == [9]


def test_features_stand_for_pixels(processor, scenes):
    paths = sorted(set(scenes["image"]), reverse=True)
    features = torch.arange(len(paths) * 8.0).reshape(len(paths), 4, 2)
    batch = Collator(processor=processor, tokens=4, features=features, paths=paths)(list(scenes))
    assert "pixel_values" not in batch and batch["tokens"] == 4
    assert image_tokens(processor, batch) == [4] * len(scenes)
    for row, kept in zip(scenes, batch["vision_features"], strict=True):
        assert torch.equal(kept, features[paths.index(row["image"])])


def test_rows_without_images_can_be_mixed_in(processor, scenes):
    collate = Collator(processor=processor)
    assert collate([scenes[0], text_row()])["pixel_values"].shape[0] == 1
    assert "pixel_values" not in collate([text_row()])


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("packing", [False, True])
def test_a_prepared_batch_is_assembled_at_any_budget(processor, scenes, packing):
    "Workers prepare a batch before its budget is drawn: the result is that of a collator with this budget."
    rows = [*scenes, text_row(20)]
    collate = Collator(processor=processor, packing=packing, max_length=700)
    prepared = collate.prepare(rows)
    for tokens in (1, 4, 9, None):
        expected = replace(collate, tokens=tokens)(rows)
        for batch in (
            collate.assemble(prepared, tokens),
            collate(rows, tokens),
            collate.with_tokens(tokens)(rows),
        ):
            assert batch.keys() == expected.keys()
            assert batch.get("tokens") == tokens
            for name in expected.keys() - {"tokens"}:
                assert torch.equal(batch[name], expected[name])
    assert collate.tokens is None


def test_another_budget_copies_no_table(processor, scenes):
    paths = sorted(set(scenes["image"]))
    collate = Collator(processor=processor, features=torch.zeros(len(paths), 4, 2), paths=paths)
    other = collate.with_tokens(4)
    assert other._index_of is collate._index_of and (other.tokens, collate.tokens) == (4, None)
    with pytest.raises(ValueError, match="tokens=0"):
        collate.with_tokens(0)


# ---------------------------------------------------------------- packing


def unpacked(batch):
    "The rows of a packed batch."
    rows = []
    columns = (batch[name] for name in ("input_ids", "labels", "position_ids"))
    for ids, labels, positions in zip(*columns, strict=True):
        starts = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        for a, b in zip(starts, starts[1:], strict=False):
            rows.append((ids[a:b].tolist(), labels[a:b].tolist()))
    return rows


def test_packed_sequences_hold_the_rows(processor, scenes):
    rows = [*scenes, text_row(20)]
    packed = Collator(processor=processor, packing=True)(rows)
    found = unpacked(packed)
    alone = [Collator(processor=processor)([row]) for row in rows]
    for one in alone:
        ids, labels = one["input_ids"][0].tolist(), one["labels"][0].tolist()
        assert (ids, labels) in found
    padded = Collator(processor=processor)(rows)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()


def test_images_follow_the_order_of_the_packed_rows(processor, scenes):
    "A tensor or `VisionFeatures`: the i-th image belongs to the i-th block of image tokens."
    rows = [scenes[0], text_row(20, "a"), *(scenes[i] for i in range(1, len(scenes)))]
    paths = sorted(set(scenes["image"]))
    numbers = torch.arange(len(paths)).float()
    levels = numbers[:, None, None].expand(-1, 4, 2)
    whole = VisionFeatures(levels, 2, numbers[:, None].expand(-1, 4), levels)
    features = [
        VisionFeatures(levels[i : i + 1], 2, whole.cls_attention[i : i + 1], levels[i : i + 1])
        for i in range(len(paths))
    ]
    collate = Collator(processor=processor, features=features, paths=paths, packing=True)
    prepared = collate.prepare(rows)
    batch = collate.assemble(prepared)
    expected = []
    for together in pack_rows([len(row["input_ids"]) for row in collate._expand(prepared, None)]):
        expected += [paths.index(rows[i]["image"]) for i in together if rows[i]["image"] is not None]
    assert batch["vision_features"].levels[:, 0, 0].tolist() == expected
    assert batch["vision_features"].cls_attention[:, 0].tolist() == expected
    assert expected != [paths.index(row["image"]) for row in rows if row["image"] is not None]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("own_id", ["fox-7", None])
@pytest.mark.parametrize("max_length,message", [(190, "nothing is supervised"), (150, "cut an image")])
def test_a_row_that_does_not_fit_is_named(processor, scenes, packing, own_id, max_length, message):
    row = {**scenes[1], "id": own_id}
    name = "row 'fox-7'" if own_id else f"the row without id and with image {row['image']!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*{message}.*delta-llava doctor"):
        Collator(processor=processor, max_length=max_length, packing=packing)([row, text_row()])
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*{message}"):
        encode_row(processor, row, max_length=max_length)


def test_a_row_with_a_broken_conversation_is_named(processor, scenes):
    row = {**scenes[0], "id": "fox-7", "conversations": [{"from": "human", "value": "<image>"}]}
    with pytest.raises(ValueError, match="^row 'fox-7': nothing is supervised"):
        Collator(processor=processor)([row])
    with pytest.raises(ValueError, match="^row 'fox-7': turn 0 is from 'robot'"):
        Collator(processor=processor)([{**row, "conversations": [{"from": "robot", "value": "<image>"}]}])


def test_a_row_with_a_damaged_image_is_named(processor, scenes, tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for image in ("half.png", "lost.png"):
        row = {**scenes[0], "id": "fox-7", "image": str(tmp_path / image)}
        with pytest.raises(ValueError, match=f"^row 'fox-7': .*{image}"):
            Collator(processor=processor)([row])


def test_collators_that_cannot_be(processor, scenes):
    features, paths = torch.zeros(2, 4, 2), scenes["image"][:2]
    with pytest.raises(ValueError, match="both or neither"):
        Collator(processor=processor, paths=paths)
    with pytest.raises(ValueError, match="one for each"):
        Collator(processor=processor, features=features[:1], paths=paths)
    with pytest.raises(ValueError, match=f"row {scenes[-1]['id']!r}: no features for"):
        Collator(processor=processor, features=features, paths=paths)([scenes[-1]])
    with pytest.raises(ValueError, match="tokens=0"):
        Collator(processor=processor, tokens=0)
