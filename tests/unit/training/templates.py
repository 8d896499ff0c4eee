"""Chat templates of the kinds that models ship, and a tokenizer that speaks them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, START, STOP = "<|end|>", "<|start|>", "<|text_end|>"

PLAIN = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '\n<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

# Thoughts are shown in the last turn only, and an empty one where thinking is switched off.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

# No marker between turns but brackets; the text's end token ends every answer.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + '<|text_end|>' }}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)

# The prompt opens a thought that the finished turn no longer shows.
MISLEADING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)

# Nothing special ends a turn.
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, one of which joins a space and a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("an", "s"), ("Ġ", "y"), ("Ċ", "Ċ")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=STOP, eos_token=STOP)
    fast.add_special_tokens({"additional_special_tokens": [START, END]})
    fast.chat_template = template
    return fast
