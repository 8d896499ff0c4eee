"""The demo's tokenizer: byte-level BPE made for Python source, trained on the training split alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dspark.demo.corpus import END_OF_TEXT

MASK = "<|mask|>"
# The order fixes the ids: 0 ends and begins a text, 1 is what a drafter reads where it has to guess.
SPECIALS = (END_OF_TEXT, MASK, *(f"<|reserved_{i}|>" for i in range(6)))

# An indentation is one piece and a newline ends the piece before it, so text that stops at the end of a line
# or inside an indentation is cut where training text is cut.
PIECES = "|".join(
    (
        r"(?<=\n)[ ]+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+\n*",
        r"\n+",
        r"[ ]+(?!\S)",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens; every text is encoded with its start marked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context: int) -> None:
    """Write it where `AutoTokenizer` finds it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def token_bytes(token: str) -> int:
    """How many bytes of text a byte-level token stands for: one per symbol, none for a special token."""
    return 0 if token.startswith("<|") and token.endswith("|>") else len(token)
