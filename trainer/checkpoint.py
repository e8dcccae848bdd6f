"""Checkpoints: save and load anything that has `state_dict` and `load_state_dict`."""

import contextlib
import io
import os
import re
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from common import LanguageModel, Tokenizer
from trainer.cli import UserError, is_out_of_memory
from trainer.flags import Seed, accepts, check

import torch

FORMAT = "character-gpt-course-2"
ENTRIES = {
    **{"stage": str, "vocabulary": str, "config": dict, "seed": Seed, "init_from": str},
    **{"changed_on_resume": list[str], "compile": bool | None, "grad_accumulation": int},
    "device": Literal["cpu", "cuda", "mps"],
    "dtype": Literal["float32", "bfloat16", "float16"],
    "corpus": {"name": str, "path": str, "sha256": str},
    "parts": {"model": dict},
}
Checkpoint = dict[str, Any]


def to_bytes(header: dict[str, Any], parts: dict[str, Any]) -> memoryview:
    """Serialize a checkpoint: a header that describes the run, and the state of each part."""
    buffer = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"format": FORMAT, **header, "parts": states}, buffer)
    return buffer.getbuffer()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint as plain data; code inside it is refused, never run."""
    if not os.path.isfile(path):
        why = f"it has no {path.name}" if os.path.isdir(path.parent) else "it is not a folder"
        raise UserError(f"{path.parent} holds no trained run: {why}")
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read {path}: no permission")
    checkpoint = None
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # which depends on the damage
        warnings.simplefilter("ignore")  # about foreign files, which are refused below
        with path.open("rb") as file:
            archive = zipfile.ZipFile(file)  # with a checksum of each of its parts
            odd = [each for each in archive.infolist() if each.compress_type or each.external_attr]
            if not odd and archive.testzip() is None:
                file.seek(0)
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    written = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if written != FORMAT or not accepts(ENTRIES, checkpoint):
        old = written not in (None, FORMAT)
        why = "is from an older version: train it again" if old else "is damaged or foreign"
        raise UserError(f"the checkpoint {path} {why}")
    return checkpoint


def saved_config(config_class: type, checkpoint: Checkpoint) -> Any:
    """The run's config: fields that its script has lost are left out, new ones have defaults."""
    saved, vocabulary = checkpoint["config"], checkpoint["vocabulary"]
    known = {field.name: saved[field.name] for field in fields(config_class) if field.name in saved}
    try:
        config = config_class(**known)
        check(config)
        if saved.get("n_layer", 0) > len(checkpoint["parts"]["model"]):  # and might take for ever
            raise ValueError("it has more layers than weights")
        if Tokenizer(vocabulary).vocabulary != vocabulary or len(vocabulary) != config.vocab_size:
            raise ValueError("its vocabulary is not sorted, or has another size")
        if not all(weight.isfinite().all() for weight in checkpoint["parts"]["model"].values()):
            raise ValueError("a weight is NaN or infinite")
    except Exception as error:  # which one depends on what is wrong
        raise misfit(checkpoint, error) from None
    return config


def restore(checkpoint: Checkpoint, parts: dict[str, Any]) -> None:
    """Load the saved state into each part; optimizers must have taken a step, to compare with."""
    try:
        for name, part in parts.items():
            state, expected = checkpoint["parts"][name], layout(part)
            if state or name != "scaler":  # which is off without float16
                part.load_state_dict(state)
            for found, wanted in zip(layout(part), expected, strict=True):
                if found and not found.items() >= wanted.items():  # before any step it is empty
                    raise ValueError(f"{name} keeps its state in another form")
    except Exception as error:  # which one depends on what differs
        raise (error if is_out_of_memory(error) else misfit(checkpoint, error)) from None


def layout(part: Any) -> list[dict[tuple[int, str], Any]]:
    """The form of an optimizer's settings and state: it would compute with any other, or crash."""
    is_optimizer = isinstance(part, torch.optim.Optimizer)
    kept = [part.param_groups, part.state.values()] if is_optimizer else []
    return [
        {(i, name): form(value) for i, entry in enumerate(each) for name, value in entry.items()}
        for each in kept
    ]


def form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(form, value))
    return float if type(value) is int else type(value)


def misfit(checkpoint: Checkpoint, error: Exception) -> UserError:
    """What differs, as PyTorch says it: for example the name and the shapes of a parameter."""
    what = " ".join(re.sub("^Error.*:\n", "", str(error)).split())[:200]
    script = f"{checkpoint['stage']}.py"
    return UserError(f"this run does not fit {script}, which may have changed since: {what}")


@torch.no_grad()
def adopt_weights(model: LanguageModel, config: Any, saved: Checkpoint, vocabulary: str) -> None:
    """Copy another run's weights; characters that it lacks keep their initial ones."""
    before = type(model)(saved_config(type(config), saved)).eval()
    restore(saved, {"model": before})
    after, known = type(model)(config).eval(), len(saved["vocabulary"])
    rows = torch.tensor([vocabulary.index(character) for character in saved["vocabulary"]])
    refusal = UserError("the saved weights do not fit a model with these flags: leave them out")
    weights = after.state_dict()
    if weights.keys() != before.state_dict().keys():
        raise refusal
    for name, weight in before.state_dict().items():
        sizes = list(zip(weights[name].shape, weight.shape, strict=True))
        if any(new != old and (new, old) != (len(vocabulary), known) for new, old in sizes):
            raise refusal
        index = [rows if new != old else torch.arange(old) for new, old in sizes]
        weights[name][torch.meshgrid(*index, indexing="ij")] = weight
    idx = torch.arange(min(after.block_size, before.block_size))[None] % known
    if not torch.allclose(after.double()(rows[idx])[0][..., rows], before.double()(idx)[0]):
        raise refusal  # same shapes, but a model that computes something else
    model.load_state_dict(weights)
