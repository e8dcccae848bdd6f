"""Stage 6 of 7: layer normalisation.

What is new: each position's vector is brought to mean 0 and variance 1, channel by channel
scaled and shifted again as the training likes it. `--norm pre` does so on the way into attention
and feed-forward and once at the end; `--norm post`, as in the first transformer, after each sum.

Why it helps: the sums of stage 5 grow with every block. Normalised, each block finds inputs of
the same size, whatever the others do, and learns faster.

    python layer_norm.py
    python layer_norm.py --norm post

Since residual.py
    new: Config.norm
    changed: Block.__init__, Block.forward, Model.__init__, Model.forward
    gone: Config.residual (blocks always add from here on)
"""

from dataclasses import dataclass
from typing import Literal

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
    n_layer: int = 3  # how many blocks are stacked
    norm: Literal["pre", "post"] = "pre"  # normalise before each part of a block, or after the sum
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


class Block(nn.Module):
    """Communicate, then compute; each adds its part to what was there."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = config.norm
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = BatchedMultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.attention_norm(x + self.attention(x))
            return self.feed_forward_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x))
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class Model(nn.Module):
    """Predicts the next character from all those in the block so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.final_norm = nn.LayerNorm(config.n_embd) if config.norm == "pre" else nn.Identity()
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.blocks(x)
        logits = self.to_logits(self.final_norm(x))  # (B, T, V)
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
