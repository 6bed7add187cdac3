"The explorer without a browser; tests/test_jupyterlab.py has one."

import base64
import io
from datetime import UTC, datetime

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from tiny_vlm import byte_tokenizer, llm_config
from transformers import CLIPImageProcessorPil, CLIPVisionConfig

from delta_llava import explore as module
from delta_llava.compressors.base import compressor_config
from delta_llava.config import ProjectorConfig
from delta_llava.explore import COLOR_MAX, Explorer, Query, draw_maps, explore, figure_to_png
from delta_llava.processor import build_processor
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

QUESTION = "What?"
ANSWER = "A red fox."


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
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    return model, build_processor(image_processor, tokenizer, tokens, template="v1")


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
    recorded = []
    word_cams = module.word_cams

    def record(*args, **kwargs):
        recorded.append((args, kwargs))
        return word_cams(*args, **kwargs)

    monkeypatch.setattr(module, "word_cams", record)
    return recorded


@pytest.fixture
def panel(models, images, calls):
    panel = explore(models, images, QUESTION)  # random weights may generate an answer without a word
    panel.controls.answer.value = ANSWER
    assert status(panel) == ""
    assert panel.result.answer == ANSWER
    calls.clear()
    return panel


def status(panel):
    "The text of the status line, without its HTML."
    return panel.outputs.status.value.partition(">")[2].rpartition("<")[0]


def png_bytes(image):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


# --- without widgets ------------------------------------------------------------------------------


def test_every_offered_budget_works(models, images):
    explorer = Explorer(models, images)
    assert explorer.budgets("delta") == [4, 9, 16]
    assert explorer.budgets("m3") == [4, 16]
    for name in explorer.models:
        for tokens in explorer.budgets(name):
            assert explorer.answer(Query("up", QUESTION, name, tokens, ANSWER)).cams.shape == (3, tokens)


def test_non_spatial_compressors_are_left_out(models, images):
    explorer = Explorer(models, images)
    assert [*explorer.models] == ["delta", "m3"]
    assert explorer.non_spatial == ["mqt"]
    with pytest.raises(ValueError, match=r"\['mqt'\] holds no compressor"):
        Explorer({"mqt": models["mqt"]}, images)


def test_equal_queries_are_computed_once(models, images, calls):
    explorer = Explorer(models, images)
    first = explorer.answer(Query("up", QUESTION, "delta", 4, ANSWER))
    assert explorer.answer(Query("up", f" {QUESTION} ", "delta", 4, ANSWER + " ")) is first
    assert len(calls) == 1
    others = [
        Query("round", QUESTION, "delta", 4, ANSWER),
        Query("up", "Who?", "delta", 4, ANSWER),
        Query("up", QUESTION, "m3", 4, ANSWER),
        Query("up", QUESTION, "delta", 9, ANSWER),
        Query("up", QUESTION, "delta", 4, "A fox."),
    ]
    for i, other in enumerate(others):
        assert explorer.answer(other) is not first
        assert len(calls) == 2 + i


def test_the_cache_compares_pixels_and_not_names(models, images):
    explorer = Explorer(models, images)
    query = Query("up", QUESTION, "delta", 16, ANSWER)
    before = explorer.answer(query)
    explorer.add_image("up", png_bytes(images["round"]))
    after = explorer.answer(query)
    assert (after.cams - before.cams).abs().max() > 0
    assert after is explorer.answer(Query("round", QUESTION, "delta", 16, ANSWER))


@pytest.mark.parametrize(
    "content, reason", [(b"", "not an image"), (b"words", "not an image"), (None, "truncated")]
)
def test_a_file_that_is_not_an_image(models, images, content, reason):
    if content is None:
        content = png_bytes(Image.effect_noise((99, 99), 50))[:3000]
    with pytest.raises(ValueError, match=f"^mine.png cannot be used: .*{reason}.*Supported formats: JPEG"):
        Explorer(models, images).add_image("mine.png", content)


def first_colors(fig, row=0):
    "Color of the first cell: in the grid of tokens, and in the overlay."
    shown = (fig.axes[3 * row + 1].images[0], fig.axes[3 * row + 2].images[1])
    return [im.to_rgba(im.get_array(), alpha=1)[0, 0].tolist() for im in shown]


def test_the_color_scale_is_fixed():
    "A uniform map has the same color whatever is drawn beside it; a map of zeros has another one."
    image = Image.new("RGB", (56, 56))
    uniform = torch.ones(16)
    peak = torch.eye(16)[3]
    open_figures = plt.get_fignums()
    alone = draw_maps(image, {"uniform": uniform})
    beside_peak = draw_maps(image, {"uniform": 7 * uniform, "peak": peak})
    zero = draw_maps(image, {"zero": 0 * uniform})
    assert first_colors(alone) == first_colors(beside_peak) != first_colors(zero)
    for ax, i in ((4, 0), (5, 1)):
        assert beside_peak.axes[ax].images[i].get_clim() == (0, COLOR_MAX)
    assert len({figure_to_png(fig) for fig in (alone, beside_peak, zero)}) == 3
    assert plt.get_fignums() == open_figures  # none is left open


# --- with widgets ---------------------------------------------------------------------------------


def test_a_click_on_a_word_does_not_run_the_model(panel, calls):
    figures = set()
    for i in (2, 1, 0, 2):
        panel.outputs.words.index = i
        figures.add(panel.outputs.figure.value)
    assert len(figures) == 3
    assert not calls
    assert [text for text, _ in panel.outputs.words.options] == ["A", "red", "fox"]


def test_the_slider_asks_and_keeps_the_word(panel, calls):
    panel.outputs.words.index = 1
    before = panel.outputs.figure.value
    panel.controls.tokens.value = 4
    ((_, options),) = calls
    assert options["tokens"] == 4
    assert panel.result.cams.shape == (3, 4)
    assert panel.outputs.words.label == "red"
    assert panel.outputs.figure.value != before
    panel.controls.tokens.value = 16
    assert panel.outputs.figure.value == before
    assert len(calls) == 1


def test_another_method_draws_another_map_of_the_same_word(panel, calls):
    panel.outputs.words.index = 1
    before = panel.outputs.figure.value
    panel.controls.method.value = "saliency"
    ((_, options),) = calls
    assert options["method"] == "saliency" and panel.result.method == "saliency"
    assert panel.outputs.words.label == "red"
    assert panel.outputs.figure.value != before


@pytest.mark.parametrize(
    "effects,shown",
    [({"A": 9.0, "red": 2.0, "fox": 1.0}, "red"), ({"A": 1.0, "red": -1.0, "fox": 3.0}, "fox")],
)
def test_the_first_word_is_the_content_word_that_the_image_moves_most(
    models, images, effects, shown, monkeypatch
):
    monkeypatch.setattr(module, "visual_effects", lambda *args, **kwargs: effects)
    panel = explore(models, images, QUESTION)
    panel.outputs.words.options = ()
    panel.controls.answer.value = ANSWER
    assert panel.outputs.words.label == shown


def test_another_compressor_has_its_own_budgets(panel, calls):
    panel.controls.tokens.value = 9
    panel.controls.compressor.value = "m3"
    assert panel.controls.tokens.options == (4, 16)
    assert panel.controls.tokens.value == 4
    model = calls[-1][0][0]
    assert model is panel.explorer.models["m3"][0]
    assert len(calls) == 2


def test_non_spatial_compressors_are_named(panel):
    left, _ = panel.widget.children
    assert "mqt" not in panel.controls.compressor.options
    assert any("No maps for mqt" in str(getattr(child, "value", "")) for child in left.children)


def upload(panel, name, content):
    "What the browser sends for a chosen file."
    file = dict(name=name, type="", size=len(content), content=memoryview(content))
    panel.controls.upload.value = [file | dict(last_modified=datetime.now(UTC))]


def test_an_upload_is_shown(panel, calls):
    upload(panel, "mine.png", png_bytes(Image.effect_noise((56, 56), 90)))
    assert panel.controls.image.value == "mine.png"
    assert len(calls) == 1
    assert panel.outputs.figure.value
    upload(panel, "notes.txt", b"words")
    assert "notes.txt cannot be used" in status(panel)
    assert panel.controls.image.value == "mine.png"
    assert len(calls) == 1
    panel.controls.image.value = "round"
    assert status(panel) == ""
    assert panel.outputs.figure.value


def test_an_error_is_shown_without_an_old_result(panel, monkeypatch):
    panel.controls.question.value = "  "
    assert status(panel).startswith("The question is empty")
    assert not panel.outputs.figure.value
    assert panel.outputs.words.options == ()
    assert "image/png" not in panel._repr_mimebundle_()
    panel.controls.question.value = "Who?"
    assert status(panel) == ""
    assert panel.outputs.figure.value

    def broken(*args, **kwargs):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(module, "word_cams", broken)
    panel.controls.tokens.value = 4
    assert status(panel) == "RuntimeError: out of &lt;memory&gt;"
    assert not any(widget.disabled for widget in vars(panel.controls).values())


def test_widgets_are_disabled_while_the_model_computes(panel, monkeypatch):
    word_cams = module.word_cams
    observed = []

    def observe(*args, **kwargs):
        widgets = (*vars(panel.controls).values(), panel.outputs.words)
        observed.append((status(panel), all(widget.disabled for widget in widgets)))
        return word_cams(*args, **kwargs)

    monkeypatch.setattr(module, "word_cams", observe)
    panel.controls.tokens.value = 9
    assert observed == [("computing …", True)]
    assert not panel.outputs.words.disabled


def test_a_map_of_zeros_is_reported(panel):
    panel.outputs.words.index = 1
    panel.result.cams[2] = 0
    panel.outputs.words.index = 2
    assert status(panel) == "No visual token increases the score of “fox”: its map is zero everywhere."


def test_answers_are_escaped(panel):
    panel.controls.answer.value = "A <b>fox</b>."
    assert panel.outputs.answer.value == "<b>A &lt;b&gt;fox&lt;/b&gt;.</b>"


def test_the_figure_is_shown_where_there_are_no_widgets(panel):
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == panel.outputs.figure.value
    assert bytes(panel.outputs.figure.value).startswith(b"\x89PNG")
