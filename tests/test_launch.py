"Launching: counts of real modules, formulas against real runs, files read by the libraries they are for."

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel, TrainingArguments
from transformers.trainer_pt_utils import get_module_class_from_name

from delta_llava import flops
from delta_llava.flops import num_parameters, pretrained_config
from delta_llava.launch import (
    ROWS,
    RowLengths,
    SavedBytes,
    accelerate_cmd,
    accelerate_config,
    block_bytes,
    deepspeed_config,
    disk_bytes,
    estimate,
    estimate_report,
    fitting_tokens,
    gathered_bytes,
    llm_flops,
    measured_utilization,
    memory_bytes,
    meta_model,
    paper_table,
    parameter_counts,
    plan_checkpointing,
    recomputes,
    row_flops,
    slurm_script,
    state_bytes,
    step_seconds,
    torchrun_cmd,
    write_launch,
)
from delta_llava.train import Finetune, Pretrain, sharding_fields


@pytest.fixture(scope="module")
def one():
    return Pretrain(data=Path("one.json"))


@pytest.fixture(scope="module")
def two():
    return Finetune(data=Path("two.json"), images=Path("pictures"))


@pytest.fixture(scope="module")
def full(one):
    return meta_model(one)


@pytest.fixture
def small(monkeypatch):
    "A stage whose parts are small enough to be built for real."
    monkeypatch.setitem(
        flops.PRETRAINED_CONFIGS,
        "small-tower",
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=12,
            num_attention_heads=2,
            image_size=224,
            patch_size=32,
        ),
    )
    monkeypatch.setitem(
        flops.PRETRAINED_CONFIGS,
        "small-llm",
        LlamaConfig(
            vocab_size=99,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
    )
    return small_stage(Pretrain)


def small_stage(kind, **kwargs):
    return kind(
        **dict(
            data=Path("d.json"),
            tower="small-tower",
            llm="small-llm",
            tokens=16,
            per_device_batch_size=2,
            gradient_checkpointing=False,
            sharding="none",
        )
        | kwargs
    )


def real(stage, dtype=torch.float32):
    torch.manual_seed(0)
    model = type(meta_model(stage))(meta_model(stage).config).to(dtype).train()
    model.requires_grad_(stage.stage == "finetune")
    model.vision_tower.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    return model


def batch(model, stage, length, answer, rows=1):
    "One image and `length` tokens in each row; the last `answer` are supervised."
    visual, image = model.config.image_seq_length, model.config.image_token_id
    ids = torch.cat(
        [torch.full((rows, visual), image), torch.randint(0, image, (rows, length - visual))], dim=1
    )
    labels = ids.clone()
    labels[:, : length - answer] = -100
    pixels = torch.randn(rows, 3, 224, 224)
    return dict(input_ids=ids, labels=labels, pixel_values=pixels.to(model.dtype), use_cache=False)


# Parameters


@pytest.mark.parametrize(
    "compressor,tokens",
    [
        ("delta", 144),
        ("delta", 1),
        ("mlp", 576),
        ("tokenpacker", 144),
        ("mqt", 100),
        ("m3", 36),
        ("qwen", 144),
        ("cabstractor", 144),
        ("prumerge", 64),
        ("fastervlm", 64),
        ("evit", 64),
        ("dynamicvit", 64),
        ("quecc", 36),
        ("fastv", 36),
        ("llavolta", 36),
    ],
)
def test_parameters_are_those_of_the_modules(one, compressor, tokens):
    stage = replace(one, compressor=compressor, tokens=tokens)
    model = meta_model(stage)
    assert all(p.is_meta for p in model.parameters())
    parts = parameter_counts(stage, model)
    assert sum(n for _, n in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(t for t, _ in parts.values()) == num_parameters(model.multi_modal_projector)


def test_vicuna_and_clip_have_their_sizes(one, full):
    parts = parameter_counts(one, full)
    n_parameters = 6_738_415_616  # Vicuna-7B
    assert parts["llm"][1] == n_parameters + 2 * 4096  # and `<image>`, in the embeddings and in the head
    assert parts["projector"] == (42_503_680, 42_503_680)
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert parts["tower"] == (0, 23 * block + 577 * 1024 + 1024 + 3 * 14 * 14 * 1024 + 4 * 1024)
    larger = replace(one, llm="lmsys/vicuna-13b-v1.5")
    assert parameter_counts(larger, meta_model(larger))["llm"][1] == 13_015_864_320 + 2 * 5120


def test_lora_counts_its_own_matrices(two, full):
    parts = parameter_counts(replace(two, lora_rank=8, sharding="none"), full)
    per_block = 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert parts["llm"] == (32 * per_block, parameter_counts(two, full)["llm"][1] + 32 * per_block)


def test_a_real_model_has_the_parameters_of_the_meta_model(small):
    counts = parameter_counts(small, meta_model(small)).values()
    assert sum(p.numel() for p in real(small).parameters()) == sum(n for _, n in counts)


# FLOPs: the whole model, really run


@pytest.mark.parametrize("stage", [Pretrain, Finetune])
@pytest.mark.parametrize("again", [False, True])
def test_flops_of_a_row_are_those_that_run(small, stage, again):
    stage = small_stage(stage, gradient_checkpointing=again)
    model = real(stage)
    if again:
        model.get_decoder().activation_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        model(**batch(model, stage, 48, 10)).loss.backward()
    expected = sum(row_flops(stage, meta_model(stage), RowLengths(count=1, text=48 - 16, answer=10)).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_flops_of_the_llm_are_exact(learns, heads):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
    )
    model = LlamaModel(config).train().requires_grad_(learns)
    weights = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, nn.Linear))
    with FlopCounterMode(display=False) as counter:
        model(
            inputs_embeds=torch.randn(1, 32, 64, requires_grad=True), use_cache=False
        ).last_hidden_state.sum().backward()
    assert llm_flops(config, weights, 32, 0, learns, False) == counter.get_total_flops()


def test_flops_of_the_full_tower_and_projector(one, full):
    flops = row_flops(one, full, ROWS["pretrain"])
    assert flops["tower"] / 1e12 == pytest.approx(
        0.3660, abs=0.0002
    )  # without the block above the highest level
    assert 2 * 0.0214 < flops["projector"] / 1e12 < 3 * 0.0217  # backward: weights only


def test_less_tokens_less_time_and_a_frozen_llm_costs_two_thirds(one, two, full):
    rows = ROWS["pretrain"]
    assert (
        row_flops(replace(one, tokens=36), meta_model(replace(one, tokens=36)), rows)["llm"]
        < row_flops(one, full, rows)["llm"]
    )
    base = dict(gradient_checkpointing=False)
    frozen, trained = (row_flops(replace(s, **base), full, rows)["llm"] for s in (one, two))
    assert frozen / trained == pytest.approx(2 / 3, abs=0.01)


# Memory


@pytest.mark.parametrize("dtype,element", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("stage", [Pretrain, Finetune])
def test_activations_are_those_that_autograd_keeps(small, stage, dtype, element):
    "Blocks, projector and logits by formula, against a real batch; 6 % for what it leaves out."
    stage = small_stage(stage, bf16=element == 2)
    model = real(stage, dtype)
    with SavedBytes(model) as saved:
        model(**batch(model, stage, 64, 40, rows=2))
    parts = memory_bytes(stage, meta_model(stage), 1, 64, 40)
    assert saved.total == pytest.approx(parts["blocks"] + parts["projector"] + parts["logits"], rel=0.06)


@pytest.mark.parametrize("dtype,element", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_bytes_of_a_block_are_exact(learns, dtype, element, heads):
    "Two models that differ in one block differ in what that block keeps."

    def kept(layers):
        model = (
            LlamaModel(
                LlamaConfig(
                    vocab_size=50,
                    hidden_size=64,
                    intermediate_size=160,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    num_key_value_heads=heads,
                )
            )
            .to(dtype)
            .train()
            .requires_grad_(learns)
        )
        with SavedBytes(model) as saved:
            model(inputs_embeds=torch.randn(2, 32, 64, dtype=dtype, requires_grad=True), use_cache=False)
        return saved.total, model.config

    (two, config), (one, _) = kept(2), kept(1)
    assert two - one == 64 * block_bytes(config, learns, element)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("heads", [4, 2])
def test_bytes_of_a_block_with_low_rank_updates(dropout, heads):
    "Inputs of the updates are counted; their inner products, of `rank` channels, are not."
    rank = 2

    def kept(layers):
        sizes = dict(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=layers)
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=heads, **sizes)
        model = LlamaModel(config)
        updates = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(model, updates).train()
        with SavedBytes(model) as saved:
            model(inputs_embeds=torch.randn(2, 32, 64, requires_grad=True), use_cache=False)
        return saved.total, config

    (two, config), (one, _) = kept(2), kept(1)
    mask = 3 * (5 * 64 + 64 + 160) if dropout else 0  # four bytes on a CPU, one on a GPU
    expected = 64 * (block_bytes(config, False, 4, dropout) + mask + 7 * rank * 4)
    assert two - one == expected


def test_logits_are_at_least_what_the_loss_keeps_and_grow_with_the_rows(one, full):
    head = nn.Linear(64, 5000, bias=False).requires_grad_(False)
    hidden = torch.randn(2, 33, 64, requires_grad=True)
    labels = torch.randint(0, 5000, (2, 33))
    loss = type(full).loss_function.fget(full)
    with SavedBytes(head) as saved:
        logits = head(hidden[:, :-1].flatten(0, 1))
        loss(logits=logits, labels=None, shift_labels=labels[:, 1:].flatten(), vocab_size=5000)
    assert 4 * 64 * 5000 <= saved.total <= 64 * ((8 + 4) * 5000 + 4 * 64)
    logits = [
        memory_bytes(replace(one, per_device_batch_size=b), full, 8, 300, a)["logits"]
        for b, a in ((1, 50), (2, 50), (1, 100))
    ]
    assert logits[1] == logits[2] == 2 * logits[0] == 100 * ((8 + 2) * 32001 + 2 * 4096)


@pytest.mark.parametrize("learns", [False, True])
def test_checkpointing_keeps_the_inputs_of_the_blocks(learns):
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4
    )
    model = LlamaModel(config).train().requires_grad_(learns)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with SavedBytes(model) as saved:
        model(inputs_embeds=torch.randn(2, 32, 64, requires_grad=True), use_cache=False)
    inputs, norm, tables = 5 * 4 * 64 * 64, (4 * 64 + 4 + 4 * 64 * learns) * 64, 2 * 4 * 32 * 16
    assert inputs <= saved.total <= inputs + norm + tables + 4 * 64 * 64


def test_states_are_sixteen_bytes_and_sharding_divides_them(two, full):
    whole = memory_bytes(replace(two, sharding="none"), full, 8, 300, 10)
    counts = parameter_counts(two, full)
    trained, tower = counts["projector"][0] + counts["llm"][0], counts["tower"][1]
    states = ("weights", "gradients", "optimizer")
    assert sum(whole[k] for k in states) == 16 * trained + 2 * tower  # in bfloat16; shards are float32
    for sharding in ("fsdp2", "zero3"):
        cut = memory_bytes(replace(two, sharding=sharding), full, 8, 300, 10)
        assert sum(cut[k] for k in states) == pytest.approx((16 * trained + 4 * tower) / 8, abs=8)
        for name in ("blocks", "projector", "logits"):
            assert cut[name] == whole[name]


def test_ddp_keeps_the_gradients_twice(one, two, full):
    "Its buckets exist on several GPUs only, and are as large as the gradients; shards have none."
    name = "buckets and gathered weights"
    for stage in (one, replace(two, sharding="none")):
        single, several = (state_bytes(stage, full, gpus) for gpus in (1, 8))
        trained = sum(t for t, _ in parameter_counts(stage, full).values())
        assert several[name] - single[name] == several["gradients"] == 4 * trained
        assert single[name] == 2 * trained  # autocast's copies of the weights
    assert state_bytes(two, full, 8)[name] == gathered_bytes(full)


def test_states_against_a_real_optimizer(small):
    "Weights, gradients and AdamW's moments of a small model in float32 are what a step leaves behind."
    stage = small_stage(Finetune, bf16=False)
    model = real(stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batch(model, stage, 64, 40)).loss.backward()
    optimizer.step()

    def size(tensors):
        return sum(t.nbytes for t in tensors)

    found = dict(
        weights=size(model.parameters()),
        gradients=size(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=size(v for s in optimizer.state.values() for k, v in s.items() if k != "step"),
    )
    expected = memory_bytes(stage, meta_model(stage), 1, 64, 40)
    unused = sum(p.numel() for p in model.parameters() if p.requires_grad and p.grad is None)
    assert found["weights"] == expected["weights"]
    assert (found["gradients"], found["optimizer"]) == (
        expected["gradients"] - 4 * unused,
        expected["optimizer"] - 8 * unused,
    )


def test_stage_two_needs_sharding_and_stage_one_does_not(one, two):
    assert estimate(one)["fits"]
    assert estimate(two)["fits"]
    assert not estimate(replace(two, sharding="none"))["fits_mean"]
    assert "does NOT fit" in estimate_report(estimate(replace(two, sharding="none")))


def test_gathered_weights_are_three_blocks_and_the_rest(full):
    block = num_parameters(full.get_decoder().layers[0])
    outside = 2 * 32001 * 4096 + 4096 + num_parameters(full.vision_tower, full.multi_modal_projector)
    assert gathered_bytes(full) == 2 * (3 * block + outside)


# Time


def test_steps_are_the_authors(one, two):
    assert (estimate(one)["steps"], estimate(two)["steps"]) == (2181, 5198)
    assert estimate(replace(one, max_steps=7))["steps"] == 7


def test_time_of_a_step():
    assert step_seconds(989e12, 8, 8, (0.5, 1.0)) == (1.0, 2.0)
    with pytest.raises(ValueError, match="two rising fractions"):
        step_seconds(1.0, 1, 1, (0.6, 0.5))


def write_steps(path, **cells):
    "A record of steps with `seconds=1`; each keyword changes fields of one step."
    plain = dict(stage="pretrain", tokens=144, rows=32, flops=4e14, seconds=[1.0, 1.0, 1.0])
    plain |= dict(layers=None, compiled=False, lora_rank=0)
    names = dict(tower="hub:openai/clip-vit-large-patch14-336", llm="hub:lmsys/vicuna-7b-v1.5")
    rows = [plain | changes for changes in cells.values()]
    path.write_text(json.dumps(dict(hardware="CPU, 16 threads, 1× GPU", result=rows, **names)))
    return path


def test_the_plan_takes_the_share_of_the_most_similar_steps(tmp_path, one, two):
    record = write_steps(
        tmp_path / "steps.json",
        plain=dict(),
        again=dict(flops=5e14),
        small=dict(rows=8, flops=1e14),
        few=dict(tokens=16, flops=2e14),
        compiled=dict(compiled=True, flops=9e14),
        compiled_few=dict(compiled=True, tokens=4, flops=8e14),
        cut=dict(stage="finetune", layers=16, flops=9e14),
        lora=dict(stage="finetune", lora_rank=8, rows=16, flops=3e14),
        failed=dict(seconds=[0.0]) | dict(error="x"),
    )
    content = json.loads(record.read_text())
    del content["result"][-1]["seconds"]
    record.write_text(json.dumps(content))
    peak = 989e12
    assert measured_utilization(one, record) == ("1× GPU", (4e14 / peak, 5e14 / peak))
    assert measured_utilization(replace(one, tokens=9), record)[1] == (2e14 / peak, 2e14 / peak)
    assert measured_utilization(replace(one, per_device_batch_size=4), record)[1][0] == 1e14 / peak
    assert measured_utilization(two, record) is None
    assert measured_utilization(replace(one, torch_compile=True), record)[1][1] == 9e14 / peak
    few = replace(one, torch_compile=True, tokens=16)
    assert measured_utilization(few, record)[1][1] == 2e14 / peak  # not compiled at this budget
    assert measured_utilization(replace(one, per_device_batch_size=1), record) is None
    lora = replace(two, lora_rank=128, sharding="none")
    assert measured_utilization(lora, record)[1] == (3e14 / peak, 3e14 / peak)
    assert measured_utilization(replace(one, llm="hub:lmsys/vicuna-13b-v1.5"), record) is None


def test_the_report_says_where_the_utilization_is_from(tmp_path, one):
    record = write_steps(tmp_path / "steps.json", plain=dict())
    measured = estimate(one, record=record)
    assert measured["utilization_from"] == "1× GPU"
    assert measured["hours"][0] == measured["hours"][1]
    assert "at 40 % of an H100's 989 TFLOP/s (measured on 1× GPU" in estimate_report(measured)
    assumed = estimate(one, record=tmp_path / "none.json")
    assert assumed["utilization"] == [0.25, 0.55]
    assert "at 25 – 55 % of an H100's 989 TFLOP/s (assumed)" in estimate_report(assumed)
    given = estimate(one, utilization=(0.3, 0.3), record=record)
    assert "at 30 % of an H100's 989 TFLOP/s (given)" in estimate_report(given)
    ratio = (33 * 60 + 32) / (3600 * given["hours"][1])
    assert f"0:33:32, {ratio:.1f} times that" in estimate_report(given)


def test_the_papers_table_stands_beside_ours_and_nothing_is_claimed_to_have_run(one):
    table = paper_table(one)
    assert [(r["tokens"], r["paper"]) for r in table] == [
        (576, "1:24:01"),
        (144, "0:33:32"),
        (64, "0:23:24"),
        (16, "0:18:36"),
        (4, "0:16:32"),
        (1, "0:16:00"),
    ]
    assert {r["run"] for r in table} == {"not run"}
    assert paper_table(one, measured={144: 1.5})[1]["run"] == "1:30:00"
    assert "run of ours: not run." in estimate_report(estimate(one))
    assert "run of ours: 2:00:00." in estimate_report(estimate(one), 2.0)


def test_estimate_is_json(one):
    assert json.loads(json.dumps(estimate(one)))["steps"] == 2181


# Commands and files


def parsed(cmd):
    "What the program would read from the command."
    at = cmd.index("delta_llava")
    return tyro.cli(dict(pretrain=Pretrain, finetune=Finetune)[cmd[at + 1]], args=cmd[at + 2 :])


CHANGES = [
    dict(),
    dict(tokens=36, train_budgets=(144, 36)),
    dict(bf16=False, resume=False, pad=True, packing=True),
    dict(sharding="zero3"),
    dict(learning_rate=3e-4, num_epochs=0.5, max_steps=11, save_steps=3),
    dict(images=Path("a b/c"), output_dir=Path("d")),
    dict(projector=Path("p")),
    dict(projector=None, image_size=224),
    dict(eval_data=Path("e.json"), eval_budgets=(144, 1)),
    dict(closed_form_init=True, standardize=True, projector=None),
    dict(report_to="wandb"),
    dict(checkpoint_above=0),
    dict(checkpoint_above=5000),
    dict(torch_compile=True, sharding="none"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_command_says_the_stage_and_nothing_is_lost(one, two, change):
    for stage in (one, two):
        stage = replace(stage, **change)
        for cmd in (
            torchrun_cmd(stage),
            accelerate_cmd(stage, "x.yaml"),
            shlex.split(shlex.join(torchrun_cmd(stage))),
        ):
            assert parsed(cmd) == stage


def test_torchrun_reads_its_command(one):
    from torch.distributed.run import get_args_parser

    python, m, module, *rest = torchrun_cmd(one, gpus=4)
    assert (python, m, module) == (sys.executable, "-m", "torch.distributed.run")
    args = get_args_parser().parse_args(rest)
    assert (args.nproc_per_node, args.standalone, args.module, args.training_script) == (
        "4",
        True,
        True,
        "delta_llava",
    )
    _, _, _, *rest = torchrun_cmd(replace(one, per_device_batch_size=16), 8, 2, "first:29500")
    args = get_args_parser().parse_args(rest)
    assert (args.nnodes, args.rdzv_endpoint, args.rdzv_backend, args.standalone) == (
        "2",
        "first:29500",
        "c10d",
        False,
    )


def bare():
    "The environment of a shell in which no environment of Python is activated."
    return os.environ | dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1")


def stand_in(folder):
    "A package of our name that writes down what it was given, where `python -m` finds it first."
    (folder / "delta_llava").mkdir()
    (folder / "delta_llava" / "__init__.py").touch()
    (folder / "delta_llava" / "__main__.py").write_text(
        "import os, sys\n"
        "rank, size = os.environ.get('RANK', '0'), os.environ.get('WORLD_SIZE', '1')\n"
        "open(rank, 'w').write(' '.join([f'{rank}/{size}', *sys.argv[1:]]))\n"
    )
    return bare() | dict(PYTHONPATH=str(folder))


@pytest.mark.slow
def test_torchrun_starts_the_package_where_no_environment_is_activated(tmp_path, one):
    subprocess.run(torchrun_cmd(one, gpus=2), cwd=tmp_path, env=stand_in(tmp_path), check=True)
    for rank in "01":
        assert (tmp_path / rank).read_text().split()[:2] == [f"{rank}/2", "pretrain"]


@pytest.mark.slow
def test_accelerate_starts_the_package_where_no_environment_is_activated(tmp_path, one):
    (file := tmp_path / "one.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_machines: 1\n"
        "num_processes: 1\nmachine_rank: 0\nuse_cpu: true\nmixed_precision: 'no'\n"
    )
    subprocess.run(accelerate_cmd(one, file), cwd=tmp_path, env=stand_in(tmp_path), check=True)
    assert (tmp_path / "0").read_text().split()[:2] == ["0/1", "pretrain"]


@pytest.mark.parametrize(
    "sharding,gpus,kind",
    [("none", 1, "NO"), ("none", 8, "MULTI_GPU"), ("fsdp2", 8, "FSDP"), ("zero3", 8, "DEEPSPEED")],
)
def test_accelerate_reads_its_file(tmp_path, two, full, sharding, gpus, kind):
    (file := tmp_path / "c.yaml").write_text(
        yaml.safe_dump(accelerate_config(replace(two, sharding=sharding), full, gpus))
    )
    config = load_config_from_file(str(file))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, gpus, 1)
    assert config.mixed_precision == (None if sharding == "zero3" else "bf16")


def launched(file, monkeypatch):
    "The environment in which `accelerate launch` would start the processes."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(
        ["--config_file", str(file), "--module", "delta_llava", "finetune"]
    )
    args, _, _ = _validate_launch_command(args)
    return args, prepare_multi_gpu_env(args)


def test_fsdp2_arrives_in_the_processes(tmp_path, two, full, monkeypatch):
    "From the file through accelerate's own launcher to its plugin, which finds every class in the model."
    (file := tmp_path / "c.yaml").write_text(yaml.safe_dump(accelerate_config(two, full)))
    args, env = launched(file, monkeypatch)
    assert args.use_fsdp and args.num_processes == 8
    for k, v in env.items():
        if k.startswith(("FSDP", "ACCELERATE_USE")):
            monkeypatch.setenv(k, v)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (
        2,
        True,
        False,
    )
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    for name in plugin.transformer_cls_names_to_wrap:
        assert get_module_class_from_name(full, name) is not None
    plugin.set_auto_wrap_policy(full)
    fields = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, **sharding_fields(two, ["LlamaDecoderLayer"])
    ).fsdp_plugin_args
    assert str(plugin.state_dict_type) == f"StateDictType.{fields['state_dict_type']}"  # as the file says
    assert fields["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer" and fields["fsdp_version"] == 2
    assert plugin.cpu_ram_efficient_loading == fields["cpu_ram_efficient_loading"]


@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_file(zero):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(deepspeed_config(zero))
    assert config.is_zero3() == (zero == 3) and config.is_zero2() == (zero == 2) and not config.is_offload()
    assert json.loads(json.dumps(deepspeed_config(zero))) == deepspeed_config(zero)
    assert any(k.startswith("stage3") for k in config.config["zero_optimization"]) == (zero == 3)


def test_transformers_fills_in_what_is_automatic(tmp_path):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    class Config(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
        pass  # where deepspeed is not installed, the first has no base

    config = Config.__new__(Config)  # nor a constructor
    HfDeepSpeedConfig.__init__(config, deepspeed_config())
    config._dtype, config.mismatches = None, []
    config.trainer_config_process(
        TrainingArguments(
            str(tmp_path), per_device_train_batch_size=16, max_grad_norm=1.0, bf16=True, use_cpu=True
        )
    )
    assert (
        config.config["train_micro_batch_size_per_gpu"],
        config.config["gradient_clipping"],
        config.config["bf16"],
    ) == (16, 1.0, dict(enabled=True)) and not config.mismatches


# Slurm


def test_slurm_script_is_a_script(two):
    text = slurm_script(replace(two, per_device_batch_size=8, images=Path("a b")), nodes=2)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --ntasks-per-node=1",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
    ):
        assert line in text.splitlines()
    assert "--images 'a b'" in text and "@first@" not in text


def slurm(tmp_path, two, srun):
    "The script with programs of our own in place of Slurm's."
    for name, body in dict(
        scontrol='if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >> "$OUT/requeued"; fi',
        srun=srun,
    ).items():
        (path := tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (script := tmp_path / "job.sh").write_text(slurm_script(replace(two, per_device_batch_size=8), nodes=2))
    env = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        OUT=str(tmp_path),
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_JOB_ID="77",
        SLURM_CPUS_PER_TASK="64",
    )
    return subprocess.Popen(
        ["bash", str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_slurm_job_connects_to_the_first_node_and_ends_as_the_training_ends(tmp_path, two):
    job = slurm(tmp_path, two, 'echo "$@"; exit 3')
    stdout, _ = job.communicate(timeout=60)
    assert job.returncode == 3 and "--rdzv-endpoint first:29500" in stdout
    assert (
        f"{sys.executable} -m torch.distributed.run" in stdout and "--module delta_llava finetune" in stdout
    )
    assert not (tmp_path / "requeued").exists()


def test_slurm_job_goes_back_into_the_queue_before_its_time_is_up(tmp_path, two):
    job = slurm(
        tmp_path, two, 'touch "$OUT/started"; while [ ! -e "$OUT/requeued" ]; do sleep .1; done; exit 0'
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    stdout, _ = job.communicate(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n" and job.returncode == 0, stdout


# All files


def test_files_are_written_and_read(tmp_path, two, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = write_launch(two, "launch")
    assert all(f.exists() for f in files)
    assert (
        load_config_from_file(str(tmp_path / "launch" / "accelerate.yaml")).fsdp_config["fsdp_version"] == 2
    )
    assert load_config_from_file(str(tmp_path / "launch" / "one-gpu.yaml")).num_processes == 1
    assert json.loads((tmp_path / "launch" / "zero3.json").read_text())["zero_optimization"]["stage"] == 3
    for name in ("finetune.sh", "finetune.slurm"):
        lines = (tmp_path / "launch" / name).read_text().splitlines()
        subprocess.run(["bash", "-n", str(tmp_path / "launch" / name)], check=True)
        assert shlex.split(lines[lines.index("set -eu") + 1]) == ["cd", str(tmp_path)]
    assert parsed(shlex.split((tmp_path / "launch" / "finetune.sh").read_text().splitlines()[-1])) == two


def test_the_written_file_for_zero3_is_found_from_anywhere(tmp_path, two, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    write_launch(replace(two, sharding="zero3"), "launch")
    monkeypatch.chdir(tmp_path)
    config = load_config_from_file(str(tmp_path / "a b" / "launch" / "accelerate.yaml"))
    assert (
        json.loads(Path(config.deepspeed_config["deepspeed_config_file"]).read_text()) == deepspeed_config()
    )


@pytest.mark.slow
def test_the_written_script_runs_from_anywhere(tmp_path, one, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    env = stand_in(Path.cwd())
    write_launch(one, "launch", gpus=1)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", tmp_path / "a b" / "launch" / "pretrain.sh"], env=env, check=True)
    assert (tmp_path / "a b" / "0").read_text().startswith("0/1 pretrain --data one.json")


# Passes


def test_what_fits_without_recomputation_fills_the_memory(one, two, full):
    "A pass of so many tokens takes the usable part of the memory; one more token recomputes."
    for stage in (one, two, replace(two, lora_rank=8, sharding="none", per_device_batch_size=4)):
        tokens = fitting_tokens(stage, full, 8)
        planned = plan_checkpointing(stage)
        assert planned == replace(stage, checkpoint_above=tokens)
        rows = stage.batch_size // 8 // stage.accumulate(8)
        length = tokens // rows
        kept = memory_bytes(planned, full, 8, length, length - 144)
        again = memory_bytes(planned, full, 8, length + 1, length - 143)
        assert sum(kept.values()) == pytest.approx(0.85 * 80e9, rel=0.01)
        assert again["blocks"] < kept["blocks"] / 4
        assert recomputes(planned, tokens + 1) and not recomputes(planned, tokens)


def test_more_memory_recomputes_less_and_none_at_all_recomputes_all(one, full):
    tokens = [fitting_tokens(one, full, 8, gigabytes * 1e9) for gigabytes in (10, 40, 80, 141)]
    assert tokens[0] == 0 and tokens == sorted(set(tokens))
    planned = plan_checkpointing(one, gpu_memory=10e9)
    assert planned.checkpoint_above == 0 and recomputes(planned, 1)
    for given in (replace(one, checkpoint_above=7), replace(one, gradient_checkpointing=False)):
        assert plan_checkpointing(given) == given


def test_the_estimate_counts_recomputation_only_where_the_plan_has_it(one, full):
    average = 32 * (64 + 144)
    rows = ROWS["pretrain"]
    always, never = (
        row_flops(replace(one, gradient_checkpointing=again), full, rows)["llm"] for again in (True, False)
    )
    assert always > never
    for above, expected in ((average, never), (average - 1, always), (0, always)):
        stage = replace(one, checkpoint_above=above)
        assert row_flops(stage, full, rows)["llm"] == expected
    report = estimate_report(estimate(replace(one, checkpoint_above=average, torch_compile=True)))
    assert f"in passes of more than {average:,} tokens; average rows make {average:,}" in report
    assert "layers are compiled" in report
    assert "in no pass" in estimate_report(estimate(replace(one, gradient_checkpointing=False)))


# What is refused


def test_batches_that_cannot_be_made(one):
    assert (
        estimate(one, 1)["accumulate"],
        estimate(one, 8)["accumulate"],
        estimate(one, 4)["accumulate"],
    ) == (8, 1, 2)
    with pytest.raises(ValueError, match="try per_device_batch_size=16"):
        torchrun_cmd(one, 8, 2)
    with pytest.raises(ValueError, match="gpus=0 and nodes=1 must be at least 1"):
        torchrun_cmd(one, 0)


def test_unknown_shapes(one):
    with pytest.raises(ValueError, match="not known here"):
        pretrained_config("./nowhere")
    assert pretrained_config("hub:lmsys/vicuna-7b-v1.5").hidden_size == 4096
    pretrained_config("lmsys/vicuna-7b-v1.5").vocab_size = 7
    assert pretrained_config("lmsys/vicuna-7b-v1.5").vocab_size == 32000  # copies


def test_disk(one, two, full):
    "As `check_disk_space` counts before a run: trained weights with two moments, in stage 2 the full model."
    assert disk_bytes(one, full) == {
        "one checkpoint": 12 * 42_503_680,
        "three checkpoints": 36 * 42_503_680,
        "result": 4 * 42_503_680,
    }
    trained = sum(t for t, _ in parameter_counts(two, full).values())
    assert (
        disk_bytes(two, full)["one checkpoint"] == 12 * trained + 4 * parameter_counts(two, full)["tower"][1]
    )
    tower = parameter_counts(two, full)["tower"][1]
    assert disk_bytes(replace(two, sharding="none"), full)["one checkpoint"] == 12 * trained + 2 * tower
