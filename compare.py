"""Benchmark the stages: train the runs that are missing, then compare them all.

    python compare.py                              every stage, with three seeds
    python compare.py --max-iters 200 --seeds 1    a quick look
    python compare.py --no-train                   only the runs that exist
    python compare.py --modern                     modern_gpt.py without each of its ideas

Prints a table and writes it, with the loss curves, to report.html. --modern takes hours, and writes
a table and a plot. Existing runs in runs/ are not trained again; runs on another text or with other
settings are left out. You can stop at any time: the same command resumes.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None

from trainer import UserError, cli
from common import Tokenizer
from comparison.curves import THEMES, picture
from comparison.ideas import (
    EQUAL_STEPS,
    WITHOUT_ANY,
    Ideas,
    compare_ideas,
    equal_seconds,
    idea_picture,
    idea_table,
)
from comparison.report import first_line, report
from comparison.runs import ROWS, STAGES, Found, Row, Terms, TrainedRun, find_runs, read_run
from comparison.step_times import measure_step_times, read_step_times, save_step_times
from comparison.table import (
    Table,
    as_markdown,
    as_text,
    lines_of,
    notes,
    results_csv,
    results_of,
    table,
)
from data.pocket_play import known_entropy
from trainer.corpus import open_corpus
from trainer.flags import Parser, given, options_for, path_of
from trainer.folder import RUN_FILES, rename
from trainer.machine import DeviceSettings, available_device
from trainer.sampling import SampleSettings

import torch

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs", "compare")  # where this command trains
STEP_TIMES = RUNS / "step_times.json"
MOST_AT_ONCE = 4  # each run loads a PyTorch of its own


class Job(NamedTuple):
    """A run to train or to resume."""

    row: Row
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    alone: bool  # on a GPU, large models are trained one at a time

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def jobs_for(terms: Terms, found: Found) -> list[Job]:
    """The missing runs: all with the first seed, then the second, and so on; large ones last."""
    jobs = []
    for seed, row in itertools.product(terms.seeds, terms.to_train()):
        if (row, seed) in found.finished:
            continue
        if unfinished := found.unfinished.get((row, seed)):
            folder, arguments = unfinished.folder, ["--resume"]
        else:
            folder = free_folder(terms, row, seed)
            arguments = [*terms.complete(row).flags.split(), "--seed", str(seed)]
        arguments += ["--data", terms.corpus.path, "--device", terms.device, "--out", str(folder)]
        alone = row.preset != "" and terms.device != "cpu"
        jobs.append(Job(row, seed, folder, tuple(arguments), alone))
    return sorted(jobs, key=lambda job: job.row.preset != "")


def free_folder(terms: Terms, row: Row, seed: int) -> Path:
    """Its name is for people; config.json says what the run is."""
    name = "-".join(short_name(row).replace("--", "").split())
    if terms.max_iters:
        name += f"-{terms.max_iters}-steps"
    for number in itertools.count(1):
        again = "" if number == 1 else f"-again-{number}"
        folder = RUNS / terms.corpus.name / f"{name}-seed-{seed}{again}"
        if not any((folder / name).exists() for name in RUN_FILES):
            return folder


def short_name(row: Row) -> str:
    return row.name.replace(WITHOUT_ANY.flags, "without any idea")


@contextmanager
def lock() -> Iterator[int]:
    """Only one comparison trains here at a time; its runs hold the lock too, if they outlive it."""
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        file = (RUNS / "lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {RUNS / 'lock'}: {error.strerror}") from None
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):  # on Linux, and on Windows
            raise UserError(
                f"another compare.py, or a run that it started, is training in {RUNS.absolute()}: "
                "wait until it ends, or stop it"
            ) from None
        yield file.fileno()


def train(jobs: list[Job], locked: int) -> list[str]:
    """Train in parallel, with the cores split evenly; return the names of the runs that failed."""
    cores = torch.get_num_threads()
    waiting, running, failed, done = list(jobs), {}, [], 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # same as Ctrl-C
    try:
        while waiting or running:
            while waiting and len(running) < (1 if waiting[0].alone else at_once()):
                job = waiting.pop(0)
                if job.alone:
                    print(f"training {job.name}", flush=True)
                running[job] = start(job, cores if job.alone else cores // at_once(), locked)
            time.sleep(0.05)
            for job, (process, errors) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                done += 1
                try:
                    if process.returncode:
                        raise UserError(last_line(errors))
                    outcome = result_of(job)
                except UserError as error:
                    failed.append(job.name)
                    outcome = f"FAILED: {error}"
                print(f"[{done}/{len(jobs)}] {job.name}: {outcome}", flush=True)
    except KeyboardInterrupt:
        print("stopping; the same command resumes", flush=True)
        raise
    finally:
        stop([process for process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def at_once() -> int:
    """How many runs are trained at a time."""
    return min(MOST_AT_ONCE, torch.get_num_threads())


def start(job: Job, threads: int, locked: int) -> tuple[subprocess.Popen, IO[bytes]]:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (read later)
    script = ROOT / f"{job.row.stage}.py"
    process = subprocess.Popen(
        [sys.executable, script, *job.arguments],
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        pass_fds=() if fcntl is None else (locked,),
    )
    return process, errors


def result_of(job: Job) -> str:
    run = read_run(job.folder)
    return f"validation loss {run.best['val_loss']:.3f} in {run.rows[-1]['seconds']:.1f} s"


def last_line(errors: IO[bytes]) -> str:
    """The message of a script; if it crashed, the whole traceback."""
    errors.seek(0)
    text = errors.read().decode("utf-8", errors="replace").strip() or "no message"
    last = text.splitlines()[-1]
    return last if ".py: " in last else text


def stop(processes: list[subprocess.Popen]) -> None:
    """Let each finish its step and save. On Windows, Ctrl-C has reached them already."""
    for process in processes:
        if os.name != "nt":
            process.terminate()
    for process in processes:
        process.wait()


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--stages",
        nargs="+",
        type=stages,
        metavar="NAME",
        help="stages to compare, such as bigram residual (default: all, with their variants)",
    )
    parser.add_argument(
        "--seeds",
        help="runs per stage, with seeds 1 to N (default 3; with --no-train: all)",
        **options_for(int),
    )
    parser.add_argument(
        "--data",
        type=path_of,
        metavar="FILE",
        help="UTF-8 text to train on, or a folder that prepare.py made",
    )
    parser.add_argument(
        "--max-iters", help="training steps of each (default: its own)", **options_for(int)
    )
    parser.add_argument(
        "--modern",
        action="store_true",
        help="ablation study: modern_gpt.py without each of its ideas",
    )
    parser.add_argument("--no-train", action="store_true", help="compare only the runs that exist")
    parser.add_argument(
        "--out",
        type=path_of,
        metavar="DIR",
        help=f"folder for table, curves and report (default: {RUNS / 'TEXT_NAME'})",
    )
    parser.add_fields("the machine", DeviceSettings)
    parser.add_fields("the samples", SampleSettings)
    options = parser.parse_args()
    named = set(itertools.chain(*(options.stages or [STAGES])))
    options.stages = tuple(stage for stage in STAGES if stage in named)
    return options


def stages(text: str) -> tuple[str, ...]:
    names = [name.strip().removesuffix(".py") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a stage; the stages are {', '.join(STAGES)}"
            )
    return tuple(names)


def main() -> None:
    options = parse()
    if options.modern and "modern_gpt" not in options.stages:
        raise UserError("--modern compares modern_gpt.py with itself: leave out --stages")
    corpus = open_corpus(options.data)
    seeds = range(1, (options.seeds or 3) + 1)
    if options.no_train and not options.seeds:
        seeds = None
    device = DeviceSettings(**given(options, DeviceSettings)).device
    if device == "auto" or not options.no_train:
        device = available_device(device).type
    rows = EQUAL_STEPS if options.modern else ROWS
    terms = Terms(corpus, device, options.stages, seeds, options.max_iters, rows)
    settings = SampleSettings(**given(options, SampleSettings))
    settings = replace(settings, prompt=settings.prompt or first_line(corpus))
    # A bad --prompt is refused now rather than at the end, and so is a bad --out.
    settings.prompt = settings.start_of_text(Tokenizer(corpus.vocabulary))
    out = options.out or RUNS / corpus.name
    if not options.no_train:
        make_folder(out)

    step_times = {}
    if options.modern:
        step_times = read_step_times(STEP_TIMES, terms)
        if not step_times and not options.no_train:
            step_times = step_times_of(terms)
        terms = replace(terms, table=EQUAL_STEPS + equal_seconds(step_times, terms))
    found, failed = find_runs(terms, RUNS), []
    say_left_out(found.left_out)
    if options.no_train:
        say_left_out([f"{run.folder}: unfinished" for run in found.unfinished.values()])
        finished = {row for row, _ in found.finished}
        missing = [short_name(row) for row in terms.to_train() if row not in finished]
        if finished and missing:
            print(f"missing: {', '.join(missing)}")
    else:
        found, failed = train_missing(terms, found)
    not_trained = UserError(f"not trained: {'; '.join(failed)} (see the lines marked FAILED)")
    if failed and not found.finished:
        raise not_trained
    if not found.finished:
        raise nothing_to_compare(corpus.name, found)
    groups = found.by_row(terms.table)
    ideas = compare_ideas(groups, step_times) if options.modern else None
    if options.modern and not ideas:
        nothing = UserError(
            "nothing to compare: runs of modern_gpt.py with all ideas, and without one, are "
            "missing; leave out --no-train"
        )
        raise not_trained if failed else nothing
    make_folder(out)
    if ideas:
        write_ideas(groups, ideas, terms, out)
        if step_times:
            save_step_times(out / STEP_TIMES.name, step_times, terms)
    else:
        write(groups, terms, settings, out)
    if failed:
        raise not_trained


def nothing_to_compare(corpus: str, found: Found) -> UserError:
    shorter = re.search(r"made with (--max-iters \d+) --eval-interval", str(found.left_out))
    return UserError(
        f"nothing to compare: {Path('runs').absolute()} has no finished run of these stages on "
        f"{corpus}; "
        + (f"add {shorter[1]} to compare the shorter runs" if shorter else "leave out --no-train")
    )


def step_times_of(terms: Terms) -> dict[str, float]:
    """Measured once, with as many threads as a run has, and saved for the next comparison."""
    print("measuring the time of a step without each idea", flush=True)
    with lock():
        step_times = measure_step_times(terms, torch.get_num_threads() // at_once())
        save_step_times(STEP_TIMES, step_times, terms)
    return step_times


def train_missing(terms: Terms, found: Found) -> tuple[Found, list[str]]:
    """The runs that exist afterwards, and the names of those that failed."""
    jobs = jobs_for(terms, found)
    print(f"runs on {terms.corpus.name}: {len(jobs)} to train, {len(found.finished)} exist")
    if not jobs:
        return found, []
    with lock() as locked:
        began = time.perf_counter()
        failed = train(jobs, locked)
        print(f"trained for {(time.perf_counter() - began) / 60:.1f} min")
    after = find_runs(terms, RUNS)
    say_left_out([line for line in after.left_out if line not in found.left_out])
    return after, failed


def make_folder(out: Path) -> None:
    """For the comparison's files; its losses.csv must not replace that of a run."""
    if any(os.path.exists(out / name) for name in ("config.json", "checkpoint.pt")):
        raise UserError(f"{out} holds a run: choose another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def say_left_out(lines: list[str]) -> None:
    for line in lines:
        print(f"left out: {line}")


def write(
    groups: dict[Row, list[TrainedRun]], terms: Terms, settings: SampleSettings, out: Path
) -> None:
    """Print the table, and write every file of a comparison."""
    results = results_of(groups)
    lines = lines_of(results)
    rows = table(lines, known_entropy(terms.corpus.path))
    remarks, warning = notes(lines, groups), terms.warning()
    ideas = existing_ideas(terms) if "modern_gpt" in terms.stages else None
    page = report(groups, lines, rows, warning, remarks, ideas, terms.corpus, settings)
    files = {
        "losses.csv": results_csv(results),
        "table.md": print_table(rows, [*remarks, warning]),
        "curves.svg": picture(groups, THEMES["light"], "svg"),
        "curves-dark.svg": picture(groups, THEMES["dark"], "svg"),
        "curves.png": picture(groups, THEMES["light"], "png"),
        "report.html": page,
    }
    write_together(out, files)
    print(f"report: {out / 'report.html'}")


def existing_ideas(terms: Terms) -> Ideas | None:
    """What `--modern` has trained already, if that is enough to compare."""
    step_times = read_step_times(STEP_TIMES, terms)
    terms = replace(terms, table=EQUAL_STEPS)
    terms = replace(terms, table=EQUAL_STEPS + equal_seconds(step_times, terms))
    return compare_ideas(find_runs(terms, RUNS).by_row(terms.table), step_times)


def write_ideas(groups: dict[Row, list[TrainedRun]], ideas: Ideas, terms: Terms, out: Path) -> None:
    """Print the table of ideas, and write it and its picture."""
    lines, remarks = ideas
    files = {
        "modern.csv": results_csv(results_of(groups)),
        "modern.md": print_table(idea_table(lines), [*remarks, terms.warning()]),
        "modern.svg": idea_picture(lines, THEMES["light"], "svg"),
        "modern-dark.svg": idea_picture(lines, THEMES["dark"], "svg"),
        "modern.png": idea_picture(lines, THEMES["light"], "png"),
    }
    write_together(out, files)
    print(f"picture: {out / 'modern.png'}")


def write_together(out: Path, files: dict[str, bytes]) -> None:
    """All of them or none: an old table beside new curves would mislead."""
    try:
        with tempfile.TemporaryDirectory(dir=out, suffix=".part") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            for name in files:
                rename(Path(folder, name), out / name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def print_table(rows: Table, remarks: list[str]) -> bytes:
    """Print a table with its notes; return both as Markdown."""
    width = shutil.get_terminal_size((160, 24)).columns
    print("\n" + as_text(rows, width))
    for remark in filter(None, remarks):
        print(textwrap.fill(remark, width))
    return "\n".join([as_markdown(rows), *remarks]).encode("utf-8", errors="replace")


if __name__ == "__main__":
    cli(main)
