"""A run from its first step to its sample: the same each time, whatever interrupts it."""

import contextlib
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL, STAGES, losses, same_state, start

import bigram
import common
import training
from sample import generate, load


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_and_leaves_a_complete_run(
    stage: str, small_run: Callable, tmp_path: Path, text: Path
) -> None:
    code, output, _ = small_run(stage)
    folder = tmp_path / "runs" / stage
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "losses.csv",
        "checkpoint.pt",
        "best.pt",
        "sample.txt",
    }
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert settings["stage"] == stage
    assert settings["seed"] == 1
    assert settings["corpus"]["name"] == "text"
    assert settings["config"]["block_size"] == 8
    assert settings["config"]["vocab_size"] == len(set(text.read_text(encoding="utf-8")))
    with (folder / "losses.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "step train_loss val_loss learning_rate tokens seconds".split()
    assert [int(row["step"]) for row in rows] == [0, 10, 20]
    assert [int(row["tokens"]) for row in rows] == [0, 320, 640]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    sample = (folder / "sample.txt").read_bytes().decode("utf-8")
    assert len(sample) == 1 + 20  # the prompt, a new line, and what was asked for
    assert output.endswith(sample + "\n")


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_run(stage: str, small_run: Callable, tmp_path: Path) -> None:
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert small_run(stage, "--out", out, "--seed", seed)[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert same_state(tmp_path / "a" / "checkpoint.pt", tmp_path / "b" / "checkpoint.pt")
    assert not same_state(tmp_path / "a" / "checkpoint.pt", tmp_path / "c" / "checkpoint.pt")


LONG = ["--max-iters", "800", "--eval-interval", "40"]


def wait_for_rows(log: Path, rows: int) -> None:
    """Until a run that goes on beside us has evaluated that often."""
    for _ in range(3000):
        if log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > rows:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{log} never had {rows} rows")


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_bit_for_bit(
    stage: str, small_run: Callable, run: Callable, tmp_path: Path, text: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [*SMALL, *SMALL_MODEL[stage], *LONG, "--data", text, "--out", killed]
    for _ in range(10):  # a small run can end before a busy machine lets us kill it
        process = start(stage, *flags, cwd=tmp_path)
        rows, moment = random.randint(1, 4), random.random() / 50
        print(f"killed {moment:.3f} s after row {rows}")  # shown if the test fails
        wait_for_rows(killed / "losses.csv", rows)
        time.sleep(moment)
        process.kill()
        output, _ = process.communicate()
        if "best validation loss" not in output:
            break
        shutil.rmtree(killed)
    else:
        pytest.fail("it was never killed in time")

    assert run(stage, "--resume", "--out", killed, "--sample-length", 20)[0] == 0
    assert small_run(stage, *LONG, "--out", whole)[0] == 0
    assert losses(killed) == losses(whole)
    for name in ("checkpoint.pt", "best.pt"):
        assert same_state(killed / name, whole / name)
    assert (killed / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no way to send a Ctrl-C there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    number: int, small_run: Callable, tmp_path: Path, text: Path
) -> None:
    flags = [*SMALL, *SMALL_MODEL["gpt"], *LONG, "--data", text, "--prompt", "Line 7", "--top-k", 5]
    process = start("gpt", *flags, cwd=tmp_path)
    stopped = tmp_path / "runs" / "gpt"
    wait_for_rows(stopped / "losses.csv", 2)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == "stopping after this step; once more stops at once"
    last_line = output.splitlines()[-1]
    step, command = re.fullmatch(r"stopped at step (\d+); to go on: (.+)", last_line).groups()
    assert int(step) == torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] < 800

    again = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"goes on after step {step}" in again.stdout
    sample = (stopped / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("Line 7") and len(sample) == len("Line 7") + 20
    assert small_run("gpt", *LONG, "--out", "whole")[0] == 0
    assert losses(stopped) == losses(tmp_path / "whole")
    assert same_state(stopped / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt")


def test_a_finished_run_can_go_further(small_run: Callable, run: Callable, tmp_path: Path) -> None:
    assert small_run("layer_norm", "--out", "one")[0] == 0
    assert small_run("layer_norm", "--out", "two", "--max-iters", 40)[0] == 0
    code, output, _ = run("layer_norm", "--resume", "--out", "one")
    assert code == 0
    assert "--max-iters above 20" in output
    assert run("layer_norm", "--resume", "--out", "one", "--max-iters", 40)[0] == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert same_state(tmp_path / "one" / "checkpoint.pt", tmp_path / "two" / "checkpoint.pt")


def test_without_out_each_run_gets_its_own_folder(
    small_run: Callable, run: Callable, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert "taken" not in small_run("bigram")[1]
    first = (runs / "bigram" / "checkpoint.pt").read_bytes()
    assert f"goes to {Path('runs', 'bigram-2')}" in small_run("bigram", "--seed", 2)[1]
    (runs / "bigram-2" / "sample.txt").unlink()  # as if it had been stopped
    output = small_run("bigram")[1]
    command = f"bigram.py --resume --out {Path('runs', 'bigram-2')}"
    assert f"goes to {Path('runs', 'bigram-3')}" in output
    (line,) = [line for line in output.splitlines() if "unfinished" in line]
    assert line.endswith(command)
    assert (runs / "bigram" / "checkpoint.pt").read_bytes() == first

    # --resume by itself takes up the newest, --overwrite replaces the first.
    assert f"run folder {Path('runs', 'bigram-3')}" in run("bigram", "--resume")[1]
    assert small_run("bigram", "--overwrite", "--seed", 3)[0] == 0
    assert json.loads((runs / "bigram" / "config.json").read_text(encoding="utf-8"))["seed"] == 3
    assert len(list(runs.iterdir())) == 3


def test_what_a_killed_process_left_half_written_goes(small_run: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint.pt.part").write_bytes(b"half")
    (tmp_path / "mine" / "film.mkv.part").write_bytes(b"the reader's own")
    assert small_run("bigram", "--out", "mine")[0] == 0
    assert [path.name for path in (tmp_path / "mine").glob("*.part")] == ["film.mkv.part"]


def test_overwriting_takes_nothing_but_the_run(small_run: Callable, tmp_path: Path) -> None:
    assert small_run("bigram", "--out", "mine")[0] == 0
    notes = tmp_path / "mine" / "notes.txt"
    notes.write_text("keep me", encoding="utf-8")
    assert small_run("bigram", "--out", "mine", "--overwrite", "--seed", 2)[0] == 0
    assert notes.read_text(encoding="utf-8") == "keep me"


def test_the_best_state_is_kept_when_the_last_is_worse(
    small_run: Callable, run: Callable, tmp_path: Path
) -> None:
    """A learning rate that soon overshoots: the last evaluation is not the best one."""
    assert small_run("feed_forward", "--out", "wild", "--learning-rate", 0.5)[0] == 0
    rows = losses(tmp_path / "wild")[1:]
    best = min(rows, key=lambda row: float(row.split(",")[2]))
    assert best != rows[-1]
    saved = torch.load(tmp_path / "wild" / "best.pt", weights_only=True)
    assert saved["step"] == int(best.split(",")[0])
    sample = (tmp_path / "wild" / "sample.txt").read_text(encoding="utf-8")
    assert run("sample", "wild", "--sample-length", 20)[1] == sample + "\n"


@pytest.mark.parametrize("stage", STAGES)
def test_sample_continues_a_run_from_a_prompt(
    stage: str, small_run: Callable, run: Callable, tmp_path: Path
) -> None:
    assert small_run(stage, "--out", "run")[0] == 0

    def sample(*flags: object) -> str:
        code, output, errors = run("sample", "run", "--sample-length", 30, *flags)
        assert code == 0, errors
        return output.removesuffix("\n")

    prompt = "Line 7: the café is 3 steps away — or is it? Line 8"
    plain = sample("--prompt", prompt)
    assert plain.startswith(prompt)
    assert len(plain) == len(prompt) + 30
    assert sample("--prompt", prompt) == plain
    assert sample("--prompt", prompt, "--seed", 2) != plain
    greedy = sample("--prompt", prompt, "--temperature", 0)
    assert greedy == sample("--prompt", prompt, "--temperature", 0, "--seed", 2)
    assert greedy == sample("--prompt", prompt, "--top-k", 1)

    model, tokenizer = load("run")
    assert prompt + "".join(generate(model, tokenizer, prompt, 30)) == plain


def test_sampling_streams(small_run: Callable, tmp_path: Path) -> None:
    """The first characters of a long text are there long before the last."""
    assert small_run("bigram", "--out", "run")[0] == 0
    process = start("sample", "run", "--sample-length", 10_000_000, cwd=tmp_path)
    assert len(process.stdout.read(100)) == 100
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_gpt_chooses_its_preset_by_the_device_and_says_so(run: Callable) -> None:
    flags = "--device cpu --max-iters 400 --n-embd 8 --n-layer 1 --eval-interval 400".split()
    code, output, _ = run("gpt", *flags, "--sample-length", 5)
    assert code == 0
    assert output.count("preset small, chosen for cpu: about ") == 1


def test_a_resumed_run_computes_with_as_many_threads(
    small_run: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads would mean other sums; and whoever called the run gets theirs back."""
    stepping, evaluating = [], []
    draw_batch, exact_loss = training.draw_batch, training.exact_loss

    def watched_draw_batch(*arguments: object) -> object:
        stepping.append(torch.get_num_threads())
        return draw_batch(*arguments)

    def watched_exact_loss(*arguments: object) -> float:
        evaluating.append(torch.get_num_threads())
        return exact_loss(*arguments)

    monkeypatch.setattr(training, "draw_batch", watched_draw_batch)
    monkeypatch.setattr(training, "exact_loss", watched_exact_loss)
    torch.set_num_threads(3)
    try:
        assert small_run("residual", "--out", "run")[0] == 0
        assert run("residual", "--resume", "--out", "run", "--max-iters", 30)[0] == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert set(stepping) == {1}
    assert set(evaluating) == {3}


def test_a_run_whose_text_has_moved(small_run: Callable, run: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    assert small_run("bigram", "--out", "run")[0] == 0
    text.rename(tmp_path / "moved.txt")
    more = ["--resume", "--out", "run", "--max-iters", 30]
    code, _, errors = run("bigram", *more)
    assert code == 2
    assert f"cannot read the text {text}" in errors
    assert run("bigram", *more, "--data", tmp_path / "moved.txt")[0] == 0


def test_pocket_play_tells_how_far_there_is_to_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "DATA", tmp_path)
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/nobody-here")
    monkeypatch.setattr(sys, "argv", ["bigram.py", "--max-iters", "3", "--sample-length", "5"])
    monkeypatch.chdir(tmp_path)
    bigram.main()
    output, errors = capsys.readouterr()
    assert "NO TINY SHAKESPEARE" in errors
    assert "below which no model gets on average: 0.4810" in output
    settings = json.loads(Path("runs", "bigram", "config.json").read_text(encoding="utf-8"))
    assert settings["corpus"]["name"] == "pocket_play"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_every_line_stands_alone(tmp_path: Path, text: Path) -> None:
    """The progress bar must not run into the lines."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    mine, theirs = pty.openpty()
    # Without a size the bar would draw nothing, and nothing could collide with it.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, ROOT / "gpt.py", *SMALL, *SMALL_MODEL["gpt"], "--data", text]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=one_thread, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that it is over
        while piece := os.read(mine, 65536):
            received += piece
    assert process.wait() == 0
    assert b"20/20" in received  # the bar was there
    # What stays on the screen of a line is what follows its last carriage return.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in received.decode().split("\n")]
    for beginning in (
        "gpt: ",
        "run folder ",
        "step     0 ",
        "step    20 ",
        "preset small",
        "best validation loss",
    ):
        assert any(line.startswith(beginning) for line in lines), lines
