"""Prepared folders: the same ids as in memory, one line for what is wrong, nothing half done."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import prepare
from trainer import UserError
from common import Tokenizer, draw_batch, split
from prepare import open_prepared

import pytest
import torch
from conftest import ROOT, TIME_LIMIT, finish, start
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_bad_input import refusal

PIPES = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes like these")
MARK = "\ufeff"  # a byte order mark, which some editors write at the start of a file
AWKWARD = st.sampled_from(["\r\n", "\r", "\0", "e\u0301", "\u2028", "😀", "\U0010ffff", MARK])
TEXT = st.lists(AWKWARD | st.text(max_size=5), max_size=10).map("".join)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def prepare_in_chunks(chunk_bytes: int, texts: list[Path], folder: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(common, "MAX_VALIDATION", 3)
        return prepare.prepare(texts, folder)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.integers(min_value=1, max_value=9))
@example(["aé", "漢😀\r\n"], 1)
@example(["abcdefghijklmnopqrstuvwxyz" * 2], 7)
@example([MARK + "a", MARK + MARK + "b"], 2)
def test_the_files_hold_what_memory_would(texts, chunk_bytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode("utf-8"))
        parts = [path.read_bytes().decode("utf-8-sig") for path in paths]
        whole = "".join(parts)
        if not all(parts) or len(set(whole)) == 1:
            with pytest.raises(UserError, match="is empty|only repeats one character"):
                prepare_in_chunks(chunk_bytes, paths, folder / "out")
            assert listing(folder) == paths
            return
        meta = prepare_in_chunks(chunk_bytes, paths, folder / "out")

        tokenizer = Tokenizer(whole)
        border = max(len(whole) * 9 // 10, len(whole) - 3)
        ids = torch.tensor(tokenizer.encode(whole))
        for name, part in (("train.bin", ids[:border]), ("val.bin", ids[border:])):
            content = (folder / "out" / name).read_bytes()
            assert content == part.numpy().astype("<u2").tobytes()
            assert meta["sha256"][name] == hashlib.sha256(content).hexdigest()
        assert json.loads((folder / "out" / "meta.json").read_bytes()) == meta
        assert meta["vocabulary"] == tokenizer.vocabulary
        counts = {"train": border, "validation": len(whole) - border}
        counts |= {"all": len(whole), "different": len(tokenizer.vocabulary)}
        assert meta["characters"] == counts
        for path, source in zip(paths, meta["sources"], strict=True):
            assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert {path.name for path in (folder / "out").iterdir()} == {*meta["sha256"], "meta.json"}


def test_a_prepared_folder_is_the_text_as_a_corpus(run, text):
    Path("data", "mine").mkdir(parents=True)  # an empty folder is no obstacle
    code, output, errors = run("prepare", text, "--out", "data/mine")
    assert (code, errors) == (0, "")
    content, folder = text.read_text(encoding="utf-8"), Path("data/mine")
    assert f"{len(content):,} characters" in output and f"--data {folder}" in output
    torch.set_warn_always(True)  # and not only once in a process, as PyTorch usually does
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = open_prepared(folder)
    torch.set_warn_always(False)
    tokenizer = Tokenizer(content)
    train, validation = split(torch.tensor(tokenizer.encode(content)))
    assert (corpus.name, corpus.vocabulary) == ("mine", tokenizer.vocabulary)
    assert corpus.sha256 == hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint16
    assert torch.equal(corpus.ids(corpus.train), train)
    assert torch.equal(corpus.ids(corpus.validation), validation)
    windows = [
        draw_batch(tokens, 8, 4, torch.Generator().manual_seed(1))
        for tokens in (corpus.train, train)
    ]
    assert all(map(torch.equal, *windows))


# Refusals, after which nothing is there that was not there before.

REFUSALS = [
    ("--out out", "TEXT"),
    ("text.txt", "--out"),
    ("text.txt --out out --overwrite", "--overwrite"),
    ("text.txt empty.txt --out out", "empty.txt"),
    ("latin.txt --out out", "latin.txt"),
    ("same.txt same.txt --out out", "'a'"),
    ("text.txt no.txt --out out", "no.txt"),
    ("text.txt folder --out out", "folder"),
    ("text.txt --out text.txt", "text.txt is a file"),
    ("text.txt --out text.txt/out", "cannot write"),
    ("text.txt --out " + "x" * 300, "cannot write"),
    ("text.txt --out folder", "folder is not empty"),
    ("text.txt --out prepared", "prepared already holds"),
]


def test_what_cannot_be_prepared_is_refused(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Zürich\n".encode("latin-1"))
    (tmp_path / "same.txt").write_bytes(b"aaa")
    assert run("prepare", "text.txt", "--out", "prepared")[0] == 0
    for flags, named in REFUSALS:
        assert named in refusal(run, tmp_path, "prepare", *flags.split())


def wait_until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answer_pipe(pipe: Path, content: bytes, before: Callable[[], object]) -> None:
    """Wait for somebody to read a named pipe, do something, and only then send the content."""
    descriptors = []

    def is_open() -> bool:
        try:
            descriptors.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO  # nobody reads it yet
        return bool(descriptors)

    wait_until(is_open)
    pipe.unlink()  # whoever opens it again finds what `before` puts there
    before()
    os.write(descriptors[0], content)
    os.close(descriptors[0])


@PIPES
@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(number, run, tmp_path):
    """A real one, which has written a part and waits for the rest."""
    text, pipe, neighbor = (tmp_path / name for name in ("large.txt", "pipe", "out.mine.part"))
    text.write_bytes(b"A line of a longer text.\n" * 20_000)
    os.mkfifo(pipe)
    neighbor.mkdir()  # named like one of ours, but not one
    process = start("prepare", text, pipe, "--out", "out", cwd=tmp_path)
    try:
        answer_pipe(pipe, b"more", before=lambda: os.mkfifo(pipe))
        partial = tmp_path / f"out.{process.pid}.part"
        wait_until(lambda: [p for p in partial.glob("train.bin") if p.stat().st_size])
        process.send_signal(getattr(signal, number))
        code, output, errors = finish(process)
    finally:
        process.kill()
    assert not (tmp_path / "out").exists()
    if number == "SIGKILL":
        with pytest.raises(UserError, match="meta.json"):
            open_prepared(partial)
    else:
        assert (code, output, errors) == (130, "", "")
        assert not partial.exists()
    assert run("prepare", "text.txt", "--out", "out")[0] == 0  # and removes what was left
    assert list(tmp_path.glob("*.part")) == [neighbor]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows the most memory a process had")
def test_memory_does_not_grow_with_the_text(tmp_path):
    line = "A line — of a text, для памяти, 😀.\n".encode()
    for name, size in (("small", 1_000_000), ("large", 40_000_000)):
        (tmp_path / name).write_bytes(line * (size // len(line)))
    code = (
        "import pathlib, prepare\nfor name in ('small', 'large'):\n"
        "  prepare.prepare([pathlib.Path(name)], pathlib.Path(name + '-out'))\n"
        "  status = pathlib.Path('/proc/self/status').read_text()\n"
        "  print(status.partition('VmHWM:')[2].split()[0])"
    )
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "timeout": TIME_LIMIT}
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, **options)
    small, large = map(int, output.split())  # in KiB
    assert large - small < 10_000


# Damaged folders.


def rewritten(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def changed(name: str, value: object) -> Callable[[Path], object]:
    """Change one entry of meta.json."""
    return rewritten("meta.json", lambda x: json.dumps(json.loads(x) | {name: value}).encode())


def moved(folder: Path) -> None:
    """An id goes to the other file."""
    rewritten("train.bin", lambda x: x[:-2])(folder)
    rewritten("val.bin", lambda x: x + b"\0\0")(folder)


DAMAGE = {
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "no train.bin": lambda folder: (folder / "train.bin").unlink(),
    "meta.json is cut short": rewritten("meta.json", lambda x: x[:-9]),
    "meta.json is no text": rewritten("meta.json", lambda x: b"\xff" + x),
    "meta.json is a list": rewritten("meta.json", lambda x: b"[1, 2]"),
    "meta.json lacks entries": rewritten("meta.json", lambda x: x[: x.index(b",")] + b"}"),
    "another format": changed("format", "character-gpt-course-data-0"),
    "the vocabulary is out of order": rewritten("meta.json", lambda x: x.replace(b"fhi", b"hif")),
    "train.bin is cut short": rewritten("train.bin", lambda x: x[:-2]),
    "train.bin is empty": rewritten("train.bin", lambda x: b""),
    "val.bin is another text's": rewritten("val.bin", lambda x: b"\xff" * len(x)),
    "an id went to the other file": moved,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder(damage, run, tmp_path):
    assert run("prepare", "text.txt", "--out", "out")[0] == 0
    folder = tmp_path / "out"
    before = [path.read_bytes() for path in listing(folder)]
    DAMAGE[damage](folder)
    assert [path.read_bytes() for path in listing(folder)] != before
    complaint = refusal(run, tmp_path, "bigram", "--data", folder)
    assert str(folder) in complaint and "prepare.py" in complaint.removeprefix("bigram.py")
