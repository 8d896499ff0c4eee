"""Bad input ends in exit code 2 and one line on standard error that names the value; nothing is half written."""

import io
import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from dspark.cli.main import main


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


def generating(pair, *options):
    return ["generate", pair.target, "--drafter", pair.drafter, *(options or ("--prompt", "def"))]


def edit_config(directory, change):
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("option", "value", "way_out"),
    [
        ("--temperature", "-0.5", "0 or more"),
        ("--temperature", "nan", "finite"),
        ("--top-p", "1.5", "at most 1"),
        ("--top-p", "0", "more than 0"),
        ("--min-p", "2", "at most 1"),
        ("--top-k", "-3", "0 to"),
        ("--max-tokens", "0", "1 or more"),
        ("--seed", "-1", "0 to"),
        ("--seed", str(2**63), "0 to"),
        ("--planner", "sometimes", "full"),
        ("--planner", "fixed:x", "fixed:3"),
        ("--max-draft", "-1", "0"),
        ("--device", "gpu0", "cpu"),
        ("--dtype", "float12", "float32"),
    ],
)
def test_values_out_of_range(refused, tiny_pair, option, value, way_out):
    line = refused(*generating(tiny_pair, "--prompt", "def", f"{option}={value}"))
    assert value in line and way_out in line and option.strip("-").replace("-", "_")[:4] in line.replace("-", "_")


@pytest.mark.parametrize("option", ["--temperature=-1", "--max-tokens=0", "--seed=-1", "--planner=no", "--prompt="])
def test_demo_is_as_strict(refused, tiny_pair, option):
    refused("demo", "--target", tiny_pair.target, "--drafter", tiny_pair.drafter, option)


def test_empty_prompt(refused, tiny_pair, tmp_path):
    assert "empty" in refused(*generating(tiny_pair, "--prompt", ""))
    empty = tmp_path / "empty.py"
    empty.touch()
    assert str(empty) in refused(*generating(tiny_pair, "--file", empty))


def test_prompt_longer_than_the_context(refused, tiny_pair):
    line = refused(*generating(tiny_pair, "--prompt", "x = 1\n" * 600))
    assert "512" in line and "511" in line


def test_file_that_is_not_text(refused, tiny_pair, tmp_path):
    path = tmp_path / "latin1.py"
    path.write_bytes("# caf\xe9\n".encode("latin-1"))
    line = refused(*generating(tiny_pair, "--file", path))
    assert str(path) in line and "0xe9" in line and "UTF-8" in line
    assert "UTF-8" in refused("demo", "--target", tiny_pair.target, "--drafter", tiny_pair.drafter, "--file", path)


def test_standard_input_that_is_not_text(refused, tiny_pair, monkeypatch):
    for data, says in ((b"caf\xe9", "0xe9"), (b"", "empty")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert says in refused(*generating(tiny_pair, "--file", "-"))


def test_file_that_is_not_there(refused, tiny_pair, tmp_path):
    assert "no.py" in refused(*generating(tiny_pair, "--file", tmp_path / "no.py"))


def test_both_prompt_and_file(refused, tiny_pair, tmp_path):
    assert "--file" in refused(*generating(tiny_pair, "--prompt", "a", "--file", tmp_path / "b"))


def test_unknown_directories(refused, tiny_pair, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused("generate", nowhere, "--prompt", "def")
    assert str(nowhere) in refused("generate", tiny_pair.target, "--drafter", nowhere, "--prompt", "def")
    assert str(tmp_path) in refused("generate", tmp_path, "--prompt", "def")
    assert str(nowhere) in refused("demo", "--target", nowhere, "--drafter", nowhere)


@pytest.mark.parametrize("command", [("demo",), ("bench", "decode"), ("bench", "load"), ("evaluate",)])
def test_another_target_does_not_get_the_embedded_drafter(refused, tiny_pair, command):
    line = refused(*command, "--target", tiny_pair.target)
    assert str(tiny_pair.target) in line and "--drafter" in line and "none inside" in line


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_truncated_weights(refused, tiny_pair, damaged, part):
    directory = damaged(part)
    truncate(directory)
    line = refused(*generating(tiny_pair._replace(**{part: directory})))
    assert str(directory) in line


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\xff" * 4096], ids=["empty", "text", "noise"])
def test_corrupted_weights(refused, tiny_pair, damaged, part, content):
    directory = damaged(part)
    (directory / "model.safetensors").write_bytes(content)
    assert str(directory) in refused(*generating(tiny_pair._replace(**{part: directory})))


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_weights_that_are_missing(refused, tiny_pair, damaged, part):
    directory = damaged(part)
    (directory / "model.safetensors").unlink()
    assert str(directory) in refused(*generating(tiny_pair._replace(**{part: directory})))


def test_a_tokenizer_that_is_damaged(refused, tiny_pair, damaged):
    directory = damaged("target")
    (directory / "tokenizer.json").write_text("{")
    assert str(directory) in refused(*generating(tiny_pair._replace(target=directory)))


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_missing_tensor(refused, tiny_pair, damaged, part):
    directory = damaged(part)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    line = refused(*generating(tiny_pair._replace(**{part: directory})))
    assert str(directory) in line and name in line


@pytest.mark.parametrize(
    ("part", "field"),
    [("target", "model_type"), ("target", "hidden_size"), ("drafter", "block_size"), ("drafter", "hidden_size")],
)
def test_config_with_a_missing_field(refused, tiny_pair, damaged, part, field):
    directory = damaged(part)
    edit_config(directory, lambda fields: fields.pop(field))
    line = refused(*generating(tiny_pair._replace(**{part: directory})))
    assert str(directory) in line


@pytest.mark.parametrize(
    ("part", "field", "misspelt"),
    [
        ("target", "intermediate_size", "intermediat_size"),
        ("drafter", "block_size", "blok_size"),
        ("drafter", "target_layer_ids", "target_layers_ids"),
    ],
)
def test_config_with_a_misspelt_field(refused, tiny_pair, damaged, part, field, misspelt):
    directory = damaged(part)

    def rename(fields):
        fields[misspelt] = fields.pop(field)

    edit_config(directory, rename)
    line = refused(*generating(tiny_pair._replace(**{part: directory})))
    assert str(directory) in line and (part == "target" or field in line)


def test_config_that_is_not_json(refused, tiny_pair, damaged):
    for part in ("target", "drafter"):
        directory = damaged(part)
        (directory / "config.json").write_text("{")
        assert str(directory) in refused(*generating(tiny_pair._replace(**{part: directory})))


def test_drafter_for_another_target(refused, tiny_pair, damaged):
    directory = damaged("drafter")
    edit_config(directory, lambda fields: fields.update(target_layer_ids=[0, 9]))
    assert "9" in refused(*generating(tiny_pair._replace(drafter=directory)))


def test_outputs_that_cannot_be_written(refused, tiny_pair, tmp_path):
    assert "directory" in refused(*generating(tiny_pair, "--prompt", "def", "--output", tmp_path))
    away = tmp_path / "away" / "text"
    assert str(away.parent) in refused(*generating(tiny_pair, "--prompt", "def", "--output", away))
    assert not away.parent.exists()
    assert "directory" in refused("demo", "--html", tmp_path)
    assert "directory" in refused("bench", "decode", "--json", tmp_path)


def test_nothing_half_written(refused, tiny_pair, damaged, tmp_path):
    directory = damaged("drafter")
    truncate(directory)
    output = tmp_path / "text"
    output.write_text("before")
    before = sorted(tmp_path.iterdir())
    refused(*generating(tiny_pair._replace(drafter=directory), "--prompt", "def", "--output", output))
    refused(*generating(tiny_pair, "--prompt", "def", "--max-tokens", "0", "--output", output))
    assert output.read_text() == "before" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no prompts"), (b"{\n", "line 1"), (b'{"prompt": "a"}\n{"text": 1}\n', "line 2"), (b"\xff", "UTF-8")],
)
def test_prompt_files(refused, tiny_pair, tmp_path, content, says):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    line = refused("bench", "decode", "--target", tiny_pair.target, "--drafter", tiny_pair.drafter, "--prompts", path)
    assert says in line and str(path) in line


def test_unknown_command_and_option(refused):
    assert "bake" in refused("bake")
    assert "--oven" in refused("demo", "--oven", "1")
    assert "--temperature" in refused("demo", "--temperature", "warm")


def test_as_a_process(tiny_pair):
    """The whole way: exit code 2, one line, no traceback."""
    command = [sys.executable, "-m", "dspark.cli.main", *map(str, generating(tiny_pair)), "--top-p", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: top_p 1.5") and done.stderr.count("\n") == 1
