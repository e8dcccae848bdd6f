"""Beyond the ladder: what changed since GPT-2, the same model with ideas that it did not have.

What is new: ten ideas, each of which --without leaves out by its name.

    rms-norm       vectors are only brought to one length: no mean to subtract, nothing to learn
    rope           queries and keys turn with their position, so that only their distance counts
    qk-norm        queries and keys have one length, so that no score runs away
    bias-free      no biases: what they add, the other weights can learn too
    squared-relu   what the ReLU lets through is squared, so that a few strong ones stand out
    zero-init      what a block adds starts at zero: the first steps need not undo chance
    embedding-norm the embedding is as long as what later layers read: they start on equal terms
    re-embedding   every block may add the embedding again: no layer has to carry it along
    muon           a step moves a matrix alike in all directions, not mostly in the usual few
    schedule       the learning rate holds for long strides, then falls to zero to settle

Why it helps: each for the reason beside it; `python compare.py --modern` measures how much.

    python modern_gpt.py                           the size that suits this machine
    python modern_gpt.py --preset middle           between small and full
    python modern_gpt.py --without rope muon       all ideas but two

Since gpt.py
    new: Idea, Config.muon_learning_rate, Config.muon_momentum, Config.cooldown, Config.without,
        Config.has, RMSNorm, Rotary, PositionTable, Recall, squared_relu, unchanged, make_norm,
        learning_rate_share, cosine_share, make_optimizers
    changed: Config.dropout, Config.batch_size, Config.max_iters, Config.eval_interval,
        Config.learning_rate, Config.warmup_iters, PRESETS, Cache, Cache.__init__, Cache.extend,
        BatchedMultiHeadAttention.__init__, BatchedMultiHeadAttention.forward,
        FeedForward.__init__, FeedForward.forward, Block.__init__, Block.forward, Model.__init__,
        Model.initialize, Model.forward, Model.new_caches, main
    gone: Cache.length (an attribute now), learning_rate_at (a share of 1 now), make_optimizer
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import UserError, clear_errors
from training import Run

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Idea = Literal[
    "rms-norm",
    "rope",
    "qk-norm",
    "bias-free",
    "squared-relu",
    "zero-init",
    "embedding-norm",
    "re-embedding",
    "muon",
    "schedule",
]


@dataclass
class Config:
    vocab_size: int = 65  # V: how many different characters the text has
    block_size: int = 256  # T: how many characters the model sees at once
    n_embd: int = 384  # C: how many channels describe a character
    n_head: int = 6  # H: how many heads share these channels, D = C / H each
    n_layer: int = 6  # how many blocks are stacked
    dropout: float = 0.1  # which share of the numbers is silenced at random while training
    batch_size: int = 16  # B: how many such blocks it learns from in one step
    grad_accumulation: int = 1  # how many portions, at least, a batch is taken in: less memory
    max_iters: int = 1400  # how many steps it learns for
    eval_interval: int = 350  # how many steps pass between two evaluations
    learning_rate: float = 3e-3  # how far a step moves the weights
    muon_learning_rate: float = 1e-2  # the same for the matrices that Muon moves
    muon_momentum: float = 0.9  # which share of its direction Muon keeps from step to step
    warmup_iters: int = 20  # how many steps the learning rates take to rise
    cooldown: float = 0.7  # over which last share of the steps they fall to zero
    weight_decay: float = 0.1  # how strongly the matrices are drawn towards zero
    gradient_clip: float = 1.0  # how long the gradient may be
    precision: Precision = "auto"  # the number format of the matrix products
    fused: bool | None = None  # whether attention is one call of PyTorch's
    compile: bool | None = None  # whether PyTorch compiles the model before it trains
    without: tuple[Idea, ...] = ()  # which ideas are left out

    def has(self, idea: Idea) -> bool:
        return idea not in self.without


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
        block_size=128,
        n_embd=128,
        n_head=2,
        n_layer=4,
        dropout=0.0,
        max_iters=2000,
        eval_interval=250,
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
    """The keys and values of the characters that the next one sees: a window that slides along."""

    def __init__(self, block_size: int) -> None:
        self.others = block_size - 1  # so many does the next one see besides itself
        self.pair: Tensor | None = None  # keys and values: (2, B, H, S, D)
        self.length = 0  # how many characters there have been, seen or not

    def extend(self, pair: Tensor) -> Tensor:
        self.length += pair.shape[3]
        pair = pair if self.pair is None else torch.cat((self.pair, pair), dim=3)
        self.pair = pair[:, :, :, max(0, pair.shape[3] - self.others) :]
        return pair


class RMSNorm(nn.Module):
    """Scales a vector so that the mean square of its channels is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


class Rotary(nn.Module):
    """Turns queries and keys by angles that grow with their position.

    Their product then depends on how far apart they stand, and not on where.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size % 2:
            raise UserError(
                f"rope turns pairs of channels, and a head has {size}: make --n-embd / --n-head "
                "even, or add --without rope"
            )
        # Channels i and i + D/2 are a point in a plane; from plane to plane it turns more slowly.
        speeds = 10_000.0 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("speeds", torch.cat((-speeds, speeds)), persistent=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        T, D = x.shape[-2:]
        positions = torch.arange(first, first + T, device=x.device)  # (T)
        angles = positions[:, None] * self.speeds  # (T, D)
        other = x.roll(D // 2, dims=-1)  # each channel's partner
        return x * angles.cos().to(x.dtype) + other * angles.sin().to(x.dtype)


class PositionTable(nn.Module):
    """Without rope: a learnt vector for each position, as in gpt.py."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, first: int) -> Tensor:
        T = x.shape[1]
        positions = torch.arange(first, first + T, device=x.device)  # (T)
        return x + self.position_embedding(positions)


class Recall(nn.Module):
    """Adds what came in at the bottom, as much of it as it learns to want."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.share * embedding


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def unchanged(x: Tensor, *_: object) -> Tensor:
    """What stands in for a part that is left out."""
    return x


def make_norm(config: Config) -> nn.Module:
    return RMSNorm() if config.has("rms-norm") else nn.LayerNorm(config.n_embd)


class BatchedMultiHeadAttention(nn.Module):
    """All heads of causal self-attention at once: they are a dimension, like the batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.block_size = config.block_size
        bias = not config.has("bias-free")
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.norm = RMSNorm() if config.has("qk-norm") else unchanged
        self.rotate = Rotary(config.n_embd // config.n_head) if config.has("rope") else unchanged
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.dropout = Dropout(config.dropout)
        self.fused = config.fused

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        H = self.n_head
        first = cache.length if cache else 0  # the position of the first character
        x = self.query_key_value(x)  # (B, T, 3*C)
        # Cut the 3*C channels into query, key and value, and each of these into H heads of size D.
        x = x.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        query, key = self.rotate(self.norm(x[:2]), first)  # (B, H, T, D) both
        value = x[2]  # (B, H, T, D)
        if cache is not None:
            key, value = cache.extend(torch.stack((key, value)))  # (B, H, S, D) both
        S = key.shape[2]  # these T characters, and those in the cache
        # Each of the T sees itself and what stands before it, `block_size` characters in all.
        numbers = torch.arange(S, device=x.device)  # (S)
        back = numbers[S - T :, None] - numbers  # (T, S)
        hidden = (back < 0) | (back >= self.block_size)  # (T, S)
        mask = torch.zeros_like(back, dtype=query.dtype).masked_fill(hidden, float("-inf"))
        # PyTorch's own call does the same without storing the weights: a graphics card is faster
        # with it, a processor with the lines below it.
        if self.fused or (self.fused is None and x.device.type != "cpu"):
            plain = S == T <= self.block_size
            x = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if plain else mask,
                dropout_p=self.dropout.p if self.training else 0.0,
                is_causal=plain,
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
        bias = not config.has("bias-free")
        self.widen = nn.Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.activation = squared_relu if config.has("squared-relu") else F.relu
        self.narrow = nn.Linear(4 * config.n_embd, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.widen(x))  # (B, T, 4*C)
        return self.narrow(x)  # (B, T, C)


class Block(nn.Module):
    """Communicate, then compute; each adds its part to what was there."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.recall = Recall() if config.has("re-embedding") else unchanged
        self.attention_norm = make_norm(config)
        self.attention = BatchedMultiHeadAttention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, embedding: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.recall(x, embedding)
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class Model(nn.Module):
    """Predicts the next character from all those in the block so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.place = unchanged if config.has("rope") else PositionTable(config)
        self.embedding_norm = RMSNorm() if config.has("embedding-norm") else unchanged
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = make_norm(config)
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        self.slides = config.has("rope")  # without rope, positions end with the block
        self.initialize(config)

    def initialize(self, config: Config) -> None:
        # Without zero-init it is as in gpt.py: 2 * n_layer parts of a sum add up to 0.02.
        output_std = 0.0 if config.has("zero-init") else 0.02 / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(("projection.weight", "narrow.weight")):
                nn.init.normal_(parameter, std=output_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: list[Cache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        first = caches[0].length if caches else 0  # the position of the first character
        x = self.place(self.token_embedding(idx), first)  # (B, T, C)
        x = embedding = self.dropout(self.embedding_norm(x))
        for i, block in enumerate(self.blocks):
            x = block(x, embedding, caches[i] if caches else None)
        logits = self.to_logits(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Each position is an example of its own: B * T rows of logits, B * T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_caches(self) -> list[Cache]:
        return [Cache(self.block_size) for _ in self.blocks]


def learning_rate_share(step: int, config: Config) -> float:
    """Up in a straight line, then level, then down in a straight line to zero."""
    up = (step + 1) / max(1, config.warmup_iters)
    down = (config.max_iters - step) / (config.cooldown * config.max_iters)
    return min(up, 1.0, down)


def cosine_share(step: int, config: Config) -> float:
    """Without schedule: up in a straight line, then down along half a cosine to a tenth."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for those at both ends and for the vectors."""
    named = list(model.named_parameters())
    vectors = [parameter for _, parameter in named if parameter.dim() == 1]
    matrices = [(name, parameter) for name, parameter in named if parameter.dim() == 2]
    inner = [parameter for name, parameter in matrices if name.startswith("blocks.")]
    outer = [parameter for name, parameter in matrices if not name.startswith("blocks.")]
    for_muon, for_adamw = (inner, outer) if config.has("muon") else ([], inner + outer)
    groups = [
        {"params": for_adamw, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate, muon_rate = config.learning_rate, config.muon_learning_rate
    optimizers = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)]
    if for_muon:
        # Whatever a matrix's shape, its numbers move by a fifth of the rate: much as AdamW's do.
        muon = torch.optim.Muon(
            for_muon,
            lr=muon_rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


@clear_errors
def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizers = make_optimizers(model, run.config)
    network = run.accelerate(model)  # the same weights, as fast as this machine can
    share_at = learning_rate_share if run.config.has("schedule") else cosine_share
    for batch in run.batches(model, *optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * share_at(run.step, run.config)
            optimizer.zero_grad()
        # idx: characters of the text, by number; targets: for each of them, the one that follows
        for idx, targets in run.portions(batch):
            with run.autocast():
                logits, loss = network(idx, targets)
            # In float16 the scaler keeps small gradients from becoming 0; else it does nothing.
            run.scaler.scale(loss / run.portion_count).backward()
            run.log(loss)
        for optimizer in optimizers:
            run.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(weight.grad for weight in model.parameters())
        norm = norm.nan_to_num(0.0, 0.0)  # float16 may overflow: the scaler leaves that step out
        nn.utils.clip_grads_with_norm_(model.parameters(), run.config.gradient_clip, norm)
        for optimizer in optimizers:
            run.scaler.step(optimizer)
        run.scaler.update()
    run.finish()


if __name__ == "__main__":
    main()
