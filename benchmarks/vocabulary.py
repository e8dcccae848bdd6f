"""gpt.py on characters and on the tokens of bpe.py, compared in bits per character.

    python benchmarks/vocabulary.py

Every model is gpt.py's small preset with the same context length in tokens; only the embedding and
`lm_head` depend on the vocabulary. Each is trained twice: for the same number of steps, in which
token models see more text, and for the same time as the character model. Prints a table and writes
results/vocabulary.svg. Finished runs, in runs/vocabulary, are not trained again.
"""

import argparse
import contextlib
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer import UserError
from comparison.runs import TrainedRun, read_run
from comparison.table import Estimate, Row, rows_of
from comparison.train import Job, train
from trainer.corpus import TINY_SHAKESPEARE_SHA256, default_corpus, open_corpus

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = 0  # stands for the character model
SIZES = (CHARACTERS, 256, 512, 1024, 2048)
COMMAND = "gpt --preset small"
BLUE, ORANGE = "#0072b2", "#d55e00"


def data_of(size: int) -> Path:
    """The text in tokens of this vocabulary, learned at first use."""
    folder = Path("data", f"shakespeare-{size}")
    if not size:
        return default_corpus()
    if not folder.exists():
        command = [ROOT / "bpe.py", "--vocab-size", str(size), "--out", folder]
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    return folder


def trained(kind: str, steps: dict[int, int], seeds: range) -> dict[int, list[TrainedRun]]:
    """The runs of each vocabulary; trains those that are missing."""
    jobs, runs = [], {size: [] for size in steps}
    for seed in seeds:
        for size, count in steps.items():
            folder = Path("runs", "vocabulary", f"{size or 'characters'}-{kind}-{seed}")
            try:
                runs[size].append(read_run(folder))
                if runs[size][-1].config["max_iters"] != count:
                    sys.exit(f"{folder} has another number of steps: delete it, or move it away")
                if runs[size][-1].is_finished:
                    continue
                how = ["--resume"]
            except UserError:
                every = max(1, count // 4)
                how = f"--preset small --max-iters {count} --eval-interval {every} --seed {seed}"
                how = [*how.split(), "--device", "cpu"]
            where = ["--data", str(data_of(size)), "--out", str(folder)]
            name = f"{COMMAND}, {size or 'characters'}, {kind}"
            jobs.append(Job(name, seed, count, count, folder, (*how, *where)))
    if jobs:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            failed = train(jobs, at_once=2)
        if failed:
            sys.exit(f"not trained: {'; '.join(failed)}")
        return trained(kind, steps, seeds)
    return runs


def bits(row: Row) -> Estimate:
    return Estimate(*(each / math.log(2) for each in row.loss))


def compared(row: Row, first: Row) -> str:
    """Improvement over the character model in bits, paired by seed."""
    row.baseline = first
    return str(Estimate(*(each / math.log(2) for each in row.improvement)))


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "vocabulary"})
    figure, axes = plt.subplots(figsize=(7, 4))
    x = range(len(SIZES))
    for (kind, each), color, side in zip(rows.items(), (BLUE, ORANGE), (-12, 12), strict=True):
        losses = [bits(row) for row in each]
        values, errors = zip(*losses, strict=True)
        axes.errorbar(x, values, errors, color=color, marker="o", capsize=4, linewidth=2)
        place = {"textcoords": "offset points", "ha": "right", "va": "center", "color": color}
        axes.annotate(kind, (x[-1], values[-1]), (-24, side), **place)
    axes.set_xticks(x, ["characters", *(f"{size:,}" for size in SIZES[1:])])
    axes.margins(y=0.15)
    axes.set_xlabel("vocabulary: characters, or byte-pair tokens")
    axes.set_ylabel("validation loss (bits per character)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="random seeds (default 5)"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, metavar="N", help="training steps (default 1000)"
    )
    options = parser.parse_args()
    if open_corpus(None).sha256 != TINY_SHAKESPEARE_SHA256:
        parser.error("this benchmark needs Tiny Shakespeare: data/README.md says how to get it")
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for the ± in the table")

    seeds, steps = range(1, options.seeds + 1), dict.fromkeys(SIZES, options.steps)
    runs = {"equal steps": trained("steps", steps, seeds)}
    rows = {"equal steps": [rows_of(runs["equal steps"][size])[0] for size in SIZES]}
    times = [row.step_time for row in rows["equal steps"]]
    steps = {
        size: round(options.steps * times[0] / time)
        for size, time in zip(SIZES, times, strict=True)
        if size
    }
    again = trained("seconds", steps, seeds)
    own = [rows_of(again[size])[0] for size in SIZES if size]
    rows["equal time"] = [rows["equal steps"][0], *own]
    draw(rows, ROOT / "results" / "vocabulary.svg")
    lines = []
    for i, size in enumerate(SIZES):
        at_steps, at_time = rows["equal steps"][i], rows["equal time"][i]
        about = at_steps.runs[0].about
        per_token = about["corpus"]["characters_per_token"]
        line = [f"{size:,} tokens" if size else f"{about['config']['vocab_size']} characters"]
        line += [f"{per_token:.2f}", f"{per_token * about['config']['block_size']:.0f}"]
        line += [f"{about['parameters']:,}", f"{1000 * times[i]:.0f}"]
        for row in (at_steps, at_time):
            line += [bits(row), compared(row, rows["equal steps"][0]) if size else ""]
        line += [f"{steps.get(size, options.steps):,}"]
        lines.append(line)
    headings = "vocabulary|characters per token|context, characters|parameters|ms per step"
    headings += f"|bits per character after {options.steps:,} steps|improvement"
    headings += "|bits per character after equal time|improvement|steps in that time"
    sides = ["left", *["right"] * headings.count("|")]
    print(tabulate(lines, headings.split("|"), "pipe", colalign=sides, disable_numparse=True))


if __name__ == "__main__":
    main()
