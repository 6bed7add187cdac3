"The program: its help, and errors that are one sentence before any model is loaded."

import io
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer, llm_config
from transformers import CLIPVisionConfig

from delta_llava import cli, quickstart
from delta_llava.config import dinov2_s14
from delta_llava.projector import DeltaProjector
from delta_llava.quickstart import Quickstart
from delta_llava.vlm import save_projector


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no sentence of the help is broken


@pytest.fixture
def loaded(monkeypatch):
    "Nothing may load a model here."
    stub = Mock(side_effect=AssertionError("a model was loaded"))
    for name in ("build", "assemble"):
        monkeypatch.setattr(quickstart, name, stub)
    return stub


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def trained(tmp_path):
    "A folder as `run` leaves it, with an untrained projector."
    folder = save_projector(DeltaProjector(dinov2_s14(d_llm=64)), tmp_path / "trained")
    (folder / "recipe.json").write_text(json.dumps(asdict(Quickstart())))
    return folder


def refused(*args, capsys):
    "The sentence with which the program ends, after checking that it is one, on stderr, with exit code 1."
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in args])
    code = stopped.value.code  # a text: Python prints it on stderr and exits with 1
    assert isinstance(code, str) and code.startswith("delta-llava: ") and "\n" not in code
    assert "Traceback" not in (said := capsys.readouterr()).err and not said.out
    return code


def printed(*args, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(args))
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_names_the_commands(capsys):
    text = printed("--help", capsys=capsys)
    for word in (
        "quickstart",
        "chat",
        "gradcam",
        "token-efficient visual projector",
        "Ask a trained model about a picture",
    ):
        assert word in text


@pytest.mark.parametrize(
    "command,words",
    [
        (
            "quickstart",
            [
                "--steps",
                "Optimizer steps",
                "--train-budgets",
                "Budgets of the training steps",
                "--folder",
                "--calibrated",
                "authors' start",
            ],
        ),
        (
            "chat",
            ["--image", "The picture", "--ask", "One question", "--tokens", "Budget V, a square", "--folder"],
        ),
        (
            "gradcam",
            ["--word", "A word of the answer", "--out", "The figure", "--tokens", "Budgets, one column each"],
        ),
        (
            "doctor",
            [
                "A JSON list of LLaVA rows",
                "--images",
                "--out",
                "index.json",
                "--no-text-rows",
                "--llm",
                "--max-length",
                "--workers",
            ],
        ),
        (
            "tasks",
            [
                "offline tasks for lmms-eval",
                "--split",
                "an artist never seen",
                "--caption",
                "Prompt of the captions",
                "--seed",
            ],
        ),
        (
            "speed",
            [
                "--tokens",
                "ratios are to the first",
                "--caches",
                "CUDA graphs",
                "--batch",
                "--answer",
                "--repeats",
                "--random-weights",
            ],
        ),
    ],
)
def test_help_of_a_command_carries_the_comments_of_its_fields(command, words, capsys):
    text = printed(command, "--help", capsys=capsys)
    for word in words:
        assert word in text, word


@pytest.mark.parametrize("command", ["chat", "gradcam"])
def test_pictures_that_cannot_be_read(command, tmp_path, image, trained, loaded, capsys):
    half, text = tmp_path / "half.png", tmp_path / "text.png"
    noise = Image.effect_noise((200, 200), 90)
    noise.save(buffer := io.BytesIO(), "PNG")
    half.write_bytes(buffer.getvalue()[:2000])
    text.write_text("no picture")
    for path, word in (
        (tmp_path / "none.png", "is not a file"),
        (tmp_path, "is not a file"),
        (half, "half.png"),
        (text, "text.png"),
    ):
        said = (
            refused(command, "--image", path, "--folder", trained, "--out", tmp_path / "o.png", capsys=capsys)
            if command == "gradcam"
            else refused(command, "--image", path, "--ask", "What?", "--folder", trained, capsys=capsys)
        )
        assert word in said
    assert not loaded.called


@pytest.mark.parametrize("command", ["chat", "gradcam"])
def test_folders_without_a_trained_projector(command, tmp_path, image, trained, loaded, capsys):
    assert "holds no trained projector" in refused(
        command, "--image", image, "--folder", tmp_path / "none", capsys=capsys
    )
    (trained / "projector.safetensors").unlink()  # a run that was stopped before its end
    assert "holds no trained projector" in refused(
        command, "--image", image, "--folder", trained, capsys=capsys
    )
    assert not loaded.called


@pytest.mark.parametrize("command", ["chat", "gradcam"])
@pytest.mark.parametrize("tokens", [5, 0, 169])
def test_budgets_that_cannot_be(command, tokens, image, trained, loaded, capsys):
    assert f"tokens={tokens} must be the square" in refused(
        command, "--image", image, "--tokens", tokens, "--folder", trained, capsys=capsys
    )
    assert not loaded.called


def test_figure_needs_a_folder(tmp_path, image, trained, loaded, capsys):
    assert "does not exist" in refused(
        "gradcam", "--image", image, "--out", tmp_path / "no" / "a.png", "--folder", trained, capsys=capsys
    )
    assert not loaded.called


@pytest.mark.parametrize("args", [["--steps", "0"], ["--tokens", "4"], ["--test-pictures", "1"]])
def test_recipes_that_cannot_be(args, tmp_path, loaded, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", *args, "--folder", str(tmp_path / "q")])
    assert stopped.value.code and not (tmp_path / "q").exists() and not loaded.called
    said = capsys.readouterr()
    assert "must be" in said.err + str(stopped.value.code) and "Traceback" not in said.err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="goes on from the last checkpoint"):
        cli.main(["quickstart", "--folder", str(tmp_path)])


def test_quickstart_passes_every_field(tmp_path, monkeypatch, capsys):
    scores = {
        "some": {"16": dict(right=1.0, shuffled=2.0, p=1e-5, naming=0.5, pointing=0.4, pointing_chance=0.1)}
    }
    run = Mock(return_value=dict(result=dict(scores=scores), image="p.png", example="A fox."))
    monkeypatch.setattr(cli, "run", run)
    cli.main(
        [
            "quickstart",
            "--seed",
            "7",
            "--steps",
            "3",
            "--train-budgets",
            "4",
            "16",
            "--no-calibrated",
            "--folder",
            str(tmp_path),
        ]
    )
    recipe, folder = run.call_args.args
    assert (
        recipe == Quickstart(seed=7, steps=3, train_budgets=(4, 16), calibrated=False)
        and type(recipe) is Quickstart
        and folder == tmp_path
    )
    text = capsys.readouterr().out
    assert (
        "A fox." in text
        and "50%" in text
        and str(tmp_path / "report.html") in text
        and "chat --image p.png" in text
    )


def rows(folder, *images):
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Red."}]
    (folder / "set.json").write_text(
        json.dumps([{"id": str(i), "image": image, "conversations": turns} for i, image in enumerate(images)])
    )
    return str(folder / "set.json")


def test_doctor_ends_with_1_if_rows_are_left_out(tmp_path, image, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["doctor", rows(tmp_path, "a.png"), "--workers", "1"])
    assert (
        "1 rows, 1 kept, 0 repaired, 0 left out" in capsys.readouterr().out
        and (tmp_path / "runs" / "doctor-set" / "report.txt").is_file()
    )
    cli.main(["doctor", rows(tmp_path, "a.png", "a.jpg"), "--images", str(tmp_path), "--out", "seen"])
    assert "1 kept, 1 repaired" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", rows(tmp_path, "a.png", "lost.png"), "--out", "seen"])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "missing" in said and "row 1 (id '1')" in said and "index.json" in said
    assert [r["id"] for r in json.loads((tmp_path / "seen" / "index.json").read_text())] == ["0"]


def test_doctor_passes_every_field(tmp_path, monkeypatch, capsys):
    seen = Mock(return_value=Mock(outcomes={"left out": 0}))
    monkeypatch.setattr(cli, "examine", seen)
    cli.main(
        [
            "doctor",
            rows(tmp_path),
            "--images",
            "pictures",
            "--out",
            "o",
            "--no-text-rows",
            "--max-length",
            "99",
            "--workers",
            "3",
        ]
    )
    assert seen.call_args.args == (tmp_path / "set.json", Path("pictures"), Path("o"), False, None, 99, 3)


def test_doctor_measures_with_the_llms_tokenizer(tmp_path, image, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llm" / "model.safetensors").touch()  # never read
    cli.main(
        [
            "doctor",
            rows(tmp_path, "a.png"),
            "--out",
            str(tmp_path / "o"),
            "--llm",
            str(tmp_path / "llm"),
            "--tokens",
            "9",
            "--max-length",
            "200",
        ]
    )  # of 201
    assert "over-long" in (said := capsys.readouterr().out) and "1 kept" in said


def test_doctor_that_is_stopped_does_not_speak_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "examine", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="Stopped; o is as it was"):
        cli.main(["doctor", rows(tmp_path), "--out", "o"])


@pytest.mark.slow
def test_program_ends_with_one_line_and_code_1(tmp_path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", "from delta_llava.cli import main; main()", "chat", "--image", "none.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "delta-llava: image 'none.png' is not a file; check the path.\n",
    )


# ---- convert
def stage1(folder):
    "A projector of the authors at small width: LLaVA's MLP."
    torch.save(
        {
            f"model.mm_projector.{k}": torch.ones(s)
            for k, s in {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}.items()
        },
        folder / "mm_projector.bin",
    )
    return folder / "mm_projector.bin"


def test_convert_there_and_back(tmp_path, capsys):
    cli.main(
        [
            "convert",
            str(stage1(tmp_path)),
            str(tmp_path / "ours"),
            "--compressor",
            "mlp",
            "--grid",
            "4",
            "--tokens",
            "16",
            "--levels",
            "3",
        ]
    )
    said = capsys.readouterr().out
    assert (
        "compressor 'mlp', 4 tensors" in said
        and "16 visual tokens of 4×4 patches, levels (3,), 6 → 8 channels" in said
    )
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "authors"])
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["mm_projector.bin"] and str(
        tmp_path / "back"
    ) in capsys.readouterr().out


def test_convert_says_what_is_missing(tmp_path, capsys):
    assert "compressor is missing" in refused("convert", stage1(tmp_path), tmp_path / "ours", capsys=capsys)
    assert "neither a folder nor a file" in refused(
        "convert", tmp_path / "none", tmp_path / "ours", capsys=capsys
    )
    assert not (tmp_path / "ours").exists()


def test_convert_that_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "convert", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="was not written"):
        cli.main(["convert", "a", "b"])


# ---- launch
def test_launch_prints_the_command_and_the_estimate_and_runs_nothing(tmp_path, monkeypatch, capsys):
    import subprocess

    for name in ("run", "Popen"):
        monkeypatch.setattr(subprocess, name, Mock(side_effect=AssertionError("something was started")))
    cli.main(
        [
            "launch",
            "finetune",
            "--data",
            "d.json",
            "--images",
            "p",
            "--gpus",
            "4",
            "--memory",
            "40",
            "--text",
            "300",
            "--out",
            str(tmp_path / "launch"),
        ]
    )
    said = capsys.readouterr().out
    assert said.startswith(
        "torchrun --standalone --nproc-per-node 4 --no-python delta-llava finetune --data d.json --images p "
    )
    assert (
        "5,198 steps" in said
        and "300 text tokens" in said
        and "in 40 GB" in said
        and "A run of ours: not run." in said
    )
    assert {p.name for p in (tmp_path / "launch").iterdir()} == {
        "finetune.sh",
        "finetune.slurm",
        "accelerate.yaml",
        "one-gpu.yaml",
        "zero3.json",
        "estimate.json",
    }
    assert json.loads((tmp_path / "launch" / "estimate.json").read_text())["rows"]["text"] == 300


def test_launch_refuses_what_cannot_run(capsys):
    assert "try device_batch_size=8" in refused("launch", "finetune", "--nodes", "2", capsys=capsys)
    assert "stage 1 leaves the LLM" in refused("launch", "pretrain", "--lora", "8", capsys=capsys)
    assert "is not known here" in refused("launch", "pretrain", "--llm", "./nowhere", capsys=capsys)


def test_speed_prints_a_table(tmp_path, capsys):
    CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ).save_pretrained(tmp_path / "tower")
    llm_config().save_pretrained(tmp_path / "llm")
    cli.main(
        [
            "speed",
            "--tower",
            str(tmp_path / "tower"),
            "--llm",
            str(tmp_path / "llm"),
            "--random-weights",
            "--device",
            "cpu",
            *"--image-size 56 --tokens 16 1 --text 6 --answer 3 --repeats 3".split(),
        ]
    )
    about, _, *table = capsys.readouterr().out.strip().splitlines()
    assert about.startswith("CPU, 1 thread(s), measured: ") and "gain over 16 tokens" in about
    assert [[c.strip() for c in line.split("|")[1:4]] for line in table if line[2].isdigit()] == [
        ["16", "mlp", "1"],
        ["1", "delta", "1"],
    ]


# ---------------------------------------------------------------- evaluate


def scored(seed, tokens, **more):
    "What `score_trained` gives for one set and budget."
    return (
        dict(
            seed=seed,
            compressor="delta",
            tokens=tokens,
            set="heldout_scenes, one thing",
            right=1.0 + seed,
            shuffled=2.0,
            p=1e-5,
            naming=0.5,
            f1=0.25 * seed,
            exact_match=0.5,
            cider=300.0,
            cider_reference=400.0,
            said=["A fox."],
        )
        | more
    )


def test_evaluate_scores_every_seed_and_says_what_is_missing(tmp_path, trained, monkeypatch, capsys):
    other = tmp_path / "seed1"
    shutil.copytree(trained, other)
    (other / "recipe.json").write_text(json.dumps(asdict(Quickstart(seed=1))))
    score = Mock(side_effect=lambda folder, tokens, images: [scored(int(folder == other), t) for t in tokens])
    monkeypatch.setattr(cli, "score_trained", score)
    cli.main(["evaluate", str(trained), str(other), "--tokens", "16", "4", "--pictures", "8"])
    assert [c.args for c in score.call_args_list] == [(trained, (16, 4), 8), (other, (16, 4), 8)]
    said = capsys.readouterr().out
    assert (
        "1.50 (1.00–2.00, n=2)" in said
        and "0.12 (0.00–0.25, n=2)" in said
        and "heldout scenes, one thing" in said
    )
    assert (
        "Not run: the paper's benchmarks" in said
        and f"--model delta_llava --model_args pretrained={trained},tokens=4 --tasks gqa,mmbench_en_dev"
        in said
    )
    record = json.loads((trained / "evaluation.json").read_text())
    assert (
        record["seeds"] == [0, 1] and len(record["result"]) == 4 and record["result"][0]["said"] == ["A fox."]
    )


def test_evaluate_without_cider_says_so(trained, monkeypatch, capsys):
    monkeypatch.setattr(
        cli, "score_trained", Mock(return_value=[scored(0, 16, cider=None, cider_reference=None)])
    )
    cli.main(["evaluate", str(trained), "--out", str(trained / "e.json")])
    said = capsys.readouterr().out
    assert "| 1.00 " in said and "not run" in said and (trained / "e.json").is_file()


def test_evaluate_prints_the_papers_tables(tmp_path, capsys):
    cli.main(["evaluate", "--tables", "--runs", str(tmp_path)])
    said = capsys.readouterr().out
    for number in range(1, 7):
        assert f"Table {number} (§" in said
    assert "38.9 ⚠a" in said and "Shifted columns" in said and "not run" in said


def test_evaluate_refuses_before_a_model_is_loaded(tmp_path, trained, loaded, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    (other / "recipe.json").write_text(json.dumps(asdict(Quickstart(steps=7))))
    for args, word in (
        [[], "name a trained folder, or --tables"],
        [[tmp_path / "none"], "holds no trained projector (no recipe.json)"],
        [[trained, "--tokens", "5"], "tokens=5 must be the square"],
        [[trained, "--pictures", "1"], "pictures=1 must be at least 2"],
        [[trained, other], "holds another recipe than"],
        [[trained, "--out", tmp_path / "no" / "e.json"], "cannot be written to"],
        [["--tables", "--runs", tmp_path / "no"], "is not a folder"],
    ):
        assert word in refused("evaluate", *args, capsys=capsys)
    (other / "projector.safetensors").unlink()
    assert "no projector.safetensors" in refused("evaluate", other, capsys=capsys)
    assert not loaded.called
