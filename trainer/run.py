"""One training run: everything a script needs besides its model and training step."""

import copy
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from common import LanguageModel
from data.pocket_play import known_entropy
from trainer.checkpoint import adopt_weights, read_checkpoint, restore
from trainer.cli import UserError, say
from trainer.corpus import Batch
from trainer.distributed import World
from trainer.evaluate import exact_loss
from trainer.flags import flag
from trainer.folder import RunFolder, write_whole
from trainer.history import History
from trainer.machine import seed_for
from trainer.plan import make_plan
from trainer.sampling import SampleSettings, continuation, store_by_columns

import torch
from torch import Tensor
from tqdm import tqdm

RULE = "-" * 72  # printed above and below the sample
SECONDS_BETWEEN_SAVES = 300
EARLY_EVALUATIONS = (10, 30, 100, 300)  # steps; the loss drops fastest at the start
STEPS_BETWEEN_LOSSES = 20  # reading a loss waits for the GPU


class Run:
    """A training run, from the command line to the sample at its end.

    A script reads `config`, `device` and `step`, takes its batches from `batches`, gives every loss
    to `log`, and calls `finish`. Passing `presets` marks a stage that scales up: its script uses
    `autocast` and `micro_batches`, and gets the flags for them.
    """

    def __init__(
        self,
        config_class: type,
        presets: dict[str, Any] | None = None,
        argv: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.world, self.history = World(), History()
        self.folder, own = RunFolder(), (config_class, presets or {}, argv, name)
        with self.folder:
            self.plan, self.saved = make_plan(*own, self.folder, self.world)
        self.config = self.plan.config
        self.machine, self.device = self.plan.machine, self.plan.machine.device
        self.autocast = self.machine.autocast  # inside, matrix products are in the run's dtype
        self.parts: dict[str, Any] = {"history": self.history, "scaler": self.machine.scaler}
        self.model, self.optimizers, self.bar = None, (), tqdm(disable=True)
        self.saved_step, self.save_due = 0, 0.0
        self.about: dict[str, Any] = {}  # the description of the run in its files
        self.first_step, self.computing = 0, 0.0  # training seconds since first_step
        self.fraction = 1.0  # the current micro-batch's fraction of its batch
        self.all_threads, self.micro_batch_count = torch.get_num_threads(), 1
        if presets:
            self.micro_batch_count = self.machine.micro_batches(self.config, self.world)
        torch.manual_seed(self.plan.seed)  # for the initial weights

    @property
    def step(self) -> int:
        return self.history.step

    def batches(self, model: LanguageModel, *optimizers: torch.optim.Optimizer) -> Iterator[Batch]:
        """Yield training batches; between them, evaluate, save, and handle Ctrl-C."""
        self.model, self.optimizers = model, optimizers
        self.parts |= {"model": model, **{f"optimizer {i}": o for i, o in enumerate(optimizers)}}
        total, quiet = self.config.max_iters, None if self.world.is_main else True
        step_threads = self.machine.threads(model, self.config)
        self.bar = tqdm(total=total, disable=quiet, unit="step")  # None: show it on a terminal only
        with self.folder, interrupts() as received, self.bar:
            self.start()
            while self.step < total:
                began = time.perf_counter()
                batch = self.batch(self.step)
                torch.set_num_threads(step_threads)
                try:
                    yield batch
                finally:
                    torch.set_num_threads(self.all_threads)
                self.history.step += 1
                self.bar.update()
                due = self.step % self.config.eval_interval == 0
                due = due or self.step in (*EARLY_EVALUATIONS, total)
                if due or self.step % STEPS_BETWEEN_LOSSES == 0:
                    self.read_losses()
                self.computing += time.perf_counter() - began
                stop, save = self.world.any([bool(received), time.perf_counter() > self.save_due])
                if due:
                    self.evaluate()
                    self.save()
                    self.say(self.history.last_line())
                elif stop or save:
                    self.save()
                if stop and self.step < total:
                    self.bar.close()
                    self.say(f"stopped at step {self.step}; to resume: {resume_command(self)}")
                    raise SystemExit(130)

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Split a batch into micro-batches that fit in memory or cache: idx, targets and weight.

        The weight is the fraction of the batch, times the loss scale in float16. After the last
        micro-batch, gradients are averaged over all processes and unscaled.
        """
        scaler = self.machine.scaler
        parts = zip(*(half.tensor_split(self.micro_batch_count) for half in batch), strict=True)
        for idx, targets in parts:
            self.fraction = len(idx) / len(batch[0])
            yield idx, targets, scaler.scale(torch.full((), self.fraction, device=self.device))
        self.fraction = 1.0
        self.world.average_gradients(self.model)
        if scaler.is_enabled():
            before = scaler.get_scale()
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
            scaler.update()
            if scaler.get_scale() < before:  # a gradient overflowed, so skip this step:
                self.model.zero_grad()  # optimizers ignore parameters without a gradient

    def log(self, loss: Tensor) -> None:
        """Add the loss of a batch or micro-batch to the next row of losses.csv."""
        self.history.pending.append((self.step + 1, self.fraction, loss.detach()))

    def finish(self) -> None:
        """Print the result, and a sample from the best weights."""
        if not self.world.is_main:
            return
        best, plan, model = self.history.best, self.plan, type(self.model)(self.config)
        bits = best["val_loss"] / math.log(2) / plan.corpus.characters_per_token
        loss = f"{best['val_loss']:.4f}{' per token' * (plan.tokenizer.unit == 'tokens')}"
        when = f"step {best['step']} after {best['seconds']:.1f} s"
        say(f"* best validation loss {loss} ({bits:.3f} bits per character) at {when}")
        if self.step > self.first_step:
            seconds = self.computing / (self.step - self.first_step)
            speed = self.config.batch_size * self.config.block_size / seconds
            say(f"{1000 * seconds:,.1f} ms per step, {speed:,.0f} {plan.tokenizer.unit} per second")
        if entropy := known_entropy(plan.corpus.path):
            say(f"entropy of Pocket Play, which no model can beat on average: {entropy:.4f}")
        restore(read_checkpoint(self.folder.path / "best.pt"), {"model": model})
        store_by_columns(model.to(self.device))
        say(RULE)
        text = ""
        for piece in continuation(model, plan.tokenizer, plan.settings, plan.seed):
            say(piece, end="")
            text += piece
        say(f"\n{RULE}")
        write_whole(self.folder.path / "sample.txt", text.encode("utf-8"))
        self.folder.unlock()
        folder = quoted([str(self.folder.path)])
        say(f"next: python sample.py {folder} --sample-length 2000, or python compare.py")

    def start(self) -> None:
        """Try a step, load what was saved, evaluate; only then write the first files."""
        plan, parameters = self.plan, sum(each.numel() for each in self.model.parameters())
        several = f"{self.world.size} processes" if self.world.size > 1 else ""
        preset = plan.preset and f"preset {plan.preset}"
        details = (self.device.type, self.machine.dtype_name, preset, several)
        length = f"{len(plan.corpus.train) + len(plan.corpus.validation):,} {plan.tokenizer.unit}"
        self.say(f"{plan.name}: {parameters:,} parameters, {', '.join(filter(None, details))}")
        self.say(f"{plan.corpus.name}: {length}, vocabulary of {self.config.vocab_size}")
        if plan.init_from and not plan.settings.resume:
            adopt_weights(self.model, self.config, self.saved, plan.tokenizer)
            self.say(f"starts from the weights of {plan.init_from}")
        weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        self.model.load_state_dict(self.world.broadcast(weights))  # machines may round differently
        if self.machine.compiled:
            self.model.compile()
        self.history.started = time.perf_counter()
        self.try_step()
        self.saved = None  # frees its memory
        self.first_step = self.bar.n = self.bar.initial = self.step
        if not plan.settings.resume:
            self.evaluate()
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        self.about = {**plan.header(), "parameters": parameters, "versions": versions}
        self.about |= {"processes": self.world.size, "compiled": self.machine.compiled}
        self.save()
        self.say(f"run folder {self.folder.path}\n{self.history.last_line()}")

    def try_step(self) -> None:
        """Run one step now, so that a lack of memory shows at once; then undo it, or resume."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        saved = self.saved if self.plan.settings.resume else {"parts": copy.deepcopy(states)}
        idx, targets = (half.tensor_split(self.micro_batch_count)[0] for half in self.batch(0))
        with self.autocast():
            _, loss = self.model(idx, targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        restore(saved, self.parts)

    def batch(self, step: int) -> Batch:
        """This process's rows of a step's batch; dropout is seeded for that step too."""
        config, corpus, rank, size = self.config, self.plan.corpus, self.world.rank, self.world.size
        generator = torch.Generator().manual_seed(seed_for(self.plan.seed, step, "batch"))
        batch = corpus.draw(config.block_size, config.batch_size, generator)
        self.machine.seed(seed_for(self.plan.seed, step, rank))
        return tuple(self.machine.send(corpus.ids(half[rank::size])) for half in batch)

    def read_losses(self) -> None:
        """Add up the losses since the last time; one that is not finite ends the run."""
        if bad := self.history.collect(self.world):
            raise self.diverged(f"the loss became {bad[1]} at step {bad[0]}")
        self.bar.set_postfix_str(f"loss {self.history.last_loss:.3f}", refresh=False)

    def evaluate(self) -> None:
        """Evaluate the model, and add the losses to the history."""
        corpus, history = self.plan.corpus, self.history
        parts = [corpus.validation]
        if not history.loss_count:  # no batch yet: use as much text as in validation
            parts.append(corpus.train[: len(corpus.validation)])
        with self.autocast(), self.machine.eager():
            val_loss, *rest = (exact_loss(self.model, p, corpus.ids, self.world) for p in parts)
        train_loss = rest[0] if rest else history.loss_sum / history.loss_count
        if not math.isfinite(val_loss):
            raise self.diverged(f"the validation loss became {val_loss} by step {self.step}")
        tokens = self.step * self.config.batch_size * self.config.block_size
        history.add_row(train_loss, val_loss, self.optimizers[0].param_groups[0]["lr"], tokens)

    def save(self) -> None:
        """Write the run's files."""
        self.read_losses()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self.diverged(f"a weight became NaN or infinite by step {self.step}")
        self.world.on_main(lambda: self.folder.save(self.about, self.parts, self.history))
        self.saved_step, self.save_due = self.step, time.perf_counter() + SECONDS_BETWEEN_SAVES

    def diverged(self, what: str) -> UserError:
        lower = "" if self.machine.dtype == torch.float32 else ", or --precision float32"
        kept = f"; {self.folder.path} keeps step {self.saved_step}" if self.history.rows else ""
        return UserError(f"{what}: try a smaller --learning-rate{lower}{kept}")

    def say(self, line: str) -> None:
        """Print above the progress bar."""
        if self.world.is_main:
            with self.bar.external_write_mode():
                say(line)


def resume_command(run: Run) -> str:
    """The command to type in this folder, with this Python."""
    python = sys.executable.removeprefix(f"{Path.cwd()}{os.sep}")
    command = [python, sys.argv[0], "--resume", "--out", str(run.folder.path)]
    if run.world.size > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={run.world.local_size}"]
    for each in fields(SampleSettings):
        if (value := getattr(run.plan.settings, each.name)) != each.default:
            command.append(f"{flag(each.name)}={value}")
    return quoted(command)


def quoted(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C instead of exiting; a second one ends the program as usual."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        if os.environ.get("RANK", "0") == "0":  # os.write: print is unsafe in a signal handler
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; press again to stop at once\n")
        signal.signal(number, before[number])

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        # torchrun may end this process after an error: keep the handlers until it is reported.
        if "RANK" not in os.environ or not sys.exc_info()[0]:
            for number, handler in before.items():
                signal.signal(number, handler)
