"""Two gloo ranks train as one does, whole or sharded; checkpoints pass from one number of ranks to another."""

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace

import pytest
import torch

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.training.data import Batch
from dspark.training.loop import Trainer, train
from dspark.training.shape import DrafterShape
from dspark.training.sharding import Ranks, beside, check_share


def rank_of(rank, size, port, config, out):
    """What `torchrun` makes of one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train(config, out)


def start(config, out, ranks=2):
    """Run as several ranks of one group, and wait. Fresh processes: OpenMP does not survive a fork."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fresh = multiprocessing.get_context("spawn")
    processes = [fresh.Process(target=rank_of, args=(rank, ranks, port, config, out)) for rank in range(ranks)]
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


def from_step(out, step, fresh):
    """A copy of a run as it was after that step."""
    shutil.copytree(out, fresh, ignore=shutil.ignore_patterns("export", "best"))
    for path in (fresh / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)
    return fresh


def weights(out):
    return checkpoint.load(out / "export")[0].state_dict()


def same(one, other):
    """The same curve and the same weights."""
    close(lines(one), lines(other), rtol=1e-4)
    theirs = weights(other)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, theirs[name], atol=0.01, rtol=0.02)  # of bfloat16


@pytest.fixture(scope="module")
def config(recipe):
    often = {"save_every": 4, "evaluate_every": 4, "keep": 3}
    return replace(recipe, steps=12, micro_batch=1, ema=0.9, row_tokens=60, **often)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one rank."""
    out = tmp_path_factory.mktemp("alone")
    Trainer(config, out).run()
    return out


def test_two_ranks_train_as_one(config, alone, tmp_path):
    start(config, from_step(alone, 4, tmp_path / "two"))
    same(alone, tmp_path / "two")


def test_two_ranks_that_split_the_target_train_as_one(config, alone, tmp_path):
    start(replace(config, tensor_parallel=2), from_step(alone, 8, tmp_path / "split"))
    same(alone, tmp_path / "split")


def test_sharded_ranks_train_as_one_and_one_goes_on_from_them(config, alone, tmp_path):
    sharded = replace(config, shard_drafter=True, shard_target=True)
    start(sharded, tmp_path / "sharded")
    same(alone, tmp_path / "sharded")
    again = from_step(tmp_path / "sharded", 8, tmp_path / "again")
    Trainer(config, again).run()
    same(alone, again)
    assert [start["ranks"] for start in json.loads((again / "run.json").read_text())["starts"]] == [2, 1]


def test_sharded_muon(config, tmp_path):
    """Its directions need whole matrices."""
    config = replace(config, optimizer="muon", steps=4)
    Trainer(config, tmp_path / "alone").run()
    start(replace(config, shard_drafter=True), tmp_path / "sharded")
    close(lines(tmp_path / "alone"), lines(tmp_path / "sharded"), rtol=1e-3)


@pytest.mark.parametrize("kind", ["eagle3", "draft_model"])
def test_other_kinds_sharded_beside_a_split_target(kind, config, tmp_path):
    config = replace(config, drafter=DrafterShape(kind, block_size=3), steps=4)
    Trainer(config, tmp_path / "alone").run()
    start(replace(config, shard_drafter=True, tensor_parallel=2), tmp_path / "sharded")
    close(lines(tmp_path / "alone"), lines(tmp_path / "sharded"), rtol=1e-4)


def test_what_ranks_cannot_share_is_refused(config):
    two = Ranks(torch.device("cpu"), 0, 2)
    for change, message in (
        ({"batch": 3}, "batch 3 is no multiple of micro_batch 1 times 2 ranks"),
        ({"tensor_parallel": 4}, "tensor_parallel 4 does not divide 2 ranks"),
    ):
        with pytest.raises(UserError, match=message):
            check_share(replace(config, **change), two)


def test_batches_side_by_side_keep_their_documents_apart():
    def batch(*starts):
        start_BS = torch.tensor([starts])
        return Batch(torch.ones_like(start_BS), torch.ones_like(start_BS).bool(), start_BS, ((len(starts),),))

    both = beside([batch(0, 0, 2), batch(0, 0, 0, 0, 4)])
    assert both.start_BS.tolist() == [[0, 0, 2, 3, 3], [0, 0, 0, 0, 4]]
    assert both.mask_BS.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert both.pieces == ((3,), (5,))
