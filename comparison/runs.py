"""Which runs a comparison wants, which exist, and which are left out and why."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trainer import UserError
from sample import stage_module
from trainer.corpus import Corpus
from trainer.flags import flag
from trainer.history import COLUMNS
from trainer.plan import preset_for

STAGES = (
    "bigram",
    "self_attention",
    "multihead_attention",
    "batched_attention",
    "feed_forward",
    "residual",
    "layer_norm",
    "gpt",
    "modern_gpt",
)


def typed(name: str, value: Any) -> str:
    """A field as it would be typed."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


class Row(NamedTuple):
    """A row of the table: a stage, or a variant of it."""

    stage: str
    new: str  # what this stage adds
    preset: str = ""
    changes: tuple[tuple[str, Any], ...] = ()  # fields of its config, and their values

    @property
    def flags(self) -> str:
        preset = [f"--preset {self.preset}"] if self.preset else []
        return " ".join([*preset, *(typed(name, value) for name, value in self.changes)])

    @property
    def name(self) -> str:
        return f"{self.stage} {self.flags}".strip()

    @property
    def command(self) -> str:
        return f"{self.stage}.py {self.flags}".strip()

    @property
    def is_variant(self) -> bool:
        return self.changes != ()

    def changed(self, **fields: Any) -> "Row":
        return self._replace(changes=(*self.changes, *fields.items()))


ROWS = (
    Row("bigram", "a table of bigram logits"),
    Row("self_attention", "one attention head"),
    Row("multihead_attention", "four heads"),
    Row("batched_attention", "the same heads in one matrix product"),
    Row("feed_forward", "an MLP after attention"),
    Row("residual", "three blocks with skip connections"),
    Row("residual", "the same without skip connections").changed(residual=False),
    Row("layer_norm", "LayerNorm before each sublayer"),
    Row("layer_norm", "LayerNorm after each addition").changed(norm="post"),
    Row("gpt", "scaled up, for a CPU", "small"),
    Row("gpt", "scaled up, for a GPU", "full"),
    Row("modern_gpt", "newer ideas, for a CPU", "small"),
    Row("modern_gpt", "the same, trained for longer", "middle"),
    Row("modern_gpt", "the same, for a GPU", "full"),
)


class LeftOut(UserError):
    """This run does not belong in the comparison; the message says why."""


@dataclass
class TrainedRun:
    """What a finished or unfinished run has left in its folder."""

    folder: Path
    stage: str
    config: dict[str, Any]
    seed: int
    device: str
    corpus: str
    sha256: str
    init_from: str
    changed_on_resume: list[str]
    parameters: int
    dtype: str
    torch: str
    rows: list[dict[str, float]]  # of losses.csv

    @property
    def best(self) -> dict[str, float]:
        return min(self.rows, key=lambda row: row["val_loss"])

    @property
    def finished(self) -> bool:
        return self.rows[-1]["step"] == self.config["max_iters"]


def read_run(folder: Path) -> TrainedRun:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        run = TrainedRun(
            folder,
            stage=settings["stage"],
            config=dict(settings["config"]),
            seed=int(settings["seed"]),
            device=settings["device"],
            corpus=settings["corpus"]["name"],
            sha256=settings["corpus"]["sha256"],
            init_from=settings["init_from"],
            changed_on_resume=list(settings["changed_on_resume"]),
            parameters=int(settings["parameters"]),
            dtype=settings["dtype"],
            torch=settings["versions"]["torch"],
            rows=[],
        )
    except OSError as error:
        raise LeftOut(f"cannot read its config.json: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):  # which one depends on where it is damaged
        message = "its config.json is damaged, or written by an older version of this course"
        raise LeftOut(message) from None
    run.rows = read_losses(folder / "losses.csv")
    return run


def read_losses(path: Path) -> list[dict[str, float]]:
    """The rows of a run's losses.csv."""
    try:
        heading, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [dict(zip(COLUMNS, map(float, line.split(",")), strict=True)) for line in lines]
        are_finite = all(math.isfinite(value) for row in rows for value in row.values())
        if heading != ",".join(COLUMNS) or not rows or not are_finite:
            raise ValueError
    except OSError as error:
        raise LeftOut(f"cannot read its losses.csv: {error.strerror}") from None
    except ValueError:
        raise LeftOut("its losses.csv is damaged") from None
    return [row | {name: int(row[name]) for name in ("step", "tokens")} for row in rows]


@dataclass
class Terms:
    """What all runs of a comparison have in common."""

    corpus: Corpus
    device: str
    stages: tuple[str, ...] = STAGES
    seeds: range | None = None  # None: all there are
    max_iters: int | None = None  # None: each stage's own
    table: tuple[Row, ...] = ROWS  # what is compared

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.table if row.stage in self.stages]

    def to_train(self) -> list[Row]:
        if self.table != ROWS:
            return self.rows
        return [row for row in self.rows if row.preset in ("", preset_for(self.device))]

    def complete(self, row: Row) -> Row:
        """The row with the number of steps that the comparison asks for."""
        if not self.max_iters or "max_iters" in dict(row.changes):
            return row
        return row.changed(max_iters=self.max_iters, eval_interval=max(1, self.max_iters // 10))

    @cached_property
    def configs(self) -> dict[Row, dict[str, Any]]:
        return {row: self.config(row) for row in self.rows}

    def config(self, row: Row) -> dict[str, Any]:
        module, changes = stage_module(row.stage), dict(self.complete(row).changes)
        config = module.PRESETS[row.preset] if row.preset else module.Config()
        return asdict(replace(config, **changes, vocab_size=len(self.corpus.vocabulary)))

    def warning(self) -> str:
        """A warning if the runs are shorter than the stages are designed for."""
        own = replace(self, max_iters=None)
        rows = [row for row in self.to_train() if "max_iters" not in dict(row.changes)]
        usual = {own.config(row)["max_iters"] for row in rows}
        if not self.max_iters or self.max_iters >= max(usual):
            return ""
        instead = " to ".join(map(str, sorted({min(usual), max(usual)})))
        return (
            f"This is a quick look, with {self.max_iters} steps instead of {instead}. Only the "
            "full number of steps shows which model is better."
        )

    def place(self, run: TrainedRun) -> Row | None:
        """The row that a run belongs to; None if nobody asked for its kind."""
        rows = [row for row in self.rows if row.stage == run.stage]
        lacks_ideas = any(value is False for value in run.config.values())
        if not rows or self.table == ROWS and run.stage == "modern_gpt" and lacks_ideas:
            return None
        if run.sha256 != self.corpus.sha256:
            raise LeftOut(f"trained on another text, {run.corpus}")
        if run.init_from:
            raise LeftOut("started from the weights of another run")
        if run.changed_on_resume:
            raise LeftOut(f"resumed with another {', '.join(run.changed_on_resume)}")
        differences = {row: different_fields(run.config, self.configs[row]) for row in rows}
        row = min(rows, key=lambda row: len(differences[row]))
        if differences[row]:
            raise LeftOut(f"made with {' '.join(differences[row])}")
        if run.device != self.device:
            raise LeftOut(f"made on {run.device}, and this comparison is for {self.device}")
        last = run.config["max_iters"]
        steps = [*range(0, last, run.config["eval_interval"]), last]
        if [each["step"] for each in run.rows] != steps[: len(run.rows)]:
            raise LeftOut("its losses.csv has other steps than its settings ask for")
        if self.seeds and run.seed not in self.seeds:
            raise LeftOut(f"made with --seed {run.seed}")
        return row


def different_fields(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """As flags: what a run has instead of what a row asks for."""
    return [typed(name, have.get(name)) for name in have | want if have.get(name) != want.get(name)]


@dataclass
class Found:
    """The runs that exist, sorted."""

    finished: dict[tuple[Row, int], TrainedRun] = field(default_factory=dict)  # by row and seed
    unfinished: dict[tuple[Row, int], TrainedRun] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def by_row(self, table: tuple[Row, ...] = ROWS) -> dict[Row, list[TrainedRun]]:
        """In the order of the table, and of the seeds."""
        groups: dict[Row, list[TrainedRun]] = {}
        for key in sorted(self.finished, key=lambda key: (table.index(key[0]), key[1])):
            groups.setdefault(key[0], []).append(self.finished[key])
        return groups


def find_runs(terms: Terms, own: Path) -> Found:
    """Sort the runs below runs/; unfinished ones may be resumed only if they are below `own`."""
    found = Found()
    reasons: dict[str, list[str]] = {}
    for folder in sorted(path.parent for path in Path("runs").rglob("config.json")):
        try:
            run = read_run(folder)
            row = terms.place(run)
            if row is None:
                continue
            key = row, run.seed
            if key in found.finished:
                raise LeftOut(f"the same run as {found.finished[key].folder}")
            if run.finished:
                found.finished[key] = run
            elif folder.is_relative_to(own):
                found.unfinished[key] = run
            else:
                raise LeftOut("unfinished, or still running")
        except LeftOut as reason:
            reasons.setdefault(str(reason), []).append(str(folder))
    for reason, folders in reasons.items():
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        found.left_out.append(f"{', '.join(folders[:3])}{more}: {reason}")
    return found
