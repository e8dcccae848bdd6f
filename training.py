"""What a run needs around the training lines of a script: flags, evaluation, log, checkpoints.

A stage's `main` makes a `Run`, iterates over its batches and does the learning itself.
"""

import copy
import io
import itertools
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import machine
import processes
from common import Corpus, UserError, draw_batch, is_out_of_memory, known_entropy
from flags import sampling_words
from run_folder import (
    CHECKPOINT_FORMAT,
    RUN_FILES,
    adopt_weights,
    changed_since,
    load_weights,
    losses_csv,
    make_free_folder,
    read_checkpoint,
    write_whole,
)
from sample import store_by_columns, stream_sample
from settings import Settings

EVALUATION_TOKENS = 8192  # how many characters one forward pass of an evaluation takes
SECONDS_BETWEEN_SAVES = 300
STEPS_BETWEEN_LOOKS = 20  # at the losses: each look makes a graphics card wait
SMALL_STEP = 2**16  # up to so many numbers in (B, T, C), threads wait more than they help


class Run(Settings):
    """One training run, from its flags to its sample.

    `config`, `device` and `step` are for the script to read. `batches` carries the training,
    `log` takes the loss of each batch, `finish` prints the result and a sample. For a large model
    `accelerate` finds the fastest way, and the script learns in `portions`, under `autocast`.
    """

    def __init__(self, config_class: type, presets: dict[str, Any] | None = None) -> None:
        super().__init__(config_class, presets)
        self.step, self.rows, self.seconds = 0, [], 0.0  # rows: those of losses.csv
        self.loss_sum, self.loss_count = 0.0, 0  # of the batches since the last row
        self.pending = []  # losses that are not yet in this sum
        self.computing, self.computed_steps = 0.0, 0  # seconds and steps between evaluations
        self.origin = self.find_origin()
        self.plan_steps()
        torch.manual_seed(self.seed)  # the weights and the dropout draw from this,
        self.generator = torch.Generator().manual_seed(self.seed)  # the batches from their own

    def plan_steps(self) -> None:
        """How a step is shared out: among processes, into portions, among threads."""
        B, processors = self.config.batch_size, processes.COUNT
        if processors > 1 and not hasattr(self.config, "grad_accumulation"):
            raise UserError(
                f"{self.stage}.py trains in one process: only gpt.py and modern_gpt.py share theirs"
            )
        at_least = getattr(self.config, "grad_accumulation", 1)
        if B % (processors * at_least):
            processes_too = f"{processors} processes times " if processors > 1 else ""
            raise UserError(
                f"--batch-size {B} is no multiple of {processes_too}--grad-accumulation "
                f"{at_least}: take a multiple of {processors * at_least}"
            )
        row = self.config.block_size * getattr(self.config, "n_embd", 1)
        self.portion_count = at_least
        if hasattr(self.config, "grad_accumulation"):
            self.portion_count = machine.portions_for(self.device, B // processors, row, at_least)
        self.all_threads = torch.get_num_threads()
        self.step_threads = 1 if B * row <= SMALL_STEP else self.all_threads
        self.number_format, self.compiled = torch.float32, False
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.network = None
        self.top_speed = self.operations = 0.0  # per second, and per step; 0: not measured

    def accelerate(self, model: nn.Module) -> nn.Module:
        """The same weights as fast as it gets here: number format, compiled, in all processes."""
        self.model = self.network = model
        name = self.config.precision
        if name == "auto" and self.saved and self.saved["device"] == self.device.type:
            name = self.saved.get(
                "number_format", "float32"
            )  # or the numbers would not go on as they were
        if name == "auto":
            self.number_format = processes.first_does(
                lambda: machine.pick_number_format(self.device)
            )
        else:
            self.number_format = machine.FORMATS[name]
        if self.number_format == torch.float16 and self.device.type != "cuda":
            raise UserError("--precision float16 needs a CUDA graphics card: take bfloat16")
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.number_format == torch.float16
        )
        [self.top_speed] = machine.product_speeds(self.device, self.number_format)
        self.operations = self.count_operations(model)
        network = model
        if self.config.compile or (self.config.compile is None and self.device.type == "cuda"):
            network = self.compile(model)
        if processes.COUNT > 1:
            network = DistributedDataParallel(network, forward_sync_buffers=False)
        self.network = network
        return network

    def compile(self, model: nn.Module) -> nn.Module:
        compiled = torch.compile(model)
        try:
            self.rehearse(compiled)
        except Exception as error:  # of whatever kind: compilers fail in many ways
            if is_out_of_memory(error):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            if processes.FIRST:
                print(f"torch.compile fails here, so this run goes without it: {reason[:150]}")
            return model
        self.compiled = True
        return compiled

    @property
    def format_name(self) -> str:
        return str(self.number_format).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """Inside, matrix products take their numbers in the run's format."""
        if self.number_format == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.number_format)

    def batches(
        self, model: nn.Module, *optimizers: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches to learn from; in between evaluate, log, save, and heed Ctrl-C."""
        self.model, self.optimizers = model, optimizers
        if self.network is None:
            self.network = model
        few = threads(self.step_threads)
        with few, interrupts() as interrupted, self.progress_bar() as self.bar:
            self.begin()
            while self.step < self.config.max_iters:
                yield self.draw(self.generator)
                self.step += 1
                self.computed_steps += 1
                self.bar.update()
                at_end = self.step == self.config.max_iters
                save_now = time.perf_counter() - self.saved_at > SECONDS_BETWEEN_SAVES
                stop, save_now = processes.any_of(bool(interrupted), save_now)
                if self.step % STEPS_BETWEEN_LOOKS == 0:
                    self.look_at_losses()
                if self.step % self.config.eval_interval == 0 or at_end:
                    self.evaluate()
                    self.save()
                    self.print_row()
                elif stop or save_now:
                    self.save()
                if stop and not at_end:
                    self.bar.close()
                    if processes.FIRST:
                        command = self.resume_command(self.folder)
                        print(f"stopped at step {self.step}; to go on: {command}")
                    raise SystemExit(130)

    def portions(self, batch: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch in equal portions, so that memory or a processor's cache can hold each."""
        parts = list(zip(*(half.chunk(self.portion_count) for half in batch), strict=True))
        for part in parts:
            if isinstance(self.network, DistributedDataParallel):  # they add up the gradients once
                self.network.require_backward_grad_sync = part is parts[-1]
            yield part

    def begin(self) -> None:
        """Take up the saved run where it stood, or open a folder for a new one."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        length = len(self.corpus.training) + len(self.corpus.validation)
        company = f" in {processes.COUNT} processes" if processes.COUNT > 1 else ""
        self.say(
            f"{self.stage}: {parameters:,} parameters on {self.device.type}{company}, text "
            f"{self.corpus.name} of {length:,} characters ({self.config.vocab_size} different)"
        )
        if self.saved:
            self.restore()
        elif self.source:
            adopt_weights(self.model, self.source, self.tokenizer.vocabulary)
            self.say(f"starts from the weights of {self.options.init_from}")
        self.rehearse(self.network)  # warms up
        seconds_a_step = self.rehearse(self.network) + self.rehearse_optimizers()
        if self.preset:
            in_all = duration(seconds_a_step * self.config.max_iters)
            self.say(f"{self.preset}: about {in_all}, and the evaluations")
        if processes.RANK:
            torch.manual_seed(self.seed + processes.RANK + self.step)  # its own dropout
        self.started = time.perf_counter() - self.seconds
        if not self.saved:
            self.evaluate()
            self.folder = processes.first_does(self.claim_folder)
        settings = {
            "stage": self.stage,
            **self.origin,
            "config": asdict(self.config),
            "seed": self.seed,
            "device": self.device.type,
            "number_format": self.format_name,
            "compiled": self.compiled,
            "processes": processes.COUNT,
            "corpus": corpus_record(self.corpus),
            "parameters": parameters,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        content = json.dumps(settings, indent=2).encode("utf-8")
        processes.first_does(lambda: write_whole(self.folder / "config.json", content))
        self.save()
        self.say(f"run folder {self.folder}")
        if not self.saved:
            self.print_row()
        self.marked_at = time.perf_counter()

    def rehearse(self, network: nn.Module) -> float:
        """Seconds for a step's passes, from one portion that leaves no trace.

        If memory is too short for it, this fails before any file has been touched.
        """
        with self.without_trace():
            began = time.perf_counter()
            for idx, targets in itertools.islice(self.portions(self.draw(torch.Generator())), 1):
                with self.autocast():
                    _, loss = network(idx, targets)
                loss.backward()
            machine.wait_for(self.device)
            return (time.perf_counter() - began) * self.portion_count

    def rehearse_optimizers(self) -> float:
        """Seconds for a step of theirs, with gradients and rates of zero; they forget it again."""
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        with self.without_trace():
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
            began = time.perf_counter()
            for optimizer in self.optimizers:
                optimizer.step()
            machine.wait_for(self.device)
            seconds = time.perf_counter() - began
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        return seconds

    def count_operations(self, model: nn.Module) -> float:
        """Floating-point operations of a step's matrix products, counted on one row."""
        row = torch.zeros(1, self.config.block_size, dtype=torch.long, device=self.device)
        with self.without_trace(), self.autocast():
            return float(machine.operations(model, row)) * self.config.batch_size

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """What is drawn and learnt inside is forgotten."""
        random = random_module(self.device)
        state = random.get_rng_state()
        try:
            yield
        finally:
            random.set_rng_state(state)
            for parameter in self.model.parameters():
                parameter.grad = None

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """This process's rows of the next batch; which they are does not depend on the number."""
        config = self.config
        batch = draw_batch(self.corpus.training, config.block_size, config.batch_size, generator)
        return tuple(self.to_device(processes.mine(half)) for half in batch)

    def to_device(self, numbers: Tensor) -> Tensor:
        numbers = number_as(self.renumber, numbers)
        if self.device.type == "cuda":  # from pinned memory it is copied while the card computes
            return numbers.contiguous().pin_memory().to(self.device, non_blocking=True)
        return numbers.to(self.device)

    def log(self, loss: Tensor) -> None:
        """Count a batch's loss, or a portion's, towards the next row."""
        self.pending.append(loss.detach())

    def look_at_losses(self) -> None:
        """Add up the losses since the last look; a graphics card is waited for only here."""
        if not self.pending:
            return
        losses = processes.total(torch.stack(self.pending).cpu() / processes.COUNT).tolist()
        self.pending = []
        now = time.perf_counter()
        self.computing += now - self.marked_at
        self.marked_at = now
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                after = (len(losses) - 1 - i) // self.portion_count
                raise self.diverged(f"the loss became {loss} at step {self.step - after}")
            self.loss_sum += loss
            self.loss_count += 1
        self.bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)

    def diverged(self, what: str) -> UserError:
        advice = "try a smaller --learning-rate"
        if hasattr(self.config, "muon_learning_rate"):
            advice += " or --muon-learning-rate"
        if self.number_format != torch.float32:
            advice += ", or --precision float32"
        if self.rows:
            best = min(self.rows, key=validation_loss)
            advice += (
                f"; {self.folder} keeps step {self.saved_step} in checkpoint.pt and step "
                f"{best['step']} in best.pt"
            )
        return UserError(f"{what}: {advice}")

    def finish(self) -> None:
        """Say how far the run came, and let its best state write a text."""
        if not processes.FIRST:
            return
        best = min(self.rows, key=validation_loss)
        print(
            f"best validation loss {best['val_loss']:.4f}, which is "
            f"{best['val_loss'] / math.log(2):.3f} bits per character, "
            f"at step {best['step']} after {best['seconds']:.1f} s"
        )
        if self.operations and self.computed_steps:
            self.print_speed()
        if bound := known_entropy(self.corpus):
            print(f"the entropy of Pocket Play, below which no model gets on average: {bound:.4f}")
        load_weights(self.model, read_checkpoint(self.folder / "best.pt"))
        store_by_columns(self.model)
        text = stream_sample(self.model, self.tokenizer, self.options, self.seed)
        write_whole(self.folder / "sample.txt", text.encode("utf-8"))

    def print_speed(self) -> None:
        step = self.computing / self.computed_steps
        tokens = self.config.batch_size * self.config.block_size / step
        speed, top = self.operations / step, self.top_speed * processes.COUNT
        print(
            f"{1000 * step:,.1f} ms a step, {tokens:,.0f} characters a second, {speed / 1e9:,.0f} "
            f"GFLOP/s: {speed / top:.0%} of what a large {self.format_name} product reaches here"
        )

    def evaluate(self) -> None:
        """Add a row to the log."""
        self.look_at_losses()
        with threads(self.all_threads), self.autocast():
            val_loss = exact_loss(self.model, self.corpus.validation, self.renumber)
            if self.loss_count:
                train_loss = self.loss_sum / self.loss_count
            else:  # before the first batch: as much of the text as there is to validate with
                first_part = self.corpus.training[: len(self.corpus.validation)]
                train_loss = exact_loss(self.model, first_part, self.renumber)
        if not math.isfinite(val_loss):
            raise self.diverged(f"the validation loss became {val_loss} by step {self.step}")
        self.rows.append(
            {
                "step": self.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "learning_rate": self.optimizers[0].param_groups[0]["lr"],
                "tokens": self.step * self.config.batch_size * self.config.block_size,
                "seconds": time.perf_counter() - self.started,
            }
        )
        self.loss_sum, self.loss_count = 0.0, 0

    def print_row(self) -> None:
        row = self.rows[-1]
        self.say(
            f"step {row['step']:5}   train {row['train_loss']:.4f}   "
            f"validation {row['val_loss']:.4f}   {row['seconds']:7.1f} s"
        )

    def say(self, line: str) -> None:
        """Print without running into the progress bar."""
        if processes.FIRST:
            self.bar.write(line)

    def progress_bar(self) -> tqdm:
        """Nothing where the output is not a terminal but, say, a file."""
        step = self.saved["step"] if self.saved else 0
        disable = None if processes.FIRST else True
        return tqdm(total=self.config.max_iters, initial=step, disable=disable, unit="step")

    def claim_folder(self) -> Path:
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
        return self.folder

    def resume_command(self, folder: Path) -> str:
        """What to type in this folder, with this Python."""
        python = Path(sys.executable)
        if python.is_relative_to(Path.cwd()):
            python = python.relative_to(Path.cwd())
        words = [str(python), sys.argv[0], "--resume", "--out", str(folder)]
        if processes.COUNT > 1:
            words[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes.COUNT_HERE}"]
        if folder == self.folder:
            words += sampling_words(self.options)
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

    def save(self) -> None:
        """Write the complete state, and the log."""
        self.look_at_losses()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self.diverged(f"a weight is no longer a number at step {self.step}")
        processes.first_does(self.write_state)
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        self.marked_at = self.saved_at

    def write_state(self) -> None:
        state = {
            "format": CHECKPOINT_FORMAT,
            "stage": self.stage,
            "config": asdict(self.config),
            "seed": self.seed,
            "origin": self.origin,
            "corpus": corpus_record(self.corpus),
            "vocabulary": self.tokenizer.vocabulary,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "seconds": time.perf_counter() - self.started,
            "batch_state": self.generator.get_state(),
            "device": self.device.type,
            "device_state": random_module(self.device).get_rng_state(),
            "number_format": self.format_name,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # best.pt first: a run that dies between the two writes the same best.pt again.
        newest = self.rows[-1]
        if newest["step"] == self.step and newest == min(self.rows, key=validation_loss):
            write_whole(self.folder / "best.pt", buffer.getbuffer())
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())
        write_whole(self.folder / "losses.csv", losses_csv(self.rows))

    def restore(self) -> None:
        """Take over the complete state: from here the run goes on as if it had never stopped."""
        saved, self.saved_step = self.saved, self.saved["step"]
        if processes.FIRST:
            (self.folder / "sample.txt").unlink(missing_ok=True)  # it is finished no longer
        load_weights(self.model, saved)
        try:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (KeyError, ValueError):
            raise changed_since(saved) from None
        self.step, self.rows, self.seconds = saved["step"], saved["rows"], saved["seconds"]
        self.loss_sum, self.loss_count = saved["loss_sum"], saved["loss_count"]
        self.generator.set_state(saved["batch_state"])
        if saved.get("scaler"):  # empty, unless the run was in float16
            self.scaler.load_state_dict(saved["scaler"])
        if saved["device"] == self.device.type:  # no other device continues the same numbers
            random_module(self.device).set_rng_state(saved["device_state"])
        where = f"{self.folder} goes on after step {self.step}"
        if self.step == self.config.max_iters:
            where = f"{self.folder} is at its end; --max-iters above {self.step} takes it further"
        self.say(where)


@torch.inference_mode()
def exact_loss(model: nn.Module, tokens: Tensor, renumber: Tensor | None = None) -> float:
    """The mean loss over a whole text, cut into consecutive windows: no estimate, no noise."""
    model.eval()
    device = next(model.parameters()).device
    T = model.block_size
    idx, targets = tokens[:-1], tokens[1:]
    whole = len(idx) // T * T
    rows = max(1, EVALUATION_TOKENS // T)
    windows = [part[:whole].view(-1, T).split(rows) for part in (idx, targets)]
    last = (idx[whole:][None], targets[whole:][None])  # shorter, or empty
    total = torch.zeros(1, dtype=torch.float64)
    for idx, targets in [*zip(*windows, strict=True), last][processes.RANK :: processes.COUNT]:
        if idx.numel():
            idx, targets = (number_as(renumber, half).to(device) for half in (idx, targets))
            _, loss = model(idx, targets)
            total += loss.item() * idx.numel()
    model.train()
    return processes.total(total).item() / (len(tokens) - 1)


def number_as(renumber: Tensor | None, numbers: Tensor) -> Tensor:
    return numbers.long() if renumber is None else renumber[numbers.long()]


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
        if processes.FIRST:  # os.write, because print may not be called here
            os.write(2, b"\nstopping after this step; once more stops at once\n")
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
