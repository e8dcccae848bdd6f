"""Stage 4 of 8: multi-head attention, batched.

This layer computes the same function as the list of heads, but for all heads at once. One matrix
product yields every query, key and value; the heads become one more batch dimension.

Training gets faster, and the loss does not change: a few large matrix products use a CPU or GPU
better than many small ones.

    python batched_attention.py
"""

from dataclasses import dataclass
from typing import Annotated

from trainer import Divides, Run, cli
from common import LanguageModel

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 4  # H: attention heads, each of size D = C/H
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size


class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # The variance of q·k grows with D; dividing by √D keeps softmax from saturating.
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, H, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # attention weights: each row sums to 1
        x = weights @ value  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def main() -> None:
    run = Run(Config)
    model = Model(run.config).to(run.device)
    # fused: one kernel updates all parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.config.learning_rate, fused=True)
    for idx, targets in run.batches(model, optimizer):  # (B, T) each; targets are shifted by one
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss)
    run.finish()


if __name__ == "__main__":
    cli(main)
