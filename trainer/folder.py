"""A run's folder: only one process writes to it, and nobody ever sees half of a file or a run."""

import contextlib
import itertools
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint import to_bytes
from trainer.cli import UserError
from trainer.history import History, losses_csv

from filelock import FileLock, Timeout

# In the order in which a new run replaces an old one: checkpoint.pt alone is enough to resume.
RUN_FILES = ("checkpoint.pt", "best.pt", "losses.csv", "config.json", "sample.txt")


class RunFolder(contextlib.AbstractContextManager):
    """Where a run's files go; a context that unlocks the folder if the run fails."""

    def __init__(self) -> None:
        self.path, self.resume = None, False
        self.unlock: Callable[[], object] = tuple  # nothing is locked yet

    def __exit__(self, error: type | None, *_: object) -> None:
        if error:
            self.unlock()

    def claim(self, name: str, path: Path | None, resume: bool, overwrite: bool) -> None:
        """Lock the folder until the run ends; refuse one that has a run or cannot be written.

        Without a path, it is the first free runs/NAME-N, or with `resume` the newest run.
        """
        self.resume = resume
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
        is_folder = os.path.isdir(self.path)
        if os.path.lexists(self.path) and not (is_folder and os.access(self.path, os.W_OK)):
            why = "no permission" if is_folder else "it is a file"
            raise UserError(f"cannot write the folder {self.path}: {why}")

    def lock(self) -> bool:
        """Keep other processes out, with a file beside the folder; False if one is in already."""
        path = Path(os.path.realpath(self.path))
        try:
            new = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            inside = path.is_dir() and not os.access(path.parent, os.W_OK)  # such as a mount point
            file = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
            lock = FileLock(file, timeout=0)
            self.unlock = weakref.finalize(self, unlock, lock, new)  # at the latest, at exit
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            raise UserError(f"cannot write the folder {self.path}: {error.strerror}") from None
        return True

    def start(self, config: dict[str, Any], *state: Any) -> None:
        """Save the first state and config.json; those of a new run appear all at once."""
        path, exists = self.path, os.path.isdir(self.path)
        staging = path / ".new" if exists else path.with_name(f".{path.name}.new")
        try:
            shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
            if not self.resume:
                staging.mkdir()
                self.path = staging
            self.save(*state)
            write_whole(self.path / "config.json", json.dumps(config, indent=2).encode("utf-8"))
            if not self.resume and exists:
                for name in RUN_FILES[:-1]:
                    rename(staging / name, path / name)
            elif not self.resume:
                rename(staging, path)
            (path / "sample.txt").unlink(missing_ok=True)  # of an older run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        finally:
            self.path = path
            shutil.rmtree(staging, ignore_errors=True)

    def save(self, header: dict[str, Any], parts: dict[str, Any], history: History) -> None:
        """Write the complete state, the weights if they are the best so far, and losses.csv."""
        # best.pt comes first: a run that is killed between the two writes the same best.pt again.
        if history.rows[-1] == history.best and history.best["step"] == history.step:
            best = {"step": history.step, "val_loss": history.best["val_loss"]}
            content = to_bytes(header | best, {"model": parts["model"]})
            write_whole(self.path / "best.pt", content)
        write_whole(self.path / "checkpoint.pt", to_bytes(header, parts))
        write_whole(self.path / "losses.csv", losses_csv(history.rows))


def free(name: str) -> Iterator[Path]:
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(path):
            yield path


def newest(name: str) -> list[Path]:
    """The run of a stage that was written last."""
    paths = [*Path("runs").glob(f"{name}/checkpoint.pt")]
    paths += Path("runs").glob(f"{name}-[0-9]*/checkpoint.pt")
    if not paths:
        raise UserError(f"there is no run of {name} in runs to resume; name its folder with --out")
    return [max(paths, key=lambda path: path.stat().st_mtime).parent]


def unlock(lock: FileLock, folders: list[Path]) -> None:
    """Release the lock; remove its file, and the folders that were made for it and hold nothing."""
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
    """Rename onto a file that may exist; on Windows, wait a moment for whoever is reading it."""
    while True:
        try:
            return source.replace(target)
        except PermissionError:
            if not (tries := tries - 1):
                raise
            time.sleep(0.05)
