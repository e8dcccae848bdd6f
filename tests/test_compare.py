"""The comparison: which runs it trains, which it leaves out, and what it makes of their losses."""

import csv
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from compare import RUNS, jobs_for, lock
from comparison.curves import AXES, THEMES, draw
from comparison.ideas import EQUAL_STEPS, equal_seconds
from comparison.runs import ROWS, Terms, find_runs
from comparison.table import Result, improvement, lines_of, read_results
from sample import stage_module
from trainer.corpus import open_corpus

import numpy as np
import pytest
from conftest import COMPARE, COMPARE_STEPS, ROOT, STAGES, files, finish, losses, start
from fake_runs import write_run
from matplotlib.figure import Figure
from matplotlib.text import Text

SMALL_ROWS = [row for row in ROWS if row.preset in ("", "small")]
NAMES = [row.name for row in SMALL_ROWS]
OUTPUTS = {"losses.csv", "table.md", "curves.svg", "curves-dark.svg", "curves.png", "report.html"}
OUT = RUNS / "text"


@pytest.fixture
def terms(text: Path) -> Terms:
    return Terms(open_corpus(text), "cpu", max_iters=COMPARE_STEPS)


@pytest.fixture
def fake(terms: Terms, tmp_path: Path) -> Path:
    """A folder with a finished run of each row and seed, none of them trained."""
    numbers = random.Random(1)
    for row, seed in itertools.product(SMALL_ROWS, (1, 2)):
        loss, seconds = numbers.uniform(1, 4), numbers.uniform(1, 400)
        write_run(folder_of(tmp_path, row.name, seed), terms, row, seed, loss, seconds)
    return tmp_path


@pytest.fixture
def found(fake: Path, terms: Terms, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.chdir(fake)
    terms.seeds = range(1, 3)
    return lambda: find_runs(terms, RUNS)


def folder_of(folder: Path, name: str, seed: int = 1, steps: int = COMPARE_STEPS) -> Path:
    dashed = "-".join(name.replace("--", "").split())
    return folder / OUT / f"{dashed}-{steps}-steps-seed-{seed}"


@pytest.fixture
def compare(run: Callable) -> Callable:
    return lambda *flags: run("compare", *COMPARE, *flags)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / OUT / "losses.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Training what is missing.


@pytest.mark.slow
def test_every_stage_and_variant_is_trained_with_every_seed(trained, tmp_path, run):
    assert tuple(dict.fromkeys(row.stage for row in ROWS)) == STAGES
    assert {path.name for path in (trained / OUT).iterdir() if path.is_file()} == OUTPUTS
    assert not list(trained.rglob("*.part"))
    found = [(f"{row['stage']} {row['flags']}".strip(), row["seed"]) for row in rows_of(trained)]
    assert found == [(name, seed) for name in NAMES for seed in ("1", "2")]
    output = (trained / "output.txt").read_text(encoding="utf-8")
    assert "left out" not in output
    for name, seed in found:
        assert f"] {name}, seed {seed}: validation loss " in output
    # A run of the comparison is the run of its stage, and none of them is trained twice.
    flags = f"--norm post --max-iters {COMPARE_STEPS} --eval-interval {COMPARE_STEPS // 10}"
    flags = [*flags.split(), "--data", trained / "text.txt", "--out", "alone", "--seed", 2]
    assert run("layer_norm", *flags)[0] == 0
    assert losses(Path("alone")) == losses(folder_of(trained, "layer_norm --norm post", seed=2))
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    for flags in (["--seeds", 2], ["--no-train"]):
        code, output, errors = run("compare", *COMPARE, *flags)
        assert (code, errors) == (0, "")
        assert files(tmp_path) == before  # byte for byte, pictures too


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_the_same_command_resumes(text, tmp_path, run):
    flags = [*COMPARE, "--max-iters", 300, "--stages", "residual", "--seeds", 1]
    process = start("compare", *flags, cwd=tmp_path, threads=2)
    names = ("residual", "residual --no-residual")
    folders = [folder_of(tmp_path, name, steps=300) for name in names]
    deadline = time.monotonic() + 120
    while not all((folder / "losses.csv").exists() for folder in folders):
        if time.monotonic() > deadline or process.poll() is not None:
            break
        time.sleep(0.01)
    process.terminate()
    code, _, errors = finish(process)
    assert (code, errors) == (130, "")
    began = [(folder / "losses.csv").read_text(encoding="utf-8") for folder in folders]
    unfinished = sum(len(log.splitlines()) < 12 for log in began)
    code, output, _ = run("compare", *flags)
    assert code == 0 and f"{unfinished} to train" in output
    for folder, log in zip(folders, began, strict=True):  # the same seconds: not trained anew
        assert (folder / "losses.csv").read_text(encoding="utf-8").startswith(log)


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(terms, tmp_path):
    copy = tmp_path / "course"
    ignored = shutil.ignore_patterns(".*", "runs", "*.txt", "notebooks", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    script = copy / "self_attention.py"
    code = script.read_text(encoding="utf-8").replace("B, T = idx.shape", "B, T = idx.shape[9]")
    script.write_text(code, encoding="utf-8")  # a reader's mistake
    damaged = folder_of(tmp_path, "bigram")
    write_run(damaged, terms, ROWS[0], rows=4)  # unfinished
    (damaged / "checkpoint.pt").write_bytes(b"damaged")
    flags = ["--stages", "bigram,self_attention,multihead_attention", "--seeds", "1"]
    result = subprocess.run(
        [sys.executable, copy / "compare.py", *COMPARE, *flags],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 2
    assert 'self_attention.py", line ' in result.stdout and "IndexError" in result.stdout
    assert "bigram, seed 1: FAILED: bigram.py: " in result.stdout
    assert result.stderr.startswith("compare.py: not trained: ")
    assert len(result.stderr.splitlines()) == 1
    assert [row["stage"] for row in rows_of(tmp_path)] == ["multihead_attention"]


def test_two_comparisons_do_not_train_in_the_same_place(text, compare):
    with lock():
        code, _, errors = compare("--stages", "bigram", "--seeds", 1)
    assert code == 2
    assert "another compare.py, or a run that it started, is training in " in errors


def test_only_what_is_missing_is_trained(fake, terms, found):
    shutil.rmtree(folder_of(fake, "residual --no-residual", seed=2))
    variant = next(row for row in ROWS if row.flags == "--no-residual")
    write_run(fake / "runs" / "mine", terms, variant, seed=2, rows=4)  # perhaps it still runs
    shutil.rmtree(folder_of(fake, "bigram"))
    write_run(folder_of(fake, "bigram"), terms, ROWS[0], rows=4)
    runs = found()
    assert runs.left_out == [f"{Path('runs', 'mine')}: unfinished, or still running"]
    resumed, new = jobs_for(terms, runs)
    assert (resumed.row.name, resumed.seed, "--resume" in resumed.arguments) == ("bigram", 1, True)
    assert new.name == "residual --no-residual, seed 2"
    assert {"--no-residual", "--max-iters", "--seed"} <= set(new.arguments)
    assert new.folder == folder_of(Path(), "residual --no-residual", seed=2)


# What is left out, and why.


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"corpus": {"name": "other", "sha256": "0" * 64}}, "another text, other"),
        ({"config": {"n_embd": 64}}, "made with --n-embd 64"),
        ({"config": {"n_head": 2, "norm": "post"}}, "made with --n-head 2"),  # nearest: the variant
        ({"config": {"color": "red"}}, "made with --color red"),
        ({"seed": 3}, "made with --seed 3"),
        ({"device": "cuda"}, "made on cuda, and this comparison is for cpu"),
        ({"changed_on_resume": ["--max-iters"]}, "resumed with another --max-iters"),
        ({"init_from": "runs/gpt"}, "started from the weights of another run"),
        ({}, "the same run as "),
    ],
)
def test_other_runs_are_left_out(changes, reason, found, terms, fake):
    before = found().finished
    row = next(row for row in ROWS if row.stage == "layer_norm")
    write_run(fake / "runs" / "my_layer_norm", terms, row, **changes)
    after = found()
    (line,) = after.left_out
    assert line.startswith(f"{Path('runs', 'my_layer_norm')}: ") and reason in line
    assert after.finished == before


HEAD = "step,train_loss,val_loss,learning_rate,tokens,seconds\n"
DAMAGED_LOGS = (
    *("", HEAD, f"{HEAD}0,3,3,1,0,1\n5,2.", f"{HEAD}0,3,low,1,0,1\n", f"{HEAD}0,3,nan,1,0,1\n"),
    f"{HEAD}0,3,3,1,0,1\n4,3,3,1,0,1\n",  # a row is missing
    "step,val_loss,train_loss,learning_rate,tokens,seconds\n0,3,3,1,0,1\n",
    "\udcff\udcfe",
)
DAMAGED_CONFIGS = ("", "{", "[]", '{"stage": "bigram"}', "\udcff")
DAMAGED = [*(("losses.csv", content) for content in DAMAGED_LOGS)]
DAMAGED += [("config.json", content) for content in DAMAGED_CONFIGS]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_run_is_left_out(name, content, found, fake):
    path = folder_of(fake, "bigram") / name
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    after = found()
    (line,) = after.left_out
    assert line.startswith(f"{path.parent.relative_to(fake)}: its {name}")
    assert len(after.finished) == 2 * len(NAMES) - 1


# Bad input.


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--stages bigram,trigram", "'trigram' is not a stage"),
        ("--stages", "--stages"),
        ("--no-train --max-iters 30", "nothing to compare"),
        ("--prompt 字", "--prompt"),
        ("--out text.txt", "cannot write text.txt"),
        ("--no-train --out text.txt", "cannot write text.txt"),
        (f"--out {folder_of(Path(), 'bigram')}", "holds a run: choose another folder with --out"),
        ("--modern --stages bigram,gpt", "leave out --stages"),
        ("--modern --no-train", "nothing to compare"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, message, fake, compare):
    before = files(fake)
    code, _, errors = compare(*flags.split())
    assert code == 2
    assert message in errors and len(errors.splitlines()) == 1
    assert files(fake) == before


# The numbers.


def test_the_table_is_what_the_runs_logged(fake, compare):
    """Computed again from the runs' own files, with NumPy."""
    code, output, _ = compare("--no-train")
    assert code == 0
    markdown = (fake / OUT / "table.md").read_text(encoding="utf-8")
    headings, _, *rows = (
        line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")
    )
    names = [row[0].strip("`").replace(".py", "") for row in rows]
    assert names == NAMES
    before = dict(zip(STAGES[1:], STAGES, strict=False)) | {"modern_gpt": "gpt --preset small"}
    best = {}
    for name, row in zip(names, rows, strict=True):
        logs = [
            np.genfromtxt(folder_of(fake, name, seed) / "losses.csv", delimiter=",", names=True)
            for seed in (1, 2)
        ]
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
        assert cells["characters per second"] == f"{tokens.sum() / seconds.sum():,.0f}"
        stage = before.get(name.split()[0])
        if stage is None:
            assert cells["improvement"] == ""
        else:
            error = np.sqrt(best[stage].var(ddof=1) / 2 + best[name].var(ddof=1) / 2)
            assert cells["improvement"] == f"{best[stage].mean() - mean:.3f} ± {error:.3f}"
    warning = "20 steps instead of 2000 to 5000"
    assert warning in output and warning in markdown
    assert warning in (fake / OUT / "report.html").read_text(encoding="utf-8")
    for name in ("curves.svg", "curves-dark.svg"):
        picture = ElementTree.parse(fake / OUT / name).getroot()
        ids = [element.get("id") for element in picture.iter() if element.get("id")]
        for column, each in itertools.product(AXES, NAMES):
            assert ids.count("-".join([column, *each.split()])) == 1
    assert (fake / OUT / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_improvement_is_over_the_stage_before_never_over_a_variant():
    assert improvement([2.0, 3.0], [1.0]) == (1.5, None)  # one run shows no uncertainty
    stages = [("multihead_attention", ""), ("feed_forward", "")]
    stages += [("residual", ""), ("residual", "--no-residual")]
    stages += [("layer_norm", ""), ("layer_norm", "--norm post")]
    stages += [("gpt", "--preset small"), ("gpt", "--preset full")]
    stages += [("modern_gpt", f"--preset {preset}") for preset in ("small", "middle", "full")]
    losses = [2.25, 2.2, 2.1, 2.3, 2.05, 2.06, 1.6, 1.5, 1.55, 1.48, 1.47]
    lines = lines_of(
        Result(*stage, 1, 10, 5, loss + 0.1, loss, 1000, 2.0)
        for stage, loss in zip(stages, losses, strict=True)
    )
    values = [line.improvement and round(line.improvement.value, 3) for line in lines]
    # Of two presets, the same one counts, if it is there.
    assert values == [None, 0.05, 0.1, -0.1, 0.05, 0.04, 0.45, 0.55, 0.05, 0.02, 0.03]
    skips = [line.row.name for line in lines if line.skips]
    assert skips == ["feed_forward", "modern_gpt --preset middle"]


def test_the_results_are_of_the_models_that_are_here(terms):
    reference = Terms(terms.corpus, "cpu")
    reference.corpus.vocabulary = "".join(map(chr, range(65)))  # as many as Tiny Shakespeare has
    times = json.loads((ROOT / "results" / "step_times.json").read_text(encoding="utf-8"))
    ideas = EQUAL_STEPS + equal_seconds(times["seconds"], reference)
    for name, rows in (("losses.csv", ROWS), ("modern.csv", ideas)):
        known = {(row.stage, row.flags): row for row in rows}
        for result in read_results(ROOT / "results" / name):
            config = reference.config(known[result.stage, result.flags])
            module = stage_module(result.stage)
            model = module.Model(module.Config(**config))
            assert result.parameters == sum(weight.numel() for weight in model.parameters())
            characters = config["batch_size"] * config["block_size"] * config["max_iters"]
            assert result.tokens == characters


# The curves.


@pytest.mark.parametrize("column", AXES)
def test_every_line_ends_in_its_name_and_no_two_names_overlap(column, found):
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    panel = figure.subplots()
    draw(panel, found().by_row(), THEMES["light"], column)
    figure.draw_without_rendering()
    assert sorted(label.get_text() for label in panel.texts) == sorted(NAMES)
    boxes = [Text.get_window_extent(label) for label in panel.texts]  # the letters alone
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
