"""Leaving a run in an orderly way: the first SIGTERM or Ctrl-C is a request, to be read between two steps.

Between steps the state is whole, so what is saved then resumes bit-exactly; inside a step nothing is worth saving.
"""

import signal


class StopRequest:
    """While entered, true once SIGTERM or SIGINT has come; a SIGINT after that raises KeyboardInterrupt at once.

    `signal` tells which came first, None before. Leaving restores the handlers found on entry. Main thread only.
    """

    def __init__(self):
        self.signal = None
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __bool__(self):
        return self.signal is not None

    def _note(self, number, _frame):
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever asks again does not want to wait for a checkpoint
        self.signal = self.signal or signal.Signals(number)
