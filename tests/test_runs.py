"""A run from its first step to its sample: the same each time, whatever interrupts it."""

import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bigram
import gpt
import trainer.run
from trainer import Run
from sample import generate, load
from trainer.evaluate import exact_loss
from trainer.folder import RUN_FILES
from trainer.run import RULE

import pytest
import torch
from conftest import (
    SMALL,
    SMALL_MODEL,
    STAGES,
    TIME_LIMIT,
    files,
    finish,
    leaves,
    losses,
    same_state,
    start,
    table,
)

MANY = ["--max-iters", "300", "--eval-interval", "20"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in that step, once, whichever run is training."""
    batch, pressed = Run.batch, []

    def interrupted(self: Run, number: int) -> trainer.run.Batch:
        if number == step - 1 and not pressed:
            pressed.append(number)
            signal.raise_signal(signal.SIGINT)
        return batch(self, number)

    monkeypatch.setattr(Run, "batch", interrupted)


def assert_same_run(folder: Path, expected: Path) -> None:
    assert losses(folder) == losses(expected)
    for name in ("checkpoint.pt", "best.pt"):
        assert same_state(folder / name, expected / name), name
    assert (folder / "sample.txt").read_bytes() == (expected / "sample.txt").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_and_leaves_a_complete_run(stage, small_run, run, tmp_path, text):
    code, output, _ = small_run(stage)
    folder = tmp_path / "runs" / stage
    assert code == 0
    assert {path.name for path in folder.iterdir()} == set(RUN_FILES)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["stage"], config["seed"], config["corpus"]["name"]) == (stage, 1, "text")
    assert config["config"]["block_size"] == 8
    assert config["config"]["vocab_size"] == len(set(text.read_text(encoding="utf-8")))
    assert losses(folder)[0] == "step,train_loss,val_loss,learning_rate,tokens"
    rows = table(folder)
    assert [(row[0], row[4]) for row in rows] == [(0, 0), (10, 320), (20, 640)]
    assert all(math.isfinite(value) for row in rows for value in row)
    assert rows[-1][2] < rows[0][2]
    sample = (folder / "sample.txt").read_bytes().decode("utf-8")
    assert len(sample) == 1 + 20  # the prompt, a new line, and what was asked for
    assert f"\n{RULE}\n{sample}\n{RULE}\nnext: python sample.py " in output

    # best.pt is what sample.py needs, and no more.
    best, last = (
        torch.load(folder / name, weights_only=True) for name in ("best.pt", "checkpoint.pt")
    )
    assert list(best["parts"]) == ["model"]
    assert {"history", "model", "optimizer 0"} <= set(last["parts"])
    assert (best["step"], best["val_loss"]) == (20, pytest.approx(rows[-1][2], abs=1e-6))

    # A plain loop over the windows, with a loss per window, gives the loss of the last row.
    model, tokenizer = load(folder, "cpu")
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))
    ids = ids[len(ids) * 9 // 10 :]
    total = 0.0
    for at in range(0, len(ids) - 1, 8):
        idx, targets = ids[at : at + 8][: len(ids) - 1 - at], ids[at + 1 : at + 9]
        total += float(model(idx[None], targets[None])[1].detach()) * len(targets)
    tolerance = 2e-6 if config["dtype"] == "float32" else 0.01
    assert total / (len(ids) - 1) == pytest.approx(rows[-1][2], abs=tolerance)

    # And sample.py continues any prompt, the same each time.
    prompt = "Line 7: the café is 3 steps away — or is it? Line 8"
    flags = ["sample", folder, "--prompt", prompt, "--sample-length", 30]
    plain = prompt + "".join(generate(model, tokenizer, prompt, 30))
    assert len(plain) == len(prompt) + 30
    assert run(*flags) == (0, plain + "\n", "")
    assert run(*flags, "--seed", 2)[1] != plain + "\n"
    assert run(*flags, "--temperature", 0, "--seed", 2) == run(*flags, "--top-k", 1)


# Stopping and resuming.


@pytest.mark.parametrize(
    ("stage", "step"), [*((stage, 13) for stage in STAGES), ("gpt", 1), ("gpt", 9), ("bigram", 1)]
)
def test_a_stopped_run_resumes_bit_for_bit(stage, step, small_run, run, tmp_path, monkeypatch):
    assert small_run(stage, "--out", "whole")[0] == small_run(stage, "--seed", 2)[0] == 0
    assert losses(tmp_path / "whole") != losses(tmp_path / "runs" / stage)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        code, output, _ = small_run(stage, "--out", "stopped")
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    stopped_at = int(re.search(r"stopped at step (\d+)", output)[1])
    assert stopped_at in (step, step + 1)
    state = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert state["parts"]["history"]["step"] == stopped_at
    # Nothing in it is a generator's state: what is random depends on the seed and the step.
    assert torch.uint8 not in [each.dtype for each in leaves(state) if torch.is_tensor(each)]
    assert run(stage, "--resume", "--out", "stopped", "--sample-length", 20)[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def wait_for_rows(log: Path, rows: int, process: subprocess.Popen, limit: int = 90) -> None:
    """Until a process's run has evaluated that often."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > rows:
            return
        time.sleep(0.005)
    process.terminate()
    pytest.fail(f"{log} never had {rows} rows: {finish(process)}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bigram", "gpt", "modern_gpt"])
def test_a_killed_run_resumes_bit_for_bit(stage, small_run, run, tmp_path, text):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [*SMALL, *SMALL_MODEL[stage], *MANY, "--data", text, "--out", killed]
    chance = random.Random(stage)
    for _ in range(10):  # a small run can end before a busy machine lets us kill it
        process = start(stage, *flags, cwd=tmp_path)
        rows, moment = chance.randint(1, 4), chance.random() / 50
        print(f"killed {moment:.3f} s after row {rows}")  # shown if the test fails
        wait_for_rows(killed / "losses.csv", rows, process)
        time.sleep(moment)
        process.kill()
        if "best validation loss" not in finish(process)[1]:
            break
        shutil.rmtree(killed)
    else:
        pytest.fail("it was never killed in time")
    assert not (killed / "sample.txt").exists()
    assert run(stage, "--resume", "--out", killed, "--sample-length", 20)[0] == 0
    assert small_run(stage, *MANY, "--out", whole)[0] == 0
    assert_same_run(killed, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_which_says_how_to_resume(number, small_run, tmp_path):
    prompt = "-What's$HOME?\nA"  # which neither the shell nor argparse may take apart
    data = tmp_path / "quotes.txt"
    data.write_text(prompt * 100, encoding="utf-8")
    flags = [*SMALL, *SMALL_MODEL["gpt"], *MANY, "--data", data, f"--prompt={prompt}", "--top-k=5"]
    process = start("gpt", *flags, cwd=tmp_path)
    stopped = tmp_path / "runs" / "gpt"
    wait_for_rows(stopped / "losses.csv", 2, process)
    process.send_signal(number)
    code, output, errors = finish(process)
    assert code == 130
    assert "Traceback" not in errors
    step, command = re.search(r"stopped at step (\d+); .*?: (.+)", output, re.DOTALL).groups()
    assert 10 <= int(step) < 300

    options = {"shell": True, "cwd": tmp_path, "capture_output": True, "text": True}
    again = subprocess.run(command, timeout=TIME_LIMIT, **options)
    assert again.returncode == 0, again.stderr
    sample = (stopped / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith(prompt) and len(sample) == len(prompt) + 20
    assert small_run("gpt", *MANY, "--data", data, "--out", "whole")[0] == 0
    assert losses(stopped) == losses(tmp_path / "whole")
    assert same_state(stopped / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt")


def test_what_a_run_prints(small_run):
    code, output, _ = small_run("layer_norm", "--max-iters", 60, "--learning-rate", 0.1)
    before, sample, after = re.split(r"^-{72}\n", output, flags=re.MULTILINE)
    assert code == 0 and len(sample.strip("\n")) > 10
    assert max(map(len, before.splitlines())) <= 80
    rows = re.findall(r"^step .* validation (\S+) .*?( {2}\*)?$", before, re.MULTILINE)
    losses = [float(loss) for loss, _ in rows]
    best = [i > 0 and losses[i] == min(losses[: i + 1]) for i in range(len(rows))]
    assert [bool(star) for _, star in rows] == best and len(rows) == 7
    assert f"* best validation loss {min(losses):.4f}" in before
    assert re.match(r"next: python sample\.py runs.layer_norm --sample-length 2000", after)


def test_the_first_steps_are_evaluated_more_often(small_run, tmp_path):
    flags = ["--max-iters", 110, "--eval-interval", 50, "--out", "run"]
    assert small_run("bigram", *flags)[0] == 0
    assert [row[0] for row in table(tmp_path / "run")] == [0, 10, 30, 50, 100, 110]


def test_a_finished_run_can_go_further(small_run, run, tmp_path):
    assert small_run("layer_norm", "--out", "one")[0] == 0
    before = files(tmp_path / "one")
    assert run("layer_norm", "--resume", "--out", "one", "--sample-length", 20)[0] == 0
    assert files(tmp_path / "one").keys() == before.keys()
    assert small_run("layer_norm", "--out", "two", "--max-iters", 40)[0] == 0
    more = ["--resume", "--out", "one", "--max-iters", 40, "--sample-length", 20]
    assert run("layer_norm", *more)[0] == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    config = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert config["changed_on_resume"] == ["--max-iters"]


def test_a_run_whose_text_has_moved(small_run, run, text):
    assert small_run("bigram", "--out", "run")[0] == 0
    moved = text.rename(text.with_name("moved.txt"))
    more = ["--resume", "--out", "run", "--max-iters", 30]
    code, _, errors = run("bigram", *more)
    assert code == 2 and str(text) in errors
    assert run("bigram", *more, "--data", moved)[0] == 0


# Runs started from Python.


def gpt_run(*flags: object) -> tuple[Run, torch.nn.Module, torch.optim.Optimizer]:
    words = [*SMALL, *SMALL_MODEL["gpt"], *"--dropout 0.2 --data text.txt --device cpu".split()]
    run = Run(gpt.Config, gpt.PRESETS, [*words, *map(str, flags)], name="gpt")
    model = gpt.Model(run.config)
    return run, model, gpt.make_optimizer(model, run.config)


def steps(run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Train, and pause after each step."""
    for batch in run.batches(model, optimizer):
        optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(batch):
            with run.autocast():
                _, loss = model(idx, targets)
            (weight * loss).backward()
            run.log(loss)
        optimizer.step()
        yield run.step
    run.finish()


def test_two_runs_in_one_process_equal_each_run_alone(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"a": ["--seed", 1], "b": ["--seed", 2, "--max-iters", 30, "--batch-size", 6]}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(2)
    try:
        for out, own in flags.items():
            list(steps(*gpt_run(*own, "--out", f"{out} alone")))
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        # A step of one, a step of the other, until both are done.
        both = [steps(*gpt_run(*own, "--out", out)) for out, own in flags.items()]
        list(itertools.zip_longest(*both))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for out in flags:
        assert_same_run(tmp_path / out, tmp_path / f"{out} alone")


def test_randomness_is_a_function_of_seed_step_and_rank(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def drawn(seed: int, step: int, rank: int) -> tuple[list[int], list[float]]:
        run, _, _ = gpt_run("--seed", seed)
        run.world.rank = rank
        torch.rand(17)  # what was drawn before does not matter
        return run.batch(step)[0].tolist(), torch.rand(3).tolist()

    first = drawn(1, 5, 0)
    assert drawn(1, 5, 0) == first
    for other in (drawn(2, 5, 0), drawn(1, 6, 0)):
        assert other[0] != first[0] and other[1] != first[1]
    assert drawn(1, 5, 1)[1] != first[1]


def test_a_run_needs_no_command_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    run = Run(bigram.Config, argv=["--max-iters", "3", "--data", str(text)], name="mine")
    model = bigram.Model(run.config)
    optimizer = torch.optim.AdamW(model.parameters())
    for idx, targets in run.batches(model, optimizer):
        assert run.saved is None
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        run.log(loss)
    run.finish()
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} == set(RUN_FILES)


def test_a_resumed_run_frees_its_checkpoint_and_leaves_the_model_alone(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(steps(*gpt_run("--out", "run")))
    run, model, optimizer = gpt_run("--resume", "--out", "run", "--max-iters", 40)
    assert run.saved is not None
    finish = run.finish
    monkeypatch.setattr(run, "finish", lambda: None)  # later
    for _ in steps(run, model, optimizer):
        assert run.saved is None
        for group in optimizer.param_groups:
            group["lr"] = 1.0  # so that the last weights are not the best
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    strides = [weight.stride() for weight in model.parameters()]
    finish()
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.stride() for weight in model.parameters()] == strides


@pytest.mark.parametrize("training", [True, False])
def test_the_exact_loss_leaves_the_mode_as_it_was(training):
    model = gpt.Model(gpt.Config(n_embd=8, n_head=2, n_layer=1, block_size=4, dropout=0.5))
    model.train(training)
    tokens = torch.randint(65, (50,))
    assert exact_loss(model, tokens) == exact_loss(model, tokens)  # and no dropout inside
    assert model.training is training


# The folder.


def test_without_out_each_run_gets_its_own_folder(small_run, run, tmp_path):
    runs = tmp_path / "runs"
    assert small_run("bigram")[0] == 0
    first = files(runs / "bigram")
    assert str(Path("runs", "bigram-2")) in small_run("bigram", "--seed", 2)[1]
    assert str(Path("runs", "bigram-3")) in small_run("bigram")[1]
    assert files(runs / "bigram") == first

    # --resume by itself takes up the newest, --overwrite replaces the first.
    assert str(Path("runs", "bigram-3")) in run("bigram", "--resume")[1]
    assert small_run("bigram", "--overwrite", "--seed", 3)[0] == 0
    assert json.loads((runs / "bigram" / "config.json").read_text(encoding="utf-8"))["seed"] == 3
    assert len(list(runs.iterdir())) == 3


def test_overwriting_takes_nothing_but_the_run(small_run, tmp_path):
    folder = tmp_path / "mine"
    assert small_run("bigram", "--out", folder)[0] == 0
    (folder / "notes.txt").write_text("keep me", encoding="utf-8")
    (folder / "film.mkv.part").write_bytes(b"the reader's own")
    (folder / "checkpoint.pt.part").write_bytes(b"left by a killed process")
    assert small_run("bigram", "--out", folder, "--overwrite", "--seed", 2)[0] == 0
    expected = {*RUN_FILES, "notes.txt", "film.mkv.part"}
    assert {path.name for path in folder.iterdir()} == expected
