"""Dropout, attention and RMSNorm, equivalent to PyTorch's but faster on a CPU."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUERIES_AT_ONCE = 128  # chunk size of attention on a CPU
EPS = 1e-6  # keeps rms_norm from dividing by zero


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
    (B, H, T, D), S = query.shape, key.shape[2]
    window = window or S
    if query.device.type != "cpu":  # PyTorch's kernel is faster: it never stores the weights
        is_causal = T == S <= window  # the standard mask, which PyTorch has built in
        visible = is_causal or (T == 1 and window >= S)  # a single query may see all cached keys
        mask = None if visible else causal_mask(T, S, window, query.dtype, query.device)
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, p, is_causal)
    # On a CPU, explicit attention is faster. Keys after the last query of a chunk are skipped.
    mask = causal_mask(T, S, window, query.dtype, query.device)
    query = query.flatten(0, 1)  # (B*H, T, D)
    key = key.flatten(0, 1).transpose(1, 2)  # (B*H, D, S)
    value = value.flatten(0, 1)  # (B*H, S, D)
    outputs = []
    for start in range(0, T, QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, T))
        seen = S - T + rows.stop
        scores = torch.baddbmm(mask[rows, :seen], query[:, rows], key[:, :, :seen], alpha=D**-0.5)
        outputs.append(dropout(F.softmax(scores, dim=-1)) @ value[:, :seen])
    return torch.cat(outputs, dim=1).unflatten(0, (B, H))  # (B, H, T, D)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # so that a mask cached while sampling works in training too
def causal_mask(T: int, S: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An additive mask: 0 where a query may attend, -inf elsewhere."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    hidden = (distance < 0) | (distance >= window)  # (T, S)
    return torch.zeros(T, S, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²)) over the last dimension, which is F.rms_norm without a scale."""
    return RMSNormOnCPU.apply(x) if x.device.type == "cpu" else F.rms_norm(x, x.shape[-1:], eps=EPS)


class RMSNormOnCPU(torch.autograd.Function):
    """Makes fewer passes over memory than PyTorch, which runs each operation's own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(dim=-1, keepdim=True), value=-1).mul_(scale)
