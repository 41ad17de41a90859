"""train.py with a pause in every step: a signal reaches it before its end, however fast it is."""

import runpy
import time

from moe_erc.training.progress import Progress

PAUSE = 0.03  # seconds
add = Progress.add


def add_slowly(self, step, metrics):
    time.sleep(PAUSE)
    add(self, step, metrics)


Progress.add = add_slowly
runpy.run_path("train.py", run_name="__main__")
