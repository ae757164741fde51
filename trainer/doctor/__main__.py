"""Runs all checks and prints a line each, or JSON; ends with exit code 0, or 1 where anything fails."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import NoReturn

from trainer.config import arguments
from trainer.doctor import machine, places, processes
from trainer.doctor.finding import FAIL, WARN, Finding, bounded, shown


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments.doctor().parse_intermixed_args(argv)
    if options.gpu:
        from trainer.doctor import gpu  # here, as it loads NumPy, which may be what is broken

        return gpu.main(options.folder, options.timeout, options.json)
    found = []
    for finding in findings(options):
        found.append(finding)
        if not options.json:
            print(shown(finding, colour=sys.stdout.isatty()), flush=True)
    failures, warnings = (sum(each.state == state for each in found) for state in (FAIL, WARN))
    if options.json:
        print(json.dumps({"ok": not failures, "findings": [asdict(each) for each in found]}, indent=2))
    else:
        print(f"{len(found)} checks: {failures} failed, {warnings} warnings")
    return int(failures > 0)


def findings(options: argparse.Namespace) -> Iterator[Finding]:
    """One check after the other, the quick ones first."""
    seconds, device, count = options.timeout, options.device, []

    def gpus() -> list[Finding]:
        found, number = processes.gpus(device, seconds)
        count.append(number)
        return found

    checks = {
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "open files": machine.open_files,
        "cores": machine.cores,
        "clock": machine.clock,
        "kernels": machine.compiled_kernels if device != "cuda" else list,
        "disk": lambda: places.disk(options.folder),
        "installation": lambda: processes.installation(device, seconds),
        "GPUs": gpus if device != "cpu" else list,
        "gloo": lambda: processes.collectives("gloo", options.ranks, seconds),
        "nccl": lambda: processes.collectives("nccl", count[0], seconds) if any(count) else [],
        "data.root": lambda: places.data_root(options.data_root) if options.data_root else [],
    }
    for name, check in checks.items():
        yield from bounded(name, check, seconds + 30)  # processes keep to the limit by themselves


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Ends the process: a check that hangs has left its thread behind."""
    try:
        code = main(argv)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    program()
