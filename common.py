"""Shared by all stages: tokenizer, data split, batches, device choice and text generation."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_VALIDATION = 1_000_000  # characters; a cap, because every evaluation covers the whole split


class Tokenizer:
    """Turns characters into token ids and back; a character's id is its index in the vocabulary."""

    def __init__(self, text: str) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        self.ids = {character: i for i, character in enumerate(self.vocabulary)}
        self.source = self.vocabulary  # checkpoints store this
        self.unit = "characters"  # of bpe.py: "tokens"

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids as they come, such as those that a model samples."""
        return (self.vocabulary[i] for i in ids)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Training and validation split; validation is the last 10%, capped at MAX_VALIDATION."""
    border = split_index(len(tokens))
    return tokens[:border], tokens[border:]


def split_index(length: int) -> int:
    return max(length * 9 // 10, length - MAX_VALIDATION)


def draw_batch(
    tokens: Tensor, block_size: int, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and as targets the same windows shifted by one character."""
    windows = tokens.unfold(0, block_size + 1, 1)  # all possible windows: a view, not a copy
    starts = torch.randint(len(windows), (batch_size,), generator=generator)
    batch = windows[starts].long()  # (B, T+1)
    return batch[:, :-1], batch[:, 1:]  # (B, T) each


def pick_device(name: str = "auto") -> torch.device:
    """The named device; "auto" is a CUDA GPU, then Apple silicon's GPU (MPS), then the CPU."""
    if name == "auto":
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else other
    return torch.device(name)


class LanguageModel(nn.Module):
    """Base class of every stage's model: it can continue a text."""

    block_size: int  # context length
    slides = False  # whether the KV cache can drop its oldest position and continue

    def new_cache(self) -> list | None:
        """An empty KV cache, one entry per layer; None if the model has no cache."""
        return None

    @torch.inference_mode()
    def generate(
        self, ids: list[int], temperature: float, top_k: int | None, generator: torch.Generator
    ) -> Iterator[int]:
        """Yield ids that continue `ids`, each as soon as it is sampled; never stops."""
        device, was_training = next(self.parameters()).device, self.training
        ids, cache, cached = list(ids), self.new_cache(), 0  # cached: how many ids the cache holds
        self.eval()
        try:
            while True:
                if len(ids) > self.block_size and not self.slides:  # keep the second half
                    ids, cache, cached = ids[-max(1, self.block_size // 2) :], self.new_cache(), 0
                idx = torch.tensor([ids[cached:]], device=device)  # (1, T)
                logits, _ = self(idx, cache=cache) if cache else self(idx)  # (1, T, V)
                cached = len(ids) if cache else 0
                ids.append(choose(logits[0, -1].cpu(), temperature, top_k, generator))
                yield ids[-1]
        finally:
            self.train(was_training)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Sample an id from its V logits; with temperature 0, take the most likely."""
    if temperature == 0:
        return int(logits.argmax())
    logits, candidates = logits.topk(min(top_k or len(logits), len(logits)))
    # With 0 as the largest logit, and in float64, even a tiny temperature cannot overflow.
    probabilities = F.softmax((logits - logits[0]).double() / temperature, dim=0)
    return int(candidates[torch.multinomial(probabilities, 1, generator=generator)])
