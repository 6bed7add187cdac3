"The program: fast help, one-sentence errors before a model is loaded, and what commands pass on."

import ast
import importlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer, llm_config
from transformers import CLIPVisionConfig

from delta_llava import cli
from delta_llava.config import dinov2_s14
from delta_llava.files import shipped_folder
from delta_llava.projector import DeltaProjector
from delta_llava.scenes import concept_names
from delta_llava.settings import CaptionTraining, Finetune, Pretrain, Quickstart
from delta_llava.vlm import save_projector

HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets", "matplotlib", "scipy", "peft", "accelerate")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no sentence of the help is broken


@pytest.fixture
def loaded(monkeypatch):
    "Nothing may load a model here."
    stub = Mock(side_effect=AssertionError("a model was loaded"))
    for module, name in (("runs", "load"), ("processor", "build_pretrained"), ("train", "build_stage_model")):
        monkeypatch.setattr(importlib.import_module(f"delta_llava.{module}"), name, stub)
    return stub


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def trained(tmp_path):
    "A folder as a run leaves it, with an untrained projector."
    folder = save_projector(DeltaProjector(dinov2_s14(d_llm=64)), tmp_path / "trained")
    write_settings(folder, CaptionTraining())
    return folder


def write_settings(folder, config):
    about = dict(kind="captions", settings=asdict(config), seeds=[config.seed], result={})
    (folder / "run.json").write_text(json.dumps(about, default=str))


def refused(*args, capsys):
    "The sentence with which the program ends, after checking that it is one, on stderr, with exit code 1."
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in args])
    code = stopped.value.code  # a text: Python prints it on stderr and exits with 1
    assert isinstance(code, str) and code.startswith("delta-llava: ") and "\n" not in code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and not printed.out
    return code


def printed(*args, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(args))
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


# --- help and mistakes are fast


@pytest.mark.parametrize(
    "args",
    ["--help", "--version", "trian", "pretrain --help", "quickstart --sed 1", "chat --image none.png",
     "pretrain --data none.json", "doctor none.json", "convert none out", "evaluate none",
     "compare --compressors", "quickstart --stage1-steps 0", "launch --help", "speed --help", "flops --help"],
)  # fmt: skip
def test_help_and_mistakes_load_nothing_heavy(args, tmp_path):
    "What `--help` imports, in a process of its own."
    code = f"""
import contextlib, io, sys
from delta_llava.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main({args.split()!r})
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_import_of_the_package_is_lazy():
    code = f"import delta_llava, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_the_commands(capsys):
    text = printed("--help", capsys=capsys)
    for word in (
        *cli.COMMANDS,
        "token-efficient visual projector",
        "Ask a trained model about an image",
        "--debug",
    ):
        assert word in text


HELP = {
    "quickstart": ["--stage1-steps", "Optimizer steps of stage 1", "--train-budgets", "--output-dir"],
    "train": ["--max-steps", "Optimizer steps", "--closed-form-init", "--no-closed-form-init"],
    "pretrain": ["--learning-rate", "--eval-data", "--report-to", "--per-device-batch-size"],
    "finetune": ["--lora-rank", "--load-in-4bit", "--sharding"],
    "chat": ["--image", "The image", "--question", "One question", "--tokens", "Budget V, a square"],
    "gradcam": ["--word", "Words of the answer", "--out", "The figure", "--tokens", "one column each",
                "--method", "hirescam"],
    "doctor": ["A JSON list of LLaVA rows", "--images", "--out", "index.json", "--no-text-rows", "--llm",
               "--max-length", "--num-workers"],
    "tasks": ["offline tasks for lmms-eval", "--split", "--caption", "Prompt of the captions", "--seed"],
    "speed": ["--tokens", "ratios are to the first", "--caches", "CUDA", "--batch", "--repeats"],
}  # fmt: skip


@pytest.mark.parametrize("command,words", HELP.items(), ids=HELP)
def test_help_of_a_command_carries_the_comments_of_its_fields(command, words, capsys):
    text = printed(command, "--help", capsys=capsys)
    for word in words:
        assert word in text, word


@pytest.mark.parametrize("name", ["cli", "settings"])
def test_every_field_has_its_comment_on_its_own_line(name):
    "tyro takes the help of an option from there; of a default in parentheses over several lines it has none."
    source = (Path(cli.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    missing = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                one_line = field.lineno == field.end_lineno
                if not one_line or "  # " not in lines[field.lineno - 1]:
                    missing.append(f"{node.name}.{field.target.id}")
    assert not missing, missing


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "delta_llava", "chat", "--image", "none.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    sentence = "delta-llava: image=none.png is not a file; check the path.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


def test_debug_shows_the_traceback(tmp_path):
    for args in (["--debug", "chat", "--image", "none.png"], ["chat", "--image", "none.png", "--debug"]):
        done = subprocess.run(
            [sys.executable, "-m", "delta_llava", *args], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1 and "Traceback" in done.stderr and "is not a file" in done.stderr


# --- chat and gradcam


def question_command(command, path, folder, tmp_path):
    options = ["--out", tmp_path / "o.png"] if command == "gradcam" else ["--question", "What?"]
    return [command, "--image", path, "--output-dir", folder, *options]


@pytest.mark.parametrize("command", ["chat", "gradcam"])
def test_images_that_cannot_be_read(command, tmp_path, trained, loaded, capsys):
    half, text = tmp_path / "half.png", tmp_path / "text.png"
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "PNG")
    half.write_bytes(buffer.getvalue()[:2000])
    text.write_text("no image")
    cases = {
        tmp_path / "none.png": "is not a file", tmp_path: "is not a file", half: "half.png", text: "text.png"
    }  # fmt: skip
    for path, word in cases.items():
        assert word in refused(*question_command(command, path, trained, tmp_path), capsys=capsys)
    assert not loaded.called


@pytest.mark.parametrize("command", ["chat", "gradcam"])
def test_folders_without_a_trained_model(command, tmp_path, image, trained, loaded, capsys):
    none = refused(*question_command(command, image, tmp_path / "none", tmp_path), capsys=capsys)
    assert "holds no trained model" in none and "quickstart --output-dir" in none
    (trained / "projector.safetensors").unlink()  # a run that was stopped before its end
    assert "holds no trained model" in refused(
        *question_command(command, image, trained, tmp_path), capsys=capsys
    )
    assert not loaded.called


@pytest.mark.parametrize("command", ["chat", "gradcam"])
@pytest.mark.parametrize("tokens", [5, 0, 169])
def test_budgets_that_cannot_be(command, tokens, tmp_path, image, trained, loaded, capsys):
    sentence = refused(
        *question_command(command, image, trained, tmp_path), "--tokens", tokens, capsys=capsys
    )
    assert f"tokens={tokens}" in sentence and "square" in sentence
    assert not loaded.called


@pytest.mark.parametrize("damage", ["projector.json", "run.json", "projector.safetensors"])
def test_a_damaged_file_is_named(damage, image, trained, tmp_path, capsys):
    file = trained / damage
    file.write_bytes(file.read_bytes()[:20])
    sentence = refused(*question_command("chat", image, trained, tmp_path), "--tokens", 16, capsys=capsys)
    assert damage in sentence


def test_figure_needs_a_folder(tmp_path, image, trained, loaded, capsys):
    args = ("gradcam", "--image", image, "--out", tmp_path / "no" / "a.png", "--output-dir", trained)
    assert "does not exist" in refused(*args, capsys=capsys)
    assert not loaded.called


def test_the_word_that_the_image_decides_is_mapped(image, trained, tmp_path, monkeypatch, capsys):
    gradcam = importlib.import_module("delta_llava.gradcam")
    answerer = importlib.import_module("delta_llava.answerer")
    monkeypatch.setattr(importlib.import_module("delta_llava.runs"), "load", Mock(return_value=(None, None)))
    monkeypatch.setattr(
        answerer, "Answerer", Mock(return_value=Mock(answer=Mock(return_value="An owl swims.")))
    )
    effects = dict(An=9.0, owl=4.0, swims=1.0)
    monkeypatch.setattr(gradcam, "visual_effects", Mock(return_value=effects))
    monkeypatch.setattr(gradcam, "draw_answer", Mock())
    mapped = Mock()
    monkeypatch.setattr(gradcam, "word_cams", mapped)
    args = ["gradcam", "--image", str(image), "--output-dir", str(trained), "--tokens", "16"]
    args += ["--out", str(tmp_path / "o.png")]
    cli.main([*args, "--method", "saliency"])
    assert mapped.call_args.args[-1] == ["owl"]
    assert mapped.call_args.kwargs == dict(answer="An owl swims.", method="saliency", tokens=16)
    assert "in the paper" not in capsys.readouterr().out
    cli.main([*args, "--word", "swims"])
    assert mapped.call_args.args[-1] == ["swims"]
    assert "--method saliency" in capsys.readouterr().out


def test_chat_ends_with_the_input(image, trained, monkeypatch, capsys):
    "The end of the input (Ctrl-D) ends a conversation as an empty line does."
    answerer = importlib.import_module("delta_llava.answerer")
    monkeypatch.setattr(importlib.import_module("delta_llava.runs"), "load", Mock(return_value=(None, None)))
    monkeypatch.setattr(answerer, "Answerer", Mock(return_value=Mock(answer=Mock(return_value="A fox."))))
    for text in ("What?\n", "What?\n\nnever read\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        cli.main(["chat", "--image", str(image), "--output-dir", str(trained)])
        assert capsys.readouterr().out.count("A fox.") == 1


# --- trainings


@pytest.mark.parametrize("args", [["--stage1-steps", "0"], ["--tokens", "4"], ["--test-images", "1"]])
def test_settings_that_cannot_be(args, tmp_path, loaded, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", *args, "--output-dir", str(tmp_path / "q")])
    assert stopped.value.code and not (tmp_path / "q").exists() and not loaded.called
    printed = capsys.readouterr()
    assert "must be" in printed.err + str(stopped.value.code) and "Traceback" not in printed.err


@pytest.fixture
def quickstart_report(monkeypatch):
    "What `quickstart` calls."
    report = Mock()
    monkeypatch.setattr(importlib.import_module("delta_llava.quickstart"), "report_run", report)
    return report


def test_quickstart_passes_every_field(tmp_path, quickstart_report):
    options = "--seed 7 --stage1-steps 3 --train-budgets 4 16 --lora-rank 8".split()
    cli.main(["quickstart", *options, "--output-dir", str(tmp_path)])
    expected = Quickstart(seed=7, stage1_steps=3, train_budgets=(4, 16), lora_rank=8, output_dir=tmp_path)
    assert quickstart_report.call_args.args == (expected,)


def test_a_stop_says_how_to_go_on(tmp_path, quickstart_report, capsys):
    stop = KeyboardInterrupt("Stopped after step 44. Run the same command again to continue.")
    stop.signal = 15
    for raised, code, words in ((stop, 143, "after step 44"), (KeyboardInterrupt(), 130, "Stopped")):
        quickstart_report.side_effect = raised
        with pytest.raises(SystemExit) as stopped:
            cli.main(["quickstart", "--output-dir", str(tmp_path)])
        assert stopped.value.code == code
        assert words in capsys.readouterr().err


def test_train_is_a_training_on_captions(monkeypatch, capsys):
    run = Mock(return_value=(None, None, [dict(loss=3.0), dict(lr=1), dict(loss=1.0)]))
    monkeypatch.setattr(importlib.import_module("delta_llava.train"), "train_run", run)
    cli.main(["train", "--compressor", "mqt", "--tokens", "9"])
    (config,) = run.call_args.args
    assert type(config) is CaptionTraining
    assert config == CaptionTraining(
        compressor="mqt", tokens=9, train_budgets=(), eval_budgets=(), output_dir=Path("runs/train-mqt")
    )
    assert "3.00 → 1.00" in capsys.readouterr().out


def test_stages_check_their_data_first(tmp_path, loaded, capsys):
    for stage in ("pretrain", "finetune"):
        assert "data=none.json is not a file" in refused(stage, "--data", "none.json", capsys=capsys)
    assert not loaded.called


def test_comparison_of_nothing(capsys):
    for option in ("--compressors", "--budgets", "--seeds"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["compare", option])
        assert "is empty" in str(stopped.value.code) + capsys.readouterr().err


# --- doctor


def rows(folder, *images):
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Red."}]
    written = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(images)]
    (folder / "set.json").write_text(json.dumps(written))
    return str(folder / "set.json")


def test_doctor_ends_with_1_if_rows_are_left_out(tmp_path, image, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["doctor", rows(tmp_path, "a.png"), "--num-workers", "1"])
    assert "1 rows, 1 kept, 0 repaired, 0 left out" in capsys.readouterr().out
    assert (tmp_path / "runs" / "doctor-set" / "report.txt").is_file()
    cli.main(["doctor", rows(tmp_path, "a.png", "a.jpg"), "--images", str(tmp_path), "--out", "report"])
    assert "1 kept, 1 repaired" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", rows(tmp_path, "a.png", "lost.png"), "--out", "report"])
    text = capsys.readouterr().out
    assert stopped.value.code == 1 and "missing" in text and "row 1 (id '1')" in text and "index.json" in text
    index = json.loads((tmp_path / "report" / "index.json").read_text())
    assert [row["id"] for row in index] == ["0"]


@pytest.fixture
def examined(monkeypatch):
    "What `doctor` calls, whatever its name in the module."
    stub = Mock(return_value=Mock(outcomes={"left out": 0}))
    monkeypatch.setattr(importlib.import_module("delta_llava.doctor"), "check_dataset", stub)
    return stub


def test_doctor_passes_every_field(tmp_path, examined):
    options = "--images pictures --out o --no-text-rows --max-length 99 --num-workers 3".split()
    cli.main(["doctor", rows(tmp_path), *options])
    expected = (tmp_path / "set.json", Path("pictures"), Path("o"), False, None, 99, 3)
    assert examined.call_args.args == (*expected, False)  # links are not followed


def test_doctor_measures_with_the_llms_tokenizer(tmp_path, image, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llm" / "model.safetensors").touch()  # never read
    options = ["--llm", str(tmp_path / "llm"), "--tokens", "9", "--max-length", "200"]  # of 201
    cli.main(["doctor", rows(tmp_path, "a.png"), "--out", str(tmp_path / "o"), *options])
    text = capsys.readouterr().out
    assert "over-long" in text and "1 kept" in text


def test_doctor_that_is_stopped_does_not_speak_of_checkpoints(tmp_path, examined):
    examined.side_effect = KeyboardInterrupt
    with pytest.raises(SystemExit, match="Stopped; o is unchanged"):
        cli.main(["doctor", rows(tmp_path), "--out", "o"])


# --- convert


def stage1(folder):
    "A projector of the authors at small width: LLaVA's MLP."
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}
    state = {f"model.mm_projector.{name}": torch.ones(shape) for name, shape in shapes.items()}
    torch.save(state, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


def test_convert_there_and_back(tmp_path, capsys):
    options = "--compressor mlp --grid 4 --tokens 16 --levels 3".split()
    cli.main(["convert", str(stage1(tmp_path)), str(tmp_path / "ours"), *options])
    text = capsys.readouterr().out
    assert "compressor 'mlp', 4 tensors" in text
    assert "16 visual tokens of 4×4 patches, levels (3,), 6 → 8 channels" in text
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "authors"])
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["mm_projector.bin"]
    assert str(tmp_path / "back") in capsys.readouterr().out


def test_convert_says_what_is_missing(tmp_path, capsys):
    assert "compressor is missing" in refused("convert", stage1(tmp_path), tmp_path / "ours", capsys=capsys)
    assert "does not exist" in refused("convert", tmp_path / "none", tmp_path / "ours", capsys=capsys)
    assert not (tmp_path / "ours").exists()


def test_convert_that_is_stopped(tmp_path, monkeypatch):
    converting = importlib.import_module("delta_llava.checkpoints.converting")
    monkeypatch.setattr(converting, "convert", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="was not written"):
        cli.main(["convert", str(tmp_path), "b"])


# --- launch, speed


def test_launch_prints_the_command_and_the_estimate_and_runs_nothing(tmp_path, monkeypatch, capsys):
    for name in ("run", "Popen"):
        monkeypatch.setattr(subprocess, name, Mock(side_effect=AssertionError("something was started")))
    options = "--data d.json --images p --gpus 4 --memory 40 --text 300".split()
    cli.main(["launch", "finetune", *options, "--out", str(tmp_path / "launch")])
    text = capsys.readouterr().out
    processes = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 4 "
    assert text.startswith(processes + "--module delta_llava finetune --data d.json --images p ")
    for word in ("5,198 steps", "300 text tokens", "in 40 GB", "not run"):
        assert word in text
    expected = {
        "finetune.sh",
        "finetune.slurm",
        "accelerate.yaml",
        "one-gpu.yaml",
        "zero3.json",
        "estimate.json",
    }
    assert {p.name for p in (tmp_path / "launch").iterdir()} == expected
    assert json.loads((tmp_path / "launch" / "estimate.json").read_text())["rows"]["text"] == 300


def test_launch_passes_every_setting_of_a_stage():
    given = cli.Launch(stage="finetune", tokens=36, lora_rank=8, sharding="none", gpus=2).stage_settings()
    assert given == replace(
        Finetune(data=Path("llava_v1_5_mix665k.json")), tokens=36, lora_rank=8, sharding="none"
    )
    assert type(cli.Launch(stage="pretrain").stage_settings()) is Pretrain
    own = {"stage", "gpus", "nodes", "memory", "text", "out"}
    assert {f.name for f in fields(cli.Launch)} - own <= {f.name for f in fields(Pretrain)}


def test_launch_refuses_what_cannot_run(capsys):
    assert "try per_device_batch_size=8" in refused("launch", "finetune", "--nodes", "2", capsys=capsys)
    assert "stage 1 leaves the LLM" in refused("launch", "pretrain", "--lora-rank", "8", capsys=capsys)
    assert "is not known here" in refused("launch", "pretrain", "--llm", "./nowhere", capsys=capsys)


def test_speed_prints_a_table(tmp_path, capsys):
    tower = CLIPVisionConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56,
        patch_size=14,
    )  # fmt: skip
    tower.save_pretrained(tmp_path / "tower")
    llm_config().save_pretrained(tmp_path / "llm")
    parts = ["--tower", str(tmp_path / "tower"), "--llm", str(tmp_path / "llm"), "--random-weights"]
    options = "--device cpu --image-size 56 --tokens 16 1 --text 6 --answer 3 --repeats 3".split()
    cli.main(["speed", *parts, *options])
    about, _, *table = capsys.readouterr().out.strip().splitlines()
    assert about.startswith("CPU, 1 thread(s), measured: ") and "gain over 16 tokens" in about
    cells = [[c.strip() for c in line.split("|")[1:4]] for line in table if line[2].isdigit()]
    assert cells == [["16", "mlp", "1"], ["1", "delta", "1"]]


# --- evaluate


def scored(seed, tokens):
    "A row of `evaluate_run`."
    return dict(
        seed=seed, compressor="delta", tokens=tokens, set="heldout_scenes, one object",
        matched_loss=1.0 + seed,
        mismatched_loss=2.0, p=1e-5, forced_choice_accuracy=0.5, f1=0.25 * seed, exact_match=0.5, cider=300.0,
        cider_reference=400.0, captions=["A fox."],
    )  # fmt: skip


def test_evaluate_scores_every_seed_and_says_what_is_missing(tmp_path, trained, monkeypatch, capsys):
    other = tmp_path / "seed1"
    shutil.copytree(trained, other)
    write_settings(other, CaptionTraining(seed=1))
    score = Mock(side_effect=lambda folder, tokens, images: [scored(int(folder == other), t) for t in tokens])
    monkeypatch.setattr(importlib.import_module("delta_llava.captions"), "evaluate_run", score)
    cli.main(["evaluate", str(trained), str(other), "--tokens", "16", "4", "--images", "8"])
    assert [c.args for c in score.call_args_list] == [(trained, (16, 4), 8), (other, (16, 4), 8)]
    text = capsys.readouterr().out
    for word in ("1.50 (1.00–2.00, n=2)", "0.12 (0.00–0.25, n=2)", "heldout scenes, one object"):
        assert word in text
    assert f"pretrained={trained},tokens=4" in text and "gqa" in text
    record = json.loads((trained / "evaluation.json").read_text())
    assert record["seeds"] == [0, 1] and len(record["result"]) == 4


def test_evaluate_prints_the_papers_tables(tmp_path, capsys):
    cli.main(["evaluate", "--tables", "--runs", str(tmp_path)])
    text = capsys.readouterr().out
    for number in range(1, 7):
        assert f"Table {number} (§" in text
    assert "38.9 ⚠a" in text and "not run" in text


def test_evaluate_refuses_before_it_loads(tmp_path, trained, loaded, monkeypatch, capsys):
    assert "name a trained folder, or --tables" in refused("evaluate", capsys=capsys)
    assert "holds no trained model" in refused("evaluate", tmp_path / "none", capsys=capsys)
    assert "images=1 must be at least 2" in refused("evaluate", trained, "--images", 1, capsys=capsys)
    assert "tokens=5" in refused("evaluate", trained, "--tokens", 5, capsys=capsys)
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    write_settings(other, CaptionTraining(max_steps=7))
    assert "other settings" in refused("evaluate", trained, other, capsys=capsys)
    assert "not a folder" in refused("evaluate", "--tables", "--runs", tmp_path / "none", capsys=capsys)
    assert not loaded.called


# --- the model in the package


def test_without_a_run_of_ones_own_the_model_in_the_package_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.trained_folder(None) == shipped_folder()
    cli.print_training_scope(shipped_folder())
    note = capsys.readouterr().err
    assert "The model in the package" in note and all(name in note for name in concept_names())


def test_ones_own_run_comes_first_and_is_not_called_the_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = Path("runs/quickstart")
    own.mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/quickstart holds no trained model"):
        cli.trained_folder(None)
    shutil.copytree(shipped_folder(), own, dirs_exist_ok=True)  # a recipe's run
    assert cli.trained_folder(None) == own
    cli.print_training_scope(own)
    note = capsys.readouterr().err
    assert "This model was trained on drawn scenes" in note and "package" not in note
    run = json.loads((own / "run.json").read_text())
    for kind in ("captions", "quickstart"):  # the second is of earlier versions
        (own / "run.json").write_text(json.dumps(run | dict(kind=kind)))
        cli.print_training_scope(own)
        note = capsys.readouterr().err
        assert "was trained on one question" in note and "drawn scenes" not in note
