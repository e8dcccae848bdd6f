"""Stage 7 of 7: GPT, the same model scaled up and trained with care.

What is new: no other part, but what makes a large model learn well. Dropout, so that it cannot
learn the text by heart. Weights that start small, the smaller the deeper the stack where they
feed the residual sum. Weight decay, on the matrices alone. A learning rate that warms up, then
falls along a cosine. Gradients cut back to length 1. And what makes it fast: numbers of 16 bits
in the products, large batches in portions, on a graphics card PyTorch's own attention, and a cache
for sampling.

Why it helps: the lower loss comes from more width, depth and context; these make it trainable.

    python gpt.py                             the size that suits this machine
    python gpt.py --preset full               10.8 million parameters, for a graphics card
    torchrun --nproc_per_node=2 gpt.py        on two of them

Since layer_norm.py
    new: Config.dropout, Config.grad_accumulation, Config.warmup_iters, Config.weight_decay,
        Config.gradient_clip, Config.precision, Config.fused, Config.compile, PRESETS, Precision,
        Dropout, Cache, Model.initialize, Model.new_caches, make_optimizer, learning_rate_at
    changed: Config.block_size, Config.n_embd, Config.n_head, Config.n_layer, Config.batch_size,
        Config.eval_interval, BatchedMultiHeadAttention.__init__,
        BatchedMultiHeadAttention.forward, Block.__init__, Block.forward, Model.__init__,
        Model.forward, main
    gone: Config.norm (normalisation comes first from here on)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import clear_errors
from training import Run

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Config:
    vocab_size: int = 65  # V: how many different characters the text has
    block_size: int = 256  # T: how many characters the model sees at once
    n_embd: int = 384  # C: how many channels describe a character
    n_head: int = 6  # H: how many heads share these channels, D = C / H each
    n_layer: int = 6  # how many blocks are stacked
    dropout: float = 0.2  # which share of the numbers is silenced at random while training
    batch_size: int = 64  # B: how many such blocks it learns from in one step
    grad_accumulation: int = 1  # how many portions, at least, a batch is taken in: less memory
    max_iters: int = 5000  # how many steps it learns for
    eval_interval: int = 250  # how many steps pass between two evaluations
    learning_rate: float = 1e-3  # how far a step moves the weights
    warmup_iters: int = 100  # how many steps the learning rate takes to rise to that
    weight_decay: float = 0.1  # how strongly the matrices are drawn towards zero
    gradient_clip: float = 1.0  # how long the gradient may be
    precision: Precision = "auto"  # the number format of the matrix products
    fused: bool | None = None  # whether attention is one call of PyTorch's
    compile: bool | None = None  # whether PyTorch compiles the model before it trains


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


class Dropout(nn.Dropout):
    """Silences a share of the numbers at random while training, and scales up the others."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        # On a processor drawing is slow, so each number, of 64 bits, is cut into four of 16. These
        # run from -2**15 to 2**15 - 1; what gets one from the lowest share is silenced.
        draws = (
            torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)[: x.numel()]
            .view(x.shape)
        )
        keep = draws >= min(round(2**16 * self.p), 2**16 - 1) - 2**15
        return x * keep.to(x.dtype).div_(1 - self.p)


class Cache:
    """The keys and values of the characters so far: sampling need not compute them again."""

    def __init__(self) -> None:
        self.pair: Tensor | None = None  # keys and values: (2, B, H, S, D)

    def extend(self, pair: Tensor) -> Tensor:
        self.pair = pair if self.pair is None else torch.cat((self.pair, pair), dim=3)
        return self.pair

    @property
    def length(self) -> int:
        return 0 if self.pair is None else self.pair.shape[3]


class BatchedMultiHeadAttention(nn.Module):
    """All heads of causal self-attention at once: they are a dimension, like the batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.projection = nn.Linear(config.n_embd, config.n_embd)
        # What may not be seen is -inf: added to the scores, it costs a pass less than masked_fill.
        mask = torch.full((config.block_size, config.block_size), float("-inf")).triu(1)  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)
        self.dropout = Dropout(config.dropout)
        self.fused = config.fused

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        H = self.n_head
        x = self.query_key_value(x)  # (B, T, 3*C)
        # Cut the 3*C channels into query, key and value, and each of these into H heads of size D.
        x = x.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        query, key, value = x  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(x[1:])  # (B, H, S, D) both
        S = key.shape[2]  # these T characters, and those in the cache
        mask = self.causal_mask[S - T : S, :S].to(query.dtype)  # (T, S)
        # PyTorch's own call does the same without storing the weights: a graphics card is faster
        # with it, a processor with the lines below it.
        if self.fused or (self.fused is None and x.device.type != "cpu"):
            x = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if S == T else mask,
                dropout_p=self.dropout.p if self.training else 0.0,
                is_causal=S == T,
            )  # (B, H, T, D)
        else:
            scores = (query * key.shape[-1] ** -0.5) @ key.transpose(2, 3) + mask  # (B, H, T, S)
            weights = self.dropout(F.softmax(scores, dim=-1))  # shares of 1, some silenced
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
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = BatchedMultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class Model(nn.Module):
    """Predicts the next character from all those in the block so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = nn.LayerNorm(config.n_embd)
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        self.initialize(config.n_layer)

    def initialize(self, n_layer: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("projection.weight", "narrow.weight")):
                # 2 * n_layer of these feed the residual sum: together they add up to 0.02 again.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: list[Cache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        first = caches[0].length if caches else 0  # the position of the first character
        positions = torch.arange(first, first + T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        logits = self.to_logits(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Each position is an example of its own: B * T rows of logits, B * T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_caches(self) -> list[Cache]:
        return [Cache() for _ in self.blocks]


def learning_rate_at(step: int, config: Config) -> float:
    """Up in a straight line, then down along half a cosine to a tenth."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW that decays the matrices; biases and norms have nothing to gain from being small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate_at(0, config), betas=(0.9, 0.99), fused=True)


@clear_errors
def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizer = make_optimizer(model, run.config)
    network = run.accelerate(model)  # the same weights, as fast as this machine can
    for batch in run.batches(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, run.config)
        optimizer.zero_grad()
        # idx: characters of the text, by number; targets: for each of them, the one that follows
        for idx, targets in run.portions(batch):
            with run.autocast():
                logits, loss = network(idx, targets)
            # In float16 the scaler keeps small gradients from becoming 0; else it does nothing.
            run.scaler.scale(loss / run.portion_count).backward()
            run.log(loss)
        run.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        run.scaler.step(optimizer)
        run.scaler.update()
    run.finish()


if __name__ == "__main__":
    main()
