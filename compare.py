"""What each idea buys: train the stages that are missing, then compare them all.

    python compare.py                              every stage, with three seeds
    python compare.py --max-iters 200 --seeds 1    a quick look
    python compare.py --no-train                   what is there already
    python compare.py --modern                     modern_gpt.py without each of its ideas

Prints a table, and writes it beside the curves and report.html, a page to look at; for the ideas,
which take hours, beside a picture. Runs that are there, below runs/, are not trained again; those
of another text, of other settings or by another version of their script are left out. Stop it
whenever you like: the same command goes on.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None

from common import Tokenizer, UserError, clear_errors, known_entropy, pick_device
from comparison.curves import THEMES, picture
from comparison.ideas import (
    EQUAL_STEPS,
    Ideas,
    compare_ideas,
    equal_seconds,
    idea_picture,
    idea_table,
)
from comparison.report import first_line, report
from comparison.runs import RUNGS, STAGES, Found, Rung, Terms, TrainedRun, find_runs, read_run
from comparison.step_times import measure_step_times, read_step_times, save_step_times
from comparison.table import as_markdown, as_text, lines_of, notes, results_csv, results_of, table
from prepare import open_text
from sample import encode_prompt, first_prompt

from flags import COUNT, Parser, add_device_flag, add_sampling_flags
from run_folder import holds_run, write_together
from training import duration

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs", "compare")  # where the runs go that are trained here
STEP_TIMES = RUNS / "step_times.json"
MOST_AT_ONCE = 4  # each has a PyTorch of its own in memory
LARGE = ("gpt", "modern_gpt")  # these keep a graphics card busy by themselves


class Job(NamedTuple):
    """A run to train, or to go on with."""

    rung: Rung
    seed: int
    folder: Path
    words: tuple[str, ...]  # of its command line
    alone: bool

    @property
    def name(self) -> str:
        return f"{self.rung.name}, seed {self.seed}"


def jobs_for(terms: Terms, found: Found) -> list[Job]:
    """The runs that are missing: all with the first seed, then with the second; large last."""
    jobs = []
    for seed, rung in itertools.product(terms.seeds, terms.to_train()):
        if (rung, seed) in found.finished:
            continue
        if unfinished := found.unfinished.get((rung, seed)):
            folder, words = unfinished.folder, ["--resume"]
        else:
            folder = free_folder(terms, rung, seed)
            words = [*terms.flags(rung), "--seed", str(seed)]
        words += ["--data", terms.corpus.path, "--device", terms.device, "--out", str(folder)]
        alone = rung.stage in LARGE and terms.device != "cpu"
        jobs.append(Job(rung, seed, folder, tuple(words), alone))
    return sorted(jobs, key=lambda job: job.rung.stage in LARGE)


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


def lock() -> IO[str]:
    """Only one comparison trains here at a time; its runs hold this too, should they outlive it."""
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        file = (RUNS / "lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {RUNS / 'lock'}: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # so it is said on Linux, and on Windows
        raise UserError(
            f"another compare.py, or a run that it started, is at work in {RUNS.absolute()}: "
            "wait for its end, or stop it"
        ) from None
    return file


def train(jobs: list[Job], locked: int) -> list[str]:
    """Do them all, side by side on equal shares of the cores; return the names that failed."""
    cores = torch.get_num_threads()
    waiting, running, failed, done = list(jobs), {}, [], 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < (1 if waiting[0].alone else at_once()):
                job = waiting.pop(0)
                if job.alone:
                    print(f"now {job.name}", flush=True)
                running[job] = start(job, cores if job.alone else cores // at_once(), locked)
            time.sleep(0.05)
            for job, (process, errors) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                done += 1
                try:
                    if process.returncode:
                        raise UserError(last_words(errors))
                    outcome = result_of(job)
                except UserError as error:
                    failed.append(job.name)
                    outcome = f"FAILED: {error}"
                print(f"[{done}/{len(jobs)}] {job.name}: {outcome}", flush=True)
    except KeyboardInterrupt:
        print("stopping; the same command goes on from there", flush=True)
        raise
    finally:
        stop([process for process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def at_once() -> int:
    """How many runs are trained side by side."""
    return min(MOST_AT_ONCE, torch.get_num_threads())


def start(job: Job, threads: int, locked: int) -> tuple[subprocess.Popen, IO[bytes]]:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (read when it has ended)
    script = ROOT / f"{job.rung.stage}.py"
    process = subprocess.Popen(
        [sys.executable, script, *job.words],
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        pass_fds=() if fcntl is None else (locked,),
    )
    return process, errors


def result_of(job: Job) -> str:
    run = read_run(job.folder)
    return f"validation loss {run.best['val_loss']:.3f} in {run.rows[-1]['seconds']:.1f} s"


def last_words(errors: IO[bytes]) -> str:
    """The line that a script ended with; where it broke down instead, all that Python says."""
    errors.seek(0)
    words = errors.read().decode("utf-8", errors="replace").strip() or "without a word"
    last = words.splitlines()[-1]
    return last if ".py: " in last else words


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
        "--modern",
        action="store_true",
        help="compare modern_gpt.py with itself, each time without one of its ideas",
    )
    parser.add_argument(
        "--no-train", action="store_true", help="compare the runs that are there already"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where table, curves and report go (default {RUNS} / name of the text)",
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
    if options.modern and "modern_gpt" not in options.stages:
        raise UserError("--modern compares modern_gpt.py with itself: leave out --stages")
    corpus = open_text(options.data)
    seeds = range(1, (options.seeds or 3) + 1)
    if options.no_train and not options.seeds:
        seeds = None
    device = options.device or "auto"
    if device == "auto" or not options.no_train:
        device = pick_device(device).type
    ladder = EQUAL_STEPS if options.modern else RUNGS
    terms = Terms(corpus, device, options.stages, seeds, options.max_iters, ladder)
    tokenizer = Tokenizer(corpus.vocabulary)
    prompt = options.prompt or first_line(corpus) or first_prompt(tokenizer)
    encode_prompt(tokenizer, prompt)  # what is wrong is refused now rather than at the end
    out = options.out or RUNS / corpus.name
    if not options.no_train:
        make_folder(out)  # where it cannot be made, better now than at the end

    step_times = {}
    if options.modern:
        step_times = read_step_times(STEP_TIMES, terms)
        if not step_times and not options.no_train:
            step_times = step_times_of(terms)
        terms = replace(terms, ladder=EQUAL_STEPS + equal_seconds(step_times, terms))
    found, failed = find_runs(terms, RUNS), []
    say_left_out(found.left_out)
    if options.no_train:
        say_left_out([f"{run.folder}: unfinished" for run in found.unfinished.values()])
        there = {rung for rung, _ in found.finished}
        lacking = [rung.name for rung in terms.to_train() if rung not in there]
        if there and lacking:
            print(f"not there: {', '.join(lacking)}")
    else:
        found, failed = train_missing(terms, found)
    not_trained = UserError(f"not trained: {'; '.join(failed)} (the lines marked FAILED say why)")
    if failed and not found.finished:
        raise not_trained
    if not found.finished:
        shorter = re.search(r"made with (--max-iters \d+) --eval-interval", str(found.left_out))
        raise UserError(
            f"nothing to compare: below {Path('runs').absolute()} there is no finished run of "
            f"these stages on {corpus.name}; "
            + (f"add {shorter[1]} for those that are" if shorter else "leave out --no-train")
        )
    groups = found.by_rung(terms.ladder)
    ideas = compare_ideas(groups, step_times) if options.modern else None
    if options.modern and not ideas:
        nothing = UserError(
            "nothing to compare: modern_gpt.py with all ideas, and without one, must both be "
            "there; leave out --no-train"
        )
        raise not_trained if failed else nothing
    make_folder(out)
    if ideas:
        write_ideas(groups, ideas, terms, out)
        if step_times:
            save_step_times(out / STEP_TIMES.name, step_times, terms)
    else:
        write(groups, terms, prompt, options, out)
    if failed:
        raise not_trained


def step_times_of(terms: Terms) -> dict[str, float]:
    """Measure them once, under the conditions of the runs; what fits equal seconds stays then."""
    print("measuring the time of a step without each idea", flush=True)
    with lock():
        step_times = measure_step_times(EQUAL_STEPS, terms, torch.get_num_threads() // at_once())
        save_step_times(STEP_TIMES, step_times, terms)
    return step_times


def train_missing(terms: Terms, found: Found) -> tuple[Found, list[str]]:
    """What is there afterwards, and the names of the runs that failed."""
    jobs = jobs_for(terms, found)
    print(f"runs on {terms.corpus.name}: {len(jobs)} to train, {len(found.finished)} there already")
    if not jobs:
        return found, []
    with lock() as file:
        began = time.perf_counter()
        failed = train(jobs, file.fileno())
        print(f"trained for {duration(time.perf_counter() - began)}")
    after = find_runs(terms, RUNS)
    say_left_out([line for line in after.left_out if line not in found.left_out])
    return after, failed


def make_folder(out: Path) -> None:
    """For the comparison's files, two of which have the names of a run's."""
    if (out / "config.json").exists() or (out / "checkpoint.pt").exists():
        raise UserError(f"{out} holds a run: name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def say_left_out(lines: list[str]) -> None:
    for line in lines:
        print(f"left out: {line}")


def write(
    groups: dict[Rung, list[TrainedRun]],
    terms: Terms,
    prompt: str,
    options: argparse.Namespace,
    out: Path,
) -> None:
    """Print the table, and write all that a comparison leaves."""
    results = results_of(groups)
    lines = lines_of(results)
    rows = table(lines, known_entropy(terms.corpus))
    remarks = notes(lines, groups)
    warning = terms.warning()
    width = shutil.get_terminal_size((160, 24)).columns
    print("\n" + as_text(rows, width))
    for remark in filter(None, [*remarks, warning]):
        print(textwrap.fill(remark, width))
    ideas = ideas_there(terms) if "modern_gpt" in terms.stages else None
    page = report(groups, lines, rows, warning, remarks, ideas, terms.corpus, prompt, options)
    files = {
        "losses.csv": results_csv(results),
        "table.md": "\n".join([as_markdown(rows), *remarks, warning]).encode(
            "utf-8", errors="replace"
        ),
        "curves.svg": picture(groups, THEMES["light"], "svg"),
        "curves-dark.svg": picture(groups, THEMES["dark"], "svg"),
        "curves.png": picture(groups, THEMES["light"], "png"),
        "report.html": page,
    }
    write_together({out / name: content for name, content in files.items()})
    print(f"the page to look at: {out / 'report.html'}")


def ideas_there(terms: Terms) -> Ideas | None:
    """What `--modern` has trained already, if that is enough to compare."""
    step_times = read_step_times(STEP_TIMES, terms)
    terms = replace(terms, ladder=EQUAL_STEPS)
    terms = replace(terms, ladder=EQUAL_STEPS + equal_seconds(step_times, terms))
    return compare_ideas(find_runs(terms, RUNS).by_rung(terms.ladder), step_times)


def write_ideas(
    groups: dict[Rung, list[TrainedRun]], ideas: Ideas, terms: Terms, out: Path
) -> None:
    """Print the table of ideas, and write it and its picture."""
    lines, remarks = ideas
    rows = idea_table(lines)
    width = shutil.get_terminal_size((160, 24)).columns
    print("\n" + as_text(rows, width))
    for remark in filter(None, [*remarks, terms.warning()]):
        print(textwrap.fill(remark, width))
    files = {
        "modern.csv": results_csv(results_of(groups)),
        "modern.md": "\n".join([as_markdown(rows), *remarks, terms.warning()]).encode(
            "utf-8", errors="replace"
        ),
        "modern.svg": idea_picture(lines, THEMES["light"], "svg"),
        "modern-dark.svg": idea_picture(lines, THEMES["dark"], "svg"),
        "modern.png": idea_picture(lines, THEMES["light"], "png"),
    }
    write_together({out / name: content for name, content in files.items()})
    print(f"the picture to look at: {out / 'modern.png'}")


if __name__ == "__main__":
    main()
