"The study: its plan, and what is read from its record."

import json
import math

import numpy as np
import pytest

from delta_llava import cli, compare
from delta_llava.claims import CLAIMS
from delta_llava.compare import run_label, run_name
from delta_llava.question_training import (
    HELD_OUT,
    pack_bits,
    paired_difference,
    question_scenes,
    system_scores,
)
from delta_llava.settings import QuestionTraining
from delta_llava.study import (
    BASELINES,
    GROUPS,
    best_baseline,
    difference_rows,
    hard_scores,
    held_out_questions,
    plan_study,
    score_rows,
    subset_scores,
)

SETTINGS = dict(test_images=4, most_objects=3, image_size=168, objects=[])
N = len(held_out_questions(dict(settings=SETTINGS)))


def run(label, seed, accuracy, tokens=4, hits=None):
    "One result of a record."
    tasks = {task: dict(accuracy=accuracy, mismatched_accuracy=0.1) for task in ("name", "count")}
    bits = pack_bits([False] * N if hits is None else hits.tolist())
    return dict(
        label=label,
        seed=seed,
        closed_form_init=True,
        converged=True,
        scores={split: {str(tokens): tasks} for split in HELD_OUT},
        bits={split: {str(tokens): bits} for split in HELD_OUT},
    )


def study_record(*runs):
    return dict(settings=SETTINGS, result=list(runs))


def test_plan_has_all_seeds_of_a_group_before_the_next():
    runs = plan_study(seeds=(0, 1))
    names = [run_name(run) for run in runs]
    assert len(set(names)) == len(names)
    groups = [next(i for i, systems in enumerate(GROUPS) if run_label(run) in systems) for run in runs]
    assert groups == sorted(groups)
    assert {run_label(run) for run in runs} == {name for systems in GROUPS for name in systems}
    assert set(BASELINES) < set(GROUPS[0])
    budgets = {t for run in runs if run_label(run) == "delta-elastic" for t in run.train_budgets}
    assert budgets == {36, 16, 4, 1}


def test_questions_are_planned_as_they_were_written(tmp_path):
    config = QuestionTraining(output_dir=tmp_path, train_images=1, test_images=5)
    settings = dict(SETTINGS, test_images=5, objects=list(config.objects))
    for split in HELD_OUT:
        planned = held_out_questions(dict(settings=settings), split)
        rows = question_scenes(config)[split]
        assert [q["task"] for q in planned] == [task for row in rows for task in row["task"].split(",")]
        counts = [len(row["objects"]) for row in rows for _ in row["task"].split(",")]
        assert [q["objects"] for q in planned] == counts
        assert all(0.2 < q["smallest"] <= 1 for q in planned)


def test_differences_are_paired_by_seed():
    runs = [run("delta-elastic", seed, 0.5 + 0.1 * seed + 0.02) for seed in range(3)]
    runs += [run("meanpool-elastic", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    runs += [run("random-elastic", seed, 0.4) for seed in range(3)]
    scores = system_scores(study_record(*runs))
    assert best_baseline(scores, 4) == "meanpool-elastic" and best_baseline(scores, 1) is None
    mean, low, high = paired_difference(scores["delta-elastic", 4], scores["meanpool-elastic", 4])
    assert np.allclose([mean, low, high], 0.02)  # the seeds differ by far more than the systems
    (row,) = difference_rows(scores, ["delta-elastic"], (4, 1))
    assert row == {"system": "delta-elastic", "4 tokens": "+2.0 (+2.0 to +2.0)", "1 tokens": "not run"}
    one_seed = system_scores(study_record(runs[0], runs[3]))
    assert math.isnan(paired_difference(one_seed["delta-elastic", 4], one_seed["meanpool-elastic", 4])[1])
    assert score_rows(one_seed, ["delta-elastic"], (4,)) == [{"system": "delta-elastic", "4 tokens": "52.0"}]


def test_hard_questions_are_the_errors_of_the_smaller_image():
    easy = np.arange(N) % 2 == 0
    ours = np.arange(N) < N // 2
    runs = [run("small-image", 0, 0.5, hits=easy), run("delta-elastic", 0, 0.5, hits=ours)]
    scores = hard_scores(study_record(*runs, run("delta-elastic", 1, 0.5, hits=ours)))
    assert scores == {("delta-elastic", 4): {0: pytest.approx(ours[~easy].mean())}}  # of the same seed only
    of_one = subset_scores(study_record(*runs), lambda question: question["objects"] == 1)
    questions = held_out_questions(study_record(*runs))
    chosen = np.array([question["objects"] == 1 for question in questions])
    assert of_one["delta-elastic", 4][0] == pytest.approx(ours[chosen].mean())


@pytest.mark.parametrize(
    "gain,verdict",
    [(0.1, "holds at small scale"), (-0.1, "does not hold at small scale"), (None, "undecided")],
)
def test_the_claim_follows_the_intervals(gain, verdict, tmp_path):
    runs = []
    for seed in range(3):
        for tokens in (36, 16, 4, 1):
            difference = (-1) ** seed * 0.05 if gain is None else gain + 0.01 * seed
            runs.append(run("tokenpacker-elastic", seed, 0.5, tokens))
            runs.append(run("delta-elastic", seed, 0.5 + difference, tokens))
    (tmp_path / "study.json").write_text(json.dumps(study_record(*runs)))
    assert CLAIMS["better_answers_than_tokenpacker"].finding(tmp_path)[0] == verdict
    runs[0]["converged"] = False
    (tmp_path / "study.json").write_text(json.dumps(study_record(*runs)))
    stopped_early = CLAIMS["better_answers_than_tokenpacker"].finding(tmp_path)
    assert stopped_early[0] == "undecided" and "not converged: tokenpacker-elastic" in stopped_early[1]
    ablation = CLAIMS["deltaproj_raises_small_scores"].finding(tmp_path)
    assert ablation[0] == "undecided" and "not run" in ablation[1]


def test_the_command_plans_what_it_is_told(monkeypatch, tmp_path, capsys):
    planned = []

    def no_training(runs, output_dir, jobs):
        planned.extend(runs)
        path = tmp_path / "record.json"
        path.write_text(json.dumps(study_record(run("delta-elastic", 0, 0.25))))
        return path

    monkeypatch.setattr(compare, "compare", no_training)
    options = "--compressors delta-elastic --budgets 4 1 --seeds 2 --max-steps 7 --bf16 False"
    cli.main(["study", *options.split()])
    (only,) = planned
    assert (run_label(only), only.seed, only.max_steps, only.bf16) == ("delta-elastic", 2, 7, False)
    assert "25.0" in capsys.readouterr().out
