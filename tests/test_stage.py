"Both stages from end to end: what is trained, killed runs, full disks, numbers that are none, several processes."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_stage
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_stage import EachStep, stage, write_parts
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from delta_llava import train
from delta_llava.train import freeze, last_checkpoint, merge_lora, build_stage_model, run_stage
from delta_llava.vlm import load_projector

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory): return write_parts(tmp_path_factory.mktemp("parts"))


def weights(folder): return load_file(Path(folder)/("model.safetensors" if (Path(folder)/"model.safetensors").exists() else "projector.safetensors"))


def equal(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


class Stop(TrainerCallback):
    "A run ends early, as if it were broken off."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == self.step


def losses(record): return json.loads(Path(record).read_text())["result"]["losses"]


# ---------------------------------------------------------------- what is trained

def test_both_stages_one_after_the_other(parts, tmp_path):
    one = run_stage(stage("pretrain", parts, tmp_path/"one"))
    about = json.loads(one.read_text())
    assert about["plan"]["tower"][0] == about["plan"]["llm"][0] == 0 < about["plan"]["projector"][0] and about["rows"] == 28 and about["settings"]["lr"] == 1e-3
    two = stage("finetune", parts, tmp_path/"two", projector=tmp_path/"one", pad=True)
    start, _ = build_stage_model(two)
    assert equal(start.multi_modal_projector.state_dict(), load_projector(tmp_path/"one").state_dict())  # stage 2 begins where stage 1 ended
    run_stage(two)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path/"two"), AutoProcessor.from_pretrained(tmp_path/"two")
    moved = {name: not p.equal(q) for (name, p), q in zip(model.named_parameters(), start.parameters())}
    assert not any(m for n, m in moved.items() if "vision_tower" in n)
    assert all(m for n, m in moved.items() if "layers" in n and "vision_tower" not in n) and any(m for n, m in moved.items() if "projector" in n)
    assert processor.tokens == 4 and type(processor.image_processor).__name__.startswith("LlavaImageProcessor")
    assert not list(tmp_path.glob("*/training_args.bin"))
    before = (tmp_path/"two"/"record.json").stat().st_mtime_ns
    assert run_stage(two) == tmp_path/"two"/"record.json" and (tmp_path/"two"/"record.json").stat().st_mtime_ns == before  # nothing is left to do


def test_lora_changes_the_llm_through_its_updates_alone(parts, tmp_path):
    lora = stage("finetune", parts, tmp_path, lora=4, lr=1e-2)
    start, _ = build_stage_model(lora)
    run_stage(lora)
    kept = load_file(tmp_path/"checkpoint-6"/"lora.safetensors")
    assert len(kept) == 2*7*2 and not (tmp_path/"checkpoint-6"/"model.safetensors").exists()  # A and B of seven matrices in two layers
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    changed = {n for (n, p), q in zip(model.named_parameters(), start.parameters()) if not p.equal(q)}
    assert {n for n in changed if "language_model" in n} == {n for n, _ in start.named_parameters() if "language_model.layers" in n and "_proj" in n}
    name = "model.language_model.layers.1.mlp.up_proj"
    update = kept[f"{name}.lora_B.default.weight"] @ kept[f"{name}.lora_A.default.weight"] * 2
    assert_close(model.get_parameter(f"{name}.weight"), start.get_parameter(f"{name}.weight") + update)
    assert update.abs().max() > 1e-4


def test_merging_low_rank_updates_keeps_what_the_model_says(parts, tmp_path):
    half, _ = build_stage_model(stage("finetune", parts, tmp_path, lora=4, bf16=True))
    freeze(half, "finetune", lora=4)
    assert {(p.requires_grad, p.dtype) for p in half.get_decoder().parameters()} == {(True, torch.float32), (False, torch.bfloat16)}  # what is trained stays in float32
    model, _ = build_stage_model(stage("finetune", parts, tmp_path, lora=4))
    plan = freeze(model, "finetune", lora=4)
    assert 0 < plan["llm"][0] < plan["llm"][1]
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.1)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        merge_lora(model)
        assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not any("lora" in n for n, _ in model.named_modules())
    with pytest.raises(ValueError, match="lora=4 in stage 'pretrain'"): freeze(model, "pretrain", lora=4)


@pytest.mark.slow
def test_four_bits_for_what_is_frozen(parts, tmp_path):
    "QLoRA: trained against rounded matrices, and what is written says what was trained, in full precision."
    pytest.importorskip("bitsandbytes")
    qlora = stage("finetune", parts, tmp_path/"a", lora=4, four_bit=True, lr=1e-2, steps=20, save_steps=20)
    rounded, _ = build_stage_model(qlora)
    matrices = [p for n, p in rounded.named_parameters() if "language_model.layers" in n and "_proj" in n]
    assert len(matrices) == 14 and {p.dtype for p in matrices} == {torch.uint8}
    assert {p.dtype for p in rounded.multi_modal_projector.parameters()} == {torch.float32}
    found = losses(run_stage(qlora))
    assert found[1] < found[0] - .05
    ids, model = torch.tensor([[1, 2, 3]]), AutoModelForImageTextToText.from_pretrained(tmp_path/"a")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and "quantization_config" not in model.config.text_config.to_dict()
    freeze(rounded, "finetune", lora=4)
    state = load_file(tmp_path/"a"/"checkpoint-20"/"lora.safetensors")
    assert not rounded.load_state_dict(state, strict=False).unexpected_keys
    for m in rounded.modules(): m.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50 packs matrices this small to nothing there
    with torch.no_grad(): assert_close(model(input_ids=ids).logits, rounded.eval()(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    run_stage(stage("finetune", parts, tmp_path/"b", lora=4, four_bit=True, lr=1e-2, steps=20, save_steps=10), callbacks=[Stop(10)]).unlink()
    run_stage(stage("finetune", parts, tmp_path/"b", lora=4, four_bit=True, lr=1e-2, steps=20, save_steps=10))
    assert equal(weights(tmp_path/"a"), weights(tmp_path/"b"))  # rounded alike when it goes on
    with pytest.raises(ValueError, match="four_bit=True with lora=0"): stage("finetune", parts, tmp_path, four_bit=True)


def test_a_folder_belongs_to_one_run(parts, tmp_path):
    run_stage(stage("pretrain", parts, tmp_path), callbacks=[Stop(2)]).unlink()
    with pytest.raises(ValueError, match=r"holds a run with other settings \(tokens=4 there, 1 here; lr=0.001 there, 0.002 here\)"): run_stage(stage("pretrain", parts, tmp_path, lr=2e-3, tokens=1))
    with pytest.raises(ValueError, match="resume=False, but"): run_stage(stage("pretrain", parts, tmp_path, resume=False))
    run_stage(stage("pretrain", parts, tmp_path, device_batch_size=2, workers=1))  # where and how may change
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    for done in tmp_path.glob("checkpoint-*"): shutil.rmtree(done)  # they are large
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="seed=0 there, 1 here"): run_stage(stage("pretrain", parts, tmp_path, seed=1))
    assert run_stage(stage("pretrain", parts, tmp_path)) == tmp_path/"record.json" and equal(weights(tmp_path), before) and last_checkpoint(tmp_path) is None


def test_a_resumed_run_saves_as_often_as_it_is_told_now(parts, tmp_path):
    run_stage(stage("pretrain", parts, tmp_path, save_steps=4), callbacks=[Stop(4)]).unlink()
    assert json.loads(run_stage(stage("pretrain", parts, tmp_path, save_steps=1)).read_text())["resumed"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_the_second_stage_takes_the_projector_it_is_told(parts, tmp_path):
    run_stage(stage("pretrain", parts, tmp_path/"packer", compressor="tokenpacker", steps=2))
    run_stage(stage("pretrain", parts, tmp_path/"one", steps=2))
    for other, name in ((dict(projector=tmp_path/"packer"), "compressor='tokenpacker'"), (dict(projector=tmp_path/"one", standardize=True), "standardize=False")):
        with pytest.raises(ValueError, match=f"was trained with {name}, but here"): run_stage(stage("finetune", parts, tmp_path/"two", **other))
    run_stage(stage("finetune", parts, tmp_path/"two", projector=tmp_path/"one", tokens=1, steps=2))
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path/"two"), AutoProcessor.from_pretrained(tmp_path/"two")
    assert model.config.projector_config().tokens == processor.tokens == model.config.image_seq_length == 1
    assert model.generate(**processor(Image.new("RGB", (56, 56)), "<image>\nColour?"), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("options", [{}, dict(lora=4)], ids=["whole", "LoRA"])
def test_an_llm_that_samples_without_saying_so_is_saved(parts, tmp_path, options):
    "As Vicuna's generation_config.json: temperature and top_p, no do_sample."
    llm = shutil.copytree(parts/"llm", tmp_path/"llm")
    (llm/"generation_config.json").write_text(json.dumps(dict(bos_token_id=256, eos_token_id=257, pad_token_id=257, temperature=.9, top_p=.6)))
    run_stage(stage("finetune", parts, tmp_path/"two", llm=str(llm), steps=2, **options))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path/"two").generation_config.temperature == .9
    assert bool(options) != (tmp_path/"two"/"checkpoint-2"/"model.safetensors").exists() and not (tmp_path/"two"/"projector.json").exists()


def test_settings_that_cannot_be_shared_out(parts, tmp_path):
    with pytest.raises(ValueError, match=r"lora=4 with sharding='fsdp2'"): stage("finetune", parts, tmp_path, lora=4, sharding="fsdp2")
    with pytest.raises(ValueError, match="cannot be shared out among 6 processes; use 4 of them, or batch_size=258"): stage("pretrain", parts, tmp_path, batch_size=256, device_batch_size=32).accumulate(6)


@pytest.mark.parametrize("options", [dict(packed=True), dict(budgets=(1, 4)), dict(compressor="m3", budgets=(1, 4)), dict(compressor="mqt", budgets=(2, 4)), dict(bf16=True, gradient_checkpointing=True),
                                     dict(group_by_length=True, batch_size=8), dict(standardize=True), dict(packed=True, compressor="quecc"), dict(lora=8, bf16=True)], ids=str)
def test_options_train(parts, tmp_path, options):
    found = losses(run_stage(stage("finetune", parts, tmp_path, lr=1e-2, steps=20, save_steps=20, **options)))
    assert len(found) == 2 and found[1] < found[0] - (.1 if "lora" in options else .5)  # updates of a random LLM learn slowly


def test_packing_and_checkpointing_change_no_loss(parts, tmp_path):
    "With a projector that has no DropPath, which would draw anew."
    logs = {}
    for name, options in dict(plain={}, packed=dict(packed=True), checkpointed=dict(gradient_checkpointing=True), accumulated=dict(device_batch_size=2)).items():
        run_stage(stage("finetune", parts, tmp_path/name, save_steps=6, compressor="tokenpacker", **options), callbacks=[each := EachStep()])
        logs[name] = each.losses
    assert len(logs["plain"]) == 6
    for name in logs: assert_close(logs[name], logs["plain"], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bad input

def test_what_cannot_work_fails_before_the_model_is_loaded(parts, tmp_path):
    with pytest.raises(ValueError, match="holds no projector.safetensors"): run_stage(stage("finetune", parts, tmp_path, projector=tmp_path))
    with pytest.raises(ValueError, match="must be a multiple of the tower's patch size 14"): run_stage(stage("pretrain", parts, tmp_path, image_size=60))
    with pytest.raises(ValueError, match="tokens=5 must be the square"): run_stage(stage("pretrain", parts, tmp_path, tokens=5))
    (parts/"bad.json").write_text(json.dumps(json.loads((parts/"data.json").read_text()) + [dict(id="lost", image="lost.png", conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}])]))
    with pytest.raises(ValueError, match="delta-llava doctor"): run_stage(stage("pretrain", parts, tmp_path, data=parts/"bad.json"))
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- numbers that are none

class Poison(TrainerCallback):
    "A weight becomes no number behind a step: the next loss is none."
    def __init__(self, step, what): self.step, self.what = step, what
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step: return
        if self.what == "loss":
            with torch.no_grad(): next(model.get_decoder().parameters()).fill_(float("nan"))
        else: next(model.multi_modal_projector.parameters()).register_hook(lambda g: g*float("inf"))


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_no_number_ends_the_run_before_it_reaches_a_weight(parts, tmp_path, what):
    kept = {}
    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs): kept[state.global_step] = {k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()}
    class Model(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs): kept["model"] = model
    with pytest.raises(FloatingPointError, match=rf"step 4: the {what} is (nan|inf), on rows \['.*-\d+', .*\].*checkpoint-2") as error:
        run_stage(stage("pretrain", parts, tmp_path), callbacks=[Poison(3, what), Keep(), Model()])
    assert str(error.value).count("picture-") + str(error.value).count("text-") == 4
    assert equal(kept[3], kept["model"].multi_modal_projector.state_dict())
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


# ---------------------------------------------------------------- a full disk

@pytest.mark.parametrize("where", ["safetensors", "optimizer", "state"])
def test_a_full_disk_keeps_the_last_good_checkpoint(parts, tmp_path, monkeypatch, where):
    def full(self, *args, **kwargs):
        if self.state.global_step == 4: raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)
    name = dict(safetensors="_save", optimizer="_save_optimizer_and_scheduler", state="_save_rng_state")[where]
    original = getattr(train.StageTrainer, name)
    monkeypatch.setattr(train.StageTrainer, name, full)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.*No space left.*Make room.*goes on from .*checkpoint-2"): run_stage(stage("pretrain", parts, tmp_path))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    run_stage(stage("pretrain", parts, tmp_path))
    run_stage(stage("pretrain", parts, tmp_path/"unbroken"))
    assert equal(weights(tmp_path), weights(tmp_path/"unbroken"))


def test_room_on_the_disk_is_looked_at_first(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4*2**20))
    with pytest.raises(OSError, match="has 0.0 GiB free, but three checkpoints"): run_stage(stage("pretrain", parts, tmp_path))
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- killed

@pytest.fixture(scope="module")
def fork():
    "Run a stage in a process of its own, forked from one that has imported everything; its exit code."
    context = get_context("forkserver")
    context.set_forkserver_preload(["tiny_stage"])
    def run(kind, parts, folder, **options):
        process = context.Process(target=tiny_stage.main, args=(kind, str(parts), str(folder), json.dumps(options)))
        process.start()
        process.join()
        return process.exitcode
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_killed_at_twenty_steps_a_run_ends_bit_for_bit_as_an_unbroken_one(parts, tmp_path, fork, kind):
    steps = dict(steps=40, save_steps=2)
    assert fork(kind, parts, tmp_path/"unbroken", **steps) == 0
    draw = random.Random(0)
    for i, step in enumerate(sorted(draw.sample(range(2, 40), 20))):  # each time further on, else a resumed run is behind the step already
        how = dict(die_at=step) if i % 2 else dict(die_saving=(step + step % 2, draw.randrange(5)))
        assert fork(kind, parts, tmp_path/"killed", **steps, **how) == -signal.SIGKILL, (step, how)
        done = last_checkpoint(tmp_path/"killed")
        assert done is None and step < 4 or int(done.name.split("-")[1]) >= step - 3  # what was written to its end is never lost
    assert fork(kind, parts, tmp_path/"killed", **steps) == 0
    assert equal(weights(tmp_path/"killed"), weights(tmp_path/"unbroken"))
    assert losses(tmp_path/"killed"/"record.json") == losses(tmp_path/"unbroken"/"record.json")


# ---------------------------------------------------------------- several processes

def start(kind, parts, folder, **options):
    "A stage on two processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]))
    return subprocess.run([*command, HERE/"tiny_stage.py", kind, parts, folder, json.dumps(options)], capture_output=True, text=True, env=environment)


PROCESSES = pytest.mark.parametrize("kind, options", [("pretrain", {}), ("finetune", {}), ("finetune", dict(sharding="fsdp2", fsdp_on_cpu=True))], ids=["DDP, stage 1", "DDP, stage 2", "FSDP2, stage 2"])


@pytest.fixture(scope="module")
def mixed(parts):
    "As many rows without a picture as with one: one process has a picture, the other none, or both have none."
    rows = json.loads((parts/"data.json").read_text())
    text = [dict(id=f"t{i}", conversations=r["conversations"]) for i, r in enumerate(rows[-4:]*6)]
    (parts/"mixed.json").write_text(json.dumps([r for pair in zip(rows[:24], text) for r in pair]))
    return dict(data=str(parts/"mixed.json"), batch_size=2, steps=8, save_steps=4, compressor="tokenpacker")  # without DropPath, which each process draws for itself


@PROCESSES
def test_two_processes_train_as_one(parts, mixed, tmp_path, kind, options):
    one = run_stage(stage(kind, parts, tmp_path/"one", device_batch_size=2, **mixed | dict(data=parts/"mixed.json")), callbacks=[EachStep()])
    two = start(kind, parts, tmp_path/"two", device_batch_size=1, **mixed, **options)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.split()[-1] == ("sharded" if options else "whole")
    assert len(losses(one)) == 8
    assert_close(losses(tmp_path/"two"/"record.json"), losses(one), rtol=1e-6, atol=1e-6)
    a, b = weights(tmp_path/"one"), weights(tmp_path/"two")
    assert a.keys() == b.keys()
    for k in a: assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)
    assert sorted(p.name for p in (tmp_path/"two"/"checkpoint-8").glob("rng_state_*")) == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.slow
@PROCESSES
def test_two_killed_processes_go_on_bit_for_bit(parts, mixed, tmp_path, kind, options):
    run = lambda folder, **how: start(kind, parts, tmp_path/folder, device_batch_size=1, **mixed | dict(compressor="delta"), **options, **how)
    first = run("unbroken")
    assert first.returncode == 0, first.stderr[-6000:]
    assert run("killed", die_at=6).returncode != 0 and last_checkpoint(tmp_path/"killed").name == "checkpoint-4"
    done = run("killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert equal(weights(tmp_path/"killed"), weights(tmp_path/"unbroken")) and losses(tmp_path/"killed"/"record.json") == losses(tmp_path/"unbroken"/"record.json")
