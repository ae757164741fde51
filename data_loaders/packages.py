"""Errors about packages that are missing or do not load: one line with the remedy. Standard library only, as it runs when
nothing else can be imported."""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from data_loaders.messages import USER_ERROR, fail, one_line

ROOT = Path(__file__).absolute().parents[1]
OURS = ("bench", "conf", "data_loaders", "launch", "tests", "trainer")
# By what they are imported as, where pip calls them otherwise.
NAMES = {
    "fbgemm_gpu": "fbgemm-gpu",
    "hydra": "hydra-core",
    "ibis": "ibis-framework",
    "jinja2": "Jinja2",
    "yaml": "PyYAML",
}
ENGINE = ("torch", "torchrec", "fbgemm-gpu", "tensordict")  # what `pip install .` leaves out
DRIVER_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver; FBGEMM's CUDA build is linked to it
LOADING = ("cannot open shared object file", "undefined symbol", "Could not load this library")


def is_program() -> bool:
    """Whether Python is on its way to a module that it runs (``python -m``)."""
    return sys.argv[:1] == ["-m"]


def explain_missing() -> None:
    """From here on, an error that is only a package that is missing ends the program in one line and exit code 2."""
    before = sys.excepthook
    if before.__module__ == __name__:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = explanation(error)
        if message is None:
            return before(kind, error, trace)
        fail(message)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(USER_ERROR)  # Python would end with 1

    sys.excepthook = hook


def explanation(error: BaseException) -> str | None:
    """One line for a package that is missing, of another version, or does not load; None for other errors, among them those
    in our own code or a user's."""
    if isinstance(error, ImportError):
        return _of_import(error)
    said = [str(each) for each in _chain(error)]
    if isinstance(error, OSError) and any(sign in each for each in said for sign in LOADING):
        return _of_loading(_package_in(error), next(each for each in reversed(said) if each))
    return None


def remedy(package: str) -> str:
    """How a package gets to where this runs from."""
    environment = ROOT / ".venv"
    if not (ROOT / "requirements" / "install.py").is_file():
        whole = f"pip install '.[cuda]' in the project's folder, or pip install {package}"
        return whole if package in ENGINE else f"pip install {package}"
    if (environment / "bin" / "python").exists() and not os.path.samefile(sys.prefix, environment):
        return f"this is {sys.executable}: start it by {environment / 'bin' / 'python'}, which `make setup` has made"
    return "run `make setup`" if _is_pinned(package) else f"{sys.executable} -m pip install {package}"


def _is_pinned(package: str) -> bool:
    """Whether `make setup` installs it; what a user's own model needs it does not know."""
    lines = (line for path in (ROOT / "requirements").glob("*.txt") for line in path.read_text().splitlines())
    names = {re.split(r"[\s=<>!~;\[]", line, maxsplit=1)[0] for line in lines}
    return _plain(package) in map(_plain, names)


def _plain(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _of_import(error: ImportError) -> str | None:
    module = error.name or ""
    top = module.partition(".")[0]
    if not top or top in OURS:
        return None
    package = NAMES.get(top, top)
    if top in sys.stdlib_module_names:
        return f"this Python ({sys.executable}) lacks its own module {module}: install a complete Python 3.10 or newer"
    if not isinstance(error, ModuleNotFoundError):
        return _of_loading(package, str(error))
    if module == top:
        return f"the package {package} is not installed ({_asked_by(error)} needs it): {remedy(package)}"
    if _is_there(top):
        return (
            f"the package {package} is here, but not its module {module}: another version is needed: {remedy(package)}"
        )
    return None


def _of_loading(package: str, message: str) -> str:
    if DRIVER_LIBRARY in message:
        return (
            f"the package {package} does not load without an NVIDIA driver ({DRIVER_LIBRARY}), as it is the CUDA build: start "
            "it on a machine with a driver (in a container: --gpus all), or install with DEVICE=cpu"
        )
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    check = "python -m trainer.doctor.check_install says whether the packages fit"
    return f"the package {package} does not load ({one_line(first, 200)}): {remedy(package)}; {check}"


def _asked_by(error: BaseException) -> str:
    """The innermost file of a program, ours or a user's, that asks for what is missing."""
    files = [name for name in _frames(error) if name.endswith(".py") and not _is_library(name)]
    path = Path(files[-1]) if files else Path(sys.argv[0])
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _package_in(error: BaseException) -> str:
    """The library whose code raised an error, by the files' paths."""
    for frame in reversed(_frames(error)):
        parts = Path(frame).parts
        if "site-packages" in parts[:-1]:
            top = parts[len(parts) - 1 - parts[::-1].index("site-packages") + 1]
            if top not in ("torch", *OURS) or not frame.endswith(("_ops.py", "ctypes.py")):
                return NAMES.get(top, top.removesuffix(".py"))
    return "torch"


def _frames(error: BaseException) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def _chain(error: BaseException | None) -> Sequence[BaseException]:
    """An error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _is_library(name: str) -> bool:
    inside = Path(name).is_relative_to(ROOT) and Path(name).relative_to(ROOT).parts[0] in OURS
    return name.startswith("<") or (not inside and ("site-packages" in name or "/lib/python3" in name))


def _is_there(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False
