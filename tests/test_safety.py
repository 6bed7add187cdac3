"Code beside weights is never run: every loader says so."

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "delta_llava").rglob("*.py"))
LOADERS = ("from_pretrained", "from_config")


def unsafe_loaders(path):
    "Calls of an Auto class's loader, or of one with an unknown class, without `trust_remote_code=False`."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if (
            node.func.attr not in LOADERS
            or not isinstance(owner, ast.Name)
            or not owner.id.startswith("Auto")
        ):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        value = given.get("trust_remote_code")
        if not (isinstance(value, ast.Constant) and value.value is False):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {owner.id}.{node.func.attr}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_loader_refuses_code_beside_the_weights(path):
    found = list(unsafe_loaders(path))
    assert not found, f"{found}: add trust_remote_code=False."


def test_the_check_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "m.py").write_text(
        "AutoModel.from_pretrained(x)\n"
        "AutoConfig.from_pretrained(x, trust_remote_code=True)\n"
        "AutoTokenizer.from_pretrained(x, trust_remote_code=False)\n"
        "AutoModel.from_config(c, **more)\n"
        "CLIPVisionModel.from_pretrained(x)\n"
    )
    lines = [entry.split(":")[1].split()[0] for entry in unsafe_loaders(tmp_path / "m.py")]
    assert lines == ["1", "2", "4"]
