"""Compare models: train the runs that are missing, then show how much each stage improves.

    python compare.py                              every stage, with three seeds
    python compare.py runs/gpt runs/my_gpt         exactly these runs
    python compare.py gpt "my_gpt --n-embd 96"     these scripts, with these flags
    python compare.py --modern                     modern_gpt.py with each idea removed in turn
    python compare.py --max-iters 200 --seeds 1    a quick look at every stage

Prints a table, and writes it with the loss curves, samples and code to report.html. Runs that
differ only in their seed share a row. Finished runs below runs/ are not trained again. You can stop
at any time: the same command resumes.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer import UserError, cli
from comparison.drawing import curves, staircase, standalone
from comparison.ensemble import ensemble_loss
from comparison.report import first_line, report
from comparison.runs import TrainedRun, read_run, wanted_config
from comparison.table import Row, as_csv, as_markdown, as_text, notes, results_csv, rows_of, table
from comparison.train import RUNS, Job, free_folder, make_folder, short, train
from data.pocket_play import known_entropy
from trainer.corpus import TINY_SHAKESPEARE_SHA256, Corpus, open_corpus
from trainer.flags import Parser, flag, given
from trainer.folder import write_whole
from trainer.machine import DeviceSettings, available_device
from trainer.plan import preset_for
from trainer.sampling import SampleSettings

import torch

SMALL_STAGES = (
    "bigram",
    "self_attention",
    "multihead_attention",
    "batched_attention",
    "feed_forward",
    "residual",
    "residual --no-residual",
    "layer_norm",
    "layer_norm --norm post",
)
STAGES = (*dict.fromkeys(each.split()[0] for each in SMALL_STAGES), "gpt", "modern_gpt")
MOST_AT_ONCE = 4  # a limit, because each run loads its own copy of PyTorch
QUICK = (
    "A quick look, without the improvement column: after so few steps, simple models can be ahead."
)


@dataclass
class CompareSettings:
    seeds: int | None = None  # runs per row, with seeds 1 to N (default 3; with --no-train: all)
    data: Path | None = None  # UTF-8 text to train on, or a folder that prepare.py made
    max_iters: int | None = None  # training steps of each run (default: each script's own)
    modern: bool = False  # ablation study: modern_gpt.py with each idea removed in turn
    no_train: bool = False  # compare only existing runs
    out: Path | None = None  # folder for table, pictures and report (default: in runs/compare)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    words = "folders of runs, or scripts with their flags in quotes (default: every stage)"
    parser.add_argument("what", nargs="*", metavar="RUN_OR_SCRIPT", help=words)
    parser.add_fields("the comparison", CompareSettings)
    parser.add_fields("the machine", DeviceSettings)
    parser.add_fields("the samples", SampleSettings)
    options = parser.parse_args()
    vars(options).update(asdict(CompareSettings(**given(options, CompareSettings))))
    if options.modern and options.what:
        raise UserError("--modern compares modern_gpt.py with itself: name no runs or scripts")
    if not any(map(os.path.isdir, options.what)):
        parts = itertools.chain(*(word.split(",") for word in options.what))
        commands = [re.sub(r"\.py\b", "", part.strip()) for part in parts if part.strip()]
        options.what = list(dict.fromkeys(commands))
    return options


@dataclass
class Comparison:
    """Scripts with their flags, to train on a text and compare."""

    corpus: Corpus
    device: str
    commands: list[str]
    more: list[str]  # flags that all commands share
    seeds: range

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        size = {"vocab_size": len(self.corpus.vocabulary)}
        own = {each: wanted_config(each, self.device, *self.more) for each in self.commands}
        return {command: config | size for command, config in own.items()}

    def find(self) -> dict[tuple[str, int], TrainedRun]:
        """The runs that exist, by command and seed; unfinished ones only if it made them."""
        found: dict[tuple[str, int], TrainedRun] = {}
        for path in sorted(Path("runs").rglob("[!.]*/config.json")):  # "." skips killed starts
            with contextlib.suppress(UserError):  # such as a damaged run
                run = read_run(path.parent)
                about = run.about["corpus"]["sha256"], run.about["device"], run.about["init_from"]
                if about != (self.corpus.sha256, self.device, "") or run.about["changed_on_resume"]:
                    continue
                for command, config in self.configs.items():
                    key, is_own = (command, run.seed), path.is_relative_to(RUNS)
                    fits = run.stage == command.split()[0] and run.config == config
                    fits &= run.seed in self.seeds and (run.is_finished or is_own)
                    if fits and not (key in found and found[key].is_finished):
                        found[key] = run
        order = self.commands.index
        return {key: found[key] for key in sorted(found, key=lambda key: (order(key[0]), key[1]))}

    def jobs(self, found: dict[tuple[str, int], TrainedRun]) -> list[Job]:
        """The missing runs: first those with the first seed, and so on; large models last."""
        jobs = []
        for seed, command in itertools.product(self.seeds, self.commands):
            run, config = found.get((command, seed)), self.configs[command]
            if run and run.is_finished:
                continue
            length = f"{self.more[1]} steps" if self.more else ""
            name = f"{command} {length} seed {seed}"
            folder = run.folder if run else free_folder(self.corpus.name, name)
            flags = [*command.split()[1:], *self.more, "--seed", str(seed)]
            where = ["--data", self.corpus.path, "--device", self.device, "--out", str(folder)]
            tokens = config["max_iters"] * config["batch_size"] * config["block_size"]
            arguments = (*(["--resume"] if run else flags), *where)
            jobs.append(Job(command, seed, config["max_iters"], tokens, folder, arguments))
        return sorted(jobs, key=lambda job: job.command.split()[0] in ("gpt", "modern_gpt"))

    @property
    def is_quick(self) -> bool:
        """Whether any run has fewer steps than its script's default."""
        usual = {each: wanted_config(each, self.device)["max_iters"] for each in self.commands}
        return any(usual[each] > self.configs[each]["max_iters"] for each in usual)


def main() -> None:
    options = parse()
    if options.out:
        prepare(options.out)
    runs = named_runs(options) if any(map(os.path.isdir, options.what)) else []
    corpus = open_corpus(options.data or text_of(runs))
    settings = SampleSettings(**given(options, SampleSettings))
    settings = replace(settings, prompt=settings.prompt or first_line(corpus))
    settings.prompt = settings.start_of_text(corpus.tokenizer)
    if runs:
        rows, warning, failed = rows_of(runs), "", []
        if corpus.text != runs[0].text:
            raise UserError(f"{corpus.path} is not the text of these runs: pass theirs as --data")
        link(rows, over_first=True)
    else:
        rows, warning, failed = trained_rows(options, corpus)
    for row in rows:
        row.ensemble_loss = ensemble_loss(row.finished, corpus)
    if rows:
        out = options.out or default_folder(corpus, options)
        show(rows, warning, corpus, settings, out)
    if failed:
        raise UserError(f"not trained: {'; '.join(failed)} (see the lines marked FAILED)")
    if not rows:
        raise UserError("nothing to compare: no run matches; leave out --no-train")


def named_runs(options: argparse.Namespace) -> list[TrainedRun]:
    """The runs whose folders are named."""
    for name in ("seeds", "max_iters", "no_train"):
        if getattr(options, name):
            raise UserError(f"{flag(name)} is for scripts, not for folders of runs: leave it out")
    runs = [read_run(Path(folder)) for folder in options.what]
    texts = {run.text: run for run in runs}
    if len(texts) > 1:
        each = [f"{run.folder} on {run.about['corpus']['name']}" for run in texts.values()]
        raise UserError(f"these runs were trained on different texts: {', '.join(each)}")
    return runs


def text_of(runs: list[TrainedRun]) -> Path | None:
    """Where the text of these runs is; None for Tiny Shakespeare, which may have moved."""
    text = runs[0].about["corpus"] if runs else {"sha256": TINY_SHAKESPEARE_SHA256}
    return None if text["sha256"] == TINY_SHAKESPEARE_SHA256 else Path(text["path"])


def trained_rows(options: argparse.Namespace, corpus: Corpus) -> tuple[list[Row], str, list[str]]:
    """Train what is missing: a row for each command, a warning, and the names of failed runs."""
    device = available_device(DeviceSettings(**given(options, DeviceSettings)).device).type
    more, failed = [], []
    if steps := options.max_iters:
        more = ["--max-iters", str(steps), "--eval-interval", str(max(1, steps // 10))]
    every = options.no_train and not options.seeds
    seeds = range(2**63) if every else range(1, 1 + (options.seeds or 3))
    comparison = Comparison(corpus, device, commands_of(options, device), more, seeds)
    found = comparison.find()
    if not options.no_train:
        jobs = comparison.jobs(found)
        finished = sum(run.is_finished for run in found.values())
        print(f"runs on {corpus.name}: {len(jobs)} to train, {finished} finished", flush=True)
        at_once = min(MOST_AT_ONCE, torch.get_num_threads()) if device == "cpu" else 1
        failed = train(jobs, at_once) if jobs else []
        found = comparison.find()
    rows = rows_of(found.values())
    own = {command.split()[0] for command in comparison.commands} - {*STAGES}
    link(rows, over_first=options.modern or bool(own))
    is_quick = comparison.is_quick and not options.modern
    if is_quick:
        for row in rows:
            row.baseline = None
    return rows, QUICK * is_quick, failed


def commands_of(options: argparse.Namespace, device: str) -> list[str]:
    if options.modern:
        every = "modern_gpt --preset small"
        ideas = [name for name, value in wanted_config(every, device).items() if value is True]
        without = [flag(f"no_{idea}") for idea in ideas]
        return [every, *(f"{every} {each}" for each in [*without, " ".join(without)])]
    size = f"--preset {preset_for(device)}"
    return options.what or [*SMALL_STAGES, f"gpt {size}", f"modern_gpt {size}"]


def link(rows: list[Row], over_first: bool) -> None:
    """Set each row's baseline: the first row, or the previous stage, if possible of its size."""
    for i, row in enumerate(rows):
        stages = [other for other in rows[:i] if not other.is_variant]
        row.is_variant = not over_first and any(
            (each.stage, each.preset) == (row.stage, row.preset) for each in stages
        )
        others = [each for each in stages if each.stage != row.stage]
        alike = [each for each in others if each.preset == row.preset]
        before = alike or (others if row.is_variant else stages) or rows[:1]
        row.baseline = (rows[0] if over_first else before[-1]) if i else None


def prepare(out: Path) -> None:
    """Make a folder for the comparison's files; its losses.csv must not replace that of a run."""
    if any(os.path.exists(out / name) for name in ("config.json", "checkpoint.pt")):
        raise UserError(f"{out} holds a run: choose another folder with --out")
    make_folder(out)


def default_folder(corpus: Corpus, options: argparse.Namespace) -> Path:
    """A folder that is named after the text and the commands."""
    steps = f"{options.max_iters} steps" if options.max_iters else ""
    modern, existing = "modern" * options.modern, "existing" * options.no_train
    return RUNS / short(" ".join([corpus.name, modern, *options.what, steps, existing]))


def show(
    rows: list[Row], warning: str, corpus: Corpus, settings: SampleSettings, out: Path
) -> None:
    """Print the table, and write every file of the comparison."""
    cells, remarks = table(rows, known_entropy(corpus.path)), notes(rows)
    markdown = "\n".join([as_markdown(cells), *remarks, warning])
    files = {
        "losses.csv": results_csv(rows),
        "table.csv": as_csv(cells),
        "table.md": markdown.encode("utf-8", errors="replace"),
        "report.html": report(rows, cells, remarks, warning, corpus, settings),
    }
    for theme, suffix in {"light": "", "dark": "-dark"}.items():
        files[f"staircase{suffix}.svg"] = standalone(staircase(rows), theme)
        files[f"curves{suffix}.svg"] = standalone(curves(rows, "step"), theme)
    prepare(out)
    for name, content in files.items():
        write_whole(out / name, content)
    width = shutil.get_terminal_size((160, 24)).columns
    print("\n" + as_text(cells, width))
    for remark in filter(None, [*remarks, warning]):
        print(textwrap.fill(remark, width))
    print(f"report: {(out / 'report.html').resolve().as_uri()}")


if __name__ == "__main__":
    cli(main)
