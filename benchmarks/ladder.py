"""Training time of the small stages, and of the same models trained as in many tutorials.

    python benchmarks/ladder.py > results/small_stages.md
    python benchmarks/ladder.py --max-iters 500 --rounds 1      a quick look

The tutorial side assembles batches row by row in Python, estimates the loss of both splits from 200
random batches at each evaluation, and uses the optimizer's defaults and all cores. Both sides
evaluate at the start and ten more times; the course also evaluates at steps 10, 30, 100 and 300.
They take turns, and the times are medians over the rounds. A small stage uses one core, so the last
line is for all scripts running side by side, one on each core; it includes their start-up.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from compare import STAGES
from trainer.corpus import open_corpus

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
SMALL = STAGES[:-2]


def tutorial_seconds(stage: str, max_iters: int) -> float:
    module = importlib.import_module(stage)
    corpus = open_corpus(None)
    train, validation = corpus.train, corpus.validation
    config = module.Config(vocab_size=len(corpus.vocabulary))
    torch.manual_seed(1)
    model = module.Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)

    def get_batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - config.block_size, (config.batch_size,))
        idx = torch.stack([tokens[i : i + config.block_size] for i in starts])
        targets = torch.stack([tokens[i + 1 : i + config.block_size + 1] for i in starts])
        return idx, targets

    @torch.no_grad()
    def estimate_losses() -> list[float]:
        model.eval()
        means = []
        for tokens in (train, validation):
            losses = torch.zeros(200)
            for i in range(200):
                losses[i] = model(*get_batch(tokens))[1].item()
            means.append(losses.mean().item())
        model.train()
        return means

    began = time.perf_counter()
    for step in range(max_iters):
        if step % max(1, max_iters // 10) == 0:
            estimate_losses()
        _, loss = model(*get_batch(train))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    estimate_losses()
    return time.perf_counter() - began


def course_seconds(stage: str, max_iters: int) -> float:
    """The script itself, with its log and its checkpoints."""
    module = importlib.import_module(stage)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [f"{stage}.py", *flags(max_iters), "--out", folder]
        module.main()
        with Path(folder, "losses.csv").open(encoding="utf-8") as file:
            return float(list(csv.DictReader(file))[-1]["seconds"])


def side_by_side_seconds(max_iters: int) -> float:
    """All scripts, the longest first, as many at a time as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        commands = [
            [sys.executable, ROOT / f"{stage}.py", *flags(max_iters), "--out", Path(folder, stage)]
            for stage in reversed(SMALL)
        ]
        began = time.perf_counter()
        run = functools.partial(
            subprocess.run,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        list(workers.map(run, commands))
        return time.perf_counter() - began


def flags(max_iters: int) -> list[str]:
    text = f"--max-iters {max_iters} --eval-interval {max(1, max_iters // 10)} --sample-length 1"
    return [*text.split(), "--device", "cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-iters", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    print(f"Seconds for {options.max_iters:,} steps, medians of {options.rounds} rounds:\n")
    print("| stage | tutorial | course | ratio |\n|---|---:|---:|---:|")
    seconds = {}
    for stage in SMALL:
        rounds = [
            (tutorial_seconds(stage, options.max_iters), course_seconds(stage, options.max_iters))
            for _ in range(options.rounds)
        ]
        seconds[stage] = [statistics.median(times) for times in zip(*rounds, strict=True)]
        print_row(f"`{stage}.py`", *seconds[stage])
    tutorial, course = (sum(times) for times in zip(*seconds.values(), strict=True))
    print_row("all, one after the other", tutorial, course)
    heads_tutorial, heads_course = seconds["multihead_attention"]  # its heads are not batched
    rest = "all but `multihead_attention.py`"
    print_row(rest, tutorial - heads_tutorial, course - heads_course)
    together = [side_by_side_seconds(options.max_iters) for _ in range(options.rounds)]
    print_row("all, side by side", tutorial, statistics.median(together))


def print_row(name: str, tutorial: float, course: float) -> None:
    print(f"| {name} | {tutorial:.2f} | {course:.2f} | {course / tutorial:.2f} |", flush=True)


if __name__ == "__main__":
    main()
