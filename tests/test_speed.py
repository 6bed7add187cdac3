"Timing by stages: planted times are measured exactly, answers do not change, rounds rotate."

import json
import statistics
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from tiny_stage import write_models
from tiny_vlm import images, llm_config, tiny
from transformers import CompileConfig

from delta_llava import settings as settings_module
from delta_llava import speed
from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.flops import DEVICES, Setup, roofline
from delta_llava.settings import SpeedSettings
from delta_llava.speed import (
    Timings,
    median_and_quartiles,
    read_sweep,
    resolve_device,
    roofline_seconds,
    run_sweep,
    speed_report,
    static_cache,
    summarize_case,
    time_cases,
    timed_answer,
)
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

ANSWER = 8
TEXT = 10


def model_with(compressor, tokens):
    "The tiny model with any projector."
    model = tiny()
    if compressor == "delta":
        return model
    projector = compressor_config(compressor, model.multi_modal_projector.config, tokens=tokens)
    fields = model.config.to_dict() | dict(compressor=compressor, projector=projector.to_dict())
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(DeltaLlavaConfig(**fields)).eval()


@pytest.fixture(scope="module")
def text_ids():
    return torch.randint(250, (2, TEXT), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder)
    llm_config(num_hidden_layers=4).save_pretrained(folder / "deep")
    return folder


def tiny_settings(parts, llm="llm", **options):
    defaults = dict(
        tower=str(parts / "tower"),
        llm=str(parts / llm),
        tokens=(16, 4, 1),
        image_size=56,
        text=6,
        answer=4,
        repeats=3,
        device="cpu",
    )
    return SpeedSettings(**defaults | options)


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- one answer


class PlantedClock:
    "A clock that only the stages of a model advance."

    def __init__(self, model, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed, "cpu_clock", lambda: lambda: self.now)
        projector = model.multi_modal_projector
        forward = projector.forward

        def timed_forward(*args, **kwargs):
            self.now += 2.0
            return forward(*args, **kwargs)

        monkeypatch.setattr(projector, "forward", timed_forward)
        first_block = next(m for n, m in model.vision_tower.named_modules() if n.endswith("layers.0"))
        first_block.register_forward_pre_hook(self.advance_tower, with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self.advance_llm, with_kwargs=True)

    def advance_tower(self, module, args, kwargs):
        self.now += 1.0

    def advance_llm(self, module, args, kwargs):
        "4 s for a prompt, 8 s for one token."
        embeds = kwargs.get("inputs_embeds")
        inputs = kwargs["input_ids"] if embeds is None else embeds
        self.now += 4.0 if inputs.shape[1] > 1 else 8.0


@pytest.mark.parametrize(
    "compressor, tokens, question", [("delta", 4, {}), ("mlp", 49, {}), ("quecc", 1, {"question": 4.0})]
)
def test_planted_times_are_measured_exactly(monkeypatch, text_ids, compressor, tokens, question):
    model = model_with(compressor, tokens)
    PlantedClock(model, monkeypatch)
    timed_answer(model, images(n=2), text_ids, tokens, ANSWER)  # transformers installs hooks of its own
    before = num_hooks(model)
    seconds, answer_ids = timed_answer(model, images(n=2), text_ids, tokens, ANSWER)
    stages = {"tower": 1.0, **question, "projector": 2.0, "set-up": 0.0, "prefill": 4.0}
    whole = sum(stages.values()) + 8.0 * (ANSWER - 1)
    assert seconds == stages | {"decode": 8.0, "answer": whole}
    assert list(seconds) == [*stages, "decode", "answer"]
    assert num_hooks(model) == before
    assert answer_ids.shape == (2, ANSWER)


@pytest.mark.parametrize("compressor, budgets", [("delta", (1, 4, 49)), ("mlp", (49,))])
def test_a_static_cache_and_timing_change_no_token(text_ids, compressor, budgets):
    model = model_with(compressor, budgets[0])
    pixels = images(n=2)
    for tokens in budgets:
        ids = speed.prompt_ids(text_ids, tokens, model.config.image_token_id)
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            tokens=tokens,
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
        )[:, ids.shape[1] :]
        cache = static_cache(model, ids.shape[1] + ANSWER)
        for used in (None, cache, cache):  # the second answer with a cache finds it empty
            _, answer_ids = timed_answer(model, pixels, text_ids, tokens, ANSWER, used)
            assert answer_ids.tolist() == expected.tolist()
        assert cache.layers[0].max_cache_len == TEXT + tokens + ANSWER


def test_a_step_with_a_static_cache_is_one_graph(monkeypatch, text_ids):
    "A GPU replays this graph; here it is traced and run eagerly. A hook inside a step would break the trace."
    # the shape checks of a test run cannot be traced
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = tiny()
    pixels = images(n=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    cache = static_cache(model, TEXT + 4 + ANSWER)
    _, expected = timed_answer(model, pixels, text_ids, 4, ANSWER)
    for _ in range(2):
        _, ids = timed_answer(model, pixels, text_ids, 4, ANSWER, cache, compile_config=compile_config)
        assert ids.tolist() == expected.tolist()
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_change_no_token_and_are_faster(text_ids):
    model = tiny().cuda()
    pixels = images(n=2).cuda()
    text_ids = text_ids.cuda()
    eager, expected = timed_answer(model, pixels, text_ids, 4, ANSWER)
    cache = static_cache(model, TEXT + 4 + ANSWER)
    for _ in range(3):
        seconds, ids = timed_answer(model, pixels, text_ids, 4, ANSWER, cache)
    assert ids.tolist() == expected.tolist()
    assert seconds["decode"] < eager["decode"]


def test_no_answer_ends_early(text_ids):
    model = tiny()
    _, expected = timed_answer(model, images(n=2), text_ids, 4, ANSWER)
    model.generation_config.eos_token_id = expected[:, 0].tolist()
    _, answer_ids = timed_answer(model, images(n=2), text_ids, 4, ANSWER)
    assert answer_ids.tolist() == expected.tolist()


@pytest.mark.parametrize("stage", ["projector", "prompt"])
def test_hooks_are_removed_when_an_answer_fails(text_ids, stage):
    model = tiny()
    timed_answer(model, images(n=2), text_ids, 4, ANSWER)
    before = num_hooks(model)
    if stage == "projector":
        with pytest.raises(ValueError, match="tokens=50"):
            timed_answer(model, images(n=2), text_ids, 50, ANSWER)
    else:  # after the projector, before the LLM
        with pytest.raises(ValueError, match="max_new_tokens"):
            timed_answer(model, images(n=2), text_ids, 4, 0)
    assert num_hooks(model) == before


# ---------------------------------------------------------------- rounds


def test_rounds_rotate_warm_up_and_restore_the_projector(monkeypatch, text_ids):
    model = tiny()
    calls = []
    own = model.multi_modal_projector
    mlp = build_compressor("mlp", compressor_config("mlp", own.config, tokens=49))

    def fake_answer(model, pixels, text_ids, tokens, answer, cache):
        length = cache and cache.layers[0].max_cache_len
        calls.append((tokens, type(model.multi_modal_projector).__name__, length))
        return dict(answer=float(len(calls)), decode=1.0), None

    monkeypatch.setattr(speed, "timed_answer", fake_answer)
    projectors = {49: mlp, 4: own, 1: own}
    caches = ("dynamic", "static")
    timings = time_cases(model, projectors, images(), text_ids[:1], ANSWER, caches, repeats=6, warm_up=1)
    rounds = [calls[i : i + 6] for i in range(0, 42, 6)]
    assert len(calls) == 42
    assert all(set(cases) == set(rounds[0]) for cases in rounds)
    assert len({cases[0] for cases in rounds[1:]}) == 6  # each case is the first one once
    used = {tokens: projector for tokens, projector, _ in calls}
    assert used == {49: "MLP", 4: "DeltaProjector", 1: "DeltaProjector"}
    lengths = {tokens: length for tokens, _, length in calls if length}
    assert lengths == {tokens: TEXT + tokens + ANSWER for tokens in (49, 4, 1)}
    assert model.multi_modal_projector is own
    counted = sorted(seconds["answer"] for timing in timings.values() for seconds in timing.rounds)
    assert counted == [float(i) for i in range(7, 43)]  # the first six were warm-up


def test_a_gain_is_taken_within_its_round(parts):
    "A machine that is three times as slow in one round changes no gain."
    settings = tiny_settings(parts)
    slowdowns = [1.0, 3.0, 1.5]
    timings = {}
    for tokens, seconds in ((16, 2.0), (4, 1.0), (1, 0.5)):
        rounds = [dict(answer=seconds * slow, decode=0.1 * slow) for slow in slowdowns]
        timings["dynamic", tokens] = Timings(rounds)
    row = summarize_case(settings, ("dynamic", 1), 2, timings, DEVICES["h100"])
    assert row["gain"] == {"end to end": [4.0] * 3, "decode": [1.0] * 3}
    assert row["tokens_per_second"] == {
        "end to end": median_and_quartiles([2 * 4 / (0.5 * slow) for slow in slowdowns]),
        "decode": median_and_quartiles([2 / (0.1 * slow) for slow in slowdowns]),
    }
    assert row["seconds"]["answer"][0] == statistics.median(0.5 * slow for slow in slowdowns)
    assert row["peak_gib"] is None


# ---------------------------------------------------------------- a sweep


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(random_weights=True, dtype="bfloat16"),
        dict(caches=("dynamic", "static"), batch=(1, 3)),
        dict(compressor="quecc", tokens=(4, 1)),
        dict(compressor="prumerge", tokens=(4, 2)),
        dict(compressor="fastervlm", tokens=(4, 2)),
        dict(compressor="fastv", tokens=(16, 4), llm="deep", random_weights=True),
        dict(compressor="llavolta", tokens=(16, 4), llm="deep", random_weights=True),
        dict(compressor="mqt", tokens=(5, 2)),
    ],
    ids=str,
)
def test_a_sweep_runs(parts, options):
    settings = tiny_settings(parts, **options)
    device, rows = run_sweep(settings)
    cases = [(b, c, t) for b in settings.batch for c in settings.caches for t in settings.tokens]
    assert [(row["batch"], row["cache"], row["tokens"]) for row in rows] == cases
    for row in rows:
        is_mlp = settings.compressor == "delta" and row["tokens"] == 16
        assert row["compressor"] == ("mlp" if is_mlp else settings.compressor)
        assert row["roofline_seconds"].keys() <= row["seconds"].keys()
        assert ("question" in row["seconds"]) == (settings.compressor == "quecc")
        for stage, quartiles in row["seconds"].items():
            assert stage == "question" or min(quartiles) > 0
    assert device.peak > 0 and device.bandwidth > 0
    assert len(speed_report(rows).splitlines()) == len(rows) + 2


def test_the_device_auto_is_the_gpu_if_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


def test_the_minimum_of_an_answer_is_the_rooflines():
    setup = Setup(tokens=36, answer=30)
    minimum = roofline_seconds(setup, DEVICES["h200"], 4)
    stages = {row["stage"]: row["seconds"] for row in roofline(setup, DEVICES["h200"], 4)}
    assert minimum["answer"] == sum(stages.values())
    assert minimum["decode"] * 29 == pytest.approx(stages["decode"])
    assert minimum["tower"] == stages["tower"]


def test_the_cost_models_setup_is_the_settings_cost():
    "The command line has the fields without torch; the cost model adds the check of the parts."
    assert issubclass(Setup, settings_module.Cost)
    assert Setup.__dataclass_fields__.keys() == settings_module.Cost.__dataclass_fields__.keys()
    settings_module.Cost(tokens=143)
    with pytest.raises(ValueError, match="must be the square"):
        Setup(tokens=143)


@pytest.mark.parametrize("key", ["least", "roofline_seconds"])
def test_records_of_any_version_are_read(tmp_path, key):
    row = {
        "tokens": 4,
        "compressor": "delta",
        "batch": 1,
        "cache": "dynamic",
        "seconds": {"tower": [0.1, 0.1, 0.2], "decode": [0.01] * 3, "answer": [1.0] * 3},
        key: {"tower": 0.05},
        "tokens_per_second": {"end to end": [4.0] * 3, "decode": [100.0] * 3},
        "gain": {"end to end": [1.0] * 3, "decode": [1.0] * 3},
        "peak_gib": None,
    }
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(dict(dtype="float32", result=[row])))
    record = read_sweep(path)
    assert record["dtype"] == "float32"
    assert "| 100 (50)" in speed_report(record["result"])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(answer=1), "answer=1 must be at least 2"),
        (dict(repeats=0), "repeats=0 must be at least 3"),
        (dict(tokens=()), r"tokens=\(\) is empty"),
        (dict(batch=(2, 0)), "batch="),
        (dict(tokens=(16, 5)), "tokens=5 must be the square"),
        (dict(compressor="perceiver"), "is unknown; use one of"),
        (dict(llm="nowhere"), "is not known here"),
    ],
    ids=str,
)
def test_invalid_settings_fail_before_a_model_is_built(monkeypatch, parts, options, message):
    monkeypatch.setattr(speed, "measured_device", SimpleNamespace)  # calling it with two arguments fails
    with pytest.raises(ValueError, match=message):
        run_sweep(tiny_settings(parts, **options))


def test_fastv_refuses_a_static_cache(parts):
    settings = tiny_settings(
        parts, llm="deep", compressor="fastv", tokens=(4, 1), caches=("static",), random_weights=True
    )
    with pytest.raises(ValueError, match="FastV and LLaVolta need a DynamicCache"):
        run_sweep(settings)
