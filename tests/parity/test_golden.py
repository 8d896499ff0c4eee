"""Every golden directory is reproduced, and golden.py says so with its exit code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import golden  # noqa: E402

DIRECTORIES = sorted(path for path in (HERE / "golden").iterdir() if path.is_dir())


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_reproduced(directory):
    errors = golden.replay(directory)
    reference = set(load_file(directory / "io.safetensors"))
    compared = {name for name in reference if name in errors}
    assert {name for name in reference if ".grad." in name or name.endswith(("logits", "tokens", "loss"))} <= compared
    assert max(errors.values()) <= golden.BOUND, errors


def altered(tmp_path, change):
    directory = tmp_path / "copy"
    shutil.copytree(HERE / "golden" / "dspark_vanilla", directory)
    io = load_file(directory / "io.safetensors")
    change(io)
    save_file(io, directory / "io.safetensors")
    return directory


@pytest.mark.parametrize("name", ["train.grad.fc.weight", "infer.1.draft_logits", "train.loss"])
def test_a_difference_is_found(tmp_path, capsys, name):
    directory = altered(tmp_path, lambda io: io[name].mul_(1.001))
    assert golden.main([str(directory)]) == 1
    assert f"{name} " in capsys.readouterr().out


def test_a_wrong_token_is_found(tmp_path):
    assert golden.main([str(altered(tmp_path, lambda io: io["infer.0.greedy_tokens"][0, -1].add_(1)))]) == 1


def test_bad_directories_are_one_line_and_exit_2(tmp_path, capsys):
    missing = altered(tmp_path, lambda io: io.pop("train.anchors"))
    shutil.copytree(missing, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    shutil.copytree(HERE / "golden" / "dflash", tmp_path / "bare")
    (tmp_path / "bare" / "io.safetensors").unlink()
    shutil.copytree(HERE / "golden" / "dflash", tmp_path / "shape")
    io = load_file(tmp_path / "shape" / "io.safetensors")
    io["infer.0.context_features"] = torch.zeros(1, 19, 7)
    save_file(io, tmp_path / "shape" / "io.safetensors")
    for directory in (missing, tmp_path / "cut", tmp_path / "bare", tmp_path / "shape", tmp_path / "none"):
        assert golden.main([str(directory)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_as_a_script():
    done = subprocess.run(
        [sys.executable, str(HERE / "golden.py"), str(DIRECTORIES[0])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "largest relative error" in done.stdout
