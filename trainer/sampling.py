"""Sampling: let a model continue a text, one character at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from common import LanguageModel, Tokenizer
from trainer.cli import UserError
from trainer.flags import NonNegative

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class SampleSettings:
    prompt: str = ""  # text to continue
    sample_length: int = 500  # number of characters to add
    temperature: NonNegative = 1.0  # 0 always takes the most likely character, above 1 is wilder
    top_k: int | None = None  # sample from the N most likely characters only

    def start_of_text(self, tokenizer: Tokenizer) -> str:
        """The prompt, checked; without one, the start of a line."""
        for each in self.prompt:
            if each not in tokenizer.ids:
                known = "which the text that the model was trained on does not have"
                raise UserError(f"--prompt has the character {each!r} (U+{ord(each):04X}), {known}")
        return self.prompt or ("\n" if "\n" in tokenizer.ids else tokenizer.vocabulary[0])


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
    cached: bool = True,
) -> Iterator[str]:
    """Yield `length` characters that continue the prompt, each as soon as it is sampled.

    A model with a KV cache computes each character once; `cached=False` gives the same text
    slowly. Where the cache cannot slide, a text that outgrows the context restarts from its
    second half.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(SampleSettings(prompt).start_of_text(tokenizer))[-model.block_size :]
    cache, seen = None, 0  # seen: how many of these ids are in the cache
    model.eval()
    for _ in range(length):
        if len(ids) > model.block_size and not model.slides:
            ids, seen = ids[-max(1, model.block_size // 2) :], 0
        if seen == 0:
            cache = model.new_cache() if cached else None
        idx = torch.tensor([ids[seen:]], device=device)  # (1, T)
        with torch.inference_mode():
            logits, _ = model(idx, cache=cache) if cache else model(idx)  # (1, T, V)
        seen = len(ids) if cache else 0
        ids.append(choose(logits[0, -1].cpu(), temperature, top_k, generator))
        yield tokenizer.decode(ids[-1:])


def choose(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """Sample the next id from its V logits."""
    if temperature == 0:
        return int(logits.argmax())
    logits, candidates = logits.topk(min(top_k or len(logits), len(logits)))
    # With 0 as the largest logit, and in double precision, no temperature is too small.
    probabilities = F.softmax((logits - logits[0]).double() / temperature, dim=0)
    return int(candidates[torch.multinomial(probabilities, 1, generator=random)])


def print_sample(
    model: LanguageModel, tokenizer: Tokenizer, settings: SampleSettings, seed: int
) -> str:
    """Print the prompt and its continuation, character by character; return both."""
    text = settings.start_of_text(tokenizer)
    how = (settings.sample_length, settings.temperature, settings.top_k, seed)
    print(text, end="")
    for character in generate(model, tokenizer, text, *how):
        text += character
        print(character, end="", flush=True)
    print()
    return text


def store_by_columns(model: nn.Module) -> None:
    """The same matrices in another memory order, in which a CPU multiplies single rows faster."""
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.weight.device.type == "cpu":
            part.weight.data = part.weight.data.t().contiguous().t()
