"""Run folders as training writes them, without the training."""

import json
from pathlib import Path
from typing import Any

from comparison.runs import Row, Terms
from trainer.history import losses_csv

PARAMETERS = 1234


def write_run(
    folder: Path,
    terms: Terms,
    row: Row,
    seed: int = 1,
    loss: float = 2.0,  # at the end
    seconds: float = 10.0,
    rows: int | None = None,  # of losses.csv; None: all of a finished run
    **changes: Any,  # of config.json
) -> None:
    config = terms.config(row) | changes.pop("config", {})
    last = config["max_iters"]
    settings = {
        "stage": row.stage,
        "config": config,
        "seed": seed,
        "init_from": "",
        "changed_on_resume": [],
        "device": terms.device,
        "dtype": "float32",
        "corpus": {"name": terms.corpus.name, "path": "", "sha256": terms.corpus.sha256},
        "parameters": PARAMETERS,
        "versions": {"torch": "2.0"},
    } | changes
    log = [
        {
            "step": step,
            "train_loss": loss + 0.1,
            "val_loss": loss + (last - step) / last,
            "learning_rate": 0.001,
            "tokens": 100 * step,
            "seconds": seconds * step / last,
        }
        for step in [*range(0, last, config["eval_interval"]), last]
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "losses.csv").write_bytes(losses_csv(log[:rows]))
