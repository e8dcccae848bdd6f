"""Checkpoints: parts with `state_dict` and `load_state_dict`, to and from a file."""

import io
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from trainer.cli import UserError
from trainer.flags import typed

import torch
from torch import nn

FORMAT = "character-gpt-course-2"


class Part(Protocol):
    """What a run is made of: the model, each optimizer, the history, the loss scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def to_bytes(header: dict[str, Any], parts: dict[str, Part]) -> memoryview:
    """A checkpoint as it will be in the file: what the run is, and the state of each part."""
    buffer = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"format": FORMAT, **header, "parts": states}, buffer)
    return buffer.getbuffer()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain data; code inside it is refused, never run."""
    if os.path.isfile(path.parent):
        raise UserError(f"{path.parent} is a file: name the folder of a run, such as runs/gpt")
    if not os.path.isfile(path):
        why = f"it has no {path.name}" if os.path.isdir(path.parent) else "there is no such folder"
        raise UserError(f"{path.parent} holds no trained run: {why}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign files, which are refused below
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except Exception:  # which one depends on where the file is damaged
            checkpoint = None
    written = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if written == "character-gpt-course-1":
        raise UserError(f"{path} was written by an older version of this course: train it again")
    if written != FORMAT:
        raise UserError(f"{path} is damaged, or is not a checkpoint of this course")
    return checkpoint


def restore(checkpoint: dict[str, Any], parts: dict[str, Part]) -> None:
    """Give each part the state that it had."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
    except (KeyError, ValueError, RuntimeError):
        raise changed_since(checkpoint) from None


def saved_config(config_class: type, checkpoint: dict[str, Any]) -> Any:
    try:
        return config_class(**checkpoint["config"])
    except TypeError:
        raise changed_since(checkpoint) from None


def changed_since(checkpoint: dict[str, Any]) -> UserError:
    return UserError(
        f"{checkpoint['stage']}.py has changed since this run, which no longer fits it"
    )


def adopt_weights(model: nn.Module, config: Any, checkpoint: dict[str, Any], new: str) -> None:
    """Start from another run's weights; characters that are new to it keep their fresh ones."""
    old, weights = checkpoint["vocabulary"], checkpoint["parts"]["model"]
    refuse_other_function(type(model), config, checkpoint)
    rows = torch.tensor([new.index(character) for character in old])
    fresh = model.state_dict()
    for name, weight in weights.items():
        sizes = list(zip(fresh[name].shape, weight.shape, strict=True))
        if len(new) != len(old) and (len(new), len(old)) in sizes:
            # Its rows, its columns or both belong to characters.
            index = [
                rows if size == (len(new), len(old)) else torch.arange(size[0]) for size in sizes
            ]
            index = torch.meshgrid(*index, indexing="ij")
            weight = fresh[name].index_put(index, weight.to(fresh[name].device))
        fresh[name] = weight
    model.load_state_dict(fresh)


def refuse_other_function(
    model_class: type[nn.Module], config: Any, checkpoint: dict[str, Any]
) -> None:
    """Settings may differ from those of the weights only if the model still computes the same."""
    before = saved_config(type(config), checkpoint)
    differ = [
        typed(name, value)
        for name, value in vars(config).items()
        if name != "vocab_size" and value != getattr(before, name)
    ]
    idx = torch.arange(min(config.block_size, before.block_size))[None] % before.vocab_size
    logits = []
    for each in (before, replace(config, vocab_size=before.vocab_size)):
        model = model_class(each).eval()
        try:
            model.load_state_dict(checkpoint["parts"]["model"])
        except RuntimeError:
            break
        with torch.inference_mode():
            logits.append(model(idx)[0])
    if not logits:
        raise changed_since(checkpoint)
    if len(logits) == 1 or not logits[0].equal(logits[1]):
        raise UserError(f"the saved weights do not fit {', '.join(differ)}: leave that flag out")
