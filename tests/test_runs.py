"Records and run folders: provenance, old names, fingerprints, opening what was trained, model cards."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from test_train import tiny_model
from tiny_stage import stage, write_parts

import delta_llava
from delta_llava.runs import (
    LEGACY_NAMES,
    add_results,
    commit,
    data_fingerprint,
    load,
    provenance,
    read_record,
    read_run,
    rename_legacy,
    write_card,
    write_record,
    write_run,
)
from delta_llava.train import build_stage_model
from delta_llava.vlm import save_projector

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


# ---------------------------------------------------------------- provenance


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_package(folder):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_the_commit_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("DELTA_LLAVA_COMMIT", raising=False)
    package = make_package(tmp_path / "delta_llava")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(package) == head
    (package / "__init__.py").write_text("x = 1\n")
    assert commit(package) == f"{head}-dirty"


@pytest.mark.parametrize(
    "program, name",
    [
        ("/x/delta_llava/__main__.py", "delta-llava"),
        ("/x/delta-llava", "delta-llava"),
        ("b/gpu.py", "gpu.py"),
    ],
)
def test_the_command_is_what_one_would_type(monkeypatch, program, name):
    monkeypatch.setattr("sys.argv", [program, "recipe", "--seed", "1"])
    assert provenance([1])["command"] == f"{name} recipe --seed 1"


def test_the_commit_of_an_enclosing_repository_is_not_taken(tmp_path, monkeypatch):
    "The package lies in the `.venv` of somebody's project, or untracked beside it."
    monkeypatch.delenv("DELTA_LLAVA_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "project.py").write_text("")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "second")
    for folder in (tmp_path / ".venv" / "site-packages" / "delta_llava", tmp_path / "delta_llava"):
        assert commit(make_package(folder)) == "not in a repository"
    monkeypatch.setenv("DELTA_LLAVA_COMMIT", "abc")
    assert commit(tmp_path / "delta_llava") == "abc"


def test_a_named_commit_wins_over_the_repository(tmp_path, monkeypatch):
    "A copy of the files may lie in a repository whose last commit is older than they are."
    package = make_package(tmp_path / "delta_llava")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "older")
    monkeypatch.setenv("DELTA_LLAVA_COMMIT", "abc")
    assert commit(package) == "abc"
    monkeypatch.setenv("DELTA_LLAVA_COMMIT", "")
    assert commit(package) == git(tmp_path, "rev-parse", "HEAD")


def test_a_record_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/delta-llava", "quickstart", "--seed", "3"])
    path = write_record(tmp_path / "runs" / "a.json", [3], dict(loss=1.5), max_steps=7)
    record = json.loads(path.read_text())
    keys = {"commit", "command", "hardware", "seeds", "versions", "max_steps", "result"}
    assert record.keys() == keys and all(record.values())
    assert record["command"] == "delta-llava quickstart --seed 3" and record["seeds"] == [3]
    assert record["result"] == {"loss": 1.5} and record["versions"]["torch"] == torch.__version__
    before = path.read_text()
    with pytest.raises(TypeError):
        write_record(path, [3], object())
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["a.json"]


# ---------------------------------------------------------------- names of earlier versions


def old_names(value, found=()):
    "Keys of a JSON value, at every depth."
    if isinstance(value, list):
        return set().union(*map(old_names, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(old_names, value.values()))


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.json")), ids=lambda p: p.stem)
def test_committed_records_are_read_with_todays_names(path):
    old, new = json.loads(path.read_text()), read_record(path)
    assert not old_names(new) & {*LEGACY_NAMES["anywhere"], *LEGACY_NAMES["held_out_sets"]}
    assert not old_names(new.get("settings", {})) & {*LEGACY_NAMES["settings"]}
    assert rename_legacy(new) == new
    for key in ("commit", "command", "hardware", "seeds"):
        assert new[key] == old[key]


def test_old_scores_and_settings_keep_their_values():
    record = read_record(ROOT / "runs" / "captions-seed0.json")
    old = json.loads((ROOT / "runs" / "captions-seed0.json").read_text())
    assert record["settings"]["learning_rate"] == old["recipe"]["lr"] == 5e-4
    assert record["settings"]["eval_budgets"] == old["recipe"]["test_budgets"]
    before = old["result"]["scores"]["heldout_scenes, one thing"]["16"]
    after = record["result"]["scores"]["heldout_scenes, one object"]["16"]
    pairs = dict(
        right="matched_loss",
        shuffled="mismatched_loss",
        naming="forced_choice_accuracy",
        pointing="pointing_accuracy",
        area="box_area",
        energy="energy",
        p="p",
    )
    for reference, ours in pairs.items():
        assert after[ours] == before[reference]


# ---------------------------------------------------------------- run folders


def test_a_run_is_described_finished_and_added_to(tmp_path):
    write_run(
        tmp_path, "pretrain", dict(tokens=16, data=Path("a.json")), seeds=[1], fingerprints=dict(data=1)
    )
    run = read_run(tmp_path)
    assert run["result"] is None and run["settings"] == dict(tokens=16, data="a.json") and run["seeds"] == [1]
    write_run(tmp_path, "pretrain", dict(tokens=16), seeds=[1], result=dict(losses=[1.0]), seconds=3)
    assert add_results(tmp_path, scores=dict(a=1))["result"] == dict(losses=[1.0], scores=dict(a=1))
    assert read_run(tmp_path)["result"]["scores"] == dict(a=1) and read_run(tmp_path)["seconds"] == 3


def test_damaged_and_missing_runs_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no run: there is no run.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match="run.json is not valid JSON"):
        read_run(tmp_path)


def test_fingerprints_are_of_the_content(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(bytes(i + 1))
    rows = [
        dict(id=str(i), image=str(tmp_path / f"{i}.png"), conversations=[dict(value="x")]) for i in range(3)
    ]
    rows.append(dict(id="t", image=None, conversations=[dict(value="y")]))
    (tmp_path / "a.json").write_text("[1]")
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    assert data_fingerprint(rows, tmp_path / "a.json") == data_fingerprint(rows, tmp_path / "b.json")
    first = data_fingerprint(rows)
    assert data_fingerprint(rows[:3]) != first
    (tmp_path / "1.png").write_bytes(bytes(9))
    assert data_fingerprint(rows)["image_sizes"] != first["image_sizes"]
    assert data_fingerprint(rows)["conversations"] == first["conversations"]


# ---------------------------------------------------------------- opening what was trained


def same_projector(model, folder):
    from safetensors.torch import load_file

    saved = load_file(folder / "projector.safetensors")
    return all(v.equal(saved[k]) for k, v in model.multi_modal_projector.state_dict().items())


@pytest.mark.parametrize("name", ["stage.json", "recipe.json", "run.json"])
def test_folders_of_every_version_are_opened(parts, tmp_path, name):
    "A projector, with the settings as the version wrote them."
    model, _ = build_stage_model(stage("pretrain", parts, tmp_path, template="v1", train_budgets=(1, 4)))
    torch.nn.init.normal_(next(model.multi_modal_projector.parameters()))
    save_projector(model, tmp_path)
    names = dict(tower=str(parts / "tower"), llm=str(parts / "llm"), compressor="delta", tokens=4)
    if name == "stage.json":
        old = names | dict(stage="pretrain", template="v1", budgets=[1, 4], lr=1e-3, bf16=False)
        (tmp_path / name).write_text(json.dumps(old))
    elif name == "recipe.json":
        (tmp_path / name).write_text(
            json.dumps(names | dict(train_budgets=[4], calibrated=True, template="v1"))
        )
    else:
        write_run(tmp_path, "pretrain", names | dict(template="v1"))
    opened, processor = load(tmp_path, device="cpu")
    assert same_projector(opened, tmp_path) and not opened.training and processor.tokens == 4
    assert read_run(tmp_path)["kind"] == ("quickstart" if name == "recipe.json" else "pretrain")
    if name == "stage.json":
        assert read_run(tmp_path)["settings"]["train_budgets"] == [1, 4]


def test_a_projector_alone_wants_names(parts, tmp_path):
    model, _ = build_stage_model(stage("pretrain", parts, tmp_path))
    save_projector(model, tmp_path)
    with pytest.raises(ValueError, match="nothing there names its tower and llm; name them: load"):
        load(tmp_path)
    opened, _ = load(tmp_path, tower=str(parts / "tower"), llm=str(parts / "llm"), device="cpu")
    assert same_projector(opened, tmp_path)


def test_a_whole_model_is_opened(parts, tmp_path):
    model, processor = build_stage_model(stage("finetune", parts, tmp_path))
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    opened, processor = load(tmp_path / "a", device="cpu")
    state = opened.state_dict()
    assert all(v.equal(state[k]) for k, v in model.state_dict().items()) and not opened.training


def test_what_is_no_model_is_refused(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no trained model"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError):
        load(parts / "llm")  # a model, but not ours


# ---------------------------------------------------------------- cards


def test_a_card_says_what_the_run_says(tmp_path):
    record = json.loads((ROOT / "runs" / "captions-seed0.json").read_text())
    record["recipe"] |= dict(tower="/elsewhere/towers/clip", llm="hub:someone/llm")
    save_projector(tiny_model(), tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(record))  # as an earlier version left it
    card = ModelCard.load(write_card(tmp_path))
    metadata = (card.data.license, card.data.license_name, card.data.base_model)
    assert metadata == ("other", "not-chosen-yet", ["someone/llm"])
    assert {"delta-llava", "delta", "pretrain"} <= set(card.data.tags)
    assert "elsewhere" not in card.content and "`clip`" in card.text and record["commit"] in card.text
    assert card.text.count("\n| heldout_") == sum(map(len, record["result"]["scores"].values()))
    assert 'load(folder, tower="…/clip"' in card.text
    assert ModelCard.load(write_card(tmp_path, "mit")).data.license == "mit"
    (tmp_path / "projector.json").unlink()  # as after stage 2
    assert "AutoModelForImageTextToText.from_pretrained(folder)" in write_card(tmp_path).read_text()


def test_the_version_is_known():
    assert delta_llava.__version__
