"lmms-eval: batches that change nothing, every compressor, settings in the result; and the real harness over offline tasks."
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from test_vlm_compressors import every, tiny
from tiny_vlm import byte_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from delta_llava import harness
from delta_llava.scenes import draw_scene, plan_scene
from delta_llava.tasks import TASK_NAMES, write_tasks
from delta_llava.harness import Answerer, HarnessModel, gqa_questions, harness_cmd, load_any, pope_questions, read_result
from delta_llava.tower import image_aspect, with_aspect
from delta_llava.processor import build_processor

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["What?", "Is there a fox in the picture?\nAnswer the question using a single word or phrase.", "How many?", "Which of these is in the picture?\nA. fox\nB. key", "Why is it so?", "Left or right?", "Name it.", "And?"]


def parts(name="delta"):
    "A tiny model of one compressor with its processor, pictures of 384 px."
    model = tiny(name)
    with torch.no_grad():
        for p in model.get_decoder().layers.parameters(): p.mul_(12 if p.ndim == 2 else 1)  # else it would say the same of everything
    config, requires = model.config.projector_config(), model.multi_modal_projector.requires
    images = CLIPImageProcessorPil(size=dict(shortest_edge=384), crop_size=dict(height=384, width=384))
    return model, build_processor(images, byte_tokenizer(), config.tokens, "v1", questions="text" in requires, placeholders=config.placeholders(config.tokens) if "decoder" in requires else None)


def asks(): return [(q, [draw_scene(plan_scene(i, seed=3))]) for i, q in enumerate(QUESTIONS)]


@every
def test_answers_do_not_depend_on_the_batch(name):
    model, processor = parts(name)
    batches, n = ((1, 4, 8), 8) if name == "delta" else ((1, 4), 4)
    answers = ["A", "B", "a fox", "No", "Yes", "left", "three things", "C"][:n]
    said, scores = zip(*[(a.generate(asks()[:n], max_new_tokens=4), a.likelihood(asks()[:n], answers)) for b in batches for a in [Answerer(model, processor, batch_size=b)]])
    assert all(s == said[0] for s in said) and len(set(said[0])) > 1
    for other in scores[1:]:
        torch.testing.assert_close(torch.tensor([s for s, _ in other]), torch.tensor([s for s, _ in scores[0]]), atol=1e-3, rtol=1e-4)
        assert [g for _, g in other] == [g for _, g in scores[0]]


@every
def test_the_budget_of_the_call_reaches_the_model(name):
    model, processor = parts(name)
    if name in ("mlp", "quecc", "qwen"):  # built for one budget
        with pytest.raises(ValueError, match="tokens=4 .* use"): Answerer(model, processor, tokens=4)
        return
    logged = []
    hook = model.multi_modal_projector.register_forward_pre_hook(lambda m, a, k: logged.append(k.get("tokens")), with_kwargs=True)
    Answerer(model, processor, tokens=4).generate(asks()[:1], max_new_tokens=2)
    hook.remove()
    assert logged == [4]
    four, nine = (Answerer(model, processor, tokens=t).likelihood(asks()[:2], ["A", "B"]) for t in (4, 9))
    assert four != nine


@pytest.mark.parametrize("name", ["delta", "fastv", "quecc"])
def test_likelihood_is_that_of_the_words_one_after_the_other(name):
    model, processor = parts(name)
    a, ask, answer = Answerer(model, processor), asks()[1], "a fox"
    (score, _), = a.likelihood([ask], [answer])
    prompt, spoken = a._spoken(ask, answer)
    out = model.generate(input_ids=torch.tensor([prompt]), **a._seen([ask]), max_new_tokens=len(spoken), do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
                         logits_processor=[Say(spoken)])
    total = sum(logits[0].float().log_softmax(-1)[i].item() for logits, i in zip(out.logits, spoken))
    assert processor.tokenizer.decode(spoken).strip() == answer and abs(score - total) < 1e-3


class Say:
    "Forces the words, so that `generate` tells what it thought of them."
    def __init__(self, ids): self.ids, self.k = ids, 0
    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.k]] = 0
        self.k += 1
        return forced


def test_answers_that_cannot_be_scored_are_named():
    model, processor = parts()
    with pytest.raises(ValueError, match="1 answers for 2 questions"): Answerer(model, processor).likelihood(asks()[:2], ["A"])
    with pytest.raises(ValueError, match=r"answers \[1\] are empty"): Answerer(model, processor).likelihood(asks()[:2], ["A", " "])
    said, = Answerer(model, processor).generate(asks()[:1], max_new_tokens=4)
    assert Answerer(model, processor).generate(asks()[:1], max_new_tokens=4, until=said[2:4]) == [said[:2].strip()]  # one text, not its letters


def test_the_newest_result_is_read(tmp_path):
    for folder, name, score in (("z", "20250101_000000", 0), ("a", "20260101_000000", 1)):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/f"{name}_results.json").write_text(json.dumps(dict(results=dict(t={"acc,none": score}), config=dict(resolved_cli_args=dict(delta_llava={})))))
    assert read_result(tmp_path) == (dict(t=dict(acc=1)), {})


def test_several_pictures_and_none_in_one_run():
    model, processor = parts()
    mixed = asks()[:2] + [("Which is older?", [p for _, (p,) in asks()[:2]]), ("Who?", []), ("First <image> then <image>: which?", [p for _, (p,) in asks()[2:4]])]
    one, four = (Answerer(model, processor, batch_size=b).generate(mixed, max_new_tokens=4) for b in (1, 4))
    assert one == four and Answerer(model, processor).prompt("Q", 2).count("<image>") == 2
    with pytest.raises(ValueError, match="the texts name 1 image"): Answerer(model, processor).generate([("Only <image> of two", mixed[2][1])], max_new_tokens=1)


# ---------------------------------------------------------------- the class that the harness calls

@pytest.fixture
def whole(tmp_path):
    "A folder as `finetune` writes it."
    model, processor = parts()
    model.save_pretrained(tmp_path/"model")
    processor.save_pretrained(tmp_path/"model")
    return tmp_path/"model"


class Task:
    "What lmms-eval's tasks have of what is read."
    def __init__(self, **told): self.config, self.args, self.lmms_eval_specific_kwargs = SimpleNamespace(num_fewshot=0, output_type="generate_until", metadata=dict(version=1)), SimpleNamespace(), told
    def doc_to_visual(self, doc): return [doc["image"]]


def requests(task, n=3, **kwargs): return [SimpleNamespace(args=(q, dict(max_new_tokens=4, until=["\n\n"], **kwargs), task.doc_to_visual, i, "t", "test")) for i, q in enumerate(QUESTIONS[:n])]


def harness_model(folder, **args):
    model = HarnessModel(pretrained=str(folder), device="cpu", **args)
    model.task_dict, model.cache_hook = dict(t=dict(test=[dict(image=p[0]) for _, p in asks()])), SimpleNamespace(add_partial=lambda *a: None)
    return model


def test_requests_are_answered_and_settings_written(whole):
    task = Task(pre_prompt="", post_prompt="!", ocr=False)
    model = harness_model(whole, tokens=4, batch_size=2, system_prompt="Be brief.")
    wanted = requests(task)
    loaded, processor, _ = load_any(whole)
    alone = Answerer(loaded, processor, tokens=4, system_prompt="Be brief.").generate([(q, p) for q, p in asks()[:3]], max_new_tokens=4, until=["\n\n"])
    assert model.generate_until(wanted) == alone
    told = json.loads(json.dumps(task.args.delta_llava))
    assert (told["visual_tokens"], told["compressor"], told["template"], told["image_aspect"], told["dtype"]["llm"]) == (4, "delta", "v1", "original", "torch.float32")
    assert told["checkpoint"]["sha256"].keys() == {"model.safetensors"} and told["versions"]["torch"] and told["delta_llava"]["commit"]
    asked = told["tasks"]["t"]
    assert (asked["ocr"], asked["post_prompt"], asked["split"], asked["generation_kwargs"]["until"]) == (False, "!", "test", ["\n\n"])
    assert asked["first_prompt"].startswith("Be brief. USER: <image>\n") and asked["first_prompt"].endswith("ASSISTANT:")
    assert wanted[0].args[1]["until"] == ["\n\n"]  # the request's own settings are as they were


def test_choice_gets_the_negative_likelihood(whole):
    "lmms-eval takes the smallest number for the answer."
    model = harness_model(whole, batch_size=4)
    found = model.loglikelihood([SimpleNamespace(args=("Which?", letter, Task().doc_to_visual, 0, "t", "test")) for letter in "ABCD"])
    want = model.answerer.likelihood([("Which?", asks()[0][1])]*4, list("ABCD"))
    assert [n for n, _ in found] == [-s for s, _ in want] and all(n > 0 for n, _ in found)


def test_aspect_by_argument_and_by_task(whole):
    wide = Image.linear_gradient("L").resize((500, 200)).convert("RGB")
    pixels = {}
    for aspect in (None, "original", "pad"):
        model = harness_model(whole, image_aspect=aspect)
        pixels[aspect] = model.answerer.processor.image_processor(wide, return_tensors="pt").pixel_values
        assert image_aspect(model.answerer.processor.image_processor) == (aspect or "original")
    assert pixels[None].equal(pixels["original"]) and not pixels["pad"].equal(pixels["original"]) and pixels["pad"].shape == pixels["original"].shape
    back = with_aspect(with_aspect(model.own, "pad"), "original")
    torch.testing.assert_close(back(wide, return_tensors="pt").pixel_values, pixels["original"])
    model = harness_model(whole, image_aspect="pad")
    model.task_dict["t"]["test"][0]["image"] = wide
    task = Task()
    by_task = model.generate_until(requests(task, 1, image_aspect_ratio="original"))
    assert by_task == harness_model_on(whole, wide).generate_until(requests(Task(), 1)) and task.args.delta_llava["tasks"]["t"]["image_aspect"] == "original"
    assert image_aspect(model.answerer.processor.image_processor) == "pad"  # as before
    with pytest.raises(ValueError, match="image_aspect='square'"): harness_model(whole, image_aspect="square")


def harness_model_on(folder, picture):
    model = harness_model(folder)
    model.task_dict["t"]["test"][0]["image"] = picture
    return model


@pytest.mark.parametrize("args,words", [(dict(token=4), "'token'"), (dict(tokens=5), "must be the square"), (dict(batch_size="auto"), "batch_size='auto'"), (dict(dtype="int8"), "dtype='int8'"), (dict(template="v2"), "template='v2'"),
                                        (dict(template="plain", system_prompt="Be brief."), "no place")])
def test_wrong_arguments_are_named(whole, args, words):
    with pytest.raises(ValueError, match=words): harness_model(whole, **args)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="recipe.json"): load_any(tmp_path)
    with pytest.raises(ValueError, match="neither a folder here"): load_any(tmp_path/"none")


def test_nothing_imports_lmms_eval():
    code = "import sys, delta_llava.harness, delta_llava.cli; print('lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "False"


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness._lmms.cache_clear()
    for ask in (harness.manifest, lambda: harness.DeltaLlava):
        with pytest.raises(ImportError, match=r"delta-llava\[eval\]"): ask()


# ---------------------------------------------------------------- the tasks

def test_facts_hold_in_the_plan():
    scenes = [plan_scene(i, "heldout_scenes", seed=9, n_objects=(1, 3)) for i in range(60)]
    for scene, fact in pope_questions(scenes):
        name = fact["question"].removeprefix("Is there ").removesuffix(" in the picture?").split(" ", 1)[1]
        assert (name in {o.name for o in scene.objects}) == (fact["answer"] == "yes")
    kinds = set()
    for scene in scenes:
        box = {o.name: o.box for o in scene.objects}
        for fact in gqa_questions(scene):
            kinds.add(fact["kind"])
            words = fact["question"].removesuffix("?").removeprefix("What is ")
            if fact["kind"] == "count": assert fact["answer"] == str(len(box))
            if fact["kind"] == "position": assert {"left": lambda b: b[2] <= 84, "right": lambda b: b[0] >= 84, "upper": lambda b: b[3] <= 84, "lower": lambda b: b[1] >= 84}[fact["answer"]](*box.values())
            for word, left in {"left of the ": lambda a, b: a[2] < b[0], "right of the ": lambda a, b: b[2] < a[0], "above the ": lambda a, b: a[3] < b[1], "below the ": lambda a, b: b[3] < a[1]}.items():
                if fact["kind"] == "what" and words.startswith(word):
                    assert [n for n in box if n != words.removeprefix(word) and left(box[n], box[words.removeprefix(word)])] == [fact["answer"]]
    assert kinds == {"count", "relation", "what", "position"}


def test_adversarial_things_meet_what_is_shown():
    scenes = [plan_scene(i, "heldout_scenes", seed=9, n_objects=(2, 3)) for i in range(60)]
    together = {(a.name, b.name) for s in scenes for a in s.objects for b in s.objects}
    wrong = {k: [any((f["question"].split(" ", 3)[3].removesuffix(" in the picture?"), o.name) in together for o in s.objects) for s, f in pope_questions(scenes) if f["kind"] == k and f["answer"] == "no"] for k in ("random", "adversarial")}
    assert sum(wrong["adversarial"]) > .9*len(scenes) > 2*sum(wrong["random"])


def test_task_files_are_whole(tmp_path):
    counts = write_tasks(tmp_path, n=3, caption="What is in the picture?")
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: getattr(harness, node.value.rpartition(".")[2]))  # a name that is not there fails
    for task in TASK_NAMES:
        told = yaml.safe_load((tmp_path/f"{task}.yaml").read_text())
        rows = Dataset.from_parquet(str(tmp_path/told["dataset_kwargs"]["data_files"]["test"]), cache_dir=str(tmp_path/"cache"))
        assert told["task"] == task and told["metadata"]["scenes"]["n"] == 3 and len(rows) == sum(counts[task].values())
        assert {told["doc_to_target"], "image", "question"} <= set(rows.column_names) and told["lmms_eval_specific_kwargs"]["default"]["ocr"] is False
        for row in rows: assert told["doc_to_text"](row, told["lmms_eval_specific_kwargs"]["default"]).startswith(row["question"]) and told["doc_to_visual"](row)[0].size == (168, 168)
    assert rows and {r["question"] for r in Dataset.from_parquet(str(tmp_path/"caption.parquet"), cache_dir=str(tmp_path/"cache"))} == {"What is in the picture?"}


# ---------------------------------------------------------------- the real harness

EVAL = ROOT/".venv-eval"/"bin"/"python"
PYTHON = sys.executable if find_spec("lmms_eval") else str(EVAL) if EVAL.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lmms-eval: `make eval` makes an environment that has it")
def test_the_real_harness_offline(whole, tmp_path):
    "All tasks, two batch sizes: same words, same scores; all settings in the result."
    write_tasks(tmp_path/"tasks", n=6)
    found, words = [], []
    for b in (1, 4):
        env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path/"hf"), PYTHONPATH=str(ROOT))
        run = subprocess.run(harness_cmd(whole, tmp_path/f"out{b}", tmp_path/"tasks", batch_size=b, limit=6, python=PYTHON, tokens=4), env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and list((tmp_path/f"out{b}").rglob("*_results.json")), (run.stdout + run.stderr)[-3000:]
        found.append(read_result(tmp_path/f"out{b}"))
        samples = {p.name.split("_samples_")[1]: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path/f"out{b}").rglob("*_samples_*.jsonl")}
        assert samples.keys() == {f"{t}.jsonl" for t in TASK_NAMES} and all(len(s) == 6 for s in samples.values())
        words.append({t: [s["filtered_resps"] for s in rows] for t, rows in samples.items() if t != "scenes_choice_likely.jsonl"})
    assert words[0] == words[1]
    (scores, told), (again, other) = found
    assert scores == again and scores.keys() == set(TASK_NAMES)
    assert {"pope_accuracy", "pope_f1", "pope_yes_ratio"} <= scores["scenes_pope"].keys() and "caption_cider" in scores["scenes_caption"] and "acc" in scores["scenes_choice_likely"]
    assert dict(told, batch_size=4) == other and (told["visual_tokens"], told["image_aspect"], told["template"]) == (4, "original", "v1")
    assert told["versions"]["lmms_eval"] == "0.7.3" and told["checkpoint"]["sha256"]
    assert told["tasks"].keys() == set(TASK_NAMES) and all(t["ocr"] is False and t["split"] == "test" and "<image>" in t["first_prompt"] for t in told["tasks"].values())
    assert told["tasks"]["scenes_pope"]["metadata"]["scenes"]["split"] == "heldout_scenes" and told["tasks"]["scenes_gqa"]["generation_kwargs"]["max_new_tokens"] == 16
