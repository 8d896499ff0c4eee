"""Replays golden directories (config.json, model.safetensors, io.safetensors) through the real modules.

    python tests/parity/golden.py DIR...

Prints, for each tensor group, the relative error: the largest absolute difference over the largest magnitude of the
reference tensor (token ids and masks: 0 when all agree, else 1). Exit 0 when all are ≤ 1e-4, 1 when one is above,
2 with one line on a directory that cannot be replayed. Inference goes through `extend` and `propose` over scattered
pages, the reference's own greedy tokens being drawn, so that one near-tie does not spoil the slots after it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # runs in a clone that is not installed, too

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.base import DraftContext
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.lesson import Lesson, following
from dspark.models.batch import Ragged
from dspark.training.anchors import labels
from dspark.training.data import Batch
from dspark.training.objectives import Teacher, Weights, objective

BOUND, PAGE = 1e-4, 4
Reference = dict[str, Tensor]
Errors = dict[str, float]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """See the module's docstring. Raises UserError where the shapes differ."""
    if actual.shape != expected.shape:
        raise UserError(f"shape {list(actual.shape)} where the reference has {list(expected.shape)}")
    if not expected.is_floating_point():
        return float(not torch.equal(actual.long(), expected.long()))
    if expected.numel() == 0:
        return 0.0
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error


class Forced:
    """A sampler that draws the reference's tokens and keeps the logits it was shown."""

    def __init__(self, token_RK: Tensor):
        self.token_RK, self.seen = token_RK, []

    def draw(self, logits_RV: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        self.seen.append(logits_RV)
        token_R = self.token_RK[:, slot]
        return token_R, one_hot(token_R, logits_RV.shape[-1]).float()


def rounds(io: Reference) -> list[int]:
    return sorted(
        {int(name.split(".")[1]) for name in io if name.startswith("infer.") and name.split(".")[1].isdigit()}
    )


def replay_infer(drafter: torch.nn.Module, io: Reference) -> Errors:
    """Every drafting round, on one page table that the rounds share."""
    errors: Errors = {}
    numbers = rounds(io)
    requests = len(io["infer.0.anchor_token"])
    total = sum(io[f"infer.{r}.context_features"].shape[1] for r in numbers)
    width = total // PAGE + 1
    generator = torch.Generator().manual_seed(0)
    table_RP = (torch.randperm(requests * width, generator=generator) + 1).view(requests, width).int()
    drafter.allocate(requests * width + 1, PAGE)
    captured: dict[str, Tensor] = {}
    handles = [drafter.body.lm_head.register_forward_hook(lambda _m, i, o: captured.update(hidden=i[0], base=o))]
    committed = 0
    for r in numbers:
        features = io[f"infer.{r}.context_features"]
        drafter.extend(commit(features, committed, table_RP), features.flatten(0, 1))
        committed += features.shape[1]
        start_R = io[f"infer.{r}.start"].expand(requests)
        if not bool((start_R == committed).all()):
            raise UserError(f"infer.{r}.start is {start_R.tolist()}, but {committed} tokens have context features")
        sampler = Forced(io[f"infer.{r}.greedy_tokens"])
        context = DraftContext(
            anchor_R=io[f"infer.{r}.anchor_token"],
            position_R=start_R,
            page_table_RP=table_RP,
            slots=sampler.token_RK.shape[1],
            request_ids=range(requests),
            history=[[]] * requests,
            sampler=sampler,
        )
        draft = drafter.propose(context)
        blocks = {"block_hidden": captured["hidden"], "base_logits": captured["base"]}
        actual = {name: x_TD.unflatten(0, (requests, -1)) for name, x_TD in blocks.items()}
        actual["draft_logits"] = torch.stack(sampler.seen, dim=1)
        actual["greedy_tokens"] = actual["draft_logits"].argmax(-1)
        if f"infer.{r}.confidence_logits" in io:
            actual["confidence_logits"] = draft.confidence_RK.double().logit().float()
        for name, tensor in actual.items():
            errors[f"infer.{r}.{name}"] = compared(tensor, io, f"infer.{r}.{name}")
    for handle in handles:
        handle.remove()
    return errors


def commit(features: Tensor, start: int, table_RP: Tensor) -> Ragged:
    """The ragged batch of the same number of newly committed tokens for every request."""
    requests, count = features.shape[:2]
    position_RT = torch.arange(start, start + count).expand(requests, count)
    slot_RT = table_RP.long().gather(1, position_RT // PAGE) * PAGE + position_RT % PAGE
    return Ragged(
        token_T=torch.zeros(requests * count, dtype=torch.long),
        position_T=position_RT.flatten(),
        slot_T=slot_RT.flatten(),
        page_table_RP=table_RP,
        cu_query_R1=torch.arange(requests + 1, dtype=torch.int32) * count,
        context_R=torch.full((requests,), start, dtype=torch.int32),
    )


def replay_train(drafter: torch.nn.Module, io: Reference) -> Errors:
    """One training step: values at kept anchors, the loss, and every gradient the reference holds."""
    token_BS, anchor_BA, keep_BA = io["train.input_ids"], io["train.anchors"], io["train.keep"]
    slots, last_BSD = drafter.lesson_slots, io["train.target_last_hidden"]
    blocks = drafter(Lesson.of(token_BS, io["train.context_features"], anchor_BA))
    batch = Batch(token_BS, io["train.loss_mask"].bool(), torch.zeros_like(token_BS), ())
    label_BAK, mask_BAK = labels(batch, anchor_BA, keep_BA, slots)
    place_BAK = following(torch.arange(token_BS.numel()).view_as(token_BS), anchor_BA, slots)
    teacher = Teacher(last_BSD.flatten(0, 1), drafter.body.lm_head, place_BAK)
    weights = Weights(*io["train.loss_weights"].tolist())
    goal = objective(drafter, blocks, teacher, label_BAK, mask_BAK, weights)
    goal.total.backward()

    actual = {
        "draft_logits": drafter.slot_logits(blocks.hidden_BAKD, blocks.latent_BAKr).detach(),
        "target_logits": teacher.logits(teacher.last_TD[place_BAK]),
        "target_ids": label_BAK,
    }
    if blocks.confidence_BAK is not None:
        actual["confidence_logits"] = blocks.confidence_BAK.detach()
    errors = {
        f"train.{name}": compared(tensor[keep_BA], io, f"train.{name}", keep_BA) for name, tensor in actual.items()
    }
    errors["train.eval_mask"] = compared(mask_BAK, io, "train.eval_mask")
    errors["train.loss"] = compared(goal.total.detach()[None], io, "train.loss")
    gradients = {checkpoint.flat_name(name): parameter.grad for name, parameter in drafter.named_parameters()}
    for name in sorted(name for name in io if name.startswith("train.grad.")):
        gradient = gradients.get(name.removeprefix("train.grad."))
        if gradient is None:
            raise UserError(f"{name} has no gradient here: no such trainable parameter")
        errors[name] = compared(gradient, io, name)
    return errors


def compared(actual: Tensor, io: Reference, name: str, keep_BA: Tensor | None = None) -> float:
    expected = io[name] if keep_BA is None else io[name][keep_BA]
    try:
        return relative_error(actual, expected)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def replay_eagle3(drafter: Eagle3, io: Reference) -> Errors:
    """The greedy chain after one prefix, token by token and as the training-time test of the text it wrote."""
    features, next_BS, drafted = io["infer.context_features"], io["infer.shifted_token_ids"], io["infer.greedy_tokens"]
    steps, known = drafted.shape[1], next_BS.shape[1]
    chain = drafter.chain(features, next_BS, steps)
    actual = {"infer.hidden": chain.hidden, "infer.logits": chain.logits, "infer.greedy_tokens": chain.token}
    errors = {name: compared(tensor, io, name) for name, tensor in actual.items()}
    token_BS = torch.cat((torch.zeros_like(next_BS[:, :1]), next_BS, drafted), dim=1)
    unseen = features.new_full((len(features), 1 + steps, features.shape[2]), 1e3)
    blocks = drafter(Lesson.of(token_BS, torch.cat((features, unseen), dim=1), torch.tensor([[known]])))
    logits_BKV = drafter.slot_logits(blocks.hidden_BAKD[:, 0], None)
    return errors | {"infer.logits, training-time test": compared(logits_BKV.detach(), io, "infer.logits")}


def replay(directory: Path) -> Errors:
    """Relative error of every tensor group of a golden directory. Raises UserError for one that cannot be replayed."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; pass one with config.json, model.safetensors, io.safetensors")
    drafter, _ = checkpoint.load(directory, dtype=torch.float32)
    io = checkpoint.read_file(directory / "io.safetensors")
    try:
        if isinstance(drafter, Eagle3):
            return replay_eagle3(drafter, io)
        return replay_infer(drafter, io) | replay_train(drafter, io)
    except KeyError as error:
        raise UserError(f"{directory}/io.safetensors lacks {error.args[0]}") from error
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} cannot be replayed: {reason}") from error


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python tests/parity/golden.py DIR...", file=sys.stderr)
        return 2
    worst = 0.0
    for argument in arguments:
        try:
            errors = replay(Path(argument))
        except UserError as error:
            print(f"{argument}: {error}", file=sys.stderr)
            return 2
        for name, error in errors.items():
            print(f"{argument}  {name:<46} {error:.2e}{'' if error <= BOUND else '  ABOVE 1e-4'}")
        worst = max(worst, *errors.values())
    print(f"largest relative error {worst:.2e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
