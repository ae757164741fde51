"""A trial's program that trains nothing: its metric follows from its learning rate, best at 1e-3."""

import math
import signal
import sys

from launch.sweep.running import Runner

PROGRAM = """
import json, os, signal, sys, time
folder, value, mode, evaluations, seconds, share = sys.argv[1:]
value, evaluations, seconds = float(value), int(evaluations), float(seconds)

def status(state):
    json.dump({"state": state}, open(folder + "/status.json", "w"))

def stop(*_):
    status("preempted")
    note("stopped")
    os._exit(143)

def note(what):
    with open(folder + "/notes.jsonl", "a") as file:
        file.write(json.dumps([what, time.monotonic(), share]) + chr(10))

signal.signal(signal.SIGTERM, stop)
status("running")
note("started")
if mode == "mistake":
    print("error: batch_size is 7: no", file=sys.stderr)
    sys.exit(2)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
for number in range(1, evaluations + 1):
    with open(folder + "/metrics.jsonl", "a") as file:
        line = {"step": 10 * number, "rows_trained": 100 * number, "split": "valid", "auc": value * number / evaluations}
        file.write(json.dumps(line) + chr(10))
    time.sleep(seconds)
json.dump({"valid": {"auc": value, "logloss": 1 - value}}, open(folder + "/metrics.json", "w"))
status("finished")
note("ended")
"""


def auc(rate):
    return 0.9 - 0.05 * (math.log10(float(rate)) + 3) ** 2


def command(modes=(), evaluations=1, seconds=0.0):
    """``modes``: number of a trial -> how it fails."""

    def made(trial, share):
        mode = dict(modes).get(trial.number, "well")
        value = auc(trial.values["lr"])
        shown = ",".join([*share.gpus, *map(str, share.cores)])
        return [
            sys.executable,
            "-c",
            PROGRAM,
            str(trial.folder),
            str(value),
            mode,
            str(evaluations),
            str(seconds),
            shown,
        ]

    return made


def sweep(search, shares, made=None, metric="valid.auc"):
    runner = Runner(search, shares, made or command(), metric)
    runner.run(seconds=0.02)
    return runner


def signals_are_as_before():
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
