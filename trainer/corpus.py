"""The text to train on: by default Tiny Shakespeare, downloaded at first use."""

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Tokenizer, draw_batch, split
from data import pocket_play
from trainer.cli import UserError
from trainer.folder import write_whole

import torch
from torch import Tensor

DATA = Path(pocket_play.__file__).parent
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
TINY_SHAKESPEARE_URL = f"{CHAR_RNN}/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
Batch = tuple[Tensor, Tensor]  # idx and targets


@dataclass
class Corpus:
    """A text as token ids, and where it came from."""

    name: str
    path: str
    sha256: str
    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor
    text: str  # SHA-256 of the text itself, whatever its tokens are
    characters_per_token: float  # in the validation split
    table: Tensor | None = None  # maps the text's ids to the model's, if they differ

    @property
    def vocabulary(self) -> Sequence[str]:
        return self.tokenizer.vocabulary

    def ids(self, tokens: Tensor) -> Tensor:
        return tokens.long() if self.table is None else self.table[tokens.long()]

    def draw(self, block_size: int, batch_size: int, generator: torch.Generator) -> Batch:
        return draw_batch(self.train, block_size, batch_size, generator)


def open_corpus(path: Path | None, verify: bool = False) -> Corpus:
    """Open the text of --data; None means Tiny Shakespeare or, offline, Pocket Play."""
    if path and os.path.isdir(path):
        from prepare import open_prepared  # imported here because a plain text does not need it

        return open_prepared(path, verify)
    path = path or default_corpus()
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")  # without a byte-order mark
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    tokenizer = Tokenizer(text)
    if len(tokenizer.vocabulary) < 2:
        raise UserError(f"the text {path} needs at least two different characters")
    id_of = torch.zeros(0x110000, dtype=torch.long)  # for each Unicode character
    id_of[[*map(ord, tokenizer.vocabulary)]] = torch.arange(len(tokenizer.vocabulary))
    parts = split(id_of[torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)])
    sha256 = hashlib.sha256(content).hexdigest()
    return Corpus(path.stem, str(path.resolve()), sha256, tokenizer, *parts, sha256, 1.0)


def make_tokenizer(source: str | list) -> Tokenizer:
    """The tokenizer that was saved: its characters, or the merges of bpe.py."""
    if isinstance(source, str):
        return Tokenizer(source)
    from bpe import BytePairTokenizer  # imported here because bpe.py imports this package

    return BytePairTokenizer(source)


def default_corpus() -> Path:
    """Tiny Shakespeare, downloaded at first use; if that fails, the built-in Pocket Play."""
    path, fallback = DATA / "tinyshakespeare.txt", DATA / "pocket_play.txt"
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() == TINY_SHAKESPEARE_SHA256:
            return path
        advice = "delete it to download it again, or rename your own text and pass it as --data"
        raise UserError(f"{path} is not the Tiny Shakespeare of this course: {advice}")
    try:
        write_whole(path, download(TINY_SHAKESPEARE_URL, TINY_SHAKESPEARE_SHA256))
    except (OSError, http.client.HTTPException, UserError) as error:
        reason = " ".join(str(error).split())
    if path.exists():  # written here, or by another process at the same time
        return path
    if not fallback.exists():
        write_whole(fallback, pocket_play.play().encode("utf-8"))
    if os.environ.get("RANK", "0") == "0":
        instead = "using the built-in Pocket Play instead; losses are not comparable"
        with contextlib.suppress(OSError):  # nobody reads stderr
            print(f"no Tiny Shakespeare ({reason}): {instead}", file=sys.stderr)
            print(f"to get it, save {TINY_SHAKESPEARE_URL} as {path}", file=sys.stderr)
    return fallback


def download(url: str, sha256: str, time_limit: float = 60) -> bytes:
    deadline, content = time.monotonic() + time_limit, b""
    with urllib.request.urlopen(url, timeout=10) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"the download took over {time_limit:.0f} seconds")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConnectionError("the downloaded file has the wrong SHA-256")
    return content
