"""Test doubles and builders of the drafters' tests: a sampler at temperature 0, tiny configs, pages for requests."""

import torch
from torch.nn.functional import one_hot
from transformers import Qwen3Config

from dspark.drafters.base import DraftContext
from dspark.drafters.checkpoint import build, head_of
from dspark.drafters.config import parse
from dspark.models.batch import Ragged

VOCABULARY, HIDDEN, LAYERS, PAGE = 61, 32, 4, 4


class Greedy:
    """The sampler's interface at temperature 0; remembers the logits it saw."""

    def __init__(self):
        self.seen = []

    def draw(self, logits_RV, slot):
        assert slot == len(self.seen)
        self.seen.append(logits_RV)
        token_R = logits_RV.argmax(-1)
        return token_R, one_hot(token_R, logits_RV.shape[-1]).float()


def tiny_config(**changes):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**(shape | changes))


def drafter_fields(**changes):
    """config.json of a drafter for the tiny target."""
    fields = tiny_config(num_hidden_layers=2).to_dict() | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": LAYERS,
        "block_size": 5,
        "mask_token_id": VOCABULARY - 1,
        "target_layer_ids": [0, 2],
        "num_anchors": 4,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
    }
    return fields | changes


def random_drafter(seed=0, **changes):
    """An untrained drafter with weights large enough that its choices depend on everything."""
    torch.manual_seed(seed)
    config = parse(drafter_fields(**changes), "config.json")
    embedding_VD, head_VD = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    drafter = build(config, embedding_VD, head_of(head_VD)).eval()
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter, config


def pages_of(lengths, width=16, seed=0):
    """A page table whose pages are scattered over a pool; page 0 stays free."""
    order = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(seed)) + 1
    return order.view(len(lengths), width).int()


def ragged(tokens, table_RP, starts):
    """The batch that commits `tokens[r]` at positions starts[r].. of every request."""
    lengths = [len(row) for row in tokens]
    position_T = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    row_T = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(lengths))
    return Ragged(
        token_T=torch.cat([torch.as_tensor(row) for row in tokens]).long(),
        position_T=position_T,
        slot_T=table_RP[row_T, position_T // PAGE].long() * PAGE + position_T % PAGE,
        page_table_RP=table_RP,
        cu_query_R1=torch.tensor([0, *lengths]).cumsum(0).int(),
        context_R=torch.tensor(starts).int(),
    )


def context_of(anchors, positions, table_RP, sampler, slots=5, history=None):
    return DraftContext(
        anchor_R=torch.as_tensor(anchors),
        position_R=torch.as_tensor(positions),
        page_table_RP=table_RP,
        slots=slots,
        request_ids=list(range(len(anchors))),
        history=history or [[0] for _ in anchors],
        sampler=sampler,
    )
