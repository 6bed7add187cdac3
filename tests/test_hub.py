"The hub: a server on this machine that speaks its protocol; what the project fetches from it and pushes."

import json

import huggingface_hub
import pytest
import torch
from hub_models import write_dinov2, write_siglip, write_vicuna
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from tiny_vlm import byte_tokenizer, images, prompt, tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil
from transformers.utils import hub as transformers_hub

from delta_llava.assets import load_llm, load_tower_model, resolve
from delta_llava.processor import build_processor


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub that the client in this process uses, with an empty cache."
    constants = huggingface_hub.constants
    with Hub(tmp_path / "hub") as hub:
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=files, HF_HUB_OFFLINE=False)
        values |= dict(HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(tmp_path / "cache"))
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def served(hub, name):
    "What was answered with a file: path and status of each."
    return [(path, status) for method, path, status, _ in hub.requests if method == "GET" and name in path]


# ---------------------------------------------------------------- the server speaks the client's protocol


def test_files_go_up_and_come_down_again(hub, tmp_path):
    api = HfApi(endpoint=hub.url)
    assert api.whoami()["name"] == "me"
    api.create_repo("me/model")
    weights = bytes(range(256)) * 5000
    (tmp_path / "w.safetensors").write_bytes(weights)
    api.upload_file(
        path_or_fileobj=tmp_path / "w.safetensors", path_in_repo="a/w.safetensors", repo_id="me/model"
    )
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/model")
    first = api.model_info("me/model").sha
    folder = snapshot_download("me/model")
    assert open(f"{folder}/a/w.safetensors", "rb").read() == weights
    assert folder.endswith(first) and sorted(api.list_repo_files("me/model")) == [
        "a/w.safetensors",
        "config.json",
    ]
    api.delete_file("config.json", repo_id="me/model")
    assert api.list_repo_files("me/model") == ["a/w.safetensors"] and api.model_info("me/model").sha != first
    assert snapshot_download("me/model", revision=first) == folder
    digests = {path.name for path in hub.blobs.iterdir()}
    stored = [headers for _, path, _, headers in hub.requests if path.strip("/") in digests]
    assert stored and not any("Authorization" in headers for headers in stored), "the token leaves the hub"


def test_a_stopped_download_goes_on(hub, tmp_path, monkeypatch):
    "The client asks for the missing part of a file only."
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    (folder := tmp_path / "m").mkdir()
    (folder / "w.bin").write_bytes(bytes(range(256)) * 5000)
    hub.add_folder("org/m", folder)
    digest = hub.repos["models", "org/m"].tree("main")["w.bin"]
    hub.cut[digest] = 300_000
    path = huggingface_hub.hf_hub_download("org/m", "w.bin")
    assert open(path, "rb").read() == (folder / "w.bin").read_bytes()
    parts = [(status, headers.get("Range")) for _, path, status, headers in hub.requests if digest in path]
    assert parts == [(200, None), (206, "bytes=300000-")]


def test_what_does_not_exist_is_said_as_the_hub_says_it(hub, tmp_path):
    (folder := tmp_path / "m").mkdir()
    (folder / "config.json").write_text("{}")
    hub.add_folder("org/m", folder)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/none")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/m", revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("org/m", "none.json")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="another").create_repo("me/x")


# ---------------------------------------------------------------- what the project fetches


@pytest.mark.parametrize("kind,parts", [("bin", 2), ("safetensors", 3)])
def test_an_llm_with_a_sentencepiece_tokenizer_is_fetched(hub, tmp_path, kind, parts):
    write_vicuna(tmp_path / "llm", kind, parts)
    hub.add_folder("lmsys/vicuna-7b-v1.5", tmp_path / "llm")
    model, tokenizer = load_llm("hub:lmsys/vicuna-7b-v1.5")
    assert tokenizer("A cat").input_ids[0] == tokenizer.bos_token_id == 1
    assert len(tokenizer) == model.config.vocab_size and model.dtype == torch.float32
    assert (
        tokenizer.decode(tokenizer("a caption, please").input_ids, skip_special_tokens=True)
        == "a caption, please"
    )
    before = len(hub.requests)
    load_llm("hub:lmsys/vicuna-7b-v1.5")
    assert not [r for r in hub.requests[before:] if r[0] == "GET" and "/resolve/" in r[1]], "fetched again"
    hub.close()
    huggingface_hub.close_session()
    load_llm("hub:lmsys/vicuna-7b-v1.5")  # the cache is enough where no hub answers


@pytest.mark.parametrize("write,grid", [(write_siglip, 27), (write_dinov2, 37)])
def test_towers_other_than_clip_are_fetched(hub, tmp_path, write, grid):
    write(tmp_path / "tower")
    (tmp_path / "tower" / "tf_model.h5").write_bytes(bytes(10))
    hub.add_folder("google/tower", tmp_path / "tower")
    model = load_tower_model("hub:google/tower")
    assert model.config.image_size // model.config.patch_size == grid
    assert not served(hub, "tf_model.h5"), "weights of other libraries are not fetched"


def test_safetensors_come_before_bin_and_a_revision_is_another_model(hub, tmp_path):
    write_dinov2(tmp_path / "new")
    write_vicuna(tmp_path / "llm")
    hub.add_folder("org/both", tmp_path / "new")
    hub.add_folder("org/both", tmp_path / "llm", ref="refs/pr/1")
    assert resolve("hub:org/both").kind == "tower"
    assert resolve("hub:org/both@refs/pr/1").kind == "llm"
    (tmp_path / "new" / "pytorch_model.bin").write_bytes(b"no weights")
    hub.add_folder("org/two", tmp_path / "new")
    assert [f.name for f in resolve("hub:org/two").files] == ["model.safetensors"]


def test_what_cannot_be_fetched_says_what_to_do(hub, tmp_path):
    for name in ("org/none", "org/both@none"):
        with pytest.raises(
            ValueError, match=f"hub:{name} cannot be fetched.*hf download {name.split('@')[0]}"
        ):
            resolve(f"hub:{name}")
    (folder := tmp_path / "m").mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="clip")))
    hub.add_folder("org/empty", folder)
    with pytest.raises(ValueError, match="has neither model.*safetensors nor pytorch_model.*bin"):
        resolve("hub:org/empty")


# ---------------------------------------------------------------- what its users push


def test_model_and_processor_are_pushed_and_loaded_back(hub, tmp_path):
    model = tiny("clip_b32_384")
    processor = build_processor(
        CLIPImageProcessorPil(size=dict(shortest_edge=384), crop_size=384), byte_tokenizer(), 36, "v1"
    )
    model.push_to_hub("me/delta")
    processor.push_to_hub("me/delta")
    names = HfApi(endpoint=hub.url).list_repo_files("me/delta")
    assert {"config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"} <= set(names)
    again = AutoModelForImageTextToText.from_pretrained("me/delta")
    assert type(again) is type(model)
    inputs = dict(input_ids=prompt(36), pixel_values=images("clip_b32_384"))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    loaded = AutoProcessor.from_pretrained("me/delta")
    image = Image.new("RGB", (50, 40), "red")
    for name, value in processor(image, "<image>What?").items():
        assert torch.equal(loaded(image, "<image>What?")[name], value), name
