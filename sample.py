"""Let a trained run of any stage continue a text.

    python sample.py runs/gpt --prompt "ROMEO:" --temperature 0.8

`load` and `generate` do the same from Python.
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Tokenizer, UserError, clear_errors, pick_device
from flags import SEED, Parser, add_device_flag, add_sampling_flags
from run_folder import load_weights, read_checkpoint, saved_config


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
    cached: bool = True,
) -> Iterator[str]:
    """Yield `length` characters that continue the prompt, each as soon as it is drawn.

    A model that offers caches sees each character once; `cached=False` gives the same text slowly.
    Where its window slides, the next character finds the last ones in the caches; where it does
    not, a text that outgrows the window goes on from half of it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    numbers = tokenizer.encode(prompt or first_prompt(tokenizer))[-model.block_size :]
    cached = cached and hasattr(model, "new_caches")
    slides = getattr(model, "slides", False)
    seen = 0  # how many of these numbers the caches hold
    model.eval()
    for _ in range(length):
        if len(numbers) > model.block_size and not slides:
            numbers, seen = numbers[-max(1, model.block_size // 2) :], 0
        if cached and seen == 0:
            caches = model.new_caches()
        idx = torch.tensor([numbers[seen:]], device=device)  # (1, T)
        with torch.inference_mode():
            logits, _ = model(idx, caches=caches) if cached else model(idx)  # (1, T, V)
        seen = len(numbers) if cached else 0
        numbers.append(choose(logits[0, -1].cpu(), temperature, top_k, generator))
        yield tokenizer.decode(numbers[-1:])


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Draw the number of the next character from its V logits."""
    if temperature == 0:
        return int(logits.argmax())
    logits, candidates = logits.topk(min(top_k or len(logits), len(logits)))
    # With 0 as the largest logit, and in double precision, no temperature is too small.
    probabilities = F.softmax((logits - logits[0]).double() / temperature, dim=0)
    return int(candidates[torch.multinomial(probabilities, 1, generator=generator)])


def load(folder: str | Path, device: str = "auto") -> tuple[nn.Module, Tokenizer]:
    """The best model of a run, and its tokenizer."""
    return rebuild(read_checkpoint(Path(folder) / "best.pt"), device)


def rebuild(checkpoint: dict, device: str = "auto") -> tuple[nn.Module, Tokenizer]:
    stage = stage_module(checkpoint["stage"])
    model = stage.Model(saved_config(stage.Config, checkpoint))
    load_weights(model, checkpoint)
    model = model.to(pick_device(device)).eval()
    store_by_columns(model)
    return model, Tokenizer(checkpoint["vocabulary"])


def store_by_columns(model: nn.Module) -> None:
    """The same matrices in another order: a processor multiplies one row with them faster so."""
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.weight.device.type == "cpu":
            part.weight.data = part.weight.data.t().contiguous().t()


def stage_module(name: str) -> ModuleType:
    """Import a stage's script; only one that lies beside this file will do."""
    if name.isidentifier() and Path(__file__).with_name(f"{name}.py").exists():
        module = importlib.import_module(name)
        if hasattr(module, "Model"):
            return module
    raise UserError(f"this run was made by {name}.py, which is no stage of this course")


def stream_sample(
    model: nn.Module, tokenizer: Tokenizer, options: argparse.Namespace, seed: int
) -> str:
    """Print the prompt and its continuation, character by character; return both."""
    prompt = options.prompt or first_prompt(tokenizer)
    encode_prompt(tokenizer, prompt)  # refused before a part of it is printed
    text = prompt
    print(prompt, end="")
    for character in generate(
        model,
        tokenizer,
        prompt,
        options.sample_length,
        options.temperature,
        options.top_k,
        seed,
    ):
        text += character
        print(character, end="", flush=True)
    print()
    return text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None


def first_prompt(tokenizer: Tokenizer) -> str:
    """With nothing to continue, begin a line."""
    return "\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0]


@clear_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="such as runs/gpt")
    add_sampling_flags(parser)
    parser.add_argument(
        "--seed", type=SEED, metavar="N", help="another seed, another text (default: the run's own)"
    )
    add_device_flag(parser)
    options = parser.parse_args()

    checkpoint = read_checkpoint(options.folder / "best.pt")
    model, tokenizer = rebuild(checkpoint, options.device or "auto")
    seed = checkpoint["seed"] if options.seed is None else options.seed
    stream_sample(model, tokenizer, options, seed)


if __name__ == "__main__":
    main()
