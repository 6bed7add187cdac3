"The cost model: three counts that must agree where they claim to, and every number of the reference."

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Dinov2Config, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from delta_llava.compressors import base
from delta_llava.compressors.base import COMPRESSORS, VARIANTS, build_compressor, compressor_config
from delta_llava.compressors.mlp import MLP, MLPConfig
from delta_llava.config import ProjectorConfig, paper_text_config, relative_levels
from delta_llava.flops import (
    DEVICES,
    PAPER_NUMBERS,
    PRETRAINED_CONFIGS,
    Cost,
    Setup,
    at_budget,
    authors_cost,
    cost,
    cost_report,
    counted,
    counted_cost,
    counted_llm,
    counted_tower,
    decode_flops,
    kv_cache_bytes,
    matches,
    memory_traffic,
    model_config,
    num_parameters,
    paper_numbers,
    prefill_flops,
    pretrained_config,
    projector_forward,
    projector_terms,
    roofline,
    tower_flops,
)
from delta_llava.vlm import DeltaLlavaForConditionalGeneration

REFERENCE = json.loads((Path(__file__).parent / "data" / "flops.json").read_text())
BUDGETS = (576, 144, 64, 36, 16, 4, 1)
CLIP = "openai/clip-vit-large-patch14-336"
CLIP_B32 = "openai/clip-vit-base-patch32"
SIGLIP = "google/siglip-so400m-patch14-384"
LLMS = dict(vicuna7b="lmsys/vicuna-7b-v1.5", vicuna13b="lmsys/vicuna-13b-v1.5", qwen2_7b="Qwen/Qwen2-7B")
NAMES = [*COMPRESSORS, *VARIANTS]

NO_SPECIAL_TOKENS = dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
TINY_LLM = dict(vocab_size=99, hidden_size=64, intermediate_size=160, num_attention_heads=4)
PRETRAINED_CONFIGS |= {  # small enough to be built for real
    "tiny-tower": CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        image_size=48,
        patch_size=8,
    ),
    "tiny-llama": LlamaConfig(**TINY_LLM, **NO_SPECIAL_TOKENS, num_hidden_layers=4, num_key_value_heads=4),
    "tiny-qwen2": Qwen2Config(**TINY_LLM, **NO_SPECIAL_TOKENS, num_hidden_layers=3, num_key_value_heads=2),
}


def tiny(**fields) -> Setup:
    "A model that is small enough to be built for real."
    return Setup(**dict(tower="tiny-tower", llm="tiny-llama", tokens=9, text=7, answer=3) | fields)


def sizes(tower=CLIP, d_llm=4096) -> ProjectorConfig:
    config = pretrained_config(tower)
    return ProjectorConfig(
        grid=config.image_size // config.patch_size,
        tokens=1,
        d_vision=config.hidden_size,
        levels=relative_levels(config.num_hidden_layers),
        d_llm=d_llm,
    )


def built(name, tokens, like=None, **options):
    config = compressor_config(name, like or sizes(), tokens=tokens, **options)
    with torch.device("meta"):
        return build_compressor(name, config)


def possible(name, like=None):
    "The compressor at every budget of the list that it accepts."
    found = []
    for v in BUDGETS:
        try:
            found.append(built(name, v, like))
        except ValueError:
            continue
    assert found or (name == "mlp" and like is not None and like.grid**2 not in BUDGETS)
    return found


def flops_of(name, projector, **options) -> int:
    return sum(projector_terms(name, projector.config, **options).values())


# ---- closed form = counted
OTHER_SIZES = [(t, d) for t in (CLIP, SIGLIP) for d in (5120, 3584, 4096) if (t, d) != (CLIP, 4096)]


@pytest.mark.parametrize(
    "tower,d_llm", [(CLIP, 4096), *(pytest.param(*size, marks=pytest.mark.slow) for size in OTHER_SIZES)]
)
@pytest.mark.parametrize("name", NAMES)
def test_projector_is_what_is_counted(name, tower, d_llm):
    for projector in possible(name, sizes(tower, d_llm)):
        assert flops_of(name, projector) == counted(projector_forward(projector)), projector.config.tokens


def test_budgets_are_those_that_the_systems_have():
    found = {name: [p.config.tokens for p in possible(name)] for name in ("delta", "mlp", "mqt", "prumerge")}
    assert found == dict(delta=list(BUDGETS), mlp=[576], mqt=list(BUDGETS[1:]), prumerge=list(BUDGETS[:-1]))


SWITCHES = ("order", "activate", "share_base", "residual_mlp", "query_pool", "kv_pool", "kv_reduction")
PAPER_TEXT = {k: getattr(paper_text_config(), k) for k in SWITCHES}


@pytest.mark.parametrize(
    "name,tokens,options",
    [
        *(("delta", v, PAPER_TEXT) for v in (576, 144, 25, 1)),
        ("delta", 49, dict(kv_reduction=3)),
        ("delta", 49, dict(kv_reduction=3, kv_pool="square")),
        ("delta", 100, dict(rank=4, mix_ratio=0.5, mlp_ratio=3, head_dim=64)),
        ("cabstractor", 36, dict(hidden=512, depth=2, mlp_depth=3)),
        ("cabstractor", 38, dict(eos=2, depth=0)),
        ("qwen", 64, dict(post=False)),
        ("mlp", 576, dict(depth=1)),
        ("mqt", 256, {}),
    ],
)
def test_every_switch_is_in_the_equation(name, tokens, options):
    projector = built(name, tokens, **options)
    assert flops_of(name, projector) == counted(projector_forward(projector))


@pytest.mark.parametrize("name,side", [(CLIP, 336), (CLIP, 224), (CLIP_B32, 384), (SIGLIP, 384)])
def test_tower_is_what_is_counted(name, side):
    config = pretrained_config(name)
    for levels in (relative_levels(config.num_hidden_layers), (1, 2)):
        assert tower_flops(config, levels[-1], side) == counted_tower(config, levels, side)
    if name != SIGLIP:
        counted_attention = counted_tower(config, (1, 3), side, attention=True)
        assert tower_flops(config, 3, side, attention=True) == counted_attention


@pytest.mark.parametrize("options", [{}, dict(use_swiglu_ffn=True)])
def test_tower_without_an_intermediate_size(options):
    config = Dinov2Config(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=56, patch_size=14, **options
    )
    assert tower_flops(config, 3, 84, attention=True) == counted_tower(config, (1, 3), 84, attention=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-qwen2"])
def test_all_stages_are_what_is_counted(name, llm):
    setup = tiny(compressor=name, tokens=36 if name == "mlp" else 9, llm=llm, question=5)
    assert cost(setup) == counted_cost(setup)


@pytest.mark.parametrize("llm", LLMS.values())
def test_full_llm_is_what_is_counted(llm):
    config = pretrained_config(llm)
    layer_tokens = ((config.num_hidden_layers, 213),)
    expected = (prefill_flops(config, layer_tokens), decode_flops(config, layer_tokens, 2))
    assert counted_llm(llm, layer_tokens, 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLMS.values())
def test_every_compressor_at_every_budget_with_the_full_llms(llm):
    known = {}
    for name in NAMES:
        for projector in possible(name, sizes(CLIP, pretrained_config(llm).hidden_size)):
            setup = Setup(
                llm=llm, compressor=name, tokens=projector.config.tokens, text=69, answer=2, question=20
            )
            ours = cost(setup)
            key = setup.layer_tokens, projector.ranks_tokens
            if key not in known:
                known[key] = counted_llm(llm, setup.layer_tokens, 2, projector.ranks_tokens)
            assert (ours.prefill, ours.decode) == known[key]
            assert ours.projector == counted(projector_forward(projector))
            if setup.question_tokens:
                assert ours == counted_cost(setup)


# ---- a compressor that the user registers
class OwnConfig(MLPConfig):
    "The config of a compressor from outside the package."


class Own(MLP):
    "A compressor from outside the package."

    Config = OwnConfig


@pytest.fixture
def registry():
    "Registrations end with the test."
    names = dict(base.COMPRESSORS)
    formulas = dict(base.COST_FORMULAS)
    yield base
    for table, before in ((base.COMPRESSORS, names), (base.COST_FORMULAS, formulas)):
        table.clear()
        table.update(before)


def test_a_registered_formula_reaches_every_table(registry):
    def formula(config, patches, tokens):
        return {"mlp": 2 * tokens * (config.d_vision * config.d_llm + config.d_llm**2)}

    registry.register_compressor("own", Own, cost=formula)
    setup = tiny(compressor="own", tokens=36)
    assert projector_terms("own", setup.config.projector_config()) == {"mlp": 2 * 36 * (128 * 64 + 64**2)}
    assert cost(setup) == counted_cost(setup)
    assert {row["stage"] for row in roofline(setup)} == {"tower", "projector", "prefill", "decode"}
    assert "projector" in cost_report(setup)


def test_a_compressor_without_a_formula_is_counted_or_refused(registry):
    registry.register_compressor("own", Own)
    setup = tiny(compressor="own", tokens=36)
    for refused in (cost, roofline, cost_report):
        with pytest.raises(ValueError, match="no cost formula registered for .*'own'.*cost="):
            refused(setup)
    assert counted_cost(setup).projector == cost(tiny(compressor="mlp", tokens=36)).projector


# ---- the real model, really run
@pytest.mark.parametrize(
    "name",
    [
        *(
            "delta",
            "mlp",
            "mqt",
            "prumerge",
            "fastervlm",
            "evit",
            "quecc",
            "fastv",
            "llavolta",
            "cabstractor",
        ),
        "dynamicvit",
    ],
)
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-qwen2"])
def test_generation_costs_what_the_equations_say(name, llm):
    setup = tiny(compressor=name, tokens=36 if name == "mlp" else 9, llm=llm, question=5)
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(setup.config).eval()
    image_ids = torch.full((1, setup.config.image_seq_length), setup.config.image_token_id)
    ids = torch.cat([image_ids, torch.randint(1, 99, (1, setup.text))], dim=1)
    question = dict(question_ids=torch.randint(1, 99, (1, 5))) if setup.question_tokens else {}
    with FlopCounterMode(display=False) as counter:
        out = model.generate(
            input_ids=ids,
            pixel_values=torch.randn(1, 3, 48, 48),
            do_sample=False,
            max_new_tokens=setup.answer,
            return_dict_in_generate=True,
            **question,
        )
    image_token = setup.answer * 2 * 64  # the head has one token more than the LLM's own
    assert out.sequences.shape[1] - ids.shape[1] == setup.answer
    assert counter.get_total_flops() == cost(setup).total + image_token
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert cached == kv_cache_bytes(setup, new_tokens=setup.answer - 1, element_size=4)


def test_causal_attention_is_what_is_left_without_later_tokens():
    config = pretrained_config("tiny-qwen2")
    steps = counted_llm("tiny-qwen2", ((3, 1),), 30)
    causal = prefill_flops(config, ((3, 30),), causal=True)
    assert sum(steps) - 29 * 2 * 64 * 99 == causal < prefill_flops(config, ((3, 30),))


# ---- every number of the reference
def approx(value):
    "The reference's file is rounded after 12 decimals."
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("i", range(len(BUDGETS)))
def test_llm_has_the_references_numbers(llm, i):
    want = dict(REFERENCE[llm][i])
    if "auth_total" in want:  # the reference added the tower as 0.381918 instead of 0.381918216192
        want["auth_total"] += 0.216192e-6
    v = BUDGETS[i]
    setup = at_budget(v, llm=LLMS[llm])
    by_authors = authors_cost(setup)
    full = cost(setup)
    tera = dict(
        auth_prefill=by_authors.prefill,
        auth_decode=by_authors.decode,
        auth_total=by_authors.total,
        auth_projector=by_authors.projector,
        correct_prefill_full=full.prefill,
        correct_prefill_causal=cost(setup, causal=True).prefill,
        correct_decode=full.decode,
    )
    found = dict(K=v, K_used=v + (v == 576)) | {k: f / 1e12 for k, f in tera.items()}
    assert {k: found[k] for k in want} == {k: approx(value) for k, value in want.items()}


PARTS = {  # the reference's part -> ours
    "kv_proj": "keys, values",
    "delta_w": "updates",
    "ntb_patch_embed": "mix: attention branch",
    "ntb_emhsa": "mix: EMHSA",
    "ntb_projection": "mix: convolution branch",
    "ntb_mhca": "mix: MHCA",
    "ntb_mlp": "mix: MLP",
    "q_proj": "queries",
    "attn_in_q": "attention: queries",
    "attn_in_kv": "attention: keys, values",
    "attn_core": "attention: scores",
    "attn_out": "attention: output",
    "mlp": "mlp",
}


@pytest.mark.parametrize("name", ["delta", "tokenpacker"])
@pytest.mark.parametrize("s", [1, 2, 3, 4, 6, 8, 12, 24])
def test_projector_has_the_references_parts(name, s):
    want = dict(REFERENCE[f"projector_{name}"][str(s)])
    terms = projector_terms(name, built(name, (24 // s) ** 2).config, reference=True)
    assert sum(terms.values()) / 1e9 == approx(want.pop("total"))
    assert {k: terms[PARTS[k]] / 1e9 for k in want} == {k: approx(v) for k, v in want.items()}


@pytest.mark.parametrize(
    "name,key,tokens_of",
    [
        ("mqt", "projector_mqt", int),
        ("cabstractor", "projector_cabs", int),
        ("quecc", "projector_quecc_excl_llm_text_pass", lambda s: (24 // int(s)) ** 2),
    ],
)
def test_projectors_have_the_references_totals(name, key, tokens_of):
    for budget, giga in REFERENCE[key].items():
        projector = built(name, tokens_of(budget))
        assert flops_of(name, projector, reference=True) / 1e9 == approx(giga), budget
    assert flops_of("mlp", built("mlp", 576)) / 1e9 == approx(REFERENCE["projector_llava_mlp"])


def test_authors_estimate_tower_and_fastv():
    for tokens, giga in REFERENCE["authors_projector_estimate_GF"].items():
        assert authors_cost(Setup(tokens=int(tokens))).projector / 1e9 == approx(giga)
    clip = pretrained_config(CLIP)
    vision = REFERENCE["vision"]
    sizes_of = {"authors_total": (24, 336), "without_last_block": (23, 336), "clip224": (24, 224)}
    for key, (depth, side) in sizes_of.items():
        assert tower_flops(clip, depth, side) / 1e12 == approx(vision[key])
    for tokens, tera in REFERENCE["fastv_prefill_k2_vicuna7b"].items():
        ranking = 2 * 4096 * (576 + 68.5) if tokens != "576" else 0  # the reference leaves it out
        prefill = cost(Setup(compressor="fastv", tokens=int(tokens))).prefill
        assert (prefill - ranking) / 1e12 == approx(tera)


# ---- the paper's numbers
def test_which_numbers_of_the_paper_come_from_which_formula():
    verdicts = {(r["what"], r["V"], r["paper"]): r["matched by"] for r in paper_numbers()}
    assert len(verdicts) == len(PAPER_NUMBERS)
    for (what, *_), verdict in verdicts.items():
        if what in ("prefill", "tower", "projector ratio"):
            assert verdict == "authors' formula"
        if what in ("decode", "total"):
            assert verdict.startswith("authors' formula") and "exact" not in verdict
    assert verdicts["total saved", "576 → 1", "81 %"] == "authors' formula"
    assert verdicts["total saved", "576 → 1", "70 %"] == "neither"
    assert verdicts["projector", "576", "0.024"] == "authors' formula; exact"
    assert verdicts["projector", "144", "≤ 0.002"] == "authors' formula"
    assert verdicts["decode", "576", "0.31"] == "authors' formula, G = 29.3–30.2"


@pytest.mark.parametrize(
    "printed,value,expected",
    [
        ("6.72", 6.7163, True),
        ("6.72", 6.7263, False),
        ("≤ 0.002", 0.0024, True),
        ("≤ 0.002", 0.0026, False),
        ("81 %", 81.45, True),
        ("70 %", 70.6, False),
    ],
)
def test_a_number_matches_when_it_rounds_to_the_printed_one(printed, value, expected):
    assert matches(printed, value) == expected


# ---- bytes and bounds
def test_weights_are_the_modules_own():
    setup = at_budget(144, answer=2)
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(setup.config)
    vicuna, vocab, d = 6_738_415_616, 32000, 4096
    assert num_parameters(model.get_decoder(), model.get_output_embeddings()) == vicuna + 2 * d
    moved = memory_traffic(setup)
    assert moved.tower == 2 * (num_parameters(model.vision_tower) + 3 * 336**2 + 576 * 4096)
    assert moved.projector == 2 * (num_parameters(model.multi_modal_projector) + 576 * 4096 + 144 * d)
    assert moved.prefill == 2 * (vicuna - vocab * d + 212.5 * d + 2 * 32 * d * 212.5 + vocab)
    assert moved.decode == 2 * (vicuna - vocab * d + d + 2 * 32 * d * (212.5 + 1) + vocab)


def test_decode_reads_the_cache_that_is_there():
    "Step by step: weights once, the rows' caches read, one token of each written."
    setup = tiny(compressor="fastv", llm="tiny-llama", answer=5)
    totals = [memory_traffic(replace(setup, answer=n + 1), 3).decode for n in range(1, 5)]
    growth = [after - before for before, after in zip(totals[:-1], totals[1:], strict=True)]
    without_cache = totals[0] - kv_cache_bytes(setup, 1, 3)
    assert growth == [without_cache + kv_cache_bytes(setup, n, 3) for n in (2, 3, 4)]
    assert kv_cache_bytes(setup, 1, 3) - kv_cache_bytes(setup, 0, 3) == 2 * 3 * 2 * 64 * 4
    uncompressed = replace(setup, compressor="mlp", tokens=36)
    assert kv_cache_bytes(setup) == 2 * 2 * 64 * (2 * (36 + 7) + 2 * (9 + 7)) < kv_cache_bytes(uncompressed)


def test_what_bounds_a_stage():
    def bounds(device, batch):
        return {row["stage"]: row["bound"] for row in roofline(Setup(), DEVICES[device], batch)}

    memory_bound = dict(projector="memory", prefill="memory", decode="memory")
    assert bounds("h100", 1) == dict(tower="compute") | memory_bound
    compute_bound = dict(tower="compute", projector="compute", prefill="compute")
    assert bounds("h100", 32) == compute_bound | dict(decode="memory")
    assert bounds("h200", 1)["prefill"] == "compute"  # more bandwidth moves the ridge
    for row in roofline(Setup(), DEVICES["h100"], 32):
        assert row["seconds"] == max(row["flops"] / 989e12, row["bytes"] / 3.35e12)
    stages = {row["stage"] for row in roofline(Setup(compressor="quecc"))}
    assert stages == {"tower", "projector", "question", "prefill", "decode"}


# ---- the command, and what is refused
def test_command_prints_the_stages(capsys):
    from delta_llava import cli

    cli.main(
        [
            "flops",
            "--compressor",
            "quecc",
            "--tokens",
            "36",
            "--question",
            "12",
            "--device",
            "h200",
            "--batch",
            "4",
        ]
    )
    printed = capsys.readouterr().out
    setup = Setup(compressor="quecc", tokens=36, question=12)
    assert printed.strip() == cost_report(setup, DEVICES["h200"], 4).strip()
    assert "question" in printed and "authors' formula" not in printed
    cli.main(["flops"])
    printed = capsys.readouterr().out
    assert f"| total     | {cost(Setup()).total / 1e12:.4f} " in printed and "| 2.8416 " in printed
    with pytest.raises(SystemExit, match="batch=0"):
        cli.main(["flops", "--batch", "0"])


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(tokens=143), "must be the square"),
        (dict(compressor="mqt", tokens=576), "not possible"),
        (dict(compressor="perceiver"), "is unknown"),
        (dict(llm="./nowhere"), "is not known here"),
        (dict(text=0), "text=0 must be at least 1"),
        (dict(answer=0), "answer=0"),
        (dict(question=0), "question=0"),
        (dict(image_size=-3), "image_size=-3"),
    ],
)
def test_bad_setups_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Setup(**fields)


def test_what_has_no_equation_is_refused(monkeypatch):
    experts = MixtralConfig(**TINY_LLM, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    monkeypatch.setitem(PRETRAINED_CONFIGS, "experts", experts)
    with pytest.raises(ValueError, match="equations are for LLMs like"):
        cost(tiny(llm="experts"))
    with pytest.raises(ValueError, match="no equation for a vision tower"):
        tower_flops(GPT2Config(), 2, 224)
    with pytest.raises(ValueError, match="has no CLS token"):
        cost(Setup(tower=SIGLIP, compressor="prumerge", tokens=36))
    with pytest.raises(ValueError, match="has no CLS token"):
        cost(Setup(tower=SIGLIP, compressor="fastervlm", tokens=36))
    with pytest.raises(ValueError, match="has no CLS token"):
        cost(Setup(tower=SIGLIP, compressor="evit", tokens=36))
    with pytest.raises(ValueError, match="adaptive=True"):
        projector_terms("prumerge", compressor_config("prumerge", sizes(), tokens=36, adaptive=True))
    with pytest.raises(ValueError, match="must be whole"):
        counted_cost(Setup())
    with pytest.raises(ValueError, match="the authors' formula is for"):
        authors_cost(Setup(compressor="mqt", tokens=36))
    with pytest.raises(ValueError, match="batch=0"):
        memory_traffic(Setup(), 0)


def test_costs_add_up():
    assert Cost(tower=1, projector=2, question=3, prefill=4, decode=5).total == 15
    assert model_config(CLIP, LLMS["vicuna7b"], tokens=36).image_seq_length == 36
