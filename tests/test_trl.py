"TRL's `SFTTrainer` trains our model: with our collator, and with TRL's own batches of messages and images."

import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from tiny_stage import EachStep, stage, write_parts
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from delta_llava.collator import Collator
from delta_llava.conversations import load_conversations
from delta_llava.tower import open_image
from delta_llava.train import build_stage_model
from delta_llava.trainer import freeze, stage_arguments, train_stage

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
pytestmark = pytest.mark.slow
SAME = dict(
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    weight_decay=0.0,
    max_grad_norm=1.0,
    seed=0,
    data_seed=0,
    save_strategy="no",
)
STEPS = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def model_and_rows(parts, folder, kind="finetune"):
    "TokenPacker has no DropPath, which would draw anew in each trainer."
    settings = stage(kind, parts, folder, compressor="tokenpacker")
    return *build_stage_model(settings), load_conversations(settings.data, text_rows=True)


def sft(folder, **options):
    fields = dict(
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    return trl.SFTConfig(str(folder), **SAME | fields | options)


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def changed_parts(model, before):
    "Parts of the model whose weights changed."
    return {name.partition(".")[0] for name, p in model.named_parameters() if not p.equal(before[name])}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("pretrain", {}),
        ("finetune", {}),
        ("finetune", dict(packing=True)),
        (
            "finetune",
            dict(gradient_checkpointing=True, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        ),
    ],
    ids=str,
)
def test_trl_trains_the_model_as_our_trainer_does(parts, tmp_path, kind, options):
    options = dict(options)
    collator = dict(max_length=512, packing=options.pop("packing", False))
    model, processor, rows = model_and_rows(parts, tmp_path, kind)
    start = {name: p.clone() for name, p in model.named_parameters()}
    freeze(model, kind)
    trainer = trl.SFTTrainer(
        model,
        args=sft(tmp_path, **options),
        train_dataset=rows,
        data_collator=Collator(processor=processor, **collator),
        processing_class=processor,
    )
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == STEPS and sum(losses[-5:]) < sum(losses[:5]) - (2.5 if kind == "finetune" else 0.1)
    learned = {"multi_modal_projector"} | ({"language_model"} if kind == "finetune" else set())
    assert changed_parts(model, start) == learned
    ours, _, _ = model_and_rows(parts, tmp_path, kind)
    args = stage_arguments(
        tmp_path / "ours",
        max_steps=STEPS,
        batch_size=4,
        learning_rate=1e-2,
        seed=0,
        use_cpu=True,
        save_strategy="no",
    )
    train_stage(
        ours,
        rows,
        Collator(processor=processor, max_length=512),
        args,
        stage=kind,
        callbacks=[each := EachStep()],
    )
    assert_close(losses, each.losses, rtol=1e-3, atol=1e-3)


def test_trl_makes_our_batches_of_prompts_and_completions(parts, tmp_path):
    "Without our collator: the same ids, labels and pixels; TRL pads on the other side."
    _, processor, rows = model_and_rows(parts, tmp_path)
    rows = [rows[i] for i in (0, 5, 25)]

    def turn(t):
        return [
            dict(
                role=dict(human="user", gpt="assistant")[t["from"]],
                content=t["value"].removeprefix("<image>\n"),
            )
        ]

    examples = [
        dict(
            images=[open_image(r["image"])] if r["image"] else [],
            prompt=turn(r["conversations"][0]),
            completion=turn(r["conversations"][1]),
        )
        for r in rows
    ]
    ours = Collator(processor=processor)(rows)
    trl_batch = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(
        processor, completion_only_loss=True
    )(examples)
    assert trl_batch["pixel_values"].equal(ours["pixel_values"])
    for i, (here, there) in enumerate(
        zip(ours["attention_mask"].bool(), trl_batch["attention_mask"].bool(), strict=True)
    ):
        for key in ("input_ids", "labels"):
            assert trl_batch[key][i][there].equal(ours[key][i][here])


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    "A whole model with its processor, as anybody would hand it on."
    folder = tmp_path_factory.mktemp("folder")
    model, processor, _ = model_and_rows(parts, folder)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def pictures(parts, **columns):
    "A data set of four images and what is said about them."
    rows = dict(images=[[str(parts / f"{i}.png")] for i in range(4)])
    rows |= {name: [[turn] for turn in turns] for name, turns in columns.items()}
    return Dataset.from_dict(rows).cast_column("images", List(ImageFeature()))


def turns_of(role, texts):
    return [dict(role=role, content=text) for text in texts]


COLORS = ["red", "green", "blue", "grey"]


def test_sft_of_a_folder(parts, folder, tmp_path):
    "TRL loads model and processor by name, and makes its own batches."
    rows = pictures(parts, prompt=turns_of("user", ["Colour?"] * 4), completion=turns_of("assistant", COLORS))
    options = dict(dataset_kwargs=None, learning_rate=3e-3)
    trainer = trl.SFTTrainer(str(folder), args=sft(tmp_path, **options), train_dataset=rows)
    assert type(trainer.model).__name__ == "DeltaLlavaForConditionalGeneration"
    assert type(trainer.processing_class).__name__ == "DeltaLlavaProcessor"
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == STEPS and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert changed_parts(trainer.model, start) == {"multi_modal_projector", "language_model"}
    trainer.save_model(str(tmp_path / "again"))
    AutoModelForImageTextToText.from_pretrained(tmp_path / "again")


def test_dpo_of_a_folder(parts, folder, tmp_path):
    "The right color is preferred to the next one."
    rows = pictures(
        parts,
        prompt=turns_of("user", ["Colour?"] * 4),
        chosen=turns_of("assistant", COLORS),
        rejected=turns_of("assistant", COLORS[1:] + COLORS[:1]),
    )
    args = trl.DPOConfig(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        max_length=None,
        **SAME,
    )
    trainer = trl.DPOTrainer(str(folder), args=args, train_dataset=rows)
    trainer.train()
    losses = logged(trainer)
    assert abs(losses[0] - 0.693) < 0.05  # policy and reference are the same model
    assert losses[-1] < losses[0] - 0.03
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]
    assert margins[-1] > 0.03
