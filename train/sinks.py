"""Where metrics go: metrics.jsonl always, TensorBoard, and a line or a bar for whoever watches.

Only rank 0 has them. A run that continues from step k first forgets what was written behind k,
so that no step appears twice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.files import write_atomically

Metrics = dict[str, float | None]


class Sinks:
    """All sinks of a run.

    Args:
        run_dir: metrics.jsonl and tensorboard/ are written here.
        first_step: steps done before this process; what lies behind is forgotten.
        steps: steps of the whole run.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        keep_until(self.path, first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.steps = steps
        # A bar only where it can redraw itself: in a log file it would be thousands of lines.
        self.bar = tqdm(
            initial=first_step, total=steps, unit="step", disable=not sys.stderr.isatty()
        )

    def write(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of the window that ends with ``step`` steps done."""
        self.file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            if value is not None:
                self.board.add_scalar(name, value, step)
        self.bar.update(step - self.bar.n)
        shown = {name: value for name, value in metrics.items() if is_shown(name)}
        if self.bar.disable:
            self.say(f"step {step}/{self.steps}  {line(shown)}")
        else:
            self.bar.set_postfix_str(line(shown))

    def say(self, text: str) -> None:
        """Show a message without breaking the bar."""
        self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self.bar.close()
        self.board.close()
        self.file.close()


def is_shown(name: str) -> bool:
    """Whether a metric is worth a place on the screen."""
    return (
        name in ("samples_per_s", "data_wait", "substituted")
        or name.startswith("unserved/")
        or name.endswith(("/video", "/audio"))
    )


def line(metrics: Metrics) -> str:
    """Return metrics as one line of text."""
    return "  ".join(
        f"{name.removeprefix('loss/')} {shown_value(name, value)}"
        for name, value in metrics.items()
    )


def shown_value(name: str, value: float | None) -> str:
    """Return a metric as text; shares of the time in per cent."""
    if value is None:
        return "not finite"
    return f"{value:.2%}" if name == "data_wait" else f"{value:.4g}"


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file behind ``step``, and a last line that is cut short."""
    if not path.exists():
        return
    kept = [text for text in path.read_text().splitlines() if step_of(text) <= step]
    write_atomically(path, "".join(f"{text}\n" for text in kept).encode())


def step_of(text: str) -> float:
    """Return the step of a line of metrics, or infinity where it can't be read."""
    try:
        value: Any = json.loads(text)
        return float(value["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
