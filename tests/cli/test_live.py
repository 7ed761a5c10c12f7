"""What a terminal shows while text is generated: the text whole, and a line below it."""

import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from bigmodel.cli import app
from bigmodel.cli.live import bottom_line

ASIDE = re.compile(r"(?:\x1bD\x1b\[1A)?\x1b7.*?\x1b8", re.DOTALL)
LINE = re.compile(r"\x1b\[24;1H\x1b\[2K\x1b\[2m[a-z ]+ [\d.]+ \w+/s, \d+% of [a-z ]+(: .*)?\x1b\[0m\x1b8$")
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def on_terminal(command, *, stdout=None, env=ENVIRONMENT):
    """What a terminal of 24 rows gets of a command whose stderr, and stdout where none is given, it is; its status; stdout."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "rows", "24", "cols", "120"], stdin=theirs, check=True)
    process = subprocess.Popen(command, stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown, other = bytearray(), []
    reader = threading.Thread(target=lambda: other.append(process.stdout.read())) if stdout else None
    if reader:
        reader.start()
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # nobody has it open any more
            break
        if not data:
            break
        shown += data
    os.close(ours)
    status = process.wait(timeout=60)
    if reader:
        reader.join()
        process.stdout.close()
    return shown.decode().replace("\r\n", "\n"), status, b"".join(other).decode()


@pytest.mark.parametrize("is_piped", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.long])])
def test_the_line_never_stands_in_the_text(tiny_llama, is_piped):
    arguments = ["run", str(tiny_llama), "--prompt", "the quick brown", "-n", "150", "--device-map", "disk"]
    expected = CliRunner().invoke(app, arguments).stdout
    command = [sys.executable, "-m", "bigmodel", *arguments]
    shown, status, piped = on_terminal(command, stdout=subprocess.PIPE if is_piped else None)
    assert status == 0, shown
    lines = [aside for aside in ASIDE.findall(shown) if "% of " in aside]
    assert lines, shown[-2000:]
    assert all(LINE.search(each) for each in lines)
    assert "\x1b[r\x1b[24;1H\x1b[2K" in ASIDE.findall(shown)[-1]  # all rows scroll again
    plain = ASIDE.sub("", shown)
    assert expected in (piped if is_piped else plain)
    assert "% of " in plain.partition("TTFT")[2]
    if is_piped:
        assert piped == expected


@pytest.mark.parametrize(("terminal", "enabled"), [("dumb", True), ("xterm", False)])
def test_quiet_and_plain_terminals_have_no_line(monkeypatch, terminal, enabled):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", terminal)
    with os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with bottom_line(lambda: "disk", enabled=enabled):
            time.sleep(0.7)
        monkeypatch.undo()
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    os.close(ours)


def test_the_line_is_told_twice_a_second_and_from_its_first_text_on(monkeypatch):
    ours, theirs = pty.openpty()
    times = []

    def text():
        times.append(time.perf_counter())
        return "" if len(times) < 2 else "disk"

    monkeypatch.setenv("TERM", "xterm")
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=theirs, check=True)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with bottom_line(text):
            time.sleep(1.8)
        monkeypatch.undo()
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert 2 <= len(times) <= 3
    assert shown.count("disk") == len(times) - 1
    assert shown.count("\x1b[1;23r") == 1
