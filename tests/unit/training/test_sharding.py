"""Two gloo ranks train as one does, whole or sharded; checkpoints pass from one number of ranks to another."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace

import torch

from dspark.drafters import checkpoint
from dspark.training.loop import Trainer, train


def rank_of(rank, size, port, config, out):
    """What `torchrun` makes of one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train(config, out)


def start(config, out, ranks=2):
    """Run as several ranks of one group, forked so that nothing is imported again, and wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_of, args=(rank, ranks, port, config, out)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * ranks


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def close(one, other, *, rtol):
    """The same lines, up to the order of sums."""
    assert [(x["step"], x.get("evaluation")) for x in one] == [(x["step"], x.get("evaluation")) for x in other]
    for name in ("loss", "tau", "cross_entropy"):
        torch.testing.assert_close(
            torch.tensor([x[name] for x in one]), torch.tensor([x[name] for x in other]), rtol=rtol, atol=1e-5
        )


def test_two_ranks_train_as_one(recipe, tmp_path):
    """Data parallel for four steps, then sharded on two ranks, then on one: the curve of one rank alone."""
    config = replace(recipe, steps=12, save_every=4, evaluate_every=4, micro_batch=1, ema=0.9)
    Trainer(config, tmp_path / "one").run()
    start(config, tmp_path / "two", ranks=2)
    close(lines(tmp_path / "one"), lines(tmp_path / "two"), rtol=1e-4)
    start(replace(config, shard_drafter=True, shard_target=True), tmp_path / "sharded", ranks=2)
    close(lines(tmp_path / "one"), lines(tmp_path / "sharded"), rtol=1e-4)
    one, two, sharded = (
        checkpoint.load(tmp_path / name / "export")[0].state_dict() for name in ("one", "two", "sharded")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=0.01, rtol=0.02)
        torch.testing.assert_close(tensor, sharded[name], atol=0.01, rtol=0.02)
