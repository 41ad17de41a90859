"""What a run shows while it runs: its metrics and its speed.

On a terminal a bar shows them; in a log there is a line every `every` steps.

Metrics stay on the device until they are due. Fetching them only every `every` steps leaves the
device a queue of work. The numbers of all steps are still looked at: what the guard refused is
reported with its step, and a run that it stopped ends before its next checkpoint.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from tqdm import tqdm

from moe_erc.measures.load import MAX_LOAD
from moe_erc.measures.training import LM, LOSS, MFU, TOKENS_PER_S, TOTAL
from moe_erc.training import guard
from moe_erc.training.metrics import peak_flops

# The metrics that bar and log show, under their names without the group.
SHOWN = (
    TOTAL,
    LM,
    LOSS.of("erc"),
    MAX_LOAD,
    TOKENS_PER_S,
    MFU,
)


class Progress:
    """Collects the metrics of steps (`add`), checks them, shows them and writes them (`flush`).

    writer: a MetricWriter. every: steps between what is shown and written. steps: (those done
    before, the last one). step_size: (tokens, FLOPs) of one step.
    """

    def __init__(self, writer, every, steps, step_size, guard_config):
        first, last = steps
        self._writer = writer
        self._every = every
        self._tokens, self._flops = step_size
        self._guard = guard_config
        self._pending = []
        self._timed_steps = 0
        self._seconds = 0.0
        self._since = time.perf_counter()
        show = _Bar if sys.stderr.isatty() else _Lines
        self._shown = show(first, last)

    def add(self, step: int, metrics: Mapping) -> None:
        """Takes the metrics of one step as they come from the device; fetches nothing."""
        self._pending.append((step, metrics))
        self._shown.advance()

    def flush(self) -> None:
        """Fetches, checks, shows and writes the metrics added since the last call.

        Raises `guard.Stopped`, with the step, where the guard accepts no step any more.
        """
        fetched = jax.device_get(self._pending)
        self._pending = []
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._timed_steps += len(fetched)
        for step, metrics in fetched:
            line = guard.read(self._guard, step, metrics)
            if line:
                self._shown.say(line)
            if step % self._every == 0:
                metrics = metrics | self._speed()
                self._writer.write(step, metrics)
                found = {}
                for measure in SHOWN:
                    if measure.key in metrics:
                        found[measure.name] = _short(np.max(metrics[measure.key]))
                self._shown.show(step, found, self._rate)

    def _speed(self):
        """The metrics of speed since the last call."""
        self._rate = self._timed_steps / self._seconds
        self._timed_steps = 0
        self._seconds = 0.0
        peak = peak_flops(jax.devices()[0].device_kind)
        speed = {TOKENS_PER_S.key: self._rate * self._tokens}
        if peak:
            speed[MFU.key] = self._rate * self._flops / (peak * jax.device_count())
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training, and whose lines do not tear the bar."""
        self._seconds += time.perf_counter() - self._since
        with self._shown.external():
            yield
        self._since = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._shown.close()


class _Bar:
    """A bar on the last line of a terminal."""

    def __init__(self, first, last):
        is_hidden = jax.process_index() > 0
        self._bar = tqdm(
            initial=first,
            total=last,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=is_hidden,
        )
        self.advance = self._bar.update
        self.say = self._bar.write
        self.external = tqdm.external_write_mode
        self.close = self._bar.close

    def show(self, step, found, rate):
        del step, rate  # the bar counts steps itself
        self._bar.set_postfix(found)


class _Lines:
    """Whole lines, for a log: none is ever written over."""

    external = contextlib.nullcontext

    def __init__(self, first, last):
        del first
        self._last = last
        self._is_hidden = jax.process_index() > 0

    def advance(self):
        pass

    def say(self, line):
        print(line)

    def show(self, step, found, rate):
        if not self._is_hidden:
            numbers = ", ".join(f"{name} {value}" for name, value in found.items())
            left = tqdm.format_interval((self._last - step) / rate)
            print(f"step {step:,}/{self._last:,}: {numbers}, {left} left", file=sys.stderr)

    def close(self):
        pass


def _short(value):
    return f"{value:,.0f}" if 1000 <= abs(value) < np.inf else f"{value:.4g}"
