"""Turn texts of any size into a folder of numbers, to train on without holding it in memory.

    python prepare.py part1.txt part2.txt --out data/mine
    python gpt.py --data data/mine

The texts, UTF-8, are read twice, piece by piece: once to find the vocabulary, once to write each
character as its number, in two bytes. As with a single text the first 90 % train and the rest
validates, but never more than a million characters: every evaluation goes over all of them.
"""

import codecs
import hashlib
import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer import UserError, cli
from common import split_index
from trainer.corpus import Corpus
from trainer.flags import Parser
from trainer.folder import rename

import numpy as np
import torch
from tqdm import tqdm

FORMAT = "character-gpt-course-data-1"
NUMBER = np.dtype("<u2")  # a character in the files: two bytes, the lower one first
MOST_DIFFERENT = 2**16  # as many as two bytes can tell apart
CODE_POINTS = 0x110000  # Unicode has no more
CHUNK_BYTES = 2**16  # small enough for the processor's own memory, which is the fast one


def prepare(texts: list[Path], folder: Path) -> dict[str, Any]:
    """Make the folder, and return what its meta.json holds; its name comes when all is done."""
    target = Path(os.path.realpath(folder))
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        refuse_taken(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in target.parent.iterdir():  # what a killed preparation left
            if re.fullmatch(re.escape(target.name) + r"\.\d+\.part", path.name):
                shutil.rmtree(path)
        partial.mkdir()
        meta = write_files(texts, partial)
        if target.exists():
            target.rmdir()  # it was empty; if it no longer is, this fails
        rename(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def refuse_taken(folder: Path) -> None:
    """What is there already is never replaced."""
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file: name a new folder with --out")
    if os.path.isdir(folder) and os.listdir(folder):
        if os.path.exists(folder / "meta.json"):
            raise UserError(
                f"{folder} already holds a prepared text: name another folder, or delete that one"
            )
        raise UserError(f"{folder} is not empty: name another folder with --out")


def write_files(texts: list[Path], folder: Path) -> dict[str, Any]:
    """Read the texts twice; write train.bin and val.bin, and then meta.json."""
    try:
        size = sum(path.stat().st_size for path in texts)
    except OSError as error:
        raise UserError(f"cannot read the text {error.filename}: {error.strerror}") from None
    with tqdm(total=2 * size, unit="B", unit_scale=True, disable=None) as bar:
        sources, sources_now, count = [], [], 0
        seen = np.zeros(CODE_POINTS, dtype=bool)
        for codes in code_points(texts, sources, bar):
            if not seen.take(codes).all():  # to look is faster than to write
                seen[codes] = True
            count += len(codes)
        vocabulary = "".join(map(chr, seen.nonzero()[0]))
        refuse_vocabulary(vocabulary)

        counts = characters(count, len(vocabulary))
        number = np.zeros(CODE_POINTS, NUMBER)
        number[seen] = np.arange(len(vocabulary))
        digest_train, digest_val = hashlib.sha256(), hashlib.sha256()
        room = counts["train"]  # how many characters train.bin still takes
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            for codes in code_points(texts, sources_now, bar):
                numbers = number.take(codes)
                train.write(numbers[:room])
                digest_train.update(numbers[:room])
                val.write(numbers[room:])
                digest_val.update(numbers[room:])
                room = max(0, room - len(numbers))
    for path, before, now in zip(texts, sources, sources_now, strict=True):
        if before != now:
            raise UserError(f"{path} changed between its two readings: try again when it is done")
    meta = {
        "format": FORMAT,
        "vocabulary": vocabulary,
        "characters": counts,
        "sha256": {"train.bin": digest_train.hexdigest(), "val.bin": digest_val.hexdigest()},
        "sources": sources,
    }
    content = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
    (folder / "meta.json").write_bytes(content.encode("utf-8"))
    return meta


def refuse_vocabulary(vocabulary: str) -> None:
    if len(vocabulary) == 1:
        raise UserError(f"the text repeats one character, {vocabulary!r}: nothing to learn there")
    if len(vocabulary) > MOST_DIFFERENT:
        raise UserError(
            f"the text has {len(vocabulary):,} different characters, and two bytes can number "
            f"{MOST_DIFFERENT:,} at most: leave out a file, or replace the rarest characters"
        )


def characters(count: int, different: int) -> dict[str, int]:
    """How many characters there are, and how many of them are in which part."""
    border = split_index(count)
    return {"all": count, "different": different, "train": border, "validation": count - border}


def code_points(texts: list[Path], sources: list[dict], bar: tqdm) -> Iterator[np.ndarray]:
    """Yield all characters as code points, chunk by chunk; add what each file was to `sources`."""
    for path in texts:
        # It keeps the start of a character that goes on in the next chunk, and drops the
        # invisible mark with which some editors begin a file.
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
            position = size - len(error.object) + error.start  # it counts within its own piece
            raise UserError(
                f"{path} is not UTF-8 text (byte {position} is no character): "
                "save it as UTF-8 in an editor, or name another file"
            ) from None
        if empty:
            raise UserError(f"the text {path} is empty")
        sources.append({"name": path.name, "bytes": size, "sha256": digest.hexdigest()})


def open_prepared(folder: Path) -> Corpus:
    """A prepared folder as a corpus, whose numbers stay in their files until they are needed."""
    try:
        content = (folder / "meta.json").read_bytes()
        meta = json.loads(content)
        vocabulary, counts = meta["vocabulary"], meta["characters"]
        training = np.memmap(folder / "train.bin", NUMBER, mode="r")
        validation = np.memmap(folder / "val.bin", NUMBER, mode="r")
        fits = (  # sizes only: to hash it all would take too long
            meta["format"] == FORMAT
            and counts == characters(len(training) + len(validation), len(vocabulary))
            and counts["train"] == len(training)
            and vocabulary == "".join(sorted(set(vocabulary)))
            and validation.max() < len(vocabulary)
        )
        problem = None if fits else "its files do not fit together, or this version of the course"
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"it has no {Path(error.filename).name}"
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    except (ValueError, LookupError, TypeError):  # which one depends on where it is damaged
        problem = "its files are damaged"
    if problem:
        raise UserError(
            f"{folder} holds no prepared text that can be used ({problem}): "
            "make one with python prepare.py TEXT --out DIR"
        )
    with warnings.catch_warnings():  # PyTorch warns that nobody may write there, and nobody does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = torch.from_numpy(training), torch.from_numpy(validation)
    name, sha256 = folder.resolve().name, hashlib.sha256(content).hexdigest()
    return Corpus(name, str(folder.resolve()), sha256, vocabulary, *tensors)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="a UTF-8 text")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to make, a new one"
    )
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then it tidies up as on Ctrl-C
    counts = prepare(options.texts, options.out)["characters"]
    print(
        f"{counts['all']:,} characters, {counts['different']:,} different ones, are in "
        f"{options.out}; to learn from them: python gpt.py --data {options.out}"
    )


if __name__ == "__main__":
    cli(main)
