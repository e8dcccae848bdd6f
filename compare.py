"""What each idea buys: train the stages that are missing, then compare them all.

    python compare.py                              every stage, with three seeds
    python compare.py --max-iters 200 --seeds 1    a quick look
    python compare.py --no-train                   what is there already

Prints a table, and writes it beside the curves and report.html, a page to look at. Runs that are
there, below runs/, are not trained again; those of another text, of other settings or by another
version of their script are left out. Stop it whenever you like: the same command goes on.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import torch

from common import Corpus, Tokenizer, UserError, clear_errors, known_entropy, pick_device
from comparison.curves import THEMES, picture
from comparison.report import first_line, report
from comparison.runs import STAGES, Found, Rung, Terms, TrainedRun, find_runs, read_run
from comparison.table import as_markdown, as_text, lines_of, notes, results_csv, results_of, table
from flags import COUNT, Parser, add_device_flag, add_sampling_flags
from prepare import open_text
from run_folder import holds_run, write_together
from sample import encode_prompt
from training import duration

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs", "compare")  # where the runs go that are trained here
MOST_AT_ONCE = 4  # each has a PyTorch of its own in memory


class Job(NamedTuple):
    """A run to train, or to go on with."""

    rung: Rung
    seed: int
    folder: Path
    words: tuple[str, ...]  # of its command line
    alone: bool  # keeps all cores busy by itself

    @property
    def name(self) -> str:
        return f"{self.rung.name}, seed {self.seed}"


def jobs_for(terms: Terms, found: Found) -> list[Job]:
    """The runs that are missing; all stages with the first seed, then with the second."""
    other_preset = f"--preset {'full' if terms.device == 'cpu' else 'small'}"
    rungs = [rung for rung in terms.rungs() if rung.flags != other_preset]
    jobs = []
    for seed, rung in itertools.product(terms.seeds, rungs):
        if (rung, seed) in found.finished:
            continue
        if unfinished := found.unfinished.get((rung, seed)):
            folder, words = unfinished.folder, ["--resume"]
        else:
            folder = free_folder(terms, rung, seed)
            words = [*terms.flags(rung), "--seed", str(seed)]
        words += ["--data", terms.corpus.path, "--device", terms.device, "--out", str(folder)]
        jobs.append(Job(rung, seed, folder, tuple(words), alone=rung.stage == "gpt"))
    return sorted(jobs, key=lambda job: job.alone)


def free_folder(terms: Terms, rung: Rung, seed: int) -> Path:
    """Its name is for people; what a run is, its config.json says."""
    name = "-".join(rung.name.replace("--", "").split())
    if terms.max_iters:
        name += f"-{terms.max_iters}-steps"
    for number in itertools.count(1):
        again = "" if number == 1 else f"-again-{number}"
        folder = RUNS / terms.corpus.name / f"{name}-seed-{seed}{again}"
        if not holds_run(folder):
            return folder


def train(jobs: list[Job]) -> list[str]:
    """Do them all, the small ones side by side; return the names of those that failed."""
    at_once = min(MOST_AT_ONCE, torch.get_num_threads())
    waiting, running, failed, done = list(jobs), {}, [], 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < (1 if waiting[0].alone else at_once):
                job = waiting.pop(0)
                running[job] = start(job)
            time.sleep(0.05)
            for job, (process, errors) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                done += 1
                outcome = result_of(job) if process.returncode == 0 else failure(errors)
                if process.returncode:
                    failed.append(job.name)
                print(f"[{done}/{len(jobs)}] {job.name}: {outcome}", flush=True)
    except KeyboardInterrupt:
        print("stopping; the same command goes on from there", flush=True)
        raise
    finally:
        stop([process for process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def start(job: Job) -> tuple[subprocess.Popen, IO[bytes]]:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (read when it has ended)
    script = ROOT / f"{job.rung.stage}.py"
    threads = {} if job.alone else {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, *job.words],
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=os.environ | threads,
    )
    return process, errors


def result_of(job: Job) -> str:
    run = read_run(job.folder)
    return f"validation loss {run.best['val_loss']:.3f} in {run.rows[-1]['seconds']:.1f} s"


def failure(errors: IO[bytes]) -> str:
    """The last line that a script said before it gave up."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", errors="replace").split("\n")
    return "FAILED: " + next((line for line in reversed(lines) if line.strip()), "without a word")


def stop(processes: list[subprocess.Popen]) -> None:
    """Let each finish its step and save. On Windows Ctrl-C has told them so already."""
    for process in processes:
        if os.name != "nt":
            process.terminate()
    for process in processes:
        process.wait()


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--stages",
        type=stages,
        default=STAGES,
        metavar="NAMES",
        help="which ones, as in --stages bigram,residual (default: all, with their variants)",
    )
    parser.add_argument(
        "--seeds",
        type=COUNT,
        metavar="N",
        help="how many runs of each, with the seeds 1 to N (default 3; with --no-train all)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a UTF-8 text to learn from, or a folder that prepare.py made",
    )
    parser.add_argument(
        "--max-iters", type=COUNT, metavar="N", help="how many steps each (default: each its own)"
    )
    parser.add_argument(
        "--no-train", action="store_true", help="compare the runs that are there already"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RUNS,
        metavar="DIR",
        help=f"where table, curves and report go (default {RUNS})",
    )
    add_device_flag(parser)
    add_sampling_flags(parser)
    return parser.parse_args()


def stages(text: str) -> tuple[str, ...]:
    names = [name.strip().removesuffix(".py") for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no stage; the stages are {', '.join(STAGES)}"
            )
    return tuple(stage for stage in STAGES if stage in names)


@clear_errors
def main() -> None:
    options = parse()
    corpus = open_text(options.data)
    seeds = range(1, (options.seeds or 3) + 1)
    if options.no_train and not options.seeds:
        seeds = None
    device = pick_device(options.device or "auto").type
    terms = Terms(corpus, device, options.stages, seeds, options.max_iters)

    prompt = options.prompt or first_line(corpus)
    encode_prompt(Tokenizer(corpus.vocabulary), prompt)  # refused now rather than at the end

    found = find_runs(terms, RUNS)
    for line in found.left_out:
        print(f"left out: {line}")
    failed = []
    if not options.no_train and (jobs := jobs_for(terms, found)):
        there = len(found.finished)
        print(f"runs on {corpus.name}: {len(jobs)} to train, {there} there already", flush=True)
        began = time.perf_counter()
        failed = train(jobs)
        print(f"trained for {duration(time.perf_counter() - began)}")
        found = find_runs(terms, RUNS)
    if not found.finished:
        others = "; the flags of the runs left out compare those" if found.left_out else ""
        raise UserError(
            f"nothing to compare: below {Path('runs').absolute()} there is no finished run of "
            f"these stages on {corpus.name}; without --no-train they are trained{others}"
        )
    write(found.by_rung(), corpus, prompt, options)
    if failed:
        raise UserError(f"not trained: {'; '.join(failed)} (the lines marked FAILED say why)")


def write(
    groups: dict[Rung, list[TrainedRun]], corpus: Corpus, prompt: str, options: argparse.Namespace
) -> None:
    """Print the table, and write all that a comparison leaves."""
    results = results_of(groups)
    lines = lines_of(results)
    rows = table(lines, known_entropy(corpus))
    runs = [run for runs in groups.values() for run in runs]
    remarks = notes(lines, corpus.name, runs[0].device, {run.torch for run in runs})
    print("\n" + as_text(rows, shutil.get_terminal_size((160, 24)).columns))
    print("\n".join(remarks))
    page = report(groups, lines, rows, remarks, corpus, prompt, options)
    files = {
        "losses.csv": results_csv(results),
        "table.md": "\n".join([as_markdown(rows), *remarks, ""]).encode("utf-8"),
        "curves.svg": picture(groups, THEMES["light"], "svg"),
        "curves-dark.svg": picture(groups, THEMES["dark"], "svg"),
        "curves.png": picture(groups, THEMES["light"], "png"),
        "report.html": page,
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}") from None
    write_together({options.out / name: content for name, content in files.items()})
    print(f"the page to look at: {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
