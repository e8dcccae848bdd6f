"""Stage 4 of 7: feed-forward.

What is new: after the attention each position goes through a small network of its own, four
times as wide as its vector and with a bend (ReLU) in the middle.

Why it helps: attention only averages what the positions say. Here each one works out what it
has heard: communicate, then compute.

    python feed_forward.py

Since multihead_attention.py
    new: FeedForward
    changed: Model.__init__, Model.forward
    gone: Config.attention, Head, MultiHeadAttention (the batched one does their work from here on)
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
    n_head: int = 4  # H: how many heads share these channels, D = C / H each
    batch_size: int = 32  # B: how many such blocks it learns from in one step
    max_iters: int = 5000  # how many steps it learns for
    eval_interval: int = 500  # how many steps pass between two evaluations
    learning_rate: float = 1e-3  # how far a step moves the weights


class BatchedMultiHeadAttention(nn.Module):
    """All heads of causal self-attention at once: they are a dimension, like the batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.projection = nn.Linear(config.n_embd, config.n_embd)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        H = self.n_head
        x = self.query_key_value(x)  # (B, T, 3*C)
        # Cut the 3*C channels into query, key and value, and each of these into H heads of size D.
        x = x.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        query, key, value = x  # (B, H, T, D) each
        scores = query @ key.transpose(2, 3) * key.shape[-1] ** -0.5  # (B, H, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # what a position takes from each: shares of 1
        x = weights @ value  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.projection(x)


class FeedForward(nn.Module):
    """A small network that every position goes through by itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.widen = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.narrow = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.widen(x))  # (B, T, 4*C)
        return self.narrow(x)  # (B, T, C)


class Model(nn.Module):
    """Predicts the next character from all those in the block so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = BatchedMultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        x = self.feed_forward(x)
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
