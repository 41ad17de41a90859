"""Leaving a run in an orderly way: the first SIGTERM or Ctrl-C is a request, to be read between two steps.

Between steps the state is whole, so what is saved then resumes bit-exactly; inside a step nothing
is worth saving. Of several processes all must leave after the same step: there jax takes the
SIGTERM of any one and names the step to all.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, true once it is time to leave; a SIGINT after the first request raises KeyboardInterrupt at once.

    `signal` tells which came first, None before. Leaving restores the handlers found on entry. Main
    thread only.
    """

    def __init__(self):
        self.signal = None
        self._asked = False
        self._several = jax.process_count() > 1
        # A request from before the first step is for step 1, also in a run that is resumed and
        # never comes by it.
        self._to_ask = [1]
        self._previous = {}

    def reached(self, step: int) -> bool:
        """Whether to leave after `step`, the same on every process; to be asked after each step."""
        if self._several and any(
            map(multihost_utils.reached_preemption_sync_point, [*self._to_ask, step])
        ):
            self.signal = signal.SIGTERM
        self._to_ask = []
        return bool(self)

    def __enter__(self):
        # With several processes a handler of SIGTERM would displace the one by which jax tells the
        # others.
        for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __bool__(self):
        return self.signal is not None

    def _note(self, number, _frame):
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever asks again does not want to wait for a checkpoint
        self._asked = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = self.signal or signal.Signals(number)
