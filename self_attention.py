"""Stage 2 of 8: one head of self-attention.

Each character becomes a vector, the sum of a **token embedding** (which character it is) and a
**position embedding** (where it is). In a `Head`, every position computes a **query** (what it
looks for), a **key** (what it offers) and a **value** (what it passes on). The dot product of a
query and a key is a score; softmax turns a query's scores into **attention weights**, and the
output is the weighted average of the values. A **causal mask** hides the future.

A bigram model sees only the current character. Attention lets a position use all earlier ones too,
and learns where to look.

    python self_attention.py
"""

from dataclasses import dataclass

from trainer import Run, cli
from common import LanguageModel

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size


class Head(nn.Module):
    """One head of causal self-attention, with queries, keys and values of size D."""

    def __init__(self, config: Config, head_size: int) -> None:
        super().__init__()
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        query = self.query(x)  # (B, T, D)
        key = self.key(x)  # (B, T, D)
        value = self.value(x)  # (B, T, D)
        # The variance of q·k grows with D; dividing by √D keeps softmax from saturating.
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # attention weights: each row sums to 1
        return weights @ value  # (B, T, D)


class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = Head(config, config.n_embd)
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
