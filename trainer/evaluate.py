"""The exact loss of a model on a text."""

from collections.abc import Callable

from common import LanguageModel
from trainer.distributed import World

import torch
from torch import Tensor

EVALUATION_TOKENS = 8192  # per forward pass


@torch.inference_mode()
def exact_loss(
    model: LanguageModel,
    tokens: Tensor,
    ids: Callable[[Tensor], Tensor] = Tensor.long,
    world: World | None = None,
) -> float:
    """The mean loss over a whole text, in consecutive windows of the context length."""
    world = world or World()
    device = next(model.parameters()).device
    T, was_training = model.block_size, model.training
    model.eval()
    idx, targets = tokens[:-1], tokens[1:]
    whole = len(idx) // T * T
    rows = max(1, EVALUATION_TOKENS // T)
    windows = [part[:whole].view(-1, T).split(rows) for part in (idx, targets)]
    last = (idx[whole:][None], targets[whole:][None])  # shorter, or empty
    total = torch.zeros(1, dtype=torch.float64)
    for idx, targets in [*zip(*windows, strict=True), last][world.rank :: world.size]:
        if idx.numel():
            _, loss = model(ids(idx).to(device), ids(targets).to(device))
            total += loss.item() * idx.numel()
    model.train(was_training)
    return world.all_reduce(total).item() / (len(tokens) - 1)
