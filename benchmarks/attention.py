"""How much faster batched heads are than one head after the other.

    python benchmarks/attention.py > results/attention.md
    python benchmarks/attention.py --rounds 1      a quick look

Both compute the same function. Times the forward and backward pass of the attention in
multihead_attention.py and in batched_attention.py, in turns; prints medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import batched_attention
import multihead_attention
from multihead_attention import Config

import torch
from torch import nn

SIZES = (
    ("small stages", Config(n_embd=32, n_head=4, block_size=8, batch_size=32)),
    ("more heads", Config(n_embd=128, n_head=16, block_size=8, batch_size=32)),
    ("longer context", Config(n_embd=128, n_head=4, block_size=128, batch_size=8)),
    ("gpt.py, full", Config(n_embd=384, n_head=6, block_size=256, batch_size=8)),
)


def milliseconds(attention: nn.Module, x: torch.Tensor, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        attention(x).sum().backward()
    return (time.perf_counter() - began) / repeats * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="repeats (default 9)")
    options = parser.parse_args()

    print("| size | channels | heads | context | batch | ms, one head after the other ", end="")
    print("| ms, batched | ratio |\n|---|" + "---:|" * 7)
    for name, config in SIZES:
        heads = multihead_attention.MultiHeadAttention(config)
        batched = batched_attention.MultiHeadAttention(config)
        x = torch.randn(config.batch_size, config.block_size, config.n_embd, requires_grad=True)
        repeats = 200 if config.block_size == 8 else 5
        for attention in (heads, batched):
            milliseconds(attention, x, 3)
        rounds = [
            (milliseconds(heads, x, repeats), milliseconds(batched, x, repeats))
            for _ in range(options.rounds)
        ]
        slow, fast = (statistics.median(times) for times in zip(*rounds, strict=True))
        sizes = (config.n_embd, config.n_head, config.block_size, config.batch_size)
        cells = [name, *sizes, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
