"""Sampling: let a model continue a text, one character at a time."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from common import LanguageModel, Tokenizer
from trainer.cli import UserError
from trainer.flags import NonNegative

import torch
from torch import nn


@dataclass
class SampleSettings:
    prompt: str = ""  # text to continue
    sample_length: int = 500  # number of characters or tokens to add
    temperature: NonNegative = 1.0  # 0 always picks the most likely one; > 1 is more random
    top_k: int | None = None  # sample from the N most likely ones only

    def start_of_text(self, tokenizer: Tokenizer) -> str:
        """The validated prompt; by default a newline, which starts a line."""
        unknown = "".join(sorted(set(self.prompt) - tokenizer.ids.keys()))
        if unknown and tokenizer.unit == "characters":  # tokens can spell any text
            raise UserError(f"--prompt has characters that the training text lacks: {unknown!r}")
        return self.prompt or ("\n" if "\n" in tokenizer.ids else tokenizer.vocabulary[0])


def continuation(
    model: LanguageModel, tokenizer: Tokenizer, how: SampleSettings, seed: int
) -> Iterator[str]:
    """Yield the prompt, then the characters that follow it, each as soon as it is sampled."""
    text, generator = how.start_of_text(tokenizer), torch.Generator().manual_seed(seed)
    yield text
    ids = tokenizer.encode(text)[-model.block_size :]
    sampled = model.generate(ids, how.temperature, how.top_k, generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one position at a time is too little work for more threads
    try:
        yield from tokenizer.stream(itertools.islice(sampled, how.sample_length))
    finally:
        torch.set_num_threads(threads)


def store_by_columns(model: nn.Module) -> None:
    """Store weights column by column, which makes vector-matrix products faster on a CPU."""
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.weight.device.type == "cpu":
            part.weight.data = part.weight.data.t().contiguous().t()
