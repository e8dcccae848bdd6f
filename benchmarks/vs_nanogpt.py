"""gpt.py and modern_gpt.py compared with nanoGPT, on the same machine, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/vs_nanogpt.py --nanogpt nanoGPT

The checkout is copied into a temporary folder, given Tiny Shakespeare in its own format, and run
there with its own commands; it is not changed. Both sides take turns on this machine's CPU, and
every number is the median over the rounds. It takes about a quarter of an hour.
"""

import argparse
import contextlib
import importlib.util
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from common import Tokenizer
from sample import generate
from trainer.corpus import TINY_SHAKESPEARE_SHA256, Corpus, open_corpus
from trainer.machine import fast_dtype
from trainer.sampling import store_by_columns

import torch
from speed import count_flops, matmul_speed

ROOT = Path(__file__).parent.parent
CONFIG = "config/train_shakespeare_char.py"
ON_CPU = ["--device=cpu", "--compile=False"]
# The recipe in nanoGPT's README for a computer without a GPU.
LAPTOP = (
    "--eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
    "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
GOAL = 1.88  # about where that recipe ends
# Our flags that get there: fewer blocks, more characters per second.
TO_THE_GOAL = {
    "gpt.py": ["--n-layer", "2", "--max-iters", "550"],
    "modern_gpt.py": ["--n-layer", "2", "--max-iters", "210"],
}
OVERWRITE = ["--out", "run", "--overwrite"]


def copy_checkout(source: Path, target: Path, corpus: Corpus) -> None:
    """The user's nanoGPT, and the text as its own preparation writes it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "out*"))
    folder = target / "data" / "shakespeare_char"
    folder.mkdir(parents=True, exist_ok=True)
    corpus.train.to(torch.uint16).numpy().tofile(folder / "train.bin")
    corpus.validation.to(torch.uint16).numpy().tofile(folder / "val.bin")
    ids = Tokenizer(corpus.vocabulary).ids
    meta = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(corpus.vocabulary))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def run(command: list[object], folder: Path) -> tuple[str, float]:
    """What a command prints, and how many seconds it takes from start to end."""
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        encoding="utf-8",
    )
    if result.returncode:
        sys.exit(f"{command[0]} failed:\n{result.stderr[-2000:]}")
    return result.stdout, time.perf_counter() - began


def nanogpt_step(folder: Path, steps: int, *flags: str) -> float:
    """Seconds per training step."""
    flags = [*flags, f"--max_iters={steps}", "--eval_iters=1", "--log_interval=1"]
    output, _ = run(["train.py", CONFIG, *ON_CPU, *flags], folder)
    times = [float(found) for found in re.findall(r"time ([\d.]+)ms", output)]
    return statistics.median(times[1:]) / 1000  # the first one includes an evaluation


def course_step(folder: Path, preset: str, steps: int) -> tuple[float, float]:
    """Seconds per training step, and the fraction of the peak matmul throughput that this is."""
    flags = ["--preset", preset, "--max-iters", steps, "--eval-interval", steps]
    command = [ROOT / "gpt.py", "--device", "cpu", *flags, "--sample-length", 1, *OVERWRITE]
    output, _ = run(command, folder)
    seconds = float(re.search(r"([\d.,]+) ms per step", output)[1].replace(",", "")) / 1000
    config = gpt.PRESETS[preset]
    idx = torch.zeros(1, config.block_size, dtype=torch.long)
    flops = config.batch_size * count_flops(gpt.Model(config), idx)
    device = torch.device("cpu")
    return seconds, flops / seconds / matmul_speed(device, fast_dtype(device))


def sampling_speeds(checkout: Path, characters: int, rounds: int) -> tuple[float, float]:
    """Characters per second at the full size, of nanoGPT's `generate` and of ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = nanogpt
    spec.loader.exec_module(nanogpt)
    config = gpt.PRESETS["full"]
    sizes = {name: getattr(config, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        theirs = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=65, bias=False, **sizes)).eval()
    ours = gpt.Model(config).eval()
    store_by_columns(ours)
    tokenizer = Tokenizer("".join(map(chr, range(40, 105))))
    start = torch.zeros(1, 1, dtype=torch.long)
    times = {"theirs": [], "ours": []}
    for _ in range(rounds):
        with torch.inference_mode():
            began = time.perf_counter()
            theirs.generate(start, characters)
            times["theirs"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in generate(ours, tokenizer, length=characters):
            pass
        times["ours"].append(time.perf_counter() - began)
    return tuple(characters / statistics.median(seconds) for seconds in times.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="PATH", help="a checkout")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    options = parser.parse_args()
    if not (options.nanogpt / "train.py").exists():
        parser.error(f"{options.nanogpt} is not a checkout of nanoGPT: it has no train.py")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkout = folder / "nanoGPT"
        corpus = open_corpus(None)
        if corpus.sha256 != TINY_SHAKESPEARE_SHA256:
            parser.error("nanoGPT's recipe is for Tiny Shakespeare, which cannot be downloaded")
        copy_checkout(options.nanogpt, checkout, corpus)
        small = gpt.PRESETS["small"]
        same_small = [
            *(f"--block_size={small.block_size}", f"--batch_size={small.batch_size}"),
            *(f"--n_layer={small.n_layer}", f"--n_head={small.n_head}"),
            *(f"--n_embd={small.n_embd}", f"--dropout={small.dropout}"),
        ]
        figures = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            full = nanogpt_step(checkout, 5)
            figure = {"full": full}
            figure["our full"], figure["our full share"] = course_step(folder, "full", 6)
            figure["small"] = nanogpt_step(checkout, 200, *same_small)
            figure["our small"], figure["our small share"] = course_step(folder, "small", 200)
            output, figure["recipe"] = run(["train.py", CONFIG, *ON_CPU, *LAPTOP], checkout)
            figure["loss"] = float(re.findall(r"val loss ([\d.]+)", output)[-1])
            for script, flags in TO_THE_GOAL.items():
                command = [ROOT / script, "--device", "cpu", *flags, *OVERWRITE]
                output, figure[script] = run(command, folder)
                loss = float(re.search(r"best validation loss ([\d.]+)", output)[1])
                figure[f"{script} loss"] = loss
            figures.append(figure)
        median = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        theirs, ours = sampling_speeds(checkout, 500, options.rounds)

    full, small = gpt.PRESETS["full"], gpt.PRESETS["small"]
    per_step = {"full": full.batch_size * full.block_size}
    per_step["small"] = small.batch_size * small.block_size
    print("| | nanoGPT | the course | the course / nanoGPT |")
    print("|---|---:|---:|---:|")
    for name in ("full", "small"):
        before, after = (per_step[name] / median[key] for key in (name, f"our {name}"))
        print(
            f"| training at the {name} preset, characters per second | {before:,.0f} "
            f"| {after:,.0f} | {after / before:.2f} |"
        )
        share = median[f"our {name} share"]
        print(
            "| the same, of the peak matmul throughput "
            f"| {share * median[f'our {name}'] / median[name]:.0%} | {share:.0%} | |"
        )
    for script in TO_THE_GOAL:
        print(
            f"| from the start to a validation loss of {GOAL}, seconds: `{script}` "
            f"| {median['recipe']:.1f} ({median['loss']:.2f}) "
            f"| {median[script]:.1f} ({median[f'{script} loss']:.2f}) "
            f"| {median[script] / median['recipe']:.2f} |"
        )
    print(
        f"| sampling at the full preset, characters per second | {theirs:,.1f} | {ours:,.1f} "
        f"| {ours / theirs:.1f} |"
    )
    for script, flags in TO_THE_GOAL.items():
        if median[f"{script} loss"] > GOAL:
            sys.exit(f"{script} did not reach {GOAL} with {' '.join(flags)}")


if __name__ == "__main__":
    main()
