"""Beyond GPT-2: the same model with eleven ideas that came later.

Each has a switch: `--no-rope` disables RoPE. With all of them off, the model is that of gpt.py.

- `rms_norm`: **RMSNorm** divides a vector by its root mean square; here without a learned scale.
- `rope`: **rotary position embedding** rotates queries and keys by angles proportional to the
  position, so scores depend on relative positions; it replaces the position table.
- `qk_norm`: queries and keys are normalized, which bounds the scores.
- `bias_free`: linear layers have no biases.
- `squared_relu`: the activation is ReLU squared.
- `zero_init`: the projections that feed the residual stream start at zero, so each block
  starts as the identity.
- `token_shift`: the previous character's embedding is added, scaled by a learned factor per
  channel, so that the first block sees pairs of characters.
- `embedding_norm`: the embedding is normalized, like the input of every sublayer.
- `embedding_skip`: every block adds λ times the embedding, with λ learned.
- `muon`: **Muon** makes the singular values of each matrix update equal, so that no direction
  dominates; AdamW still trains the embedding, the output layer and all vectors.
- `linear_decay`: after warm-up the learning rate stays constant, then decays linearly to zero,
  instead of following a cosine.

`python compare.py --modern` measures what each is worth.

    python modern_gpt.py                       the preset that suits this machine
    python modern_gpt.py --preset middle       between small and full
    python modern_gpt.py --no-rope --no-muon   all ideas but two
"""

import math
from dataclasses import dataclass
from typing import Annotated

from trainer import (
    Divides,
    Fraction,
    NonNegative,
    NonNegativeInt,
    PositiveFraction,
    Run,
    UserError,
    cli,
)
from common import LanguageModel
from trainer.layers import Dropout, attention, rms_norm

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
    dropout: Fraction = 0.1  # probability that an activation is zeroed during training
    batch_size: int = 16  # B: sequences per training step
    max_iters: int = 1400  # training steps
    eval_interval: int = 350  # steps between evaluations
    learning_rate: float = 3e-3  # AdamW's step size, at the peak of the schedule
    muon_learning_rate: float = 1e-2  # Muon's step size, at the peak of the schedule
    muon_momentum: Fraction = 0.9  # Muon's momentum coefficient
    warmup_iters: NonNegativeInt = 20  # steps over which the learning rates rise to their peak
    cooldown: PositiveFraction = 0.7  # fraction of steps over which learning rates decay to zero
    weight_decay: NonNegative = 0.1  # each step shrinks matrices by this times the learning rate
    gradient_clip: float = 1.0  # maximum gradient norm
    rms_norm: bool = True  # RMSNorm instead of LayerNorm
    rope: bool = True  # rotary position embedding instead of a learned table
    qk_norm: bool = True  # normalized queries and keys
    bias_free: bool = True  # no biases in linear layers
    squared_relu: bool = True  # ReLU squared instead of ReLU
    zero_init: bool = True  # start blocks as the identity: zero their output projections
    token_shift: bool = True  # add a multiple of the previous character's embedding
    embedding_norm: bool = True  # normalize the embedding
    embedding_skip: bool = True  # add λ times the embedding in every block
    muon: bool = True  # Muon for the matrices in the blocks
    linear_decay: bool = True  # decay learning rates linearly to zero, not along a cosine


PRESETS = {
    "full": Config(),
    "middle": Config(
        n_embd=192,
        n_head=2,
        n_layer=4,
        dropout=0.0,
        batch_size=8,
        max_iters=2500,
        eval_interval=500,
    ),
    "small": Config(
        n_embd=128,
        n_head=2,
        n_layer=4,
        dropout=0.0,
        batch_size=8,
        max_iters=2000,
        eval_interval=250,
    ),
}


class KVCache:
    """Keeps the keys and values that later positions attend to; with RoPE the window slides.

    For `token_shift`, the first block's cache also keeps the last embedding.
    """

    def __init__(self, size: int) -> None:
        self.size = size  # how many earlier positions are visible
        self.length = 0  # number of positions so far, including dropped ones

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        T = key.shape[2]
        if self.length:
            key = torch.cat((self.key, key), dim=2)  # (B, H, S, D)
            value = torch.cat((self.value, value), dim=2)  # (B, H, S, D)
        self.length += T
        oldest = max(0, key.shape[2] - self.size)
        self.key, self.value = key[:, :, oldest:], value[:, :, oldest:]
        return key, value

    def shift(self, x: Tensor) -> Tensor:
        before = self.last if self.length else torch.zeros_like(x[:, :1])  # (B, 1, C)
        self.last = x[:, -1:]
        return torch.cat((before, x[:, :-1]), dim=1)  # (B, T, C)


class RMSNorm(nn.Module):
    """Divides a vector by its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)  # x / sqrt(mean(x²))


class RoPE(nn.Module):
    """Rotates each query and key by angles that grow with its position."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        if head_size % 2:
            raise UserError(f"--rope needs an even head size, not {head_size}: change --n-head")
        # Channels i and i + D/2 are a point in a plane; each plane has its own frequency.
        inv_freq = 10_000.0 ** -(torch.arange(0, head_size, 2) / head_size)  # (D/2)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor, start: int) -> Tensor:
        T = x.shape[-2]
        positions = torch.arange(start, start + T, device=x.device)  # (T)
        angles = positions[:, None] * self.inv_freq  # (T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)  # (2, B, H, T, D/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.block_size = config.block_size
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.rope = RoPE(config.n_embd // config.n_head) if config.rope else None
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=not config.bias_free)
        self.dropout = Dropout(config.dropout)  # drops attention weights

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        x = x.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        value = x[2]  # (B, H, T, D)
        query_key = self.qk_norm(x[:2])  # (2, B, H, T, D)
        if self.rope:
            query_key = self.rope(query_key, cache.length if cache else 0)  # (2, B, H, T, D)
        query, key = query_key  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, H, S, D) each
        # Scores, mask, softmax and weighted average as in layer_norm.py, but faster.
        x = attention(query, key, value, self.dropout, self.block_size)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


class FeedForward(nn.Module):
    """An MLP that processes each position separately."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.squared_relu = config.squared_relu
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=not config.bias_free)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=not config.bias_free)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_proj(x))  # (B, T, 4*C)
        if self.squared_relu:
            x = x.square()
        return self.down_proj(x)  # (B, T, C)


def make_norm(config: Config) -> nn.Module:
    return RMSNorm() if config.rms_norm else nn.LayerNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.skip_lambda = nn.Parameter(torch.zeros(1)) if config.embedding_skip else None
        self.attention_norm = make_norm(config)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, embedding: Tensor, cache: KVCache | None = None) -> Tensor:
        if self.skip_lambda is not None:
            x = x + self.skip_lambda * embedding
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.slides = config.rope  # a position table ends at block_size; RoPE does not
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = (
            None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        )
        self.shift_scale = nn.Parameter(torch.zeros(config.n_embd)) if config.token_shift else None
        self.embedding_norm = RMSNorm() if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                # The stream sums 2 * n_layer outputs; scaled, its std doesn't grow with n_layer.
                std = 0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding:
            start = cache[0].length if cache else 0
            positions = torch.arange(start, start + T, device=idx.device)  # (T)
            x = x + self.position_embedding(positions)  # (B, T, C)
        if self.shift_scale is not None:  # the first position has no previous character: zeros
            previous = cache[0].shift(x) if cache else F.pad(x, (0, 0, 1, -1))  # (B, T, C)
            x = x + self.shift_scale * previous  # (B, T, C)
        x = embedding = self.dropout(self.embedding_norm(x))
        for i, block in enumerate(self.blocks):
            x = block(x, embedding, cache[i] if cache else None)
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self) -> list[KVCache]:
        return [KVCache(self.block_size - 1) for _ in self.blocks]


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW for everything else."""
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    for_muon = [p for name, p in matrices if config.muon and name.startswith("blocks.")]
    for_adamw = [p for name, p in matrices if not (config.muon and name.startswith("blocks."))]
    groups = [{"params": for_adamw}, {"params": vectors, "weight_decay": 0.0}]
    lr, weight_decay = config.learning_rate, config.weight_decay
    # beta2 = 0.99 averages squared gradients over ~100 steps; the default 0.999 takes ~1,000.
    adamw = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    if not config.muon:
        return [adamw]
    muon = torch.optim.Muon(
        for_muon,
        lr=config.muon_learning_rate,
        weight_decay=weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",  # same update RMS as AdamW, for any matrix shape
    )
    return [adamw, muon]


def learning_rate_factor(step: int, config: Config) -> float:
    """Fraction of the peak: warm-up, constant, linear decay to zero; or gpt.py's cosine."""
    warmup = (step + 1) / max(1, config.warmup_iters)
    if config.linear_decay:
        return min(warmup, 1.0, (config.max_iters - step) / (config.cooldown * config.max_iters))
    if step < config.warmup_iters:
        return warmup
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizers = make_optimizers(model, run.config)
    for batch in run.batches(model, *optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(run.step, run.config)
            optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(batch):  # weight: fraction of the batch
            with run.autocast():  # mixed precision: matrix products in the run's dtype
                logits, loss = model(idx, targets)
            (weight * loss).backward()
            run.log(loss)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
    run.finish()


if __name__ == "__main__":
    cli(main)
