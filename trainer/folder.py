"""A run's folder: who owns it, and how its files are written."""

import csv
import io
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import Part, to_bytes
from trainer.cli import UserError
from trainer.history import History

RUN_FILES = ("config.json", "losses.csv", "checkpoint.pt", "best.pt", "sample.txt")
COLUMNS = {  # of losses.csv, and their formats
    "step": "d",
    "train_loss": ".6f",
    "val_loss": ".6f",
    "learning_rate": ".6g",
    "tokens": "d",
    "seconds": ".2f",
}


class RunFolder:
    """Where a run's files go; without a path of its own, the first free runs/NAME-N."""

    def __init__(self, name: str, path: Path | None, overwrite: bool = False) -> None:
        self.name, self.path, self.overwrite = name, path, overwrite
        if path is None and overwrite:
            self.path = Path("runs", name)

    def refuse_to_replace(self) -> None:
        if self.path and holds_run(self.path) and not self.overwrite:
            raise UserError(
                f"{self.path} already holds a run: --resume continues it, --overwrite replaces it, "
                "another --out keeps both"
            )

    def claim(self) -> tuple[Path, Path | None]:
        """Make the folder, or empty it of an older run; return it, and the last one not free."""
        taken = None
        try:
            if self.path is None:
                Path("runs").mkdir(exist_ok=True)
                for number in itertools.count(1):
                    self.path = Path("runs", self.name if number == 1 else f"{self.name}-{number}")
                    try:
                        self.path.mkdir()
                        break
                    except FileExistsError:
                        taken = self.path
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                for name in RUN_FILES:
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the run's folder: {error}") from None
        return self.path, taken

    def write_config(self, settings: dict[str, Any]) -> None:
        write_whole(self.path / "config.json", json.dumps(settings, indent=2).encode("utf-8"))

    def save(self, header: dict[str, Any], parts: dict[str, Part], history: History) -> None:
        """Write the complete state; if this is the best evaluation, the weights too; the losses."""
        # best.pt comes first: a run that is killed between the two writes the same best.pt again.
        if history.rows[-1] == history.best and history.best["step"] == history.step:
            best = {"step": history.step, "val_loss": history.best["val_loss"]}
            content = to_bytes(header | best, {"model": parts["model"]})
            write_whole(self.path / "best.pt", content)
        write_whole(self.path / "checkpoint.pt", to_bytes(header, parts))
        write_whole(self.path / "losses.csv", losses_csv(history.rows))


def holds_run(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in RUN_FILES)


def newest_run(name: str) -> Path:
    """The run of a stage that was written last."""
    checkpoints = [
        path
        for path in Path("runs").glob(f"{name}*/checkpoint.pt")
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.parent.name)
    ]
    if not checkpoints:
        raise UserError(f"there is no run of {name} in runs to resume; name its folder with --out")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def losses_csv(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([format(row[name], how) for name, how in COLUMNS.items()] for row in rows)
    return text.getvalue().encode("utf-8")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that nobody ever sees half of it."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes | memoryview]) -> None:
    """Several files: written under temporary names, and renamed only when all are complete."""
    partials = {path: path.with_name(f"{path.name}.part") for path in contents}
    try:
        try:
            for path, content in contents.items():
                with partials[path].open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # a power cut must not leave an empty file
            for path, partial in partials.items():
                rename(partial, path)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def rename(source: Path, target: Path) -> None:
    """Rename onto a file that may exist; on Windows, wait a moment for whoever is reading it."""
    for _ in range(20):
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(0.05)
    source.replace(target)
