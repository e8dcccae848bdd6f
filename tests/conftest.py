"""What the tests share: a text to learn from, and a way to run a script as a reader would."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Error, sync_playwright

ROOT = Path(__file__).parent.parent
STAGES = (
    "bigram",
    "self_attention",
    "multihead_attention",
    "feed_forward",
    "residual",
    "layer_norm",
    "gpt",
    "modern_gpt",
)
SMALL = "--max-iters 20 --eval-interval 10 --batch-size 4 --block-size 8 --sample-length 20".split()
SMALL_MODEL = {stage: ["--n-embd", "8"] for stage in STAGES}
SMALL_MODEL["bigram"] = []
SMALL_MODEL["gpt"] = "--n-embd 8 --n-head 2 --n-layer 2 --dropout 0.1 --warmup-iters 5".split()
SMALL_MODEL["modern_gpt"] = SMALL_MODEL["gpt"]

COMPARE_STEPS = 20
COMPARE = [
    "--data",
    "text.txt",
    "--max-iters",
    COMPARE_STEPS,
    "--device",
    "cpu",
    "--sample-length",
    50,
]

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    "microsoft-edge",
)

torch.set_num_threads(1)  # the models here are tiny
os.environ["COLUMNS"] = "160"  # how wide a terminal is decides where lines are broken


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
    """Call a script's `main` with flags, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *flags: object) -> tuple[int, str, str]:
        arguments = [str(flag) for flag in flags]
        if script in STAGES and "--data" not in arguments and "--resume" not in arguments:
            arguments += ["--data", str(text)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        capsys.readouterr()
        try:
            importlib.import_module(script).main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def small_run(run: Callable) -> Callable:
    """The same with the sizes of a stage so small that it trains in a moment."""

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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, all stages trained on it with two seeds, and their comparison."""
    folder = tmp_path_factory.mktemp("trained")
    lines = (f'{i}: <script>alert({i * 7 % 13})</script> & "é"\n' for i in range(300))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    process = start("compare", *COMPARE, "--seeds", 2, cwd=folder, threads=2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors == ""
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    """Everything in a folder, to see that it stays as it is."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[str]:
    """The rows of losses.csv without their seconds, the one column that may differ."""
    lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines()
    return [line.rpartition(",")[0] for line in lines]


def same_state(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights and optimizer state, bit for bit."""
    states = [torch.load(path, weights_only=True) for path in (first, second)]
    tensors = [
        [*state["model"].values()]
        + [
            value
            for optimizer in state["optimizers"]
            for entry in optimizer["state"].values()
            for value in entry.values()
        ]
        + [state["batch_state"], state["device_state"]]
        for state in states
    ]
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:  # without a path, Chrome where its installer puts it on this system
            channel = None if path else "chrome"
            browser = playwright.chromium.launch(executable_path=path, channel=channel)
        except Error as error:
            pytest.skip(f"there is no Chromium or Chrome to look at pages with: {error}")
        yield browser
        browser.close()
