"The paper's tables: numbers as printed, warnings on the cells they concern, our numbers beside them."

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from delta_llava import evaluate

ROOT = Path(__file__).resolve().parent.parent
SMALL, BIG = "LLaVA-1.5-7B", "LLaVA-1.5-13B"
BUDGETS = ("144", "64", "36", "16", "4", "1")
CAPTION_SETS = ("Nocaps", "Flickr30k")
OURS = dict(system="Delta-LLaVA (Ours)")


def cells(number, **where):
    "The cells of a table that agree with all of `where`."
    return [c for c in evaluate.paper_cells(number) if all(c[key] == value for key, value in where.items())]


def value(number, **where):
    (cell,) = cells(number, **where)
    return cell["value"]


def by_column(number, **where):
    return {c["column"]: c["value"] for c in cells(number, **where)}


def rows_of(number):
    "(system, LLM, budget) -> the numbers of a row."
    rows = {}
    for c in evaluate.paper_cells(number):
        rows.setdefault((c["system"], c["llm"], c["tokens"]), []).append(c["value"])
    return rows


def caption_score(system, llm, tokens, column):
    "A number of Table 6."
    return value(6, system=system, llm=llm, tokens=tokens, column=column)


# ---------------------------------------------------------------- the numbers


def test_numbers_of_tables_1_to_3_that_the_text_repeats():
    "§6.1–§6.3 repeat some numbers in words: a slip in the table would break one."
    assert value(1, column="GQA", tokens="144", **OURS) == 62.34
    assert value(1, column="GQA", tokens="144", system="TokenPacker") == 61.9
    assert value(1, column="SQA", tokens="144", **OURS) == 68.7
    assert value(1, column="SQA", tokens="144", system="Matryoshka Query") == 67.5
    assert [value(1, column="VizWiz", tokens=t, **OURS) for t in ("36", "16")] == [56.2, 55.2]
    assert value(1, column="MME", system="LLaVA-1.5") == 1510.7
    assert value(1, column="VQAv2", system="LLaVA-1.5") == 78.5
    for tokens in ("4", "1"):  # "the top scores on GQA, POPE, TextVQA, and VizWiz"
        for column in ("GQA", "POPE", "TextVQA", "VizWiz"):
            best = max(c["value"] or 0 for c in cells(1, column=column, tokens=tokens))
            assert value(1, column=column, tokens=tokens, **OURS) == best
    assert value(2, column="GQA", tokens="144") - value(2, column="GQA", tokens="448") > 3
    assert value(2, column="MMB", tokens="144") - value(2, column="MMB", tokens="448") > 11
    assert value(2, column="MME", tokens="144") == 1524
    full = by_column(3, system="Full Model")  # Table 1's row at 144 tokens, SQA to one more digit
    row = by_column(1, tokens="144", **OURS) | dict(SQA=68.67)
    assert full == {column: row[column] for column in full}


def test_numbers_of_tables_4_to_6_that_the_text_repeats():
    "§6.4–§6.6."
    assert value(4, column="Pretraining", tokens="1") == 16 * 60  # "16 minutes and 2.9 hours"
    assert 2.8 < value(4, column="Finetuning", tokens="1") / 3600 < 2.9
    for column in ("Pretraining", "Finetuning"):  # "a clear monotonic reduction"
        times = [c["value"] for c in cells(4, column=column)]
        assert times == sorted(times, reverse=True) and len(set(times)) == 6
    assert value(5, column="GQA", system="CLIP 336") == max(c["value"] for c in cells(5, column="GQA"))
    assert value(5, column="MME", system="SigLIP 386") == min(c["value"] for c in cells(5, column="MME"))
    for c in cells(6, tokens="576", system="FastV"):  # "performance is matched"
        assert c["value"] == caption_score("Ours", c["llm"], "576", c["column"])
    gains = []
    for tokens in ("144", "64"):
        for column in CAPTION_SETS:
            gains.append(
                caption_score("Ours", SMALL, tokens, column) - caption_score("FastV", SMALL, tokens, column)
            )
    assert 2 < min(gains) and max(gains) < 5  # "up to 3–5 CIDEr points"


@pytest.mark.parametrize(
    "number,printed",
    [
        (
            2,
            [
                "57.5 60.6 1487.5 68.2 38.9 78.2",
                "61.77 72.0 1524.0 87.0 73.1 41.7",
                "55.1 67.3 1452.3 86.2 72.4 33.1",
            ],
        ),
        (
            5,
            [
                "61.1 64.94 1442 86.12 67.82 57.2",
                "60.5 64.9 1448.1 84.56 69.3 56.1",
                "59.44 61.69 1345.03 85.2 68.42 55.54",
            ],
        ),
    ],
)
def test_tables_without_another_copy_are_as_printed(number, printed):
    "Typed a second time from the paper, row by row."
    rows = {}
    for c in evaluate.paper_cells(number):
        rows.setdefault((c["system"], c["tokens"]), []).append(c["printed"])
    assert [" ".join(row) for row in rows.values()] == printed


def guide_values(name):
    "A variable of the page on paper and code, which typed the tables by hand, apart from these."
    notebook = json.loads((ROOT / "nbs" / "00b_paper_and_code.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assignment = re.search(rf"^\w*{name} = (.*?)(?=^\w|\Z)", code, re.M | re.S)
    return eval(assignment[1])


def test_table_1_equals_the_reading_guides_copy():
    blocks, rows = guide_values("blocks"), rows_of(1)
    guide = []
    for block in blocks.values():
        guide += [[None if v is None else float(v) for v in row] for row in block]
    assert sorted(map(str, guide)) == sorted(map(str, rows.values()))
    for name, (own, *_) in blocks.items():
        tokens, llm = name.split()[-1], "Vicuna-1.5 13B" if "13B" in name else "Vicuna-1.5 7B"
        ours = [
            row
            for (system, model, t), row in rows.items()
            if (model, t) == (llm, tokens) and "Ours" in system
        ]
        assert list(own) in ours


def test_the_other_tables_equal_the_reading_guides_copies():
    assert guide_values("printed") == by_column(2, system="Qwen-VL-Chat")
    guide = {name: list(row) for name, row in guide_values("scores").items()}
    guide["Full Model"] = list(guide_values("whole"))
    assert guide == {system: row for (system, _, _), row in rows_of(3).items()}
    for tokens, times in guide_values("times").items():
        assert list(times) == [c["printed"] for c in cells(4, tokens=str(tokens))]
    where = [(llm, column) for llm in (SMALL, BIG) for column in CAPTION_SETS]
    for tokens, four in guide_values("captions").items():
        for (llm, column), pair in zip(where, four, strict=True):
            ours = tuple(caption_score(system, llm, str(tokens), column) for system in ("FastV", "Ours"))
            assert pair == ours


# ---------------------------------------------------------------- the warnings


def concerned(number, start):
    "The cells with a warning that holds these words."
    found = set()
    for c in evaluate.paper_cells(number):
        if any(start in warning for warning in c["warnings"]):
            found.add((c["system"], c["llm"], c["tokens"], c["column"]))
    return found


def caption_pairs():
    "(LLM, budget, column) -> ours and FastV's of Table 6, below 576 tokens."
    pairs = {}
    for llm in (SMALL, BIG):
        for tokens in BUDGETS:
            for column in CAPTION_SETS:
                pairs[llm, tokens, column] = tuple(
                    caption_score(s, llm, tokens, column) for s in ("Ours", "FastV")
                )
    return pairs


def test_warnings_of_table_6_sit_on_the_cells_they_concern():
    "Each selection is computed again from the numbers."
    pairs = caption_pairs()
    equal = {key for key, (ours, fastv) in pairs.items() if ours == fastv}
    below = {key for key, (ours, fastv) in pairs.items() if ours < fastv}
    assert {c[1:] for c in concerned(6, "Equal to FastV")} == equal
    assert {c[1:] for c in concerned(6, "Below FastV")} == below
    low, above = set(), set()
    for (llm, tokens, column), (ours, _) in pairs.items():
        full = caption_score("Ours", llm, "576", column)
        if ours / full < 0.85:
            low.add((llm, tokens, column))
        if llm == SMALL and ours > full:
            above.add((llm, tokens, column))
    assert {c[1:] for c in concerned(6, "≥ 85")} == low
    assert {c[1:] for c in concerned(6, "lies below")} == above
    protocol = [c for c in evaluate.paper_cells(6) if c["system"] == "FastV" or c["tokens"] == "576"]
    assert concerned(6, "own protocol") == {
        (c["system"], c["llm"], c["tokens"], c["column"]) for c in protocol
    }


def test_warnings_of_table_1_sit_on_the_cells_they_concern():
    table = evaluate.paper_tables()["tables"]["1"]
    lettered = zip("abcdefghij", table["warnings"], strict=False)
    other = next(letter for letter, w in lettered if w["message"].startswith("A budget that differs"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    marked = [row for row in rows if other in evaluate._warning_letters(table, row, "tokens")]
    assert [(row["system"], row["tokens"]) for row in marked] == [
        ("PruMerge", "~32"),
        ("Matryoshka Query", "2"),
    ]
    ours, base = by_column(1, tokens="144", **OURS), by_column(1, system="LLaVA-1.5", tokens="576")
    gains = concerned(1, "Consistent gains")
    assert {c[3] for c in gains} == {k for k in ours if ours[k] < base[k]} and {c[2] for c in gains} == {
        "144"
    }
    big, base = by_column(1, system="Delta-LLaVA-13B (Ours)"), by_column(1, system="LLaVA-1.5 13B")
    assert {c[3] for c in concerned(1, "13B LLM")} == {k for k in big if big[k] <= base[k]}
    splits = concerned(1, "Two splits")
    assert {c[3] for c in splits} == {"VQAv2", "VizWiz"} and len(splits) == 26 * 2 - 3  # three dashes


def test_warnings_of_tables_2_to_5_sit_on_the_cells_they_concern():
    published = dict(VQAv2=78.2, GQA=57.5, VizWiz=38.9, SQA=68.2, MME=1487.5, MMB=60.6)
    qwen = by_column(2, system="Qwen-VL-Chat")
    shifted = {c[3] for c in concerned(2, "Shifted")}
    assert shifted == {k for k, v in qwen.items() if published.get(k) != v} == {"POPE", "SQA", "VizWiz"}
    mme = {c["system"]: c["value"] for c in cells(3, column="MME")}
    assert [c[0] for c in concerned(3, "largest MME drop")] == [min(mme, key=mme.get)]
    assert {c[2] for c in concerned(4, "2.51×")} == {"144"}
    assert not concerned(5, "Bold in the paper") - {("SigLIP 386", "Vicuna 7B", "81", "SQA")}


@pytest.mark.parametrize("number", range(1, 7))
def test_every_warning_is_shown_at_a_cell_and_in_words(number):
    text = evaluate.paper_table(number, "none")
    table = text.partition("\n\n- ⚠a")[0]
    source = evaluate.paper_tables()["tables"][str(number)]
    marks = re.findall(r"⚠([a-j]+)", table)
    for letter, warning in zip("abcdefghij", source["warnings"], strict=False):
        assert any(letter in mark for mark in marks), letter
        assert warning["message"] in text and warning["evidence"] in text
    assert table.count("not run") == len(source["rows"])


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="number=7 must be one of 1..6"):
        evaluate.paper_table(7)


def test_selectors_name_rows_and_columns_that_exist():
    for table in evaluate.paper_tables()["tables"].values():
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for warning in table["warnings"]:
            for where in warning["cells"]:
                for key, values in where.items():
                    known = table["columns"] if key == "column" else [row[key] for row in rows]
                    assert set(values) <= set(known), (warning["message"], key)


# ---------------------------------------------------------------- our numbers


def comparison(label, tokens, *accuracies, closed_form_init=True):
    "One run of a comparison, in today's names."
    scores = {str(i): {tokens: dict(forced_choice_accuracy=a)} for i, a in enumerate(accuracies)}
    return dict(label=label, closed_form_init=closed_form_init, scores=scores)


def write_comparison(folder, *runs):
    settings = dict(max_steps=9, batch_size=2)
    (folder / "compare.json").write_text(json.dumps(dict(settings=settings, result=runs)))


def test_captions_stand_beside_table_6(tmp_path):
    "First the mean over the sets of a seed, then mean and range over the seeds."
    result = []
    for seed, name, tokens, held_out, f1 in (
        (0, "delta", 4, "one", 0.2),
        (1, "delta", 4, "one", 0.6),
        (0, "delta", 4, "two", 0.4),
        (1, "delta", 4, "two", 0.8),
        (0, "fastv", 64, "one", 0.9),
    ):
        result.append(dict(seed=seed, compressor=name, tokens=tokens, set=held_out, cider=100 * f1, f1=f1))
    (tmp_path / "captions.json").write_text(json.dumps(dict(patches=64, result=result)))
    columns = evaluate.recorded_columns(6, tmp_path)
    keys = [tuple(row[:3]) for row in evaluate.paper_tables()["tables"]["6"]["rows"]]
    f1 = dict(zip(keys, columns["here: F1 of the objects"], strict=True))
    ciders = dict(zip(keys, columns["here: CIDEr, planted scenes"], strict=True))
    assert f1["Ours", SMALL, "4"] == "0.50 (0.30–0.70, n=2)"
    assert ciders["FastV", SMALL, "576"] == ciders["Ours", SMALL, "576"] == "90 (90–90, n=1)"
    for key in (("Ours", BIG, "4"), ("Ours", BIG, "576"), ("Ours", SMALL, "64"), ("Ours", SMALL, "1")):
        assert f1[key] == "not run"


def test_forced_choice_stands_beside_table_1(tmp_path):
    mlp, delta = comparison("mlp", "64", 0.5, 1.0), comparison("delta", "4", 0.1, closed_form_init=False)
    write_comparison(tmp_path, mlp, delta)
    (texts,) = evaluate.recorded_columns(1, tmp_path).values()
    assert texts[0] == "75% (75%–75%, n=1)" and set(texts[1:]) == {"not run"}
    write_comparison(tmp_path, comparison("prumerge", "36", 0.25))
    (texts,) = evaluate.recorded_columns(1, tmp_path).values()
    assert [t for t in texts if t != "not run"] == ["25% (25%–25%, n=1) at 36 tokens"]  # beside "~32"
    assert evaluate.recorded_columns(2, tmp_path) == {"here": ["not run"] * 3}


def test_records_of_earlier_versions_are_read(tmp_path):
    "The committed records have the old names."
    run = dict(label="mlp", calibrated=True, scores=dict(a={"64": dict(naming=0.5)}))
    old = dict(recipe=dict(steps=9, batch_size=2), result=[run])
    (tmp_path / "compare.json").write_text(json.dumps(old))
    ((heading, texts),) = evaluate.recorded_columns(1, tmp_path).items()
    assert "9×2 images" in heading and texts[0] == "50% (50%–50%, n=1)"


def test_figure_has_means_and_bars_to_the_extremes():
    rows = []
    for held_out in ("a", "b"):
        for seed in (0, 1, 2):
            for name, budgets, factor in (("delta", (16, 4), 2), ("fastv", (64, 16, 4), 1)):
                for tokens in budgets:
                    f1 = (0.1 + 0.2 * seed) * factor * tokens / 16
                    rows.append(dict(seed=seed, compressor=name, tokens=tokens, set=held_out, f1=f1))
    fig = evaluate.draw_captions(dict(patches=64, result=rows), {"f1": "F1"})
    assert len(fig.axes) == 2
    for ax in fig.axes:
        assert ax.get_lines()[0].get_ydata()[0] == pytest.approx(0.3 * 4)  # all patches
        for container, factor in zip(ax.containers, (2, 1), strict=True):
            line, _, (bars,) = container.lines
            assert list(line.get_xdata()) == [4, 16]
            assert list(line.get_ydata()) == pytest.approx([0.3 * factor / 4, 0.3 * factor])
            assert bars.get_segments()[1][:, 1].tolist() == pytest.approx([0.1 * factor, 0.5 * factor])
    plt.close(fig)


def test_training_steps_stand_beside_table_4():
    columns = evaluate.recorded_columns(4, Path(__file__).parents[1] / "runs")
    small, full = list(columns)[:2], list(columns)[2:]
    assert all("7B with random weights, 1× NVIDIA H200" in heading for heading in full) and len(full) == 2
    steps = {
        heading: dict(zip((576, 144, 64, 16, 4, 1), columns[heading], strict=True)) for heading in columns
    }
    assert steps[full[0]][144] == "0.36" and steps[full[1]][144] == "0.60"
    assert steps[full[1]][1] == "not run" and "not run" not in columns[small[1]]
