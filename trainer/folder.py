"""A run's folder: claiming it, and writing its files atomically."""

import contextlib
import csv
import io
import itertools
import os
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import to_bytes
from trainer.cli import UserError
from trainer.history import History

RUN_FILES = ("config.json", "losses.csv", "checkpoint.pt", "best.pt", "sample.txt")
COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds")
FORMATS = ("d", ".6f", ".6f", ".6g", "d", ".2f")


class RunFolder:
    """Where a run's files go; without a path of its own, the first free runs/NAME-N."""

    def __init__(self, name: str, path: Path | None, overwrite: bool = False) -> None:
        self.name, self.overwrite = name, overwrite
        self.path = Path("runs", name) if overwrite and path is None else path

    def refuse_to_replace(self) -> None:
        taken = self.path and any(os.path.exists(self.path / name) for name in RUN_FILES)
        if taken and not self.overwrite:
            raise UserError(f"{self.path} has a run: add --resume or --overwrite, or change --out")

    def claim(self) -> Path:
        """Create the folder, or delete an older run's files from it."""
        try:
            if self.path is None:
                return make_free_folder(self.name)
            self.path.mkdir(parents=True, exist_ok=True)
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
            return self.path
        except OSError as error:
            raise UserError(f"cannot write the run's folder: {error}") from None

    def save(self, header: dict[str, Any], parts: dict[str, Any], history: History) -> None:
        """Write the complete state, the weights if they are the best so far, and losses.csv."""
        # best.pt comes first: a run that is killed between the two writes the same best.pt again.
        if history.rows[-1] == history.best and history.best["step"] == history.step:
            best = {"step": history.step, "val_loss": history.best["val_loss"]}
            content = to_bytes(header | best, {"model": parts["model"]})
            write_whole(self.path / "best.pt", content)
        write_whole(self.path / "checkpoint.pt", to_bytes(header, parts))
        write_whole(self.path / "losses.csv", losses_csv(history.rows))


def make_free_folder(name: str) -> Path:
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            path = Path("runs", name if number == 1 else f"{name}-{number}")
            path.mkdir()
            return path


def newest_run(name: str) -> Path:
    """The run of a stage that was written last."""
    paths = [*Path("runs").glob(f"{name}/checkpoint.pt")]
    paths += Path("runs").glob(f"{name}-[0-9]*/checkpoint.pt")
    if not paths:
        raise UserError(f"there is no run of {name} in runs to resume; name its folder with --out")
    return max(paths, key=lambda path: path.stat().st_mtime).parent


def losses_csv(rows: list[dict[str, float]]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(format, [row[name] for name in COLUMNS], FORMATS) for row in rows)
    return file.getvalue().encode("utf-8")


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
