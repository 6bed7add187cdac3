"Timing stage by stage: planted times come back exactly, nothing changes the answer, rounds are fair."

import statistics
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from tiny_stage import write_parts
from tiny_vlm import images, llm_config, tiny
from transformers import CompileConfig

from delta_llava import speed
from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.flops import DEVICES, Setup, roofline
from delta_llava.speed import (
    Sweep,
    median_and_quartiles,
    roofline_seconds,
    speed_report,
    static_cache,
    time_parts,
    timed_answer,
)
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

ANSWER, TEXT = 8, 10


def model_with(compressor, tokens):
    "The tiny model with any projector."
    own = tiny()
    if compressor == "delta":
        return own
    config = compressor_config(compressor, own.multi_modal_projector.config, tokens=tokens)
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(
        DeltaLlavaConfig(**own.config.to_dict() | dict(compressor=compressor, projector=config.to_dict()))
    ).eval()


@pytest.fixture(scope="module")
def words():
    return torch.randint(250, (2, TEXT), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    llm_config(num_hidden_layers=4).save_pretrained(folder / "deep")
    return folder


def sweep(parts, **options):
    return Sweep(
        **dict(
            tower=str(parts / "tower"),
            llm=str(parts / "llm"),
            tokens=(16, 4, 1),
            image_size=56,
            text=6,
            answer=4,
            repeats=3,
        )
        | options
        | ({"llm": str(parts / options["llm"])} if "llm" in options else {})
    )


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- one answer


@pytest.mark.parametrize(
    "compressor, tokens, question", [("delta", 4, {}), ("mlp", 49, {}), ("quecc", 1, {"question": 4.0})]
)
def test_planted_times_come_back_exactly(monkeypatch, words, compressor, tokens, question):
    "A clock that only the stages move."
    model, at = model_with(compressor, tokens), SimpleNamespace(now=0.0)
    monkeypatch.setattr(speed, "cpu_clock", lambda: lambda: at.now)

    def costs(module, seconds):
        return module.register_forward_pre_hook(
            lambda m, args, kwargs: setattr(at, "now", at.now + seconds(kwargs)), with_kwargs=True
        )

    def of_llm(kwargs):
        given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        return 4.0 if given.shape[1] > 1 else 8.0

    projector = model.multi_modal_projector

    def projected(*args, **kwargs):
        at.now += 2.0
        return type(projector).forward(projector, *args, **kwargs)

    monkeypatch.setattr(projector, "forward", projected)
    costs(next(m for n, m in model.vision_tower.named_modules() if n.endswith("layers.0")), lambda _: 1.0)
    costs(model.get_decoder(), of_llm)
    timed_answer(model, images(n=2), words, tokens, ANSWER)  # transformers installs hooks of its own
    before = hooks(model)
    took, said = timed_answer(model, images(n=2), words, tokens, ANSWER)
    assert took == {"tower": 1.0} | question | {
        "projector": 2.0,
        "set-up": 0.0,
        "prefill": 4.0,
        "decode": 8.0,
        "answer": 7.0 + sum(question.values()) + 8.0 * (ANSWER - 1),
    }
    assert hooks(model) == before and said.shape == (2, ANSWER)


@pytest.mark.parametrize("compressor, budgets", [("delta", (1, 4, 49)), ("mlp", (49,))])
def test_a_static_cache_and_timing_change_no_token(words, compressor, budgets):
    model, px = model_with(compressor, budgets[0]), images(n=2)
    for V in budgets:
        ids = speed.prompt_of(words, V, model.config.image_token_id)
        plain = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=px,
            tokens=V,
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
        )[:, ids.shape[1] :]
        cache = static_cache(model, ids.shape[1] + ANSWER)
        said = [
            timed_answer(model, px, words, V, ANSWER, c)[1] for c in (None, cache, cache)
        ]  # the second answer in a cache finds it empty
        assert [s.tolist() for s in said] == [plain.tolist()] * 3
        assert cache.layers[0].max_cache_len == TEXT + V + ANSWER


def test_a_step_with_a_static_cache_is_one_graph(monkeypatch, words):
    "What a GPU replays; here traced and run eagerly. Without hooks in it, or the trace would be broken."
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # the checks of a test run cannot be traced
    model, px, seen = tiny(), images(n=2), []
    compiled = CompileConfig(
        backend=lambda graph, inputs: seen.append(graph) or graph.forward,
        fullgraph=True,
        dynamic=False,
        mode=None,
    )
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    cache = static_cache(model, TEXT + 4 + ANSWER)
    eager = timed_answer(model, px, words, 4, ANSWER)[1]
    for _ in range(2):
        assert (
            timed_answer(model, px, words, 4, ANSWER, cache, compile_config=compiled)[1].tolist()
            == eager.tolist()
        )
    assert len(seen) == 1
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_change_no_token_and_events_measure(words):
    model, px, words = tiny().cuda(), images(n=2).cuda(), words.cuda()
    eager, plain = timed_answer(model, px, words, 4, ANSWER)
    cache = static_cache(model, TEXT + 4 + ANSWER)
    for _ in range(3):
        took, said = timed_answer(model, px, words, 4, ANSWER, cache)
    assert said.tolist() == plain.tolist() and took["decode"] < eager["decode"]


def test_no_answer_stops_early(words):
    model, px = tiny(), images(n=2)
    first = timed_answer(model, px, words, 4, ANSWER)[1]
    model.generation_config.eos_token_id = first[:, 0].tolist()
    assert timed_answer(model, px, words, 4, ANSWER)[1].tolist() == first.tolist()


def test_hooks_go_when_an_answer_fails(words):
    model = tiny()
    timed_answer(model, images(n=2), words, 4, ANSWER)
    before = hooks(model)
    with pytest.raises(ValueError, match="tokens=50"):
        timed_answer(model, images(n=2), words, 50, ANSWER)
    assert hooks(model) == before


# ---------------------------------------------------------------- rounds


def test_rounds_rotate_warm_up_and_give_the_projector_back(monkeypatch, words):
    model, order = tiny(), []
    own = model.multi_modal_projector
    other = build_compressor("mlp", compressor_config("mlp", own.config, tokens=49))

    def answered(model, pixels, words, tokens, answer, cache):
        order.append(
            (tokens, type(model.multi_modal_projector).__name__, cache and cache.layers[0].max_cache_len)
        )
        return dict(answer=float(len(order)), decode=1.0), None

    monkeypatch.setattr(speed, "timed_answer", answered)
    found = time_parts(
        model,
        {49: other, 4: own, 1: own},
        images(),
        words[:1],
        ANSWER,
        ("dynamic", "static"),
        repeats=6,
        warm_up=1,
    )
    rounds = [order[i : i + 6] for i in range(0, 42, 6)]
    assert (
        len(order) == 42
        and all(set(r) == set(rounds[0]) for r in rounds)
        and len({r[0] for r in rounds[1:]}) == 6
    )
    assert {o[0]: o[1] for o in order} == {49: "MLP", 4: "DeltaProjector", 1: "DeltaProjector"} and {
        o[0]: o[2] for o in order if o[2]
    } == {V: TEXT + V + ANSWER for V in (49, 4, 1)}
    assert model.multi_modal_projector is own
    counted = sorted(t["answer"] for rounds, _ in found.values() for t in rounds)
    assert counted == [float(i) for i in range(7, 43)]  # the first six warmed up


def test_a_gain_is_taken_within_its_round(parts):
    "A machine that is three times as slow in one round changes no gain."
    s = sweep(parts, repeats=3)
    slow = [1.0, 3.0, 1.5]
    found = {
        ("dynamic", V): ([dict(answer=t * k, decode=0.1 * k) for k in slow], 0)
        for V, t in ((16, 2.0), (4, 1.0), (1, 0.5))
    }
    row = s.row(("dynamic", 1), 2, found, DEVICES["h100"])
    assert row["gain"] == {"end to end": [4.0] * 3, "decode": [1.0] * 3}
    assert row["tokens_per_second"] == {
        "end to end": median_and_quartiles([2 * 4 / (0.5 * k) for k in slow]),
        "decode": median_and_quartiles([2 / (0.1 * k) for k in slow]),
    }
    assert row["seconds"]["answer"][0] == statistics.median(0.5 * k for k in slow) and row["peak_gib"] is None


# ---------------------------------------------------------------- a sweep


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(random_weights=True, dtype="bfloat16"),
        dict(caches=("dynamic", "static"), batch=(1, 3)),
        dict(compressor="quecc", tokens=(4, 1)),
        dict(compressor="prumerge", tokens=(4, 2)),
        dict(compressor="fastv", tokens=(16, 4), llm="deep", random_weights=True),
        dict(compressor="mqt", tokens=(5, 2)),
    ],
    ids=str,
)
def test_a_sweep_runs(parts, options):
    s = sweep(parts, **options)
    limit, rows = s()
    assert [(r["batch"], r["cache"], r["tokens"]) for r in rows] == [
        (b, c, V) for b in s.batch for c in s.caches for V in s.tokens
    ]
    assert [r["compressor"] for r in rows[: len(s.tokens)]] == [
        s.compressor if s.compressor != "delta" or V < 16 else "mlp" for V in s.tokens
    ]
    assert limit.peak > 0 and limit.bandwidth > 0
    for r in rows:
        assert (
            min(v for k, t in r["seconds"].items() if k != "question" for v in t) > 0
            and r["least"].keys() <= r["seconds"].keys()
        )
        assert ("question" in r["seconds"]) == (s.compressor == "quecc")
    assert len(speed_report(rows).splitlines()) == len(rows) + 2


def test_the_least_of_an_answer_is_the_rooflines(parts):
    setup = Setup(tokens=36, answer=30)
    least, stages = (
        roofline_seconds(setup, DEVICES["h200"], 4),
        {r["stage"]: r["seconds"] for r in roofline(setup, DEVICES["h200"], 4)},
    )
    assert (
        least["answer"] == sum(stages.values())
        and least["decode"] * 29 == pytest.approx(stages["decode"])
        and least["tower"] == stages["tower"]
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(answer=1), "answer=1 must be at least 2"),
        (dict(repeats=0), "repeats=0 must be at least 3"),
        (dict(tokens=()), r"tokens=\(\) is empty"),
        (dict(batch=(2, 0)), "batch="),
        (dict(tokens=(16, 5)), "tokens=5 must be the square"),
        (dict(compressor="perceiver"), "is unknown; use one of"),
        (dict(llm="nowhere"), "is not known here"),
    ],
)
def test_what_cannot_be_timed_fails_before_a_model_is_built(parts, options, words):
    with pytest.raises(ValueError, match=words):
        sweep(parts, **options)


def test_fastv_refuses_a_static_cache(parts):
    with pytest.raises(ValueError, match="prune needs a DynamicCache"):
        sweep(parts, compressor="fastv", tokens=(4, 1), caches=("static",), llm="deep", random_weights=True)()
