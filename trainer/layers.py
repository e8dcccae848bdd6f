"""Dropout and attention, equivalent to PyTorch's but faster on a CPU."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """nn.Dropout, with cheaper random numbers on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        # Random numbers are slow on a CPU, so each 64-bit one is split into four 16-bit integers,
        # -2**15 to 2**15 - 1. An activation is dropped if its integer is in the lowest fraction p.
        draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = draws >= min(round(2**16 * self.p), 2**16 - 1) - 2**15
        return x * keep.to(x.dtype).div_(1 - self.p)


def attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: nn.Dropout, window: int | None = None
) -> Tensor:
    """Causal attention: softmax(query @ key.T / √D + mask) @ value, with dropout on the weights.

    The T queries are at the last T of S positions; each sees `window` positions up to its own.
    """
    (T, D), S = query.shape[-2:], key.shape[-2]
    on_gpu, window = query.device.type != "cpu", window or S
    is_causal = on_gpu and T == S <= window  # the standard mask, which PyTorch has built in
    mask = None
    if not is_causal and not (T == 1 and window >= S):  # one query may see all that is cached
        mask = causal_mask(T, S, window, query.dtype, query.device)
    if on_gpu:  # faster without storing the weights
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, p, is_causal)
    # On a CPU, explicit attention is faster, and so is scaling queries instead of scores.
    scores = (query * D**-0.5) @ key.transpose(-2, -1)  # (B, H, T, S)
    scores = scores if mask is None else scores + mask
    return dropout(F.softmax(scores, dim=-1)) @ value  # (B, H, T, D)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # so that a mask cached while sampling works in training too
def causal_mask(T: int, S: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An additive mask: 0 where a query may attend, -inf elsewhere."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    hidden = (distance < 0) | (distance >= window)  # (T, S)
    return torch.zeros(T, S, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
