"""Checkpoints: save and load anything that has `state_dict` and `load_state_dict`."""

import hashlib
import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from common import LanguageModel, Tokenizer
from trainer.cli import UserError, is_out_of_memory

import torch

DIGEST = hashlib.sha256().digest_size  # bytes at the end of the file
Checkpoint = dict[str, Any]


def to_bytes(header: dict[str, Any], parts: dict[str, Any]) -> memoryview:
    """Serialize a checkpoint: a header describing the run, each part's state, and a SHA-256."""
    buffer = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**header, "parts": states}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getbuffer()


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's SHA-256, then read it as plain data; code inside it is never run."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} holds no trained run: it has no {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() == content[-DIGEST:]:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    raise UserError(f"the checkpoint {path} is damaged or from an older version: train again")


def saved_config(config_class: type, checkpoint: Checkpoint) -> Any:
    """The run's config, without fields that the script has dropped; new ones get defaults."""
    saved = checkpoint["config"]
    known = {field.name: saved[field.name] for field in fields(config_class) if field.name in saved}
    return config_class(**known)


def restore(checkpoint: Checkpoint, parts: dict[str, Any]) -> None:
    """Load the saved state into each part; each optimizer must already have taken a step."""
    try:
        for name, part in parts.items():
            state, expected = checkpoint["parts"][name], layout(part)
            if state:  # without float16, the scaler's is empty
                part.load_state_dict(state)
            if layout(part) not in ([], expected):  # [] before an optimizer's first step
                raise ValueError(f"{name} has a state of other shapes")
    except Exception as error:  # PyTorch raises different types for different mismatches
        if is_out_of_memory(error):
            raise
        # In PyTorch's words: for example the name and the shapes of a parameter.
        what = " ".join(re.sub("^Error.*:\n", "", str(error)).split())[:200]
        fits = f"this run does not fit {checkpoint['stage']}.py, which may have changed since"
        raise UserError(f"{fits}: {what}") from None


def layout(part: Any) -> list[tuple[str, Any]]:
    """Names and shapes of an optimizer's state: if they do not match, its next step crashes."""
    states = part.state.values() if isinstance(part, torch.optim.Optimizer) else ()
    return [(name, torch.is_tensor(x) and x.shape) for each in states for name, x in each.items()]


@torch.no_grad()
def adopt_weights(model: LanguageModel, config: Any, saved: Checkpoint, now: Tokenizer) -> None:
    """Copy another run's weights; characters that are new to it keep their initial weights."""
    before = type(model)(saved_config(type(config), saved)).eval()
    restore(saved, {"model": before})
    after, known = type(model)(config).eval(), saved["config"]["vocab_size"]
    kept = saved["vocabulary"] == now.source
    old_tokens = range(known) if kept else [now.ids[token] for token in saved["vocabulary"]]
    rows = torch.tensor(old_tokens)  # each old token's row in the new tables
    refusal = UserError("the saved weights do not fit a model with these flags: drop the flags")
    weights = after.state_dict()
    if weights.keys() != before.state_dict().keys():
        raise refusal
    for name, weight in before.state_dict().items():
        sizes = list(zip(weights[name].shape, weight.shape, strict=True))
        if any(new != old and (new, old) != (config.vocab_size, known) for new, old in sizes):
            raise refusal
        index = [rows if new != old else torch.arange(old) for new, old in sizes]
        weights[name][torch.meshgrid(*index, indexing="ij")] = weight
    idx = torch.arange(min(after.block_size, before.block_size))[None] % known
    if not torch.allclose(after.double()(rows[idx])[0][..., rows], before.double()(idx)[0]):
        raise refusal  # same shapes, but a model that computes something else
    model.load_state_dict(weights)
