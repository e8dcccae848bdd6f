"""Runs: what training left in a folder, how a run is named, and which of them are comparable."""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer import UserError
from sample import stage_module
from trainer.flags import flag, given
from trainer.folder import lock_file
from trainer.history import COLUMNS
from trainer.plan import Settings, parse, preset_for

from filelock import FileLock, Timeout


@dataclass
class TrainedRun:
    """What a run has written to its folder, whether it is finished or not."""

    folder: Path
    about: dict[str, Any]  # the content of config.json
    rows: list[dict[str, float]]  # the rows of losses.csv

    @property
    def stage(self) -> str:
        return self.about["stage"]

    @property
    def seed(self) -> int:
        return self.about["seed"]

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    @property
    def text(self) -> str:
        """SHA-256 of the text, whatever its tokens are."""
        return self.about["corpus"].get("text", self.about["corpus"]["sha256"])

    @property
    def best(self) -> dict[str, float]:
        return min(self.rows, key=lambda row: row["val_loss"])

    @property
    def is_finished(self) -> bool:
        return self.rows[-1]["step"] >= self.config["max_iters"]

    @property
    def is_training(self) -> bool:
        """Whether a process holds the folder's lock at this moment."""
        lock = lock_file(self.folder.resolve())
        try:
            if lock.exists():
                FileLock(lock, timeout=0).acquire().lock.release()
            return False
        except Timeout:
            return True

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """The flags that repeat the run, except for its seed and text."""
        module = stage_module(self.stage)
        presets = vars(module).get("PRESETS") or {"": module.Config()}
        changed = {name: differences(self.config, asdict(presets[name])) for name in presets}
        preset = min(changed, key=lambda name: len(changed[name]))
        start = self.about["init_from"] and f"--init-from {self.about['init_from']}"
        resumed = [f"(resumed with {name})" for name in self.about["changed_on_resume"]]
        has_tokens = isinstance(self.about.get("vocabulary"), list)  # of bpe.py
        tokens = has_tokens and f"({self.config['vocab_size']} tokens)"
        flags = [preset and f"--preset {preset}", *changed[preset], tokens, start, *resumed]
        return tuple(filter(None, flags))

    @property
    def key(self) -> tuple:
        """Equal for runs that differ only in their seed."""
        return (self.stage, *self.flags, self.about["device"], self.about["dtype"])


def differences(config: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The flags that turn one config into another; the text determines the vocabulary."""
    names = [name for name in config if name != "vocab_size"]
    return [typed(name, config[name]) for name in names if config[name] != usual.get(name)]


def typed(name: str, value: Any) -> str:
    """A field as a command-line flag."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


def read_run(folder: Path) -> TrainedRun:
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heading, *lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines()
        rows = [dict(zip(COLUMNS, map(float, line.split(",")), strict=True)) for line in lines]
        rows = [row | {name: int(row[name]) for name in ("step", "tokens")} for row in rows]
        # Losses per token, of runs with different tokens, only compare per character.
        for row in rows:
            for name in ("train_loss", "val_loss"):
                row[name] /= about["corpus"].get("characters_per_token", 1)
        run = TrainedRun(folder, about, rows)
        numbers = [about["parameters"], run.config["max_iters"], run.seed, *rows[-1].values()]
        texts = [run.stage, about["corpus"]["sha256"], run.text, about["corpus"]["name"]]
        texts.append(run.key[-1])
        if not all(map(math.isfinite, numbers)) or not all(isinstance(x, str) for x in texts):
            raise ValueError
    except OSError as error:
        raise UserError(f"{folder} is not a run: cannot read {error.filename}") from None
    except (ArithmeticError, AttributeError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"the run {folder} is damaged or from an older version") from None
    return run


def wanted_config(command: str, device: str, *more: str) -> dict[str, Any]:
    """The config of a command such as `residual --no-residual` on that device."""
    stage, *flags = command.split()
    module = stage_module(stage)
    presets = vars(module).get("PRESETS", {})
    options = parse("", module.Config, presets, [*flags, *more])
    if other := given(options, Settings).keys() - {"compile", "grad_accumulation"}:
        name = flag(min(other))
        raise UserError(f"{name} is not a hyperparameter: leave it out, or compare folders of runs")
    usual = presets.get(options.preset or preset_for(device)) or module.Config()
    return asdict(replace(usual, **given(options, module.Config)))
