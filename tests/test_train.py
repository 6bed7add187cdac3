"Stage 1: a calibrated start that keeps its promises, a run that survives being killed bit for bit, and a record of every run."
import json, os, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, LlamaConfig, ProcessorMixin, TrainerCallback

from delta_llava.config import dinov2_s14
from delta_llava.data import Collator
from delta_llava.projector import DeltaProjector
from delta_llava.compressors.m3 import M3, M3Config
from delta_llava.train import ElasticCollator, StageTrainer, freeze, last_checkpoint, train_stage, stage_arguments, write_card, write_record
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, save_projector

SMALL = replace(dinov2_s14(56, tokens=4, d_llm=32), d_vision=128, levels=(1, 2), heads=4)

class TinyProcessor(ProcessorMixin):
    "An image of V tokens, then the letters of the answer."
    questions = False
    def __init__(self): pass
    class tokenizer: pad_token_id = 0
    def encode_conversation(self, conversation, tokens=None, max_length=None):
        said = [3 + ord(c) % 20 for c in conversation[1]["value"]]
        return dict(input_ids=[1]*tokens + [2] + said, labels=[-100]*(tokens + 1) + said)

def tiny_model(seed=0):
    torch.manual_seed(seed)
    vision = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    text = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return DeltaLlavaForConditionalGeneration(DeltaLlavaConfig(vision_config=vision, text_config=text, projector=SMALL.to_dict(), image_token_index=1))

def tiny_rows(n=32):
    return [dict(id=str(i), image=f"{i}.png", conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "abcd"[i % 4]*3}]) for i in range(n)]

def tiny_collator(rows, budgets=(1, 4), seed=0):
    g = torch.Generator().manual_seed(1)
    features = torch.randn(len(rows), 16, 256, generator=g) + torch.randn(4, 1, 256, generator=g)[torch.arange(len(rows)) % 4]
    return ElasticCollator(Collator(processor=TinyProcessor(), features=features, paths=[r["image"] for r in rows]), budgets, seed)

def tiny_arguments(folder, steps=6): return stage_arguments(folder, steps=steps, batch_size=4, save_steps=2, disable_tqdm=True, logging_steps=1)

def state_of(model): return {k: v.clone() for k,v in model.state_dict().items()}

def projector_of(model): return model.multi_modal_projector.state_dict()

def same(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)

class Break(TrainerCallback):
    "The run dies after a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise InterruptedError

# ---------------------------------------------------------------- killed and resumed

def test_half_written_checkpoint_is_passed_over_and_the_run_ends_the_same(tmp_path):
    rows = tiny_rows()
    unbroken,broken,resumed = tiny_model(),tiny_model(),tiny_model()
    log = train_stage(unbroken, rows, tiny_collator(rows), tiny_arguments(tmp_path/"one"))
    with pytest.raises(InterruptedError): train_stage(broken, rows, tiny_collator(rows), tiny_arguments(tmp_path/"two"), callbacks=[Break(5)])
    (tmp_path/"two"/"checkpoint-4"/"complete.json").unlink()  # as if killed while it was saved
    (tmp_path/"two"/"checkpoint-4"/"projector.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path/"two").name == "checkpoint-2"
    again = train_stage(resumed, rows, tiny_collator(rows), tiny_arguments(tmp_path/"two"))
    assert same(projector_of(resumed), projector_of(unbroken)) and not same(projector_of(broken), projector_of(unbroken))
    assert [e["loss"] for e in again if "loss" in e] == [e["loss"] for e in log if "loss" in e] and len(log) == 7
    with pytest.raises(InterruptedError): train_stage(tiny_model(), rows, tiny_collator(rows), tiny_arguments(tmp_path/"two"), resume=False, callbacks=[Break(1)])

def test_a_finished_run_is_not_trained_further(tmp_path):
    rows,one,two = tiny_rows(),tiny_model(),tiny_model(seed=1)
    log = train_stage(one, rows, tiny_collator(rows), tiny_arguments(tmp_path))
    again = train_stage(two, rows, tiny_collator(rows), tiny_arguments(tmp_path), callbacks=[Break(7)])  # six steps end within an epoch of eight
    assert same(projector_of(two), projector_of(one)) and not two.training
    assert [e["loss"] for e in again if "loss" in e] == [e["loss"] for e in log if "loss" in e]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]

def test_last_checkpoint_goes_by_number_and_completeness(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path/"none") is None
    for n in (9, 10, 11): (tmp_path/f"checkpoint-{n}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for n in (9, 10): (tmp_path/f"checkpoint-{n}"/"complete.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"

SCRIPT = """
    import os, signal, sys, time
    import torch
    from delta_llava import train
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_train import *
    how,*folders = sys.argv[1:]
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): time.sleep(.2)
    if how == "die-while-saving":
        whole = train.save_projector
        def save_projector(model, folder, *rest):
            whole(model, folder, *rest)
            if str(folder).endswith("checkpoint-4"): os.kill(os.getpid(), signal.SIGKILL)
        train.save_projector = save_projector
    for folder in folders:
        rows,model = tiny_rows(),tiny_model()
        fit_stage(model, rows, tiny_collator(rows), tiny_arguments(folder, steps=20), callbacks=[Slow()] if how == "slow" else [])
        train.save_projector(model, folder)
"""

@pytest.mark.slow
def test_killed_runs_end_with_the_weights_of_an_unbroken_one(tmp_path):
    script = tmp_path/"stage.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__)))
    start = lambda *args: subprocess.Popen([sys.executable, script, *args], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saving,killed = start("die-while-saving", "saving"),start("slow", "killed")
    while not list((tmp_path/"killed").glob("checkpoint-*/complete.json")):
        assert killed.poll() is None
        time.sleep(.05)
    killed.send_signal(signal.SIGKILL)
    assert (killed.wait(), saving.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert (tmp_path/"saving"/"checkpoint-4"/"projector.safetensors").exists() and last_checkpoint(tmp_path/"saving").name == "checkpoint-2"
    for name in ("killed", "saving"): assert not (tmp_path/name/"projector.safetensors").exists()
    assert start("run", "killed", "saving", "unbroken").wait() == 0
    unbroken = (tmp_path/"unbroken"/"projector.safetensors").read_bytes()
    for name in ("killed", "saving"): assert (tmp_path/name/"projector.safetensors").read_bytes() == unbroken

# ---------------------------------------------------------------- budgets, freezing

def test_elastic_collator_keeps_no_state():
    rows = tiny_rows(64)
    one,two = tiny_collator(rows),tiny_collator(rows)
    batches = [rows[i:i+4] for i in range(0, 64, 4)]
    drawn = [one(b)["tokens"] for b in batches]
    assert set(drawn) == {1, 4}
    assert [two(b)["tokens"] for b in reversed(batches)] == drawn[::-1]  # whatever came before
    assert [tiny_collator(rows, seed=1)(b)["tokens"] for b in batches] != drawn
    assert {tiny_collator(rows, (4,))(b)["tokens"] for b in batches} == {4}
    with pytest.raises(ValueError, match="budgets is empty"): tiny_collator(rows, ())

def test_only_the_projector_learns(tmp_path):
    rows,model = tiny_rows(),tiny_model()
    before = state_of(model)
    plan = freeze(model)
    assert plan["tower"][0] == plan["llm"][0] == 0 < plan["tower"][1] and plan["projector"][0] == plan["projector"][1]
    train_stage(model, rows, tiny_collator(rows), tiny_arguments(tmp_path, steps=2))
    inside = {k for k in before if "multi_modal_projector" in k}
    changed = {k for k,v in model.state_dict().items() if not v.equal(before[k])}
    assert changed and changed <= inside
    assert all(p.grad is None and not p.requires_grad for k,p in model.named_parameters() if k not in inside)
    assert not model.training

def test_bad_rows_fail_before_training(tmp_path):
    rows = tiny_rows()
    class Never(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): raise AssertionError("training began")
    with pytest.raises(ValueError, match="no features for"):
        train_stage(tiny_model(), [rows[0] | dict(image="lost.png"), *rows], tiny_collator(rows), tiny_arguments(tmp_path), callbacks=[Never()])
    assert not list(tmp_path.glob("checkpoint-*"))

@pytest.mark.parametrize("name", ["steps", "batch_size", "save_steps"])
def test_arguments_refuse(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"): stage_arguments(tmp_path, **dict(steps=1) | {name: 0})

# ---------------------------------------------------------------- the record

def test_record_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/delta-llava", "quickstart", "--seed", "3"])
    path = write_record(tmp_path/"runs"/"a.json", [3], dict(loss=1.5), steps=7)
    record = json.loads(path.read_text())
    assert record.keys() == {"commit", "command", "hardware", "seeds", "versions", "steps", "result"}
    assert record["command"] == "delta-llava quickstart --seed 3" and record["seeds"] == [3] and record["result"] == {"loss": 1.5} and record["steps"] == 7
    assert all(record.values()) and record["versions"]["torch"] == torch.__version__
    before = path.read_text()
    with pytest.raises(TypeError): write_record(path, [3], object())
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["a.json"]  # nothing half-written
    monkeypatch.setattr(type(path), "replace", lambda *args: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError): write_record(path, [3], dict(loss=2.))
    assert path.read_text() == before

def test_card_says_what_the_record_says(tmp_path):
    record = json.loads((Path(__file__).parent.parent/"runs"/"quickstart-seed0.json").read_text())
    record["recipe"] |= dict(tower="/elsewhere/towers/clip", llm="hub:someone/llm")
    save_projector(tiny_model(), tmp_path)
    (tmp_path/"record.json").write_text(json.dumps(record))
    card = ModelCard.load(write_card(tmp_path))
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "not-chosen-yet", ["someone/llm"])
    assert {"delta-llava", "delta", "pretrain"} <= set(card.data.tags) and "elsewhere" not in card.content and "`clip`" in card.text
    assert card.text.count("\n| heldout_") == sum(map(len, record["result"]["scores"].values())) and record["commit"] in card.text
    assert "load_projector(folder, model)" in card.text and ModelCard.load(write_card(tmp_path, "mit")).data.license == "mit"
    (tmp_path/"projector.json").unlink()  # as after stage 2
    assert "AutoModelForImageTextToText.from_pretrained(folder)" in write_card(tmp_path).read_text()

# ---------------------------------------------------------------- several budgets in one step

def test_nested_batches_average_the_losses_of_all_budgets(tmp_path):
    rows,model = tiny_rows(4),tiny_model()
    one = tiny_collator(rows)
    nested = ElasticCollator(replace(one.collators[0], tokens=None), (1, 4), nested=True)
    batch = nested(rows)
    assert [b["tokens"] for b in batch["batches"]] == [1, 4]
    trainer = StageTrainer(model.eval(), stage_arguments(tmp_path, steps=1, use_cpu=True), data_collator=nested)
    losses = [model(**b).loss for b in batch["batches"]]
    assert_close(trainer.compute_loss(model, batch), sum(losses)/2)
    assert abs(losses[0] - losses[1]) > 1e-4  # else the mean would prove nothing
    assert batch["labels"] is batch["batches"][0]["labels"]  # what `Trainer` counts for gradient accumulation
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert_close(trainer.compute_loss(model, batch, num_items_in_batch=2*counted), sum(losses)/4, msg="a loss that knows the number of tokens is divided by it")
