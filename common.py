"""What all stages share: the tokenizer, the split, batches, and the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAX_VALIDATION = 1_000_000  # characters: every evaluation goes through all of them


class Tokenizer:
    """Turns characters into token ids and back; a character's id is its index in the vocabulary."""

    def __init__(self, text: str) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        self.ids = {character: i for i, character in enumerate(self.vocabulary)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The first 90% for training, the rest for validation."""
    border = split_index(len(tokens))
    return tokens[:border], tokens[border:]


def split_index(length: int) -> int:
    return max(length * 9 // 10, length - MAX_VALIDATION)


def draw_batch(
    tokens: Tensor, block_size: int, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and as targets the same windows shifted by one character."""
    windows = tokens.unfold(0, block_size + 1, 1)  # every window there is: a view, not a copy
    starts = torch.randint(len(windows), (batch_size,), generator=generator)
    batch = windows[starts].long()  # (B, T+1)
    return batch[:, :-1], batch[:, 1:]  # (B, T) both


def pick_device(name: str = "auto") -> torch.device:
    """The named device; "auto" is a CUDA GPU, then Apple silicon's GPU (MPS), then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    return torch.device(name)


class LanguageModel(nn.Module):
    """What sampling and evaluation need to know about the model of any stage."""

    block_size: int  # context length
    slides = False  # whether its cache can drop the oldest position and go on

    def new_cache(self) -> list | None:
        """An empty KV cache, one entry per layer; None if the model has no cache."""
        return None
