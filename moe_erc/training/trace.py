"""An XProf trace of a run, to be looked at with `xprof` or TensorBoard: three steps, or fewer at the end of the run."""

import jax


class Trace:
    """Traces from step `first` on if a run of `steps`, (done before, last), comes by it.

    A process its own devices.
    """

    def __init__(self, directory, first, steps):
        done, last = steps
        self._directory = str(directory)
        self._steps = (first, min(first + 2, last)) if done < first <= last else (None, None)

    def before(self, step: int) -> None:
        """Starts with the first traced step."""
        if step == self._steps[0]:
            jax.profiler.start_trace(self._directory)

    def after(self, step: int) -> None:
        """Writes once the last traced step is over."""
        if step == self._steps[1]:
            jax.profiler.stop_trace()
