"""What a run shows while it runs: metrics that stay on the device until they are due, and the speed.

On a terminal a bar shows them; in a log there is a line every `every` steps.

Fetching every `every` steps leaves the device a queue of work; every step's numbers are still looked at, so what the
guard refused is reported with its step, and a run that it stopped ends before its next checkpoint.
"""

import contextlib
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from moe_erc.measures.load import MAX_LOAD
from moe_erc.measures.training import LM, LOSS, MFU, TOKENS_PER_S, TOTAL
from moe_erc.training import guard
from moe_erc.training.metrics import peak_flops

SHOWN = (TOTAL, LM, LOSS.of("erc"), MAX_LOAD, TOKENS_PER_S, MFU)  # by the part of the key behind the slash


class Progress:
    """`add` a step's metrics, `flush` what has come together; `step_size` is (tokens, FLOPs) of one step."""

    def __init__(self, writer, every, steps, step_size, guard_config):
        first, last = steps
        self._writer, self._every, (self._tokens, self._flops) = writer, every, step_size
        self._guard = guard_config
        self._pending, self._timed_steps, self._seconds, self._since = [], 0, 0.0, time.perf_counter()
        self._shown = (_Bar if sys.stderr.isatty() else _Lines)(first, last)

    def add(self, step, metrics):
        """Takes the metrics of one step as they come from the device, unfetched."""
        self._pending.append((step, metrics))
        self._shown.advance()

    def flush(self):
        """Fetches, checks and writes what is pending; `guard.Stopped` names the step from which on none counts."""
        fetched = jax.device_get(self._pending)
        self._pending = []
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._timed_steps += len(fetched)
        for step, metrics in fetched:
            if line := guard.read(self._guard, step, metrics):
                self._shown.say(line)
            if step % self._every == 0:
                metrics = metrics | self._speed()
                self._writer.write(step, metrics)
                found = {one.name: _short(np.max(metrics[one.key])) for one in SHOWN if one.key in metrics}
                self._shown.show(step, found, self._rate)

    def _speed(self):
        self._rate = rate = self._timed_steps / self._seconds
        self._timed_steps, self._seconds = 0, 0.0
        peak = peak_flops(jax.devices()[0].device_kind)
        speed = {TOKENS_PER_S.key: rate * self._tokens}
        if peak:
            speed[MFU.key] = rate * self._flops / (peak * jax.device_count())
        return speed

    @contextlib.contextmanager
    def paused(self):
        """The time in here is not the training's; lines printed in here do not tear the bar."""
        self._seconds += time.perf_counter() - self._since
        with self._shown.external():
            yield
        self._since = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._shown.close()


class _Bar:
    """On a terminal, on its last line."""

    def __init__(self, first, last):
        hidden = jax.process_index() > 0
        self._bar = tqdm(initial=first, total=last, unit="step", dynamic_ncols=True, smoothing=0.05, disable=hidden)
        self.advance = self._bar.update
        self.say = self._bar.write
        self.external = tqdm.external_write_mode
        self.close = self._bar.close

    def show(self, step, found, rate):
        del step, rate  # the bar counts steps itself
        self._bar.set_postfix(found)


class _Lines:
    """In a log: whole lines, of which none is ever written over."""

    external = contextlib.nullcontext

    def __init__(self, first, last):
        del first
        self._last = last
        self._hidden = jax.process_index() > 0

    def advance(self):
        pass

    def say(self, line):
        print(line)

    def show(self, step, found, rate):
        if not self._hidden:
            numbers = ", ".join(f"{name} {value}" for name, value in found.items())
            left = tqdm.format_interval((self._last - step) / rate)
            print(f"step {step:,}/{self._last:,}: {numbers}, {left} left", file=sys.stderr)

    def close(self):
        pass


def _short(value):
    return f"{value:,.0f}" if 1000 <= abs(value) < np.inf else f"{value:.4g}"
