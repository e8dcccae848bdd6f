"""Prepared folders: the same numbers as in memory, one plain line for what is wrong, no halves."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from common import Tokenizer, UserError, draw_batch, split
from prepare import open_prepared

PIPES = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes like these")
MARK = "\ufeff"  # what some editors write at the start of a file
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
        return prepare.prepare(texts, folder)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.integers(min_value=1, max_value=9))
@example(["aé", "漢😀\r\n"], 1)
@example([MARK + "a", MARK + MARK + "b"], 2)
def test_the_files_hold_what_memory_would(texts: list[str], chunk_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode("utf-8"))
        parts = [path.read_bytes().decode("utf-8-sig") for path in paths]
        whole = "".join(parts)
        if not all(parts) or len(set(whole)) == 1:
            with pytest.raises(UserError, match="is empty|repeats one character"):
                prepare_in_chunks(chunk_bytes, paths, folder / "out")
            assert listing(folder) == paths
            return
        meta = prepare_in_chunks(chunk_bytes, paths, folder / "out")

        tokenizer = Tokenizer(whole)
        expected = split(torch.tensor(tokenizer.encode(whole)))
        for name, part in zip(("train.bin", "val.bin"), expected, strict=True):
            content = (folder / "out" / name).read_bytes()
            assert content == part.numpy().astype("<u2").tobytes()
            assert meta["sha256"][name] == hashlib.sha256(content).hexdigest()
        assert json.loads((folder / "out" / "meta.json").read_bytes()) == meta
        assert meta["vocabulary"] == tokenizer.vocabulary
        assert meta["characters"] == {
            "all": len(whole),
            "different": len(tokenizer.vocabulary),
            "train": len(expected[0]),
            "validation": len(expected[1]),
        }
        assert meta["sources"] == [
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in paths
        ]
        assert listing(folder) == sorted(
            [*paths, *(folder / "out" / name for name in ("", *meta["sha256"], "meta.json"))]
        )


def test_a_million_characters_validate_at_most(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    for count, validation in (
        (10_000_000, 1_000_000),
        (10_000_011, 1_000_000),
        (9_999_990, 999_999),
    ):
        content = (b"0123456789" * 1_000_002)[:count]
        text.write_bytes(content)
        folder = tmp_path / str(count)
        prepare.prepare([text], folder)
        parts = [np.fromfile(folder / name, "<u2") for name in ("train.bin", "val.bin")]
        assert len(parts[1]) == validation
        assert (np.concatenate(parts) + ord("0")).astype("u1").tobytes() == content


def test_the_largest_vocabulary(tmp_path: Path) -> None:
    characters = [chr(i) for i in range(2**16 + 2**11 + 1) if not 0xD800 <= i < 0xE000]
    text = tmp_path / "all.txt"
    text.write_bytes("".join(characters[:-1]).encode("utf-8"))
    prepare.prepare([text], tmp_path / "out")
    corpus = open_prepared(tmp_path / "out")
    assert corpus.vocabulary == "".join(characters[:-1])
    numbers = torch.cat([corpus.training, corpus.validation])
    assert numbers.tolist() == list(range(2**16))

    text.write_bytes("".join(characters).encode("utf-8"))
    with pytest.raises(UserError, match="has 65,537 different characters"):
        prepare.prepare([text], tmp_path / "more")
    assert not (tmp_path / "more").exists()


@settings(deadline=None)
@given(
    TEXT.filter(bool),
    st.sampled_from([b"\xff", b"\xc3", b"\xf0\x9f\x98", b"\xed\xa0\x80"]),
    st.integers(1, 9),
)
@example(MARK + "a", b"\xff", 4)
def test_a_bad_byte_is_named_by_its_place(text: str, bad: bytes, chunk_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "bad.txt"
        path.write_bytes(text.encode("utf-8") + bad)
        place = path.stat().st_size - len(bad)
        with pytest.raises(UserError, match=rf"bad.txt is not UTF-8 text \(byte {place} "):
            prepare_in_chunks(chunk_bytes, [path], folder / "out")
        assert listing(folder) == [path]


def test_what_a_reader_sees(run: Callable, text: Path, tmp_path: Path) -> None:
    code, output, errors = run("prepare", text, "--out", "data/mine")
    count = len(text.read_text(encoding="utf-8"))
    different = len(set(text.read_text(encoding="utf-8")))
    folder = Path("data/mine")
    assert (code, errors) == (0, "")
    assert output == (
        f"{count:,} characters, {different} different ones, are in {folder}; "
        f"to learn from them: python gpt.py --data {folder}\n"
    )
    assert sorted(os.listdir(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_an_empty_folder_will_do(run: Callable, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("prepare", text, "--out", "out")[0] == 0
    assert len(open_prepared(tmp_path / "out").training)


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    """Call prepare.py, which must refuse and leave no trace; its one line of complaint."""

    def call(*flags: object) -> str:
        before = {path: path.is_file() and path.read_bytes() for path in listing(tmp_path)}
        code, output, errors = run("prepare", *flags)
        assert (code, output) == (2, ""), errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("prepare.py: ")
        assert {path: path.is_file() and path.read_bytes() for path in listing(tmp_path)} == before
        return errors

    return call


def test_bad_flags(refused: Callable) -> None:
    assert "TEXT" in refused("--out", "out")
    assert "--out" in refused("text.txt")
    assert "--overwrite" in refused("text.txt", "--out", "out", "--overwrite")


BAD_TEXTS = [
    (b"", "the text bad.txt is empty"),
    (b"\xef\xbb\xbf", "the text bad.txt is empty"),
    ("Zürich\n".encode("latin-1") * 10, "bad.txt is not UTF-8 text (byte 1 is no character)"),
    ("Zürich\n".encode("utf-16") * 10, "bad.txt is not UTF-8 text (byte 0 is no character)"),
]


@pytest.mark.parametrize(("content", "complaint"), BAD_TEXTS)
def test_a_bad_text(content: bytes, complaint: str, refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert complaint in refused("bad.txt", "--out", "out")
    assert complaint in refused("text.txt", "bad.txt", "--out", "out")


def test_a_text_of_one_character(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_bytes(b"aaa")
    assert "repeats one character, 'a'" in refused("same.txt", "same.txt", "--out", "out")


def test_a_text_that_cannot_be_read(refused: Callable, tmp_path: Path) -> None:
    assert "cannot read the text no.txt: " in refused("text.txt", "no.txt", "--out", "out")
    (tmp_path / "folder").mkdir()
    assert "cannot read the text folder: " in refused("folder", "--out", "out")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_text_that_may_not_be_read(refused: Callable, text: Path) -> None:
    text.chmod(0)
    assert "cannot read the text text.txt" in refused("text.txt", "--out", "out")


def test_an_output_that_is_taken(run: Callable, refused: Callable, tmp_path: Path) -> None:
    assert "text.txt is a file" in refused("text.txt", "--out", "text.txt")
    assert "cannot write" in refused("text.txt", "--out", "text.txt/out")
    assert "cannot write" in refused("text.txt", "--out", "x" * 300)
    assert f"{tmp_path} is not empty" in refused("text.txt", "--out", tmp_path)
    assert run("prepare", "text.txt", "--out", "out")[0] == 0
    assert "out already holds a prepared text" in refused("text.txt", "--out", "out")


def test_a_full_disk(run: Callable, refused: Callable, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # the text needs more
    try:
        complaint = refused("text.txt", "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert complaint == "prepare.py: cannot write out: File too large\n"
    assert run("prepare", "text.txt", "--out", "out")[0] == 0


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
@pytest.mark.parametrize("change", ["other letters", "longer", "shorter"])
def test_a_text_that_changes_between_its_two_readings(
    change: str, run: Callable, text: Path, tmp_path: Path
) -> None:
    """A pipe behind the text tells when it has been read for the first time."""
    content = text.read_bytes()
    others = {
        "other letters": content.replace(b"Line", b"linE"),
        "longer": content + b"Line",
        "shorter": content[:-1],
    }
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def meanwhile() -> None:
        text.write_bytes(others[change])
        pipe.write_bytes(b"more")

    thread = threading.Thread(target=answer_pipe, args=(pipe, b"more", meanwhile), daemon=True)
    thread.start()
    code, output, errors = run("prepare", "text.txt", "pipe", "--out", "out")
    thread.join()
    assert (code, output) == (2, "")
    assert errors.startswith("prepare.py: text.txt changed between its two readings")
    assert len(errors.splitlines()) == 1
    assert listing(tmp_path) == [pipe, text]


@pytest.fixture
def halfway(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A real preparation of text and pipe that has written a part and waits for the rest."""
    text, pipe = tmp_path / "large.txt", tmp_path / "pipe"
    text.write_bytes(b"A line of a longer text.\n" * 20_000)
    os.mkfifo(pipe)
    process = start("prepare", text, pipe, "--out", "out", cwd=tmp_path)
    answer_pipe(pipe, b"more", before=lambda: os.mkfifo(pipe))
    wait_until(lambda: [path for path in tmp_path.glob("*.part/train.bin") if path.stat().st_size])
    yield process
    process.kill()
    process.communicate()


@PIPES
def test_kill_leaves_nothing_that_looks_finished(
    halfway: subprocess.Popen, run: Callable, text: Path, tmp_path: Path
) -> None:
    neighbour = tmp_path / "out.mine.part"  # named alike, but not one of ours
    neighbour.mkdir()
    halfway.kill()
    halfway.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(f"out.{halfway.pid}.part")
    assert not (left / "meta.json").exists()
    with pytest.raises(UserError, match="holds no prepared text"):
        open_prepared(left)

    assert run("prepare", "text.txt", "--out", "out")[0] == 0
    assert len(open_prepared(tmp_path / "out").training)
    assert list(tmp_path.glob("*.part")) == [neighbour]


@PIPES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_at_all(
    number: int, halfway: subprocess.Popen, tmp_path: Path
) -> None:
    halfway.send_signal(number)
    assert halfway.communicate() == ("", "")
    assert halfway.returncode == 130
    assert not list(tmp_path.glob("out*"))


@PIPES
def test_of_two_preparations_of_one_folder_the_later_wins(
    halfway: subprocess.Popen, run: Callable, text: Path, tmp_path: Path
) -> None:
    assert run("prepare", "text.txt", "--out", "out")[0] == 0
    answer_pipe(tmp_path / "pipe", b"more", before=lambda: None)
    output, errors = halfway.communicate()
    assert (halfway.returncode, output) == (2, "")
    assert errors.startswith("prepare.py: cannot write out: ")
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.glob("*.part"))
    count = len(text.read_text(encoding="utf-8"))
    assert len(open_prepared(tmp_path / "out").training) == count * 9 // 10


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the most memory a process had")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    line = "A line — of a text, для памяти, 😀.\n".encode()
    for name, size in (("small", 1_000_000), ("large", 60_000_000)):
        (tmp_path / name).write_bytes(line * (size // len(line)))
    code = """if True:
        from pathlib import Path
        from prepare import prepare
        for name in ("small", "large"):
            prepare([Path(name)], Path(name + "-out"))
            print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    """
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    small, large = map(int, process.stdout.split())  # in KiB
    assert large - small < 10_000


@pytest.fixture
def prepared(run: Callable, text: Path, tmp_path: Path) -> Path:
    assert run("prepare", "text.txt", "--out", "out")[0] == 0
    return tmp_path / "out"


def test_a_prepared_folder_is_the_text_as_a_corpus(prepared: Path, text: Path) -> None:
    torch.set_warn_always(True)  # and not only once in a process, as PyTorch usually does
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = open_prepared(prepared)
    torch.set_warn_always(False)
    content = text.read_text(encoding="utf-8")
    tokenizer = Tokenizer(content)
    training, validation = split(torch.tensor(tokenizer.encode(content)))
    assert (corpus.name, corpus.path) == ("out", str(prepared))
    assert corpus.sha256 == hashlib.sha256((prepared / "meta.json").read_bytes()).hexdigest()
    assert corpus.vocabulary == tokenizer.vocabulary
    assert corpus.training.dtype == corpus.validation.dtype == torch.uint16
    assert torch.equal(corpus.training.long(), training)
    assert torch.equal(corpus.validation.long(), validation)
    batches = [
        draw_batch(tokens, 8, 4, torch.Generator().manual_seed(1))
        for tokens in (corpus.training, training)
    ]
    assert all(map(torch.equal, *batches))


def test_the_same_text_gives_the_same_folder(prepared: Path, run: Callable) -> None:
    assert run("prepare", "text.txt", "--out", "again")[0] == 0
    again = open_prepared(Path("again"))
    assert again.sha256 == open_prepared(prepared).sha256


def changed(name: str, value: object) -> Callable[[Path], object]:
    """Change one entry of meta.json."""

    def change(folder: Path) -> None:
        path = folder / "meta.json"
        meta = json.loads(path.read_bytes())
        path.write_text(json.dumps(meta | {name: value}), encoding="utf-8")

    return change


def rewritten(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def no_entry(folder: Path) -> None:
    (folder / "meta.json").write_bytes(b'{"format": "character-gpt-course-data-1"}')


DAMAGE = {
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "no train.bin": lambda folder: (folder / "train.bin").unlink(),
    "no val.bin": lambda folder: (folder / "val.bin").unlink(),
    "meta.json is empty": rewritten("meta.json", lambda content: b""),
    "meta.json is cut short": rewritten("meta.json", lambda content: content[:-9]),
    "meta.json is no text": rewritten("meta.json", lambda content: b"\xff" + content),
    "meta.json is a list": rewritten("meta.json", lambda content: b"[1, 2]"),
    "meta.json lacks entries": no_entry,
    "another format": changed("format", "character-gpt-course-data-0"),
    "other counts": changed("characters", {"all": 5, "different": 2, "train": 4, "validation": 1}),
    "no counts": changed("characters", None),
    "no vocabulary": changed("vocabulary", None),
    "another vocabulary": changed("vocabulary", "ab"),
    "train.bin is cut short": rewritten("train.bin", lambda content: content[:-2]),
    "train.bin is cut within a number": rewritten("train.bin", lambda content: content[:-1]),
    "train.bin is too long": rewritten("train.bin", lambda content: content + b"\0\0"),
    "train.bin is empty": rewritten("train.bin", lambda content: b""),
    "val.bin is cut short": rewritten("val.bin", lambda content: content[:-2]),
    "val.bin is empty": rewritten("val.bin", lambda content: b""),
    "val.bin is another text's": rewritten("val.bin", lambda content: b"\xff" * len(content)),
    "the vocabulary is out of order": rewritten(
        "meta.json", lambda content: content.replace(b"efhi", b"feih")
    ),
    "one number went to the other file": lambda folder: (
        rewritten("train.bin", lambda content: content[:-2])(folder),
        rewritten("val.bin", lambda content: content + b"\0\0")(folder),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder(damage: str, prepared: Path) -> None:
    before = [path.read_bytes() for path in listing(prepared)]
    DAMAGE[damage](prepared)
    assert [path.read_bytes() for path in listing(prepared)] != before
    with pytest.raises(UserError, match="holds no prepared text.*make one with") as caught:
        open_prepared(prepared)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path, text: Path) -> None:
    for path in (tmp_path / "no", tmp_path, text):
        with pytest.raises(UserError, match="no meta.json.*make one with"):
            open_prepared(path)
