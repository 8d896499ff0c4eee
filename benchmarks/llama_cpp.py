"""The engine's plain decoding against llama.cpp on the same weights: >= 0.9 x at one stream, >= 1.3 x at 8 and 32.

pip install xllamacpp gguf   # llama.cpp, compiled, inside this process
python benchmarks/llama_cpp.py [--dtype bf16 f32] [--streams 1 8 32] [--tokens 64] [--rounds 5] [--json FILE]

The 155 M random Qwen3, written once as GGUF. Prompts of 128 random tokens, greedy, the end of text ignored; both take
all streams at once and reuse no prefix. Seconds are those of the whole run, prefill included, because llama.cpp
decodes the first streams while it prefills the last. The first tokens of both are compared: it is one model.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
import workload
import xllamacpp

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
KINDS = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}


def write_gguf(path: Path, dtype: str) -> None:
    """The random model as llama.cpp reads it; its vocabulary is named, since nothing is ever tokenized."""
    model, config = workload.random_model("f32"), workload.config_of()
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(KINDS[dtype])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    names = [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges([f"{names[0]} {names[1]}"])
    writer.add_eos_token_id(config.vocab_size - 1)
    for name, tensor in model.state_dict().items():
        add_tensor(writer, name.removesuffix(".weight"), tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: Any, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Matrices in the model's own number, vectors in float32 as llama.cpp wants them."""
    if name in WHOLE:
        theirs = WHOLE[name]
    else:
        _, _, layer, part = name.split(".", 3)
        theirs = f"blk.{layer}.{LAYER[part]}"
    if dtype == "bf16" and tensor.dim() > 1:
        bits = tensor.bfloat16().view(torch.uint16).numpy()
        writer.add_tensor(f"{theirs}.weight", bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(f"{theirs}.weight", tensor.numpy())


class LlamaCpp:
    """llama.cpp's server without its HTTP, on as many threads as torch has."""

    def __init__(self, path: Path, streams: int, tokens: int) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_parallel = streams
        options.n_ctx = streams * 256 * -(-(tokens + 128) // 256)
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
        options.cache_prompt, options.warmup, options.verbosity = False, True, -1
        self.server, self.streams = xllamacpp.Server(options), streams

    def decode(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """(seconds, the new tokens of each stream)."""
        common = {"n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        bodies = [{"prompt": prompt, **common} for prompt in prompts]
        started = time.perf_counter()
        with ThreadPoolExecutor(self.streams) as pool:
            answers = list(pool.map(self.server.handle_completions, bodies))
        seconds = time.perf_counter() - started
        return seconds, [[int(n) for n in re.findall(r"<(\d+)>", a["choices"][0]["text"])] for a in answers]


def compare(dtype: str, streams: int, path: Path, tokens: int, rounds: int) -> dict[str, object]:
    """One row: tokens/s of both, in turns."""
    core = workload.engine(workload.random_target(dtype))
    theirs = LlamaCpp(path, streams, tokens)
    prompts = workload.prompts(streams)
    same = []

    def ours_once() -> float:
        started = time.perf_counter()
        _, made = workload.decode(core, prompts, tokens)
        seconds = time.perf_counter() - started
        same.append([line[:8] for line in made])
        return streams * tokens / seconds

    def theirs_once() -> float:
        seconds, made = theirs.decode(prompts, tokens)
        same.append([line[:8] for line in made])
        return streams * tokens / seconds

    speeds = workload.interleaved({"dspark": ours_once, "llama.cpp": theirs_once}, rounds + 1)
    ours, llama = (values[1:] for values in (speeds["dspark"], speeds["llama.cpp"]))
    ratio, low, high = workload.ratios(ours, llama)
    equal = sum(a == b for a, b in zip(same[0], same[1], strict=True))
    return {
        "dtype": dtype,
        "streams": streams,
        "dspark tok/s": statistics.median(ours),
        "llama.cpp tok/s": statistics.median(llama),
        "ratio": f"{ratio:.2f} ({low:.2f}..{high:.2f})",
        "same first tokens": f"{equal}/{streams}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(workload.DTYPES), default=["bf16", "f32"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in arguments.dtype:
            path = Path(scratch) / f"{dtype}.gguf"
            write_gguf(path, dtype)
            rows += [compare(dtype, n, path, arguments.tokens, arguments.rounds) for n in arguments.streams]
    workload.report(rows, arguments.json)


if __name__ == "__main__":
    main()
