"""Checkpoints: save and load anything that has `state_dict` and `load_state_dict`."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from common import LanguageModel
from trainer.cli import UserError, is_out_of_memory

import torch

FORMAT = "character-gpt-course-2"
Checkpoint = dict[str, Any]


def to_bytes(header: dict[str, Any], parts: dict[str, Any]) -> memoryview:
    """Serialize a checkpoint: a header that describes the run, and the state of each part."""
    buffer = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"format": FORMAT, **header, "parts": states}, buffer)
    return buffer.getbuffer()


def restore(checkpoint: Checkpoint, parts: dict[str, Any]) -> None:
    """Load the saved state into each part."""
    try:
        for name, part in parts.items():
            if state := checkpoint["parts"][name]:  # empty, if the part was switched off
                part.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise (error if is_out_of_memory(error) else changed_since(checkpoint)) from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint as plain data; code inside it is refused, never run."""
    if not os.path.isfile(path):
        why = f"it has no {path.name}" if os.path.isdir(path.parent) else "it is not a folder"
        raise UserError(f"{path.parent} holds no trained run: {why}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign files, which are refused below
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # which one depends on where the file is damaged
            checkpoint = None
    written = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if written != FORMAT:
        why = "is from an older version: train it again" if written else "is damaged or foreign"
        raise UserError(f"the checkpoint {path} {why}")
    return checkpoint


def saved_config(config_class: type, checkpoint: Checkpoint) -> Any:
    try:
        return config_class(**checkpoint["config"])
    except TypeError:
        raise changed_since(checkpoint) from None


def changed_since(checkpoint: Checkpoint) -> UserError:
    return UserError(f"{checkpoint['stage']}.py has changed since this run: train it again")


@torch.no_grad()
def adopt_weights(model: LanguageModel, config: Any, saved: Checkpoint, vocabulary: str) -> None:
    """Copy another run's weights; characters that it lacks keep their initial ones."""
    before = type(model)(saved_config(type(config), saved)).eval()
    restore(saved, {"model": before})
    after, known = type(model)(config).eval(), len(saved["vocabulary"])
    rows = torch.tensor([vocabulary.index(character) for character in saved["vocabulary"]])
    misfit = UserError("the saved weights do not fit a model with these flags: leave them out")
    weights = after.state_dict()
    if weights.keys() != before.state_dict().keys():
        raise misfit
    for name, weight in before.state_dict().items():
        sizes = list(zip(weights[name].shape, weight.shape, strict=True))
        if any(new != old and (new, old) != (len(vocabulary), known) for new, old in sizes):
            raise misfit
        index = [rows if new != old else torch.arange(old) for new, old in sizes]
        weights[name][torch.meshgrid(*index, indexing="ij")] = weight
    idx = torch.arange(min(after.block_size, before.block_size))[None] % known
    if not torch.allclose(after.double()(rows[idx])[0][..., rows], before.double()(idx)[0]):
        raise misfit  # same shapes, but a model that computes something else
    model.load_state_dict(weights)
