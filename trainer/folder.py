"""A run's folder: only one process writes to it, and nobody ever sees half of a file or a run."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint import to_bytes
from trainer.cli import UserError
from trainer.history import History, losses_csv

from filelock import FileLock, Timeout

RUN_FILES = ("checkpoint.pt", "best.pt", "losses.csv", "config.json", "sample.txt")


class RunFolder(contextlib.AbstractContextManager):
    """Where a run's files go; as a context manager, it unlocks the folder if the run fails."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.unlock: Callable[[], object] = lambda: None  # nothing is locked yet

    def __exit__(self, error: type | None, *_: object) -> None:
        if error:
            self.unlock()

    def claim(self, name: str, path: Path | None, resume: bool, overwrite: bool) -> None:
        """Lock the folder until the run ends; refuse it if it has a run or cannot be written.

        Without a path, use the first free runs/NAME-N, or with `resume` the newest run.
        """
        if overwrite and not path:
            path = Path("runs", name)
        for self.path in [path] if path else newest(name) if resume else free(name):
            if self.lock():
                break
        else:
            raise UserError(f"another process is training in {self.path}: change --out, or wait")
        taken = any(os.path.lexists(self.path / name) for name in RUN_FILES)
        if taken and not resume and not overwrite:
            raise UserError(f"{self.path} has a run: add --resume or --overwrite, or change --out")

    def lock(self) -> bool:
        """Keep other processes out with a lock file; False if another process holds the lock."""
        path = Path(os.path.realpath(self.path))
        try:
            new = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_file(path), timeout=0)
            self.unlock = weakref.finalize(self, unlock, lock, new)  # at the latest, at exit
            lock.acquire()
            if os.path.lexists(path):  # fails if it is a file or read-only
                tempfile.TemporaryFile(dir=path).close()
        except Timeout:
            return False
        except OSError as error:
            raise UserError(f"cannot write the folder {self.path}: {error.strerror}") from None
        return True

    def save(self, about: dict[str, Any], parts: dict[str, Any], history: History) -> None:
        """Write the complete state; a new folder appears with all its files, or not at all."""
        folder, best = self.path, history.best
        if is_new := not folder.is_dir():
            folder = folder.with_name(f".{folder.name}.new")
        try:
            if is_new:
                folder.mkdir(exist_ok=True)  # a killed process may have left it
            # checkpoint.pt comes first: it alone is enough to resume, which writes all the others.
            write_whole(folder / "checkpoint.pt", to_bytes(about, parts))
            if history.rows[-1] == best and best["step"] == history.step:
                of_best = about | {name: best[name] for name in ("step", "val_loss")}
                write_whole(folder / "best.pt", to_bytes(of_best, {"model": parts["model"]}))
            write_whole(folder / "losses.csv", losses_csv(history.rows))
            write_whole(folder / "config.json", json.dumps(about, indent=2).encode("utf-8"))
            (folder / "sample.txt").unlink(missing_ok=True)  # from other weights
            if is_new:
                rename(folder, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        finally:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)


def free(name: str) -> Iterator[Path]:
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(path):
            yield path


def newest(name: str) -> list[Path]:
    """The most recently saved run of a stage."""
    paths = [*Path("runs").glob(f"{name}/checkpoint.pt")]
    paths += Path("runs").glob(f"{name}-[0-9]*/checkpoint.pt")
    if not paths:
        raise UserError(f"there is no run of {name} in runs to resume; name its folder with --out")
    return [max(paths, key=lambda path: path.stat().st_mtime).parent]


def lock_file(path: Path) -> Path:
    """Next to the folder, or inside it if its parent is read-only, such as a mounted disk."""
    inside = path.is_dir() and not (path.name and os.access(path.parent, os.W_OK))
    return path / ".lock" if inside else path.with_name(f".{path.name}.lock")


def unlock(lock: FileLock, folders: list[Path]) -> None:
    """Release the lock; remove its file, and any empty folders that were made for it."""
    if lock.is_locked:
        with contextlib.suppress(OSError):  # on Windows, releasing it removes it
            os.unlink(lock.lock_file)
        lock.release()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that nobody ever sees half of it."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty file
        rename(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def rename(source: Path, target: Path, tries: int = 20) -> None:
    """Rename onto a file that may exist; on Windows, wait a moment if a process is reading it."""
    while True:
        try:
            return source.replace(target)
        except PermissionError:
            if not (tries := tries - 1):
                raise
            time.sleep(0.05)
