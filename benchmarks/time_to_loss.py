"""Seconds from the start of the process until a script reaches a validation loss.

    python benchmarks/time_to_loss.py modern_gpt.py --target 1.4697
    python benchmarks/time_to_loss.py gpt.py --target 1.88 --preset small --seed 2

All other flags go to the script. The time includes start-up, evaluations and saving. The whole
validation split is evaluated after 90% of the steps and then every 2%; training stops when the
target is reached. FLOPs are those of the model's matrix products; the fraction of the peak compares
the training steps with a large matrix product in the same dtype.
"""

import argparse
import importlib
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import trainer.run
from trainer import Run, cli

import psutil
import torch
from speed import count_flops, matmul_speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=["gpt.py", "modern_gpt.py"])
    parser.add_argument("--target", type=float, required=True, metavar="LOSS")
    options, flags = parser.parse_known_args()

    class TimedRun(Run):
        """A run that evaluates from 90% of its steps on, and stops at the target."""

        def evaluate(self) -> None:
            percent = 2 if self.step else 90
            self.config.eval_interval = max(1, self.config.max_iters * percent // 100)
            if not self.step:  # an evaluation would take time and could not reach the target
                return self.history.add_row(math.inf, math.inf, 0.0, 0)
            super().evaluate()
            loss = self.history.rows[-1]["val_loss"]
            if loss <= options.target:
                report(self, loss)
                raise SystemExit

    module = importlib.import_module(options.script.removesuffix(".py"))
    module.Run = TimedRun
    trainer.run.EARLY_EVALUATIONS = ()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [options.script, *flags, "--out", str(Path(folder, "run"))]
        module.main()
    sys.exit(f"{options.script} did not reach {options.target} with {' '.join(flags)}")


def report(run: Run, loss: float) -> None:
    seconds = time.time() - psutil.Process().create_time()
    config, steps = run.config, run.step - run.first_step
    idx = torch.zeros(1, config.block_size, dtype=torch.long, device=run.device)
    flops = steps * config.batch_size * count_flops(run.model.train(), idx)
    fraction = flops / run.computing / matmul_speed(run.device, run.machine.dtype)
    tokens = steps * config.batch_size * config.block_size
    print(
        f"reached {loss:.4f} at step {run.step}: {seconds:.1f} seconds, {tokens:,} tokens, "
        f"{flops:.2e} FLOPs, {fraction:.0%} of the peak {run.machine.dtype_name} matmul throughput"
    )


if __name__ == "__main__":
    cli(main)
