"""Run folders as training writes them, without the training."""

import json
from pathlib import Path
from typing import Any

from comparison.runs import wanted_config
from trainer.corpus import Corpus
from trainer.history import losses_csv

PARAMETERS = 1234


def write_run(
    folder: Path,
    command: str,  # such as `residual --no-residual`
    text: Corpus,
    seed: int = 1,
    loss: float = 2.0,  # at its best evaluation, the last but one
    seconds: float = 10.0,
    rows: int | None = None,  # of losses.csv; None: all of a finished run
    **changes: Any,  # of config.json
) -> None:
    config = wanted_config(command, "cpu") | {"vocab_size": len(text.vocabulary)}
    last, every = config["max_iters"], config["eval_interval"]
    about = {
        "stage": command.split()[0],
        "config": config,
        "seed": seed,
        "init_from": "",
        "changed_on_resume": [],
        "device": "cpu",
        "dtype": "float32",
        "corpus": {"name": text.name, "path": text.path, "sha256": text.sha256},
        "parameters": PARAMETERS,
        "versions": {"torch": "2.0"},
    } | changes
    log = [
        {
            "step": step,
            "train_loss": loss + 0.1,
            "val_loss": loss + abs(last - every - step) / last,
            "learning_rate": 0.001,
            "tokens": 100 * step,
            "seconds": seconds * step / last,
        }
        for step in [*range(0, last, every), last]
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "losses.csv").write_bytes(losses_csv(log[:rows]))
