"""Which GPUs and drivers the pinned PyTorch and FBGEMM run on. Knows neither of them: whoever asks PyTorch brings its answers.

FBGEMM 1.6 and 1.8 hold machine code for compute capability 8.0, 9.0 and 10.0 and nothing that a driver could translate for
others (no PTX). Code for 8.0 runs on all of 8.x, and so on. On another GPU the first lookup fails.
"""

import ctypes
import re

from data_loaders.messages import one_line
from data_loaders.packages import DRIVER_LIBRARY

GENERATIONS = (8, 9, 10)
RUNS_ON = "GPUs of compute capability 8.x, 9.x and 10.x, such as A100, L4, L40S, H100, H200, B200"
DRIVERS = {12: "525", 13: "580"}  # the oldest for a CUDA of that number


def has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def has_code(capability: tuple[int, int]) -> bool:
    """Whether FBGEMM can look up rows on a GPU of that compute capability."""
    return capability[0] in GENERATIONS


def refusal(name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot train; None for one that can."""
    if has_code(capability):
        return None
    major, minor = capability
    return f"{name} has compute capability {major}.{minor}, for which FBGEMM has no code: it runs on {RUNS_ON}"


def explain_start(message: str, build: str | None) -> str:
    """One line for what PyTorch raises where it cannot start CUDA. ``build``: ``torch.version.cuda``."""
    too_old = re.search(r"driver on your system is too old \(found version (\d+)\)", message)
    if too_old is None:
        return f"PyTorch cannot start CUDA ({one_line(message, 200)}): look at nvidia-smi and dmesg"
    found = int(too_old.group(1))
    return (
        f"the NVIDIA driver is too old: it knows CUDA {found // 1000}.{found % 1000 // 10}, and torch is built for CUDA "
        f"{build}; {needed_driver(build)}"
    )


def needed_driver(build: str | None) -> str:
    """What to install for a torch built for CUDA ``build``."""
    major = int((build or "0").split(".")[0])
    wanted = f"driver {DRIVERS[major]} or newer" if major in DRIVERS else "a newer driver"
    return f"install {wanted} (nvidia-smi shows the one that is there; a module such as cuda/12.8 brings none)"
