"""The explorer: what it remembers, what it offers, what it says; all without a browser, which
tests/test_jupyterlab.py has.
"""

import base64
import io
from datetime import UTC, datetime

import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer, llm_config
from transformers import CLIPImageProcessorPil, CLIPVisionConfig

from delta_llava import explore as module
from delta_llava.compressors.base import compressor_config
from delta_llava.config import ProjectorConfig
from delta_llava.explore import TOP, Explorer, Query, draw_maps, explore, png
from delta_llava.processor import build_processor
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

QUESTION, ANSWER = "What?", "A red fox."


def tiny(compressor, tokens=16):
    "4×4 patches; random weights, large enough that maps differ."
    torch.manual_seed(0)
    sizes = ProjectorConfig(grid=4, tokens=tokens, levels=(1, 2, 3, 4), d_vision=128, d_llm=64)
    tokenizer = byte_tokenizer()
    config = DeltaLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=llm_config(vocab_size=len(tokenizer)),
        compressor=compressor,
        projector=compressor_config(compressor, sizes).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = DeltaLlavaForConditionalGeneration(config).eval()
    for p in model.get_decoder().parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model, build_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56), tokenizer, tokens, template="v1"
    )


@pytest.fixture(scope="module")
def models():
    return {name: tiny(name) for name in ("delta", "m3", "mqt")}


@pytest.fixture
def images():
    return {
        "up": Image.linear_gradient("L").resize((56, 56)),
        "round": Image.radial_gradient("L").resize((56, 56)),
    }


@pytest.fixture
def calls(monkeypatch):
    "Every call of the model."
    seen, ask = [], module.word_cams
    monkeypatch.setattr(
        module, "word_cams", lambda *args, **kwargs: seen.append((args, kwargs)) or ask(*args, **kwargs)
    )
    return seen


@pytest.fixture
def panel(models, images, calls, monkeypatch):
    panel = explore(models, images, QUESTION)  # random weights may answer without a word
    panel.answer.value = ANSWER
    assert said(panel.status) == "" and panel.result.answer == ANSWER
    calls.clear()
    return panel


def said(line):
    return line.value.partition(">")[2].rpartition("<")[0]


def png_of(picture):
    picture.convert("RGB").save(out := io.BytesIO(), "PNG")
    return out.getvalue()


# --- without widgets ------------------------------------------------------------------------------


def test_budgets_are_those_that_work(models, images):
    explorer = Explorer(models, images)
    assert explorer.budgets("delta") == [4, 9, 16] and explorer.budgets("m3") == [4, 16]
    for name in explorer.models:
        for t in explorer.budgets(name):
            assert explorer.ask(Query("up", QUESTION, name, t, ANSWER)).cams.shape == (3, t)


def test_a_compressor_without_places_is_set_aside(models, images):
    explorer = Explorer(models, images)
    assert [*explorer.models] == ["delta", "m3"] and explorer.set_aside == ["mqt"]
    with pytest.raises(ValueError, match=r"\['mqt'\] holds no compressor"):
        Explorer({"mqt": models["mqt"]}, images)


def test_the_same_question_is_asked_once(models, images, calls):
    explorer, query = Explorer(models, images), Query("up", QUESTION, "delta", 4, ANSWER)
    first = explorer.ask(query)
    assert explorer.ask(Query("up", f" {QUESTION} ", "delta", 4, ANSWER + " ")) is first and len(calls) == 1
    others = [
        Query("round", QUESTION, "delta", 4, ANSWER),
        Query("up", "Who?", "delta", 4, ANSWER),
        Query("up", QUESTION, "m3", 4, ANSWER),
        Query("up", QUESTION, "delta", 9, ANSWER),
        Query("up", QUESTION, "delta", 4, "A fox."),
    ]
    for i, other in enumerate(others):
        assert explorer.ask(other) is not first and len(calls) == 2 + i


def test_another_picture_of_the_same_name_is_asked_anew(models, images):
    explorer, query = Explorer(models, images), Query("up", QUESTION, "delta", 16, ANSWER)
    before = explorer.ask(query)
    explorer.add("up", png_of(images["round"]))
    assert (explorer.ask(query).cams - before.cams).abs().max() > 0
    assert explorer.ask(query) is explorer.ask(
        Query("round", QUESTION, "delta", 16, ANSWER)
    )  # the bytes count, not the name


@pytest.mark.parametrize("content, why", [(b"", "no picture"), (b"words", "no picture"), (None, "truncated")])
def test_a_file_that_is_no_picture(models, images, content, why):
    content = png_of(Image.effect_noise((99, 99), 50))[:3000] if content is None else content
    with pytest.raises(ValueError, match=f"^mine.png cannot be used: .*{why}.*Readable are JPEG"):
        Explorer(models, images).add("mine.png", content)


def test_one_colour_scale_whatever_is_drawn():
    "A word of even share has the same colour beside any other; a map of zeros has another one."
    import matplotlib.pyplot as plt

    picture, even, peak, before = (
        Image.new("RGB", (56, 56)),
        torch.ones(16),
        torch.eye(16)[3],
        plt.get_fignums(),
    )
    figures = [
        draw_maps(picture, maps)
        for maps in ({"even": even}, {"even": 7 * even, "peak": peak}, {"zero": 0 * even})
    ]

    def colour(fig, row=0):
        return [
            image.to_rgba(image.get_array(), alpha=1)[0, 0].tolist()
            for image in (fig.axes[3 * row + 1].images[0], fig.axes[3 * row + 2].images[1])
        ]

    assert colour(figures[0]) == colour(figures[1]) and colour(figures[0]) != colour(figures[2])
    assert figures[1].axes[4].images[0].get_clim() == (0, TOP)
    images = {png(fig) for fig in figures}
    assert len(images) == 3 and plt.get_fignums() == before  # none is left open


# --- with widgets ---------------------------------------------------------------------------------


def test_a_click_on_a_word_asks_nothing(panel, calls):
    images = {}
    for i in (2, 1, 0, 2):
        panel.words.index = i
        images.setdefault(panel.shown.value, i)
    assert len(images) == 3 and not calls and [text for text, _ in panel.words.options] == ["A", "red", "fox"]


def test_the_slider_asks_and_keeps_the_word(panel, calls):
    panel.words.index = 1
    before = panel.shown.value
    panel.tokens.value = 4
    assert len(calls) == 1 and calls[0][1]["tokens"] == 4 and panel.result.cams.shape == (3, 4)
    assert panel.words.label == "red" and panel.shown.value != before
    panel.tokens.value = 16
    assert panel.shown.value == before and len(calls) == 1


def test_another_compressor_brings_its_budgets(panel, calls):
    panel.tokens.value = 9
    panel.compressor.value = "m3"
    assert panel.tokens.options == (4, 16) and panel.tokens.value == 4
    assert calls[-1][0][0] is panel.explorer.models["m3"][0] and len(calls) == 2
    assert "mqt" not in panel.compressor.options and any(
        "No map for mqt" in getattr(child, "value", "")
        for child in panel.box.children[0].children
        if isinstance(child.value, str)
    )


def test_an_upload_is_shown(panel, calls):
    def upload(name, content):
        panel.upload.value = [
            dict(
                name=name,
                type="",
                size=len(content),
                content=memoryview(content),
                last_modified=datetime.now(UTC),
            )
        ]

    upload("mine.png", png_of(Image.effect_noise((56, 56), 90)))
    assert panel.picture.value == "mine.png" and len(calls) == 1 and panel.shown.value
    upload("notes.txt", b"words")
    assert (
        "notes.txt cannot be used" in said(panel.status)
        and panel.picture.value == "mine.png"
        and len(calls) == 1
    )
    panel.picture.value = "round"
    assert said(panel.status) == "" and panel.shown.value


def test_an_error_is_said_and_nothing_old_stays(panel, monkeypatch):
    panel.question.value = "  "
    assert (
        said(panel.status).startswith("The question is empty")
        and not panel.shown.value
        and panel.words.options == ()
    )
    assert "image/png" not in panel._repr_mimebundle_()
    panel.question.value = "Who?"
    assert said(panel.status) == "" and panel.shown.value

    def broken(*args, **kwargs):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(module, "word_cams", broken)
    panel.tokens.value = 4
    assert said(panel.status) == "RuntimeError: out of &lt;memory&gt;" and not any(
        knob.disabled for knob in panel.knobs
    )


def test_knobs_rest_while_the_model_computes(panel, monkeypatch):
    ask, seen = module.word_cams, []

    def watch(*args, **kwargs):
        seen.append((said(panel.status), all(knob.disabled for knob in (*panel.knobs, panel.words))))
        return ask(*args, **kwargs)

    monkeypatch.setattr(module, "word_cams", watch)
    panel.tokens.value = 9
    assert seen == [("computing …", True)] and not panel.words.disabled


def test_a_map_of_zeros_is_named(panel):
    panel.result.cams[2] = 0
    panel.words.index = 2
    assert said(panel.status) == "No visual token speaks for “fox”: its map is zero everywhere."


def test_answers_are_text(panel):
    panel.answer.value = "A <b>fox</b>."
    assert panel.said.value == "<b>A &lt;b&gt;fox&lt;/b&gt;.</b>"


def test_where_there_are_no_widgets_the_picture_stays(panel):
    shown = panel._repr_mimebundle_()
    assert (
        "application/vnd.jupyter.widget-view+json" in shown
        and base64.b64decode(shown["image/png"]) == panel.shown.value
    )
    assert bytes(panel.shown.value).startswith(b"\x89PNG")
