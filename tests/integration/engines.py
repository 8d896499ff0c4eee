"""Tiny engines in float64: a random Qwen3 target, one drafter of every kind, and a loop that checks every step."""

import copy
import functools

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.checkpoint import build
from dspark.drafters.config import parse
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.layer_skip import LayerSkip
from dspark.drafters.ngram import NGram, NoDraft
from dspark.engine.config import EngineConfig
from dspark.engine.step import EngineCore
from dspark.models.target import ATTENTION, Target

VOCABULARY, HIDDEN, LAYERS, CONTEXT = 61, 32, 2, 128
DRAFTERS = ("dspark", "dflash", "eagle3", "mtp", "medusa", "layer_skip", "draft_model", "ngram", "none")


def config(**changes):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return Qwen3Config(**(shape | changes))


@functools.cache
def plain_model():
    """The library's own model, for plain decoding."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM._from_config(config(), dtype=torch.float64, attn_implementation="sdpa").eval()


def ours(model, noise=0.0):
    """A Target with the weights of `model`, blurred by `noise`."""
    made = Qwen3ForCausalLM._from_config(
        copy.deepcopy(model.config), dtype=torch.float64, attn_implementation=ATTENTION
    )
    made.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data.mul_(1 + noise * torch.randn_like(parameter))
    return Target(made.eval().requires_grad_(False))


@functools.cache
def target():
    return ours(plain_model())


ONE_LAYER = {"target_layer_ids": [LAYERS - 1]}
SHAPES = {
    "dspark": {},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    "eagle3": {"architectures": ["Qwen3Eagle3Model"], "ttt_length": 4},
    "mtp": ONE_LAYER
    | {
        "architectures": ["Qwen3MTPModel"],
        "num_nextn_predict_layers": 2,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    },
    "medusa": ONE_LAYER
    | {
        "architectures": ["MedusaModel"],
        "medusa_num_heads": 3,
        "medusa_num_layers": 1,
        "medusa_own_heads": False,
    },
    "layer_skip": {"architectures": ["LayerSkipModel"], "block_size": 4, "target_layer_ids": [0]},
}


def trained(kind):
    """An untrained drafter around the target's embedding and LM head."""
    fields = config(num_hidden_layers=1).to_dict() | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": LAYERS,
        "block_size": 5,
        "mask_token_id": VOCABULARY - 1,
        "target_layer_ids": [0, 1],
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
    }
    torch.manual_seed(2)
    drafter = build(parse(fields | SHAPES[kind], "config.json"), target().embedding_VD, target().head).eval().double()
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def drafter(kind):
    """A fresh drafter: `draft_model` is the target blurred, so that much of what it drafts is accepted."""
    if kind == "layer_skip":
        return LayerSkip(target(), trained(kind))
    if kind in SHAPES:
        return trained(kind)
    if kind == "draft_model":
        return DraftModel(ours(plain_model(), noise=0.02), VOCABULARY, block_size=4)
    if kind == "ngram":
        return NGram(VOCABULARY, block_size=6)
    return NoDraft(VOCABULARY)


def engine(kind="none", planner="full", **options):
    given = EngineConfig.of(**({"page_size": 4, "pages": 80, "max_step_tokens": 64, "seed": 0} | options))
    return watched(EngineCore(target(), drafter(kind), planner, config=given))


def watched(core):
    """The engine, with every batch held against its budget."""
    forward = core.runner.forward

    def checked(step):
        batch = step.batch
        assert 0 < len(batch.token_T) <= core.config.max_step_tokens
        assert len(set(batch.slot_T.tolist())) == len(batch.token_T), "two tokens in one slot"
        assert int(batch.slot_T.min()) >= core.config.page_size, "a token in the scratch page"
        return forward(step)

    core.runner.forward = checked
    return core


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def plain(prompt, count):
    """The library's greedy continuation."""
    out = plain_model().generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, use_cache=True)
    return out[0, len(prompt) :].tolist()


def drain(core, ids=()):
    """Step to the end, checking every page after every step; all commits by request."""
    commits = {i: [] for i in ids}
    while not core.idle:
        for commit in core.step():
            commits.setdefault(commit.request_id, []).append(commit)
        core.check_integrity()
    return commits


def run(core, asked, params=None, **fields):
    """Token ids per prompt, all requests at once."""
    params = params or [SamplingParams(**fields)] * len(asked)
    ids = [core.add(prompt, p) for prompt, p in zip(asked, params, strict=True)]
    commits = drain(core, ids)
    return [[t for commit in commits[i] for t in commit.token_ids] for i in ids]
