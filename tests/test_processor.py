"Prompts, image tokens and labels: templates to the letter, left padding, whole images, spans of the answers."
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tiny_vlm import IMAGE, byte_tokenizer, images, projector_config, tiny
from torch.testing import assert_close
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil

from delta_llava.processor import JOIN_PARTS, TEMPLATES, DeltaLlavaProcessor, as_messages, build_processor

# strings of LLaVA's conversation.py (haotian-liu/LLaVA @ c121f04, Apache-2.0)
PROMPTS = json.loads((Path(__file__).parent/"data"/"prompts.json").read_text())
CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONVERSATIONS = {
    "single": [dict(role="user", content="<image>\nWhat is weird about this picture?")],
    "qa": [dict(role="user", content="<image>\nWhat is it?"), dict(role="assistant", content="A cat.")],
    "multi": [dict(role="user", content="<image>\nWhat is it?"), dict(role="assistant", content="A cat."), dict(role="user", content="Colour?"),
              dict(role="assistant", content="Black."), dict(role="user", content="Sure?")]}
QA,TWO = CONVERSATIONS["qa"],CONVERSATIONS["multi"][:4]

def make(template="v1", tokens=4, size=224):
    tokenizer = byte_tokenizer(eos="<|im_end|>" if template.startswith("chat") else "</s>")
    if template == "chat": tokenizer.chat_template = CHATML
    return build_processor(CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size), tokenizer, tokens=tokens, template=template)

def image(seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8))

def learned(processor, row): return processor.tokenizer.decode([l for l in row["labels"] if l >= 0])


# templates

@pytest.mark.parametrize("template,name", [(t, n) for t,p in PROMPTS.items() for n in p])
def test_renderings_are_llavas(template, name):
    conversation = CONVERSATIONS[name]
    asks = template != "plain" and conversation[-1]["role"] == "user"
    assert make(template).apply_chat_template(conversation, add_generation_prompt=asks) == PROMPTS[template][name]

def test_plain_drops_the_question():
    assert make("plain").apply_chat_template(QA) == "<image>A cat.\n"

@pytest.mark.parametrize("template", ["plain", "v1", "chatml", "chat"])
def test_content_in_parts_reads_as_content_in_one(template):
    parts = [dict(role="user", content=[dict(type="image"), dict(type="text", text="What is it?")]), dict(role="assistant", content=[dict(type="text", text="A cat.")])]
    processor = make(template)
    assert processor.apply_chat_template(parts) == processor.apply_chat_template(QA)
    assert processor.encode_conversation(parts) == processor.encode_conversation(QA)

def test_chatml_has_no_system_prompt_of_its_own():
    said = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    processor = make("chatml")
    assert processor.apply_chat_template(QA[:1], add_generation_prompt=True) == said
    assert processor.apply_chat_template(QA) == said + "A cat.<|im_end|>\n"
    assert processor.apply_chat_template([dict(role="system", content="Be brief."), *QA]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + said + "A cat.<|im_end|>\n"

def test_chat_is_the_llms_own_template():
    processor = make("chat")
    text = processor.apply_chat_template(QA[:1], add_generation_prompt=True)
    assert text == processor.tokenizer.apply_chat_template(QA[:1], add_generation_prompt=True, tokenize=False, chat_template=CHATML)

def test_own_system_prompt():
    text = make("v1").apply_chat_template([dict(role="system", content="Be brief."), *QA[:1]], add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat is it? ASSISTANT:"


# calls

def test_image_tokens_and_pixels():
    processor = make()
    out = processor([image(), image(1)], ["<image> <image>", "none"], tokens=9)
    assert (out.input_ids == IMAGE).sum(1).tolist() == [18, 0]
    assert out.pixel_values.shape == (2, 3, 224, 224) and out.pixel_values.dtype == torch.float32
    ids = out.input_ids[0].tolist()
    assert ids == [IMAGE]*9 + processor.tokenizer(" ").input_ids + [IMAGE]*9
    assert (processor(image(), "<image>").input_ids == IMAGE).sum() == 4  # the processor's own budget
    assert "pixel_values" not in processor(text="none")

def test_chat_template_with_pictures_in_one_call():
    processor = make("chat")
    conversation = [dict(role="user", content=[dict(type="image", image=image()), dict(type="text", text="What is it?")])]
    out = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    by_hand = processor(image(), processor.apply_chat_template(conversation, add_generation_prompt=True))
    assert sorted(out) == sorted(by_hand) and torch.equal(out.input_ids, by_hand.input_ids) and torch.equal(out.pixel_values, by_hand.pixel_values)

def test_padding_is_on_the_left():
    processor = make()
    out = processor([image(), image()], ["<image>\na", "<image>\na longer one"])
    assert out.attention_mask[0].tolist() == [0]*11 + [1]*6 and out.attention_mask[1].all()

def test_trainers_may_pad_otherwise():
    processor,two = make(),([image(), image()], ["<image>\na", "<image>\na longer one"])
    out = processor(*two, padding=True, padding_side="right", pad_to_multiple_of=8, truncation=False, max_length=3)
    assert out.attention_mask[0].tolist() == [1]*6 + [0]*18 and out.input_ids.shape[1] == 24
    assert out.input_ids[0, :6].tolist() == processor(*two).input_ids[0, 11:].tolist()

@pytest.mark.parametrize("images,text,what", [(0, "<image>", "name 1 image"), (2, "<image>", "2 were given"), (1, "no place", "name 0 image"), (1, None, "text=None"), (1, [], "text=")])
def test_images_and_places_must_agree(images, text, what):
    with pytest.raises(ValueError, match=what): make()([image()]*images or None, text)

@pytest.mark.parametrize("unknown", [dict(stride=3), dict(videos=[1]), dict(is_split_into_words=True)])
def test_unknown_arguments(unknown):
    with pytest.raises(ValueError, match="unknown arguments"): make()(image(), "<image>", **unknown)

def test_cutting_spares_images():
    processor,text = make(), "ab<image>cdef"
    whole = processor(image(), text).input_ids[0].tolist()
    for length in range(1, len(whole) + 2):
        if length < 6:
            with pytest.raises(ValueError, match="max_length=6 or more"): processor(image(), text, max_length=length)
        else: assert processor(image(), text, max_length=length).input_ids[0].tolist() == whole[:length]

def test_saved_and_reloaded(tmp_path):
    processor = make("chat", tokens=9)
    processor.save_pretrained(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps({"model_type": "delta_llava"}))
    for again in (AutoProcessor.from_pretrained(tmp_path), DeltaLlavaProcessor.from_pretrained(tmp_path)):
        assert type(again) is DeltaLlavaProcessor and again.tokens == 9 and again.chat_template == JOIN_PARTS + CHATML
        text = processor.apply_chat_template(QA[:1], add_generation_prompt=True)
        assert again.apply_chat_template(QA[:1], add_generation_prompt=True) == text
        a,b = again([image()]*2, [text, "x" + text]),processor([image()]*2, [text, "x" + text])
        assert all(torch.equal(a[k], b[k]) for k in b) and sorted(a) == sorted(b)
        assert again.encode_conversation(TWO) == processor.encode_conversation(TWO)

def test_model_and_processor_agree_on_the_image_token():
    tokenizer = byte_tokenizer(pieces=("<|im_start|>",))
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, template="v1")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 259
    assert tokenizer("a<image>b").input_ids[1:-1] == [259]

@pytest.mark.parametrize("template,what", [("vicuna", "'plain', 'v1', 'chatml', 'chat'"), ("chat", "no chat template"), ("chatml", "stops at '</s>'")])
def test_templates_that_are_not_there(template, what):
    with pytest.raises(ValueError, match=what): build_processor(CLIPImageProcessorPil(), byte_tokenizer(), template=template)


# the model on what the processor makes

def answers(model, processor, prompts, images, **kwargs):
    batch = processor(images, prompts, **kwargs)
    words = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None, **kwargs)
    return words[:, batch.input_ids.shape[1]:]

@pytest.mark.parametrize("tokens", [None, 4, 1])
def test_a_batch_answers_as_its_rows_alone(tokens):
    model,processor = tiny(),make("v1", tokens=16)
    prompts = [f"<image>\n{q}" for q in ("Hm?", "What may this picture show?", "And here, in some more words, what is there to be seen?")]
    images = [image(i) for i in range(3)]
    kwargs = {} if tokens is None else dict(tokens=tokens)
    together = answers(model, processor, prompts, images, **kwargs)
    alone = torch.cat([answers(model, processor, p, i, **kwargs) for p,i in zip(prompts, images)])
    assert torch.equal(together, alone)
    batch = processor(images, prompts, **kwargs)
    logits = model(**batch, **kwargs).logits[:, -1]
    for i in range(3): assert_close(logits[i], model(**processor(images[i], prompts[i], **kwargs), **kwargs).logits[0, -1], rtol=1e-4, atol=1e-4)

def test_budgets_of_model_and_processor_must_agree():
    with pytest.raises(ValueError, match="same tokens"): tiny()(**make()(image(), "<image>", tokens=9), tokens=4)


# labels

@pytest.mark.parametrize("template,text", [("plain", "A cat.\nBlack.\n"), ("v1", " A cat.</s> Black.</s>"), ("chatml", "A cat.<|im_end|>Black.<|im_end|>"), ("chat", "A cat.<|im_end|>Black.<|im_end|>")])
@pytest.mark.parametrize("tokens", [1, 9])
def test_answers_are_learned_and_nothing_else(template, text, tokens):
    processor = make(template)
    row = processor.encode_conversation(TWO, tokens=tokens)
    assert learned(processor, row) == text
    assert len(row["labels"]) == len(row["input_ids"]) and row["input_ids"].count(IMAGE) == tokens
    assert all(l in (-100, i) for i,l in zip(row["input_ids"], row["labels"])) and IMAGE not in row["labels"]
    whole = processor(image(), processor.apply_chat_template(TWO), tokens=tokens).input_ids[0].tolist()
    assert row["input_ids"] == whole

@pytest.mark.parametrize("template", ["plain", "v1", "chatml", "chat"])
def test_training_row_begins_with_the_prompt_of_inference(template):
    processor = make(template)
    row = processor.encode_conversation(QA)
    prompt = processor(image(), processor.apply_chat_template(QA[:1], add_generation_prompt=True)).input_ids[0].tolist()
    assert row["input_ids"][:len(prompt)] == prompt and [l >= 0 for l in row["labels"]].index(True) == len(prompt)

def test_llava_turns_are_messages():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    assert as_messages(turns) == QA
    assert make().encode_conversation(turns) == make().encode_conversation(QA)

def test_an_answer_that_repeats_the_question_or_the_marker():
    processor = make()
    row = processor.encode_conversation([dict(role="user", content="ASSISTANT: A cat."), dict(role="assistant", content="ASSISTANT: A cat. USER:")])
    assert learned(processor, row) == " ASSISTANT: A cat. USER:</s>"

def merging(pieces):
    "A tokenizer in which some letters become one token, across the border of prompt and answer too."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    base = byte_tokenizer()
    vocab = {k: v for k,v in base.get_vocab().items() if v < 256}
    merges = []
    for a,b in pieces:
        vocab[a + b] = len(vocab)
        merges.append((a, b))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", pad_token="</s>")

def test_a_token_across_the_border_is_learned():
    processor = build_processor(CLIPImageProcessorPil(), merging([(":", "Ġ")]), template="v1")  # "ASSISTANT: " ends in one token ": "
    row = processor.encode_conversation(QA)
    first = [l for l in row["labels"] if l >= 0][0]
    assert processor.tokenizer.decode([first]).strip() in (":", "Ġ", ":Ġ") and row["labels"].count(first) == 1
    assert [i for i in row["input_ids"] if i == processor.tokenizer.eos_token_id] == [row["labels"][-1]]

def test_bos_is_not_doubled_nor_learned():
    processor = make("v1")
    processor.chat_template = JOIN_PARTS + "{{ bos_token }}" + TEMPLATES["v1"]
    processor.tokenizer.add_bos_token = True
    row = processor.encode_conversation(QA)
    assert row["input_ids"].count(processor.tokenizer.bos_token_id) == 1 and row["labels"][0] == -100
    assert learned(processor, row) == " A cat.</s>"

def test_a_template_that_rewrites_is_refused():
    processor = make()
    processor.chat_template = "{{ messages | length }}" + JOIN_PARTS + TEMPLATES["v1"]
    with pytest.raises(ValueError, match="rewrites the conversation"): processor.encode_conversation(QA)

@pytest.mark.parametrize("conversation,what", [
    ([QA[0], dict(role="assistant", content=" \n")], "empty answer"), ([QA[0], dict(role="assistant", content=[])], "empty answer"),
    ([QA[0]], "nothing is supervised"), ([], "must begin"), ([QA[1]], "must begin"), ([QA[0], dict(role="robot", content="hi")], "from 'robot'"),
    ([{"from": "human"}], "content None")])
def test_conversations_from_which_nothing_can_be_learned(conversation, what):
    with pytest.raises(ValueError, match=what): make().encode_conversation(conversation)

def test_cut_rows_keep_whole_images_and_some_answer():
    processor = make()
    whole = processor.encode_conversation(QA)
    n,answer = len(whole["labels"]),[l >= 0 for l in whole["labels"]].index(True)
    last = n - 1 - whole["input_ids"][::-1].index(IMAGE)
    for length in range(1, n + 2):
        if length <= last:
            with pytest.raises(ValueError, match="would cut an image"): processor.encode_conversation(QA, max_length=length)
        elif length <= answer:
            with pytest.raises(ValueError, match="nothing is supervised"): processor.encode_conversation(QA, max_length=length)
        else: assert processor.encode_conversation(QA, max_length=length) == {k: v[:length] for k,v in whole.items()}


# a tokenizer of Llama's kind

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    "A folder with Llama's files: a SentencePiece model with bytes to fall back on and no tokenizer.json."
    folder = tmp_path_factory.mktemp("llama")
    (folder/"text").write_text("\n".join(f"USER: What is {i}? ASSISTANT: A cat. Black. {i} dogs and a fox, the brown one." for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(input=str(folder/"text"), model_prefix=str(folder/"tokenizer"), vocab_size=380, model_type="bpe", byte_fallback=True, minloglevel=2, character_coverage=1.,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False, bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
    (folder/"config.json").write_text(json.dumps(dict(model_type="llama")))
    return folder

@pytest.mark.parametrize("template", ["plain", "v1"])
def test_answers_are_learned_with_a_tokenizer_of_llamas_kind(llama, template):
    processor = build_processor(CLIPImageProcessorPil(), AutoTokenizer.from_pretrained(llama), tokens=4, template=template)
    conversation = QA if template == "plain" else TWO
    row = processor.encode_conversation(conversation)
    ids, labels = row["input_ids"], row["labels"]
    assert ids[0] == processor.tokenizer.bos_token_id and ids.count(processor.tokenizer.bos_token_id) == 1 and ids.count(processor.image_token_id) == 4
    assert all(l in (-100, i) for i, l in zip(ids, labels))
    said = "A cat.\n" if template == "plain" else "A cat.</s>Black.</s>"
    assert learned(processor, row).replace(" ", "") == said.replace(" ", "")
    assert processor.tokenizer.decode([i for i, l in zip(ids, labels) if l < 0 and i != processor.image_token_id], skip_special_tokens=True).count("cat") == 0
