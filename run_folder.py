"""A run's folder: its files, how they are written, and how they are read again."""

import hashlib
import itertools
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import UserError

RUN_FILES = ("config.json", "losses.csv", "checkpoint.pt", "best.pt", "sample.txt")
LOSSES_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds")
CHECKPOINT_FORMAT = "character-gpt-course-1"


def make_free_folder(stage: str) -> tuple[Path, list[Path]]:
    """Make runs/gpt or, where that is taken, runs/gpt-2 and so on; and list the taken ones."""
    Path("runs").mkdir(exist_ok=True)
    taken = []
    for number in itertools.count(1):
        folder = Path("runs", stage if number == 1 else f"{stage}-{number}")
        try:
            folder.mkdir()
            return folder, taken
        except FileExistsError:
            taken.append(folder)


def holds_run(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in RUN_FILES)


def newest_run(stage: str) -> Path:
    """The run of a stage that was written last."""
    checkpoints = [
        path
        for path in Path("runs").glob(f"{stage}*/checkpoint.pt")
        if re.fullmatch(rf"{stage}(-\d+)?", path.parent.name)
    ]
    if not checkpoints:
        raise UserError(f"there is no run of {stage} in runs to resume; name its folder with --out")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def script_sha256(stage: str) -> str:
    """Which version of its script makes a run; how its lines end does not count."""
    text = Path(__file__).with_name(f"{stage}.py").read_text(encoding="utf-8")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name, then rename: nobody ever sees half of it."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes | memoryview]) -> None:
    """Several files like that: none gets its name before all are written."""
    partials = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        try:
            for path, content in contents.items():
                partials[path].write_bytes(content)
            for path, partial in partials.items():
                replace(partial, path)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def replace(source: Path, target: Path) -> None:
    """Rename onto a file that may be there; on Windows wait a moment for whoever reads it."""
    for _ in range(20):
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(0.05)
    source.replace(target)


def losses_csv(rows: list[dict[str, float]]) -> bytes:
    lines = [",".join(LOSSES_COLUMNS)]
    for row in rows:
        lines.append(
            f"{row['step']},{row['train_loss']:.6f},{row['val_loss']:.6f},"
            f"{row['learning_rate']:.6g},{row['tokens']},{row['seconds']:.2f}"
        )
    return ("\n".join(lines) + "\n").encode("utf-8")


def read_losses(path: Path) -> list[dict[str, float]]:
    """Read the log of a run again."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no text") from None
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = dict(zip(LOSSES_COLUMNS, map(float, line.split(",")), strict=True))
            grows = not rows or row["step"] > rows[-1]["step"]
            if not grows or not all(map(math.isfinite, row.values())):
                raise ValueError
        except ValueError:
            raise UserError(f"{path} is damaged in line {number}") from None
        rows.append(row | {name: int(row[name]) for name in ("step", "tokens")})
    if not rows or lines[0] != ",".join(LOSSES_COLUMNS):
        raise UserError(f"{path} is damaged: it has no rows, or not the columns of a run")
    return rows


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint as plain data; code inside it is refused, never run."""
    if os.path.isfile(path.parent):
        raise UserError(f"{path.parent} is a file: name the folder of a run, such as runs/gpt")
    if not os.path.isfile(path):
        lack = f"it has no {path.name}" if os.path.isdir(path.parent) else "there is no such folder"
        raise UserError(f"{path.parent} holds no trained run: {lack}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign files, which get their own word below
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except Exception:  # which one depends on where the file is damaged
            checkpoint = None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is damaged, or is not a checkpoint of this course")
    return checkpoint


def saved_config(config_class: type, checkpoint: dict) -> Any:
    try:
        return config_class(**checkpoint["config"])
    except TypeError:
        raise changed_since(checkpoint) from None


def load_weights(model: nn.Module, checkpoint: dict) -> None:
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise changed_since(checkpoint) from None


def adopt_weights(model: nn.Module, checkpoint: dict, vocabulary: str) -> None:
    """Start from another run's weights; a character that it did not know keeps its fresh ones."""
    old = checkpoint["vocabulary"]
    places = torch.tensor([vocabulary.index(character) for character in old])
    weights = model.state_dict()
    for name, weight in checkpoint["model"].items():
        fresh = weights.get(name, weight)
        sizes = list(zip(fresh.shape, weight.shape, strict=False))
        if {pair for pair in sizes if pair[0] != pair[1]} == {(len(vocabulary), len(old))}:
            # Its rows, its columns or both belong to characters.
            index = [torch.arange(new) if new == size else places for new, size in sizes]
            index = torch.meshgrid(*index, indexing="ij")
            weight = fresh.index_put(index, weight.to(fresh.device))
        weights[name] = weight
    load_weights(model, checkpoint | {"model": weights})


def changed_since(checkpoint: dict) -> UserError:
    return UserError(
        f"{checkpoint['stage']}.py has changed since this run, which no longer fits it"
    )
