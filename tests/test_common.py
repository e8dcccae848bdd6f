"""The text, the tokenizer, batches, the device, and the download."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
from common import (
    Corpus,
    Tokenizer,
    UserError,
    download,
    draw_batch,
    load_corpus,
    pick_device,
    split,
)


@given(st.text(min_size=1))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer(text)
    numbers = tokenizer.encode(text)
    assert tokenizer.decode(numbers) == text
    assert max(numbers) < len(tokenizer.vocabulary) == len(set(text))


@given(st.text(min_size=1), st.characters())
def test_a_character_that_the_vocabulary_lacks_is_named(text: str, character: str) -> None:
    tokenizer = Tokenizer(text)
    if character in text:
        assert tokenizer.decode(tokenizer.encode(character)) == character
    else:
        with pytest.raises(UserError, match=f"U\\+{ord(character):04X}"):
            tokenizer.encode(text + character)


def test_the_numbers_follow_the_sorted_characters() -> None:
    assert Tokenizer("banana b").encode(" abn") == [0, 1, 2, 3]


@given(
    st.integers(min_value=1, max_value=20),
    st.integers(min_value=1, max_value=8),
    st.integers(min_value=1, max_value=100),
    st.integers(min_value=0, max_value=1000),
)
def test_a_batch_is_pieces_of_the_text_and_what_follows_them(
    block_size: int, batch_size: int, spare: int, seed: int
) -> None:
    tokens = torch.arange(block_size + spare)  # every token tells its place
    idx, targets = draw_batch(tokens, block_size, batch_size, torch.Generator().manual_seed(seed))
    assert idx.shape == targets.shape == (batch_size, block_size)
    assert torch.equal(targets, idx + 1)
    assert torch.equal(idx - idx[:, :1], torch.arange(block_size).expand(batch_size, -1))


def test_batches_reach_the_first_and_the_last_piece() -> None:
    idx, _ = draw_batch(torch.arange(10), 3, 1000, torch.Generator().manual_seed(0))
    assert set(idx[:, 0].tolist()) == set(range(7))


def test_the_split_keeps_the_last_tenth_for_validation() -> None:
    train, validation = split(torch.arange(1_115_394))
    assert len(train) == 1_003_854
    assert torch.equal(torch.cat((train, validation)), torch.arange(1_115_394))


def test_the_device_is_the_best_there_is() -> None:
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    else:
        best = "cpu"
    assert pick_device().type == best
    assert pick_device("cpu").type == "cpu"


def text_of(corpus: Corpus) -> str:
    numbers = torch.cat((corpus.training, corpus.validation)).tolist()
    return "".join(corpus.vocabulary[number] for number in numbers)


def test_a_text_keeps_every_byte_but_the_invisible_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    content = "\ufeffone\r\ntwo\rthree — é\n".encode()
    path.write_bytes(content)
    corpus = load_corpus(path)
    assert text_of(corpus) == "one\r\ntwo\rthree — é\n"
    assert corpus.name == "mine"
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()


# The download, against a real server that behaves well or badly.

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/whole":
            self.wfile.write(CONTENT)
        elif self.path == "/broken-off":
            self.wfile.write(CONTENT[:1000])
        elif self.path == "/another":
            self.wfile.write(CONTENT[:-1] + b"?")
        elif self.path == "/slow":
            for _ in range(50):
                self.wfile.write(b".")
                if STOP.wait(0.1):
                    break

    def log_message(self, *_: object) -> None:
        pass


STOP = threading.Event()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        STOP.set()
        server.shutdown()


@pytest.fixture
def data(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and a download that is worth having."""
    monkeypatch.setattr(common, "DATA", tmp_path)
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_URL", f"{server}/whole")
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def test_first_use_downloads_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_of(load_corpus()).encode() == CONTENT
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/nobody-here")
    assert load_corpus().name == "tinyshakespeare"
    assert [path.name for path in data.iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize("page", ["missing", "broken-off", "another"])
def test_a_bad_download_never_becomes_the_corpus(
    page: str, data: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_URL", f"{server}/{page}")
    corpus = load_corpus()
    assert corpus.name == "pocket_play"
    assert [path.name for path in data.iterdir()] == ["pocket_play.txt"]
    announcement = [line for line in capsys.readouterr().err.splitlines() if "NO TINY" in line]
    assert len(announcement) == 1
    assert f"save {server}/{page} as {data / 'tinyshakespeare.txt'}" in announcement[0]


def test_a_download_that_takes_too_long_is_given_up(data: Path, server: str) -> None:
    with pytest.raises(TimeoutError):
        download(f"{server}/slow", data / "text.txt", "", time_limit=0.3)
    assert not list(data.iterdir())


def test_without_a_network_the_built_in_corpus_serves(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/nobody-here")
    first, second = load_corpus(), load_corpus()
    assert first.name == second.name == "pocket_play"
    assert first.sha256 == second.sha256
    assert len(text_of(first)) >= 1_000_000


def test_a_changed_corpus_is_refused(data: Path) -> None:
    (data / "tinyshakespeare.txt").write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match="delete it"):
        load_corpus()
    assert (data / "tinyshakespeare.txt").read_bytes() == CONTENT + b"!"
