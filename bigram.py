"""Stage 1 of 8: a bigram model.

A **language model** predicts what comes next. This one is a table with one row per character. The
row of the current character holds a **logit**, an unnormalized score, for every character that
could follow. Training adjusts the logits until softmax turns each row into the text's frequencies.

It is about as simple as a language model gets, and it is the baseline for everything that follows.
The batches, the loss, the sampling and the core of the training loop stay the same in all later
stages.

    python bigram.py
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
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-2  # AdamW's step size


class Model(LanguageModel):
    """Predicts the next character from the current one alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.logit_table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.logit_table.weight)  # start with equal odds for every character

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logit_table(idx)  # (B, T, V)
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
