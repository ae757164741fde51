"""What a launcher started hears of signals once, and does not outlive the launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import warm
from tests.helpers.tiny import REPOSITORY

CHILD = """
import os, signal, time
heard = 0
def hear(*_):
    global heard
    heard += 1
signal.signal(signal.SIGTERM, hear)
os.write(1, b"ready %d\\n" % os.getpid())
while not heard:
    time.sleep(0.02)
time.sleep(0.3)
os.write(1, b"heard %d\\n" % heard)
raise SystemExit(5)
"""
LAUNCHER = """
import sys
from launch.children import Children
with Children() as children:
    code = children.call([sys.executable, "-c", sys.argv[1]])
raise SystemExit(code)
"""


FAILING = """
import sys, time
from launch.children import Children
with Children() as children:
    try:
        children.start(["true"], cwd="/absent")
    except OSError:
        pass
    children.start([sys.executable, "-c", sys.argv[1]], stdin=-3)
    sys.stdin.readline()
    while sys.argv[2:] and not children.stopped:
        time.sleep(0.02)
    raise RuntimeError("a bug of ours")
"""


def start(words=(sys.executable, "-c", LAUNCHER, CHILD), ignored=(), **options):
    """``ignored``: signals that it is started with as ignored; SIGHUP is not one of them, although pytest may run under nohup."""

    def dispositions():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    launcher = subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=dispositions,
        **options,
    )
    word, pid = launcher.stdout.readline().split()
    assert word == "ready"
    return launcher, psutil.Process(int(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_reaches_the_child_once_however_the_launcher_ends(number):
    launcher, child = start()
    launcher.send_signal(number)
    said, _ = launcher.communicate(timeout=warm.PATIENCE)
    assert said == "heard 1\n"
    assert launcher.returncode == (-number if number == signal.SIGKILL else 128 + number)
    while (
        child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ):  # of a launcher that is killed it is the last step
        assert number == signal.SIGKILL
        time.sleep(0.02)


def test_a_signal_that_the_launcher_was_started_to_ignore_stays_ignored():
    launcher, _ = start(ignored=[signal.SIGHUP])
    launcher.send_signal(signal.SIGHUP)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=warm.PATIENCE)[0] == "heard 1\n" and launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("stopped", [(), ("stopped",)])
def test_an_error_of_the_launchers_asks_the_child_once_and_waits_for_it(stopped):
    """Also where one could not be started, and where a signal came before the error."""
    launcher, child = start(
        [sys.executable, "-c", FAILING, CHILD, *stopped], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if stopped:
        launcher.send_signal(signal.SIGTERM)
    said, error = launcher.communicate("go on\n", timeout=warm.PATIENCE)
    assert said == "heard 1\n" and error.endswith("RuntimeError: a bug of ours\n") and launcher.returncode == 1
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_exit_code_is_the_childs_where_no_signal_came():
    words = [sys.executable, "-c", LAUNCHER, "raise SystemExit(7)"]
    assert subprocess.run(words, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}).returncode == 7
