"""The tokenizer, the split, batches, the device, and where the text comes from."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

from trainer import UserError, corpus
from common import Tokenizer, draw_batch, pick_device, split
from trainer.corpus import Corpus, default_corpus, download, open_corpus

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@given(st.text(min_size=1))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = Tokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer.vocabulary) == len(set(text))


def test_ids_follow_the_sorted_characters():
    tokenizer = Tokenizer("banana b")
    assert tokenizer.encode(" abn") == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="z"):
        tokenizer.encode("z")


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 100), st.integers(0, 1000))
def test_a_batch_is_windows_of_the_text_and_what_follows_them(block_size, batch_size, spare, seed):
    tokens = torch.arange(block_size + spare)  # each token is its own position
    idx, targets = draw_batch(tokens, block_size, batch_size, torch.Generator().manual_seed(seed))
    assert idx.shape == targets.shape == (batch_size, block_size)
    assert torch.equal(targets, idx + 1)
    assert torch.equal(idx - idx[:, :1], torch.arange(block_size).expand(batch_size, -1))
    idx, _ = draw_batch(torch.arange(10), 3, 1000, torch.Generator().manual_seed(seed))
    assert set(idx[:, 0].tolist()) == set(range(7))  # the first and the last one too


@pytest.mark.parametrize(
    ("length", "border"), [(1_115_394, 1_003_854), (10, 9), (20_000_000, 19_000_000)]
)
def test_the_split_keeps_the_last_tenth_but_no_more_than_a_million(length, border):
    train, validation = split(torch.arange(length))
    assert len(train) == border
    assert torch.equal(torch.cat((train, validation)), torch.arange(length))


def test_the_device_is_the_best_there_is():
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    else:
        best = "cpu"
    assert pick_device().type == best
    assert pick_device("cpu").type == "cpu"


def text_of(corpus: Corpus) -> str:
    ids = torch.cat((corpus.train, corpus.validation)).tolist()
    return "".join(corpus.vocabulary[i] for i in ids)


def test_a_text_keeps_every_byte_but_the_byte_order_mark(tmp_path):
    path = tmp_path / "mine.txt"
    content = "\ufeffone\r\ntwo\rthree — é\n".encode()
    path.write_bytes(content)
    mine = open_corpus(path)
    assert text_of(mine) == "one\r\ntwo\rthree — é\n"
    assert mine.name == "mine"
    assert mine.sha256 == hashlib.sha256(content).hexdigest()


# The download, from a real server that behaves well or badly.

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 5000
NOWHERE = "http://127.0.0.1:9/nobody-here"
STOP = threading.Event()


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


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        STOP.set()
        server.shutdown()


@pytest.fixture
def data(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and a text to download."""
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    monkeypatch.setattr(corpus, "TINY_SHAKESPEARE_URL", f"{server}/whole")
    monkeypatch.setattr(corpus, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def test_first_use_downloads_once(data, monkeypatch):
    assert text_of(open_corpus(None)).encode() == CONTENT
    monkeypatch.setattr(corpus, "TINY_SHAKESPEARE_URL", NOWHERE)
    assert open_corpus(None).name == "tinyshakespeare"
    assert [path.name for path in data.iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize("page", ["missing", "broken-off", "another", NOWHERE])
def test_a_failed_download_falls_back_to_pocket_play(page, data, server, monkeypatch, capsys):
    url = page if page == NOWHERE else f"{server}/{page}"
    monkeypatch.setattr(corpus, "TINY_SHAKESPEARE_URL", url)
    path = default_corpus()
    assert path == data / "pocket_play.txt"
    assert path.stat().st_size >= 1_000_000
    line, _ = capsys.readouterr().err.splitlines()
    assert "Pocket Play" in line
    assert default_corpus() == path  # which is not written twice
    assert [path.name for path in data.iterdir()] == ["pocket_play.txt"]


def test_a_download_has_a_time_limit(server):
    with pytest.raises(TimeoutError):
        download(f"{server}/slow", "", time_limit=0.3)


def test_a_changed_corpus_is_refused(data):
    (data / "tinyshakespeare.txt").write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match="tinyshakespeare.txt"):
        open_corpus(None)
    assert (data / "tinyshakespeare.txt").read_bytes() == CONTENT + b"!"
