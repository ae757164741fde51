"""What a check finds, and checks that end in time whatever happens."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from data_loaders.messages import one_line

PASS, WARN, FAIL = "pass", "warn", "fail"
COLOURS = {PASS: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"}


@dataclass(frozen=True)
class Finding:
    """``state`` is one of pass, warn, fail; the latter two have a ``remedy``."""

    name: str
    state: str
    message: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.state == PASS or self.remedy, self


def passed(name: str, message: str) -> Finding:
    return Finding(name, PASS, message)


def warned(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, WARN, message, remedy)


def failed(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, FAIL, message, remedy)


def at_least(name: str, value: float, wanted: float, needed: float, message: str, remedy: str) -> Finding:
    """Fails below ``needed``, warns below ``wanted``."""
    if value >= wanted:
        return passed(name, message)
    return warned(name, message, remedy) if value >= needed else failed(name, message, remedy)


def bounded(name: str, check: Callable[[], list[Finding]], seconds: float) -> list[Finding]:
    """What ``check`` finds; a failure in its place where it raises, or does not end within ``seconds``. Its thread is left
    behind then: nothing ends a system call on a server that does not answer."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(check())
        except BaseException as error:  # noqa: BLE001 - whatever a broken machine raises
            message = f"could not be checked ({type(error).__name__}: {one_line(error, 300)})"
            found.append(failed(name, message, "mend what the message names, and run the doctor again"))

    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        remedy = "look for a disk, a network mount or a driver that does not answer (dmesg, df)"
        return [failed(name, f"no answer within {seconds:.0f} s", remedy)]
    return found


def shown(finding: Finding, *, colour: bool) -> str:
    """For a terminal: the line, and below it the remedy."""
    state = f"{COLOURS[finding.state]}{finding.state}\033[0m" if colour else finding.state
    line = f"{state}  {finding.name}: {finding.message}"
    return f"{line}\n      remedy: {finding.remedy}" if finding.remedy else line
