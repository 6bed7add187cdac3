"Files are complete or absent, and damaged ones are named."

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from delta_llava import files


def test_only_the_standard_library_is_imported():
    code = "import sys, delta_llava.files; print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_write_keeps_the_old_file(error, tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", [1])

    def fails(*args):
        raise error

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((KeyboardInterrupt, OSError)):
        files.write_json(tmp_path / "a.json", [2])
    assert files.read_json(tmp_path / "a.json") == [1] and os.listdir(tmp_path) == ["a.json"]


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    files.write_atomic(tmp_path / "atomic", "x")
    files.write_safetensors(tmp_path / "tensors", dict(w=torch.ones(2, 3).T))
    modes = {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "content,message",
    [
        (b'{"a": 1', "is not valid JSON: Expecting"),
        (b"", "is not valid JSON: Expecting value in line 1"),
        (b"\xff\xfe", "is not valid JSON .UnicodeDecodeError"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a JSON list, but a dict is needed"),
    ],
)
def test_damaged_json_is_one_sentence_with_the_name(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json {message}.*Fetch it") as error:
        files.read_json(tmp_path / "x.json", dict, hint="Fetch it.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_truncated_safetensors_are_one_sentence_with_the_name(kept, tmp_path):
    files.write_safetensors(tmp_path / "w", dict(w=torch.ones(5)))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "w").read_bytes()[:kept])
    with pytest.raises(ValueError, match="x.safetensors is damaged.*fetch it again"):
        files.read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="none.safetensors does not exist"):
        files.read_safetensors(tmp_path / "none.safetensors")
    files.write_safetensors(tmp_path / "a.safetensors", dict(w=torch.ones(5)))  # is whole
    for source in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match="x.safetensors .*damaged.*fetch it again"):
            with files.named_safetensors_errors(source):
                safe_open(tmp_path / "x.safetensors", "pt")
    with files.named_safetensors_errors(None):
        safe_open(tmp_path / "a.safetensors", "pt")


def test_a_new_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with files.new_folder(tmp_path / "out" / "model") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt
    assert os.listdir(tmp_path / "out") == []


def test_a_changed_file_has_another_checksum(tmp_path):
    files.write_atomic(tmp_path / "a", "one")
    first = files.file_sha256(tmp_path / "a")
    files.write_atomic(tmp_path / "a", "four")
    assert files.file_sha256(tmp_path / "a") != first
