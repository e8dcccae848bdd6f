"""The loss of an ensemble: the predictions of several runs, averaged."""

import math
from dataclasses import replace
from pathlib import Path

from trainer import UserError
from comparison.runs import TrainedRun
from sample import load
from trainer.corpus import Corpus, open_corpus
from trainer.evaluate import windows

import torch
from torch import Tensor
from torch.nn import functional as F


def ensemble_loss(runs: list[TrainedRun], corpus: Corpus) -> float | None:
    """The ensemble's validation loss; None for a single run or an unusable checkpoint."""
    if len(runs) < 2:
        return None
    try:
        if runs[0].about["corpus"]["sha256"] != corpus.sha256:  # the same text in other tokens
            corpus = open_corpus(Path(runs[0].about["corpus"]["path"]))
            if runs[0].about["corpus"]["sha256"] != corpus.sha256:
                return None
        log_probs = [target_log_probs(run, corpus) for run in runs]
    except UserError:  # such as a script that has changed since
        return None
    mean = torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(runs))
    return -mean.mean().item() / corpus.characters_per_token


@torch.inference_mode()
def target_log_probs(run: TrainedRun, corpus: Corpus) -> Tensor:
    """The log-probability that the run's best weights give to each next token."""
    device = run.about["device"]
    model, tokenizer = load(run.folder, device)
    if tokenizer.source != corpus.tokenizer.source:  # it started from a model of another text
        if tokenizer.unit == "tokens":
            raise UserError(f"{run.folder} has other tokens")
        corpus = replace(corpus, table=torch.tensor(tokenizer.encode(corpus.vocabulary)))
    results = []
    for idx, targets in windows(corpus.validation, model.block_size):
        logits, _ = model(corpus.ids(idx).to(device))
        targets = corpus.ids(targets).to(device)
        results.append(-F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
    return torch.cat(results).double().cpu()
