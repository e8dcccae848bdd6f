"""Several processes, started by torchrun: the losses of one, and nobody is left waiting."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trainer.machine
import trainer.run
from trainer import UserError
from trainer.distributed import World
from trainer.folder import RUN_FILES
from trainer.machine import available_device
from trainer.run import RULE

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL, TIME_LIMIT, finish
from test_bad_input import refusal
from test_runs import assert_same_run, table, wait_for_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="PyTorch for Windows lacks gloo")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="only /proc shows which process is which"
)

# Without dropout, which depends on the rank, and in the dtype that hides no small mistake.
EXACT = [*SMALL, *SMALL_MODEL["gpt"], *"--dropout 0 --precision float32 --device cpu".split()]
RANDOM = "--dropout 0.2 --max-iters 200 --eval-interval 10 --data text.txt".split()
RANDOM = [*EXACT, *RANDOM]


def processes(function: Callable) -> Callable:
    """Mark a test that starts torchrun."""
    return pytest.mark.torchrun(pytest.mark.slow(function))


class Torchrun:
    """Starts scripts in two processes, in a folder; at the end, whatever still runs is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []

    def __call__(self, *flags: object, script: str | Path = ROOT / "gpt.py") -> subprocess.Popen:
        words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        process = subprocess.Popen(
            [sys.executable, *words, script, *map(str, flags)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()  # it ends its two, by force after 30 seconds
                finish(process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with dropout that nobody interrupts, in a folder with its text."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text("".join(f"{i}: {i * 7 % 13}!\n" for i in range(300)))
    code, _, errors = finish(Torchrun(folder)(*RANDOM, "--out", "whole"))
    assert code == 0, errors
    return folder / "whole"


@pytest.fixture
def torchrun(whole: Path) -> Iterator[Torchrun]:
    torchrun = Torchrun(whole.parent)
    yield torchrun
    torchrun.end()


def complaints(errors: str) -> list[str]:
    """Our own lines; torchrun adds a report of its own."""
    return [line for line in errors.splitlines() if re.match(r"\w+\.py: ", line)]


def process_of_rank(rank: int, folder: Path) -> int:
    """The id of the process with that rank in the run that writes to a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is somebody else's
            continue
        if str(folder).encode() in command and f"RANK={rank}".encode() in environment:
            found.append(int(path.name))
    (number,) = found
    return number


@processes
def test_two_processes_learn_what_one_does(torchrun, run, text, tmp_path):
    assert run("gpt", *EXACT, "--out", "one")[0] == 0
    code, output, errors = finish(torchrun(*EXACT, "--grad-accumulation", 2, "--data", text))
    assert code == 0, errors
    assert complaints(errors) == []

    # One folder, written by one of them, and no other; each line is printed once.
    folder = torchrun.folder / "runs" / "gpt"
    assert list(folder.parent.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == set(RUN_FILES)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["processes"] == 2
    for beginning in ("gpt: 2,272", "run folder", "step     0", "step    20", r"\* best"):
        assert len(re.findall(f"^{beginning}", output, re.MULTILINE)) == 1, output
    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    assert f"\n{RULE}\n{sample}\n{RULE}\n" in output

    for row, expected in zip(table(folder), table(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=0, abs=1e-4)
    paths = [each / "best.pt" for each in (folder, tmp_path / "one")]
    states = [torch.load(path, weights_only=True)["parts"]["model"] for path in paths]
    torch.testing.assert_close(*states, rtol=0, atol=1e-3)


@processes
@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_the_run_can_be_resumed(rank, whole, torchrun):
    killed, chance = whole.parent / f"killed {rank}", random.Random(rank)
    process = torchrun(*RANDOM, "--out", killed)
    rows, moment = chance.randint(2, 4), chance.random() / 20
    print(f"killed {moment:.3f} s after row {rows}")  # shown if the test fails
    wait_for_rows(killed / "losses.csv", rows, process)
    time.sleep(moment)
    os.kill(process_of_rank(rank, killed), signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "best validation loss" not in output, "it was not killed in time"
    (line,) = complaints(errors)
    assert line.startswith("gpt.py: another process") and "--resume" in line
    assert 'gpt.py", line' not in errors  # no traceback but torchrun's own
    assert 10 <= step_of(killed) < 200
    if rank == 0:
        code, _, errors = finish(torchrun("--resume", "--out", killed, "--sample-length", 20))
        assert code == 0, errors
        assert_same_run(killed, whole)


def step_of(folder: Path) -> int:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state["parts"]["history"]["step"]


@processes
@pytest.mark.parametrize("to", ["all", pytest.param("second", marks=needs_proc)])
def test_a_signal_stops_all_at_the_same_step(to, whole, torchrun):
    stopped = whole.parent / f"stopped {to}"
    process = torchrun(*RANDOM, "--out", stopped)
    wait_for_rows(stopped / "losses.csv", 2, process)
    if to == "all":
        process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    else:  # what only one of them knows, it shares with the other
        os.kill(process_of_rank(1, stopped), signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert complaints(errors) == []
    assert 10 <= step_of(stopped) < 200
    assert re.findall(r"^stopped at step (\d+)", output, re.MULTILINE) == [str(step_of(stopped))]
    if to == "all":  # and the resumed run is the whole one, dropout included
        code, _, errors = finish(torchrun("--resume", "--out", stopped, "--sample-length", 20))
        assert code == 0, errors
        assert_same_run(stopped, whole)


# What can go wrong, and how the processes end.

WORLD = """
import atexit, os, pathlib, sys

def count_threads():
    names = [task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    os.write(1, f"{sum('gloo' in name for name in names)} left\\n".encode())

atexit.register(count_threads)  # called after what is registered later
sys.path.insert(0, sys.argv[1])
from trainer import cli
from trainer.distributed import World
import torch

def main():
    world = World()
    assert world.broadcast(f"from {world.rank}") == "from 0"
    assert world.on_main(lambda: world.rank) == 0
    assert world.all_reduce(torch.tensor([1.0, world.rank])).tolist() == [2, 1]
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # this loads torch._dynamo
    model.weight.grad = torch.tensor([[1.0, 2.0]]) * (1 + world.rank)
    world.average_gradients(model)
    assert world.any([world.rank == 1, False]) == [True, False] and model.bias.grad is None
    assert model.weight.grad.tolist() == [[1.5, 3.0]]
    print("all is well", flush=True)
    if len(sys.argv) > 2:
        world.on_main(lambda: {}["a key that nobody expected"])

cli(main)
"""


@processes
@needs_proc
def test_processes_exchange_data_and_leave_no_thread_behind(torchrun, tmp_path):
    # A thread of gloo's that outlives Python now and then aborts the process.
    (tmp_path / "world.py").write_text(WORLD, encoding="utf-8")
    code, output, errors = finish(torchrun(ROOT, script=tmp_path / "world.py"))
    assert code == 0, errors
    assert output.count("all is well") == 2
    assert output.count("0 left") == 2


@processes
def test_an_unexpected_error_on_the_main_rank_ends_all(torchrun, tmp_path):
    (tmp_path / "world.py").write_text(WORLD, encoding="utf-8")
    process = torchrun(ROOT, "fail", script=tmp_path / "world.py")
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode != 0
    assert output.count("all is well") == 2
    messages = re.findall(r"^(?:\[rank\d\]: )?KeyError: .*", errors, re.MULTILINE)
    assert len(messages) == 1, errors
    assert complaints(errors) == []  # the other prints nothing


@processes
def test_a_loss_that_explodes_is_reported_once(torchrun, text, tmp_path):
    flags = [*EXACT, "--learning-rate", 1e38, "--data", text, "--out", tmp_path / "wild"]
    code, output, errors = finish(torchrun(*flags))
    assert code != 0
    (line,) = complaints(errors)
    assert "nan at step" in line and "--learning-rate" in line
    assert "best validation loss" not in output
    state = torch.load(tmp_path / "wild" / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["parts"]["model"].values())


# What two processes would refuse, tried in one.


class Two(World):
    """The first of two processes, without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.local_size = 2

    def broadcast(self, value: object) -> object:
        return value


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [("gpt", [*EXACT, "--batch-size", 3], "--batch-size"), ("bigram", SMALL, "torchrun")],
)
def test_what_cannot_be_divided_is_refused(script, flags, named, run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.run, "World", Two)
    assert named in refusal(run, tmp_path, script, *flags)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_no_more_processes_than_gpus(kind, monkeypatch):
    monkeypatch.setattr(trainer.machine, "pick_device", lambda _="auto": torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(kind == "cuda"))
    assert available_device("auto", World()) == torch.device(kind)
    with pytest.raises(UserError, match="--device cpu"):
        available_device("auto", Two())
