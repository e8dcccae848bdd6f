"""The exact loss of a model on a text."""

from collections.abc import Callable

from common import LanguageModel
from trainer.distributed import World

import torch
from torch import Tensor
from tqdm import tqdm

TOKENS_AT_ONCE = 8192  # tokens per forward pass


@torch.inference_mode()
def exact_loss(
    model: LanguageModel,
    tokens: Tensor,
    ids: Callable[[Tensor], Tensor] = Tensor.long,
    world: World | None = None,
) -> float:
    """The mean loss over a whole text, in consecutive windows of the context length."""
    world, device = world or World(), next(model.parameters()).device
    batches, was_training = windows(tokens, model.block_size), model.training
    total = torch.zeros(1, dtype=torch.float64)
    model.eval()
    bar = {"leave": False, "delay": 2, "disable": None if world.is_main else True}
    for idx, targets in tqdm(batches[world.rank :: world.size], "evaluating", **bar):
        _, loss = model(ids(idx).to(device), ids(targets).to(device))
        total += loss.item() * idx.numel()
    model.train(was_training)
    return world.all_reduce(total).item() / (len(tokens) - 1)


def windows(tokens: Tensor, T: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets that cover a text: batches of windows of length T, then the remainder."""
    whole, rows = (len(tokens) - 1) // T * T, max(1, TOKENS_AT_ONCE // T)
    halves = tokens[:-1], tokens[1:]
    batches = list(zip(*(half[:whole].view(-1, T).split(rows) for half in halves), strict=True))
    rest = tuple(half[None, whole:] for half in halves)
    return [batch for batch in (*batches, rest) if batch[0].numel()]
