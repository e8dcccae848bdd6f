"""What a bigram table reaches that is counted instead of trained; each count begins at 1.

python benchmarks/counting.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import load_corpus


def main() -> None:
    corpus = load_corpus()
    train, validation = corpus.training, corpus.validation
    V = len(corpus.vocabulary)
    pairs = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V)
    log_shares = torch.log((pairs + 1) / (pairs + 1).sum(dim=1, keepdim=True))
    loss = -log_shares[validation[:-1], validation[1:]].mean().item()
    print(f"a bigram table by counting: validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
