"""Runs all checks and prints a line each, or JSON; ends with exit code 0, or 1 where anything fails."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.doctor import machine, places, processes
from trainer.doctor.finding import FAIL, WARN, Finding, bounded, shown


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.doctor", description="Is this machine fit to train?")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is to train here (default: what there is)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs go (default: runs)")
    parser.add_argument("--data-root", help="a data.root to be read: a folder or a URI")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the round trip on the CPU (default: 2)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds that any one check may take (default: 120)"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="some minutes on GPUs: all that training needs, and FOLDER/doctor-gpu.json"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


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
        "disk": lambda: places.disk(options.folder),
        "installation": lambda: processes.installation(device, seconds),
        "GPUs": gpus if device != "cpu" else list,
        "gloo": lambda: processes.collectives("gloo", options.ranks, seconds),
        "nccl": lambda: processes.collectives("nccl", count[0], seconds) if any(count) else [],
        "data.root": lambda: places.data_root(options.data_root) if options.data_root else [],
    }
    for name, check in checks.items():
        yield from bounded(name, check, seconds + 30)  # processes keep to the limit by themselves


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)  # a check that hangs has left its thread behind
