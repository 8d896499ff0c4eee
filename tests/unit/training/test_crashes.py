"""A run that is killed anywhere goes on as if it had not been; one that cannot write keeps what it has."""

import errno
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from dspark.common.errors import UserError
from dspark.drafters import checkpoint as drafters
from dspark.training import checkpoint, loop, report
from dspark.training.features import FeatureConfig
from dspark.training.loop import Trainer

PLACES = {
    "beside half-written tensors": (checkpoint.distributed, "save", 1),
    "before the sums": (checkpoint, "settled", 3),
    "before the checkpoint has its name": (checkpoint, "finish", 0),
    "before the export": (loop, "save", 2),
    "before the last export": (Trainer, "export_average", 3),
    "in a line of the log": (report.LogFile, "line", 7),
}


@pytest.fixture(scope="module")
def config(recipe):
    """Everything that has a state: packed rows, a cache that the first epoch fills, an average of the weights."""
    cache = FeatureConfig("hybrid", format="float8")
    often = {"save_every": 3, "log_every": 1, "evaluate_every": 4, "keep": 2}
    return replace(recipe, steps=10, ema=0.9, row_tokens=60, features=cache, **often)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    Trainer(config, out).run()
    return out


def alone(work, *args):
    torch.set_num_threads(1)  # OpenMP's threads do not come along with a fork
    work(*args)


def forked(work, *args):
    """Of a fresh process: what the tests before this one have done to theirs must not come along."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dspark.training.loop"])
    process = context.Process(target=alone, args=(work, *args))
    process.start()
    return process


def run_until(config, out, place):
    """Train, and die in the call after so many of `owner.name`, half way through what it does."""
    owner, name, calls = PLACES[place]
    original, seen = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        if seen[0] == calls:
            if name == "line":
                with args[0].path.open("a") as log:
                    log.write('{"step": 1, "los')
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    Trainer(config, out).run()


def lines(out):
    drop = ("time", "tokens_per_s")
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in found]


def same(one, other):
    """Every line of the log and every weight of both exports, to the last bit."""
    assert lines(one) == lines(other)
    for name in ("export", "best"):
        ours, theirs = (drafters.read_tensors(out / name) for out in (one, other))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_killed_in_the_middle_of_a_write(place, config, whole, tmp_path):
    process = forked(run_until, config, tmp_path, place)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    Trainer(config, tmp_path).run()
    same(tmp_path, whole)
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".metadata"]


def run_a_while(config, out, calls, seconds):
    """Train, and die so many seconds after the log's line of that number, wherever that is."""
    original, seen = report.LogFile.line, [0]

    def counted(*args, **kwargs):
        seen[0] += 1
        if seen[0] == calls:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return original(*args, **kwargs)

    report.LogFile.line = counted
    Trainer(config, out).run()


def test_killed_again_and_again(config, whole, tmp_path):
    rng, ends = random.Random(0), []
    while not ends or ends[-1] != 0:
        process = forked(run_a_while, config, tmp_path, 1 + len(ends) // 2, rng.uniform(0, 0.01))
        process.join(120)
        ends.append(process.exitcode)
    assert len(ends) > 3 and set(ends[:-1]) == {-signal.SIGALRM}
    same(tmp_path, whole)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000009", "step-00000010"]


def test_a_full_disk_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    trainer, original = Trainer(config, tmp_path), checkpoint.distributed.save

    def full(*args, **kwargs):
        if trainer.step_number < 6:
            return original(*args, **kwargs)
        (kwargs["checkpoint_id"] / "__0_0.distcp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.distributed, "save", full)
    with pytest.raises(UserError, match=r"No space left on device; .*step-00000003 is whole, make room") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_other_data_is_refused(config, whole, tmp_path):
    with pytest.raises(UserError, match="the held_out data is not what the run was started with"):
        Trainer(replace(config, held_out=config.train), whole)


def test_it_stops_when_it_gets_no_better_and_stays_stopped(config, tmp_path, monkeypatch):
    stopping = replace(config, steps=40, evaluate_every=1, patience=3)
    taus = iter([2.0, 2.5, 2.4, 2.3, 2.2, 9.0])
    monkeypatch.setattr(loop, "predicted", lambda sums: {"tau": next(taus), "acceptance": []})
    trainer = Trainer(stopping, tmp_path)
    trainer.run()
    assert trainer.step_number == 5
    assert trainer.best == {"step": 2, "tau": 2.5}
    again = Trainer(stopping, tmp_path)
    again.run()
    assert again.step_number == 5


def test_every_start_is_in_run_json(config, whole):
    Trainer(config, whole)
    record = json.loads((whole / "run.json").read_text())
    assert [start["after_step"] for start in record["starts"]] == [0, 10]
    assert set(record["data"]) == {"train", "held_out"} and len(record["data"]["train"]) == 64
    assert {"torch", "transformers", "commit", "arguments", "ranks"} <= set(record["starts"][0])
    assert record["config"]["ema"] == 0.9
