"""What the tests share: a text to learn from, and ways to run a script as a reader would."""

import hashlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer import cli
from compare import STAGES

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = "--max-iters 20 --eval-interval 10 --batch-size 4 --block-size 8 --sample-length 20".split()
SMALL_MODEL = {stage: ["--n-embd", "8"] for stage in STAGES}
SMALL_MODEL["bigram"] = []
SMALL_MODEL["gpt"] = "--n-embd 8 --n-head 2 --n-layer 2 --dropout 0.1 --warmup-iters 5".split()
SMALL_MODEL["modern_gpt"] = SMALL_MODEL["gpt"]

COMPARE_STEPS = 20
COMPARE = f"--data text.txt --max-iters {COMPARE_STEPS} --device cpu --sample-length 50".split()

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    "microsoft-edge",
)
TIME_LIMIT = 300  # seconds that a process of a test may take

torch.set_num_threads(1)  # the models here are tiny
os.environ["COLUMNS"] = "160"  # lines break by the width of the terminal
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit it


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text with a few characters that one byte cannot hold."""
    path = tmp_path / "text.txt"
    lines = (f"Line {i}: the café is {i * 7 % 13} steps away — or is it?\n" for i in range(200))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable:
    """Call a script with flags, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *flags: object) -> tuple[int, str, str]:
        arguments = [str(flag) for flag in flags]
        if script in STAGES and "--data" not in arguments and "--resume" not in arguments:
            arguments += ["--data", str(text)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        capsys.readouterr()
        try:
            cli(importlib.import_module(script).main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def small_run(run: Callable) -> Callable:
    """The same, with a stage so small that it trains in a moment."""

    def call(stage: str, *flags: object) -> tuple[int, str, str]:
        return run(stage, *SMALL, *SMALL_MODEL[stage], *flags)

    return call


def start(script: str, *flags: object, cwd: Path, threads: int = 1) -> subprocess.Popen:
    """Start a script as its own process."""
    return subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *(str(flag) for flag in flags)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process, but not forever: exit code, output, errors."""
    try:
        output, errors = process.communicate(timeout=TIME_LIMIT)
    finally:
        process.kill()
    return process.returncode, output, errors


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, all stages trained on it with two seeds, and their comparison."""
    folder = tmp_path_factory.mktemp("trained")
    lines = (f'{i}: <script>alert({i * 7 % 13})</script> & "é"\n' for i in range(300))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    code, output, errors = finish(start("compare", *COMPARE, "--seeds", 2, cwd=folder, threads=2))
    assert (code, errors) == (0, ""), errors
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    """Everything in a folder, to see that it stays as it is."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[str]:
    """The rows of losses.csv without their seconds, the one column that may differ."""
    lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines()
    return [line.rpartition(",")[0] for line in lines]


def table(folder: Path) -> list[list[float]]:
    """The rows of losses.csv as numbers, without their seconds."""
    return [[float(value) for value in row.split(",")] for row in losses(folder)[1:]]


def same_state(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights and optimizer state, bit for bit."""
    tensors = []
    for path in (first, second):
        parts = torch.load(path, weights_only=True)["parts"]
        states = [state for name, state in parts.items() if name != "history"]
        tensors.append(list(leaves(states)))
    return len(tensors[0]) == len(tensors[1]) and all(map(equal, *tensors))


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint that a test has changed, with the right SHA-256 at its end."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def leaves(state: Any) -> Iterator[Any]:
    """Everything in nested dictionaries and lists."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for each in state:
            yield from leaves(each)
    else:
        yield state


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright_api.sync_playwright() as playwright:
        try:  # without a path, Chrome where its installer puts it on this system
            channel = None if path else "chrome"
            browser = playwright.chromium.launch(executable_path=path, channel=channel)
        except playwright_api.Error as error:
            pytest.skip(f"there is no Chromium or Chrome to look at pages with: {error}")
        yield browser
        browser.close()
