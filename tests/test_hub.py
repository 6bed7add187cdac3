"The hub: a server on this machine that speaks its protocol; what the project fetches from it and pushes."

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import nbformat
import pytest
import torch
from hub_models import write_clip, write_dinov2, write_siglip, write_vicuna
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from nbclient import NotebookClient
from PIL import Image
from tiny_vlm import byte_tokenizer, images, prompt, tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil
from transformers.utils import hub as transformers_hub

from delta_llava.assets import load_llm, load_tower_model, resolve
from delta_llava.processor import build_processor

REPOSITORY = Path(__file__).parent.parent


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


# ---------------------------------------------------------------- CLIP at its true size, and the tutorials


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,side", [("openai/clip-vit-base-patch32", 7), ("openai/clip-vit-large-patch14-336", 24)]
)
def test_clip_of_true_shape_is_fetched_as_bin_and_as_parts(hub, tmp_path, name, side):
    write_clip(tmp_path / "bin", name, "bin")
    write_clip(tmp_path / "parts", name, "safetensors", parts=3)
    hub.add_folder(name, tmp_path / "bin")
    hub.add_folder(name, tmp_path / "parts", ref="refs/pr/1")
    whole = load_tower_model(f"hub:{name}")
    assert whole.config.image_size // whole.config.patch_size == side
    expected = whole.state_dict()
    found = load_tower_model(f"hub:{name}@refs/pr/1").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def repository(tmp_path):
    "The part of the repository that the tutorials read, and a hub for the processes that they start."
    root = tmp_path / "repository"
    (root / "nbs" / "tutorials").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "runs", root / "runs", ignore=lambda *_: [], copy_function=copy_record)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    for file in (REPOSITORY / "nbs" / "tutorials").glob("*.ipynb"):
        shutil.copy(file, root / "nbs" / "tutorials")
    with Hub(tmp_path / "hub") as hub:
        env = hub.environment(tmp_path / "home") | dict(PATH="/usr/bin:/bin", PYTHONPATH=str(REPOSITORY))
        yield root, hub, env | dict(OMP_NUM_THREADS="1")


def copy_record(source, target):
    if Path(source).suffix == ".json":
        shutil.copy(source, target)


def run_notebook(root, env, name, **spec):
    "Its cells in a kernel, as JupyterLab starts it: in the folder of the notebook; what they printed."
    path = root / "nbs" / "tutorials" / name
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = chosen_cells(notebook.cells, **spec)
    where = {"metadata": {"path": str(path.parent)}}
    options = dict(timeout=None, startup_timeout=600, kernel_name="python3", resources=where)
    NotebookClient(notebook, **options).execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert any(output.output_type == "display_data" for output in outputs) or "keep" in spec, "no figure"
    return "".join(output.text for output in outputs if output.output_type == "stream")


def chosen_cells(cells, keep=("",), skip=(), after=None):
    "Code cells with one of the texts `keep` and none of `skip`; after those that hold a text, other code."
    found = []
    for cell in cells:
        kept = any(text in cell.source for text in keep) and not any(text in cell.source for text in skip)
        if cell.cell_type != "code" or not kept:
            continue
        cell.outputs = []
        found.append(cell)
        for text, code in (after or {}).items():
            if text in cell.source:
                found.append(nbformat.v4.new_code_cell(code))
    return found


@pytest.mark.slow
def test_tutorial_c_trains_with_clip(repository, tmp_path):
    "Every cell for CLIP, at its true shape, for three steps; then the page's command."
    root, hub, env = repository
    write_clip(tmp_path / "clip", "openai/clip-vit-base-patch32", "bin")
    hub.add_folder("openai/clip-vit-base-patch32", tmp_path / "clip")
    smaller = (
        "stage1_steps=3, stage2_steps=3, stage1_batch_size=2, stage2_batch_size=2, train_images=12, "
        "test_images=2, naming_images=2"
    )
    spec = dict(
        skip=[
            *("#| slow\nfew", "#| slow\n#| label", "#| slow\nscores", "#| slow\n#| hide"),
            *("quickstart_flops", "test_eq(published"),
        ],
        after={
            "download = False": "download = True",
            "clip = Quickstart(": f"import dataclasses; clip = dataclasses.replace(clip, {smaller})",
            "STEPS, SCENES = ": "STEPS, SCENES = 3, 48",
        },
    )
    printed = run_notebook(root, env, "c_train_clip_b32.ipynb", **spec)
    assert "hub:openai/clip-vit-base-patch32: clip model" in printed and "step   0, loss –" in printed
    assert "matched_loss" in printed
    assert (root / "runs" / "quickstart-clip" / "report.html").exists()
    command = "quickstart --tower hub:openai/clip-vit-base-patch32 --image-size 384 --output-dir runs/clip-2"
    sizes = (
        "--stage1-steps 2 --stage2-steps 2 --stage1-batch-size 2 --stage2-batch-size 2 --train-images 12 "
        "--test-images 2 --naming-images 2"
    )
    words = [sys.executable, "-m", "delta_llava", *command.split(), *sizes.split()]
    subprocess.run(words, cwd=root, env=env, check=True)
    assert (root / "runs" / "clip-2" / "report.html").exists()


SHORT_START = """
launch, started = True, []
SHORT = "--batch-size 2 --per-device-batch-size 1 --max-steps 2 --no-bf16 --num-workers 0".split()


def start(command):
    words = [str(word) for word in command]
    if "accelerate.commands.launch" in words:  # FSDP; tests/test_stage.py runs it
        return
    if "--nproc-per-node" in words:
        at = words.index("--nproc-per-node") + 1
        words[at] = str(min(2, int(words[at])))
        words += SHORT + ["--sharding", "none"]
    print("start", " ".join(words[1:]), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)
"""
CELLS_OF_D = [
    *("import json", "ROOT = next", "GPUS = 8", "mix = Path", "STEPS = ", "plan_checkpointing(stage1, GPUS)"),
    *("def doctor_cmd", "if launch:", "def for_one_gpu", "lora8 = "),
]


def write_conversations(root):
    "The paper's files with a few rows, under the folders that the page names."
    data = root / "data"
    captions, mix = data / "LLaVA-Pretrain", data / "mix665k"
    rows = {captions / "blip_laion_cc_sbu_558k.json": [], mix / "llava_v1_5_mix665k.json": []}
    for file, pictures, folder in zip(
        rows, (captions / "images", mix), ("00453", "coco/train2017"), strict=True
    ):
        (pictures / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (60, 40 + i), (40 * i, 90, 20)).save(pictures / folder / f"{i}.jpg")
            turns = [dict(value="What is this?\n<image>"), dict(value=f"A cat and {i} dogs.")]
            turns = [{"from": who} | turn for who, turn in zip(("human", "gpt"), turns, strict=True)]
            rows[file].append(dict(id=str(i), image=f"{folder}/{i}.jpg", conversations=turns))
    text = [{"from": "human", "value": "Please?"}, {"from": "gpt", "value": "A caption."}]
    rows[mix / "llava_v1_5_mix665k.json"].append(dict(id="text", conversations=text))
    for file, content in rows.items():
        file.write_text(json.dumps(content))


@pytest.mark.slow
def test_tutorial_d_trains_both_stages_and_its_variants(repository, tmp_path):
    "Every command for two steps: the paper's tower at its true shape, a narrow LLM, two processes."
    bits = importlib.util.find_spec("bitsandbytes")  # `make slow` installs it
    root, hub, env = repository
    write_clip(tmp_path / "clip", "openai/clip-vit-large-patch14-336", "safetensors", parts=3)
    hub.add_folder("openai/clip-vit-large-patch14-336", tmp_path / "clip")
    write_vicuna(tmp_path / "llm")
    hub.add_folder("lmsys/vicuna-7b-v1.5", tmp_path / "llm")
    write_conversations(root)
    Image.new("RGB", (60, 40), "red").save(root / "image.jpg")
    after = {"def start(": SHORT_START}
    stages = ["stage1", "stage2", "stage1-single", "stage2-lora-single", "stage2-lora"]
    if bits:  # the page's other choice for one GPU, in four bits, trains on a CPU as well
        after["start(torchrun_cmd(lora, gpus=1))"] = "start(torchrun_cmd(qlora, gpus=1))"
        stages.append("stage2-qlora-single")
        env["PYTHONPATH"] += f"{os.pathsep}{Path(bits.origin).parent.parent}"
    printed = run_notebook(root, env, "d_launch_h100.ipynb", keep=CELLS_OF_D, after=after)
    assert printed.count("start -m delta_llava doctor") == 2
    assert printed.count("start -m torch.distributed.run") == len(stages)
    for name in stages:
        record = json.loads((root / "runs" / name / "run.json").read_text())
        assert len(record["result"]["losses"]) >= 1, name
    for name in ("finetune.sh", "finetune.slurm", "accelerate.yaml"):
        assert (root / "launch" / name).exists()
    assert not (root / "nbs" / "tutorials" / "runs").exists(), "nothing is written beside the notebook"
