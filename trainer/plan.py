"""What a run will do: decided and validated before it starts."""

import os
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import Tokenizer
from trainer.checkpoint import Checkpoint, read_checkpoint, saved_config
from trainer.cli import UserError
from trainer.corpus import TINY_SHAKESPEARE_SHA256, Corpus, make_tokenizer, open_corpus
from trainer.distributed import World
from trainer.flags import Parser, Seed, check_divides, flag, given
from trainer.folder import RunFolder
from trainer.machine import DeviceSettings, Machine, MachineSettings, available_device
from trainer.sampling import SampleSettings

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent  # where the scripts are


@dataclass
class RunSettings:
    data: Path | None = None  # UTF-8 text, or folder made by prepare.py (default: Tiny Shakespeare)
    seed: Seed = 1  # random seed
    out: Path | None = None  # the run's folder (default: the first free runs/NAME, runs/NAME-2, …)
    resume: bool = False  # continue the run in --out, or the newest one
    overwrite: bool = False  # replace the run in --out
    init_from: Path | None = None  # run whose best weights and settings to start from
    extend_vocabulary: bool = False  # with --init-from: add the text's new characters


@dataclass
class Settings(RunSettings, MachineSettings, SampleSettings):
    """Every flag that is not a hyperparameter."""


@dataclass(frozen=True)
class Plan:
    """All that is known about a run before its first step."""

    name: str  # the stage's name
    settings: Settings
    config: Any
    seed: int
    machine: Machine
    corpus: Corpus
    tokenizer: Tokenizer
    init_from: str  # the run whose weights it started from, if any
    changed_on_resume: list[str]  # flags that differ from those that the run started with
    preset: str  # the name of its preset, or empty

    def header(self) -> dict[str, Any]:
        """The description of the run in its files."""
        own = {each: getattr(self, each) for each in ("seed", "init_from", "changed_on_resume")}
        own |= {"stage": self.name, "vocabulary": self.tokenizer.source}
        machine = {each: getattr(self.settings, each) for each in ("compile", "grad_accumulation")}
        machine |= {"device": self.machine.device.type, "dtype": self.machine.dtype_name}
        names = ("name", "path", "sha256", "text", "characters_per_token")
        text = {each: getattr(self.corpus, each) for each in names}
        return {"config": asdict(self.config), **own, **machine, "corpus": text}


def make_plan(
    config_class: type,
    presets: dict[str, Any],
    argv: list[str] | None,
    name: str | None,
    folder: RunFolder,
    world: World,
) -> tuple[Plan, Checkpoint | None]:
    """The plan, and the checkpoint that the run resumes or takes its weights from."""
    module = sys.modules[config_class.__module__]
    name = name or script_name(Path(vars(module).get("__file__", "notebook")))
    options = parse(module.__doc__ or "", config_class, presets, argv)
    settings, chosen = Settings(**given(options, Settings)), given(options, config_class)
    refuse_combinations(settings, presets, options.preset, world)
    saved = world.on_main(lambda: claim(folder, name, settings))
    start = {"seed": settings.seed, "device": "auto", "init_from": str(settings.init_from or "")}
    if settings.resume:
        machine = {each: saved[each] for each in ("compile", "grad_accumulation")}
        settings = replace(settings, **machine | given(options, MachineSettings))
        start = saved
    device = start["device"] if settings.device == "auto" else settings.device
    device = available_device(device, world)
    preset = options.preset or preset_for(device.type)
    preset = preset if preset in presets and not saved else ""
    config = saved_config(config_class, saved) if saved else presets.get(preset) or config_class()
    corpus, tokenizer = open_text(settings, saved, world)
    settings.start_of_text(tokenizer)  # a bad --prompt is refused now rather than at the end
    config = replace(config, **chosen, vocab_size=len(tokenizer.vocabulary))
    seed = vars(options).get("seed", start["seed"])
    changed = changes(saved, {"seed": seed} | asdict(config)) if settings.resume else []
    dtype, settings.compile = ("auto", settings.compile) if presets else ("float32", False)
    if settings.resume and saved["device"] == device.type:
        dtype = saved["dtype"]  # another dtype would change the losses
    machine = Machine(settings, device, dtype)
    refuse_sizes(config, corpus, world, psutil.virtual_memory().total)
    own = (machine, corpus, tokenizer, start["init_from"], changed, preset)
    return Plan(name, settings, config, seed, *own), saved


def script_name(script: Path) -> str:
    """The name of the stage; sample.py must be able to find its script again."""
    if script.suffix and (script.parent.resolve() != ROOT or "." in script.stem):
        raise UserError(f"sample.py will not find {script}: put it in {ROOT}, as in my_gpt.py")
    return script.stem


def parse(doc: str, config_class: type, presets: dict, argv: list[str] | None) -> Namespace:
    parser = Parser(doc)
    parser.set_defaults(preset="")
    if presets:
        parser.add_argument("--preset", choices=presets, help="default: small on a CPU, else full")
    parser.add_fields("the model and its training", config_class, presets)
    parser.add_fields("the run", RunSettings)
    parser.add_fields("the machine", MachineSettings if presets else DeviceSettings)
    parser.add_fields("the sample", SampleSettings)
    return parser.parse_args(argv)


def preset_for(device: str) -> str:
    return "small" if device == "cpu" else "full"


def refuse_combinations(settings: Settings, presets: dict, preset: str, world: World) -> None:
    starts = {"--overwrite": settings.overwrite, "--init-from": settings.init_from}
    starts = [name for name, value in (starts | {"--preset": preset}).items() if value]
    if world.size > 1 and not presets:
        raise UserError("this script trains in one process: start it without torchrun")
    if settings.resume and starts:
        raise UserError(f"--resume continues a run, but {starts[0]} starts one: leave one out")
    if settings.init_from and preset:
        raise UserError("--preset is for a new model: --init-from keeps the sizes of the saved one")
    if settings.extend_vocabulary and not settings.init_from:
        raise UserError("--extend-vocabulary needs --init-from and the run to start from")


def claim(folder: RunFolder, name: str, settings: Settings) -> Checkpoint | None:
    """Claim the folder; return the checkpoint to resume or to take weights from, if any."""
    folder.claim(name, settings.out, settings.resume, settings.overwrite)
    start = settings.init_from
    if not (settings.resume or start):
        return None
    if start and os.path.realpath(folder.path) == os.path.realpath(start):
        raise UserError(f"{folder.path} is the run to start from: choose another --out")
    saved = read_checkpoint(start / "best.pt" if start else folder.path / "checkpoint.pt")
    if saved["stage"] != name:
        raise UserError(f"that run was made by {saved['stage']}.py, but this is {name}.py")
    return saved


def changes(saved: Checkpoint, now: dict[str, Any]) -> list[str]:
    """The flags that differ from the run so far; only its length and evaluations may change."""
    before, step = saved["config"] | {"seed": saved["seed"]}, saved["parts"]["history"]["step"]
    differ = [name for name in now if now[name] != before.get(name, now[name])]
    for name in differ:
        if name not in ("max_iters", "eval_interval"):
            was = f"{flag(name)} {before[name]}, not {now[name]}"
            raise UserError(f"the run was made with {was}: resume it without that flag")
    if now["max_iters"] < step:
        raise UserError(f"the run is already at step {step}: --max-iters must be at least that")
    return sorted({*saved["changed_on_resume"], *map(flag, differ)})


def open_text(
    settings: Settings, saved: Checkpoint | None, world: World
) -> tuple[Corpus, Tokenizer]:
    """The corpus, and a tokenizer with the characters of the text and of the saved weights."""
    path, before = settings.data, saved["corpus"] if settings.resume else None
    if before and path is None:
        path = Path(before["path"])
        if before["sha256"] == TINY_SHAKESPEARE_SHA256 and not os.access(path, os.R_OK):
            path = None  # Tiny Shakespeare may have moved
    if world.size > 1:
        world.on_main(lambda: open_corpus(path).name)  # let one process download it
    corpus = open_corpus(path, verify=before is not None)
    if before and corpus.sha256 != before["sha256"]:
        raise UserError(f"{corpus.path} is not this run's text: restore {before['path']}")
    if corpus.sha256 != world.broadcast(corpus.sha256):
        raise UserError(f"{corpus.path} is not the same text in all processes")
    if not saved or saved["vocabulary"] == corpus.tokenizer.source:
        return corpus, corpus.tokenizer
    old, now = make_tokenizer(saved["vocabulary"]), corpus.tokenizer
    if "tokens" in (old.unit, now.unit):
        how = f"try python prepare.py TEXT --out DIR --tokenizer {saved['corpus']['path']}"
        how = how if old.unit == "tokens" else "pass a plain text as --data"
        raise UserError(f"{corpus.path} has other tokens than that run; {how}")
    unknown = "".join(sorted(now.ids.keys() - old.ids.keys()))
    if unknown and not settings.extend_vocabulary:
        lacks = f"lacks {len(unknown)} characters of {corpus.path}: {unknown!r}"
        raise UserError(f"the run in {settings.init_from} {lacks}; --extend-vocabulary adds them")
    tokenizer = Tokenizer(old.source + unknown)
    corpus.table = torch.tensor(tokenizer.encode(now.vocabulary))
    return corpus, tokenizer


def refuse_sizes(config: Any, corpus: Corpus, world: World, memory: int) -> None:
    check_divides(config)
    if config.batch_size % world.size:
        raise UserError(f"--batch-size must be divisible by the {world.size} processes")
    shorter = min(len(corpus.train), len(corpus.validation))
    if shorter <= config.block_size:
        unit = corpus.tokenizer.unit
        needs = f"--block-size {config.block_size} needs {config.block_size + 1} {unit} per split"
        fits = f"--block-size {shorter - 1}" if shorter > 1 else "a longer text"
        raise UserError(f"{corpus.path} is too short: {needs}, and one has {shorter}; try {fits}")
    layers, width = vars(config).get("n_layer", 0), vars(config).get("n_embd", 0)
    # A lower bound: weights, gradients and their running mean in float32, 8 C² of each per block;
    # PyTorch's overhead for a block's modules and tensors; and a batch of token ids.
    needed = 12 * (1 + 8 * layers) * width**2 + 150_000 * layers
    needed += 16 * config.batch_size * config.block_size
    if needed > memory:
        sizes = f"at least {needed / 1e9:,.0f} GB of memory, but there are {memory / 1e9:,.0f} GB"
        raise UserError(f"training this needs {sizes}: reduce --n-layer, --n-embd or --batch-size")
