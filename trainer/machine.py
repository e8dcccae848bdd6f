"""How a run computes: device, dtype, compiler, micro-batches, threads, random numbers.

All of it follows from what the machine is, never from a measurement: the same seed gives the same
run on a busy machine too.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from common import pick_device
from trainer.cli import UserError, is_out_of_memory

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_ACTIVATIONS = 2**19  # a micro-batch whose (B, T, C) is this large still fits a CPU's cache
SMALL_STEP = 2**26  # parameters times tokens up to which a second thread waits more than it helps


@dataclass
class DeviceSettings:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute


@dataclass
class MachineSettings(DeviceSettings):
    precision: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # dtype of matrix products
    )
    compile: bool | None = None  # whether to use torch.compile (default: on CUDA)
    grad_accumulation: int = 1  # micro-batches per step, at least: more of them need less memory


class Machine:
    """The device of a run, and the settings that suit it."""

    def __init__(self, settings: MachineSettings, device: torch.device, precision: str) -> None:
        self.device = device
        self.grad_accumulation = settings.grad_accumulation
        name = settings.precision if settings.precision != "auto" else precision
        self.dtype = fast_dtype(device) if name == "auto" else DTYPES[name]
        if self.dtype == torch.float16 and device.type != "cuda":
            raise UserError("--precision float16 needs a CUDA GPU; try --precision bfloat16")
        wanted = device.type == "cuda" if settings.compile is None else settings.compile
        self.compiled = bool(wanted)
        self.scaler = LossScaler(enabled=self.dtype == torch.float16)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """Inside, matrix products take their inputs in the run's dtype."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def eager(self) -> AbstractContextManager:
        """Inside, a compiled model runs as it is: new shapes would have to be compiled again."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def micro_batches(self, rows: int, row_size: int) -> int:
        """The number of micro-batches for a batch, where each row has that many activations."""
        count = self.grad_accumulation
        if self.device.type == "cpu":
            count = max(count, math.ceil(rows / max(1, CACHE_ACTIVATIONS // row_size)))
        return min(rows, count)

    def threads(self, model: nn.Module, tokens: int) -> int:
        """How many threads a training step should use."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return 1 if parameters * tokens <= SMALL_STEP else torch.get_num_threads()

    def prepare(
        self, model: nn.Module, trial: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        """Compile the model if it should be, and try it."""
        if not self.compiled:
            return trial()
        model.compile()
        try:
            trial()
        except Exception as error:  # compilers fail in many ways
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0][:150]
            say(f"torch.compile fails here, so this run does without it: {reason}")
            torch.compiler.set_stance("force_eager")
            self.compiled = False
            trial()

    def send(self, tokens: Tensor) -> Tensor:
        """To the device; from pinned memory, while the GPU goes on computing."""
        if self.device.type == "cuda":
            return tokens.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tokens.to(self.device)

    def seed(self, value: int) -> None:
        """Seed what dropout draws from on this device."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(value)
        else:
            getattr(torch, self.device.type).manual_seed(value)


def available_device(name: str) -> torch.device:
    device = pick_device(name)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, True):
        raise UserError(f"PyTorch finds no {name} device on this machine; try --device auto")
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which this device multiplies fastest and still trains well."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16  # other CPUs emulate it, slowly
    return torch.float32


def seed_for(*parts: object) -> int:
    """A seed for each purpose: what is random in a step depends on nothing but these."""
    return zlib.crc32(" ".join(map(str, parts)).encode("utf-8"))


class LossScaler:
    """Keeps small gradients from vanishing in float16; elsewhere its scale is 1."""

    def __init__(self, enabled: bool) -> None:
        self.scale = 2.0**16 if enabled else 1.0
        self.enabled = enabled
        self.good_steps = 0

    def unscale(self, model: nn.Module) -> None:
        """Divide the gradients by the scale; drop all of them if one overflowed."""
        if not self.enabled:
            return
        weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if nn.utils.get_total_norm([weight.grad for weight in weights]).isfinite():
            for weight in weights:
                weight.grad.div_(self.scale)
            self.good_steps += 1
            if self.good_steps % 2000 == 0:
                self.scale *= 2
        else:
            for weight in weights:
                weight.grad = None  # optimizers skip what has no gradient
            self.scale, self.good_steps = self.scale / 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.scale, self.good_steps = state["scale"], state["good_steps"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
