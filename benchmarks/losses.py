"""What each stage reaches: the README's table and picture, and data/losses.csv.

    python benchmarks/losses.py

Trains every stage and its variants with seeds 1, 2 and 3 (what is there already, in
runs/reference, is not trained again), then writes the results.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import load_corpus

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "runs" / "reference"
SEEDS = (1, 2, 3)
RUNS = (  # stage, the flags of a variant, what is new
    ("bigram", "", "a table of character pairs"),
    ("self_attention", "", "one head of attention"),
    ("multihead_attention", "", "four heads"),
    ("feed_forward", "", "a network after them"),
    ("residual", "", "three blocks that add"),
    ("residual", "--no-residual", "the same without adding"),
    ("layer_norm", "", "normalised before"),
    ("layer_norm", "--norm post", "normalised after"),
    ("gpt", "--preset small", "scaled up to what a processor trains in minutes"),
)


def train(run: tuple[str, str, int]) -> dict[str, object]:
    """The best row of that run, trained now if it was not before."""
    stage, flags, seed = run
    folder = REFERENCE / f"{stage}{flags.replace(' ', '')}-{seed}"
    if not (folder / "sample.txt").exists():
        command = [sys.executable, ROOT / f"{stage}.py", *flags.split(), "--out", folder]
        command += ["--seed", str(seed), "--overwrite"]
        threads = {} if stage == "gpt" else {"OMP_NUM_THREADS": "1"}
        print(f"training {folder.name}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings["corpus"]["name"] != "tinyshakespeare":
        sys.exit("losses.py: the reference losses are those on Tiny Shakespeare")
    with (folder / "losses.csv").open(encoding="utf-8") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["val_loss"]))
    return {
        "stage": stage,
        "flags": flags,
        "seed": seed,
        "parameters": settings["parameters"],
        "step": best["step"],
        "train_loss": best["train_loss"],
        "val_loss": best["val_loss"],
    }


def table(results: list[dict]) -> str:
    lines = ["| run | what is new | parameters | validation loss |", "|---|---|---:|---:|"]
    for stage, flags, new in RUNS:
        rows = [row for row in results if (row["stage"], row["flags"]) == (stage, flags)]
        losses = [float(row["val_loss"]) for row in rows]
        lines.append(
            f"| `{f'{stage}.py {flags}'.strip()}` | {new} | {int(rows[0]['parameters']):,} "
            f"| {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """A staircase: how far down each stage leads."""
    stairs = [(stage, flags) for stage, flags, _ in RUNS if flags in ("", "--preset small")]
    means = [
        statistics.mean(
            float(row["val_loss"]) for row in results if (row["stage"], row["flags"]) == stair
        )
        for stair in stairs
    ]
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "ladder", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(9, 4.2))
    axes.stairs(means, baseline=None, color="#0072b2", linewidth=3)
    for i, ((stage, _), mean) in enumerate(zip(stairs, means, strict=True)):
        axes.text(i + 0.5, mean + 0.02, f"{mean:.2f}", ha="center", va="bottom", weight="bold")
        axes.text(i + 0.5, mean - 0.03, f"{stage}.py".replace("_", "_\n"), ha="center", va="top")
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_ylim(min(means) - 0.28, max(means) + 0.15)
    axes.set_xlim(-0.1, len(stairs) + 0.1)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def counted_bigram_loss() -> float:
    """What a bigram table reaches that is counted instead of trained; each count begins at 1."""
    corpus = load_corpus()
    train, validation = corpus.training, corpus.validation
    V = len(corpus.vocabulary)
    pairs = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V)
    log_shares = torch.log((pairs + 1) / (pairs + 1).sum(dim=1, keepdim=True))
    return -log_shares[validation[:-1], validation[1:]].mean().item()


def main() -> None:
    runs = [(stage, flags, seed) for stage, flags, _ in RUNS for seed in SEEDS]
    small = [run for run in runs if run[0] != "gpt"]  # one thread each, so they run side by side
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        results = list(workers.map(train, small))
    results += [train(run) for run in runs if run[0] == "gpt"]
    with (ROOT / "data" / "losses.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, results[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    draw(results, ROOT / "data" / "ladder.svg")
    print(table(results))
    print(f"\na bigram table by counting: {counted_bigram_loss():.3f}")


if __name__ == "__main__":
    main()
