"The paper's claims: a verdict follows its numbers, and other numbers give another one."

import json
from pathlib import Path

import pytest

from delta_llava import claims, cli
from delta_llava.claims import CLAIMS, claim_report, claim_rows, numbered_claim

RUNS = Path(__file__).resolve().parent.parent / "runs"


def verdict(name, runs=RUNS):
    return CLAIMS[name].finding(runs)[0]


def test_list_and_single_claims_on_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", {name: CLAIMS[name] for name in list(CLAIMS)[-30:]})
    cli.main(["claims", "--runs", str(RUNS)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30 and lines[-1].split()[:3] == ["30", "not", "run"]
    cli.main(["claims", "1", "30", "--runs", str(RUNS)])
    printed = capsys.readouterr().out
    assert printed.count("verdict: ") == 2 and "launch pretrain" in printed
    with pytest.raises(SystemExit, match=r"number=31 must be one of 1\.\.30"):
        cli.main(["claims", "31"])


def test_a_claim_with_a_record_says_how_to_repeat_it():
    number = 1 + list(CLAIMS).index("throughput_on_a_gpu")
    record = json.loads((RUNS / "speed_full.json").read_text(encoding="utf-8"))
    report = claim_report(number, RUNS)
    assert record["command"] in report and record["hardware"] in report
    assert numbered_claim(number).finding("nowhere")[0] == "not run"


def changed_record(tmp_path, name, change):
    "A copy of a record with other numbers."
    record = json.loads((RUNS / name).read_text(encoding="utf-8"))
    change(record)
    (tmp_path / name).write_text(json.dumps(record))


def test_faster_answers_make_the_claim_of_throughput_true(tmp_path):
    def faster(record):
        row = next(row for row in record["result"] if row["tokens"] == 1)
        row["gain"]["end to end"] = [1.55, 1.5, 1.6]

    changed_record(tmp_path, "speed_full.json", faster)
    assert verdict("throughput_on_a_gpu") == "does not hold"
    assert verdict("throughput_on_a_gpu", tmp_path) == "holds"


@pytest.mark.parametrize(
    "hit,expected", [([0.5, 0.4, 0.6], "holds at small scale"), ([0.2, 0.1, 0.3], "undecided")]
)
def test_grad_cam_is_compared_with_the_center(hit, expected, tmp_path):
    def better(record):
        for row in record["result"]:
            row["methods"]["gradcam"]["hit"] = hit

    changed_record(tmp_path, "gradcam.json", better)
    assert verdict("gradcam_finds_the_object") == "does not hold at small scale"
    assert verdict("gradcam_finds_the_object", tmp_path) == expected


@pytest.mark.parametrize(
    "cider,expected", [(0.0, "does not hold at small scale"), (1000.0, "holds at small scale")]
)
def test_captions_are_compared_seed_by_seed(cider, expected, tmp_path):
    def other_captions(record):
        for row in record["result"]:
            if row["compressor"] == "delta":
                row["cider"] = cider

    changed_record(tmp_path, "captions.json", other_captions)
    assert verdict("better_captions_than_fastv", tmp_path) == expected


def test_overlapping_seeds_are_undecided():
    assert claims._compare([1.0, 2.0], [2.0, 3.0]) is None
    assert (
        claims._compare([3.0, 4.0], [1.0, 2.0]) is True and claims._compare([1.0, 2.0], [3.0, 4.0]) is False
    )
    assert claims._together([True, None]) is None and claims._together([False, False]) is False


def replaced(monkeypatch, number, system, column, value, tokens=None):
    "One number of the paper's tables replaced."
    real = claims.paper_cells

    def cells(n):
        found = []
        for cell in real(n):
            here = n == number and (cell["system"], cell["column"]) == (system, column)
            here = here and tokens in (None, cell["tokens"])
            found.append(cell | dict(value=value) if here else cell)
        return found

    monkeypatch.setattr(claims, "paper_cells", cells)


@pytest.mark.parametrize(
    "name,change",
    [
        ("deltaproj_lowers_all", (3, "No DeltaProj", "SQA", 70.0)),
        ("best_gqa_and_sqa", (1, "TokenPacker", "GQA", 63.0, "144")),
        ("top_on_four", (1, "QueCC", "POPE", 83.0, "1")),
        ("times_fall", (4, "LLaVA", "Finetuning", 20_000.0, "1")),
        ("emhsa_and_pope", (3, "No TB", "POPE", 89.0)),
    ],
)
def test_another_number_refutes_what_holds(name, change, monkeypatch):
    assert verdict(name) == "holds"
    replaced(monkeypatch, *change)
    assert verdict(name) == "does not hold"


@pytest.mark.parametrize(
    "name,change",
    [
        ("tb_and_mme", (3, "No TB", "MME", 1460.0)),
        ("beats_qwen", (2, "Qwen-VL-Chat", "VizWiz", 38.9)),
        ("first_or_second_on_four", (1, "Delta-LLaVA (Ours)", "SQA", 70.8, "36")),
    ],
)
def test_another_number_saves_what_does_not_hold(name, change, monkeypatch):
    assert verdict(name) == "does not hold"
    replaced(monkeypatch, *change)
    assert verdict(name) == "holds"


def test_rows_have_all_columns():
    (row,) = claim_rows(RUNS, ["deltaproj_lowers_all"])
    assert set(row) == {"number", "section", "claim", "verdict", "numbers", "shown by"} and all(row.values())
