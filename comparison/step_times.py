"""How long a training step of modern_gpt.py takes without each of its ideas.

The times of whole runs do not show it: other work on the machine changes them more than most ideas
do.
"""

import json
import math
import random
import time
from pathlib import Path

import modern_gpt
from common import draw_batch
from comparison.ideas import EQUAL_STEPS
from comparison.runs import Terms
from trainer.folder import write_whole
from trainer.machine import Machine, MachineSettings

import torch

ROUNDS = 24


def measure_step_times(terms: Terms, thread_count: int) -> dict[str, float]:
    """Seconds per step without each idea: the minimum over many interleaved trials."""
    device = torch.device(terms.device)
    machine = Machine(MachineSettings(), device, "auto")
    generator = torch.Generator().manual_seed(1)
    trials = {}
    for row in EQUAL_STEPS:
        config = modern_gpt.Config(**terms.config(row))
        model = modern_gpt.Model(config).to(device)
        batch = draw_batch(terms.corpus.train, config.block_size, config.batch_size, generator)
        idx, targets = (half.to(device) for half in batch)
        trials[row.new] = model, modern_gpt.make_optimizers(model, config), idx, targets
    seconds = dict.fromkeys(trials, math.inf)
    order = list(trials.items())
    before = torch.get_num_threads()
    torch.set_num_threads(thread_count)
    for number in range(ROUNDS):
        random.Random(number).shuffle(order)  # so that the models' order varies
        for name, (model, optimizers, idx, targets) in order:
            synchronize(device)
            began = time.perf_counter()
            with machine.autocast():
                _, loss = model(idx, targets)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    torch.set_num_threads(before)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, which computes while the program continues."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def save_step_times(path: Path, seconds: dict[str, float], terms: Terms) -> None:
    content = {"device": terms.device, "seconds": seconds}
    write_whole(path, json.dumps(content, indent=2).encode("utf-8"))


def read_step_times(path: Path, terms: Terms) -> dict[str, float]:
    """Empty if they are not there, of another device, or of other ideas."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["device"] == terms.device:
            return {row.new: float(content["seconds"][row.new]) for row in EQUAL_STEPS}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # then they are measured again
    return {}
