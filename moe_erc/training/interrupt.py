"""How a run is left in an orderly way: SIGTERM or Ctrl-C is a request that is read between steps.

Between steps the state is whole, so what is saved then resumes bit-exactly. Several processes must
all leave after the same step. There jax takes the SIGTERM of any one and names the step to all.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """A context that is true once it is time to leave.

    A SIGINT after the first request raises KeyboardInterrupt at once. `signal` is the signal that
    came first, None before. On exit the handlers found on entry are restored. For the main thread
    only.
    """

    def __init__(self):
        self.signal = None
        self._was_asked = False
        self._is_one_of_several = jax.process_count() > 1
        # Jax counts a request from before the first step for step 1, which a resumed run never
        # reaches: step 1 is asked for once.
        self._to_ask = [1]
        self._previous = {}

    def reached(self, step: int) -> bool:
        """Whether to leave after `step`, the same on every process; to be asked after each step."""
        if self._is_one_of_several:
            for number in (*self._to_ask, step):
                if multihost_utils.reached_preemption_sync_point(number):
                    self.signal = signal.SIGTERM
                    break
        self._to_ask = []
        return bool(self)

    def __enter__(self):
        # With several processes a handler of SIGTERM would displace the one by which jax tells the
        # others.
        numbers = [signal.SIGINT]
        if not self._is_one_of_several:
            numbers.append(signal.SIGTERM)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __bool__(self):
        return self.signal is not None

    def _note(self, number, _frame):
        if self._was_asked and number == signal.SIGINT:
            # Whoever asks again does not want to wait for a checkpoint.
            raise KeyboardInterrupt
        self._was_asked = True
        if self._is_one_of_several:
            # Jax takes a SIGTERM for all processes, and no SIGINT.
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.signal is None:
            self.signal = signal.Signals(number)
