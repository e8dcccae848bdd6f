"""How the cost of a training step of gpt.py grows: with the context, and with the parameters.

    python benchmarks/cost.py
    python benchmarks/cost.py --rounds 1      (a quick look)

Every step learns from the same number of characters, in the number format and the portions that
gpt.py takes here. Each point is measured in a process of its own, so that the peak of memory is
that point's alone; the points take turns, and the numbers are medians. Prints two tables and draws
data/cost.svg. Beside PyTorch's count of the operations stands a formula's: for each character 6
times the numbers in the linear layers' matrices, and 12 * layers * C * T more for attention.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from torch import nn
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

sys.path.insert(0, str(Path(__file__).parent.parent))
import machine
from gpt import PRESETS, Config, Model, make_optimizer
from training import Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

ROOT = Path(__file__).parent.parent
TOKENS = 4096  # characters in a step
STEPS = 3  # of a point in a round, after one that warms up
CONTEXTS = [(6, context) for context in (64, 128, 256, 512, 1024)]  # layers, block size
SIZES = [(layers, 256) for layers in (3, 4, 5, 6, 8)]  # as many heads, of 64 channels each
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"


def measure(layers: int, context: int, number_format: str) -> dict:
    """What a process of its own finds out about that point."""
    flags = f"--preset full --n-layer {layers} --n-head {layers} --n-embd {64 * layers}"
    flags += f" --block-size {context} --batch-size {TOKENS // context}"
    command = [sys.executable, __file__, "--point", *flags.split(), "--precision", number_format]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return json.loads(result.stdout.splitlines()[-1])


def point() -> None:
    """Train for a few steps as gpt.py would with the flags given, and print one line of JSON."""
    run = Run(Config, PRESETS)
    config = run.config
    run.config = replace(config, n_layer=1, n_head=1, n_embd=64, block_size=8, compile=False)
    # This loads what a model of any size needs. It is also more than the parent process holds, at
    # whose peak Linux begins to count.
    train(run, 1)
    memory_before = peak_memory(run.device)
    run.config = config
    model, times = train(run, 1 + STEPS)
    matrices = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    result = {
        "number_format": run.format_name,
        "portion": TOKENS // run.portion_count,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations": run.operations,
        "formula": (6 * sum(matrices) + attention) * TOKENS,
        "seconds": times[1:],
        "memory": peak_memory(run.device) - memory_before,
        "top_speed": run.top_speed,
    }
    print(json.dumps(result))


def train(run: Run, steps: int) -> tuple[nn.Module, list[float]]:
    """The training lines of gpt.py's main, at a fixed learning rate; the seconds of each step."""
    model = Model(run.config).to(run.device)
    optimizer = make_optimizer(model, run.config)
    network = run.accelerate(model)
    if run.device.type == "cuda":  # what accelerate tries out there is no part of a step
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        machine.wait_for(run.device)
        began = time.perf_counter()
        optimizer.zero_grad()
        for idx, targets in run.portions(run.draw(run.generator)):
            with run.autocast():
                _, loss = network(idx, targets)
            run.scaler.scale(loss / run.portion_count).backward()
        run.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        run.scaler.step(optimizer)
        run.scaler.update()
        machine.wait_for(run.device)
        times.append(time.perf_counter() - began)
    return model, times


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held so far; not a number where that is not counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type != "cpu" or resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def summary(rounds: list[dict]) -> dict:
    """The medians over a point's rounds; what cannot vary is the first round's."""
    seconds = statistics.median(time for result in rounds for time in result["seconds"])
    return rounds[0] | {
        "milliseconds": 1000 * seconds,
        "megabytes": statistics.median(result["memory"] for result in rounds) / 1e6,
        "speed": rounds[0]["operations"] / seconds,
        "top_speed": statistics.median(result["top_speed"] for result in rounds),
    }


def table(title: str, names: list, rows: list[dict]) -> str:
    heads = f"{title} | parameters | characters at a time | GFLOP a step, counted | by the formula"
    heads += " | ms a step | peak memory, MB | GFLOP/s | of a large product's"
    lines = [f"| {heads} |", "|---|" + "---:|" * heads.count(" | ")]
    for name, row in zip(names, rows, strict=True):
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['portion']:,} "
            f"| {row['operations'] / 1e9:,.1f} | {row['formula'] / 1e9:,.1f} "
            f"| {row['milliseconds']:,.0f} | {row['megabytes']:,.0f} | {row['speed'] / 1e9:,.0f} "
            f"| {row['speed'] / row['top_speed']:.0%} |"
        )
    return "\n".join(lines).replace("| nan |", "| - |")


def draw(by_context: list[dict], by_size: list[dict], path: Path) -> None:
    """Both scales have decades of the same height: what grows alike has the same slope."""
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "cost", "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9, 4.4))
    contexts = [context for _, context in CONTEXTS]
    millions = [round(row["parameters"] / 1e6, 1) for row in by_size]
    [common] = [row for row in by_context if row in by_size]
    slowness = common["milliseconds"] / common["operations"]  # the thin lines go through this point
    lift = min(row["milliseconds"] / row["megabytes"] for row in by_context + by_size) / 2.5
    left = {"textcoords": "offset points", "ha": "right"}
    right = {"textcoords": "offset points", "ha": "left"}
    for axes, x, rows in zip(panels, (contexts, millions), (by_context, by_size), strict=True):
        times = [row["milliseconds"] for row in rows]
        expected = [slowness * row["operations"] for row in rows]
        memory = [lift * row["megabytes"] for row in rows]  # well below the times
        axes.plot(x, expected, color=GREY, linewidth=1)
        axes.plot(x, times, "o-", color=BLUE, linewidth=3)
        axes.plot(x, memory, "o-", color=ORANGE, linewidth=3)
        axes.annotate("time", (x[1], max(times[1], expected[1])), (0, 10), color=BLUE, **left)
        axes.annotate("memory", (x[1], memory[1]), (6, -19), color=ORANGE, **right)
        axes.loglog()
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    words = "if time followed the operations"
    panels[0].annotate(words, (contexts[-1], common["milliseconds"]), (0, -22), color=GREY, **left)
    panels[0].set_xlabel(f"context, with {common['parameters'] / 1e6:.1f} million parameters")
    panels[1].set_xlabel("million parameters, with a context of 256")
    panels[0].set_ylabel("milliseconds a step", color=BLUE)
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
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    points = list(dict.fromkeys([*CONTEXTS, *SIZES]))  # one is in both
    rounds = {key: [] for key in points}
    number_format = "auto"  # the first process picks it, for all
    for key in tqdm(points * options.rounds, disable=None):
        rounds[key].append(measure(*key, number_format))
        number_format = rounds[key][-1]["number_format"]
    results = {key: summary(rounds[key]) for key in points}
    by_context, by_size = ([results[key] for key in keys] for keys in (CONTEXTS, SIZES))
    draw(by_context, by_size, ROOT / "data" / "cost.svg")
    print(f"{TOKENS:,} characters a step, products in {number_format}\n")
    print(table("context", [context for _, context in CONTEXTS], by_context), end="\n\n")
    sizes = [f"{layers} layers, {64 * layers} channels" for layers, _ in SIZES]
    print(table("size", sizes, by_size))


if __name__ == "__main__":
    if "--point" in sys.argv:
        sys.argv.remove("--point")
        point()
    else:
        main()
