"""Which runs a comparison wants, which are there, and which are left out and why."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from common import Corpus, UserError
from flags import flag, given_fields, parse_flags, typed
from run_folder import read_losses, script_sha256
from sample import stage_module
from settings import preset_for

STAGES = (
    "bigram",
    "self_attention",
    "multihead_attention",
    "feed_forward",
    "residual",
    "layer_norm",
    "gpt",
    "modern_gpt",
)


class Rung(NamedTuple):
    """A stage, or a variant of it."""

    stage: str
    flags: str
    new: str  # since the stage before

    @property
    def name(self) -> str:
        return f"{self.stage} {self.flags}".strip()

    @property
    def command(self) -> str:
        return f"{self.stage}.py {self.flags}".strip()

    @property
    def is_variant(self) -> bool:
        return self.flags != "" and not self.flags.startswith("--preset")


RUNGS = (
    Rung("bigram", "", "a table of character pairs"),
    Rung("self_attention", "", "one head of attention"),
    Rung("multihead_attention", "", "four heads"),
    Rung("feed_forward", "", "a network after them"),
    Rung("residual", "", "three blocks that add"),
    Rung("residual", "--no-residual", "the same without adding"),
    Rung("layer_norm", "", "normalised before"),
    Rung("layer_norm", "--norm post", "normalised after"),
    Rung("gpt", "--preset small", "scaled up, for a processor"),
    Rung("gpt", "--preset full", "scaled up, for a graphics card"),
    Rung("modern_gpt", "--preset small", "what changed since, for a processor"),
    Rung("modern_gpt", "--preset middle", "the same with more time"),
    Rung("modern_gpt", "--preset full", "the same for a graphics card"),
)


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
    script_sha256: str
    changed_on_resume: list[str]
    parameters: int
    number_format: str
    torch: str
    rows: list[dict[str, float]]  # of losses.csv

    @property
    def best(self) -> dict[str, float]:
        return min(self.rows, key=lambda row: row["val_loss"])

    @property
    def finished(self) -> bool:
        return self.rows[-1]["step"] == self.config["max_iters"]


def read_run(folder: Path) -> TrainedRun:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        run = TrainedRun(
            folder,
            stage=settings["stage"],
            config={
                name: tuple(value) if isinstance(value, list) else value
                for name, value in dict(settings["config"]).items()
            },
            seed=int(settings["seed"]),
            device=settings["device"],
            corpus=settings["corpus"]["name"],
            sha256=settings["corpus"]["sha256"],
            init_from=settings["init_from"],
            script_sha256=settings.get("script_sha256", ""),
            changed_on_resume=list(settings.get("changed_on_resume", [])),
            parameters=int(settings["parameters"]),
            number_format=settings["number_format"],
            torch=settings["versions"]["torch"],
            rows=[],
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):  # which one depends on where it is damaged
        raise UserError(f"{path} is damaged, or not of a run of this course") from None
    run.rows = read_losses(folder / "losses.csv")
    return run


class LeftOut(Exception):
    """This run does not belong into the comparison; the message says why."""


@dataclass
class Terms:
    """What all runs of a comparison have in common."""

    corpus: Corpus
    device: str
    stages: tuple[str, ...] = STAGES
    seeds: range | None = None  # None: whichever are there
    max_iters: int | None = None  # None: what each stage takes by itself
    ladder: tuple[Rung, ...] = RUNGS  # what is compared

    def rungs(self) -> list[Rung]:
        return [rung for rung in self.ladder if rung.stage in self.stages]

    def to_train(self) -> list[Rung]:
        if self.ladder != RUNGS:
            return self.rungs()
        other_presets = {"small", "middle", "full"} - {preset_for(self.device)}
        unsuited = {f"--preset {preset}" for preset in other_presets}
        return [rung for rung in self.rungs() if rung.flags not in unsuited]

    def flags(self, rung: Rung) -> list[str]:
        """What makes a run of it, seed and text apart."""
        words = rung.flags.split()
        if self.max_iters and "--max-iters" not in words:
            words += ["--max-iters", str(self.max_iters)]
            words += ["--eval-interval", str(max(1, self.max_iters // 10))]
        return words

    @cached_property
    def configs(self) -> dict[Rung, dict[str, Any]]:
        """What the rungs ask for: finding out takes a while, and each run is held against all."""
        return {rung: self.config(rung) for rung in self.rungs()}

    def config(self, rung: Rung) -> dict[str, Any]:
        module = stage_module(rung.stage)
        presets = getattr(module, "PRESETS", None)
        options = parse_flags(module.Config, presets, self.flags(rung))
        config = presets[options.preset] if presets else module.Config()
        given = given_fields(options, module.Config)
        return asdict(replace(config, **given, vocab_size=len(self.corpus.vocabulary)))

    def warning(self) -> str:
        """Fewer steps than a stage is made for say little."""
        own = replace(self, max_iters=None)
        whole = [rung for rung in self.to_train() if "--max-iters" not in rung.flags]
        usual = {own.config(rung)["max_iters"] for rung in whole}
        if not self.max_iters or self.max_iters >= max(usual):
            return ""
        instead = " to ".join(map(str, sorted({min(usual), max(usual)})))
        return (
            f"A quick look: {self.max_iters} steps instead of {instead}. What is better shows only "
            "when all have learnt."
        )

    def place(self, run: TrainedRun) -> Rung:
        """The rung that a run belongs to."""
        rungs = [rung for rung in self.rungs() if rung.stage == run.stage]
        if not rungs:
            raise LeftOut("")  # as --stages asks for
        if run.config.get("without") and self.ladder == RUNGS:
            raise LeftOut("")  # as is what compare.py --modern compares
        if run.sha256 != self.corpus.sha256:
            raise LeftOut(f"learnt another text, {run.corpus}")
        if run.script_sha256 != script_sha256(run.stage):
            raise LeftOut(f"made by another version of {run.stage}.py")
        if run.init_from:
            raise LeftOut("started from the weights of another run")
        if run.changed_on_resume:
            raise LeftOut(f"resumed with another {', '.join(run.changed_on_resume)}")
        differences = {rung: different_settings(run.config, self.configs[rung]) for rung in rungs}
        rung = min(rungs, key=lambda rung: len(differences[rung]))
        if differences[rung]:
            raise LeftOut(f"made with {' '.join(differences[rung])}")
        if run.device != self.device:
            raise LeftOut(f"made on {run.device}, and this comparison is for {self.device}")
        last = run.config["max_iters"]
        steps = [*range(0, last, run.config["eval_interval"]), last]
        if [row["step"] for row in run.rows] != steps[: len(run.rows)]:
            raise LeftOut("its losses.csv holds other steps than its settings ask for")
        if self.seeds and run.seed not in self.seeds:
            raise LeftOut(f"made with --seed {run.seed}")
        return rung


def different_settings(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The flags that made the difference."""
    told = [f"without {flag(name)}" for name in want.keys() - have.keys()]
    for name, value in have.items():
        if name not in want or value != want[name]:
            on_or_off = {True: flag(name), False: flag(f"no_{name}")}
            is_switch = isinstance(value, bool)
            told.append(on_or_off[value] if is_switch else f"{flag(name)} {typed(value)}")
    return told


@dataclass
class Found:
    """The runs that are there, sorted."""

    finished: dict[tuple[Rung, int], TrainedRun] = field(default_factory=dict)  # by rung and seed
    unfinished: dict[tuple[Rung, int], TrainedRun] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def by_rung(self, ladder: tuple[Rung, ...] = RUNGS) -> dict[Rung, list[TrainedRun]]:
        """In the order of the ladder, and of the seeds."""
        keys = sorted(self.finished, key=lambda key: (ladder.index(key[0]), key[1]))
        groups: dict[Rung, list[TrainedRun]] = {}
        for key in keys:
            groups.setdefault(key[0], []).append(self.finished[key])
        return groups


def find_runs(terms: Terms, own: Path) -> Found:
    """Sort the runs below runs/; those in `own` may be resumed where they are unfinished."""
    found = Found()
    reasons: dict[str, list[str]] = {}
    for folder in sorted(path.parent for path in Path("runs").rglob("config.json")):
        try:
            run = read_run(folder)
            key = terms.place(run), run.seed
            if key in found.finished:
                raise LeftOut(f"the same run as {found.finished[key].folder}")
            if run.finished:
                found.finished[key] = run
            elif folder.is_relative_to(own):
                found.unfinished[key] = run
            else:
                raise LeftOut("unfinished, or still running")
        except LeftOut as reason:
            if not str(reason):
                continue
            reasons.setdefault(str(reason), []).append(str(folder))
        except UserError as error:
            found.left_out.append(str(error))
    for reason, folders in reasons.items():
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        found.left_out.append(f"{', '.join(folders[:3])}{more}: {reason}")
    return found
