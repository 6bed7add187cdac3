"The scores: a model that reads its picture passes every one, a blind or random one stands at chance, and wrong input is named."
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BitImageProcessorPil, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

import tiny_vlm
from delta_llava import evaluate
from delta_llava.data import concept_names, plan_scene, with_article
from delta_llava.evaluate import another, answer_losses, naming, right_and_shuffled, see
from delta_llava.processor import build_processor
from delta_llava.vlm import DeltaLlavaForConditionalGeneration

WORDS = ["<unk>", "<s>", "</s>", *sorted({w for n in concept_names() for w in with_article(n).split()} |
                                         {"A", "An", "and", ",", ".", "What", "is", "in", "the", "picture", "?", "user", "assistant"})]

@pytest.fixture(scope="module")
def processor():
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return build_processor(BitImageProcessorPil(size=dict(height=56, width=56), crop_size=dict(height=56, width=56)), tokenizer, tokens=4, template="v1")

def scenes(n, count=(1, 1)):
    "Captioned scenes without their pictures."
    rows = []
    for i in range(n):
        things = [dict(name=o.name) for o in plan_scene(i, "train", seed=5, n_objects=count).objects]
        said = " and ".join(with_article(t["name"]) for t in things)
        rows.append(dict(objects=things, conversations=[{"from": "human", "value": "<image>\nWhat is in the picture?"},
                                                        {"from": "gpt", "value": said[0].upper() + said[1:] + "."}]))
    return rows

class Cache:
    def __init__(self, seen): self.seen = seen
    def batch_repeat_interleave(self, n): self.seen = self.seen.repeat_interleave(n, dim=0)

class Head(nn.Module):
    def forward(self, hidden): return hidden

class Eyes(nn.Module):
    def forward(self, input_ids, mm_encoder_outputs=None, past_key_values=None, tokens=None, use_cache=None, attention_mask=None):
        seen = torch.stack(mm_encoder_outputs["image"].pooler_output).mean(1) if mm_encoder_outputs else past_key_values.seen
        return BaseModelOutputWithPast(last_hidden_state=seen[:, None].expand(-1, input_ids.shape[1], -1), past_key_values=Cache(seen))

class Reader(DeltaLlavaForConditionalGeneration):
    "A model whose next word is any that its visual tokens hold: one channel for each word."
    def __init__(self):
        nn.Module.__init__(self)
        self.model,self.lm_head,self.some = Eyes(),Head(),nn.Parameter(torch.zeros(1))

def words_seen(rows, processor, seeing=True):
    "Visual tokens: the words of the names in the picture, and every word that is no name."
    names = {w for n in concept_names() for w in n.split()}
    visual = torch.zeros(len(rows), 4, len(processor.tokenizer))
    for i,row in enumerate(rows):
        shown = {w for o in row["objects"] for w in o["name"].split()}
        for j,w in enumerate(WORDS): visual[i, :, j] = 20. if w not in names or seeing and w in shown else 0.
    return visual

# ---------------------------------------------------------------- a model that sees, and ones that do not

@pytest.mark.parametrize("count", [(1, 1), (2, 3)])
def test_a_model_that_sees_passes(processor, count):
    rows = scenes(48, count)
    visual = words_seen(rows, processor)
    scores = right_and_shuffled(Reader().eval(), processor, rows, visual)
    assert scores["p"] < 1e-6 and scores["right"] + 1 < scores["shuffled"]
    assert naming(Reader().eval(), processor, rows, visual) == 1

def test_a_model_that_sees_fails_on_other_pictures(processor):
    rows = scenes(48)
    visual = words_seen(rows, processor)
    moved = [rows[j] for j in another(48).tolist()]
    assert right_and_shuffled(Reader().eval(), processor, moved, visual)["p"] > .99  # this shuffle brings the right ones back
    assert naming(Reader().eval(), processor, moved, visual) < .3

@pytest.mark.parametrize("value", [1., float("nan")])
def test_a_model_that_says_the_same_of_everything_names_nothing(processor, value):
    rows = scenes(6)
    assert naming(Reader().eval(), processor, rows, torch.full((6, 4, len(processor.tokenizer)), value)) == 0

def test_random_tokens_stand_at_chance(processor):
    rows = scenes(96)
    g = torch.Generator().manual_seed(0)
    noise = words_seen(rows, processor, seeing=False) + torch.randn(96, 1, len(processor.tokenizer), generator=g)
    scores = right_and_shuffled(Reader().eval(), processor, rows, noise)
    assert scores["p"] > .01 and abs(scores["right"] - scores["shuffled"]) < .3
    assert .0 <= naming(Reader().eval(), processor, rows, noise) < .2  # chance is 1/16

def test_scores_do_not_depend_on_the_batch(processor):
    rows = scenes(11, (1, 3))
    visual = words_seen(rows, processor) + torch.randn(11, 1, len(processor.tokenizer), generator=torch.Generator().manual_seed(0))
    whole = answer_losses(Reader().eval(), processor, rows, visual, batch_size=11)
    torch.testing.assert_close(answer_losses(Reader().eval(), processor, rows, visual, batch_size=3), whole)
    torch.testing.assert_close(answer_losses(Reader().eval(), processor, rows[::-1], visual.flip(0), batch_size=2), whole.flip(0))
    assert naming(Reader().eval(), processor, rows, visual, batch_size=2) == naming(Reader().eval(), processor, rows, visual, batch_size=11)

# ---------------------------------------------------------------- the parts

@pytest.mark.parametrize("count", [(1, 1), (2, 3), (4, 4)])
def test_candidates_one_shown_the_others_absent(count):
    rows = scenes(40, count)
    lists = evaluate._candidates(rows, 16, 0)
    for row,names in zip(rows, lists):
        shown = {o["name"] for o in row["objects"]}
        assert names[0] in shown and not shown & set(names[1:]) and len(set(names)) == 16 and set(names) <= set(concept_names())
    assert lists == evaluate._candidates(rows, 16, 0) != evaluate._candidates(rows, 16, 1)
    if count != (1, 1): assert len({[o["name"] for o in r["objects"]].index(n[0]) for r,n in zip(rows, lists)}) > 1  # not always the first thing

@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_another_is_never_the_same_picture(n, seed):
    order = another(n, seed)
    assert sorted(order.tolist()) == list(range(n)) and not (order == torch.arange(n)).any()
    assert order.equal(another(n, seed))
    assert n < 64 or not order.equal(another(n, seed + 1))

def test_one_picture_has_no_other(processor):
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"n={n} must be at least 2"): another(n)
    rows = scenes(1)
    with pytest.raises(ValueError, match="must be at least 2"): right_and_shuffled(Reader().eval(), processor, rows, words_seen(rows, processor))

def test_seeing_is_the_projector_in_batches_at_any_budget():
    model = tiny_vlm.tiny()
    config = tiny_vlm.projector_config()
    features = torch.randn(5, config.grid**2, config.d_levels, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 4, config.tokens):
        visual = see(model, features, tokens, batch_size=2)
        torch.testing.assert_close(visual, model.model.multi_modal_projector(features, tokens=tokens).detach())
        assert visual.shape == (5, tokens, 64) and not visual.requires_grad
    torch.testing.assert_close(see(model, list(features)), see(model, features, config.tokens))
    with pytest.raises(ValueError, match="training mode"): see(model.train(), features)

def test_scores_refuse(processor):
    rows = scenes(3)
    visual = words_seen(rows, processor)
    for score in (answer_losses, naming):
        with pytest.raises(ValueError, match="3 pictures for 2 rows"): score(Reader().eval(), processor, rows[:2], visual)
    for candidates in (1, 62):
        with pytest.raises(ValueError, match=f"candidates={candidates} must lie in 2..61"): naming(Reader().eval(), processor, rows, visual, candidates=candidates)
