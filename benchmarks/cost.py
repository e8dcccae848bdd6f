"""How the cost of a training step of gpt.py grows with the context and with the parameters.

    python benchmarks/cost.py > results/cost.md
    python benchmarks/cost.py --rounds 1      a quick look

Every step trains on the same number of characters, with the dtype and the micro-batches that gpt.py
chooses on this machine. Each point is measured in a process of its own, so that the peak memory is
that of this point; the points take turns, and the numbers are medians. Prints two tables and writes
results/cost.svg. The tables compare the FLOPs that PyTorch counts with a formula: for each
character, 6 times the parameters of the linear layers, plus 12 * layers * C * T for attention.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer import Run
from gpt import PRESETS, Config, Model, make_optimizer

import matplotlib
import torch
from speed import count_flops, matmul_speed, synchronize
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

ROOT = Path(__file__).parent.parent
TOKENS = 4096  # characters per step
STEPS = 3  # timed steps per point and round, after one warm-up step
CONTEXTS = [(6, context) for context in (64, 128, 256, 512, 1024)]  # layers, block size
SIZES = [(layers, 256) for layers in (3, 4, 5, 6, 8)]  # and as many heads, each with D = 64
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#666666"


def measure(layers: int, context: int) -> dict:
    """One point, measured in a process of its own."""
    command = [sys.executable, __file__, "--point", f"{layers},{context}"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return json.loads(result.stdout.splitlines()[-1])


def point(layers: int, context: int) -> None:
    """Train for a few steps as gpt.py does, and print one line of JSON."""
    # Train a tiny model first, to load what a model of any size needs. Its peak memory also exceeds
    # that of the parent process, which Linux counts too.
    train(make_run(layers=1, heads=1, channels=64, context=8), steps=1)
    run = make_run(layers, layers, 64 * layers, context)
    memory_before = peak_memory(run.device)
    model, times = train(run, 1 + STEPS)
    memory = peak_memory(run.device) - memory_before
    config = run.config
    weights = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    idx = torch.zeros(1, config.block_size, dtype=torch.long, device=run.device)
    result = {
        "dtype": run.machine.dtype_name,
        "micro_batch": math.ceil(config.batch_size / run.micro_batch_count) * config.block_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": config.batch_size * count_flops(model, idx),
        "formula": (6 * sum(weights) + attention) * TOKENS,
        "seconds": times[1:],
        "memory": memory,
        "matmul_speed": matmul_speed(run.device, run.machine.dtype),
    }
    print(json.dumps(result))


def make_run(layers: int, heads: int, channels: int, context: int) -> Run:
    sizes = f"--n-layer {layers} --n-head {heads} --n-embd {channels} --block-size {context}"
    flags = f"--preset full {sizes} --batch-size {TOKENS // context}"
    return Run(Config, PRESETS, argv=flags.split(), name="gpt")


def train(run: Run, steps: int) -> tuple[nn.Module, list[float]]:
    """The training lines of gpt.py's main, at a fixed learning rate; the seconds of each step."""
    model = Model(run.config).to(run.device)
    optimizer = make_optimizer(model, run.config)
    run.model, run.optimizers = model, (optimizer,)
    if run.machine.compiled:
        model.compile()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(steps):
        synchronize(run.device)
        began = time.perf_counter()
        optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(run.batch(step)):
            with run.autocast():
                _, loss = model(idx, targets)
            (weight * loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        optimizer.step()
        synchronize(run.device)
        times.append(time.perf_counter() - began)
    return model, times


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held so far; NaN where the system does not count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type != "cpu" or resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def summary(rounds: list[dict]) -> dict:
    """The medians over a point's rounds."""
    seconds = statistics.median(time for result in rounds for time in result["seconds"])
    return rounds[0] | {
        "milliseconds": 1000 * seconds,
        "megabytes": statistics.median(result["memory"] for result in rounds) / 1e6,
        "speed": rounds[0]["flops"] / seconds,
        "matmul_speed": statistics.median(result["matmul_speed"] for result in rounds),
    }


def table(title: str, names: list, rows: list[dict], peak: float) -> str:
    headings = f"{title} | parameters | characters per micro-batch | GFLOPs per step, counted"
    headings += " | by the formula | ms per step | peak memory, MB | GFLOP/s | of peak matmul speed"
    lines = [f"| {headings} |", "|---|" + "---:|" * headings.count(" | ")]
    for name, row in zip(names, rows, strict=True):
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['micro_batch']:,} "
            f"| {row['flops'] / 1e9:,.1f} | {row['formula'] / 1e9:,.1f} "
            f"| {row['milliseconds']:,.0f} | {row['megabytes']:,.0f} | {row['speed'] / 1e9:,.0f} "
            f"| {row['speed'] / peak:.0%} |"
        )
    return "\n".join(lines).replace("| nan |", "| - |")


def draw(by_context: list[dict], by_size: list[dict], path: Path) -> None:
    """On log scales with equally high decades, equal growth has an equal slope."""
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "cost", "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9, 4.4))
    contexts = [context for _, context in CONTEXTS]
    millions = [round(row["parameters"] / 1e6, 1) for row in by_size]
    [common] = [row for row in by_context if row in by_size]
    slowness = common["milliseconds"] / common["flops"]  # the thin lines go through this point
    lift = min(row["milliseconds"] / row["megabytes"] for row in by_context + by_size) / 2.5
    left = {"textcoords": "offset points", "ha": "right"}
    right = {"textcoords": "offset points", "ha": "left"}
    for axes, x, rows in zip(panels, (contexts, millions), (by_context, by_size), strict=True):
        times = [row["milliseconds"] for row in rows]
        expected = [slowness * row["flops"] for row in rows]
        memory = [lift * row["megabytes"] for row in rows]  # drawn well below the times
        axes.plot(x, expected, color=GRAY, linewidth=1)
        axes.plot(x, times, "o-", color=BLUE, linewidth=3)
        axes.plot(x, memory, "o-", color=ORANGE, linewidth=3)
        axes.annotate("time", (x[1], max(times[1], expected[1])), (0, 10), color=BLUE, **left)
        axes.annotate("memory", (x[1], memory[1]), (6, -19), color=ORANGE, **right)
        axes.loglog()
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    words = "if time scaled with FLOPs"
    panels[0].annotate(words, (contexts[-1], common["milliseconds"]), (0, -22), color=GRAY, **left)
    panels[0].set_xlabel(f"context, with {common['parameters'] / 1e6:.1f} million parameters")
    panels[1].set_xlabel("million parameters, with a context of 256")
    panels[0].set_ylabel("milliseconds per step", color=BLUE)
    scales = [panels[0]]
    if not math.isnan(lift):
        scales.append(panels[1].secondary_yaxis("right", (lambda y: y / lift, lambda y: y * lift)))
        scales[1].set_ylabel("peak memory, megabytes", color=ORANGE)
    for scale in scales:
        scale.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        scale.yaxis.set_major_formatter("{x:,.0f}")
        scale.yaxis.set_minor_locator(ticker.NullLocator())
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repeats (default 3)")
    options = parser.parse_args()

    points = list(dict.fromkeys([*CONTEXTS, *SIZES]))  # one point is in both
    rounds = {key: [] for key in points}
    for key in tqdm(points * options.rounds, disable=None):
        rounds[key].append(measure(*key))
    results = {key: summary(rounds[key]) for key in points}
    peak = statistics.median(result["matmul_speed"] for result in results.values())
    by_context, by_size = ([results[key] for key in keys] for keys in (CONTEXTS, SIZES))
    draw(by_context, by_size, ROOT / "results" / "cost.svg")
    print(f"{TOKENS:,} characters per step, matrix products in {by_size[0]['dtype']}:\n")
    contexts = [context for _, context in CONTEXTS]
    print(table("context", contexts, by_context, peak), end="\n\n")
    sizes = [f"{layers} layers, {64 * layers} channels" for layers, _ in SIZES]
    print(table("size", sizes, by_size, peak))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        point(*map(int, sys.argv[2].split(",")))
    else:
        main()
