"""What all stages share: the text, characters as numbers, batches, the device, plain errors."""

import functools
import hashlib
import http.client
import io
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from data import pocket_play

DATA = Path(__file__).resolve().parent / "data"
TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class UserError(Exception):
    """Something that the reader can put right; the message says what and how, in one line."""


@dataclass
class Corpus:
    """A text to learn from, as character numbers, and where it came from."""

    name: str
    path: str
    sha256: str
    vocabulary: str  # a character's number is its place in here
    training: Tensor
    validation: Tensor


def load_corpus(path: Path | None = None) -> Corpus:
    """Read a UTF-8 text; with no path, Tiny Shakespeare or, without a network, Pocket Play."""
    path = path or default_corpus()
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")  # some editors begin a file with an invisible mark
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} is no character): "
            "save it as UTF-8 in an editor, or name another file"
        ) from None
    if not text:
        raise UserError(f"the text {path} is empty")
    if len(set(text)) == 1:
        raise UserError(f"{path} repeats one character, {text[0]!r}: there is nothing to learn")
    tokenizer = Tokenizer(text)
    training, validation = split(torch.tensor(tokenizer.encode(text)))
    sha256 = hashlib.sha256(content).hexdigest()
    return Corpus(path.stem, str(path), sha256, tokenizer.vocabulary, training, validation)


def default_corpus() -> Path:
    """Tiny Shakespeare, downloaded at first use; where that fails, the built-in Pocket Play."""
    path = DATA / "tinyshakespeare.txt"
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() != TINY_SHAKESPEARE_SHA256:
            raise UserError(
                f"{path} is not the Tiny Shakespeare this course measures with: delete it to "
                "download it again, or give your own text its own name and --data"
            )
        return path
    try:
        download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
        return path
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
    fallback = DATA / "pocket_play.txt"
    if not fallback.exists():
        try:
            pocket_play.write(fallback)
        except OSError as error:
            raise UserError(f"cannot write {fallback}: {error.strerror}") from None
    print(
        f"NO TINY SHAKESPEARE ({reason}): here comes the built-in Pocket Play, on which losses are "
        f"different; for the real text save {TINY_SHAKESPEARE_URL} as {path}",
        file=sys.stderr,
    )
    return fallback


def known_entropy(corpus: Corpus) -> float | None:
    """The loss below which no model gets on average; only Pocket Play's is known."""
    is_pocket_play = Path(corpus.path).resolve() == DATA / "pocket_play.txt"
    return pocket_play.entropy_per_character() if is_pocket_play else None


def download(url: str, path: Path, sha256: str, time_limit: float = 60) -> None:
    """Fetch a file; it gets its name only when it is whole and its SHA-256 is right."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    deadline = time.monotonic() + time_limit
    try:
        with urllib.request.urlopen(url, timeout=10) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
                while chunk := response.read1(1 << 16):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"the download took over {time_limit:.0f} seconds")
                    bar.update(file.write(chunk))
        if hashlib.sha256(partial.read_bytes()).hexdigest() != sha256:
            raise ConnectionError("what came over the network is another file, or a broken one")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Tokenizer:
    """Characters as numbers: a character's number is its place in the sorted vocabulary."""

    def __init__(self, text: str) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        self.number = {character: i for i, character in enumerate(self.vocabulary)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.number[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) does not occur in the text "
                "that this vocabulary was made from"
            ) from None

    def decode(self, numbers: Iterable[int]) -> str:
        return "".join(self.vocabulary[number] for number in numbers)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The first 90 % to train on, the rest to validate with."""
    border = len(tokens) * 9 // 10
    return tokens[:border], tokens[border:]


def draw_batch(
    tokens: Tensor, block_size: int, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same pieces one character later as their targets."""
    windows = tokens.unfold(0, block_size + 1, 1)  # every piece there is: a view, not a copy
    starts = torch.randint(len(windows), (batch_size,), generator=generator)
    pieces = windows[starts].long()  # (B, T+1)
    return pieces[:, :-1], pieces[:, 1:]  # (B, T) both


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, then MPS, then the processor."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in present if present[device])
    if not present[name]:
        raise UserError(f"PyTorch finds no {name} device on this machine: try --device auto")
    return torch.device(name)


def clear_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a script's `main` end with one plain line instead of a traceback."""

    @functools.wraps(main)
    def wrapper() -> None:
        for stream in (sys.stdout, sys.stderr):  # texts may hold any character, on any system
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")
        try:
            main()
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes one says it
                sys.exit(2)
            refuse(str(error))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                refuse(
                    "out of memory: make --batch-size, --block-size, --n-embd or --n-layer "
                    "smaller, or gpt.py's --grad-accumulation larger"
                )
            if is_lost_process(error):  # said in here, where torchrun's signal cannot end it yet
                refuse(
                    "another process of this run has ended, so this one stops too; if the run had "
                    "begun, --resume goes on from its last checkpoint"
                )
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return wrapper


def refuse(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_lost_process(error: Exception) -> bool:
    """What PyTorch says when processes train together and one of them is gone."""
    words = ("closed by peer", "reset by peer", "broken pipe", "remote process", "remote error")
    return "WORLD_SIZE" in os.environ and any(word in str(error).lower() for word in words)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a word of its own for it on every device."""
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "invalid buffer size",
        "storage size calculation overflowed",
    )
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
