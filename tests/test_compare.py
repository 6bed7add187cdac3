"The comparison: its plan, a cell that is not run twice, a record of all cells."
import json
from dataclasses import replace

import pytest

from delta_llava import compare
from delta_llava.compare import cell_name, label, plan, table
from delta_llava.compressors.base import COMPRESSORS, VARIANTS
from delta_llava.quickstart import Recipe

TINY = Recipe(steps=2, batch_size=2, train_images=8, test_images=2)


def test_plan_trains_each_system_as_its_authors_do():
    cells = plan(["delta", "delta-elastic", "mlp", "m3", "mqt", "fastv", "quecc"], (36, 4), (0,), (True,))
    assert [(label(c), c.train_budgets, c.test_budgets) for c in cells] == [
        ("delta", (36,), (36,)), ("delta", (4,), (4,)), ("delta-elastic", (36, 4), (36, 4)), ("mlp", (144,), (144,)), ("m3", (36, 4), (36, 4)),
        ("mqt", (36, 4), (36, 4)), ("fastv", (144,), (36, 4)), ("quecc", (36,), (36,)), ("quecc", (4,), (4,))]
    assert all(c.tokens == c.test_budgets[0] for c in cells)


def test_plan_has_every_seed_and_start_and_every_name():
    names = [*COMPRESSORS, *VARIANTS, "delta-elastic"]
    cells = plan(names, (16, 4), (0, 1), (True, False))
    assert len({cell_name(c) for c in cells}) == len(cells)
    assert {(label(c), c.seed, c.calibrated) for c in cells} == {(n, s, c) for n in names for s in (0, 1) for c in (True, False)}
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)  # one seed after the other: a comparison that is stopped has whole seeds


def test_plan_leaves_out_what_cannot_be():
    assert [c.tokens for c in plan(["tokenpacker"], (36, 20, 4), (0,), (True,))] == [36, 4]
    wide = Recipe(tower="hub:openai/clip-vit-large-patch14-336", image_size=336)  # its own grid of 24×24
    assert [c.tokens for c in plan(["tokenpacker", "mlp"], (64, 36), (0,), (True,), wide)] == [64, 36, 576]
    with pytest.raises(ValueError, match="'perceiver' is unknown"): plan(["perceiver"], (16,), (0,), (True,))
    with pytest.raises(ValueError, match=r"can have one of budgets=\[10\]: tokens=10 must be the square"): plan(["delta"], (10,), (0,), (True,))
    with pytest.raises(ValueError, match="need more than one of budgets=\\[16\\]"): plan(["delta-elastic"], (16,), (0,), (True,))


def test_cells_that_have_a_file_are_not_run_again(tmp_path, monkeypatch):
    cells = plan(["delta", "m3"], (4,), (0,), (True, False), TINY)
    ran = []
    def run_cell(recipe, folder):
        ran.append(cell_name(recipe))
        if len(ran) == 3: raise KeyboardInterrupt
        path = folder/"cells"/f"{cell_name(recipe)}.json"
        path.parent.mkdir(exist_ok=True)
        result = dict(scores={"set": {"4": dict(naming=.5)}}, flops={"4": 7}, parameters=3, losses=[2., 1.])
        path.write_text(json.dumps(dict(commit="c", hardware="h", versions={}, matmul="highest", label=label(recipe), recipe=vars(recipe), result=result)))
    monkeypatch.setattr(compare, "run_cell", run_cell)
    monkeypatch.setattr(compare, "prepare", lambda cells, folder: None)
    with pytest.raises(KeyboardInterrupt): compare.compare(cells, tmp_path)
    with pytest.raises(ValueError, match="another recipe"): compare.compare([replace(c, steps=9) for c in cells], tmp_path)
    first = list(ran)
    half = json.loads((tmp_path/"record.json").read_text())  # what was run is there after a stop
    assert len(half["result"]) == 2 and half["not_run"] == [cell_name(c) for c in cells if cell_name(c) not in first[:2]] and half["hardware"] == "h"
    record = json.loads(compare.compare(cells, tmp_path).read_text())
    assert ran[3:] == [cell_name(c) for c in cells if cell_name(c) not in first[:2]] and len(ran) == 5
    assert [r["compressor"] for r in record["result"]] == ["delta", "delta", "m3", "m3"] and record["seeds"] == [0]
    assert {(r["label"], r["calibrated"]): r["values"] for r in table(record)} == {(n, s): [.5] for n in ("delta", "m3") for s in (True, False)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPRESSORS, *VARIANTS, "delta-elastic"])
def test_every_compressor_trains_and_is_scored(name, tmp_path):
    cell, = plan([name], (16, 4) if name == "delta-elastic" else (16,), (0,), (True,), replace(TINY, steps=4, train_images=16))
    record = json.loads(compare.compare([cell], tmp_path).read_text())
    r, = record["result"]
    assert all(0 < loss < 20 for loss in r["losses"]) and r["parameters"] > 1e5
    for scores in r["scores"].values():
        for t, s in scores.items(): assert 0 <= s["naming"] <= 1 and s["right"] > 0 and r["flops"][t] > 1e9
