"""What a training step of modern_gpt.py takes without each of its ideas.

How long whole runs take does not tell: what else the machine does meanwhile makes more of a
difference than most ideas.
"""

import json
import math
import random
import time
from pathlib import Path

import torch

from common import draw_batch
from comparison.runs import Rung, Terms
from machine import pick_number_format, wait_for
from run_folder import script_sha256, write_whole
from sample import stage_module

ROUNDS = 24


def measure_step_times(rungs: tuple[Rung, ...], terms: Terms, threads: int) -> dict[str, float]:
    """Seconds by what is new in a rung: of steps taken in turns the one least disturbed."""
    device = torch.device(terms.device)
    number_format = pick_number_format(device)
    generator = torch.Generator().manual_seed(1)
    trials = {}
    for rung in rungs:
        module = stage_module(rung.stage)
        config = module.Config(**terms.config(rung))
        model = module.Model(config).to(device)
        batch = draw_batch(terms.corpus.training, config.block_size, config.batch_size, generator)
        idx, targets = (half.to(device) for half in batch)
        trials[rung.new] = model, module.make_optimizers(model, config), idx, targets
    seconds = dict.fromkeys(trials, math.inf)
    order = list(trials.items())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for number in range(ROUNDS):
        random.Random(number).shuffle(order)  # none always comes after the same one
        for name, (model, optimizers, idx, targets) in order:
            wait_for(device)
            began = time.perf_counter()
            with torch.autocast(device.type, number_format, enabled=number_format != torch.float32):
                _, loss = model(idx, targets)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            wait_for(device)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    torch.set_num_threads(before)
    return seconds


def save_step_times(path: Path, seconds: dict[str, float], terms: Terms) -> None:
    content = {**of_what(terms), "seconds": seconds}
    write_whole(path, json.dumps(content, indent=2).encode("utf-8"))


def read_step_times(path: Path, terms: Terms) -> dict[str, float]:
    """Nothing where they are not there, or of another version of the script or another device."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {name: content[name] for name in of_what(terms)} == of_what(terms):
            return {str(name): float(seconds) for name, seconds in content["seconds"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # then they are measured again
    return {}


def of_what(terms: Terms) -> dict[str, str]:
    return {"script_sha256": script_sha256("modern_gpt"), "device": terms.device}
