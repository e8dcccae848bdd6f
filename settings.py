"""What is decided before a run starts: its settings, its folder, the text and its vocabulary."""

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import processes
from common import (
    TINY_SHAKESPEARE_SHA256,
    Tokenizer,
    UserError,
    pick_device,
)
from flags import flag, given_fields, parse_flags, typed
from prepare import open_text
from run_folder import holds_run, newest_run, read_checkpoint, saved_config, script_sha256
from sample import encode_prompt

MAY_CHANGE_ON_RESUME = (
    *("max_iters", "eval_interval"),
    *("grad_accumulation", "precision", "fused", "compile"),  # how it computes, not what
)
MAY_CHANGE_FROM_A_SOURCE = (
    *MAY_CHANGE_ON_RESUME,
    *("dropout", "batch_size", "learning_rate", "warmup_iters", "weight_decay", "gradient_clip"),
    *("muon_learning_rate", "muon_momentum", "cooldown"),
)


def preset_for(device: str) -> str:
    return "small" if device == "cpu" else "full"


class Settings:
    """The flags, put together with the run that they resume or start from."""

    def __init__(self, config_class: type, presets: dict[str, Any] | None = None) -> None:
        self.stage = Path(inspect.getfile(config_class)).stem
        self.options = parse_flags(config_class, presets)
        processes.meet()
        self.folder, self.saved, self.source, self.preset = self.options.out, None, None, ""
        if self.options.resume:
            self.folder, self.saved = processes.first_does(self.read_saved)
            self.device = pick_device(self.options.device or self.saved["device"])
            self.resume_config(config_class)
        else:
            self.device = pick_device(self.options.device or "auto")
            self.choose_config(config_class, presets)
        self.device = processes.own_device(self.device)
        n_head = getattr(self.config, "n_head", 1)
        if n_head > 1 and self.config.n_embd % n_head:
            raise UserError(
                f"--n-embd {self.config.n_embd} cannot be shared out among --n-head {n_head}: "
                f"take a multiple of {n_head} for --n-embd"
            )
        self.load_text()

    def read_saved(self) -> tuple[Path, dict[str, Any]]:
        folder = self.folder or newest_run(self.stage)
        return folder, read_checkpoint(folder / "checkpoint.pt")

    def choose_config(self, config_class: type, presets: dict[str, Any] | None) -> None:
        processes.first_does(self.refuse_to_replace)
        if self.options.extend_vocabulary and not self.options.init_from:
            raise UserError("--extend-vocabulary goes with --init-from, the run to start from")
        if self.options.init_from:
            self.take_source(config_class)
        elif presets:
            preset = self.options.preset or preset_for(self.device.type)
            chosen = "" if self.options.preset else f", chosen for {self.device.type}"
            self.preset = f"preset {preset}{chosen}"
            self.config = presets[preset]
        else:
            self.config = config_class()
        self.config = replace(self.config, **given_fields(self.options, config_class))
        self.seed = 1 if self.options.seed is None else self.options.seed

    def refuse_to_replace(self) -> None:
        if self.folder and holds_run(self.folder) and not self.options.overwrite:
            raise UserError(
                f"{self.folder} already holds a run: --resume goes on with it, --overwrite "
                "replaces it, another --out keeps both"
            )

    def take_source(self, config_class: type) -> None:
        """The settings of the run whose weights this one starts from; the flags may differ."""
        folder = self.options.init_from
        self.source = processes.first_does(lambda: read_checkpoint(folder / "best.pt"))
        if self.source["stage"] != self.stage:
            raise UserError(
                f"the run in {folder} was made by {self.source['stage']}.py: only runs of "
                f"{self.stage}.py have weights that fit"
            )
        if getattr(self.options, "preset", None):
            raise UserError(f"--preset is for a fresh model: this one has the sizes of {folder}")
        target = self.folder or (Path("runs", self.stage) if self.options.overwrite else None)
        if target and target.resolve() == folder.resolve():
            raise UserError(f"{target} is the run to start from: name another folder with --out")
        for name, value in given_fields(self.options, config_class).items():
            if name not in MAY_CHANGE_FROM_A_SOURCE and value != self.source["config"].get(name):
                raise UserError(
                    f"the weights in {folder} are those of {flag(name)} "
                    f"{typed(self.source['config'].get(name))}, not {typed(value)}: leave that "
                    "flag out"
                )
        self.config = saved_config(config_class, self.source)

    def resume_config(self, config_class: type) -> None:
        """The saved run's config and seed; how long it takes may change, and how it computes."""
        if self.saved["stage"] != self.stage:
            raise UserError(f"the run in {self.folder} was made by {self.saved['stage']}.py")
        if getattr(self.options, "preset", None):
            raise UserError("--preset is for a new run: --resume keeps the sizes of the old one")
        if self.options.init_from:
            raise UserError("--init-from is for a new run: --resume goes on with an old one")
        given = given_fields(self.options, config_class)
        saved = self.saved["config"] | {"seed": self.saved["seed"]}
        asked = given if self.options.seed is None else given | {"seed": self.options.seed}
        for name, value in asked.items():
            if name not in MAY_CHANGE_ON_RESUME and value != saved.get(name):
                raise UserError(
                    f"the run in {self.folder} was made with {flag(name)} "
                    f"{typed(saved.get(name))}, not {typed(value)}: resume it without that "
                    "flag, or start a new run"
                )
        self.config = replace(saved_config(config_class, self.saved), **given)
        if self.config.max_iters < self.saved["step"]:
            raise UserError(
                f"the run in {self.folder} is at step {self.saved['step']} already: "
                f"--max-iters must be at least that, not {self.config.max_iters}"
            )
        self.seed = self.saved["seed"]

    def find_origin(self) -> dict[str, Any]:
        """What a run's losses owe to more than its settings, from its first step on."""
        script = script_sha256(self.stage)
        if not self.saved:
            init_from = str(self.options.init_from or "")
            return {"init_from": init_from, "script_sha256": script, "changed_on_resume": []}
        origin = self.saved.get("origin", {"init_from": "", "script_sha256": ""})
        changed = set(origin.get("changed_on_resume", []))
        now = asdict(self.config)
        changed |= {flag(name) for name, old in self.saved["config"].items() if now[name] != old}
        if origin["script_sha256"] != script:
            changed.add("script")
        return origin | {"changed_on_resume": sorted(changed)}

    def load_text(self) -> None:
        """The corpus in its two parts, and the tokenizer that the model reads it with."""
        path = self.options.data
        if self.saved and path is None:
            path = Path(self.saved["corpus"]["path"])
            if self.saved["corpus"]["sha256"] == TINY_SHAKESPEARE_SHA256:
                path = None  # wherever it lay then, it can be had here
        self.corpus = open_text(path)
        if self.saved and self.corpus.sha256 != self.saved["corpus"]["sha256"]:
            raise UserError(
                f"{self.corpus.path} is not the text that the run in {self.folder} learns from "
                f"({self.saved['corpus']['path']} as it was then)"
            )
        if self.corpus.sha256 != processes.of_the_first(self.corpus.sha256):
            raise UserError(f"{self.corpus.path} is another text than the first process has")
        self.tokenizer = Tokenizer(self.choose_vocabulary())
        encode_prompt(self.tokenizer, self.options.prompt)  # refused now rather than at the end
        self.config.vocab_size = len(self.tokenizer.vocabulary)
        self.renumber = None  # from the corpus's numbers to the model's, where they differ
        if self.tokenizer.vocabulary != self.corpus.vocabulary:
            self.renumber = torch.tensor(self.tokenizer.encode(self.corpus.vocabulary))
        shorter = min(len(self.corpus.training), len(self.corpus.validation))
        if shorter <= self.config.block_size:
            raise UserError(
                f"{self.corpus.path} is too short: a split of it has {shorter} characters, and "
                f"--block-size {self.config.block_size} needs at least one more than itself"
            )

    def choose_vocabulary(self) -> str:
        """The text's own characters; with weights to start from, those that they know."""
        if self.saved:
            return self.saved["vocabulary"]
        if not self.source:
            return self.corpus.vocabulary
        known = self.source["vocabulary"]
        unknown = "".join(sorted(set(self.corpus.vocabulary) - set(known)))
        if unknown and not self.options.extend_vocabulary:
            raise UserError(
                f"the run in {self.options.init_from} does not know {len(unknown)} of the "
                f"characters in {self.corpus.path}: {unknown!r}; --extend-vocabulary adds them"
            )
        return known + unknown
