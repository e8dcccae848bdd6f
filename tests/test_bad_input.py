"""Whatever is wrong: one line, exit code 2, no traceback, nothing lost or half written."""

import dataclasses
import importlib
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import gpt

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL, STAGES, files, finish, save_checkpoint, start


def refusal(run: Callable, folder: Path, script: str, *flags: object) -> str:
    """The one line with which a script refuses; it must leave the folder as it is."""
    before, paths = files(folder), sorted(folder.rglob("*"))
    code, output, errors = run(script, *flags)
    assert code == 2, output + errors
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith(f"{script}.py: ")
    assert files(folder) == before
    assert sorted(folder.rglob("*")) == paths
    return errors


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    """The same, in the test's folder."""
    return lambda script, *flags: refusal(run, tmp_path, script, *flags)


BAD_VALUES = {
    "bigram": "batch-size 0, batch-size -3, block-size 2.5, block-size 100000, max-iters 0, "
    "max-iters 9999999999, eval-interval -1, learning-rate 0, learning-rate nan, "
    "learning-rate inf, learning-rate fast, sample-length 0, temperature -0.1, temperature nan, "
    "temperature inf, top-k 0, seed -1, seed 99999999999999999999, n-embd 8, batch 8, "
    "precision float32, preset small, device tpu",
    "multihead_attention": "n-embd 30, attention list",
    "residual": "n-layer 0",
    "layer_norm": "norm sideways",
    "gpt": "n-head 5, dropout 1, dropout -0.1, weight-decay -1, warmup-iters -1, gradient-clip 0, "
    "grad-accumulation 0, precision float8, precision float16, preset huge, extend-vocabulary",
    "modern_gpt": "muon-learning-rate 0, muon-momentum 1, cooldown 0, cooldown 1.5, without rope",
}
BAD_FLAGS = [
    (script, f"--{flag}", f"--{flag.split()[0]}")
    for script, flags in BAD_VALUES.items()
    for flag in flags.split(", ")
] + [  # and what the line must name
    ("bigram", "--resume --overwrite", "--overwrite"),
    ("gpt", "--resume --init-from run", "--init-from"),
    ("gpt", "--preset small --init-from run", "--preset"),
    ("gpt", "--preset small --resume", "--preset"),
    ("gpt", "--init-from text.txt", "text.txt"),
    ("bigram", "--data nowhere.txt", "nowhere.txt"),
    ("bigram", "--data .", "prepare.py"),
    ("bigram", "--resume --out nowhere", "nowhere"),
    ("gpt", "--resume", "no run of gpt"),
    ("gpt", "--prompt €", "€"),
    ("sample", "", "RUN_FOLDER"),
    ("sample", "runs/none", "runs/none"),
    ("sample", "text.txt", "text.txt"),
    ("sample", "x" * 300, "x" * 300),
]


@pytest.mark.parametrize(("script", "flags", "named"), BAD_FLAGS)
def test_a_bad_flag(script, flags, named, refused):
    device = ["--device", "cpu"] if script == "gpt" else []
    assert named in refused(script, *flags.split(), *device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(refused):
    assert "cuda" in refused("gpt", "--device", "cuda")


BAD_TEXTS = [
    (b"", "two different characters"),
    (b"\xef\xbb\xbf", "two different characters"),
    (b"a" * 1000, "two different characters"),
    ("Zürich\n".encode("latin-1") * 100, "byte 1"),
    ("Zürich\n".encode("utf-16") * 100, "byte 0"),
    (b"a line " * 12, "too short"),  # 84 characters, the last 9 for validation
]


@pytest.mark.parametrize(("content", "fact"), BAD_TEXTS)
def test_a_bad_text(content, fact, refused, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    complaint = refused("bigram", "--data", path, "--block-size", 9)
    assert str(path) in complaint and fact in complaint


def test_the_shortest_text_that_works(run, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"a line " * 12)
    assert run("bigram", "--data", path, "--block-size", 8, "--max-iters", 2)[0] == 0


def test_a_folder_that_holds_a_run(small_run, refused):
    assert small_run("bigram", "--out", "run")[0] == 0
    complaint = refused("bigram", "--out", "run")
    assert "run has a run" in complaint
    assert all(flag in complaint for flag in ("--resume", "--overwrite", "--out"))
    # Nor is it lost when --overwrite comes with something else that is wrong.
    refused("bigram", "--out", "run", "--overwrite", "--block-size", 100_000)
    refused("bigram", "--out", "run", "--overwrite", "--data", "nowhere.txt")
    refused("bigram", "--out", "run", "--overwrite", "--prompt", "€")
    assert "€" in refused("sample", "run", "--prompt", "€")


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/run", "x" * 300])
def test_a_folder_that_cannot_be_made(folder, refused):
    assert "folder" in refused("bigram", "--out", folder)


def test_resuming_something_else(small_run, refused, text, tmp_path):
    (tmp_path / "other.txt").write_text("a line " * 40, encoding="utf-8")
    assert small_run("layer_norm", "--out", "run")[0] == 0
    resume = ["--resume", "--out", "run"]
    changes = "n-embd 16, norm post, block-size 4, batch-size 8, learning-rate 0.5, seed 2"
    for change in f"{changes}, max-iters 10, init-from run".split(", "):
        flag, value = f"--{change}".split()
        assert flag in refused("layer_norm", *resume, flag, value)
    assert "other.txt" in refused("layer_norm", *resume, "--data", "other.txt")
    assert "layer_norm.py" in refused("residual", *resume)
    text.write_text(text.read_text(encoding="utf-8") + "One more.\n", encoding="utf-8")
    assert str(text) in refused("layer_norm", *resume)


# Checkpoints.


class Code:
    """What an attacker would put into a checkpoint: unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def damaged_checkpoints(good: bytes, marker: Path) -> dict[str, bytes]:
    def saved(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    code = {"format": "character-gpt-course-2", "parts": Code(marker)}
    old = {"format": "character-gpt-course-1", "stage": "gpt", "model": {}, "step": 3}
    return {
        "empty": b"",
        "cut short": good[: len(good) // 2],
        "cut at the end": good[:-1],
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "another program's": saved({"weights": torch.zeros(3)}),
        "a lone tensor": saved(torch.zeros(3)),
        "code": saved(code),
        "code in the old format": pickle.dumps(code),
        "an older version": saved(old),
    }


def test_damaged_and_foreign_checkpoints(small_run, refused, tmp_path):
    assert small_run("gpt", "--out", "run")[0] == 0
    marker, names = tmp_path / "the code was run", ("checkpoint.pt", "best.pt")
    good = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    for kind in damaged_checkpoints(b"", marker):
        for name in names:
            content = damaged_checkpoints(good[name], marker)[kind]
            (tmp_path / "run" / name).write_bytes(content)
        fact = "older version" if kind == "an older version" else "damaged"
        for name, flags in (
            ("checkpoint.pt", ["gpt", "--resume", "--out", "run"]),
            ("best.pt", ["gpt", "--init-from", "run", "--out", "new"]),
            ("best.pt", ["sample", "run"]),
        ):
            complaint = refused(*flags)
            assert str(Path("run", name)) in complaint and fact in complaint, kind
        assert not marker.exists()
    # So that this test can fail: the attack would have worked.
    torch.load(io.BytesIO(damaged_checkpoints(b"", marker)["code"]), weights_only=False)
    assert marker.exists()


def test_a_checkpoint_that_names_another_script(small_run, refused, tmp_path):
    assert small_run("bigram", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    for name in ("os", "common", "../bigram", "no_such_stage"):
        save_checkpoint(path, torch.load(path, weights_only=True) | {"stage": name})
        assert name in refused("sample", "run")


def test_a_stage_that_has_changed_since(small_run, refused, tmp_path):
    assert small_run("gpt", "--out", "run")[0] == 0
    for name, flags in (
        ("best.pt", ["sample", "run"]),
        ("best.pt", ["gpt", "--init-from", "run", "--out", "new"]),
        ("checkpoint.pt", ["gpt", "--resume", "--out", "run"]),
    ):
        good = torch.load(tmp_path / "run" / name, weights_only=True)
        changed = good | {"config": good["config"] | {"n_embd": 16}}
        save_checkpoint(tmp_path / "run" / name, changed)
        complaint = refused(*flags)
        assert "does not fit gpt.py" in complaint and "embedding.weight" in complaint
        save_checkpoint(tmp_path / "run" / name, good)


# Memory, numbers, the disk.


def test_out_of_memory_in_the_first_step_keeps_the_old_run(small_run, tmp_path, monkeypatch):
    assert small_run("gpt", "--out", "run")[0] == 0
    before, forward = files(tmp_path), gpt.Model.forward

    def greedy(self: torch.nn.Module, *arguments: torch.Tensor) -> tuple:
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, *arguments)

    monkeypatch.setattr(gpt.Model, "forward", greedy)
    resume = ["--out", "run", "--resume"]
    for flags in (["--out", "run", "--overwrite"], ["--out", "another"], [], resume):
        code, _, errors = small_run("gpt", *flags)
        assert code == 2
        assert "out of memory" in errors and len(errors.splitlines()) == 1
    assert files(tmp_path) == before


def test_a_loss_that_explodes(run, tmp_path):
    flags = [*SMALL, "--learning-rate", 1e38, "--out", "run"]
    code, _, errors = run("self_attention", *flags)
    assert code == 2
    assert len(errors.splitlines()) == 1
    for fact in ("nan at step 2", "--learning-rate", "run keeps step 0"):
        assert fact in errors
    for name in ("checkpoint.pt", "best.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert all(weight.isfinite().all() for weight in state["parts"]["model"].values())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(small_run, run, tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    assert small_run("bigram", "--out", folder)[0] == 0
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # enough for losses.csv, no more
    try:
        code, _, errors = run("bigram", "--resume", "--out", folder, "--max-iters", 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert f"cannot write {folder}" in errors and len(errors.splitlines()) == 1
    after = files(folder)
    assert not [path for path in after if path.suffix == ".part"]
    for name in ("checkpoint.pt", "best.pt", "losses.csv"):
        assert after[folder / name] == before[folder / name]
    assert run("bigram", "--resume", "--out", folder, "--max-iters", 40)[0] == 0


# The command line.


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_field_of_the_config(stage, run):
    code, output, _ = run(stage, "--help")
    assert code == 0
    output = " ".join(output.split())
    config = importlib.import_module(stage).Config
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    for field in dataclasses.fields(config):
        name = "--" + field.name.replace("_", "-")
        if field.name == "vocab_size":
            assert name not in output
        else:
            comment = re.search(rf"    {field.name}: .*  # (.*)", source)[1]
            assert re.search(rf"{name}[^(]* {re.escape(comment)}", output), name


@pytest.mark.slow
def test_as_a_reader_sees_it(tmp_path, text):
    """The same through a real command line."""
    code, output, errors = finish(start("gpt", "--data", "nowhere.txt", cwd=tmp_path))
    assert (code, output) == (2, "")
    assert errors.startswith("gpt.py: ") and "nowhere.txt" in errors
    assert len(errors.splitlines()) == 1
    flags = [*SMALL, *SMALL_MODEL["bigram"], "--data", text]
    code, _, errors = finish(start("bigram", *flags, cwd=tmp_path))
    assert (code, errors) == (0, "")
