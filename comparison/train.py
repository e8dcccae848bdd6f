"""Train the runs that a comparison lacks, several at a time, with a live line for each."""

import contextlib
import csv
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import IO, NamedTuple

from trainer import UserError
from comparison.runs import read_run

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs", "compare")  # where the runs of comparisons go
POLL_SECONDS = 0.2


class Job(NamedTuple):
    """A run to train, or to resume if its folder exists."""

    command: str  # such as `residual --no-residual`
    seed: int
    steps: int
    tokens: int  # tokens that it sees in training
    folder: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.command}, seed {self.seed}"

    def start(self, threads: int) -> tuple[subprocess.Popen, IO[bytes]]:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (read later)
        command = [sys.executable, ROOT / f"{self.command.split()[0]}.py", *self.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": errors}
        return subprocess.Popen(command, env=environment, **quiet), errors


def short(words: str) -> str:
    """A name for a folder; a checksum keeps a long one unique."""
    name = "-".join(re.findall(r"\w+", words))
    return name if len(name) < 100 else f"{name[:90]}-{zlib.crc32(name.encode())}"


def free_folder(corpus: str, name: str) -> Path:
    """An unused folder; its name is only for people, since config.json describes the run."""
    name = short(name)
    for number in itertools.count(1):
        folder = RUNS / corpus / (name if number == 1 else f"{name}-again-{number}")
        if not os.path.lexists(folder):
            return folder


def train(jobs: list[Job], at_once: int) -> list[str]:
    """Train several at once, with the cores split evenly; return the names of those that failed."""
    waiting, running, failed = list(jobs), {}, []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # same as Ctrl-C
    try:
        make_folder(RUNS)
        with FileLock(RUNS / ".lock", timeout=0), Lines(jobs) as lines:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = job.start(torch.get_num_threads() // at_once)
                time.sleep(POLL_SECONDS)
                for job, (process, errors) in list(running.items()):
                    lines.show(job)
                    if process.poll() is not None:
                        del running[job]
                        lines.end(job, outcome := outcome_of(job, process.returncode, errors))
                        if outcome.startswith("FAILED"):
                            failed.append(job.name)
    except Timeout:
        where = RUNS.absolute()
        raise UserError(f"another compare.py is training in {where}: wait until it ends") from None
    except KeyboardInterrupt:
        print("stopping; the same command resumes", flush=True)
        raise
    finally:
        stop([process for process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


class Lines(contextlib.AbstractContextManager):
    """On a terminal, a live line for each run and one for all; elsewhere, a line as each ends."""

    def __init__(self, jobs: list[Job]) -> None:
        self.weights = {job: weight(job) for job in jobs}
        self.fractions = dict.fromkeys(jobs, 0.0)
        self.bars: dict[Job, tqdm] = {}
        self.ended = 0
        form = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left"
        self.all = tqdm(total=sum(self.weights.values()), disable=None, bar_format=form, desc="all")

    def __exit__(self, *_: object) -> None:
        for bar in [*self.bars.values(), self.all]:
            bar.close()

    def show(self, job: Job) -> None:
        try:
            last = read_run(job.folder).rows[-1]
        except UserError:  # the run has not started yet
            return
        if job not in self.bars:
            form = "{desc}  step {n}/{total}{postfix}  {remaining} left"
            more = {"bar_format": form, "leave": False, "disable": None, "initial": last["step"]}
            self.bars[job] = tqdm(total=job.steps, desc=job.name, **more)
        self.bars[job].n = last["step"]
        self.bars[job].set_postfix_str(f"loss {last['val_loss']:.3f}")
        self.fractions[job] = last["step"] / job.steps
        self.all.n = sum(self.weights[each] * done for each, done in self.fractions.items())
        self.all.refresh()

    def end(self, job: Job, outcome: str) -> None:
        if job in self.bars:
            self.bars.pop(job).close()
        self.fractions[job] = 1.0
        self.ended += 1
        self.all.write(f"[{self.ended}/{len(self.fractions)}] {job.name}: {outcome}")
        sys.stdout.flush()


def weight(job: Job) -> float:
    """How long a run takes compared with others, estimated from the reference results."""
    path, speed = ROOT / "results" / "ladder" / "losses.csv", 20_000.0
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for row in csv.DictReader(lines):
        if row["stage"] == job.command.split()[0] and row["flags"] in job.command:
            speed = float(row["tokens"]) / float(row["seconds"])
    return job.tokens / speed


def outcome_of(job: Job, code: int, errors: IO[bytes]) -> str:
    """A run's result, or the last line of its error message."""
    errors.seek(0)
    complaint = errors.read().decode("utf-8", errors="replace").strip() or "no message"
    last = complaint.splitlines()[-1]
    try:
        if code:
            raise UserError(last if ".py: " in last else complaint)
        run = read_run(job.folder)
        return f"validation loss {run.best['val_loss']:.3f} in {run.rows[-1]['seconds']:.1f} s"
    except UserError as error:
        return f"FAILED: {error}"


def stop(processes: list[subprocess.Popen]) -> None:
    """Let each finish its step and save. On Windows, Ctrl-C has reached them already."""
    for process in processes:
        if os.name != "nt":
            process.terminate()
    for process in processes:
        process.wait()
