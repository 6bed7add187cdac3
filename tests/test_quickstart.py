"The whole road in miniature, with the real tower, LLM and pictures; and recipes that cannot be."
import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from delta_llava import quickstart
from delta_llava.quickstart import SETS, Recipe, answer, held_out_images, load_trained, run, score_trained, training_images
from delta_llava.tower import open_image

TINY = Recipe(steps=2, batch_size=2, train_images=8, test_images=2, tokens=16, train_budgets=(16,), test_budgets=(4, 16))

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same miniature twice, in two folders."
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    return folders, [run(TINY, folder) for folder in folders]

def unchanging(record):
    "A record without what depends on the folder, the clock and the command."
    return {k: v for k,v in record.items() if k not in ("seconds", "resumed", "command", "picture", "commit")}

def steps_left(monkeypatch):
    "Optimizer steps of the runs to come."
    taken,step = [],torch.optim.AdamW.step
    def counted(self, *args, **kwargs):
        taken.append(1)
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return taken

# ---------------------------------------------------------------- the road

@pytest.mark.slow
def test_two_runs_give_the_same_numbers(runs):
    (one, two), records = runs
    assert unchanging(records[0]) == unchanging(records[1])
    scores = records[0]["result"]["scores"]
    assert scores.keys() == SETS.keys() and all(s.keys() == {"4", "16"} for s in scores.values())
    assert (one/"projector.safetensors").read_bytes() == (two/"projector.safetensors").read_bytes()
    assert records[0]["seeds"] == [0] and records[0]["recipe"] == json.loads(json.dumps(asdict(TINY)))

@pytest.mark.slow
def test_report_is_whole(runs):
    (folder, _), (record, _) = runs
    page = (folder/"report.html").read_text()
    body = page.split("</style>")[1]
    assert not re.search(r"[{}]", body) and not re.search(r"\bnan\b", body.lower())
    figures = re.findall(r'src="([^"]+)"', page)
    assert figures == ["examples.png", "gradcam.png", "loss.png"]
    for name in figures: assert min(open_image(folder/name).size) > 100
    assert body.count("<tr") == 1 + 4*2 and body.count('class="main"') == 4 and (folder/"record.json").exists()
    for name in SETS: assert name.replace("_", " ") in body
    assert record["said"] in body and f"<em>{record['word']}</em>" in body and "{{" not in page

@pytest.mark.slow
def test_trained_model_answers(runs):
    (folder, _), (record, _) = runs
    model,processor,recipe = load_trained(folder)
    assert recipe == TINY and not model.training
    said = answer(model, processor, open_image(record["picture"]))
    assert said == record["example"] == answer(model, processor, open_image(record["picture"]), tokens=16)
    assert isinstance(answer(model, processor, open_image(record["picture"]), "What colour is it?", tokens=4, max_new_tokens=3), str)

@pytest.mark.slow
def test_model_card_tells_how_to_load_it(runs):
    (folder, _), _ = runs
    scope = dict(folder=folder)
    exec(re.search(r"```python\n(.*?)```", (folder/"README.md").read_text(), re.S)[1], scope)
    ours,theirs = (m.multi_modal_projector.state_dict() for m in (load_trained(folder)[0], scope["model"]))
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)

@pytest.mark.slow
def test_same_recipe_goes_on_another_is_refused(runs, monkeypatch):
    (_, folder), (_, record) = runs
    taken = steps_left(monkeypatch)
    again = run(TINY, folder)
    assert unchanging(again) == unchanging(record) and not taken  # nothing is trained twice
    assert again["resumed"] and not record["resumed"] and "since it was resumed" in (folder/"report.html").read_text() and "since it was resumed" in (folder/"README.md").read_text()
    with pytest.raises(ValueError, match="holds a run of another recipe"): run(replace(TINY, seed=1), folder)
    assert json.loads((folder/"recipe.json").read_text())["seed"] == 0 and (folder/"report.html").exists()

@pytest.mark.slow
def test_trained_folder_is_scored_again_and_speaks(runs):
    "The same numbers as in the run's own record, and the words that `answer` gives."
    (folder, _), (record, _) = runs
    rows = score_trained(folder)
    assert [(r["set"], r["tokens"]) for r in rows] == [(name, t) for name in SETS for t in TINY.test_budgets]
    for r in rows:
        own = record["result"]["scores"][r["set"]][str(r["tokens"])]
        assert {k: r[k] for k in ("right", "shuffled", "p", "naming")} == {k: own[k] for k in ("right", "shuffled", "p", "naming")} and len(r["said"]) == len(r["true"]) == 2
    assert next(r for r in rows if r["tokens"] == TINY.tokens)["said"][0] == record["example"]
    few = score_trained(folder, (9,), 3)
    assert {r["tokens"] for r in few} == {9} and len(few[0]["said"]) == 3 and 0 <= few[0]["recall"] <= 1

# ---------------------------------------------------------------- its parts

def test_pictures_of_the_sets_are_apart(tmp_path):
    rows,held = training_images(TINY, tmp_path), held_out_images(TINY, tmp_path)
    assert len(rows) == 8 and held.keys() == SETS.keys() and all(len(h) == 2 for h in held.values())
    for name,part in held.items():
        counts = {len(row["objects"]) for row in part}
        assert counts == {1} if "one thing" in name else counts <= {2, 3}
    captions = [row["conversations"][1]["value"] for row in rows]
    again = training_images(TINY, tmp_path/"again")
    assert [row["conversations"][1]["value"] for row in again] == captions
    other = training_images(replace(TINY, seed=1), tmp_path/"other")
    assert not {tuple(map(str, row["objects"])) for row in other} & {tuple(map(str, row["objects"])) for row in rows}  # seeds share no scene

@pytest.mark.parametrize("name,p,naming,expected", [("heldout_scenes, one thing", .001, .32, True), ("heldout_scenes, one thing", .001, .30, False),
    ("heldout_artist, several things", .001, .19, True), ("heldout_artist, several things", .001, .18, False), ("heldout_artist, several things", .02, .9, False)])
def test_goal(name, p, naming, expected):
    assert quickstart.reached(name, dict(p=p, naming=naming)) is expected

@pytest.mark.parametrize("fields,error", [
    (dict(steps=0), "steps=0 must be at least 1"), (dict(batch_size=0), "batch_size=0 must be at least 1"), (dict(train_images=0), "train_pictures=0"),
    (dict(test_images=1), "test_pictures=1 must be at least 2"), (dict(tokens=4), "tokens=4 must be one of test_budgets"),
    (dict(tokens=25, train_budgets=()), "tokens=25 must be one of test_budgets")])
def test_recipes_that_cannot_be(fields, error):
    with pytest.raises(ValueError, match=re.escape(error)): Recipe(**fields)

@pytest.mark.slow
@pytest.mark.parametrize("fields,error", [(dict(image_size=100), "image_size=100 must be a multiple of the tower's patch size 14"),
                                          (dict(train_budgets=(5,)), "tokens=5 must be the square"), (dict(test_budgets=(16, 169)), "tokens=169 must be the square")])
def test_recipes_that_do_not_fit_the_tower(fields, error, tmp_path):
    with pytest.raises(ValueError, match=re.escape(error)): run(replace(TINY, **fields), tmp_path)
    assert not (tmp_path/"scenes").exists()

def test_empty_budgets_are_the_main_one():
    recipe = Recipe(tokens=1, train_budgets=(), test_budgets=())
    assert recipe.train_budgets == recipe.test_budgets == (1,)

def test_report_needs_a_map(tmp_path):
    with pytest.raises(ValueError, match="a map over a single token"): run(Recipe(tokens=1, test_budgets=()), tmp_path/"q")
    assert not (tmp_path/"q").exists()

def test_folder_without_a_trained_projector(tmp_path):
    with pytest.raises(ValueError, match="holds no trained projector"): load_trained(tmp_path)
