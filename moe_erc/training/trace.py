"""An XProf trace of three steps of a run, to be looked at with `xprof` or TensorBoard."""

import jax


class Trace:
    """Traces three steps from `first` on, or fewer at the end of the run.

    steps: (those done before, the last one). A run that does not come by `first` traces nothing.
    Every process traces its own devices.
    """

    def __init__(self, directory, first, steps):
        done, last = steps
        self._directory = str(directory)
        self._first = None
        self._last = None
        if done < first <= last:
            self._first = first
            self._last = min(first + 2, last)

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first traced one; to be called before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)

    def after(self, step: int) -> None:
        """Writes the trace if `step` is the last traced one; to be called after each step."""
        if step == self._last:
            jax.profiler.stop_trace()
