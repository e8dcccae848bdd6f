"""How long a training step takes, for several scripts in turns.

    python benchmarks/step_time.py "gpt --preset small" "my_gpt --preset small"
    python benchmarks/step_time.py       modern_gpt.py's small preset with each idea removed in turn

Prints the milliseconds per step, without evaluations, and their ratio to the first command: medians
over the rounds, since other programs only disturb some of them.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer import Run, cli
from compare import commands_of
from trainer.machine import DeviceSettings, available_device

import torch
from speed import synchronize

WARM_UP, STEPS = 3, 20


class TimedRun(Run):
    """Trains for a few steps, and evaluates and saves nothing."""

    times: list[float] = []  # of the latest run

    def batches(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator:
        self.model, self.optimizers = model, optimizers
        TimedRun.times = []
        if self.machine.compiled:
            model.compile()
        torch.set_num_threads(self.machine.threads(model, self.config))
        for step in range(WARM_UP + STEPS):
            synchronize(self.device)
            began = time.perf_counter()
            yield self.batch(step)
            synchronize(self.device)
            TimedRun.times.append(time.perf_counter() - began)
        torch.set_num_threads(self.all_threads)

    def finish(self) -> None:
        self.folder.unlock()


def milliseconds(command: str) -> float:
    script, *sys.argv[1:] = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    module.Run = TimedRun
    module.main()
    return 1000 * statistics.median(TimedRun.times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="*", metavar="SCRIPT", help="scripts with their flags")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repeats (default 5)")
    options = parser.parse_args()
    device = available_device(DeviceSettings().device).type
    modern = commands_of(argparse.Namespace(modern=True), device)
    commands = options.commands or modern
    times = {command: [] for command in commands}
    for _ in range(options.rounds):
        for command in commands:
            times[command].append(milliseconds(command))
    print("| script | ms per step | relative |\n|---|---:|---:|")
    for command in commands:
        ratios = [x / first for x, first in zip(times[command], times[commands[0]], strict=True)]
        name = f"`{command}`" if command != modern[-1] else f"`{modern[0]}` without the ideas"
        median = statistics.median(times[command])
        print(f"| {name} | {median:.1f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    cli(main)
