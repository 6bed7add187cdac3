"Prompts, image tokens and labels: templates to the letter, left padding, whole images, spans of the answers."

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tiny_vlm import IMAGE, byte_tokenizer, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    pipeline,
)

from delta_llava.processor import JOIN_PARTS, TEMPLATES, DeltaLlavaProcessor, as_messages, build_processor
from delta_llava.tower import open_image

# strings of LLaVA's conversation.py (haotian-liu/LLaVA @ c121f04, Apache-2.0)
PROMPTS = json.loads((Path(__file__).parent / "data" / "prompts.json").read_text())
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATIONS = {
    "single": [dict(role="user", content="<image>\nWhat is weird about this picture?")],
    "qa": [
        dict(role="user", content="<image>\nWhat is it?"),
        dict(role="assistant", content="A cat."),
    ],
    "multi": [
        dict(role="user", content="<image>\nWhat is it?"),
        dict(role="assistant", content="A cat."),
        dict(role="user", content="Colour?"),
        dict(role="assistant", content="Black."),
        dict(role="user", content="Sure?"),
    ],
}
QA = CONVERSATIONS["qa"]
TWO_ANSWERS = CONVERSATIONS["multi"][:4]
ALL_TEMPLATES = ["plain", "v1", "chatml", "chat"]


def make_processor(template="v1", tokens=4, size=224):
    tokenizer = byte_tokenizer(eos="<|im_end|>" if template.startswith("chat") else "</s>")
    if template == "chat":
        tokenizer.chat_template = CHATML
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    return build_processor(image_processor, tokenizer, tokens=tokens, template=template)


def make_image(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def learned_text(processor, row):
    return processor.tokenizer.decode([label for label in row["labels"] if label >= 0])


def first_learned(row):
    return [label >= 0 for label in row["labels"]].index(True)


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("template,name", [(t, n) for t, prompts in PROMPTS.items() for n in prompts])
def test_renderings_are_llavas(template, name):
    conversation = CONVERSATIONS[name]
    add_prompt = template != "plain" and conversation[-1]["role"] == "user"
    prompt = make_processor(template).build_prompt(conversation, add_generation_prompt=add_prompt)
    assert prompt == PROMPTS[template][name]


def test_plain_drops_the_question():
    assert make_processor("plain").build_prompt(QA, add_generation_prompt=False) == "<image>A cat.\n"


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_content_in_parts_reads_as_content_in_one(template):
    parts = [
        dict(role="user", content=[dict(type="image"), dict(type="text", text="What is it?")]),
        dict(role="assistant", content=[dict(type="text", text="A cat.")]),
    ]
    processor = make_processor(template)
    for complete in (False, True):
        conversations = (parts, QA) if complete else (parts[:1], QA[:1])
        a, b = (processor.build_prompt(c, add_generation_prompt=not complete) for c in conversations)
        assert a == b
    assert processor.encode_conversation(parts) == processor.encode_conversation(QA)


def test_chatml_has_no_system_prompt_of_its_own():
    question = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    row = question + "A cat.<|im_end|>\n"
    system = dict(role="system", content="Be brief.")
    processor = make_processor("chatml")
    assert processor.build_prompt(QA[:1]) == question
    assert processor.build_prompt(QA, add_generation_prompt=False) == row
    prompt = processor.build_prompt([system, *QA], add_generation_prompt=False)
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n" + row


def test_chat_is_the_llms_own_template():
    processor = make_processor("chat")
    expected = processor.tokenizer.apply_chat_template(
        QA[:1], add_generation_prompt=True, tokenize=False, chat_template=CHATML
    )
    assert processor.build_prompt(QA[:1]) == expected


def test_own_system_prompt():
    prompt = make_processor("v1").build_prompt([dict(role="system", content="Be brief."), *QA[:1]])
    assert prompt == "Be brief. USER: <image>\nWhat is it? ASSISTANT:"


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_a_plain_question_is_the_first_message(template):
    processor = make_processor(template)
    prompt = processor.build_prompt(QA[:1])
    assert processor.build_prompt("What is it?") == prompt
    assert processor.build_prompt("<image>\nWhat is it?") == prompt  # it names its image itself
    assert processor.build_prompt([{"from": "human", "value": "<image>\nWhat is it?"}]) == prompt
    assert prompt == processor.apply_chat_template(QA[:1], add_generation_prompt=True)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_question_names_as_many_images_as_there_are(images):
    processor = make_processor()
    prompt = processor.build_prompt("Which one?", images=images)
    assert prompt.count("<image>") == images
    given = [make_image(i) for i in range(images)]
    assert (processor(given or None, prompt).input_ids == IMAGE).sum() == 4 * images


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("tokenizer_adds_bos", [False, True])
@pytest.mark.parametrize("template_writes_bos", [False, True])
def test_inference_asks_in_the_form_of_training(template, tokenizer_adds_bos, template_writes_bos):
    "The ids of the prompt at inference are the beginning of the ids in training, and hold BOS at most once."
    processor = make_processor(template)
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token_id
    if tokenizer_adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    if template_writes_bos:
        own = processor.chat_template.removeprefix(JOIN_PARTS)
        processor.chat_template = JOIN_PARTS + "{{- bos_token -}}" + own
    expected = int(tokenizer_adds_bos or template_writes_bos)
    for conversation in (QA, TWO_ANSWERS):
        row = processor.encode_conversation(conversation)
        assert row["input_ids"].count(bos) == expected
        assert row["input_ids"][:1] == [bos] * expected or not expected
        assert bos not in row["labels"]
        for i in range(1, len(conversation), 2):
            prompt = processor.build_prompt(conversation[:i])
            ids = processor(make_image(), prompt).input_ids[0].tolist()
            assert row["input_ids"][: len(ids)] == ids
            assert row["labels"][len(ids)] >= 0
            assert i > 1 or first_learned(row) == len(ids)


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_what_a_tokenizer_puts_after_a_text_is_in_no_prompt(template):
    "Some tokenizers end each text with EOS, or begin it with several tokens."
    plain, processor = make_processor(template), make_processor(template)
    tokenizer = processor.tokenizer
    ids = [(x, tokenizer.convert_tokens_to_ids(x)) for x in ("<s>", "[", tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> [ $A {tokenizer.eos_token}", special_tokens=ids
    )
    first = [ids[0][1], ids[1][1]]
    row, without = processor.encode_conversation(TWO_ANSWERS), plain.encode_conversation(TWO_ANSWERS)
    assert row["input_ids"] == first + without["input_ids"]
    assert row["labels"] == [-100] * 2 + without["labels"]
    prompt = processor.build_prompt(TWO_ANSWERS[:1])
    received = processor(make_image(), prompt).input_ids[0].tolist()
    assert received == row["input_ids"][: len(received)]


def test_bos_is_not_doubled_nor_learned():
    processor = make_processor("v1")
    processor.chat_template = JOIN_PARTS + "{{ bos_token }}" + TEMPLATES["v1"]
    processor.tokenizer.add_bos_token = True
    row = processor.encode_conversation(QA)
    assert row["input_ids"].count(processor.tokenizer.bos_token_id) == 1
    assert row["labels"][0] == -100
    assert learned_text(processor, row) == " A cat.</s>"


# ---------------------------------------------------------------- calls


def test_image_tokens_and_pixels():
    processor = make_processor()
    out = processor([make_image(), make_image(1)], ["<image> <image>", "none"], tokens=9)
    assert (out.input_ids == IMAGE).sum(1).tolist() == [18, 0]
    assert out.pixel_values.shape == (2, 3, 224, 224) and out.pixel_values.dtype == torch.float32
    assert out.input_ids[0].tolist() == [IMAGE] * 9 + processor.tokenizer(" ").input_ids + [IMAGE] * 9
    assert (processor(make_image(), "<image>").input_ids == IMAGE).sum() == 4  # the processor's own budget
    assert "pixel_values" not in processor(text="none")


def test_images_are_opened_as_in_training(tmp_path):
    "Paths, open files and PIL images, nested or not; transparency is white, EXIF rotations are applied."
    processor = make_processor()
    image = make_image()
    image.save(tmp_path / "a.png")
    expected = processor(image, "<image>").pixel_values
    with open(tmp_path / "a.png", "rb") as file:
        for given in (tmp_path / "a.png", str(tmp_path / "a.png"), file, [[image]]):
            assert torch.equal(processor(given, "<image>").pixel_values, expected)
    assert torch.equal(processor(np.asarray(image), "<image>").pixel_values, expected)
    transparent = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    white = Image.new("RGB", (60, 60), "white")
    expected = processor(white, "<image>").pixel_values
    assert torch.equal(processor(transparent, "<image>").pixel_values, expected)
    with pytest.raises(ValueError, match="lost.png"):
        processor(tmp_path / "lost.png", "<image>")


def test_chat_template_with_images_in_one_call():
    processor = make_processor("chat")
    parts = [dict(type="image", image=make_image()), dict(type="text", text="What is it?")]
    conversation = [dict(role="user", content=parts)]
    out = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    by_hand = processor(make_image(), processor.build_prompt(conversation))
    assert sorted(out) == sorted(by_hand)
    assert torch.equal(out.input_ids, by_hand.input_ids)
    assert torch.equal(out.pixel_values, by_hand.pixel_values)


def test_padding_is_on_the_left():
    processor = make_processor()
    out = processor([make_image(), make_image()], ["<image>\na", "<image>\na longer one"])
    assert out.attention_mask[0].tolist() == [0] * 11 + [1] * 6
    assert out.attention_mask[1].all()


def test_trainers_may_pad_otherwise():
    processor = make_processor()
    images, texts = [make_image(), make_image()], ["<image>\na", "<image>\na longer one"]
    out = processor(
        images,
        texts,
        padding=True,
        padding_side="right",
        pad_to_multiple_of=8,
        truncation=False,
        max_length=3,
    )
    assert out.attention_mask[0].tolist() == [1] * 6 + [0] * 18
    assert out.input_ids.shape[1] == 24
    assert out.input_ids[0, :6].tolist() == processor(images, texts).input_ids[0, 11:].tolist()


@pytest.mark.parametrize(
    "n,text,message",
    [
        (0, "<image>", "name 1 image"),
        (2, "<image>", "2 were given"),
        (1, "no place", "name 0 image"),
        (0, None, "text=None"),
        (1, [], "text="),
    ],
)
def test_images_and_places_must_agree(n, text, message):
    with pytest.raises(ValueError, match=message):
        make_processor()([make_image()] * n or None, text)


def test_padding_and_other_arguments_of_transformers():
    processor = make_processor()
    texts = ["a", "abc"]
    assert processor(text=texts, padding=False, return_tensors=None).input_ids == [
        processor.encode_text(t) for t in texts
    ]
    out = processor(text=texts, padding="max_length", max_length=12)
    assert out.input_ids.shape == (2, 12) and out.attention_mask.sum().item() == 4
    grouped = dict(
        text_kwargs=dict(padding="max_length", max_length=12), common_kwargs=dict(return_tensors="np")
    )
    assert processor(text=texts, **grouped)["input_ids"].tolist() == out.input_ids.tolist()
    assert "attention_mask" not in processor(text=texts, return_attention_mask=False)
    image = make_image()
    whole = processor(image, "<image>ab", return_mm_token_type_ids=True)
    assert whole.mm_token_type_ids.tolist() == [[1, 1, 1, 1, 0, 0]]
    raw = processor(image, "<image>", do_rescale=False, do_normalize=False).pixel_values
    assert raw.max() > 200 and raw.equal(
        processor(image, "<image>", images_kwargs=dict(do_rescale=False, do_normalize=False)).pixel_values
    )
    alone = processor(images=image)
    assert list(alone) == ["pixel_values"] and alone.pixel_values.equal(whole.pixel_values)


@pytest.mark.parametrize("template", ["v1", "chatml", "plain"])
@pytest.mark.parametrize("rows", [1, 2])
def test_assistant_mask_covers_what_is_learned(template, rows):
    "TRL's `assistant_only_loss` reads it."
    processor = make_processor(template)
    user = dict(
        role="user", content=[dict(type="image", image=make_image()), dict(type="text", text="Who? " + "é")]
    )
    answer = dict(role="assistant", content=[dict(type="text", text="A cat, a fox.")])
    chats = [
        [user, answer],
        [user, answer, dict(role="user", content="Sure?"), dict(role="assistant", content="Yes.")],
    ]
    out = processor.apply_chat_template(
        chats[:rows], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    for i in range(rows):
        real = out.attention_mask[i].bool()
        row = processor.encode_conversation(chats[i])
        assert out.input_ids[i][real].tolist() == row["input_ids"]
        mask = torch.as_tensor(out["assistant_masks"])[i][real].bool()
        end = {"v1": "</s>", "chatml": "<|im_end|>", "plain": "\n"}[template]
        answers = [m["content"] for m in chats[i][1::2]]
        answers = [a if isinstance(a, str) else a[0]["text"] for a in answers]
        assert processor.tokenizer.decode(out.input_ids[i][real][mask]) == "".join(a + end for a in answers)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "RGBA", "I;16", "1"])
@pytest.mark.parametrize("form", ["path", "url", "base64", "openai", "image"])
def test_images_in_chats_are_those_of_training(form, mode, tmp_path):
    processor = make_processor()
    if mode == "I;16":
        image = Image.fromarray((np.arange(60 * 50).reshape(60, 50) * 20).astype(np.uint16))
    else:
        image = make_image().convert("RGBA" if mode in ("RGBA", "LA") else "RGB").convert(mode)
    if "A" in mode:
        image.putalpha(100)
    image.save(tmp_path / "a.png")
    file, data = str(tmp_path / "a.png"), _png(image)
    part = {
        "path": dict(type="image", path=file),
        "url": dict(type="image", url=file),
        "base64": dict(type="image", base64=data),
        "openai": dict(type="image_url", image_url=dict(url="data:image/png;base64," + data)),
        "image": dict(type="image", image=Image.open(file)),
    }[form]
    chat = [dict(role="user", content=[part, dict(type="text", text="Who?")])]
    out = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    want = processor.image_processor([open_image(file)], return_tensors="pt")["pixel_values"]
    assert out.pixel_values.equal(want) and (out.input_ids == IMAGE).sum() == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A folder of model and processor."
    folder = tmp_path_factory.mktemp("saved")
    processor = make_processor("chat", tokens=16)
    model = tiny(vocab_size=len(processor.tokenizer) + 10)
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def deep_image(file):
    "16 bits, which a conversion to 8 would turn white."
    Image.fromarray((np.arange(60 * 90).reshape(60, 90) * 12).astype(np.uint16)).save(file)
    return str(file)


@pytest.mark.parametrize("form", ["path", "PIL", "list", "chat", "base64"])
@pytest.mark.parametrize("deep", [False, True])
def test_pipelines_open_images_as_training_does(form, deep, saved, tmp_path):
    file = deep_image(tmp_path / "a.png") if deep else str(tmp_path / "a.png")
    if not deep:
        make_image().save(file)
    pipe = pipeline("image-text-to-text", model=str(saved), max_new_tokens=2, device="cpu")
    pixels_given = []
    pipe.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: pixels_given.append(
            kwargs.get("pixel_values", args[0] if args else None)
        ),
        with_kwargs=True,
    )
    question = pipe.processor.build_prompt("What?")
    data = base64.b64encode(Path(file).read_bytes()).decode()
    given = {"path": file, "PIL": Image.open(file), "list": [file], "base64": "data:image/png;base64," + data}
    if form == "chat":
        parts = [dict(type="image", url=file), dict(type="text", text="What?")]
        answer = pipe(text=[dict(role="user", content=parts)], return_full_text=False)
    else:
        answer = pipe(images=given[form], text=question, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    want = pipe.processor.image_processor([open_image(file)], return_tensors="pt")["pixel_values"]
    assert pixels_given[0].equal(want)


def test_pipelines_of_other_models_are_as_before():
    from transformers import ImageTextToTextPipeline, LlavaProcessor

    class Found(Exception):
        pass

    def load(images, **kwargs):
        raise Found(images)

    pipe = ImageTextToTextPipeline.__new__(ImageTextToTextPipeline)
    pipe.processor = LlavaProcessor.__new__(LlavaProcessor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.pipelines.image_text_to_text.load_images", load)
        with pytest.raises(Found, match="a.png"):
            pipe.preprocess(dict(images="a.png", text="?"))


@pytest.mark.parametrize("kind", ["clip", "siglip", "bit", "llava"])
def test_the_image_processor_alone_gives_the_same_pixels(kind, tmp_path):
    from delta_llava import adapter

    name = dict(clip="CLIP", siglip="Siglip", bit="Bit", llava="Llava")[kind] + "ImageProcessorPil"
    square = dict(height=64, width=64)
    size = dict(size=square) if kind == "siglip" else dict(size={"shortest_edge": 64}, crop_size=square)
    own = getattr(adapter, name)(**size)
    processor = build_processor(own, byte_tokenizer(), tokens=4, template="v1")
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "delta_llava"}))
    want = processor(make_image(), "<image>").pixel_values
    alone = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(alone) is type(own)
    assert alone(make_image(), return_tensors="pt")["pixel_values"].equal(want)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is type(own)
    assert again(make_image(), "<image>").pixel_values.equal(want)


def question_processor(template="v1"):
    processor = make_processor(template)
    processor.questions = True
    return processor


def questions_in(processor, batch):
    return [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch.question_ids, batch.question_mask, strict=True)
    ]


def test_a_text_without_an_image_needs_no_question():
    processor = question_processor()
    texts = ["lower newer", processor.build_prompt("Colour?")]
    batch = processor([[], [make_image()]], texts)
    assert questions_in(processor, batch) == ["Colour?"] and len(batch.input_ids) == 2
    with pytest.raises(ValueError, match="give the question of each of the 2 texts"):
        processor([make_image(), make_image()], ["<image>lower newer", texts[1]])


@pytest.mark.parametrize("template", ["v1", "chatml", "chat"])
def test_the_question_is_that_of_the_last_turn(template):
    processor = question_processor(template)
    chat = [
        dict(
            role="user",
            content=[dict(type="image", image=make_image()), dict(type="text", text="Who? USER:")],
        ),
        dict(role="assistant", content="A cat."),
        dict(role="user", content=[dict(type="text", text="And what ASSISTANT: is it? é")]),
    ]
    other = [
        dict(role="user", content=[dict(type="image", image=make_image()), dict(type="text", text="Colour?")])
    ]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    one = processor.apply_chat_template(chat, **options)
    assert questions_in(processor, one) == ["And what ASSISTANT: is it? é"]
    two = processor.apply_chat_template([chat, other], **options)
    assert questions_in(processor, two) == ["And what ASSISTANT: is it? é", "Colour?"]
    given = processor.apply_chat_template(chat, **options, processor_kwargs=dict(questions=["Mine?"]))
    assert questions_in(processor, given) == ["Mine?"]
    text = processor.apply_chat_template([other[0]], add_generation_prompt=True)
    assert questions_in(processor, processor(make_image(), text)) == ["Colour?"]
    history = [*other, dict(role="assistant", content="Red."), dict(role="user", content="Sure?")]
    answered = [*history, dict(role="assistant", content="Yes.")]
    for messages, prompt in ((history, True), (answered, False)):
        text = processor.apply_chat_template(messages, add_generation_prompt=prompt)
        assert questions_in(processor, processor(make_image(), text)) == ["Sure?"]
    assert questions_in(processor, processor(make_image(), text, questions=["Mine?"])) == ["Mine?"]


@pytest.mark.parametrize(("template", "text"), [("plain", "<image>"), ("v1", "<image> What?")])
def test_prompts_without_a_question_are_refused(template, text):
    with pytest.raises(ValueError, match="this projector reads the question"):
        question_processor(template)(make_image(), text)


def test_what_a_tokenizer_puts_before_is_asked_for_once(monkeypatch):
    processor = make_processor()
    texts = []
    call = type(processor.tokenizer).__call__
    monkeypatch.setattr(
        type(processor.tokenizer),
        "__call__",
        lambda self, text, *args, **kwargs: texts.append(text) or call(self, text, *args, **kwargs),
    )
    for i in range(5):
        processor.encode_text(f"text {i}")
    assert texts.count("a") <= 2 and len(texts) <= 7


def test_a_tokenizer_that_is_changed_later_adds_what_it_says():
    processor = make_processor()
    assert processor.encode_text("b") == processor.tokenizer("b", add_special_tokens=False).input_ids
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    processor.tokenizer.bos_token = "<|im_start|>"  # any setting that is known to matter
    assert processor.encode_text("b")[0] == 256


def test_groups_of_arguments_are_not_given_twice():
    processor = make_processor()
    with pytest.raises(ValueError, match=r"\['padding'\] were given twice"):
        processor(make_image(), "<image>", text_kwargs=dict(padding=False), padding=True)
    with pytest.raises(ValueError, match="given twice"):
        processor(make_image(), "<image>", images_kwargs=dict(do_rescale=False), do_rescale=True)
    grouped = processor(
        make_image(), "<image>", images_kwargs=dict(do_rescale=False), text_kwargs=dict(padding=True)
    )
    flat = processor(make_image(), "<image>", do_rescale=False, padding=True)
    assert grouped.pixel_values.equal(flat.pixel_values) and not flat.pixel_values.equal(
        processor(make_image(), "<image>").pixel_values
    )


def test_a_tokenizers_own_padding():
    processor = make_processor()
    processor.tokenizer.init_kwargs |= dict(padding="max_length", max_length=20)
    assert processor(make_image(), "<image>ab").input_ids.shape == (1, 20)
    assert processor(make_image(), "<image>ab", padding=True).input_ids.shape == (1, 6)


def test_places_of_images_in_the_expanded_text():
    processor = make_processor()
    text = "a <image> b <image>c"
    out = processor(
        [make_image()] * 2,
        text,
        return_text_replacement_offsets=True,
        return_offsets_mapping=True,
        tokens=[3, 2],
    )
    expanded = text.replace("<image>", "<image>" * 3, 1)[: -len("<image>c")] + "<image>" * 2 + "c"
    first, second = out.text_replacement_offsets[0]
    for found, n in ((first, 3), (second, 2)):
        start, end = found["new_span"]
        assert expanded[start:end] == found["replacement"] == "<image>" * n
        start, end = found["span"]
        assert text[start:end] == found["text"] == "<image>"
    for i, (start, end) in zip(out.input_ids[0].tolist(), out.offset_mapping[0], strict=True):
        assert processor.tokenizer.decode([i]) == expanded[start:end]


def test_images_without_text():
    processor = make_processor()
    out = processor(images=[make_image(), make_image(1)])
    assert list(out) == ["pixel_values"] and out.pixel_values.shape == (2, 3, 224, 224)


def test_images_that_are_nowhere():
    processor = make_processor()
    for image, message in {
        "data:image/png;base64,%%": "in base64",
        "http://127.0.0.1:9/a.png": "fetched",
    }.items():
        with pytest.raises(ValueError, match=message):
            processor(image, "<image>")


def test_named_chat_templates():
    tokenizer = byte_tokenizer()
    own = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.chat_template = {"rag": "R", "default": own}
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, 4)
    assert processor.build_prompt([dict(role="user", content="Q")]) == "Q</s>"
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    with pytest.raises(ValueError, match=r"several chat templates, \['rag', 'tool_use'\]"):
        build_processor(CLIPImageProcessorPil(), tokenizer, 4)


@pytest.mark.parametrize("template", ["v1", "plain", "chat"])
def test_tokenizers_without_eos_are_refused(template):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.chat_template = "{{ messages[0]['content'] + eos_token }}"
    with pytest.raises(ValueError, match=r"no EOS token .*tokenizer.eos_token = "):
        build_processor(CLIPImageProcessorPil(), tokenizer, 4, template)


def test_tokenizers_without_bos():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, 4, "v1")
    row, want = processor.encode_conversation(QA), make_processor("v1").encode_conversation(QA)
    assert row == want
    tokenizer.chat_template = "{{ bos_token + messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat template refuses .*bos_token"):
        build_processor(CLIPImageProcessorPil(), tokenizer, 4).build_prompt("Q")


def test_system_prompts_that_have_no_place():
    tokenizer = byte_tokenizer()
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="Q")]
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    refusing += "{{ messages[-1]['content'] }}"
    for template, message in {
        "{{ messages[-1]['content'] }}": "'Be brief.' is not supported by this chat template",
        refusing: "refuses .*: no",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            build_processor(CLIPImageProcessorPil(), tokenizer, 4).build_prompt(messages)
    assert make_processor("plain").build_prompt(messages) == ""
    assert make_processor("v1").build_prompt(messages).startswith("Be brief. USER: Q")


@pytest.mark.parametrize(
    "template,message",
    [
        ("Hi!", "text of a message of the user: 'delta-question' is written as 'Hi!'"),
        ("{% for m in messages %}<{{ m['role'] }}>{% endfor %}", "message of the user"),
        ("{{ messages[0]['content'] }}", "message of the assistant"),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}", "''"),
        ("{% for m in %}", "no valid Jinja text"),
    ],
)
def test_templates_that_drop_the_text_are_refused(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"template='chat'.*{message}"):
        build_processor(CLIPImageProcessorPil(), tokenizer, 4, "chat")


@pytest.mark.parametrize(
    "content",
    [
        7,
        None,
        [7],
        [dict(type="text")],
        [dict(type="video", path="a.mp4"), dict(type="text", text="Q")],
        [dict(type="text", text="Q"), dict(type="audio", url="a.wav")],
    ],
)
@pytest.mark.parametrize("tokenize", [True, False])
def test_chats_with_other_contents_are_refused_in_a_sentence(content, tokenize):
    chat = [dict(role="user", content="<image>"), dict(role="user", content=content)]
    for conversation in (chat, [chat, chat]):
        with pytest.raises(ValueError, match="message 1 has the .*text='…'|message 1 has the content"):
            make_processor().apply_chat_template(conversation, tokenize=tokenize, return_dict=tokenize)


def test_arrays_are_images_as_files_are():
    processor = make_processor()
    image = make_image()
    array = np.asarray(image)
    gray = np.asarray(image.convert("L"))
    want = processor(image, "<image>").pixel_values
    for same in (array, torch.tensor(array).permute(2, 0, 1), array.astype(float), array[None]):
        assert processor(same, "<image>").pixel_values.equal(want)
    want = processor(image.convert("L"), "<image>").pixel_values
    assert processor(gray, "<image>").pixel_values.equal(want)
    for scaled in (array / 255, torch.tensor(array).permute(2, 0, 1) / 255):
        with pytest.raises(ValueError, match="do_rescale=False"):
            processor(scaled, "<image>")
    pixels = processor(gray.astype(np.float32) / 255, "<image>", do_rescale=False).pixel_values
    assert (pixels - want).abs().max() < 0.05
    with pytest.raises(ValueError, match="gray or RGB"):
        processor(np.zeros((8, 8, 4)), "<image>", do_rescale=False)


def test_the_backend_is_not_saved_with_the_tokenizer(tmp_path):
    make_processor().save_pretrained(tmp_path / "a")
    DeltaLlavaProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    saved = [(tmp_path / x / "tokenizer_config.json").read_text() for x in "ab"]
    assert [json.loads(text).get("backend") for text in saved] == ["tokenizers"] * 2


@pytest.mark.parametrize("unknown", [dict(stride=3), dict(videos=[1]), dict(is_split_into_words=True)])
def test_unknown_arguments(unknown):
    with pytest.raises(ValueError, match="unknown arguments"):
        make_processor()(make_image(), "<image>", **unknown)


def test_cutting_spares_images():
    processor, text = make_processor(), "ab<image>cdef"
    whole = processor(make_image(), text).input_ids[0].tolist()
    for length in range(1, 6):
        with pytest.raises(ValueError, match="max_length=6 or more"):
            processor(make_image(), text, max_length=length)
    for length in range(6, len(whole) + 2):
        cut = processor(make_image(), text, max_length=length).input_ids[0].tolist()
        assert cut == whole[:length]


def test_saved_and_reloaded(tmp_path):
    processor = make_processor("chat", tokens=9)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "delta_llava"}))
    text = processor.build_prompt(QA[:1])
    for kind in (AutoProcessor, DeltaLlavaProcessor):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is DeltaLlavaProcessor and again.tokens == 9
        assert again.chat_template == JOIN_PARTS + CHATML
        assert again.build_prompt(QA[:1]) == text
        a, b = (p([make_image()] * 2, [text, "x" + text]) for p in (again, processor))
        assert sorted(a) == sorted(b)
        assert all(torch.equal(a[k], b[k]) for k in b)
        assert again.encode_conversation(TWO_ANSWERS) == processor.encode_conversation(TWO_ANSWERS)


def test_model_and_processor_agree_on_the_image_token():
    tokenizer = byte_tokenizer(pieces=("<|im_start|>",))
    with pytest.raises(ValueError, match="does not know '<image>'"):
        DeltaLlavaProcessor(CLIPImageProcessorPil(), tokenizer)
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, template="v1")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 259
    assert tokenizer("a<image>b").input_ids[1:-1] == [259]


@pytest.mark.parametrize(
    "template,message",
    [
        ("vicuna", "'plain', 'v1', 'chatml', 'chat'"),
        ("chat", "no chat template"),
        ("chatml", "stops at '</s>'"),
    ],
)
def test_templates_that_are_not_there(template, message):
    with pytest.raises(ValueError, match=message):
        build_processor(CLIPImageProcessorPil(), byte_tokenizer(), template=template)


# ---------------------------------------------------------------- the model on what the processor makes


def generate(model, processor, prompts, images, **kwargs):
    batch = processor(images, prompts, **kwargs)
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None, **kwargs)
    return ids[:, -6:]


@pytest.mark.parametrize("tokens", [None, 4, 1])
def test_a_batch_answers_as_its_rows_alone(tokens):
    model, processor = tiny(), make_processor("v1", tokens=16)
    questions = (
        "Hm?",
        "What may this picture show?",
        "And here, in some more words, what is there to be seen?",
    )
    prompts = [f"<image>\n{question}" for question in questions]
    images = [make_image(i) for i in range(3)]
    kwargs = {} if tokens is None else dict(tokens=tokens)
    together = generate(model, processor, prompts, images, **kwargs)
    logits = model(**processor(images, prompts, **kwargs), **kwargs).logits[:, -1]
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = generate(model, processor, prompt, image, **kwargs)
        assert torch.equal(together[i : i + 1], alone)
        logits_alone = model(**processor(image, prompt, **kwargs), **kwargs).logits[0, -1]
        assert_close(logits[i], logits_alone, rtol=1e-4, atol=1e-4)


def test_budgets_of_model_and_processor_must_agree():
    batch = make_processor()(make_image(), "<image>", tokens=9)
    with pytest.raises(ValueError, match="same tokens"):
        tiny()(**batch, tokens=4)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "template,text",
    [
        ("plain", "A cat.\nBlack.\n"),
        ("v1", " A cat.</s> Black.</s>"),
        ("chatml", "A cat.<|im_end|>Black.<|im_end|>"),
        ("chat", "A cat.<|im_end|>Black.<|im_end|>"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_answers_are_learned_and_nothing_else(template, text, tokens):
    processor = make_processor(template)
    row = processor.encode_conversation(TWO_ANSWERS, tokens=tokens)
    ids, labels = row["input_ids"], row["labels"]
    assert learned_text(processor, row) == text
    assert ids.count(IMAGE) == tokens and IMAGE not in labels
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    whole = processor.build_prompt(TWO_ANSWERS, add_generation_prompt=False)
    assert ids == processor(make_image(), whole, tokens=tokens).input_ids[0].tolist()


def test_llava_turns_are_messages():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    assert as_messages(turns) == QA
    assert make_processor().encode_conversation(turns) == make_processor().encode_conversation(QA)


def test_an_answer_that_repeats_the_question_or_the_marker():
    processor = make_processor()
    row = processor.encode_conversation(
        [
            dict(role="user", content="ASSISTANT: A cat."),
            dict(role="assistant", content="ASSISTANT: A cat. USER:"),
        ]
    )
    assert learned_text(processor, row) == " ASSISTANT: A cat. USER:</s>"


def merging_tokenizer(pairs):
    "A tokenizer in which some letters become one token, across the border of prompt and answer too."
    vocab = {piece: i for piece, i in byte_tokenizer().get_vocab().items() if i < 256}
    for a, b in pairs:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def test_a_token_across_the_border_is_learned():
    tokenizer = merging_tokenizer([(":", "Ġ")])  # "ASSISTANT: " ends in one token ": "
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, template="v1")
    row = processor.encode_conversation(QA)
    first = row["labels"][first_learned(row)]
    assert tokenizer.decode([first]).strip() in (":", "Ġ", ":Ġ")
    assert row["labels"].count(first) == 1
    assert [i for i in row["input_ids"] if i == tokenizer.eos_token_id] == [row["labels"][-1]]


def test_a_template_that_rewrites_is_refused():
    processor = make_processor()
    processor.chat_template = "{{ messages | length }}" + JOIN_PARTS + TEMPLATES["v1"]
    with pytest.raises(ValueError, match="rewrites the conversation"):
        processor.encode_conversation(QA)


@pytest.mark.parametrize(
    "conversation,message",
    [
        ([QA[0], dict(role="assistant", content=" \n")], "empty answer"),
        ([QA[0], dict(role="assistant", content=[])], "empty answer"),
        ([QA[0]], "nothing is supervised"),
        ([], "must begin"),
        ([QA[1]], "must begin"),
        ([QA[0], dict(role="robot", content="hi")], "from 'robot'"),
        ([{"from": "human"}], "content None"),
    ],
)
def test_conversations_from_which_nothing_can_be_learned(conversation, message):
    with pytest.raises(ValueError, match=message):
        make_processor().encode_conversation(conversation)


def test_cut_rows_keep_whole_images_and_some_answer():
    processor = make_processor()
    whole = processor.encode_conversation(QA)
    n, answer = len(whole["labels"]), first_learned(whole)
    last = n - 1 - whole["input_ids"][::-1].index(IMAGE)
    for length in range(1, last + 1):
        with pytest.raises(ValueError, match="would cut an image"):
            processor.encode_conversation(QA, max_length=length)
    for length in range(last + 1, answer + 1):
        with pytest.raises(ValueError, match="nothing is supervised"):
            processor.encode_conversation(QA, max_length=length)
    for length in range(answer + 1, n + 2):
        cut = {k: v[:length] for k, v in whole.items()}
        assert processor.encode_conversation(QA, max_length=length) == cut


# ---------------------------------------------------------------- a tokenizer like Llama's


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    "A folder with Llama's files: a SentencePiece model with byte fallback and no tokenizer.json."
    folder = tmp_path_factory.mktemp("llama")
    sentence = "USER: What is {i}? ASSISTANT: A cat. Black. {i} dogs and a fox, the brown one."
    (folder / "text").write_text("\n".join(sentence.format(i=i) for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    config = dict(
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        legacy=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama")))
    return folder


@pytest.mark.parametrize("template", ["plain", "v1"])
def test_answers_are_learned_with_a_tokenizer_like_llamas(llama, template):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, tokens=4, template=template)
    row = processor.encode_conversation(QA if template == "plain" else TWO_ANSWERS)
    ids, labels = row["input_ids"], row["labels"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(processor.image_token_id) == 4
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    answers = "A cat.\n" if template == "plain" else "A cat.</s>Black.</s>"
    assert learned_text(processor, row).replace(" ", "") == answers.replace(" ", "")
    others = [i for i, label in zip(ids, labels, strict=True) if label < 0 and i != processor.image_token_id]
    assert "cat" not in tokenizer.decode(others, skip_special_tokens=True)
    prompt = processor(make_image(), processor.build_prompt("What is it?")).input_ids[0].tolist()
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    "image_processor,shape",
    [
        (Siglip2ImageProcessorPil(max_num_patches=64), r"\[64, 768\]"),  # NaFlex: patches of any aspect ratio
        (Qwen2VLImageProcessorPil(), r"\[1176\]"),
        (CLIPImageProcessorPil(crop_size=dict(height=224, width=112)), r"\[3, 224, 112\]"),
    ],
    ids=["naflex", "qwen-vl", "not square"],
)
def test_processors_without_square_images_are_refused(image_processor, shape):
    processor = make_processor()
    processor.image_processor = image_processor
    with pytest.raises(ValueError, match=f"pixel_values of shape {shape}.*square grid.*image_processor_for"):
        processor(images=[make_image()], text="<image>")
