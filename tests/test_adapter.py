"The adapter: each part is found, failures are named, and other modules take moving parts from it."

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_vlm import IMAGE, LLM_SIZES, TOWERS, images, prompt
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, TrainingArguments

from delta_llava import adapter
from delta_llava.config import clip_b32_224
from delta_llava.trainer import freeze, merge_lora
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "delta_llava"
OPTIONAL = {"lmms_eval"}
HEADS = {  # LLM: what its head does besides a product with a matrix
    "llama": {},
    "phi": {},  # bias
    "gemma2": dict(final_logit_softcapping=2.0, head_dim=16),
    "granite": dict(logits_scaling=3.0),
    "cohere": dict(logit_scale=0.3),
    "gpt_neox": {},  # other names for the decoder and the head
}


def causal_lm(kind, seed=0):
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LLM_SIZES | HEADS[kind])).eval()
    with torch.no_grad():
        for p in llm.get_output_embeddings().parameters():
            p.normal_()
    return llm


@pytest.mark.parametrize("name", adapter.PARTS)
def test_each_part_is_there(name):
    module, reason = adapter.PARTS[name]
    if module.partition(".")[0] in OPTIONAL:
        pytest.importorskip(module.partition(".")[0])
    assert getattr(adapter, name) is adapter.moving_part(name) and reason


def test_a_part_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(adapter.PARTS, "Gone", ("transformers.cache_utils", "a test asks for it"))
    monkeypatch.setitem(adapter.PARTS, "NoModule", ("transformers.gone", "a test asks for it"))
    for name in ("Gone", "NoModule"):
        with pytest.raises(adapter.AdapterError, match="because a test asks for it") as error:
            adapter.moving_part(name)
        low, high = adapter.TESTED["transformers"]
        assert f"Tested with transformers {low} to {high}" in str(error.value)
    with pytest.raises(AttributeError, match="nothing"):
        getattr(adapter, "nothing")  # noqa: B009  the module's own `__getattr__`


def test_the_lowest_tested_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "transformers", "accelerate", "peft"):
        assert re.search(rf'"{package}>=([\d.]+)', text)[1] == adapter.TESTED[package][0]


FOREIGN = ("transformers", "accelerate", "peft", "lmms_eval")
STABLE = {  # module of another library: names that its documentation tells everybody to import; `None` is all
    "transformers": None,
    "accelerate": None,
    "peft": None,
    "transformers.utils": {"logging"},
}
OTHER_PRIVATE = {  # private names that none of these four libraries owns, or that authors of models must set
    "_init_weights": "transformers documents it for authors of models",
    "_repr_mimebundle_": "IPython's protocol",
    "_cdata": "torch's storage, whose address identifies it",
    "_dynamo": "torch's compiler",
    "_compiled_call_impl": "torch's compiled module, which only this attribute makes eager again",
}
MODEL_FLAGS = re.compile("_init_weights|_supports_|_can_compile_fullgraph|_abc_")  # set by authors of models
MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
OTHERS = [path for path in MODULES if path.name not in ("adapter.py", "_modidx.py")]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(tree):
    "Private names that a module defines itself."
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def foreign_imports(node):
    "`module, name` of each import from one of the four libraries."
    if isinstance(node, ast.Import):
        pairs = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        pairs = [(node.module, alias.name) for alias in node.names]
    else:
        return []
    return [(module, name) for module, name in pairs if module.partition(".")[0] in FOREIGN]


def private_name(node):
    "The private attribute that an expression reads, if it reads one."
    if isinstance(node, ast.Attribute):
        return node.attr if is_private(node.attr) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        if node.func.id in ("getattr", "hasattr", "setattr") and isinstance(name, ast.Constant):
            return name.value if isinstance(name.value, str) and is_private(name.value) else None
    return None


def moving_parts(tree, own):
    "What a module takes from the four libraries besides their stable names."
    for node in ast.walk(tree):
        for module, name in foreign_imports(node):
            names = STABLE.get(module, set())
            if name in adapter.PARTS or (names is not None and name not in names):
                yield f"line {node.lineno}: {module}.{name}"
        path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        module, _, name = path.rpartition(".")
        if re.fullmatch(r"(transformers|accelerate|peft|lmms_eval)(\.\w+)+", module):
            if path != "transformers.utils.logging" and not path.startswith("transformers.utils.logging."):
                yield f"line {node.lineno}: {path}"
        name = private_name(node)
        if name and name not in own and name not in OTHER_PRIVATE:
            yield f"line {node.lineno}: {name} of {ast.unparse(node)}"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_moving_parts_come_from_the_adapter(path):
    own = {name for other in OTHERS for name in own_names(MODULES[other])}
    found = list(moving_parts(MODULES[path], own))
    assert not found, f"take these from delta_llava.adapter: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.masking_utils import create_causal_mask",
        "from transformers import Trainer",
        "from transformers.utils import is_peft_available",
        "from peft.tuners.tuners_utils import BaseTunerLayer",
        "import accelerate.utils",
        "from lmms_eval.api.model import lmms",
        "import transformers; transformers.modeling_utils.PreTrainedModel",
        "config._attn_implementation",
        "self._prepare_inputs(batch)",
        'getattr(config, "_commit_hash", None)',
    ],
)
def test_a_moving_part_is_found(line):
    assert list(moving_parts(ast.parse(line), own={"_own"}))
    assert not list(moving_parts(ast.parse("from transformers import AutoModel; self._own"), own={"_own"}))


def overridden(cls):
    "Private names of the four libraries that a class defines again."
    for name in filter(is_private, vars(cls)):
        for base in cls.__mro__[1:]:
            if base.__module__.partition(".")[0] in FOREIGN and name in vars(base):
                yield f"{cls.__name__}.{name} of {base.__name__}"
                break


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_methods_are_overridden_in_the_adapter_only(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = import_module(".".join(parts).removesuffix(".__init__"))
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [name for c in classes for name in overridden(c) if not MODEL_FLAGS.match(name.split(".")[1])]
    assert not found, f"override a public method of adapter.TrainerHooks, or add one: {found}"


def test_the_private_methods_of_trainer_call_the_hooks(tmp_path):
    class Recorder(adapter.HookedTrainer):
        def train_sampler(self, rows=None):
            calls.append("sampler")
            return super().train_sampler(rows)

        def clip_gradients(self, model):
            calls.append("clip")
            return super().clip_gradients(model)

        def save_weights(self, output_dir=None, state_dict=None):
            calls.append("save")
            super().save_weights(output_dir, state_dict)

        def load_weights(self, checkpoint, model=None):
            calls.append("load")
            super().load_weights(checkpoint, model)

        def write_checkpoint(self, model, trial):
            assert adapter.checkpoint_dir(self, trial) == tmp_path / f"checkpoint-{self.state.global_step}"
            calls.append("write")
            super().write_checkpoint(model, trial)

    calls = []
    rows = [dict(input_ids=[3, 4, 5], labels=[3, 4, 5])] * 2
    options = dict(per_device_train_batch_size=1, save_steps=1, use_cpu=True, report_to="none")
    trainer = Recorder(
        causal_lm("llama"), TrainingArguments(str(tmp_path), max_steps=1, **options), train_dataset=rows
    )
    trainer.train()
    assert (
        calls == ["sampler", "clip", "write", "save"]
        and (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    )
    more = TrainingArguments(str(tmp_path), max_steps=2, **options)
    Recorder(causal_lm("llama", 1), more, train_dataset=rows).train(resume_from_checkpoint=True)
    assert calls[4:] == ["load", "sampler", "clip", "write", "save"]


def test_low_rank_updates_are_added_and_merged():
    "`model.add_adapter` of transformers 5.24 refuses the PEFT that pip installs."
    model = vlm("llama")
    logits = model(prompt(4), images(), tokens=4).logits
    plan = freeze(model, "finetune", lora_rank=2)
    assert 0 < plan["llm"][0] < plan["llm"][1] and any(map(adapter.is_lora_layer, model.modules()))
    merge_lora(model)
    assert not any(map(adapter.is_lora_layer, model.modules()))
    assert_close(model(prompt(4), images(), tokens=4).logits, logits)  # an update begins at zero


def test_private_attributes_are_there():
    llm = causal_lm("llama")
    assert adapter.attention_implementation(llm.config) == "sdpa"
    assert adapter.layer_class_names(llm.get_decoder()) == ["LlamaDecoderLayer"]
    assert adapter.hub_commit(llm.config) is None
    for function in (adapter.attention_implementation, adapter.layer_class_names):
        with pytest.raises(adapter.AdapterError, match="Identity._"):
            function(torch.nn.Identity())


def test_overrides_that_are_never_called_are_an_error():
    adapter.check_overrides(DynamicCache, {"update": ("layer_idx",)}, "a test")
    with pytest.raises(adapter.AdapterError, match=r"DynamicCache\.update \(gone\)"):
        adapter.check_overrides(DynamicCache, {"update": ("gone",)}, "a test")
    with pytest.raises(adapter.AdapterError, match=r"DynamicCache\._update"):
        adapter.check_overrides(DynamicCache, {"_update": ()}, "a test")


def test_only_a_plain_dynamic_cache_is_known():
    class Own(DynamicCache):
        pass

    config = causal_lm("llama").config
    adapter.check_dynamic_cache(None)
    adapter.check_dynamic_cache(DynamicCache(config=config))
    for cache in (StaticCache(config=config, max_cache_len=8), Own(config=config), (), object()):
        with pytest.raises(ValueError, match=f"FastV and LLaVolta need a D.*{type(cache).__name__}"):
            adapter.check_dynamic_cache(cache)


# ---- the LLM's own head
@pytest.mark.parametrize("kind", HEADS)
def test_selected_logits_are_the_llms_own(kind):
    llm = causal_lm(kind)
    ids = torch.randint(3, 64, (2, 7))
    select = torch.rand(2, 7) < 0.5
    logits, _ = adapter.selected_logits(llm, lambda hidden: hidden[select], input_ids=ids)
    assert_close(logits, llm(ids).logits[select])
    assert not any(m._forward_hooks for m in llm.modules())


def test_an_llm_whose_decoder_the_hook_does_not_see_still_has_its_own_logits():
    class Unseen(type(causal_lm("llama"))):
        def get_decoder(self):
            return torch.nn.Identity()

    llm = causal_lm("llama")
    llm.__class__ = Unseen
    ids = torch.randint(3, 64, (2, 7))
    logits, _ = adapter.selected_logits(llm, lambda x: x[:, -1], input_ids=ids)
    assert_close(logits, llm(ids).logits[:, -1])


def vlm(kind):
    projector = clip_b32_224().to_dict() | dict(d_vision=128, d_llm=64, rank=4, drop_path=0.0)
    llm = causal_lm(kind)
    config = DeltaLlavaConfig(
        vision_config=TOWERS["clip_b32_224"][1](),
        text_config=llm.config,
        projector=projector,
        image_token_index=IMAGE,
    )
    model = DeltaLlavaForConditionalGeneration(config).eval()
    model.language_model = llm
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_the_model_uses_the_whole_head(kind):
    model, ids = vlm(kind), prompt(4)
    labels = torch.where(ids == IMAGE, -100, ids)
    out = model(ids, images(), tokens=4, labels=labels)
    embeds, _, _ = model.merge_visual_tokens(ids, None, model.get_image_features(images(), tokens=4))
    own = model.language_model(inputs_embeds=embeds, labels=labels)
    assert_close(out.logits, own.logits)
    assert_close(out.loss, own.loss)
    assert_close(model.train()(ids, images(), tokens=4, labels=labels).loss, own.loss)
    first = model.eval().generate(ids, pixel_values=images(), tokens=4, max_new_tokens=1, do_sample=False)
    own.logits[..., IMAGE] = -torch.inf
    assert first[0, -1] == own.logits[0, -1].argmax()


# ---- old folders
def old_names(model):
    "The state dict of earlier versions: the decoder under LLaVA's names, the head alone."
    llm = model.language_model
    head = next(name for name, m in llm.named_modules() if m is llm.get_output_embeddings())
    out = {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("language_model.")
        if name.startswith(f"{head}."):
            out["lm_head." + name.removeprefix(f"{head}.")] = weight
        elif name.startswith(f"{llm.base_model_prefix}."):
            out["model.language_model." + name.removeprefix(f"{llm.base_model_prefix}.")] = weight
        else:
            out["model." + name] = weight
    return out


@pytest.mark.parametrize("kind", HEADS)
def test_folders_of_earlier_versions_load(kind, tmp_path):
    model = vlm(kind)
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in old_names(model).items()}
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    want = model.state_dict()
    got = again.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    other = vlm(kind)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(old_names(model))
    assert all(torch.equal(v, want[k]) for k, v in other.state_dict().items())


def test_importing_the_adapter_is_cheap():
    code = "import sys, delta_llava.adapter; print({'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
