"""Whatever is wrong: one clear line, exit code 2, no traceback, nothing lost or half written."""

import dataclasses
import importlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_MODEL, STAGES, files, start

import gpt
from common import is_out_of_memory

NEWS = "a line " * 40  # 280 characters, 28 of them for validation


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    """Call a script that must refuse; its one line of complaint."""

    def call(script: str, *flags: object) -> str:
        before = files(tmp_path)
        code, output, errors = run(script, *flags)
        assert code == 2, output + errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"{script}.py: ")
        assert not output
        assert files(tmp_path) == before
        return errors

    return call


BAD_FLAGS = [
    ("bigram", "--batch-size 0", "--batch-size: '0' is not a whole number from 1 up"),
    ("bigram", "--batch-size -3", "'-3' is not a whole number from 1 up"),
    ("bigram", "--block-size 0", "--block-size"),
    ("bigram", "--block-size 2.5", "'2.5' is not a whole number"),
    ("bigram", "--max-iters 0", "--max-iters"),
    ("bigram", "--eval-interval -1", "--eval-interval"),
    ("bigram", "--learning-rate 0", "'0' is not a number above 0"),
    ("bigram", "--learning-rate nan", "'nan' is not a number above 0"),
    ("bigram", "--learning-rate inf", "--learning-rate"),
    ("bigram", "--learning-rate fast", "'fast' is not a number"),
    ("bigram", "--sample-length 0", "--sample-length"),
    ("bigram", "--temperature -0.1", "'-0.1' is not a number from 0 up"),
    ("bigram", "--temperature nan", "--temperature"),
    ("bigram", "--top-k 0", "--top-k: '0' is not a whole number from 1 up"),
    ("bigram", "--seed -1", "--seed"),
    ("bigram", "--seed 99999999999999999999", "--seed"),
    ("bigram", "--n-embd 8", "unrecognized arguments: --n-embd 8"),
    ("bigram", "--batch 8", "unrecognized arguments: --batch 8"),
    ("bigram", "--resume --overwrite", "not allowed with"),
    ("bigram", "--device tpu", "invalid choice: 'tpu'"),
    ("self_attention", "--n-embd 0", "--n-embd"),
    ("multihead_attention", "--n-embd 30", "--n-embd 30 cannot be shared out among --n-head 4"),
    ("multihead_attention", "--attention all", "invalid choice: 'all'"),
    ("residual", "--n-layer 0", "--n-layer"),
    ("layer_norm", "--norm sideways", "invalid choice: 'sideways'"),
    ("gpt", "--n-head 0", "--n-head"),
    ("modern_gpt", "--muon-learning-rate 0", "'0' is not a number above 0"),
    ("modern_gpt", "--muon-learning-rate 1e38", "'1e38' is not a number above 0, at most 1000"),
    ("modern_gpt", "--muon-momentum 1", "'1' is not a number from 0 to below 1"),
    ("modern_gpt", "--cooldown 0", "'0' is not a number above 0, at most 1"),
    ("modern_gpt", "--cooldown 1.5", "'1.5' is not a number above 0, at most 1"),
    ("modern_gpt", "--without", "--without: expected at least one argument"),
    ("gpt", "--n-embd 128 --n-head 5", "cannot be shared out"),
    ("gpt", "--dropout 1", "'1' is not a number from 0 to below 1"),
    ("gpt", "--dropout -0.1", "--dropout"),
    ("gpt", "--weight-decay -1", "--weight-decay"),
    ("gpt", "--warmup-iters -1", "--warmup-iters"),
    ("gpt", "--gradient-clip 0", "--gradient-clip"),
    ("gpt", "--preset huge", "invalid choice: 'huge'"),
    ("sample", "", "RUN_FOLDER"),
    ("sample", "runs/none", "holds no trained run: there is no such folder"),
    ("sample", "text.txt", "text.txt is a file: name the folder of a run"),
    ("sample", "x" * 300, "holds no trained run"),
]


@pytest.mark.parametrize(("script", "flags", "complaint"), BAD_FLAGS)
def test_a_bad_flag(script: str, flags: str, complaint: str, refused: Callable) -> None:
    assert complaint in refused(script, *flags.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(refused: Callable) -> None:
    assert "no cuda device" in refused("gpt", "--device", "cuda")


BAD_TEXTS = [
    (b"", "is empty"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"a" * 1000, "repeats one character, 'a'"),
    ("Zürich\n".encode("latin-1") * 100, "is not UTF-8 text (byte 1 is no character)"),
    ("Zürich\n".encode("utf-16") * 100, "is not UTF-8 text"),
    (b"a line " * 12, "is too short: a split of it has 9 characters"),
]


@pytest.mark.parametrize(("content", "complaint"), BAD_TEXTS)
def test_a_bad_text(content: bytes, complaint: str, refused: Callable, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert complaint in refused("bigram", "--data", path, "--block-size", 9)


def test_the_shortest_text_that_works(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"a line " * 12)  # 84 characters, the last 9 for validation
    assert run("bigram", "--data", path, "--block-size", 8, "--max-iters", 2)[0] == 0


def test_a_text_that_is_not_there(refused: Callable, tmp_path: Path) -> None:
    assert "cannot read the text" in refused("gpt", "--data", tmp_path / "no.txt")
    assert "no prepared text" in refused("gpt", "--data", tmp_path)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_text_that_may_not_be_read(refused: Callable, tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text(NEWS, encoding="utf-8")
    path.chmod(0)
    assert "cannot read the text" in refused("bigram", "--data", path)


def test_a_prompt_with_a_character_that_the_text_lacks(
    refused: Callable, small_run: Callable
) -> None:
    complaint = "'€' (U+20AC) does not occur in the text"
    assert complaint in refused("gpt", "--prompt", "5 €")
    assert small_run("bigram", "--out", "run")[0] == 0
    assert complaint in refused("sample", "run", "--prompt", "5 €")


def test_a_folder_that_holds_a_run(small_run: Callable, refused: Callable) -> None:
    assert small_run("bigram", "--out", "run")[0] == 0
    assert "run already holds a run" in refused("bigram", "--out", "run")
    # Nor is it lost when --overwrite comes with something else that is wrong.
    refused("bigram", "--out", "run", "--overwrite", "--block-size", 100_000)
    refused("bigram", "--out", "run", "--overwrite", "--data", "nowhere.txt")
    refused("bigram", "--out", "run", "--overwrite", "--prompt", "€")


def test_a_folder_that_cannot_be_made(run: Callable, text: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    for folder in (text, text / "run", "x" * 300):
        code, _, errors = run("bigram", "--out", folder)
        assert code == 2
        assert "cannot write the run's folder" in errors
        assert len(errors.splitlines()) == 1
    assert files(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_runs_folder_that_leads_nowhere(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("/nowhere/at/all")
    code, _, errors = run("bigram")
    assert code == 2
    assert "cannot write the run's folder" in errors


def test_nothing_to_resume(refused: Callable) -> None:
    assert "no run of gpt in runs to resume" in refused("gpt", "--resume")
    assert "holds no trained run" in refused("gpt", "--resume", "--out", "nowhere")


CHANGES = [
    ("layer_norm", "--n-embd 16", "was made with --n-embd 8, not 16"),
    ("layer_norm", "--norm post", "was made with --norm pre, not post"),
    ("layer_norm", "--block-size 4", "was made with --block-size 8, not 4"),
    ("layer_norm", "--learning-rate 0.5", "was made with --learning-rate 0.001, not 0.5"),
    ("layer_norm", "--seed 2", "was made with --seed 1, not 2"),
    ("layer_norm", "--max-iters 10", "is at step 20 already"),
    ("layer_norm", "--data other.txt", "is not the text that the run in run learns from"),
    ("residual", "", "was made by layer_norm.py"),
]


@pytest.mark.parametrize(("stage", "flags", "complaint"), CHANGES)
def test_resuming_something_else(
    stage: str, flags: str, complaint: str, small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text(NEWS, encoding="utf-8")
    assert small_run("layer_norm", "--out", "run")[0] == 0
    assert complaint in refused(stage, "--resume", "--out", "run", *flags.split())


def test_resuming_with_a_changed_text(small_run: Callable, refused: Callable, text: Path) -> None:
    assert small_run("bigram", "--out", "run")[0] == 0
    text.write_text(text.read_text(encoding="utf-8") + "One more.\n", encoding="utf-8")
    assert "is not the text that the run" in refused("bigram", "--resume", "--out", "run")


def test_a_preset_with_resume(small_run: Callable, refused: Callable) -> None:
    assert small_run("gpt", "--out", "run")[0] == 0
    assert "--preset" in refused("gpt", "--resume", "--out", "run", "--preset", "full")


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

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "no tensor in here")
    code = {"format": "character-gpt-course-1", "model": Code(marker)}
    return {
        "empty": b"",
        "cut short": good[: len(good) // 2],
        "cut at the end": good[:-1],
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "another archive": archive.getvalue(),
        "another program's": saved({"weights": torch.zeros(3)}),
        "a lone tensor": saved(torch.zeros(3)),
        "code": saved(code),
        "code in the old format": pickle.dumps(code),
    }


@pytest.mark.parametrize("kind", damaged_checkpoints(b"", Path()))
def test_a_damaged_or_foreign_checkpoint(
    kind: str, small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    assert small_run("gpt", "--out", "run")[0] == 0
    marker = tmp_path / "the code was run"
    for name in ("checkpoint.pt", "best.pt"):
        path = tmp_path / "run" / name
        path.write_bytes(damaged_checkpoints(path.read_bytes(), marker)[kind])
    complaint = "is damaged, or is not a checkpoint of this course"
    assert complaint in refused("gpt", "--resume", "--out", "run")
    assert complaint in refused("sample", "run")
    assert not marker.exists()


def test_the_attack_would_have_worked(tmp_path: Path) -> None:
    """So that the test above can fail."""
    marker = tmp_path / "the code was run"
    torch.load(io.BytesIO(damaged_checkpoints(b"", marker)["code"]), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["os", "common", "../bigram", "no_such_stage"])
def test_a_checkpoint_that_names_another_script(
    name: str, small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    assert small_run("bigram", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    torch.save(torch.load(path, weights_only=True) | {"stage": name}, path)
    assert "no stage of this course" in refused("sample", "run")


def test_a_stage_that_has_changed_since(
    small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    assert small_run("gpt", "--out", "run")[0] == 0
    path = tmp_path / "run" / "best.pt"
    checkpoint = torch.load(path, weights_only=True)
    for changed in (
        checkpoint | {"config": checkpoint["config"] | {"wings": 2}},
        checkpoint | {"config": checkpoint["config"] | {"n_embd": 16}},
    ):
        torch.save(changed, path)
        assert "gpt.py has changed since this run" in refused("sample", "run")


OUT_OF_MEMORY = (
    "out of memory: make --batch-size, --block-size, --n-embd or --n-layer smaller, or gpt.py's "
    "--grad-accumulation larger"
)


@pytest.mark.parametrize(
    "n_embd",
    [
        2_000_000_000,  # too large to be a size at all
        pytest.param(
            2_000_000,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="might be granted there"),
        ),
    ],
)
def test_out_of_memory(n_embd: int, refused: Callable) -> None:
    flags = ["--n-head", 1, "--n-layer", 1, "--n-embd", n_embd]
    assert OUT_OF_MEMORY in refused("gpt", *flags)


def test_out_of_memory_in_the_first_step_keeps_the_old_run(
    small_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small_run("gpt", "--out", "run")[0] == 0
    before = files(tmp_path)
    forward = gpt.Model.forward

    def greedy(self: torch.nn.Module, *arguments: torch.Tensor) -> tuple:
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, *arguments)

    monkeypatch.setattr(gpt.Model, "forward", greedy)
    for flags in (["--out", "run", "--overwrite"], ["--out", "another"], []):
        code, _, errors = small_run("gpt", *flags)
        assert (code, errors) == (2, f"gpt.py: {OUT_OF_MEMORY}\n")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), True),
        (RuntimeError("value cannot be converted to type int64_t without overflow"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x8 and 4x8)"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it


def test_a_loss_that_explodes(run: Callable, text: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--learning-rate", 1e38, "--out", "run"]
    code, _, errors = run("self_attention", *flags)
    assert code == 2
    assert "the loss became nan at step 2: try a smaller --learning-rate" in errors
    assert "run keeps step 0 in checkpoint.pt and step 0 in best.pt" in errors
    assert len(errors.splitlines()) == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 20


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    small_run: Callable, run: Callable, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    assert small_run("bigram", "--out", folder)[0] == 0
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # enough for a log, no more
    try:
        code, _, errors = run("bigram", "--resume", "--out", folder, "--max-iters", 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert errors == f"bigram.py: cannot write {folder / 'best.pt'}: File too large\n"
    after = files(folder)
    for name in ("checkpoint.pt", "best.pt", "losses.csv"):
        assert after[folder / name] == before[folder / name]
    assert run("bigram", "--resume", "--out", folder, "--max-iters", 40)[0] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_field_of_the_config(stage: str, run: Callable) -> None:
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


def test_a_field_without_a_comment_is_a_flag_all_the_same(tmp_path: Path) -> None:
    """Readers change the scripts: theirs need not be as tidy."""
    source = (ROOT / "bigram.py").read_text(encoding="utf-8")
    source = source.replace("class Config:\n", "class Config:\n    mood: int = 3\n")
    path = tmp_path / "my_bigram.py"
    path.write_text(source, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, path, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "--mood N" in process.stdout


def test_as_a_reader_sees_it(tmp_path: Path, text: Path) -> None:
    """The same through a real command line."""
    process = start("gpt", "--data", "nowhere.txt", cwd=tmp_path)
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors == "gpt.py: cannot read the text nowhere.txt: No such file or directory\n"
    process = start("bigram", *SMALL, *SMALL_MODEL["bigram"], "--data", text, cwd=tmp_path)
    assert process.communicate()[1] == ""
    shutil.rmtree(tmp_path / "runs")
