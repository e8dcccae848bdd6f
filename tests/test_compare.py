"""The comparison: real runs, trained by compare.py itself, then tampered with in every way."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMPARE, COMPARE_STEPS, ROOT, STAGES, files, losses, start
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import common
from compare import jobs_for
from comparison.curves import AXES, LABEL_SIZE, THEMES, apart, draw
from comparison.runs import RUNGS, Found, Terms, find_runs
from comparison.table import Result, as_text, gain, lines_of, read_results, table
from data import pocket_play

NAMES = [rung.name for rung in RUNGS if not rung.flags.endswith((" full", " middle"))]
OUTPUTS = {"losses.csv", "table.md", "curves.svg", "curves-dark.svg", "curves.png", "report.html"}


@pytest.fixture
def compare(trained: Path, tmp_path: Path, run: Callable) -> Callable:
    """Compare once more, in a copy of that folder; `tmp_path` is the copy."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def call(*flags: object) -> tuple[int, str, str]:
        return run("compare", *COMPARE, *flags)

    return call


@pytest.fixture
def found(trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Sort the runs in a copy of that folder; `tmp_path` is the copy."""
    text.unlink()  # that of the other tests gives way to the one in the folder
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call() -> Found:
        corpus = common.load_corpus(Path("text.txt"))
        terms = Terms(corpus, "cpu", seeds=range(1, 3), max_iters=COMPARE_STEPS)
        return find_runs(terms, Path("runs", "compare"))

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "losses.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_folder(folder: Path, name: str) -> Path:
    return folder / "runs" / "compare" / "text" / f"{name}-{COMPARE_STEPS}-steps-seed-1"


# Training what is missing.


def test_every_stage_and_variant_is_trained_with_every_seed(trained: Path) -> None:
    out = trained / "runs" / "compare" / "text"
    assert {path.name for path in out.iterdir() if path.is_file()} == OUTPUTS
    assert not list(trained.rglob("*.part"))
    found = [(f"{row['stage']} {row['flags']}".strip(), row["seed"]) for row in rows(out)]
    assert found == [(name, seed) for name in NAMES for seed in ("1", "2")]
    output = (trained / "output.txt").read_text(encoding="utf-8")
    assert "runs on text: 20 to train, 0 there already" in output
    for name, seed in found:
        assert f"] {name}, seed {seed}: validation loss " in output
    assert "/20] gpt --preset small, seed 1: " in output.partition("[15/20]")[2]  # large, so late
    assert "left out" not in output


def test_a_run_of_a_comparison_is_the_run_of_its_stage(trained: Path, run: Callable) -> None:
    """The variant's flags reach the script, and side by side it computes what it does alone."""
    flags = [
        "--norm",
        "post",
        "--max-iters",
        COMPARE_STEPS,
        "--eval-interval",
        COMPARE_STEPS // 10,
        "--seed",
        1,
    ]
    assert run("layer_norm", *flags, "--data", trained / "text.txt", "--out", "alone")[0] == 0
    assert losses(Path("alone")) == losses(run_folder(trained, "layer_norm-norm-post"))


def test_without_training_any_seed_counts(compare: Callable, tmp_path: Path) -> None:
    tamper(run_folder(tmp_path, "bigram"), seed=7)
    assert "left out" in compare("--seeds", 2, "--no-train")[1]
    code, output, _ = compare("--no-train")
    assert code == 0
    assert "left out" not in output
    assert "seeds 1, 2; bigram: 2, 7." in output


def test_nothing_is_trained_twice(compare: Callable, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, output, errors = compare("--seeds", 2)
    assert (code, errors) == (0, "")
    assert ": 0 to train" in output
    assert files(tmp_path) == before  # byte for byte, pictures too
    assert compare("--no-train")[0] == 0  # takes all the seeds that are there
    assert files(tmp_path) == before


def test_only_what_is_missing_is_trained(compare: Callable, tmp_path: Path) -> None:
    gone = run_folder(tmp_path, "residual-no-residual")
    whole = losses(gone)
    shutil.rmtree(gone)
    code, output, _ = compare("--seeds", 2)
    assert code == 0
    assert "runs on text: 1 to train, 19 there already" in output
    assert losses(gone) == whole


def test_a_readers_own_run_counts(compare: Callable, run: Callable, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs")
    flags = [
        "--max-iters",
        COMPARE_STEPS,
        "--eval-interval",
        COMPARE_STEPS // 10,
        "--data",
        "text.txt",
    ]
    assert run("bigram", *flags)[0] == 0
    code, output, _ = compare("--stages", "bigram", "--seeds", 1)
    assert code == 0
    assert ": 0 to train" in output
    assert len(rows(tmp_path / "runs" / "compare" / "text")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no way to send a Ctrl-C there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_where_it_was_stopped(
    number: int, trained: Path, tmp_path: Path, run: Callable
) -> None:
    shutil.copy(trained / "text.txt", tmp_path)
    flags = [*COMPARE, "--max-iters", 600, "--stages", "residual", "--seeds", 1]
    process = start("compare", *flags, cwd=tmp_path, threads=2)
    folders = [
        tmp_path / "runs" / "compare" / "text" / f"{name}-600-steps-seed-1"
        for name in ("residual", "residual-no-residual")
    ]
    deadline = time.monotonic() + 60
    while not all((folder / "losses.csv").exists() for folder in folders):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in output
    assert errors == ""
    steps = [int(losses(folder)[-1].split(",")[0]) for folder in folders]
    assert min(steps) < 600, "it was not stopped in time to see anything"
    began = [(folder / "losses.csv").read_text(encoding="utf-8") for folder in folders]

    code, output, _ = run("compare", *flags)
    assert code == 0
    assert f"{sum(step < 600 for step in steps)} to train" in output
    for folder, lines in zip(folders, began, strict=True):  # even the seconds: not begun again
        assert (folder / "losses.csv").read_text(encoding="utf-8").startswith(lines)
    alone = ["--max-iters", 600, "--eval-interval", 60, "--data", "text.txt", "--out", "alone"]
    assert run("residual", *alone)[0] == 0
    assert losses(folders[0]) == losses(Path("alone"))


def test_a_run_that_fails_does_not_stop_the_others(compare: Callable, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "feed_forward")
    lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "losses.csv").write_text("".join(lines[:-2]), encoding="utf-8")  # unfinished
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    shutil.rmtree(run_folder(tmp_path, "layer_norm"))
    code, output, errors = compare("--seeds", 2)
    assert code == 2
    assert "feed_forward, seed 1: FAILED: feed_forward.py: " in output
    assert "is damaged, or is not a checkpoint of this course" in output
    assert len(errors.splitlines()) == 1
    assert errors.startswith("compare.py: not trained: feed_forward, seed 1 (")
    table_rows = rows(tmp_path / "runs" / "compare" / "text")
    assert len(table_rows) == 19  # layer_norm was trained all the same


def test_the_preset_is_that_of_the_device() -> None:
    corpus = common.Corpus("text", "text.txt", "", "ab", None, None)
    for device, preset in (("cpu", "small"), ("cuda", "full"), ("mps", "full")):
        jobs = jobs_for(Terms(corpus, device, seeds=range(1, 3)), Found())
        assert len(jobs) == 2 * len(NAMES)
        large, small = jobs[16:], jobs[:16]
        assert {job.rung.flags for job in large} == {f"--preset {preset}"}
        # On a processor each has its share of the cores; a graphics card has room for one of them.
        assert {job.alone for job in large} == {device != "cpu"}
        assert {job.alone for job in small} == {False}


# What is left out, and why.


def tamper(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        part = settings["corpus"] if name == "sha256" else settings
        part[name] = part[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"sha256": "0" * 64}, "learnt another text, text"),
        ({"script_sha256": "0" * 64}, "made by another version of layer_norm.py"),
        ({"config": {"n_embd": 64}}, "made with --n-embd 64"),
        ({"config": {"max_iters": 40}}, "made with --max-iters 40"),
        ({"config": {"n_head": 2, "norm": "post"}}, "made with --n-head 2"),  # nearest: the variant
        ({"config": {"colour": "red"}}, "made with --colour red"),
        ({"seed": 3}, "made with --seed 3"),
        ({"device": "cuda"}, "made on cuda, and this comparison is for cpu"),
        ({"changed_on_resume": ["--max-iters"]}, "resumed with another --max-iters"),
        ({"init_from": "runs/gpt"}, "started from the weights of another run"),
        ({}, f"the same run as {Path('runs', 'compare', 'text', 'layer_norm-20-steps-seed-1')}"),
    ],
)
def test_runs_of_another_kind_are_left_out(
    changes: dict, reason: str, found: Callable, tmp_path: Path
) -> None:
    before = found().finished
    other = tmp_path / "runs" / "layer_norm"
    if changes:
        shutil.copytree(run_folder(tmp_path, "layer_norm"), other)
        tamper(other, **changes)
    else:
        other = tmp_path / "runs" / "later"
        shutil.copytree(run_folder(tmp_path, "layer_norm"), other)
    after = found()
    assert after.left_out == [f"{other.relative_to(tmp_path)}: {reason}"]
    assert after.finished == before


def test_a_run_that_was_lengthened_or_came_from_another_is_left_out(
    compare: Callable, run: Callable, tmp_path: Path
) -> None:
    """Its config.json still says so after it has been resumed."""
    shutil.rmtree(tmp_path / "runs")
    flags = ["--data", "text.txt", "--eval-interval", COMPARE_STEPS // 10]
    half = COMPARE_STEPS // 2
    assert run("bigram", *flags, "--max-iters", half)[0] == 0
    longer = ["--max-iters", COMPARE_STEPS, "--data", "text.txt"]
    assert run("bigram", *flags[:2], "--init-from", "runs/bigram", *longer, "--seed", 2)[0] == 0
    for folder in ("runs/bigram", "runs/bigram-2"):
        assert run("bigram", "--resume", "--out", folder, *longer)[0] == 0
        assert run("bigram", "--resume", "--out", folder)[0] == 0
    code, output, _ = compare("--no-train")
    assert code == 2
    assert f"left out: {Path('runs/bigram')}: resumed with another --max-iters\n" in output
    assert f"left out: {Path('runs/bigram-2')}: started from the weights of another run" in output


def test_a_script_that_changed_between_start_and_resume_is_remembered(
    found: Callable, run: Callable, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, "bigram")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["origin"]["script_sha256"] = "0" * 64
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert run("bigram", "--resume", "--out", folder, "--data", "text.txt")[0] == 0
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert settings["changed_on_resume"] == ["script"]
    assert len(found().finished) == 19


def test_an_unfinished_run_of_the_readers_own_is_left_alone(
    compare: Callable, tmp_path: Path
) -> None:
    other = tmp_path / "runs" / "bigram"
    run_folder(tmp_path, "bigram").rename(other)
    lines = (other / "losses.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "losses.csv").write_text("".join(lines[:4]), encoding="utf-8")
    before = files(other)
    code, output, _ = compare("--stages", "bigram", "--seeds", 1)
    assert code == 0
    assert f"left out: {Path('runs', 'bigram')}: unfinished, or still running" in output
    assert ": 1 to train" in output
    assert files(other) == before


def test_no_train_names_what_is_unfinished(compare: Callable, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "bigram")
    lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "losses.csv").write_text("".join(lines[:4]), encoding="utf-8")
    code, output, _ = compare("--no-train")
    assert code == 0
    assert f"left out: {folder.relative_to(tmp_path)}: unfinished\n" in output


def test_rows_that_are_missing(found: Callable, tmp_path: Path) -> None:
    path = run_folder(tmp_path, "bigram") / "losses.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in (lines[:1] + lines[-1:], lines[:3] + lines[4:]):
        path.write_text("".join(kept), encoding="utf-8")
        (line,) = found().left_out
        assert "holds other steps than its settings ask for" in line


def test_many_that_are_left_out_take_one_line(compare: Callable) -> None:
    """And those that --stages leaves out take none."""
    code, output, _ = compare("--stages", "bigram,self_attention", "--seeds", 2)
    assert code == 0
    assert "left out" not in output
    code, output, errors = compare("--stages", "bigram,residual", "--no-train", "--max-iters", 9)
    assert code == 2
    lines = [line for line in output.splitlines() if line.startswith("left out")]
    assert len(lines) == 1
    assert lines[0].endswith(" and 3 more: made with --max-iters 20 --eval-interval 2")
    assert errors.endswith("; add --max-iters 20 for those that are\n")


def test_without_training_it_says_what_is_not_there(compare: Callable, tmp_path: Path) -> None:
    for name in ("residual-no-residual", "gpt-preset-small"):
        folder = run_folder(tmp_path, name)
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_name(folder.name[:-1] + "2"))
    code, output, _ = compare("--no-train")
    assert code == 0
    assert "not there: residual --no-residual, gpt --preset small\n" in output
    stages = ["--stages", "bigram,residual"]
    assert (
        "; that of residual over bigram; ± the standard error" in compare(*stages, "--no-train")[1]
    )


def test_few_steps_come_with_a_warning(compare: Callable, tmp_path: Path) -> None:
    code, output, _ = compare("--no-train")
    assert code == 0
    warning = "A quick look: 20 steps instead of 2000 to 5000."
    assert warning in output
    out = tmp_path / "runs" / "compare" / "text"
    for name in ("table.md", "report.html"):
        assert warning in (out / name).read_text(encoding="utf-8")
    corpus = common.load_corpus(tmp_path / "text.txt")
    assert Terms(corpus, "cpu").warning() == Terms(corpus, "cpu", max_iters=5000).warning() == ""
    assert "4999 steps instead of" in Terms(corpus, "cpu", max_iters=4999).warning()


def test_a_stage_that_breaks_down_shows_where(compare: Callable, tmp_path: Path) -> None:
    """As it may after a reader's change."""
    copy = tmp_path / "course"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "*.txt", "notebooks"))
    script = copy / "residual.py"
    text = script.read_text(encoding="utf-8").replace("B, T = idx.shape", "B, T = idx.shape[9]")
    script.write_text(text, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, copy / "compare.py", *map(str, COMPARE), "--stages", "bigram,residual"]
        + ["--seeds", "1"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 2
    assert 'residual.py", line ' in result.stdout and "IndexError" in result.stdout
    assert "made by another version of residual.py" in result.stdout
    assert result.stderr.startswith("compare.py: not trained: residual, seed 1; ")


DAMAGED = {
    "empty": "",
    "only the heading": "HEAD\n",
    "cut off": "HEAD\n0,3.1,3.2,0.001,0,0.1\n5,2.",
    "a word": "HEAD\n0,3.1,low,0.001,0,0.1\n",
    "not a number": "HEAD\n0,3.1,nan,0.001,0,0.1\n",
    "backwards": "HEAD\n5,3.1,3.2,0.001,0,0.1\n5,3.0,3.1,0.001,0,0.1\n",
    "another heading": "step,loss\n0,3.1\n",
    "losses swapped": "step,val_loss,train_loss,learning_rate,tokens,seconds\n0,3.1,3.2,0.1,0,1\n",
    "no text": "\udcff\udcfe",
    "gone": None,
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_log_is_named_and_left_out(how: str, found: Callable, tmp_path: Path) -> None:
    path = run_folder(tmp_path, "bigram") / "losses.csv"
    heading = path.read_text(encoding="utf-8").splitlines()[0]
    path.unlink()
    if (content := DAMAGED[how]) is not None:
        content = content.replace("HEAD", heading)
        path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    after = found()
    (line,) = after.left_out
    assert str(path.relative_to(tmp_path)) in line
    assert "damaged" in line or "cannot read" in line
    assert len(after.finished) == 19


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "bigram"}', "\udcff"])
def test_a_damaged_config_is_named_and_left_out(
    content: str, found: Callable, tmp_path: Path
) -> None:
    path = run_folder(tmp_path, "bigram") / "config.json"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    after = found()
    assert after.left_out == [
        f"{path.relative_to(tmp_path)} is damaged, or not of a run of this course"
    ]
    assert len(after.finished) == 19


def test_the_rest_goes_on_without_what_is_left_out(compare: Callable, tmp_path: Path) -> None:
    path = run_folder(tmp_path, "bigram") / "losses.csv"
    path.write_text("step\n", encoding="utf-8")
    code, output, errors = compare("--no-train")
    assert (code, errors) == (0, "")
    assert f"left out: {path.relative_to(tmp_path)} is damaged: " in output
    assert len(rows(tmp_path / "runs" / "compare" / "text")) == 19
    assert "seeds 1, 2; bigram: 2." in output


# Bad input.


def refused(compare: Callable, folder: Path, *flags: object) -> str:
    before = files(folder)
    code, _, errors = compare(*flags)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert files(folder) == before
    return errors


def test_an_unknown_stage(compare: Callable, tmp_path: Path) -> None:
    error = refused(compare, tmp_path, "--stages", "bigram,trigram")
    assert "'trigram' is no stage; the stages are bigram, self_attention, " in error
    assert "--stages" in refused(compare, tmp_path, "--stages", "")


def test_nothing_to_compare(compare: Callable, tmp_path: Path) -> None:
    error = refused(compare, tmp_path, "--no-train", "--max-iters", 30)
    assert "nothing to compare" in error and str(tmp_path / "runs") in error
    shutil.rmtree(tmp_path / "runs")
    assert "nothing to compare" in refused(compare, tmp_path, "--no-train")


def test_a_prompt_that_no_model_knows(compare: Callable, tmp_path: Path) -> None:
    """Refused before anything is trained."""
    shutil.rmtree(tmp_path / "runs")
    assert "--prompt: the character '字'" in refused(compare, tmp_path, "--prompt", "字")


def test_a_full_disk_leaves_the_old_report(compare: Callable, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # enough for the table, no more
    try:
        code, _, errors = compare("--stages", "bigram,gpt", "--no-train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    path = Path("runs", "compare", "text", "curves.svg")  # the first that is too large
    assert errors == f"compare.py: cannot write {path}: File too large\n"
    assert files(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_cannot_be_written(compare: Callable, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot write" in refused(compare, tmp_path, "--no-train", "--out", "closed/out")


def test_a_file_in_the_way(compare: Callable, tmp_path: Path) -> None:
    """Refused before anything is trained."""
    assert "cannot write text.txt" in refused(compare, tmp_path, "--out", "text.txt")
    assert "cannot write text.txt" in refused(compare, tmp_path, "--no-train", "--out", "text.txt")


def test_the_folder_of_a_run_is_no_place_for_a_comparison(
    compare: Callable, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, "bigram")
    for flags in ([], ["--no-train"]):
        error = refused(compare, tmp_path, "--out", folder, *flags)
        assert "holds a run: name another folder with --out" in error


def test_a_text_that_is_too_short_for_any_stage(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "short.txt").write_text("abc" * 10, encoding="utf-8")
    code, output, errors = run("compare", "--data", "short.txt", "--stages", "bigram")
    assert code == 2
    assert output.count("FAILED: bigram.py: short.txt is too short") == 3
    assert errors.startswith("compare.py: not trained: bigram, seed 1; ")
    assert len(errors.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_two_comparisons_do_not_train_in_the_same_place(
    trained: Path, tmp_path: Path, run: Callable
) -> None:
    """Nor does one beside the runs of another that was killed."""
    shutil.copy(trained / "text.txt", tmp_path)
    flags = [*COMPARE, "--max-iters", 100_000, "--stages", "bigram", "--seeds", 1]
    process = start("compare", *flags, cwd=tmp_path)
    log = tmp_path / "runs" / "compare" / "text" / "bigram-100000-steps-seed-1" / "losses.csv"
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        code, _, errors = run("compare", *flags)
        assert code == 2
        assert "another compare.py, or a run that it started, is at work in " in errors
        process.kill()
        process.wait()
    subprocess.run(["pkill", "-f", str(log.parent.relative_to(tmp_path))], check=True)


# The numbers.


def test_the_table_is_what_the_runs_logged(trained: Path) -> None:
    """Worked out once more from the runs' own files, by NumPy."""
    markdown = (trained / "runs" / "compare" / "text" / "table.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if "|" in line]
    headings, _, *table_rows = lines
    assert [row[0].strip("`").replace(".py", "") for row in table_rows] == NAMES
    before = {"bigram": None} | dict(zip(STAGES[1:], STAGES, strict=False))
    before["modern_gpt"] = "gpt --preset small"
    best = {}
    for row in table_rows:
        name = row[0].strip("`").replace(".py", "")
        logs = []
        for seed in (1, 2):
            folder = run_folder(trained, "-".join(name.replace("--", "").split()))
            log = folder.with_name(folder.name[:-1] + str(seed)) / "losses.csv"
            logs.append(np.genfromtxt(log, delimiter=",", names=True))
        best[name] = np.array([log["val_loss"].min() for log in logs])
        train = np.mean([log["train_loss"][log["val_loss"].argmin()] for log in logs])
        seconds = np.array([log["seconds"][-1] for log in logs])
        tokens = np.array([log["tokens"][-1] for log in logs])
        mean, deviation = best[name].mean(), best[name].std(ddof=1)
        cells = dict(zip(headings, row, strict=True))
        assert cells["validation loss"] == f"{mean:.3f} ± {deviation:.3f}"
        assert cells["train loss"] == f"{train:.3f}"
        assert cells["bits per character"] == f"{mean / np.log(2):.3f}"
        assert cells["seconds to train"] == f"{seconds.mean():,.1f}"
        assert cells["characters a second"] == f"{tokens.sum() / seconds.sum():,.0f}"
        stage = before[name.split()[0]]
        if stage is None:
            assert cells["gain"] == ""
        else:
            error = np.sqrt(best[stage].var(ddof=1) / 2 + best[name].var(ddof=1) / 2)
            assert cells["gain"] == f"{best[stage].mean() - mean:.3f} ± {error:.3f}"


def result(stage: str, flags: str, seed: int, loss: float) -> Result:
    return Result(stage, flags, seed, 10, 5, loss + 0.1, loss, 1000, 2.0)


def test_one_run_knows_no_uncertainty() -> None:
    lines = lines_of([result("bigram", "", 1, 2.5), result("residual", "", 1, 2.0)])
    assert [str(line.loss) for line in lines] == ["2.500", "2.000"]
    assert [str(line.gain) for line in lines] == ["None", "0.500"]
    assert gain([2.0, 3.0], [1.0]) == (1.5, None)


def test_a_gain_is_over_the_stage_before_never_over_a_variant() -> None:
    stages = [("feed_forward", ""), ("residual", ""), ("residual", "--no-residual")]
    stages += [("layer_norm", ""), ("layer_norm", "--norm post")]
    stages += [("gpt", "--preset small"), ("gpt", "--preset full")]
    stages += [("modern_gpt", f"--preset {preset}") for preset in ("small", "middle", "full")]
    losses = [2.2, 2.1, 2.3, 2.05, 2.06, 1.6, 1.5, 1.55, 1.48, 1.47]
    lines = lines_of(
        result(*stage, seed=1, loss=loss) for stage, loss in zip(stages, losses, strict=True)
    )
    gains = [line.gain and round(line.gain.value, 3) for line in lines]
    # Of two presets the same one counts, where it is there.
    assert gains == [None, 0.1, -0.1, 0.05, 0.04, 0.45, 0.55, 0.05, 0.02, 0.03]


def test_the_table_on_pocket_play_tells_the_distance_to_the_entropy(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "DATA", tmp_path)
    path = tmp_path / "pocket_play.txt"
    path.write_text(pocket_play.play(20_000), encoding="utf-8")
    flags = ["--stages", "bigram", "--seeds", 1, "--max-iters", 10, "--data", path]
    code, output, _ = run("compare", *flags)
    assert code == 0
    [row] = rows(Path("runs", "compare", "pocket_play"))
    distance = float(row["val_loss"]) - pocket_play.entropy_per_character()
    markdown = Path("runs", "compare", "pocket_play", "table.md").read_text(encoding="utf-8")
    assert "| above the entropy |" in markdown and f"| {distance:.3f} |" in markdown
    assert "entropy" in output


@pytest.mark.parametrize("width", [70, 80, 100, 140, 200])
def test_the_table_fits_the_terminal(width: int, trained: Path) -> None:
    results = read_results(trained / "runs" / "compare" / "text" / "losses.csv")
    lines = as_text(table(lines_of(results), entropy=0.5), width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("modern_gpt.py --preset small") and " ± " in lines[-1]
    assert ("parameters" in "".join(lines)) == (width >= 100)


# The curves.


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12).map(sorted))
def test_labels_are_moved_apart_as_little_as_possible(heights: list[float]) -> None:
    moved = apart(heights, gap=13)
    assert all(b - a >= 13 - 1e-6 for a, b in itertools.pairwise(moved))
    # The least sum of squares is where every block that touches is balanced around its own middle.
    blocks, start = [], 0
    for i in range(1, len(moved) + 1):
        if i == len(moved) or moved[i] - moved[i - 1] > 13 + 1e-6:
            blocks.append(slice(start, i))
            start = i
    for block in blocks:
        assert math.isclose(sum(moved[block]), sum(heights[block]), abs_tol=1e-6)


@pytest.mark.parametrize("column", AXES)
def test_every_line_ends_in_its_name_and_no_two_names_overlap(
    column: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    corpus = common.load_corpus(Path("text.txt"))
    groups = find_runs(
        Terms(corpus, "cpu", max_iters=COMPARE_STEPS), Path("runs", "compare")
    ).by_rung()
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    panel = figure.subplots()
    draw(panel, groups, THEMES["light"], column)
    figure.draw_without_rendering()
    assert sorted(label.get_text() for label in panel.texts) == sorted(NAMES)
    boxes = [Text.get_window_extent(label) for label in panel.texts]  # the letters alone
    assert min(box.height for box in boxes) > LABEL_SIZE  # they are there to be read
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for label in panel.texts:
        name = label.get_text()
        gid = "-".join([column, *name.split()])
        (line,) = (line for line in panel.lines if line.get_gid() == gid)
        assert label.xy == (line.get_xdata()[-1], line.get_ydata()[-1])
        assert label.get_color() == line.get_color()


def test_the_pictures_are_whole(trained: Path) -> None:
    out = trained / "runs" / "compare" / "text"
    for name in ("curves.svg", "curves-dark.svg"):
        picture = ElementTree.parse(out / name).getroot()
        ids = [element.get("id") for element in picture.iter() if element.get("id")]
        for column, each in itertools.product(AXES, NAMES):
            assert ids.count("-".join([column, *each.split()])) == 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


# Machado, Oliveira and Fernandes, 2009: how colours look to someone who lacks one kind of cone.
BLINDNESS = {
    "none": np.eye(3),
    "red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB, in which distances are those that one sees: 2.3 is just noticeable."""
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.0888]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colour_blind_readers_can_tell_the_stages_apart(theme) -> None:
    colours = [linear(theme.colour(stage)) for stage in STAGES]
    for matrix in BLINDNESS.values():
        seen = [lab(np.array(matrix) @ colour) for colour in colours]
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
        assert min(distances) > 10 * 2.3
    luminance = [colour @ [0.2126, 0.7152, 0.0722] for colour in colours]
    paper = linear(theme.background) @ [0.2126, 0.7152, 0.0722]
    for one in luminance:
        assert (max(one, paper) + 0.05) / (min(one, paper) + 0.05) >= 3  # as WCAG wants it
