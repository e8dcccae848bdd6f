"""Several processes, as torchrun starts them: the losses of one, and no quiet end for any."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL

import processes
from common import UserError
from run_folder import RUN_FILES

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="PyTorch for Windows lacks what torchrun meets through"
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="only /proc tells which process is which"
)

# Without dropout, for each process draws its own, and in the numbers that hide no small mistake.
EXACT = [*SMALL, *SMALL_MODEL["gpt"], *"--dropout 0 --precision float32 --device cpu".split()]
# Learning slowly: what rounding does to a sum must not grow, step by step, to another run.
LONG = "--max-iters 300 --eval-interval 10 --learning-rate 3e-4".split()
TIME_LIMIT = 90  # seconds; a start takes three Pythons that import PyTorch


@pytest.fixture
def torchrun(tmp_path: Path, text: Path) -> Iterator[Callable]:
    """Start a script in two processes; whatever still runs after the test is ended."""
    started = []

    def call(*flags: object, script: str | Path = "gpt") -> subprocess.Popen:
        words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        arguments = [str(flag) for flag in flags]
        if "--resume" not in arguments:
            arguments += ["--data", str(text)]
        process = subprocess.Popen(
            [sys.executable, *words, f"{ROOT / script}.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.terminate()  # it ends its two, by force after 30 seconds
            try:
                process.communicate(timeout=45)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def complaints(errors: str) -> list[str]:
    """Our own lines; torchrun adds a report of its own."""
    return [line for line in errors.splitlines() if line.startswith(("gpt.py: ", "bigram.py: "))]


def progress(folder: Path) -> list[list[float]]:
    """The rows of losses.csv, without their seconds."""
    with (folder / "losses.csv").open(encoding="utf-8") as file:
        return [[float(value) for value in row[:-1]] for row in list(csv.reader(file))[1:]]


def assert_same_progress(folder: Path, expected: Path) -> None:
    rows, expected_rows = progress(folder), progress(expected)
    assert [row[0] for row in rows] == [row[0] for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=0, abs=1e-4)


def wait_for_rows(log: Path, rows: int, process: subprocess.Popen) -> None:
    """Until the run has evaluated that often."""
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > rows:
            return
        time.sleep(0.01)
    process.terminate()
    pytest.fail(f"{log} never had {rows} rows: {process.communicate()}")


def process_of_rank(rank: int, folder: Path) -> int:
    """The number of the process with that rank in the run that writes to a folder."""
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


@pytest.mark.parametrize("portions", [1, 2])
def test_two_processes_learn_what_one_does(
    portions: int, torchrun: Callable, run: Callable, tmp_path: Path
) -> None:
    assert run("gpt", *EXACT, "--out", "one")[0] == 0
    process = torchrun(*EXACT, "--grad-accumulation", portions)
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, errors
    assert complaints(errors) == []

    # One folder, written by one of them, and no other.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gpt"]
    folder = tmp_path / "runs" / "gpt"
    assert {path.name for path in folder.iterdir()} == set(RUN_FILES)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["processes"] == 2
    assert_same_progress(folder, tmp_path / "one")
    states = [
        torch.load(path / "best.pt", weights_only=True) for path in (folder, tmp_path / "one")
    ]
    for name, weight in states[0]["model"].items():  # as one process names and has them
        torch.testing.assert_close(weight, states[1]["model"][name], rtol=0, atol=1e-3)

    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    assert output.endswith(sample + "\n")
    lines = output.removesuffix(sample + "\n").splitlines()
    beginnings = [" ".join(line.split()[:2]) for line in lines]
    assert beginnings == [
        "gpt: 2,272",
        "preset small,",
        "run folder",
        "step 0",
        "step 10",
        "step 20",
        "best validation",
        lines[-1].split()[0] + " ms",
    ]
    assert "on cpu in 2 processes" in lines[0]


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_the_run_can_go_on(
    rank: int, torchrun: Callable, run: Callable, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = torchrun(*EXACT, *LONG, "--out", killed)
    rows, moment = random.randint(2, 4), random.random() / 20
    print(f"killed {moment:.3f} s after row {rows}")  # shown if the test fails
    wait_for_rows(killed / "losses.csv", rows, process)
    time.sleep(moment)
    os.kill(process_of_rank(rank, killed), signal.SIGKILL)
    output, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "best validation loss" not in output, "it was not killed in time"
    assert complaints(errors) == [
        "gpt.py: another process of this run has ended, so this one stops too; if the run "
        "had begun, --resume goes on from its last checkpoint"
    ]
    assert 10 <= torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 300

    assert run("gpt", *EXACT, *LONG, "--out", whole)[0] == 0
    if rank == 0:
        both = tmp_path / "runs" / "gpt"  # which is resumed without being named
        shutil.copytree(killed, both)
        process = torchrun("--resume", "--sample-length", 20)
        output, errors = process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == 0, errors
        assert output.count("goes on after step") == 1
        assert_same_progress(both, whole)
    assert run("gpt", "--resume", "--out", killed, "--sample-length", 20)[0] == 0
    assert_same_progress(killed, whole)


@pytest.mark.parametrize("pressed", ["all", pytest.param("second", marks=needs_proc)])
def test_ctrl_c_stops_all_at_the_same_step(
    pressed: str, torchrun: Callable, run: Callable, tmp_path: Path
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = torchrun(*EXACT, *LONG, "--out", stopped)
    wait_for_rows(stopped / "losses.csv", 2, process)
    if pressed == "all":
        process.send_signal(signal.SIGINT)  # torchrun hands it on to both
    else:  # what only one of them has heard, it tells the other
        os.kill(process_of_rank(1, stopped), signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert complaints(errors) == []
    step = torch.load(stopped / "checkpoint.pt", weights_only=True)["step"]
    assert 10 <= step < 300
    (line,) = [line for line in output.splitlines() if line.startswith("stopped at step")]
    assert line.startswith(f"stopped at step {step}; to go on: ")

    assert run("gpt", "--resume", "--out", stopped, "--sample-length", 20)[0] == 0
    assert run("gpt", *EXACT, *LONG, "--out", whole)[0] == 0
    assert_same_progress(stopped, whole)


ENDS = """
import atexit, os, pathlib, sys

def count_threads():
    names = [task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    os.write(1, f"{sum('gloo_runloop' in name for name in names)} left\\n".encode())

atexit.register(count_threads)  # called after what is registered later
import torch
sys.path.insert(0, sys.argv[1])
import processes

processes.meet()
learning = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
os.write(1, f"the sum is {processes.total(torch.ones(1)).item()}\\n".encode())
count_threads()
"""


@needs_proc
def test_no_thread_that_talks_outlives_python(torchrun: Callable, tmp_path: Path) -> None:
    # Such a thread now and then wants Python back while that is ending, which aborts the process.
    (tmp_path / "ends.py").write_text(ENDS, encoding="utf-8")
    process = torchrun(ROOT, script=tmp_path / "ends")
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert lines.count("the sum is 2.0") == 2
    # Two of the four are PyTorch's for gradients: it never ends them, nor do they touch Python.
    assert lines.count("4 left") == lines.count("2 left") == 2


REFUSALS = [
    ("gpt", [*EXACT, "--batch-size", 3], "--batch-size 3 is no multiple of 2 processes"),
    (
        "bigram",
        SMALL,
        "bigram.py trains in one process: only gpt.py and modern_gpt.py share theirs",
    ),
]


@pytest.mark.parametrize(("script", "flags", "complaint"), REFUSALS)
def test_what_cannot_be_shared_out_is_refused_once(
    script: str, flags: list, complaint: str, torchrun: Callable, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    process = torchrun(*flags, script=script)
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode != 0
    (line,) = complaints(errors)
    assert line.startswith(f"{script}.py: {complaint}")
    assert output == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_explodes_is_told_once(torchrun: Callable, tmp_path: Path) -> None:
    process = torchrun(*EXACT, "--learning-rate", 1e38, "--out", "wild")
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode != 0
    (line,) = complaints(errors)
    assert line.startswith("gpt.py: the loss became nan at step ")
    assert "try a smaller --learning-rate" in line
    assert "wild keeps step 0 in checkpoint.pt and step 0 in best.pt" in line
    assert "best validation loss" not in output
    state = torch.load(tmp_path / "wild" / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["model"].values())


# What needs graphics cards is tried without them as far as it goes.


def test_no_more_processes_than_graphics_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COUNT", "COUNT_HERE"):
        monkeypatch.setattr(processes, name, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="has 2 graphics cards"):
        processes.own_device(torch.device("cuda"))


def test_a_macs_graphics_card_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.own_device(torch.device("mps")) == torch.device("mps")
    monkeypatch.setattr(processes, "COUNT", 2)
    with pytest.raises(UserError, match="in one process"):
        processes.own_device(torch.device("mps"))
