"""Stage 1 of 7: the bigram table.

What is new: a table with a row for every character. The row of the current character holds a
score, called a logit, for each character that may come next. Training turns these scores into
the odds with which the text itself continues.

Why it helps: it is the smallest language model there is, and everything around it stays the same
to the last stage: the batches, the loss, the four training lines, the sample.

    python bigram.py
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
    batch_size: int = 32  # B: how many such blocks it learns from in one step
    max_iters: int = 5000  # how many steps it learns for
    eval_interval: int = 500  # how many steps pass between two evaluations
    learning_rate: float = 1e-2  # how far a step moves the weights


class Model(nn.Module):
    """Predicts the next character from the current one alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.logit_table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.logit_table.weight)  # before training any character may follow

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logit_table(idx)  # (B, T, V)
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
