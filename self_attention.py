"""Stage 2 of 7: one head of self-attention.

What is new: every character is now a vector of C channels that says what it is and where it
stands. In a `Head` each position asks a question (its query), every position says what it has
(its key) and what it would pass on (its value); where query and key agree, the value flows. The
causal mask keeps each position from looking at those that come after it.

Why it helps: the bigram table sees one character. Attention lets each position gather from all
that came before, and learns for itself where to look.

    python self_attention.py

Since bigram.py
    new: Config.n_embd, Head
    changed: Config.learning_rate, Model, Model.__init__, Model.forward
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import clear_errors
from training import Run


@dataclass
class Config:
    vocab_size: int = 65  # V: how many different characters the text has
    block_size: int = 8  # T: how many characters the model sees at once
    n_embd: int = 32  # C: how many channels describe a character
    batch_size: int = 32  # B: how many such blocks it learns from in one step
    max_iters: int = 5000  # how many steps it learns for
    eval_interval: int = 500  # how many steps pass between two evaluations
    learning_rate: float = 1e-3  # how far a step moves the weights


class Head(nn.Module):
    """One head of causal self-attention; keys, queries and values have D = head_size channels."""

    def __init__(self, config: Config, head_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        key = self.key(x)  # (B, T, D)
        query = self.query(x)  # (B, T, D)
        value = self.value(x)  # (B, T, D)
        # Sums of D products spread like the square root of D; scaled back, softmax stays soft.
        scores = query @ key.transpose(1, 2) * key.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # what a position takes from each: shares of 1
        return weights @ value  # (B, T, D)


class Model(nn.Module):
    """Predicts the next character from all those in the block so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = Head(config, config.n_embd)
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        logits = self.to_logits(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Each position is an example of its own: B * T rows of logits, B * T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


@clear_errors
def main() -> None:
    run = Run(Config)
    model = Model(run.config).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.config.learning_rate, fused=True)
    # idx: characters of the text, by number; targets: for each of them, the one that follows
    for idx, targets in run.batches(model, optimizer):
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss)
    run.finish()


if __name__ == "__main__":
    main()
