"""Encode texts of any size as token ids on disk, so that training need not load them into memory.

    python prepare.py part1.txt part2.txt --out data/mine
    python gpt.py --data data/mine

The UTF-8 texts are read twice, in chunks: once to find the vocabulary, once to write each character
as a two-byte token id. The first 90% is for training and the rest for validation, which is capped
at a million characters because every evaluation covers all of it. With `--tokenizer`, it
uses the tokens of a folder made by bpe.py, and encodes on all cores.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

from trainer import UserError, cli
from bpe import MAX_VOCABULARY, BytePairTokenizer
from common import split_index
from trainer.corpus import Batch, Corpus, make_tokenizer
from trainer.flags import Parser, path_of
from trainer.folder import rename

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

FORMAT = "character-gpt-course-data-2"
SPLITS = {"train": "train.bin", "validation": "val.bin"}
ID_DTYPE = np.dtype("<u2")  # a token id in the files: two bytes, little-endian
CODE_POINTS = 0x110000  # size of Unicode's code space
CHUNK_BYTES = 2**16  # fits in the CPU's cache
WHITE_SPACE = "".join(map(chr, range(33))) + "\x7f"
WORK = 2**20  # characters that a process encodes at a time


def prepare(
    texts: list[Path], folder: Path, tokenizer: BytePairTokenizer | None = None
) -> dict[str, Any]:
    """Write the folder under a temporary name, then rename it; return its meta.json."""
    target = Path(os.path.realpath(folder))
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        refuse_taken(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in target.parent.iterdir():  # left over from a killed prepare.py
            if re.fullmatch(re.escape(target.name) + r"\.\d+\.part", path.name):
                shutil.rmtree(path)
        partial.mkdir()
        meta = write_files(texts, partial, tokenizer)
        if target.exists():
            target.rmdir()  # it was empty; if it no longer is, this fails
        rename(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def refuse_taken(folder: Path) -> None:
    """Refuse to replace anything that already exists."""
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file: name a new folder with --out")
    if os.path.isdir(folder) and os.listdir(folder):
        if os.path.exists(folder / "meta.json"):
            raise UserError(
                f"{folder} already holds a prepared text: choose another folder, or delete that one"
            )
        raise UserError(f"{folder} is not empty: choose another folder with --out")


def write_files(
    texts: list[Path], folder: Path, tokenizer: BytePairTokenizer | None
) -> dict[str, Any]:
    """Read the texts twice; write train.bin and val.bin, and then meta.json."""
    try:
        size = sum(path.stat().st_size for path in texts)
    except OSError as error:
        raise UserError(f"cannot read the text {error.filename}: {error.strerror}") from None
    with tqdm(total=2 * size, unit="B", unit_scale=True, disable=None) as bar:
        sources, sources_now, count = [], [], 0
        seen = np.zeros(CODE_POINTS, dtype=bool)
        for codes in code_points(texts, sources, bar):
            if not seen.take(codes).all():  # reading is faster than writing
                seen[codes] = True
            count += len(codes)
        vocabulary = "".join(map(chr, seen.nonzero()[0]))
        refuse_vocabulary(vocabulary, tokenizer)

        counts = characters(count, len(vocabulary))
        id_of = np.zeros(CODE_POINTS, ID_DTYPE)
        id_of[seen] = np.arange(len(vocabulary))
        chunks = split_at(code_points(texts, sources_now, bar), counts["train"])
        if tokenizer:
            encoded = encode_words(chunks, tokenizer)
        else:
            encoded = ((name, id_of.take(codes)) for name, codes in chunks)
        digests, tokens = {name: hashlib.sha256() for name in SPLITS}, dict.fromkeys(SPLITS, 0)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context((folder / file).open("wb"))
                for name, file in SPLITS.items()
            }
            for name, ids in encoded:
                files[name].write(ids)
                digests[name].update(ids)
                tokens[name] += len(ids)
    for path, before, now in zip(texts, sources, sources_now, strict=True):
        if before != now:
            raise UserError(f"{path} changed while it was being read: run this again")
    meta = {
        "format": FORMAT,
        "vocabulary": tokenizer.source if tokenizer else vocabulary,
        "characters": counts,
        "tokens": tokens,
        "sha256": {SPLITS[name]: digest.hexdigest() for name, digest in digests.items()},
        "sources": sources,
    }
    content = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
    (folder / "meta.json").write_bytes(content.encode("utf-8"))
    return meta


def split_at(chunks: Iterator[np.ndarray], border: int) -> Iterator[tuple[str, np.ndarray]]:
    """Label each chunk with its split, and cut the chunk that spans the border."""
    for codes in chunks:
        for name, part in (("train", codes[:border]), ("validation", codes[border:])):
            if len(part):
                yield name, part
        border = max(0, border - len(codes))


def encode_words(
    chunks: Iterator[tuple[str, np.ndarray]], tokenizer: BytePairTokenizer
) -> Iterator[tuple[str, np.ndarray]]:
    """Encode on all cores, a few pieces per core at a time."""
    pieces = whole_words(chunks)
    with ExitStack() as stack:
        pool = None
        while batch := list(itertools.islice(pieces, 4 * (os.cpu_count() or 1))):
            if len(batch) > 2 and not pool:
                cores = min(os.cpu_count() or 1, 60)  # Windows cannot wait for more
                workers = get_context("spawn").Pool(cores, start_worker, (tokenizer,))
                pool = stack.enter_context(workers)
            keep(tokenizer)
            texts = [text for _, text in batch]
            arrays = pool.map(encode, texts, chunksize=1) if pool else map(encode, texts)
            yield from zip((name for name, _ in batch), arrays, strict=True)


def whole_words(chunks: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, str]]:
    """Join chunks into larger pieces of text that begin and end at word boundaries."""
    for name, group in itertools.groupby(chunks, key=itemgetter(0)):
        text = ""
        for _, codes in group:
            text += codes.tobytes().decode("utf-32-le")
            if len(text) >= WORK:
                end = last_border(text)
                if not end and len(text) >= 16 * WORK:  # this cuts a word
                    end = len(text)
                yield name, text[:end]
                text = text[end:]
        yield name, text


def last_border(text: str) -> int:
    """Where the last run of white space begins; no token crosses this point."""
    end = max(map(text.rfind, WHITE_SPACE))
    return len(text[: end + 1].rstrip(WHITE_SPACE))


def encode(text: str) -> np.ndarray:
    return np.array(TOKENIZER.encode(text), ID_DTYPE)


def start_worker(tokenizer: BytePairTokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    keep(tokenizer)


def keep(tokenizer: BytePairTokenizer) -> None:
    """Set this process's tokenizer, which caches the words that it has encoded."""
    global TOKENIZER
    TOKENIZER = tokenizer


def refuse_vocabulary(vocabulary: str, tokenizer: BytePairTokenizer | None) -> None:
    if tokenizer:
        return
    if len(vocabulary) == 1:
        raise UserError(f"the text only repeats one character, {vocabulary!r}: name another text")
    if len(vocabulary) > MAX_VOCABULARY:
        raise UserError(
            f"the text has {len(vocabulary):,} distinct characters, but at most "
            f"{MAX_VOCABULARY:,} fit: leave out a file, or replace the rarest characters"
        )


def characters(count: int, different: int) -> dict[str, int]:
    """Number of characters: in total, distinct, and in each split."""
    border = split_index(count)
    return {"all": count, "different": different, "train": border, "validation": count - border}


def code_points(texts: list[Path], sources: list[dict], bar: tqdm) -> Iterator[np.ndarray]:
    """Yield code points chunk by chunk; append each file's name, size and hash to `sources`."""
    for path in texts:
        # The decoder handles characters that are split between two chunks, and drops the
        # byte-order mark with which some editors begin a file.
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        digest, size, empty = hashlib.sha256(), 0, True
        try:
            with path.open("rb") as file:
                chunk = None
                while chunk != b"":
                    chunk = file.read(CHUNK_BYTES)
                    size += len(chunk)
                    digest.update(chunk)
                    if text := decoder.decode(chunk, final=not chunk):
                        empty = False
                        yield np.frombuffer(text.encode("utf-32-le"), "<u4")
                    bar.update(len(chunk))
        except OSError as error:
            raise UserError(f"cannot read the text {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            position = size - len(error.object) + error.start  # error.start counts within its chunk
            raise UserError(
                f"{path} is not UTF-8 text (invalid byte at {position}): "
                "save it as UTF-8 in an editor, or name another file"
            ) from None
        if empty:
            raise UserError(f"the text {path} is empty")
        sources.append({"name": path.name, "bytes": size, "sha256": digest.hexdigest()})


class PreparedCorpus(Corpus):
    """A corpus whose training split stays on disk, where it may change."""

    def draw(self, block_size: int, batch_size: int, generator: torch.Generator) -> Batch:
        # Reading past the end of a file that has shrunk would crash the process without a message.
        path = Path(self.path, "train.bin")
        if path.exists() and path.stat().st_size < len(self.train) * ID_DTYPE.itemsize:
            raise UserError(f"{path} has shrunk while in use: restore it, then --resume")
        return super().draw(block_size, batch_size, generator)

    def ids(self, tokens: Tensor) -> Tensor:
        if len(tokens) and int(tokens.long().max()) >= len(self.vocabulary):
            raise UserError(f"{self.path} has token ids beyond its vocabulary: prepare it again")
        return super().ids(tokens)


def open_prepared(folder: Path, verify: bool = False) -> Corpus:
    """Open a prepared folder as a corpus; its training split is memory-mapped, not loaded.

    Checks sizes and the small validation split; with `verify`, the whole training split too.
    """
    try:
        content = (folder / "meta.json").read_bytes()
        meta = json.loads(content)
        tokenizer, counts = make_tokenizer(meta["vocabulary"]), meta["characters"]
        training = np.memmap(folder / "train.bin", ID_DTYPE, mode="r")
        validation = np.fromfile(folder / "val.bin", ID_DTYPE)
        texts = [source["sha256"] for source in meta["sources"]]
        fits = (
            meta["format"] == FORMAT
            and counts == characters(counts["all"], counts["different"])
            and meta["tokens"] == {"train": len(training), "validation": len(validation)}
            and tokenizer.source == meta["vocabulary"]
            and sha256_of(folder / "val.bin") == meta["sha256"]["val.bin"]
            and (not verify or sha256_of(folder / "train.bin") == meta["sha256"]["train.bin"])
        )
        problem = None if fits else "its files have changed, or are from another version"
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"it has no {Path(error.filename).name}"
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    except (ValueError, LookupError, TypeError, RecursionError):  # depends on the damage
        problem = "its files are damaged"
    if problem:
        raise UserError(
            f"{folder} is not a usable prepared text ({problem}): "
            "make one with python prepare.py TEXT --out DIR"
        )
    with warnings.catch_warnings():  # PyTorch warns about read-only memory; nothing writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = torch.from_numpy(training), torch.from_numpy(validation)
    name, sha256 = folder.resolve().name, hashlib.sha256(content).hexdigest()
    text = texts[0] if len(texts) == 1 else sha256
    own = (name, str(folder.resolve()), sha256, tokenizer)
    return PreparedCorpus(*own, *tensors, text, counts["validation"] / max(1, len(validation)))


def sha256_of(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    what = f"checking {path.name}"
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=what, unit="B", delay=2, disable=None) as bar,
    ):
        while chunk := file.read(2**20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("texts", nargs="+", type=path_of, metavar="TEXT", help="a UTF-8 text")
    parser.add_argument(
        "--out", type=path_of, required=True, metavar="DIR", help="new folder to write"
    )
    words = "folder made by bpe.py; use its tokens (default: characters)"
    parser.add_argument("--tokenizer", type=path_of, metavar="DIR", help=words)
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    tokenizer = open_prepared(options.tokenizer).tokenizer if options.tokenizer else None
    if tokenizer and tokenizer.unit == "characters":
        raise UserError(
            f"{options.tokenizer} has characters, not the tokens of bpe.py: leave out --tokenizer"
        )
    report(prepare(options.texts, options.out, tokenizer), options.out)


def report(meta: dict[str, Any], out: Path) -> None:
    counts, tokens = meta["characters"], sum(meta["tokens"].values())
    as_tokens = f" as {tokens:,} tokens" if tokens != counts["all"] else ""
    print(
        f"wrote {counts['all']:,} characters, {counts['different']:,} distinct,{as_tokens} to "
        f"{out}; to train on them: python gpt.py --data {out}"
    )


if __name__ == "__main__":
    cli(main)
