"""gpt.py on characters and on the tokens of bpe.py, compared in bits per character.

    python benchmarks/vocabulary.py > results/vocabulary.md

Every model is gpt.py's small preset; only the embedding and `lm_head` depend on the vocabulary. The
context is 64 tokens. In one control, characters have a context of 128, about as much text as 64
tokens of the vocabulary of 512. Each model is trained twice: for the same number of steps, in which
those with longer tokens see more text, and for the same time as the first model. Prints a table and
writes results/vocabulary.svg. Finished runs in runs/vocabulary are not trained again; those of
compare.py are not used, since step times are only comparable between runs that were trained side by
side.
"""

import argparse
import contextlib
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from comparison.runs import read_run
from comparison.table import Estimate, Row, rows_of
from comparison.train import Job, train
from trainer.corpus import TINY_SHAKESPEARE_SHA256, default_corpus, open_corpus

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE = "#0072b2", "#d55e00"


class Model(NamedTuple):
    tokens: int  # in the vocabulary of bpe.py; 0 for characters
    context: int = 64

    @property
    def name(self) -> str:
        words = f"{self.tokens:,} tokens" if self.tokens else "characters"
        return words if self.context == 64 else f"{words}, context {self.context}"

    def data(self) -> Path:
        """The text in tokens of this vocabulary, learned at first use."""
        folder = Path("data", f"shakespeare-{self.tokens}")
        if not self.tokens:
            return default_corpus()
        if not folder.exists():
            command = [ROOT / "bpe.py", "--vocab-size", str(self.tokens), "--out", folder]
            subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
        return folder

    def job(self, kind: str, steps: int, seed: int) -> Job:
        folder = Path("runs", "vocabulary", f"{self.name}, {kind}, seed {seed}")
        flags = f"--preset small --block-size {self.context} --max-iters {steps} --seed {seed}"
        flags += f" --eval-interval {max(1, steps // 4)} --device cpu"
        flags = ["--resume"] if folder.exists() else flags.split()
        where = ["--data", str(self.data()), "--out", str(folder)]
        name = f"gpt --preset small, {self.name}, {kind}"
        return Job(name, seed, steps, steps * 32 * self.context, folder, (*flags, *where))


CHARACTERS = Model(0)
MODELS = [CHARACTERS, Model(256), Model(512), Model(1024), Model(2048), Model(0, context=128)]


def trained(kind: str, steps: dict[Model, int], seeds: range) -> dict[Model, Row]:
    """A row for each model; trains the runs that are missing."""
    jobs = [model.job(kind, count, seed) for seed in seeds for model, count in steps.items()]
    missing = [job for job in jobs if not is_finished(job)]
    if missing:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            failed = train(missing, at_once=2)
        if failed:
            sys.exit(f"not trained: {'; '.join(failed)}")
    runs = [read_run(job.folder) for job in jobs]
    return {model: rows_of(runs[i :: len(steps)])[0] for i, model in enumerate(steps)}


def is_finished(job: Job) -> bool:
    if not job.folder.exists():
        return False
    run = read_run(job.folder)
    if run.config["max_iters"] != job.steps:
        sys.exit(f"{job.folder} has another number of steps: delete it, or move it away")
    return run.is_finished


def bits(row: Row) -> Estimate:
    return Estimate(*(each / math.log(2) for each in row.loss))


def compared(row: Row, first: Row) -> str:
    """Improvement over the character model in bits, paired by seed."""
    row.baseline = first
    return str(Estimate(*(each / math.log(2) for each in row.improvement)))


def draw(rows: dict[str, dict[Model, Row]], path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "vocabulary"})
    figure, axes = plt.subplots(figsize=(7, 4))
    shown = MODELS[:-1]  # without the control
    x = range(len(shown))
    for (kind, each), color, side in zip(rows.items(), (BLUE, ORANGE), (-12, 12), strict=True):
        losses = [bits(each[model]) for model in shown]
        values, errors = zip(*losses, strict=True)
        axes.errorbar(x, values, errors, color=color, marker="o", capsize=4, linewidth=2)
        place = {"textcoords": "offset points", "ha": "right", "va": "center", "color": color}
        axes.annotate(kind, (x[-1], values[-1]), (-24, side), **place)
    axes.set_xticks(x, [model.name for model in shown])
    axes.margins(y=0.15)
    axes.set_xlabel("vocabulary")
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

    seeds, steps = range(1, options.seeds + 1), dict.fromkeys(MODELS, options.steps)
    at_steps = trained("equal steps", steps, seeds)
    first, times = at_steps[CHARACTERS], {model: row.step_time for model, row in at_steps.items()}
    steps = {
        model: round(count * times[CHARACTERS] / times[model]) for model, count in steps.items()
    }
    others = {model: count for model, count in steps.items() if model != CHARACTERS}
    at_time = {CHARACTERS: first} | trained("equal time", others, seeds)
    draw({"equal steps": at_steps, "equal time": at_time}, ROOT / "results" / "vocabulary.svg")
    lines = []
    for model in MODELS:
        about = at_steps[model].runs[0].about
        per_token = about["corpus"]["characters_per_token"]
        line = [model.name, f"{per_token:.2f}", f"{per_token * model.context:.0f}"]
        line += [f"{about['parameters']:,}", f"{1000 * times[model]:.0f}"]
        for row in (at_steps[model], at_time[model]):
            line += [bits(row), compared(row, first) if row is not first else ""]
        lines.append([*line, f"{steps[model]:,}"])
    headings = "vocabulary|characters per token|context, characters|parameters|ms per step"
    headings += f"|bits per character after {options.steps:,} steps|improvement"
    headings += "|bits per character after equal time|improvement|steps in that time"
    sides = ["left", *["right"] * headings.count("|")]
    print(tabulate(lines, headings.split("|"), "pipe", colalign=sides, disable_numparse=True))


if __name__ == "__main__":
    main()
