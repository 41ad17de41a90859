"""What is shown of a step: a bar on a terminal, lines in a log."""

import io

import numpy as np
import pytest

from moe_erc.training.guard import IN_A_ROW, SKIPPED, ZSCORE, GuardConfig
from moe_erc.training.progress import Progress


class Writer:
    def write(self, step, metrics):
        pass


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def metrics(loss):
    told = {ZSCORE.key: 0.0, SKIPPED.key: 0, IN_A_ROW.key: 0}
    return told | {"loss/total": np.float32(loss), "loss/lm": np.float32(2.5), "router/max_load": np.array([1.5, 2.0])}


def shown(terminal, monkeypatch, steps=200, every=10, bad=()):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(Writer(), every, (0, steps), (1000, 1.0), GuardConfig(nonfinite="skip")) as progress:
        for step in range(1, steps + 1):
            progress.add(step, metrics(np.nan if step in bad else 3.25))
            if step % every == 0:
                progress.flush()
            if step == steps // 2:
                with progress.paused():
                    pass
    return screen.getvalue()


def test_a_log_has_a_line_every_so_many_steps_and_no_carriage_return(monkeypatch, capsys):
    text = shown(False, monkeypatch, bad=(15,))
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/200" for step in range(10, 201, 10)]
    assert all(": total 3.25, lm 2.5, max_load 2, tokens_per_s " in line and line.endswith(" left") for line in lines)
    assert lines[-1].endswith("00:00 left")
    assert "step 15: not finite: loss/total" in capsys.readouterr().out


def test_a_terminal_has_a_bar(monkeypatch):
    text = shown(True, monkeypatch)
    assert "\r" in text and "200/200" in text and "total=3.25" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(terminal, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert shown(terminal, monkeypatch) == ""
