"""The validation loss of a bigram table that is counted instead of trained, with add-one smoothing.

python benchmarks/counting.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer.corpus import open_corpus

import torch


def main() -> None:
    corpus = open_corpus(None)
    train, validation, V = corpus.train, corpus.validation, len(corpus.vocabulary)
    counts = 1 + torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V)
    log_probs = torch.log(counts / counts.sum(dim=1, keepdim=True))
    loss = -log_probs[validation[:-1], validation[1:]].mean().item()
    print(f"a bigram table by counting: validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
