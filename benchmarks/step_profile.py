"""Where the time of a training step goes, as PyTorch's profiler sees it.

    python benchmarks/step_profile.py gpt.py --preset full
    python benchmarks/step_profile.py modern_gpt.py --preset middle

All other flags go to the script. Prints a table: kinds of operations, milliseconds per step and
fractions. "Outside of operations" is time spent in Python or waiting.
"""

import importlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trainer import Run, cli

from torch.profiler import ProfilerActivity, profile

WARM_UP, STEPS = 10, 10
KINDS = {
    "matrix products": "mm addmm bmm baddbmm",
    "softmax and loss": "_softmax _softmax_backward_data _log_softmax nll_loss_forward",
    "normalization": "native_layer_norm native_layer_norm_backward rsqrt mean",
    "random numbers": "random_ bernoulli_",
    "copies, also to another dtype": "copy_ cat",
    "elementwise": "add add_ sub mul mul_ div div_ relu clamp_min threshold_backward pow square "
    "addcmul neg ge sum",
}


def main() -> None:
    script, *flags = sys.argv[1:] or sys.exit(__doc__)
    profiler, seconds = profile(activities=[ProfilerActivity.CPU]), []

    class ProfiledRun(Run):
        def batches(self, *parts: object) -> Iterator[object]:
            for i, batch in enumerate(super().batches(*parts)):
                if i == WARM_UP:
                    profiler.start()
                    seconds.append(time.perf_counter())
                if i == WARM_UP + STEPS:
                    seconds.append(time.perf_counter())
                    profiler.stop()
                yield batch

    module = importlib.import_module(script.removesuffix(".py"))
    module.Run = ProfiledRun
    steps = str(WARM_UP + STEPS + 1)
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--max-iters", steps, "--eval-interval", steps, "--sample-length", "1"]
        sys.argv = [script, *flags, "--out", str(Path(folder, "run"))]
        module.main()

    total, times = 1000 * (seconds[1] - seconds[0]) / STEPS, defaultdict(float)
    for event in profiler.events():
        times[kind(event)] += event.self_cpu_time_total / 1000 / STEPS
    times["outside of operations"] = total - sum(times.values())
    print(f"\n| {script} {' '.join(sys.argv[1:-8])} | ms per step | fraction |")
    print("|---|---:|---:|")
    for name, milliseconds in sorted(times.items(), key=lambda each: -each[1]):
        print(f"| {name} | {milliseconds:.1f} | {milliseconds / total:.0%} |")
    print(f"| all | {total:.1f} | 100% |")


def kind(event: object) -> str:
    """What an operation is for: an optimizer, or otherwise its own kind."""
    above = event
    while above:
        if above.name.startswith("Optimizer."):
            return above.name.removeprefix("Optimizer.").split("#")[1].split(".")[0]
        above = above.cpu_parent
    name = event.name.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names.split()), "other")


if __name__ == "__main__":
    cli(main)
