"""The comparison: which runs it trains, which it takes, and what it makes of their losses."""

import csv
import itertools
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import compare as comparing
from trainer import UserError
from compare import Comparison, commands_of, link, parse
from comparison.runs import read_run, wanted_config
from comparison.table import rows_of
from comparison.train import RUNS
from sample import load, stage_module
from trainer.corpus import Corpus, open_corpus

import numpy as np
import pytest
from conftest import COMPARE, COMPARE_STEPS, ROOT, STAGES, files, finish, losses, start
from fake_runs import write_run
from filelock import FileLock
from test_bad_input import refusal

COMMANDS = [*comparing.SMALL_STAGES, "gpt --preset small", "modern_gpt --preset small"]
OUTPUTS = {"losses.csv", "table.csv", "table.md", "report.html"}
OUTPUTS |= {f"{name}{dark}.svg" for name in ("curves", "staircase") for dark in ("", "-dark")}
QUICK = f"--max-iters {COMPARE_STEPS} --eval-interval {COMPARE_STEPS // 10}"
OUT = RUNS / f"text-{COMPARE_STEPS}-steps"


@pytest.fixture
def corpus(text: Path) -> Corpus:
    return open_corpus(text)


@pytest.fixture
def compare(run: Callable) -> Callable:
    return lambda *flags: run("compare", *COMPARE, *flags)


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    return lambda *flags: refusal(run, tmp_path, "compare", *flags)


@pytest.fixture
def fake(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run of each command and seed, none of them trained."""
    monkeypatch.chdir(tmp_path)
    numbers = random.Random(1)
    for command, seed in itertools.product(COMMANDS, (1, 2)):
        loss, seconds = numbers.uniform(1, 4), numbers.uniform(1, 400)
        write_run(folder_of(command, seed), f"{command} {QUICK}", corpus, seed, loss, seconds)
    return tmp_path


@pytest.fixture
def comparison(corpus: Corpus, fake: Path) -> Comparison:
    return Comparison(corpus, "cpu", COMMANDS, QUICK.split(), range(1, 3))


def folder_of(command: str, seed: int = 1, steps: int | None = COMPARE_STEPS) -> Path:
    length = f"{steps} steps" if steps else ""
    return RUNS / "text" / "-".join(re.findall(r"\w+", f"{command} {length} seed {seed}"))


def table_of(folder: Path) -> list[dict[str, str]]:
    """The rows of table.md."""
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    headings, _, *rows = [[cell.strip(" `") for cell in row] for row in cells]
    return [dict(zip(headings, row, strict=True)) for row in rows]


# Training what is missing.


@pytest.mark.slow
def test_every_stage_and_variant_is_trained_with_every_seed(trained, tmp_path, run):
    assert tuple(dict.fromkeys(command.split()[0] for command in COMMANDS)) == STAGES
    assert {path.name for path in (trained / OUT).iterdir()} == OUTPUTS
    with (trained / OUT / "losses.csv").open(encoding="utf-8", newline="") as file:
        found = [(row["stage"], row["flags"], row["seed"]) for row in csv.DictReader(file)]
    expected = [tuple(f"{each} {QUICK}".split(" ", 1)) for each in COMMANDS]
    assert found == [(*each, seed) for each in expected for seed in ("1", "2")]
    output = (trained / "output.txt").read_text(encoding="utf-8")
    for command, seed in itertools.product(COMMANDS, (1, 2)):
        assert f"] {command}, seed {seed}: validation loss " in output
    assert re.search(r"report: file://\S+report.html", output)
    # A run of the comparison is the run of its stage, and none of them is trained twice.
    flags = [*"--norm post".split(), *QUICK.split(), "--data", trained / "text.txt", "--seed", 2]
    assert run("layer_norm", *flags, "--out", "alone")[0] == 0
    one = trained / folder_of("layer_norm --norm post", 2)
    assert losses(Path("alone")) == losses(one.with_name(one.name))
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    assert run("compare", *COMPARE, "--seeds", 2)[0] == 0
    assert files(tmp_path) == before  # byte for byte, pictures too
    assert run("compare", *COMPARE, "--no-train")[0] == 0  # into a folder of its own
    assert {path: files(tmp_path)[path] for path in before} == before


@pytest.mark.slow
def test_an_ensemble_averages_probabilities(trained):
    """Computed again, one window after another, in double precision."""
    rows = {row["run"]: row for row in table_of(trained / OUT)}
    assert all(float(row["ensemble loss"]) > 0 for row in rows.values())
    tokens = open_corpus(trained / "text.txt").validation.long()
    for command in ("bigram", "gpt --preset small"):
        models = [load(trained / folder_of(command, seed), "cpu")[0].double() for seed in (1, 2)]
        T, losses = models[0].block_size, []
        for i in range(0, len(tokens) - 1, T):
            piece = tokens[i : i + T + 1]
            mean = sum(model(piece[None, :-1])[0][0].softmax(dim=-1) for model in models) / 2
            losses += (-mean.log()).gather(1, piece[1:, None]).flatten().tolist()
        assert rows[command]["ensemble loss"] == f"{np.mean(losses):.3f}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_the_same_command_resumes(text, tmp_path, run):
    commands = ["residual", "residual --no-residual"]
    flags = [*COMPARE, "--max-iters", 300, *commands, "--seeds", 1]
    process = start("compare", *flags, cwd=tmp_path, threads=2)
    folders = [tmp_path / folder_of(each, steps=300) for each in commands]
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
def test_a_run_that_fails_does_not_stop_the_others(corpus, tmp_path):
    copy = tmp_path / "course"
    ignored = shutil.ignore_patterns(".*", "runs", "*.txt", "notebooks", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    script = copy / "self_attention.py"
    code = script.read_text(encoding="utf-8").replace("B, T = idx.shape", "B, T = idx.shape[9]")
    script.write_text(code, encoding="utf-8")  # a reader's mistake
    damaged = tmp_path / folder_of("bigram")
    write_run(damaged, f"bigram {QUICK}", corpus, rows=4)  # unfinished
    (damaged / "checkpoint.pt").write_bytes(b"damaged")
    scripts = ["bigram", "self_attention", "multihead_attention", "--seeds", "1"]
    result = subprocess.run(
        [sys.executable, copy / "compare.py", *COMPARE, *scripts],
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
    assert "multihead_attention, seed 1: validation loss" in result.stdout


def test_two_comparisons_do_not_train_in_the_same_place(tmp_path, compare):
    (tmp_path / RUNS).mkdir(parents=True)
    with FileLock(tmp_path / RUNS / ".lock"):
        code, _, errors = compare("bigram", "--seeds", 1)
    assert code == 2 and "another compare.py is training in " in errors


def test_only_what_is_missing_is_trained(comparison, corpus):
    shutil.rmtree(folder_of("residual --no-residual", 2))
    command = f"residual --no-residual {QUICK}"
    write_run(Path("runs", "mine"), command, corpus, seed=2, rows=4)  # perhaps it still trains
    shutil.rmtree(folder_of("bigram"))
    write_run(folder_of("bigram"), f"bigram {QUICK}", corpus, rows=4)
    resumed, new = comparison.jobs(comparison.find())
    assert (resumed.name, "--resume" in resumed.arguments) == ("bigram, seed 1", True)
    assert new.name == "residual --no-residual, seed 2"
    assert {"--no-residual", "--max-iters", "--seed"} <= set(new.arguments)
    assert new.folder == folder_of("residual --no-residual", 2)
    write_run(Path("runs", "own"), command, corpus, seed=2)  # finished: it need not be trained
    assert [job.name for job in comparison.jobs(comparison.find())] == [resumed.name]


OTHER = [
    {"corpus": {"name": "other", "path": "", "sha256": "0" * 64}},
    {"seed": 3},
    {"device": "cuda"},
    {"changed_on_resume": ["--max-iters"]},
    {"init_from": "runs/gpt"},
]


@pytest.mark.parametrize("changes", OTHER)
def test_other_runs_do_not_count(changes, comparison, corpus):
    shutil.rmtree(folder_of("layer_norm"))
    command = f"layer_norm {QUICK}"
    before = comparison.find()
    write_run(Path("runs", "other"), command, corpus, **changes)
    write_run(Path("runs", "wide"), f"{command} --n-embd 64", corpus)
    assert comparison.find() == before
    write_run(Path("runs", "same"), command, corpus)
    assert comparison.find().keys() - before.keys() == {("layer_norm", 1)}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.slow
def test_on_a_terminal_each_run_has_a_live_line(text, tmp_path):
    import fcntl
    import pty
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # 40 rows of 120
    command = [sys.executable, ROOT / "compare.py", "residual", "--seeds", "1", *COMPARE]
    command += ["--max-iters", "200"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=side, stderr=side)
    os.close(side)
    shown = b""
    while True:
        try:
            shown += (chunk := os.read(main, 10_000))
        except OSError:  # how Linux reports its end
            break
        if not chunk:
            break
    assert process.wait(60) == 0
    shown = shown.decode("utf-8", errors="replace")
    assert re.search(r"residual, seed 1  step \d+/200, loss \d\.\d+ .* left", shown)
    assert re.search(r"all +\d+%", shown)


# Bad input.


@pytest.mark.parametrize(
    "flags, message",
    [
        ("bigram trigram", "trigram"),
        ("bigram --stages", "--stages"),
        ("bigram --n-embd 8", "--n-embd"),
        ("--prompt 字 --no-train", "--prompt"),
        ("--out text.txt", "cannot write text.txt"),
        ("--no-train --out text.txt", "cannot write text.txt"),
        (f"--no-train --out {'x' * 300}", "cannot write"),
        (f"--out {folder_of('bigram')}", "holds a run: choose another folder with --out"),
        ("--modern bigram gpt", "name no runs or scripts"),
        ("--modern --no-train", "nothing to compare"),
        ("--no-train --max-iters 30", "nothing to compare"),
        (f"{folder_of('bigram')} bigram", "bigram is not a run"),
        (f"{folder_of('bigram')} --seeds 2", "--seeds"),
        (f"{folder_of('bigram')} {RUNS}", "is not a run"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, message, fake, refused):
    assert message in refused("--data", "text.txt", "--device", "cpu", *flags.split())


def test_runs_on_different_texts(fake, refused, corpus):
    other = {"name": "other", "path": "", "sha256": "0" * 64}
    write_run(Path("runs", "other"), "bigram", corpus, corpus=other)
    complaint = refused(folder_of("bigram"), "runs/other")
    assert "different texts" in complaint and "other" in complaint


HEAD = "step,train_loss,val_loss,learning_rate,tokens,seconds\n"
DAMAGED = [("losses.csv", content) for content in ("", HEAD, f"{HEAD}0,3,3,1,0,1\n5,2.")]
DAMAGED += [("losses.csv", f"{HEAD}0,3,{loss},1,0,1\n") for loss in ("low", "nan")]
DAMAGED += [("losses.csv", "\udcff\udcfe")]
DAMAGED += [("config.json", x) for x in ("", "{", "[]", '{"stage": "bigram"}', "[" * 100_000)]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_run(name, content, comparison, refused):
    path = folder_of("bigram") / name
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    assert len(comparison.find()) == 2 * len(COMMANDS) - 1
    assert str(path.parent) in refused(folder_of("residual"), path.parent)


# Any runs.


@pytest.mark.slow
def test_scripts_with_flags(tmp_path, compare):
    small = "gpt --n-embd 8 --n-head 1 --n-layer 1 --block-size 8"
    code, _, errors = compare(f"{small},gpt.py --n-embd 8 --n-layer 1", "--seeds", 1)
    assert (code, errors) == (0, "")
    (folder,) = [path.parent for path in (tmp_path / RUNS).glob("*/table.md")]
    assert ["--n-head 1" in row["run"] for row in table_of(folder)] == [True, False]


def test_a_reader_compares_a_script_of_their_own(corpus, fake, run, monkeypatch):
    mine = ROOT / "my_test_gpt.py"
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    mine.write_text(source.replace("dropout: Fraction = 0.2", "dropout: Fraction = 0.3"), "utf-8")
    try:
        flags = "--preset small --max-iters 2 --block-size 8 --n-embd 8 --device cpu".split()
        flags += ["--eval-interval", 1, "--data", "text.txt"]
        for seed in (1, 2):
            for script in ("gpt", "my_test_gpt"):
                out = ["--out", f"runs/{script} {seed}", "--seed", seed]
                assert run(script, *flags, *out)[0] == 0
        assert run("gpt", *flags, "--n-embd", 16, "--out", "runs/wide")[0] == 0
        runs = ["runs/gpt 1", "runs/my_test_gpt 1", "runs/gpt 2", "runs/my_test_gpt 2", "runs/wide"]
        code, output, errors = run("compare", *runs, "--out", "compared")
        assert (code, errors) == (0, "")
    finally:
        mine.unlink()
    rows = table_of(Path("compared"))
    names = ["gpt --preset small --n-embd 8", "my_test_gpt --preset small --n-embd 8"]
    assert [row["run"] for row in rows] == [*names, "gpt --preset small --n-embd 16"]
    assert "--max-iters 2" in output and "Seeds: 1, 2; gpt --preset small --n-embd 16 1." in output
    assert "dtype" not in rows[0] and "±" in rows[1]["improvement"]
    assert "±" not in rows[2]["improvement"] != ""


def test_unfinished_runs_are_shown_as_such(corpus, fake, run):
    write_run(Path("runs", "stopped"), "bigram --block-size 4", corpus, rows=4)
    write_run(Path("runs", "training"), "bigram --block-size 16", corpus, rows=3)
    with FileLock("runs/.training.lock"):
        folders = [folder_of("bigram"), "runs/stopped", "runs/training"]
        code, _, errors = run("compare", *folders, "--out", "compared")
    assert code == 0, errors
    _, stopped, training = table_of(Path("compared"))
    assert "(stopped, step 1,500 of 5,000)" in stopped["validation loss"]
    assert "(training, step 1,000 of 5,000)" in training["validation loss"]
    assert "improvement" not in stopped


def test_many_rows(corpus, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for n_embd in range(1, 31):
        write_run(Path("runs", str(n_embd)), f"self_attention --n-embd {n_embd}", corpus, seconds=0)
    code, _, errors = run("compare", *map(str, sorted(Path("runs").iterdir())), "--out", "all")
    assert code == 0, errors
    assert len(table_of(Path("all"))) == 30


# The numbers.


def test_the_table_is_what_the_runs_logged(corpus, fake, run):
    """Computed again from the runs' own files, with NumPy."""
    numbers = random.Random(2)
    commands = ["bigram", "self_attention", "residual", "residual --no-residual", "layer_norm"]
    for command, seed in itertools.product(commands, (1, 2, 3)):
        folder = folder_of(command, seed, None)
        write_run(folder, command, corpus, seed, numbers.uniform(1, 4), numbers.uniform(1, 400))
    assert run("compare", "--data", "text.txt", "--no-train", "--device", "cpu")[0] == 0
    rows, best = table_of(RUNS / "text-existing"), {}
    assert [row["run"] for row in rows] == commands
    before = {"self_attention": "bigram", "residual": "self_attention", "layer_norm": "residual"}
    for row in rows:
        folders = [folder_of(row["run"], seed, None) / "losses.csv" for seed in (1, 2, 3)]
        logs = [np.genfromtxt(path, delimiter=",", names=True) for path in folders]
        best[row["run"]] = loss = np.array([log["val_loss"].min() for log in logs])
        train = np.mean([log["train_loss"][log["val_loss"].argmin()] for log in logs])
        assert row["validation loss"] == f"{loss.mean():.3f} ± {loss.std(ddof=1):.3f}"
        final = np.array([log["val_loss"][-1] for log in logs])
        assert row["final loss"] == f"{final.mean():.3f} ± {final.std(ddof=1):.3f}"
        assert row["train loss"] == f"{train:.3f}"
        assert row["bits per character"] == f"{loss.mean() / np.log(2):.3f}"
        times = [np.min(np.diff(log["seconds"]) / np.diff(log["step"])) for log in logs]
        assert row["ms per step"] == f"{1000 * min(times):.2f}"
        if stage := before.get(row["run"].split()[0]):
            pairs = best[stage] - loss
            mean, error = pairs.mean(), pairs.std(ddof=1) / np.sqrt(3)
            assert row["improvement"] == f"{mean:.3f} ± {error:.3f}".replace("-", "−")


def test_a_quick_look_shows_no_improvements(fake, compare):
    code, output, _ = compare("--no-train")
    assert code == 0 and "quick look" in output
    rows = table_of(RUNS / f"text-{COMPARE_STEPS}-steps-existing")
    assert [row["run"] for row in rows] == COMMANDS
    assert "improvement" not in rows[0]


def test_what_a_row_improves_on(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    large = [
        f"{stage} --preset {size}" for stage in ("gpt", "modern_gpt") for size in ("small", "full")
    ]
    commands = ["feed_forward", "residual", "residual --no-residual", *large]
    for i, command in enumerate([*commands, "modern_gpt --preset middle"]):
        write_run(Path("runs", str(i)), command, corpus)
    rows = rows_of(read_run(Path("runs", str(i))) for i in range(8))
    link(rows, over_first=False)
    baselines = [row.baseline and rows.index(row.baseline) for row in rows]
    assert baselines == [None, 0, 0, 1, 3, 3, 4, 6]
    assert [row.is_variant for row in rows].index(True) == 2
    link(rows, over_first=True)
    assert {row.baseline and row.baseline.name for row in rows} == {None, "feed_forward"}


def test_modern_compares_each_idea_with_all(corpus, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--modern"])
    commands = commands_of(parse(), "cpu")
    assert len(commands) == 13 and commands[0] == "modern_gpt --preset small"
    assert "modern_gpt --preset small --no-rope" in commands
    with pytest.raises(UserError, match="--precision is not a hyperparameter"):
        wanted_config("gpt --precision bfloat16", "cpu")
    for (i, command), seed in itertools.product(enumerate(commands), (1, 2)):
        loss, seconds = 1.5 + 0.1 * i + 0.01 * seed, 100.0 + 10 * i
        write_run(folder_of(command, seed), command, corpus, seed, loss, seconds)
    flags = ["--modern", "--no-train", "--data", "text.txt", "--device", "cpu"]
    code, output, errors = run("compare", *flags)
    assert code == 0, errors
    rows = table_of(RUNS / "text-modern-existing")
    assert [row["improvement"] for row in rows[:2]] == ["", "−0.100 ± 0.000"]
    assert [row["relative time"] for row in rows[:2]] == ["1.00", "1.10"]
    assert "over modern_gpt --preset small" in output


@pytest.mark.parametrize("name", ["ladder", "ideas"])
def test_the_results_are_of_the_models_that_are_here(name):
    with (ROOT / "results" / name / "losses.csv").open(encoding="utf-8", newline="") as file:
        results = list(csv.DictReader(file))
    for result in {(row["stage"], row["flags"]): row for row in results}.values():
        config = wanted_config(f"{result['stage']} {result['flags']}", "cpu")
        module = stage_module(result["stage"])
        model = module.Model(module.Config(**config))
        parameters = sum(weight.numel() for weight in model.parameters())
        assert int(result["parameters"]) == parameters
        characters = config["batch_size"] * config["block_size"] * config["max_iters"]
        assert int(result["tokens"]) == characters
