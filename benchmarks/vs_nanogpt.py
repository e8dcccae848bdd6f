"""gpt.py and modern_gpt.py compared with nanoGPT, on the same machine, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/vs_nanogpt.py --nanogpt nanoGPT

The checkout is copied into a temporary folder, given Tiny Shakespeare in its own format, and run
there with its own commands; it is not changed. Both sides take turns on this machine's CPU, and
each round has its own seed. nanoGPT computes in float32 on a CPU, so every comparison is made
twice: in the dtype that our scripts choose, and in float32. The unit of time is nanoGPT's recipe
for a laptop, from start to end. A round takes about 15 minutes on two cores.
"""

import argparse
import contextlib
import importlib.util
import math
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
CPU = torch.device("cpu")
CONFIG = "config/train_shakespeare_char.py"
ON_CPU = ["--device=cpu", "--compile=False"]
# The recipe in nanoGPT's README for a computer without a GPU.
LAPTOP = (
    "--eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
    "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
# The loss is as low without these two ideas, see results/, and falls faster with a larger batch.
FAST = "--no-squared-relu --no-embedding-skip --batch-size 12 --muon-learning-rate 0.012"
# Our commands, and the loss at which each stops.
TARGETS = {
    "gpt.py --n-layer 2 --max-iters 600": 1.88,  # about where that recipe ends
    "modern_gpt.py --n-layer 2 --max-iters 210": 1.88,
    f"modern_gpt.py {FAST} --max-iters 1250": 1.4697,  # nanoGPT on a GPU
}
DTYPES = {"default dtype": [], "float32": ["--precision", "float32"]}  # with the flags for them


def copy_checkout(source: Path, target: Path, corpus: Corpus) -> None:
    """Copy the user's nanoGPT, and write the text as nanoGPT's own preparation does."""
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
    seconds = time.perf_counter() - began
    if result.returncode and "did not reach" not in result.stderr:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    print(f"{seconds:.1f} s: {' '.join(map(str, command))}", file=sys.stderr, flush=True)
    return result.stdout, seconds


def nanogpt_step(checkout: Path, steps: int, *flags: str) -> float:
    """Seconds per training step."""
    flags = [*flags, f"--max_iters={steps}", "--eval_iters=1", "--log_interval=1"]
    output, _ = run(["train.py", CONFIG, *ON_CPU, *flags], checkout)
    times = [float(found) for found in re.findall(r"time ([\d.]+)ms", output)]
    return statistics.median(times[1:]) / 1000  # the first one includes an evaluation


def course_step(folder: Path, preset: str, steps: int, *flags: str) -> float:
    """Seconds per training step."""
    flags = [*flags, "--max-iters", steps, "--eval-interval", steps, "--sample-length", 1]
    command = [ROOT / "gpt.py", "--device", "cpu", "--preset", preset, *flags]
    output, _ = run([*command, "--out", "run", "--overwrite"], folder)
    return float(re.search(r"([\d.,]+) ms per step", output)[1].replace(",", "")) / 1000


def seconds_to_target(folder: Path, command: str, target: float, *flags: object) -> float:
    """Seconds until the target loss; infinite if the run ends above it."""
    timer = [ROOT / "benchmarks" / "time_to_loss.py", *command.split(), "--target", target]
    output, _ = run([*timer, "--device", "cpu", *flags], folder)
    found = re.search(r"reached .*: ([\d.]+) seconds", output)
    return float(found[1]) if found else math.inf


def measure(folder: Path, checkout: Path, seed: int) -> dict[tuple[str, str], float]:
    """One round of all measurements, in seconds."""
    small, figures = gpt.PRESETS["small"], {}
    names = ("block_size", "batch_size", "n_layer", "n_head", "n_embd", "dropout")
    sizes = {"full": [], "small": [f"--{name}={getattr(small, name)}" for name in names]}
    for preset, steps in {"full": 5, "small": 200}.items():
        figures[preset, "nanoGPT"] = nanogpt_step(checkout, steps, *sizes[preset])
        for dtype, flags in DTYPES.items():
            figures[preset, dtype] = course_step(folder, preset, steps, *flags)
    output, figures["recipe", "seconds"] = run(["train.py", CONFIG, *ON_CPU, *LAPTOP], checkout)
    figures["recipe", "loss"] = float(re.findall(r"val loss ([\d.]+)", output)[-1])
    for command, target in TARGETS.items():
        for dtype, flags in DTYPES.items():
            flags = [*flags, "--seed", seed]
            figures[command, dtype] = seconds_to_target(folder, command, target, *flags)
    return figures


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


def print_speeds(rounds: list[dict[tuple[str, str], float]]) -> None:
    """At both presets, with the fraction of the peak matmul throughput in the same dtype."""
    own, f32 = fast_dtype(CPU), torch.float32
    peaks = {dtype: matmul_speed(CPU, dtype) for dtype in {own, f32}}
    print(f"| training, characters per second | nanoGPT, float32 | gpt.py, {str(own)[6:]} ", end="")
    print("| gpt.py, float32 |\n|---|---:|---:|---:|")
    for preset, config in gpt.PRESETS.items():
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        flops = config.batch_size * count_flops(gpt.Model(config), idx)
        cells = []
        for side, dtype in (("nanoGPT", f32), *zip(DTYPES, (own, f32), strict=True)):
            seconds = statistics.median(each[preset, side] for each in rounds)
            before = statistics.median(each[preset, "nanoGPT"] for each in rounds)
            speed = config.batch_size * config.block_size / seconds
            fraction = flops / seconds / peaks[dtype]
            cells.append(f"{speed:,.0f} = {before / seconds:.2f}×, {fraction:.0%} of peak")
        print(f"| preset {preset} | {' | '.join(cells)} |")


def print_times(rounds: list[dict[tuple[str, str], float]]) -> None:
    """The mean and the range over the seeds that reach the target, in units of the same round."""
    print("| time to a validation loss, in units | default dtype | float32 |\n|---|---:|---:|")
    for command, target in TARGETS.items():
        cells = []
        for dtype in DTYPES:
            units = [each[command, dtype] / each["recipe", "seconds"] for each in rounds]
            reached = [each for each in units if each < math.inf]
            cell = f"{len(reached)} of {len(units)} seeds"
            if reached:
                span = f"{min(reached):.2f} to {max(reached):.2f}"
                missed = f", {cell}" if len(reached) < len(units) else ""
                cell = f"{statistics.mean(reached):.2f} ({span}){missed}"
            cells.append(cell)
        print(f"| `{command}` to {target} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="PATH", help="a checkout")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repeats (default 3)")
    options = parser.parse_args()
    if not (options.nanogpt / "train.py").exists():
        parser.error(f"{options.nanogpt} is not a checkout of nanoGPT: it has no train.py")
    corpus = open_corpus(None)
    if corpus.sha256 != TINY_SHAKESPEARE_SHA256:
        parser.error("nanoGPT's recipe is for Tiny Shakespeare, which cannot be downloaded")

    with tempfile.TemporaryDirectory() as temporary:
        folder, checkout = Path(temporary), Path(temporary, "nanoGPT")
        copy_checkout(options.nanogpt, checkout, corpus)
        rounds = []
        for seed in range(1, options.rounds + 1):
            print(f"round {seed} of {options.rounds}", file=sys.stderr)
            rounds.append(measure(folder, checkout, seed))
        theirs, ours = sampling_speeds(checkout, 500, options.rounds)
    seconds, loss = ([each["recipe", name] for each in rounds] for name in ("seconds", "loss"))
    print(f"The unit of time is {statistics.median(seconds):.1f} seconds: nanoGPT's laptop recipe,")
    print(f"which ends at a validation loss of {statistics.median(loss):.2f}.\n")
    print_times(rounds)
    print()
    print_speeds(rounds)
    print(f"\nSampling at the full preset, characters per second: nanoGPT {theirs:,.1f},")
    print(f"gpt.py {ours:,.1f}, which is {ours / theirs:.1f}×.")


if __name__ == "__main__":
    main()
