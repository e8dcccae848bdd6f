"""Kill, damage and misuse the scripts at random, and check that nothing is lost.

    python benchmarks/faults.py --minutes 10              every kind of fault
    python benchmarks/faults.py --minutes 0 --kills 500   only kills
    python benchmarks/faults.py --seed 2                  different random faults

Each try ends in one of four ways:

- survived: the script did its work. A run that a fault stopped was resumed or started again, and
  equals an undisturbed run with the same seed, bit for bit.
- refused: exit code 2, one line on stderr, and every file is as it was before. If that happens in
  the middle of a run, such as on a full disk, the run can be resumed.
- lost: anything else, such as a run that neither resumes nor starts, or no answer.
- traceback: the script printed one.

The time is divided over the kinds that have no count; Ctrl-C ends early, with the table so far.
After a loss or a traceback, the exit code is 1 and the folders of those tries are kept. Filling a
disk needs Linux and root.
"""

import argparse
import atexit
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# One thread is enough for tiny models, and a process with several cannot be forked safely.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", COLUMNS="160")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU, two runs may differ in the last bit
sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer import UserError, cli
from compare import STAGES
from trainer.checkpoint import read_checkpoint
from trainer.folder import RUN_FILES

import torch
import torch._dynamo  # otherwise an optimizer's first step would import it in every fork

try:
    import resource
except ImportError:  # on Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ["--sample-length", "20"]
SMALL = [*"--eval-interval 20 --batch-size 4 --block-size 8 --device cpu".split(), *SAMPLE]
SMALL_MODEL = {stage: ["--n-embd", "8"] for stage in STAGES} | {"bigram": []}
SMALL_MODEL["gpt"] = "--n-embd 8 --n-head 2 --n-layer 2 --dropout 0.1 --warmup-iters 5".split()
SMALL_MODEL["modern_gpt"] = SMALL_MODEL["gpt"]
RESUME = ["--resume", "--out", "run", *SAMPLE]
FURTHER = [*RESUME, "--max-iters", "260"]  # undisturbed runs end at step 240
FORKS = sys.platform == "linux"  # elsewhere, some libraries do not survive a fork
WORKERS = (os.cpu_count() or 1) if FORKS else 1
TIME_LIMIT = 20  # seconds until a script must have answered
FRESH = 0.04  # fraction of scripts that load PyTorch themselves instead of being forked


class Lost(Exception):
    """What went wrong."""


class Fork:
    """Like subprocess.Popen, for a function: with PyTorch loaded already, it starts at once."""

    def __init__(self, work: Callable[[], object]) -> None:
        sys.stdout.flush()
        self.returncode, self.pid, code = None, os.fork(), None
        if self.pid == 0:
            try:
                work()
            except (SystemExit, KeyboardInterrupt) as stop:
                code = getattr(stop, "code", 130)
            except BaseException:
                traceback.print_exc()
                code = 1
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()  # as when any script ends
                sys.stdout.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.001)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Script:
    """A script that was started; `before` is called in its process first."""

    def __init__(self, trial: "Trial", name: str, words: list[str], before: Callable) -> None:
        self.name, self.log = name, trial.log
        self.fresh = not FORKS or trial.chance.random() < FRESH
        command = command_of(name, *words)
        self.log.append(shlex.join(command))
        self.paths = [trial.folder / f"{each}-{len(self.log)}" for each in ("output", "errors")]

        def play() -> None:
            os.chdir(trial.work)
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            before()
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = [f"{name}.py", *words]
            cli(importlib.import_module(name).main)

        with self.paths[0].open("wb") as out, self.paths[1].open("wb") as errors:
            how = {"cwd": trial.work, "stdout": out, "stderr": errors}
            how |= {"preexec_fn": before} if os.name == "posix" else {}
            self.process = subprocess.Popen(command, **how) if self.fresh else Fork(play)

    def end(self, kill_after: float = math.inf) -> int | None:
        """Wait for the exit code; None if it had to be killed."""
        began, limit = time.monotonic(), min(kill_after, TIME_LIMIT)
        while self.process.poll() is None and time.monotonic() < began + limit:
            time.sleep(0.001)
        if killed := self.process.poll() is None:
            self.log[-1] += f"   # killed after {time.monotonic() - began:.3f} s"
        self.process.kill()
        self.process.wait()
        self.said = self.paths[1].read_bytes().decode("utf-8", "replace")
        if "Traceback" in self.said or (killed and kill_after > TIME_LIMIT):
            raise Lost(self.said or f"no answer in {TIME_LIMIT} s")
        return None if killed else self.process.returncode

    def outcome(self) -> str:
        """How it ended by itself: survived or refused."""
        if (code := self.end()) == 0:
            return "survived"
        if code != 2 or len(self.said.splitlines()) != 1 or self.said.find(f"{self.name}.py: "):
            raise Lost(f"exit code {code}, and on stderr: {self.said!r}")
        return "refused"


def command_of(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *words]


@dataclass
class Base:
    """What all tries share: a text, undisturbed runs, and which flags there are."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)  # how long each stage's run takes
    flags: dict[str, dict[str, str]] = field(default_factory=dict)  # each script's flags: metavars

    def run(self, stage: str, seed: int = 1) -> Path:
        return self.folder / "runs" / f"{stage}-{seed}"

    def words(self, stage: str, seed: int = 1, out: object = "run") -> list[str]:
        """The flags of an undisturbed run."""
        words = [*SMALL, *SMALL_MODEL[stage], "--max-iters", "240", "--seed", str(seed)]
        return [*words, "--data", str(self.folder / "text.txt"), *(["--out", str(out)] * bool(out))]


class Trial:
    """One try, in a folder of its own."""

    def __init__(self, base: Base, name: str, seed: int) -> None:
        self.base, self.folder = base, base.folder / name
        self.chance = random.Random(f"{seed} {name}")
        self.stage = self.chance.choice(STAGES)
        self.tries, self.overwrites = 1, False
        self.log: list[str] = []  # what was done, to do it again
        self.work = self.folder / "work"
        self.work.mkdir(parents=True)

    def script(self, name: str, *words: object, before: Callable = int) -> Script:
        return Script(self, name, [*map(str, words)], before)

    def copy(self, source: Path, name: str = "run") -> Path:
        return shutil.copytree(source, self.work / name)

    def answer(self, name: str, *words: str) -> str:
        """The outcome of a script, which must leave all files alone if it refuses."""
        before, script = snapshot(self.work), self.script(name, *words)
        outcome = script.outcome()
        if outcome == "refused" and (changed := before.items() ^ snapshot(self.work).items()):
            names = {path for path, _ in changed}
            began = b"\nrun folder " in script.paths[0].read_bytes()  # and failed in a later step
            if not began:
                raise Lost(f"{script.said.strip()}, but it changed {sorted(names)}")
            for path in names:
                if path.endswith("checkpoint.pt"):
                    read_checkpoint(self.work / path)
        return outcome

    def start(self) -> list[str]:
        """Flags for a new run; some replace an older one."""
        if self.chance.random() < 0.3:
            self.copy(self.base.run(self.stage, 2))
            self.overwrites = True
        return self.base.words(self.stage) + ["--overwrite"] * self.overwrites

    def restart(self) -> list[str]:
        """Flags to resume or start again after a fault."""
        again = self.overwrites and self.chance.random() < 0.5
        if again or not (self.work / "run").exists():
            return self.base.words(self.stage) + ["--overwrite"] * self.overwrites
        return RESUME

    def complete(self) -> str:
        """Train to the end; the result must equal that of an undisturbed run."""
        words, run = self.restart(), self.work / "run"
        if self.script(self.stage, *words).outcome() != "survived":
            raise Lost("what a fault has left blocks the run")
        is_old = words is RESUME and read_checkpoint(run / "checkpoint.pt")["seed"] == 2
        return self.compare(run, 2 if is_old and self.overwrites else 1)

    def compare(self, run: Path, seed: int) -> str:
        """The run must equal the undisturbed one, with nothing left behind."""
        there = {path.name for path in [*run.iterdir(), *run.parent.glob(".*")]}
        if there != {*RUN_FILES}:
            raise Lost(f"{run} holds, or has beside it: {sorted(there)}")
        for name in {*RUN_FILES} - {"config.json"}:
            if result(run / name) != result(self.base.run(self.stage, seed) / name):
                raise Lost(f"{run / name} is not that of an undisturbed run")
        return "survived"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def result(path: Path) -> object:
    """What is in a file of a run, without the seconds."""
    if path.suffix == ".csv":
        return [line.rpartition(b",")[0] for line in path.read_bytes().splitlines()]
    if path.suffix == ".pt":
        return all_values(read_checkpoint(path)["parts"] | {"history": None})
    return path.read_bytes()


def all_values(checkpoint: dict[str, Any]) -> str:
    """Everything in a checkpoint, bit for bit."""

    def bits(x: torch.Tensor) -> list:
        return [str(x.dtype), x.shape, bytes(x.flatten().view(torch.uint8).numpy()).hex()]

    return json.dumps(checkpoint, default=bits)


# The kinds of faults. Each function makes one try and returns its outcome.


def kill(trial: Trial) -> str:
    """Kill a run again and again, half of the time while it is starting."""
    chance, words, trial.tries = trial.chance, trial.start(), 0
    for _ in range(chance.randint(1, 8)):
        script = trial.script(trial.stage, *words)
        moment = chance.uniform(0, trial.base.seconds[trial.stage] * chance.choice([0.15, 1.0]))
        moment += script.fresh * chance.uniform(0, 2)  # PyTorch takes about two seconds to load
        if (code := script.end(kill_after=moment)) is not None:  # the run was faster
            if code:
                raise Lost(f"exit code {code}, and on stderr: {script.said!r}")
            break
        trial.tries, words = trial.tries + 1, trial.restart()
    return trial.complete()


GOOD = {
    **{"--n-embd": "8 16", "--n-head": "1 2 4", "--n-layer": "1 2", "--block-size": "4 8"},
    **{"--batch-size": "1 4", "--max-iters": "1 5", "--eval-interval": "1 3", "--seed": "1 7"},
    **{"--sample-length": "1 20", "--data": "text.txt prepared café.txt"},
    **{"--init-from": "run runs/gpt", "--out": "new new/deep run", "--prompt": "Line é"},
}
ABSURD = "0|-1|2147483648|1e309|1e-320|nan|-inf||null|None|1_0|0x10|1e3| 3 |٣|-h|--|~|$HOME|a\tb|\n"
ABSURD += "|café 😀 \u2028|.|missing/file.txt|text.txt|\udce9.txt|run|prepared"
ABSURD = [*ABSURD.split("|"), "x" * 300, "9" * 5000]
HUGE = {"--n-layer": "1000003", "--n-embd": "1000003", "--n-head": "1000003"}
HUGE |= {"--batch-size": "2147483647", "--block-size": "2147483647"}


def command_line(trial: Trial) -> str:
    """Pass random and absurd flags."""
    chance, base, name = trial.chance, trial.base, trial.stage
    if chance.random() < 0.3:
        name, trial.stage = chance.choice([*base.flags]), "gpt"
    trial.copy(base.folder / "prepared", "prepared")
    for copy in ("run", f"runs/{trial.stage}"):
        trial.copy(base.run(trial.stage), copy)
    for copy in ("text.txt", "café.txt", "\udce9.txt"):
        with contextlib.suppress(OSError):  # from a file system that refuses the last name
            shutil.copy(base.folder / "text.txt", trial.work / copy)
    words = {
        "sample": ["run", *SAMPLE],
        "export": ["run", "--out", "new"],
        "prepare": ["text.txt", "--out", "new"],
        "compare": ["--no-train", "--data", "text.txt"],
    }.get(name, RESUME)
    if name in STAGES and chance.random() < 0.7:
        words = [*base.words(name, out=""), "--max-iters", "5", "--data", "text.txt"]
    for _ in range(chance.randint(0, 4)):
        words = [*words, *random_flag(chance, base.flags[name])]
    return trial.answer(name, *words, *([chance.choice(ABSURD)] * (chance.random() < 0.05)))


def random_flag(chance: random.Random, flags: dict[str, str]) -> list[str]:
    """A flag and its value, possibly wrong in any way."""
    flag, metavar = chance.choice([*flags.items()])
    good = GOOD.get(flag) or (metavar.strip("{}").replace(",", " ") if "{" in metavar else "1 2 .5")
    bad = [*ABSURD, *[HUGE.get(flag, "0")] * 10]
    value = chance.choice(good.split() if chance.random() < 0.6 else bad)
    if (mistake := chance.random()) < 0.1:
        flag = "--" + flag[2:].replace("-", "_")
    elif mistake < 0.2:
        at = chance.randrange(len(flag))
        flag = flag[:at] + chance.choice(["", "x", flag[at] * 2]) + flag[at + 1 :]
    if not metavar or mistake > 0.95:
        return [flag]
    return [f"{flag}={value}"] if mistake > 0.85 else [flag, value]


@functools.cache
def original(path: Path) -> tuple[bytes, str]:
    return path.read_bytes(), all_values(read_checkpoint(path))


def flip(trial: Trial) -> str:
    """Flip one bit of a checkpoint."""
    chance, source = trial.chance, trial.base.run(trial.stage)
    name, by_script = chance.choice(["checkpoint.pt", "best.pt"]), chance.random() < 0.05
    content, expected = original(source / name)
    flipped, at, bit = bytearray(content), chance.randrange(len(content)), chance.randrange(8)
    flipped[at] ^= 1 << bit
    path = (trial.copy(source) if by_script else trial.work) / name
    path.write_bytes(flipped)
    trial.log.append(f"cp -r {source}/. run; cp {path} run   # with bit {bit} of byte {at} flipped")
    outcome = "survived"
    try:
        if all_values(read_checkpoint(path)) != expected:
            trial.log.append(shlex.join(command_of(*reader_of(trial, name))))
            raise Lost("it loads, with other values")
    except UserError:
        outcome = "refused"
    if by_script and trial.answer(*reader_of(trial, name)) != outcome:
        raise Lost(f"the script differs from read_checkpoint, where it is {outcome}")
    return outcome


def reader_of(trial: Trial, name: str) -> list[str]:
    """A command that reads the checkpoint of that name in the folder `run`."""
    if name == "checkpoint.pt":
        return [trial.stage, *FURTHER]
    words = f"--init-from run --out new --max-iters 5 --data {trial.base.folder / 'text.txt'}"
    return trial.chance.choice([["sample", "run", *SAMPLE], [trial.stage, *words.split(), *SAMPLE]])


def mutate(content: Any, trial: Trial) -> None:
    """Delete or retype one entry, at any depth."""
    chance, where, entry = trial.chance, "", content
    while isinstance(entry, dict | list) and entry and (not where or chance.random() < 0.75):
        holder, keys = entry, [*entry] if isinstance(entry, dict) else range(len(entry))
        deeper = [key for key in keys if isinstance(entry[key], dict | list) and entry[key]]
        key = chance.choice(deeper if deeper and chance.random() < 0.6 else keys)
        where, entry = f"{where}[{key!r}]", holder[key]
    values = [None, True, 0, -1, 2**31, 2**70, 1.5, math.nan, math.inf, "", "gpt", "\n", b"x", []]
    values += [{}, [1], [[]], {"a": 1}]
    holder[key] = chance.choice(values)
    trial.log.append(f"# {where} became {' '.join(repr(holder[key])[:200].split())}")
    if chance.random() < 0.25:
        del holder[key]
        trial.log.append(f"# {where} was deleted")


def mutation(trial: Trial) -> str:
    """Damage a file of a prepared text, then start or resume a run on it."""
    chance, base = trial.chance, trial.base.folder
    trial.copy(base / "prepared-run")
    names = ["train.bin", "val.bin", "meta.json", "meta.json"]
    path = trial.copy(base / "prepared", "prepared") / chance.choice(names)
    before, other = path.read_bytes(), chance.choice([b"\xff\xff", chance.randbytes(2)])
    at = chance.randrange(len(before) // 2) * 2  # where a token id begins
    kinds = [before[:at], before[:at] + b"[" * 100_000, before[:at] + other + before[at + 2 :]]
    kinds += [b"[" * 100_000, before[: at + 1], before[:at] + other + before[at:]]
    content = chance.choice(kinds)
    trial.log.append(f"# changed {path.name} at {at}")
    if path.suffix == ".json" and chance.random() < 0.5:
        mutate(meta := json.loads(before), trial)
        content = json.dumps(meta, default=str).encode()
    path.write_bytes(content)
    words = chance.choice([FURTHER, [*SMALL, "--max-iters", "60", "--out", "new"]])
    outcome = trial.answer("bigram", *words, "--data", "prepared")
    if words is FURTHER and content != before and outcome == "survived":
        raise Lost("the run was resumed on another text")
    return outcome


def start_together(trial: Trial) -> str:
    """Start or resume a run several times at once."""
    chance, stage, base, run = trial.chance, trial.stage, trial.base, trial.work / "run"
    how = chance.choice(["one folder", "resume", "own folders"])
    seeds = [chance.choice([1, 2]) for _ in range(chance.randint(2, 3))]
    if how == "resume":
        first, seeds = trial.script(stage, *base.words(stage)), [1 for _ in seeds]
        while not run.exists() and first.process.poll() is None:
            time.sleep(0.001)
        first.end(kill_after=0)
    scripts, out = [], "" if how == "own folders" else "run"
    for seed in seeds:
        words = RESUME if how == "resume" else base.words(stage, seed, out)
        scripts.append(trial.script(stage, *words))
        time.sleep(chance.choice([0, 0, 0.05, base.seconds[stage] * 1.5]) * chance.random())
    outcomes = [script.outcome() for script in scripts]
    count = outcomes.count("survived")
    if how == "own folders":
        runs = {path: read_checkpoint(path / "checkpoint.pt") for path in run.parent.glob("runs/*")}
        found = {path: saved["seed"] for path, saved in runs.items()}
        if sorted(found.values()) != sorted(seeds):
            raise Lost(f"{seeds} were started, and there are runs with {found}")
        return [trial.compare(path, seed) for path, seed in found.items()][0]
    if count == 0 or (count > 1 and how != "resume"):  # one may resume when another is done
        raise Lost(f"of several at once, {count} trained")
    return trial.compare(run, seeds[outcomes.index("survived")])


def file_size(trial: Trial) -> str:
    """Limit the size of files during a run."""
    words, largest = trial.start(), trial.base.run(trial.stage) / "checkpoint.pt"
    size = trial.chance.randint(2048, largest.stat().st_size * 5 // 4)
    limits = size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    outcome = trial.script(trial.stage, *words, before=limited).outcome()
    trial.log[-1] += f"   # with files of at most {size} bytes"
    trial.complete()
    return outcome


def full_disk(trial: Trial) -> str:
    """Run on a small disk, then make it larger."""
    size = 4096 * trial.chance.randint(3, 40)
    mount(trial.work, f"size={size}")
    try:
        outcome = trial.script(trial.stage, *trial.base.words(trial.stage)).outcome()
        trial.log[-1] += f"   # on a disk of {size} bytes"
        mount(trial.work, "remount,size=64m")
        trial.complete()
    finally:
        shutil.copytree(trial.work, trial.folder / "disk")
        subprocess.run(["umount", trial.work], check=True)
    return outcome


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def output(trial: Trial) -> str:
    """Print to a full disk, or to a pipe that nobody reads."""
    to_disk = trial.chance.random() < 0.5

    def connect() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(os.open("/dev/full", os.O_WRONLY) if to_disk else writer, 1)

    script = trial.script(trial.stage, *trial.base.words(trial.stage), before=connect)
    trial.log[-1] += " > /dev/full" if to_disk else " | true"
    if script.outcome() != "survived":
        raise Lost(f"it stopped: {script.said!r}")
    return trial.compare(trial.work / "run", 1)


KINDS = {"kills": kill, "command-lines": command_line, "flips": flip, "mutations": mutation}
KINDS |= {"starts": start_together, "file-sizes": file_size, "full-disks": full_disk}
KINDS |= {"outputs": output}


def is_possible(kind: str, folder: Path) -> bool:
    """Whether this system and this user can cause that fault."""
    if kind != "full-disks":
        return {"file-sizes": resource, "outputs": os.path.exists("/dev/full")}.get(kind, True)
    try:
        mount(folder, "size=64k")
        return not subprocess.run(["umount", folder]).returncode
    except (OSError, subprocess.CalledProcessError):
        return False


def prepare_base(folder: Path) -> Base:
    """The text, undisturbed runs, and the flags of all scripts."""
    base, text, prepared = Base(folder), folder / "text.txt", folder / "prepared"
    lines = (f"Line {i}: the café is {i * 7 % 13} steps away — or is it?\n" for i in range(200))
    text.write_text("".join(lines), encoding="utf-8")
    trial = Trial(base, "setup", 1)

    def run(name: str, *words: object) -> str:
        script = trial.script(name, *words)
        failed, texts = script.process.wait(), [each.read_text("utf-8") for each in script.paths]
        if failed:
            raise SystemExit(f"without any fault, this fails: {trial.log[-1]}\n{texts[1]}")
        return texts[0]

    for name in [*STAGES, "sample", "prepare", "export", "compare"]:
        pattern = re.compile(r"^  (--[\w-]+)(?:, (--[\w-]+))? ?([A-Z{]\S*)?", re.MULTILINE)
        found = pattern.findall(run(name, "--help"))
        base.flags[name] = {flag: metavar for *names, metavar in found for flag in names if flag}
        base.flags[name].pop("--compile", None)  # compiling takes minutes
    for stage, seed in itertools.product(STAGES, (2, 1)):
        began = time.perf_counter()
        run(stage, *base.words(stage, seed, base.run(stage, seed)))
        base.seconds[stage] = time.perf_counter() - began
    run("prepare", text, "--out", prepared)
    run("bigram", *base.words("bigram", out=folder / "prepared-run"), "--data", prepared)
    return base


def attempt(trial: Trial, kind: str) -> tuple[str, int, str]:
    """The outcome of a try, how often it counts, and what went wrong."""
    try:
        outcome = KINDS[kind](trial)
        shutil.rmtree(trial.folder)
        return outcome, trial.tries, ""
    except Exception as error:  # a mistake in this file must not end the campaign
        why = str(error) if isinstance(error, Lost) else traceback.format_exc()
    outcome = "traceback" if "Traceback" in why else "lost"
    return outcome, 1, "\n    ".join([f"{outcome}: {why}", f"cd {trial.work}", *trial.log, ""])


def work(worker: int, base: Base, options: dict[str, Any]) -> None:
    """Every WORKERS-th try of each kind; the outcomes go to a file."""
    share = 60 * options["minutes"] / max(1, sum(options[kind] is None for kind in KINDS))
    for kind in KINDS:
        began, wanted, number, tried = time.monotonic(), options[kind], worker, worker
        while time.monotonic() < began + share if wanted is None else tried < wanted:
            found = attempt(Trial(base, f"{kind}-{number}", options["seed"]), kind)
            number, tried = number + WORKERS, tried + WORKERS * found[1]
            with (base.folder / f"outcomes-{worker}").open("a", encoding="utf-8") as file:
                file.write(json.dumps([kind, *found]) + "\n")
        if worker == 0:
            print(f"{kind}: done", file=sys.stderr)


def campaign(base: Base, options: dict[str, Any]) -> bool:
    """Let the workers try all kinds, and print what they found; whether all went well."""
    skipped = [kind for kind in KINDS if not is_possible(kind, base.folder / "setup")]
    options |= dict.fromkeys(skipped, 0)
    jobs = [functools.partial(work, worker, base, options) for worker in range(WORKERS)]
    workers = [Fork(job) for job in jobs] if FORKS else [job() for job in jobs]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the workers, not this
    codes = {worker.wait() for worker in filter(None, workers)} - {0, 130}
    paths = base.folder.glob("outcomes-*")
    found = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    columns, tally = ("tried", "survived", "refused", "lost", "traceback"), Counter()
    for kind, outcome, tries, _ in found:
        tally += Counter({(kind, outcome): tries, (kind, "tried"): tries})
    print(f"{'kind':14}", *(f"{column:>9}" for column in columns))
    for kind in KINDS:
        numbers = [f"{tally[kind, column]:,}" for column in columns]
        print(f"{kind:14}", *(f"{x:>9}" for x in (["skipped"] if kind in skipped else numbers)))
    print("", *(why for *_, why in found if why), sep="\n", end="")
    if codes:
        print(f"a worker ended with exit code {codes}: its last try was lost")
    return not codes and not any(why for *_, why in found)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    for kind, function in KINDS.items():
        parser.add_argument(f"--{kind}", dest=kind, type=int, metavar="N", help=function.__doc__)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    folder, went_well = Path(tempfile.mkdtemp(prefix="faults-")), True
    try:
        went_well = campaign(prepare_base(folder), options)
    except KeyboardInterrupt:
        time.sleep(2)  # until the script that was running has ended too
        sys.exit(130)
    finally:
        if went_well:
            shutil.rmtree(folder)
    if not went_well:
        sys.exit(f"kept: {folder}")


if __name__ == "__main__":
    main()
