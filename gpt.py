"""Stage 8 of 8: GPT, the same model scaled up.

The blocks stay the same. This stage adds what a larger model needs to train well:

- **dropout** zeroes random activations, which reduces overfitting;
- **initialization**: small weights, smaller still in layers that write to the residual stream;
- **weight decay** on matrices and embeddings only;
- a **learning-rate schedule**: linear warm-up, then cosine decay to a tenth of the peak;
- **gradient clipping**, which caps the gradient norm in case of an unusual batch;
- **gradient accumulation**: a batch too large to process at once is split into **micro-batches**;
- a **KV cache**, so that sampling reuses the keys and values of earlier positions.

Most of the lower loss should come from more width, depth, context and characters seen, not from
these techniques.

    python gpt.py                         the preset that suits this machine
    python gpt.py --preset full           10.8 M parameters, for a GPU
    torchrun --nproc_per_node=2 gpt.py    on two GPUs
"""

import math
from dataclasses import dataclass
from typing import Annotated

from trainer import Divides, Fraction, NonNegative, NonNegativeInt, Run, cli
from common import LanguageModel
from trainer.layers import Dropout, attention

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 256  # T: context length, in characters
    n_embd: int = 384  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 6  # H: attention heads, each of size D = C/H
    n_layer: int = 6  # number of blocks
    dropout: Fraction = 0.2  # probability that an activation is zeroed during training
    batch_size: int = 64  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 250  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size, at the peak of the schedule
    warmup_iters: NonNegativeInt = 100  # steps over which the learning rate rises to its peak
    weight_decay: NonNegative = 0.1  # each step shrinks matrices by this times the learning rate
    gradient_clip: float = 1.0  # maximum gradient norm


PRESETS = {
    "full": Config(),
    "small": Config(
        block_size=64,
        n_embd=128,
        n_head=4,
        n_layer=4,
        dropout=0.0,
        batch_size=32,
        max_iters=2000,
        learning_rate=3e-3,
    ),
}


class KVCache:
    """The keys and values of the characters so far, for reuse while sampling."""

    def __init__(self) -> None:
        self.length = 0  # S: how many characters are in it

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            key = torch.cat((self.key, key), dim=2)  # (B, H, S, D)
            value = torch.cat((self.value, value), dim=2)  # (B, H, S, D)
        self.key, self.value, self.length = key, value, key.shape[2]
        return key, value


class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)  # drops attention weights

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, H, S, D) each
        # Scores, mask, softmax and weighted average as in layer_norm.py, but faster.
        x = attention(query, key, value, self.dropout)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


class FeedForward(nn.Module):
    """An MLP that processes each position separately."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_proj(x))  # (B, T, 4*C)
        return self.down_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                # The stream sums 2 * n_layer outputs; scaled, its std doesn't grow with n_layer.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        start = cache[0].length if cache else 0
        positions = torch.arange(start, start + T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.blocks]


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices and embeddings, none for biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    lr, weight_decay = config.learning_rate, config.weight_decay
    # beta2 = 0.99 averages squared gradients over ~100 steps; the default 0.999 takes ~1,000.
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine from the peak down to a tenth of it."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizer = make_optimizer(model, run.config)
    for batch in run.batches(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, run.config)
        optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(batch):  # weight: fraction of the batch
            with run.autocast():  # mixed precision: matrix products in the run's dtype
                logits, loss = model(idx, targets)
            (weight * loss).backward()
            run.log(loss)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        optimizer.step()
    run.finish()


if __name__ == "__main__":
    cli(main)
