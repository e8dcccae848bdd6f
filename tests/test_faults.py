"""What goes wrong around a run: kills, two starts at once, damaged files, lost output."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import gpt
import trainer.evaluate
import trainer.folder
import trainer.plan
from trainer import UserError
from sample import stage_module
from trainer.checkpoint import read_checkpoint
from trainer.corpus import open_corpus
from trainer.distributed import World

import conftest
import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL, STAGES, TIME_LIMIT, equal, files, finish, leaves
from test_bad_input import refusal
from test_runs import MANY, assert_same_run, gpt_run, steps

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
FAST = [*SMALL, *SMALL_MODEL["bigram"], *MANY]


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    return lambda script, *flags: refusal(run, tmp_path, script, *flags)


# One process at a time.


@pytest.mark.slow
def test_of_two_starts_with_the_same_folder_one_trains(small_run, text, tmp_path):
    flags = [*FAST, "--data", text, "--out", "both"]
    both = [conftest.start("bigram", *flags, "--seed", seed, cwd=tmp_path) for seed in (1, 2)]
    ends = [finish(process) for process in both]
    assert sorted(code for code, _, _ in ends) == [0, 2]
    winner = [code for code, _, _ in ends].index(0)
    (complaint,) = ends[1 - winner][2].splitlines()
    assert "another process is training in both" in complaint
    assert small_run("bigram", *MANY, "--seed", winner + 1, "--out", "alone")[0] == 0
    assert_same_run(tmp_path / "both", tmp_path / "alone")


def test_a_run_locks_its_folder_until_it_ends(text, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = steps(*gpt_run("--out", "run"))
    next(training)
    for flags in (["--resume"], ["--overwrite"], []):
        assert "another process is training" in refused("gpt", "--out", "run", *flags)
        assert "another process" in refused("gpt", "--out", "x/../run", *flags)
    list(training)
    assert run("gpt", "--resume", "--out", "run")[0] == 0
    training = steps(*gpt_run("--out", "stopped"))
    next(training)
    training.close()
    assert run("gpt", "--resume", "--out", "stopped")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "stopped", "text.txt"}


def test_runs_without_out_that_start_together_have_folders_of_their_own(
    text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runs = [gpt_run() for _ in range(3)]
    assert [run.folder.path.name for run, _, _ in runs] == ["gpt", "gpt-2", "gpt-3"]


# Killed while it writes.


def killed_at(write: int, train: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Train in a child that dies at its n-th rename, as if killed; return whether it did."""
    rename, count = trainer.folder.rename, []

    def dying(*paths: Path) -> None:
        count.append(paths)
        if len(count) == write:
            os._exit(99)
        rename(*paths)

    child = os.fork()
    if not child:
        monkeypatch.setattr(trainer.folder, "rename", dying)
        train()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99


@POSIX
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_files_are_written(overwrite, small_run, run, tmp_path, monkeypatch):
    assert small_run("gpt", "--seed", 1, "--out", "1")[0] == 0
    assert small_run("gpt", "--seed", 2, "--out", "2")[0] == 0
    found = set()
    for write in range(1, 9):  # the first five make the folder, or the first eight
        folder = tmp_path / f"killed {write}"
        flags = ["gpt", "--seed", 2, "--out", folder]
        if overwrite:
            shutil.copytree("1", folder)
            flags.append("--overwrite")
        assert killed_at(write, lambda flags=flags: small_run(*flags), monkeypatch)
        if folder.exists():
            resume = ["--resume", "--out", folder, "--sample-length", 20]
            assert run("gpt", *resume)[0] == 0
        else:
            assert small_run(*flags)[0] == 0
            found.add("nothing")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert_same_run(folder, tmp_path / str(config["seed"]))
        assert {path.name for path in folder.iterdir()} == set(trainer.folder.RUN_FILES)
        found.add(config["seed"])
    assert found == ({1, 2} if overwrite else {"nothing", 2})


# Damaged and outdated checkpoints.


def values(checkpoint: dict) -> list:
    return [*leaves(checkpoint), *checkpoint]


def test_a_flipped_bit_never_loads_as_something_else(small_run, tmp_path):
    assert small_run("gpt", "--out", "run")[0] == 0
    path, chance, refusals = tmp_path / "run" / "checkpoint.pt", random.Random(1), 0
    content, whole = path.read_bytes(), values(read_checkpoint(path))
    for _ in range(100):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            assert all(map(equal, values(read_checkpoint(path)), whole))  # it was in the padding
        except UserError:
            refusals += 1
    assert refusals > 30


def test_a_compressed_checkpoint_is_refused_unread(small_run, refused, tmp_path):
    assert small_run("bigram", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in content:
            new.writestr(name, content[name])
    assert "damaged" in refused("sample", "run")


WRONG = [None, -7, "x", [], {"x": 1}, 2**70, 0.5, torch.zeros(3)]


@pytest.mark.slow
def test_missing_and_mistyped_entries(small_run, refused, run, tmp_path):
    assert small_run("gpt", "--out", "run")[0] == 0
    resume, sample = ["gpt", "--resume", "--out", "run"], ["sample", "run", "--sample-length", 5]
    start_from = ["gpt", "--init-from", "run", "--out", "next", "--max-iters", 1]
    chance = random.Random(1)
    for name, commands in (("checkpoint.pt", [resume]), ("best.pt", [sample, start_from])):
        path = tmp_path / "run" / name
        good = torch.load(path, weights_only=True)
        for places in (good, good["config"], good["corpus"], good["parts"]):
            for key, value in chance.sample(sorted(places.items(), key=str), min(8, len(places))):
                for wrong in ["missing", chance.choice(WRONG)]:
                    places[key] = wrong
                    if wrong == "missing":
                        del places[key]
                    torch.save(good, path)
                    places[key] = value
                    for command in commands:
                        before = files(tmp_path)
                        code, output, errors = run(*command)
                        assert code == 2 and "damaged" in errors, (key, wrong, output, errors)
                        assert len(errors.splitlines()) == 1 and files(tmp_path) == before
        conftest.save_checkpoint(path, good)


def edited(script: str, *edits: tuple[str, str]) -> str:
    source = (ROOT / script).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    return source


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the course, whose scripts a test may change."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("common.py", "sample.py", "prepare.py", "bigram.py", "layer_norm.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("trainer", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.txt"))
    return folder


def call(script: Path, *flags: object, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    words = [sys.executable, script, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.run(words, cwd=cwd, timeout=TIME_LIMIT, **(pipes | options))


@pytest.mark.slow
def test_a_run_outlives_changes_of_its_script(copy, text, tmp_path):
    flags = [*SMALL, *SMALL_MODEL["layer_norm"], "--data", text, "--out", "run"]
    assert call(copy / "layer_norm.py", *flags, cwd=tmp_path).returncode == 0
    more = ["--resume", "--out", "run", "--max-iters", 30]
    field = "    n_layer: int = 3  # number of blocks\n"
    new_field = (field, f"{field}    new: int = 3  # which it lacked\n")
    (copy / "layer_norm.py").write_text(edited("layer_norm.py", new_field), encoding="utf-8")
    assert call(copy / "sample.py", "run", cwd=tmp_path).returncode == 0
    assert call(copy / "layer_norm.py", *more, cwd=tmp_path).returncode == 0
    # The last runs have that field, and now it is gone again; so is the name of a parameter.
    renamed = edited("layer_norm.py", ("self.lm_head", "self.unembedding"))
    (copy / "layer_norm.py").write_text(renamed, encoding="utf-8")
    for script, flags in (("sample.py", ["run"]), ("layer_norm.py", more)):
        refusal = call(copy / script, *flags, cwd=tmp_path)
        assert refusal.returncode == 2 and len(refusal.stderr.splitlines()) == 1
        assert "unembedding.weight" in refusal.stderr and "layer_norm.py" in refusal.stderr
    shutil.copy(ROOT / "layer_norm.py", copy)
    assert call(copy / "sample.py", "run", cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_script_of_any_name_but_only_beside_sample(copy, text, tmp_path):
    flags = [*SMALL, "--data", text, "--out", "run"]
    shutil.copy(copy / "bigram.py", copy / "my-bigram.py")
    assert call(copy / "my-bigram.py", *flags, cwd=tmp_path).returncode == 0
    assert call(copy / "sample.py", "run", cwd=tmp_path).returncode == 0
    (copy / "mine").mkdir()
    for path in (copy / "mine" / "bigram.py", copy / "my.bigram.py"):
        shutil.copy(copy / "bigram.py", path)
        path_variable = os.environ | {"PYTHONPATH": str(copy)}
        refusal = call(path, *flags[:-1], "new", cwd=tmp_path, env=path_variable)
        assert refusal.returncode == 2 and "sample.py will not find" in refusal.stderr
        assert not (tmp_path / "new").exists()


def test_an_edited_checkpoint_is_refused(small_run, refused, tmp_path):
    assert small_run("bigram", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    saved = torch.load(path, weights_only=True)
    saved["parts"]["model"]["logit_table.weight"][0, 0] = float("nan")
    torch.save(saved, path)
    assert "damaged" in refused("sample", "run")
    assert "damaged" in refused("bigram", "--init-from", "run", "--out", "new")


def test_a_flipped_attribute_bit_of_the_archive(small_run, refused, tmp_path):
    """It would make PyTorch take a record for a folder, and leave its memory as it was."""
    assert small_run("bigram", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    content = bytearray(path.read_bytes())
    content[content.index(b"archive/data/0", content.index(b"PK\1\2")) - 46 + 38] ^= 16
    path.write_bytes(content)
    assert "damaged" in refused("sample", "run")


def test_an_optimizer_state_of_another_shape_is_refused(small_run, refused, tmp_path):
    assert small_run("gpt", "--out", "run")[0] == 0
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["parts"]["optimizer 0"]["state"][0]["exp_avg"] = torch.zeros(3)  # would corrupt memory
    conftest.save_checkpoint(path, saved)
    assert "optimizer 0" in refused("gpt", "--resume", "--out", "run")


# Prepared texts that change.


@pytest.fixture
def prepared(run: Callable, tmp_path: Path) -> Path:
    assert run("prepare", "text.txt", "--out", "prepared")[0] == 0
    return tmp_path / "prepared"


def test_a_prepared_text_that_has_changed(prepared, small_run, refused):
    assert small_run("bigram", "--data", prepared, "--out", "run")[0] == 0
    ids = (prepared / "train.bin").read_bytes()
    (prepared / "train.bin").write_bytes(ids[2:] + ids[:2])
    assert "changed" in refused("bigram", "--resume", "--out", "run")
    (prepared / "train.bin").write_bytes(b"\xff\xff" * (len(ids) // 2))
    complaint = refused("bigram", "--data", prepared, "--out", "new")
    assert "beyond its vocabulary" in complaint
    (prepared / "train.bin").write_bytes(ids)
    val = (prepared / "val.bin").read_bytes()
    (prepared / "val.bin").write_bytes(val[2:] + val[:2])
    assert "changed" in refused("bigram", "--data", prepared, "--out", "new")


def test_a_meta_json_of_brackets(prepared, refused):
    (prepared / "meta.json").write_text("[" * 100_000, encoding="utf-8")
    assert "damaged" in refused("bigram", "--data", prepared)


def test_a_training_text_that_shrinks_while_it_is_read(prepared, run, small_run, monkeypatch):
    batch = trainer.run.Run.batch

    def shrinking(self: trainer.run.Run, step: int) -> tuple:
        if step == 7:
            os.truncate(prepared / "train.bin", 100)
        return batch(self, step)

    ids = (prepared / "train.bin").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.run.Run, "batch", shrinking)
        code, _, errors = small_run("bigram", "--data", prepared, "--out", "run")
    assert code == 2 and "has shrunk" in errors and len(errors.splitlines()) == 1
    (prepared / "train.bin").write_bytes(ids)
    assert run("bigram", "--resume", "--out", "run")[0] == 0


# Output.


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output(text, tmp_path):
    flags = [*SMALL, "--data", text, "--out", "run"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = call(ROOT / "bigram.py", *flags, cwd=tmp_path, stdout=full)
        assert (ended.returncode, ended.stderr) == (0, "")
        sampled = call(ROOT / "sample.py", "run", cwd=tmp_path, stdout=full)
    assert sampled.returncode == 2
    assert sampled.stderr.splitlines() == [
        "sample.py: cannot write the output: No space left on device"
    ]
    assert (tmp_path / "run" / "sample.txt").exists()


@POSIX
@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_continues(text, tmp_path):
    process = conftest.start("bigram", *FAST, "--data", text, "--out", "run", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(TIME_LIMIT), process.stderr.read()) == (0, "")
    assert (tmp_path / "run" / "sample.txt").exists()


@POSIX
@pytest.mark.slow
def test_ctrl_c_while_pytorch_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # stderr then has a line for each import
    for script, last in (("gpt", "numpy"), ("gpt", "torch.nn"), ("compare", "torch.optim")):
        process = conftest.start(script, cwd=tmp_path)
        while process.stderr.readline().split("|")[-1].strip() != last:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        others = [line for line in process.stderr if not line.startswith("import time:")]
        found = process.wait(TIME_LIMIT), process.stdout.read(), others
        assert found == (-signal.SIGINT, "", [])


def test_a_folder_without_permission(small_run, run, refused, monkeypatch):
    assert small_run("bigram", "--out", "run")[0] == 0
    denied = PermissionError(errno.EACCES, "Permission denied")  # root may write anywhere
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=denied))
    complaint = refused("bigram", "--resume", "--out", "run")
    assert "cannot write the folder run: Permission denied" in complaint


def test_a_long_evaluation_shows_its_progress(monkeypatch):
    shown = []
    monkeypatch.setattr(trainer.evaluate, "tqdm", lambda x, *a, **how: shown.append(how) or x)
    model = gpt.Model(gpt.Config(n_embd=8, n_head=2, n_layer=1, block_size=4))
    trainer.evaluate.exact_loss(model, torch.randint(65, (50,)))
    assert shown[0]["delay"] == 2 and shown[0]["disable"] is None


# Absurd sizes, typing errors.

ABSURD = [
    ("gpt", "--n-layer 1000003"),
    ("gpt", "--n-layer 1000003 --n-embd 8 --n-head 1"),
    ("gpt", "--n-embd 2000000000 --n-head 1"),
    ("modern_gpt", "--n-embd 2000000 --n-head 1"),
    ("multihead_attention", "--n-embd 1000003 --n-head 1000003"),
    ("bigram", "--batch-size 2147483647"),
]


@pytest.mark.parametrize(("stage", "flags"), ABSURD)
def test_sizes_beyond_all_memory(stage, flags, refused):
    began = time.perf_counter()
    assert re.search(r"needs at least [\d,]+ GB of memory", refused(stage, *flags.split()))
    assert time.perf_counter() - began < 10  # and not minutes


@pytest.mark.parametrize("stage", STAGES)
def test_no_model_needs_less_memory_than_the_refusal_says(stage, text, monkeypatch):
    module = stage_module(stage)
    config = module.PRESETS["small"] if "PRESETS" in vars(module) else module.Config()
    config = replace(config, block_size=8, batch_size=1)
    corpus, needed = open_corpus(text), []
    monkeypatch.setattr(trainer.plan, "UserError", lambda words: needed.append(words) or OSError())
    weights = sum(12 * each.numel() for each in module.Model(config).parameters())
    enough = weights + 150_000 * vars(config).get("n_layer", 0) + 16 * 8
    trainer.plan.refuse_sizes(config, corpus, World(), enough)
    assert not needed
    with pytest.raises(OSError):
        trainer.plan.refuse_sizes(config, corpus, World(), 1 if stage == "bigram" else enough // 20)
    assert "GB of memory" in needed[0]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--learning-rat 0.1", "did you mean --learning-rate?"),
        ("--blocksize 8", "did you mean --block-size?"),
        ("--xyzzy", "--help lists the flags"),
        ("--block-size 5000", "try --block-size"),
        ("--out=", "a path is missing"),
        ("--seed=--", "a value is missing"),
        ("--data=", "a path is missing"),
    ],
)
def test_typing_errors(flags, hint, refused):
    assert hint in refused("bigram", *flags.split())


def test_underscores_in_flags(small_run, tmp_path):
    flags = "--learning_rate 0.5 --max_iters=3 --prompt is_it".split()
    code, _, errors = small_run("bigram", *flags[:-2], "--out", "run_1")
    assert code == 0, errors
    saved = json.loads((tmp_path / "run_1" / "config.json").read_text(encoding="utf-8"))
    assert (saved["config"]["learning_rate"], saved["config"]["max_iters"]) == (0.5, 3)
