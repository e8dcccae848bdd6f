"""What a run needs around the training lines of a script: flags, evaluation, log, checkpoints.

A stage's `main` makes a `Run`, iterates over its batches and does the learning itself.
"""

import inspect
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    DATA,
    TINY_SHAKESPEARE_SHA256,
    Corpus,
    Tokenizer,
    UserError,
    draw_batch,
    load_corpus,
    pick_device,
    split,
)
from data import pocket_play
from flags import flag, given_fields, parse_flags, sampling_words
from run_folder import (
    CHECKPOINT_FORMAT,
    RUN_FILES,
    changed_since,
    holds_run,
    load_weights,
    losses_csv,
    make_free_folder,
    newest_run,
    read_checkpoint,
    saved_config,
    write_whole,
)
from sample import encode_prompt, stream_sample

MAY_CHANGE_ON_RESUME = ("max_iters", "eval_interval")
EVALUATION_TOKENS = 8192  # how many characters one forward pass of an evaluation takes
SECONDS_BETWEEN_SAVES = 300
SMALL_STEP = 2**16  # up to so many numbers in (B, T, C), threads wait more than they help


class Run:
    """One training run, from its flags to its sample.

    `config`, `device` and `step` are for the script to read. `batches` carries the training,
    `log` takes the loss of each batch, `finish` prints the result and a sample.
    """

    def __init__(self, config_class: type, presets: dict[str, Any] | None = None) -> None:
        self.stage = Path(inspect.getfile(config_class)).stem
        self.options = parse_flags(config_class, presets)
        self.folder, self.saved, self.preset = self.options.out, None, ""
        self.step, self.rows, self.seconds = 0, [], 0.0  # rows: those of losses.csv
        self.loss_sum, self.loss_count = 0.0, 0  # of the batches since the last row
        if self.options.resume:
            self.folder = self.folder or newest_run(self.stage)
            self.saved = read_checkpoint(self.folder / "checkpoint.pt")
            self.device = pick_device(self.options.device or self.saved["device"])
            self.resume_config(config_class)
        else:
            self.device = pick_device(self.options.device or "auto")
            self.choose_config(config_class, presets)
        n_head = getattr(self.config, "n_head", 1)
        if n_head > 1 and self.config.n_embd % n_head:
            raise UserError(
                f"--n-embd {self.config.n_embd} cannot be shared out among --n-head {n_head}: "
                "take a multiple of it"
            )
        self.load_text()
        step_size = self.config.batch_size * self.config.block_size
        step_size *= getattr(self.config, "n_embd", 1)
        self.all_threads = torch.get_num_threads()
        self.step_threads = 1 if step_size <= SMALL_STEP else self.all_threads
        torch.manual_seed(self.seed)  # the weights and the dropout draw from this,
        self.generator = torch.Generator().manual_seed(self.seed)  # the batches from their own

    def choose_config(self, config_class: type, presets: dict[str, Any] | None) -> None:
        if self.folder and holds_run(self.folder) and not self.options.overwrite:
            raise UserError(
                f"{self.folder} already holds a run: --resume goes on with it, --overwrite "
                "replaces it, another --out keeps both"
            )
        config = config_class()
        if presets:
            preset = self.options.preset or ("small" if self.device.type == "cpu" else "full")
            chosen = "" if self.options.preset else f", chosen for {self.device.type}"
            self.preset = f"preset {preset}{chosen}"
            config = presets[preset]
        self.config = replace(config, **given_fields(self.options, config_class))
        self.seed = 1 if self.options.seed is None else self.options.seed

    def resume_config(self, config_class: type) -> None:
        """The saved run's config and seed; only the length of the training may change."""
        if self.saved["stage"] != self.stage:
            raise UserError(f"the run in {self.folder} was made by {self.saved['stage']}.py")
        if getattr(self.options, "preset", None):
            raise UserError("--preset is for a new run: --resume keeps the sizes of the old one")
        given = given_fields(self.options, config_class)
        saved = self.saved["config"] | {"seed": self.saved["seed"]}
        asked = given if self.options.seed is None else given | {"seed": self.options.seed}
        for name, value in asked.items():
            if name not in MAY_CHANGE_ON_RESUME and value != saved.get(name):
                raise UserError(
                    f"the run in {self.folder} was made with {flag(name)} {saved.get(name)}, not "
                    f"{value}: resume it without that flag, or start a new run"
                )
        self.config = replace(saved_config(config_class, self.saved), **given)
        if self.config.max_iters < self.saved["step"]:
            raise UserError(
                f"the run in {self.folder} is at step {self.saved['step']} already: "
                f"--max-iters must be at least that, not {self.config.max_iters}"
            )
        self.seed = self.saved["seed"]

    def load_text(self) -> None:
        """The corpus as character numbers, in its two parts, and the tokenizer that made them."""
        path = self.options.data
        if self.saved and path is None:
            path = Path(self.saved["corpus"]["path"])
            if self.saved["corpus"]["sha256"] == TINY_SHAKESPEARE_SHA256:
                path = None  # wherever it lay then, it can be had here
        self.corpus = load_corpus(path)
        if self.saved and self.corpus.sha256 != self.saved["corpus"]["sha256"]:
            raise UserError(
                f"{self.corpus.path} is not the text that the run in {self.folder} learns from "
                f"({self.saved['corpus']['path']} as it was then)"
            )
        self.tokenizer = Tokenizer(self.corpus.text)
        encode_prompt(self.tokenizer, self.options.prompt)  # refused now rather than at the end
        self.config.vocab_size = len(self.tokenizer.vocabulary)
        tokens = torch.tensor(self.tokenizer.encode(self.corpus.text))
        self.training_text, self.validation_text = split(tokens)
        shorter = min(len(self.training_text), len(self.validation_text))
        if shorter <= self.config.block_size:
            raise UserError(
                f"{self.corpus.path} is too short: a split of it has {shorter} characters, and "
                f"--block-size {self.config.block_size} needs at least one more than itself"
            )

    def batches(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches to learn from; in between evaluate, log, save, and heed Ctrl-C."""
        self.model, self.optimizer = model, optimizer
        few = threads(self.step_threads)
        with few, interrupts() as interrupted, self.progress_bar() as self.bar:
            self.begin()
            while self.step < self.config.max_iters:
                yield self.draw(self.generator)
                self.step += 1
                self.bar.update()
                if self.step % self.config.eval_interval == 0 or self.step == self.config.max_iters:
                    self.evaluate()
                    self.save()
                    self.print_row()
                elif interrupted or time.perf_counter() - self.saved_at > SECONDS_BETWEEN_SAVES:
                    self.save()
                if interrupted and self.step < self.config.max_iters:
                    self.bar.close()
                    print(
                        f"stopped at step {self.step}; to go on: {self.resume_command(self.folder)}"
                    )
                    raise SystemExit(130)

    def begin(self) -> None:
        """Take up the saved run where it stood, or open a folder for a new one."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.bar.write(
            f"{self.stage}: {parameters:,} parameters on {self.device.type}, text "
            f"{self.corpus.name} of {len(self.corpus.text):,} characters "
            f"({self.config.vocab_size} different)"
        )
        if self.saved:
            self.restore()
        else:
            in_all = duration(self.rehearse() * self.config.max_iters)
            if self.preset:
                self.bar.write(f"{self.preset}: about {in_all}")
        self.started = time.perf_counter() - self.seconds
        if not self.saved:
            self.evaluate()
            self.claim_folder()
        settings = {
            "stage": self.stage,
            "config": asdict(self.config),
            "seed": self.seed,
            "device": self.device.type,
            "corpus": corpus_record(self.corpus),
            "parameters": parameters,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        write_whole(self.folder / "config.json", json.dumps(settings, indent=2).encode("utf-8"))
        self.save()
        self.bar.write(f"run folder {self.folder}")
        if not self.saved:
            self.print_row()

    def rehearse(self) -> float:
        """Seconds for a step, from two that leave no trace.

        If memory is too short for a step, this fails before any file has been touched.
        """
        random = random_module(self.device)
        state = random.get_rng_state()
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            _, loss = self.model(*self.draw(torch.Generator()))
            loss.backward()
            loss.item()  # waits until a graphics card is done
            seconds = time.perf_counter() - began
            self.optimizer.zero_grad()
        random.set_rng_state(state)
        return seconds

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        idx, targets = draw_batch(
            self.training_text, config.block_size, config.batch_size, generator
        )
        return idx.to(self.device), targets.to(self.device)

    def log(self, loss: Tensor) -> None:
        """Count a batch's loss towards the next row; show it in the progress bar."""
        self.loss_sum += loss.detach()
        self.loss_count += 1
        if not self.bar.disable and self.step % 20 == 0:
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def finish(self) -> None:
        """Say how far the run came, and let its best state write a text."""
        best = min(self.rows, key=validation_loss)
        print(
            f"best validation loss {best['val_loss']:.4f}, which is "
            f"{best['val_loss'] / math.log(2):.3f} bits per character, "
            f"at step {best['step']} after {best['seconds']:.1f} s"
        )
        if Path(self.corpus.path).resolve() == DATA / "pocket_play.txt":
            bound = pocket_play.entropy_per_character()
            print(f"the entropy of Pocket Play, below which no model gets on average: {bound:.4f}")
        load_weights(self.model, read_checkpoint(self.folder / "best.pt"))
        text = stream_sample(self.model, self.tokenizer, self.options, self.seed)
        write_whole(self.folder / "sample.txt", text.encode("utf-8"))

    def evaluate(self) -> None:
        """Add a row to the log."""
        with threads(self.all_threads):
            val_loss = exact_loss(self.model, self.validation_text)
            if self.loss_count:
                train_loss = float(self.loss_sum) / self.loss_count
            else:  # before the first batch: as much of the text as there is to validate with
                first_part = self.training_text[: len(self.validation_text)]
                train_loss = exact_loss(self.model, first_part)
        if not math.isfinite(val_loss):
            raise UserError(
                f"the validation loss became {val_loss} by step {self.step}: try a smaller "
                f"--learning-rate; {self.folder} keeps the run as it last was"
            )
        self.rows.append(
            {
                "step": self.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "tokens": self.step * self.config.batch_size * self.config.block_size,
                "seconds": time.perf_counter() - self.started,
            }
        )
        self.loss_sum, self.loss_count = 0.0, 0

    def print_row(self) -> None:
        row = self.rows[-1]
        self.bar.write(
            f"step {row['step']:5}   train {row['train_loss']:.4f}   "
            f"validation {row['val_loss']:.4f}   {row['seconds']:7.1f} s"
        )

    def progress_bar(self) -> tqdm:
        """Nothing where the output is not a terminal but, say, a file."""
        step = self.saved["step"] if self.saved else 0
        return tqdm(total=self.config.max_iters, initial=step, disable=None, unit="step")

    def claim_folder(self) -> None:
        """Empty the folder that --out names; without --out make the first that is still free."""
        taken = []
        try:
            if self.folder is None and not self.options.overwrite:
                self.folder, taken = make_free_folder(self.stage)
            else:
                self.folder = self.folder or Path("runs", self.stage)
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in RUN_FILES:
                    (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the run's folder: {error}") from None
        if taken:
            self.bar.write(f"{taken[-1]} is taken, so this run goes to {self.folder}")
        for folder in taken:
            if (folder / "checkpoint.pt").exists() and not (folder / "sample.txt").exists():
                command = self.resume_command(folder)
                self.bar.write(f"{folder} is unfinished or still running; to go on: {command}")

    def resume_command(self, folder: Path) -> str:
        """What to type in this folder, with this Python."""
        python = Path(sys.executable)
        if python.is_relative_to(Path.cwd()):
            python = python.relative_to(Path.cwd())
        words = [str(python), sys.argv[0], "--resume", "--out", str(folder)]
        if folder == self.folder:
            words += sampling_words(self.options)
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

    def save(self) -> None:
        """Write the complete state, and the log."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "stage": self.stage,
            "config": asdict(self.config),
            "seed": self.seed,
            "corpus": corpus_record(self.corpus),
            "vocabulary": self.tokenizer.vocabulary,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "seconds": time.perf_counter() - self.started,
            "batch_state": self.generator.get_state(),
            "device": self.device.type,
            "device_state": random_module(self.device).get_rng_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # best.pt first: a run that dies between the two writes the same best.pt again.
        newest = self.rows[-1]
        if newest["step"] == self.step and newest == min(self.rows, key=validation_loss):
            write_whole(self.folder / "best.pt", buffer.getbuffer())
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())
        write_whole(self.folder / "losses.csv", losses_csv(self.rows))
        self.saved_at = time.perf_counter()

    def restore(self) -> None:
        """Take over the complete state: from here the run goes on as if it had never stopped."""
        (self.folder / "sample.txt").unlink(missing_ok=True)  # it is finished no longer
        saved = self.saved
        load_weights(self.model, saved)
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError:
            raise changed_since(saved) from None
        self.step, self.rows, self.seconds = saved["step"], saved["rows"], saved["seconds"]
        self.loss_sum, self.loss_count = saved["loss_sum"], saved["loss_count"]
        self.generator.set_state(saved["batch_state"])
        if saved["device"] == self.device.type:  # no other device continues the same numbers
            random_module(self.device).set_rng_state(saved["device_state"])
        where = f"goes on after step {self.step}"
        if self.step == self.config.max_iters:
            where = f"is at its end; --max-iters above {self.step} takes it further"
        self.bar.write(where)


@torch.inference_mode()
def exact_loss(model: nn.Module, tokens: Tensor) -> float:
    """The mean loss over a whole text, cut into consecutive windows: no estimate, no noise."""
    model.eval()
    device = next(model.parameters()).device
    T = model.block_size
    idx, targets = tokens[:-1], tokens[1:]
    whole = len(idx) // T * T
    rows = max(1, EVALUATION_TOKENS // T)
    windows = [part[:whole].view(-1, T).split(rows) for part in (idx, targets)]
    last = (idx[whole:][None], targets[whole:][None])  # shorter, or empty
    total = 0.0
    for idx, targets in [*zip(*windows, strict=True), last]:
        if idx.numel():
            _, loss = model(idx.to(device), targets.to(device))
            total += loss.item() * idx.numel()
    model.train()
    return total / (len(tokens) - 1)


def validation_loss(row: dict[str, float]) -> float:
    return row["val_loss"]


def duration(seconds: float) -> str:
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"


def corpus_record(corpus: Corpus) -> dict[str, str]:
    path = str(Path(corpus.path).resolve())
    return {"name": corpus.name, "path": path, "sha256": corpus.sha256}


def random_module(device: torch.device) -> ModuleType:
    """Where that device's random numbers come from."""
    return torch if device.type == "cpu" else getattr(torch, device.type)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C instead of dying of it; a second one ends the program as usual."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, _: object) -> None:
        received.append(number)
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may not here
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
