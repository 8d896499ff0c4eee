"""Rows of every usual layout become the same samples; what cannot be one is said, by line."""

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from dspark.common.errors import UserError
from dspark.training import samples as samples_module
from dspark.training.ingest import Columns, Division, import_samples
from dspark.training.samples import Sample, SampleWriter, count_samples, read_about, read_samples, splits_of
from dspark.training.sources import read_rows

NONE_HELD_OUT = Division(held_out=0)
ASKED = [{"role": "user", "content": "hi"}]
TALK = [*ASKED, {"role": "assistant", "content": "ho"}]


def imported(tmp_path, *lines, name="in.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    options = {"division": NONE_HELD_OUT, **options}
    record = import_samples(read_rows(str(path)), tmp_path / "out", **options)
    return list(read_samples(tmp_path / "out", "train")), record


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK[1]]},
        {"prompt": "hi", "response": "ho"},
        {"prompt": ASKED, "completion": "ho"},
        {"instruction": "hi", "input": "", "output": "ho"},
        {"question": "hi", "answer": "ho"},
        {"conversations": [{"from": "gpt", "value": "welcome"}, *({"from": "human", "value": "hi"}, TALK[1])]},
    ],
)
def test_layouts_of_one_conversation(tmp_path, row):
    [sample], _ = imported(tmp_path, row)
    assert sample.messages == TALK and sample.text is None and sample.tools is None


def test_prompts_and_texts(tmp_path):
    rows = [{"turns": ["a", "b"]}, {"text": "raw"}, {"prompt": "hi", "system": "be", "extra": 1}]
    found, record = imported(tmp_path, *rows)
    assert [m["content"] for m in found[0].messages] == ["a", "b"]
    assert found[1].text == "raw" and found[1].messages is None
    assert found[2].messages == [{"role": "system", "content": "be"}, *ASKED]
    assert record["samples"] == {"train": 3} and splits_of(tmp_path / "out") == ["train"]


def test_named_columns(tmp_path):
    rows = [{"q": "hi", "a": "ho", "text": "no"}]
    [sample], _ = imported(tmp_path, *rows, columns=Columns("q", "a"))
    assert sample.messages == TALK
    [sample], _ = imported(tmp_path, *rows, columns=Columns("q", raw=True))
    assert sample.text == "hi" and sample.completion is None
    for columns in (Columns("q", "a", raw=True), Columns(raw=True)):
        [sample], _ = imported(tmp_path, {"prompt": "hi", "q": "hi", "a": "ho", "answer": "ho"}, columns=columns)
        assert (sample.text, sample.completion) == ("hi", "ho")
    with pytest.raises(UserError, match=r"in.jsonl line 1 has no column 'x' but 'q', 'a', 'text' .*--column"):
        imported(tmp_path, *rows, columns=Columns("x"))
    with pytest.raises(UserError, match=r"no text in column 'b' but None .*--answer"):
        imported(tmp_path, *rows, columns=Columns("q", "b"))


def test_tools_and_other_fields_survive(tmp_path):
    call = {"id": "1", "function": {"name": "f", "arguments": {"x": [1]}}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    [sample], _ = imported(tmp_path, {"messages": messages, "tools": json.dumps(tools)})
    assert sample.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]} and sample.tools == tools


def test_the_same_twice_and_the_empty_are_dropped(tmp_path):
    image = {"role": "user", "content": [{"type": "image"}]}
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "n": 2}, {"turns": ["a"]}, {"prompt": " "}, {"turns": []}]
    found, record = imported(tmp_path, *rows, {"messages": [image]}, {"messages": TALK[1:]})
    assert [sample.messages[0]["content"] for sample in found] == ["a", "b"]
    dropped = {"said the same as an earlier row": 2, "empty": 2, "holds more than text": 1, "no user's turn": 1}
    assert record["dropped"] == dropped == read_about(tmp_path / "out")["dropped"]
    assert len({sample.id for sample in found}) == 2


def test_the_split_is_a_function_of_seed_and_prompt(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{j}"} for i in range(300) for j in range(2)]

    def held(seed, order):
        imported(tmp_path, *rows[::order], division=Division(held_out=0.2, seed=seed))
        splits = {
            s: [x.messages[0]["content"] for x in read_samples(tmp_path / "out", s)] for s in ("train", "held_out")
        }
        assert not set(splits["train"]) & set(splits["held_out"]), "no prompt may be in both"
        assert len(splits["train"]) + len(splits["held_out"]) == 600
        return set(splits["held_out"])

    first = held(0, 1)
    assert first == held(0, -1) and 35 <= len(first) <= 85 and first != held(1, 1)


def test_limit_and_larger_than_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "BATCH_ROWS", 7)
    rows = [{"prompt": f"p{i}"} for i in range(50)]
    found, _ = imported(tmp_path, *rows, division=Division(held_out=0, limit=40))
    assert [sample.messages[0]["content"] for sample in found] == [f"p{i}" for i in range(40)]
    assert count_samples(tmp_path / "out", "train") == 40


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ', "is not JSON"),
        ("[1]", "no JSON object"),
        ('"text"', "is no JSON object"),
        ('{"prompt": 3}', "neither text nor a list"),
        ('{"messages": ["a", 1]}', "no message"),
        ('{"messages": [{"role": "user"}]}', "None as content of turn 1"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "role 'king'"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"other": "a"}', "has no text in any of messages"),
        ('{"prompt": "a", "tools": "{"}', "tools that are no JSON"),
    ],
)
def test_bad_rows(tmp_path, line, says):
    good = {"prompt": "good"}
    with pytest.raises(UserError, match=rf"in.jsonl (line 2|entry 1) .*{says}.*--skip-bad"):
        imported(tmp_path, good, line) if line != "[1]" else imported(tmp_path, line)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    if line != "[1]":
        found, record = imported(tmp_path, good, line, good, skip_bad=True)
        assert len(found) == 1 and record["dropped"]["bad rows"] == 1


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(byte 0xff at column 13\)"):
        import_samples(read_rows(str(tmp_path / "in.jsonl")), tmp_path / "out")
    (tmp_path / "t.txt").write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"t.txt is not UTF-8 \(byte 0xff at offset 1\)"):
        import_samples(read_rows(str(tmp_path / "t.txt")), tmp_path / "out")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-9])
    (tmp_path / "a.json").write_text("[{")
    (tmp_path / "b.bin").write_text("x")
    for name, says in {
        "p.parquet": "no readable Parquet",
        "g.jsonl.gz": "cannot read",
        "a.json": "neither JSON Lines nor",
        "b.bin": "suffix",
        "away.jsonl": "does not exist",
        "a/b/c": "does not exist",
    }.items():
        with pytest.raises(UserError, match=rf"{name}.*{says}|{says}.*{name}"):
            list(read_rows(str(tmp_path / name)))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"nothing to import .the input has no rows"):
        import_samples(read_rows(str(tmp_path / "empty.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.json").write_text(json.dumps(rows, indent=1))
    with gzip.open(tmp_path / "d" / "2.jsonl.gz", "wt") as file:
        file.write('\ufeff{"prompt": "c"}\n')
    nested = [{"messages": [{"role": "user", "content": "d", "name": None}]}]
    pa.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "d" / "3.parquet")
    (tmp_path / "d" / "4.txt").write_text("e\n")
    (tmp_path / "d" / "ignored.bin").write_text("e\n")
    import_samples(read_rows(str(tmp_path / "d")), tmp_path / "out", division=NONE_HELD_OUT)
    found = list(read_samples(tmp_path / "out", "train"))
    assert [s.messages[0] if s.messages else s.text for s in found] == [
        *({"role": "user", "content": letter} for letter in "abcd"),
        "e\n",
    ]


def test_what_json_lacks_becomes_text(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a", "when": datetime.date(2026, 1, 2)}]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    import_samples(read_rows(str(tmp_path / "in.parquet")), tmp_path / "out", division=NONE_HELD_OUT)
    [sample] = read_samples(tmp_path / "out", "train")
    assert sample.messages == [{"role": "user", "content": "a", "when": "2026-01-02"}]


def test_through_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}"} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert [row.fields for row in read_rows(str(tmp_path / "saved"))] == rows
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "dict")
    assert len(list(read_rows(str(tmp_path / "dict"), split="test"))) == 5
    with pytest.raises(UserError, match="cannot load split 'train' of"):
        list(read_rows(str(tmp_path / "dict")))


def test_what_was_written_is_read_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    imported(tmp_path, {"messages": TALK})
    [path] = [str(p) for p in (tmp_path / "out").glob("*.arrow")]
    table = pa.ipc.open_file(path).read_all()
    assert datasets.Dataset(table)[0]["messages"][1]["content"] == "ho"


def test_only_its_own_directories_are_replaced(tmp_path):
    imported(tmp_path, {"prompt": "a"})
    found, _ = imported(tmp_path, {"prompt": "b"})
    assert len(found) == 1 and found[0].messages[0]["content"] == "b"
    with pytest.raises(UserError, match="holds files that dspark did not write"):
        import_samples(read_rows(str(tmp_path / "in.jsonl")), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        import_samples(read_rows(str(tmp_path / "in.jsonl")), tmp_path / "in.jsonl")
    with pytest.raises(UserError, match="none of 1 samples fell into held_out"):
        imported(tmp_path, {"prompt": "c"}, division=Division(held_out=0.02))
    assert next(read_samples(tmp_path / "out", "train")).messages[0]["content"] == "b"
    for bad in (-0.1, 1.0):
        with pytest.raises(UserError, match="no share"):
            Division(held_out=bad)


def test_damaged_directories(tmp_path):
    imported(tmp_path, {"prompt": "a"})
    out = tmp_path / "out"
    whole = (out / "train.arrow").read_bytes()
    (out / "train.arrow").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"train.arrow is truncated or corrupted"):
        list(read_samples(out, "train"))
    with pytest.raises(UserError, match=r"has no held_out.arrow"):
        list(read_samples(out, "held_out"))
    (out / "about.json").write_text("{")
    with pytest.raises(UserError, match=r"about.json is truncated"):
        splits_of(out)
    with pytest.raises(UserError, match=r"has no about.json"):
        splits_of(tmp_path / "nowhere")


def test_samples_come_back_as_they_were_written(tmp_path):
    written = [
        Sample(
            "1", messages=[{"role": "assistant", "content": "é", "tool_calls": [{"a": [1, None]}]}], tools=[{"t": 1}]
        ),
        Sample("2", text="", completion="c", endings=["length"]),
        Sample("3", messages=[]),
    ]
    with SampleWriter(tmp_path / "train.arrow") as writer:
        for sample in written:
            writer.write(sample)
    assert list(read_samples(tmp_path, "train")) == written
    assert written[1].cut and not written[0].cut
