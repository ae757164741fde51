"""Makes .venv: `make setup` (train and test call it first). Standard library only; runs on the system's Python.

Quick when nothing changed: .venv/.installed records the device and a digest of the requirement files, and the versions in
.venv are compared with those that are pinned. An installation that was interrupted leaves .venv/.unfinished behind and is
started again from nothing; one that could not be checked, or failed the check, is only checked again. A .venv that is not from
here is used as it is and never deleted.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(
        "error: Python 3.10 or newer is needed, this is %s (%s): install one and name it, make setup PYTHON=python3.12"
        % (platform.python_version(), sys.executable)
    )

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trainer.doctor import pins  # noqa: E402
from trainer.doctor.check_install import NOT_CHECKED  # noqa: E402
from trainer.kernels import build  # noqa: E402
from trainer.runtime import gpus  # noqa: E402 - these need the standard library only

# pip's arguments, call by call. On a CPU torchrec and fbgemm come without dependencies (why: cpu-engine.txt).
STEPS = {
    "cpu": [["-r", "requirements/cpu.txt"], ["--no-deps", "-r", "requirements/cpu-engine.txt"]],
    "cuda": [["-r", "requirements/cuda.txt"]],
}
SYSTEM_PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge", "chromium": "chromium"}  # by program
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])  # where Debian puts daemons
NO_TORCH = """\
pip found no {wanted} for Python {python} on {machine}.
  PyTorch's {device} builds may lie on an index of their own. Take its address from PyTorch's website, "Get started"
  (choose Pip and {device}; the address follows --index-url), and run
      make setup DEVICE={lower} TORCH_INDEX=<address>
  or configure pip once (PIP_EXTRA_INDEX_URL=<address>, or pip config set global.extra-index-url <address>).
  Then run the same command again."""
NO_VENV = """\
this Python ({executable}) cannot make virtual environments: its modules {missing} are missing.
  Debian and Ubuntu: sudo apt install python3-venv. Elsewhere: install a complete Python 3.10 or newer.
  Then run the same command again, or name another Python: make setup PYTHON=python3.12"""
NO_COMPILER = """\
pip had to build a package from source and found no working compiler (its message is above).
  Debian and Ubuntu: sudo apt install build-essential python3-dev. Or use a Python version for which all packages are
  prebuilt, such as 3.11 or 3.12: make clean setup PYTHON=python3.12"""

COMMAND = """\
#!/bin/sh
# Made by make setup: the program of the folder that holds .venv.
bin=$(dirname -- "$(readlink -f -- "$0")")
exec "$bin/python" "$bin/../../launch/rank.py" trainer "$@"
"""
UNCHECKED, INCOMPLETE = "unchecked", "incomplete"  # in .installed
MOST_SHOWN = 5


class InstallError(Exception):
    """What went wrong and how to mend it."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make setup", description="Makes the virtual environment .venv.")
    parser.add_argument("--device", choices=tuple(STEPS), help="default: as installed, at first cpu")
    parser.add_argument("--torch-index", default="", help="a further package index to look for torch in")
    parser.add_argument("--tests", action="store_true", help="what only tests use: PySpark; on CI Slurm and a browser")
    options = parser.parse_args()
    try:
        with _one_at_a_time(ROOT / "requirements"):
            ensure(ROOT, options.device, options.torch_index)
            write_command(ROOT)
            compile_kernels()
            if options.tests:
                ensure_spark(ROOT)
                ensure_system_packages()
    except InstallError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInstallation interrupted: the same command starts it again.", file=sys.stderr)
        return 130
    return 0


def ensure(root: Path, device: str | None, torch_index: str) -> None:
    """Installs unless .venv is already as wanted, and checks what has not been checked. Raises ``InstallError``."""
    environment = root / ".venv"
    stamp, unfinished = environment / ".installed", environment / ".unfinished"
    recorded = stamp.read_text().split() if stamp.is_file() else []
    device = device or (recorded[0] if recorded else "cpu")
    wanted = [device, digest(root, device)]
    works = (environment / "bin" / "python").exists()
    is_current = recorded[:2] == wanted and works and not unfinished.exists()
    if not is_current or _report(differing(root, device)):
        _install_anew_or_over(root, device, torch_index, recorded, works)
        stamp.write_text(" ".join([*wanted, UNCHECKED]) + "\n")
        unfinished.unlink(missing_ok=True)
    elif UNCHECKED not in recorded or not (device == "cpu" or gpus.has_driver()):
        return
    if check(root, device):
        stamp.write_text(" ".join(wanted) + "\n")


def write_command(root: Path) -> None:
    """``.venv/bin/clicktrainer``. (A script, not `pip install -e .`: nothing is resolved or built, and it follows its folder.)"""
    path = root / ".venv" / "bin" / "clicktrainer"
    path.write_text(COMMAND)
    path.chmod(0o755)


def compile_kernels() -> None:
    """Those of ``trainer/kernels`` for this CPU. Training works without them, so a failure is no error."""
    if build.find() is None:
        print("Compiling kernels for this CPU", flush=True)
    try:
        build.ensure()
    except build.BuildError as error:
        print(f"note: no compiled kernels: {error}. Training on CPUs is slower without them", file=sys.stderr)


def check(root: Path, device: str) -> bool:
    """Whether what is installed has been checked: not on a machine without a driver. Raises ``InstallError``."""
    python = str(root / ".venv" / "bin" / "python")
    code, _ = _run([python, "-m", "trainer.doctor.check_install", "--device", device], root)
    if code not in (0, NOT_CHECKED):
        raise InstallError("the packages are installed, but cannot train: see above")
    return code == 0


def differing(root: Path, device: str) -> list[str]:
    """The packages of .venv that are not of the pinned version, a line each; nothing of one that takes packages from
    elsewhere."""
    environment = root / ".venv"
    settings = environment / "pyvenv.cfg"
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text():
        return []
    return pins.differing(environment, _requirements(root, device))


def _report(differing: list[str]) -> list[str]:
    if differing:
        more = f" and {len(differing) - MOST_SHOWN} more" if len(differing) > MOST_SHOWN else ""
        shown = ", ".join(differing[:MOST_SHOWN]) + more
        print(f".venv has been changed: {shown}; installing the pinned versions", flush=True)
    return differing


def _install_anew_or_over(root: Path, device: str, torch_index: str, recorded: list[str], works: bool) -> None:
    environment = root / ".venv"
    stamp, unfinished = environment / ".installed", environment / ".unfinished"
    reason = _reason_to_start_anew(unfinished.exists(), recorded, device, works)
    if reason:
        print(f"{reason}: recreating .venv")
        shutil.rmtree(environment)
    elif environment.exists() and not works:
        raise InstallError(f"{environment} is there, but holds no Python and is not from here: move it away")
    is_new = not environment.exists()
    if is_new:
        environment.mkdir()
        unfinished.touch()
    elif recorded:  # where this fails, the same is tried again: nothing is deleted
        stamp.write_text(f"{device} {INCOMPLETE}\n")
    install(root, device, torch_index)
    if is_new or recorded:
        constrain(root, device)


def ensure_spark(root: Path) -> None:
    """PySpark, where it can run. Without it the tests of that engine are skipped, so a failure is no error."""
    stamp, requirements = root / ".venv" / ".spark", root / "requirements" / "spark.txt"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if shutil.which("java") is None or (stamp.is_file() and stamp.read_text() == wanted):
        return
    print("Installing PySpark (Java is here): about 450 MB", flush=True)
    python = str(root / ".venv" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-r", "requirements/spark.txt"]
    if _run(command, root)[0]:
        print("note: PySpark could not be installed; the tests of engine=spark are skipped", file=sys.stderr)
        return
    stamp.write_text(wanted)


def ensure_system_packages() -> None:
    """Slurm and a browser, on a Debian that is CI's own: nobody's machine is changed without being asked. Without them
    their tests are skipped, so a failure is no error."""
    missing = [
        package for program, package in SYSTEM_PACKAGES.items() if shutil.which(program, path=SYSTEM_PATH) is None
    ]
    if not (missing and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get")):
        return
    print(f"Installing {' and '.join(missing)} for the tests (CI is set)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        try:
            command = ["apt-get", "-qq", *arguments]
            code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=300).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            print(f"note: {' '.join(missing)} could not be installed; their tests are skipped", file=sys.stderr)
            return


def install(root: Path, device: str, torch_index: str) -> None:
    """The environment, the packages, the check."""
    python = str(root / ".venv" / "bin" / "python")
    if not os.path.exists(python):
        _make_environment(root / ".venv")
    if _run([python, "-m", "pip", "--version"], root, quiet=True)[0]:
        raise InstallError(f"{root / '.venv'} has no pip: run {python} -m ensurepip, or remove .venv, and try again")
    index = ["--extra-index-url", torch_index] if torch_index else []
    for arguments in STEPS[device]:
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", *index, *arguments]
        code, errors = _run(command, root)
        if code:
            raise InstallError(explain(errors, device))


def constrain(root: Path, device: str) -> None:
    """Has every later `pip install` into .venv keep to the pinned versions, by a list of constraints in pip's settings for this
    environment. Constraints that the machine or its user has set hold beside it; PIP_CONSTRAINT in the environment holds
    alone, as pip has it."""
    environment = root / ".venv"
    ours = environment / "constraints.txt"
    ours.write_text("\n".join(pins.lines(_requirements(root, device))) + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "config"]
    theirs = _settings([*pip, "--global", "list"], root) | _settings([*pip, "--user", "list"], root)
    for section in ("global", "install"):  # what stands under install hides what stands under global
        key = f"{section}.constraint"
        if section == "global" or key in theirs:
            both = " ".join([*theirs.get(key, "").split(), ours.as_uri()])  # a URI has no spaces, at which pip splits
            if _run([*pip, "--site", "set", key, both], root, quiet=True)[0]:
                print(f"note: {ours} could not be named in pip's settings; give it to pip: -c {ours}", file=sys.stderr)


def _settings(command: list[str], folder: Path) -> dict[str, str]:
    """What `pip config list` prints: key='value'."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            found[key.strip()] = str(ast.literal_eval(value))
    return found


def digest(root: Path, device: str) -> str:
    """Of all that decides what is installed for a device."""
    files = sorted({*_requirements(root, device), root / "requirements" / "common.txt"})
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


def _requirements(root: Path, device: str) -> list[Path]:
    """The requirement files that are named to pip."""
    return [root / argument for step in STEPS[device] for argument in step if argument.endswith(".txt")]


def explain(errors: str, device: str) -> str:
    """A remedy for what pip wrote on stderr."""
    missing = re.search(r"No matching distribution found for (torch(?![\w-])\S*)", errors)
    if missing:
        wanted, machine = missing.group(1).rstrip(";"), f"{platform.system()} {platform.machine()}"
        python = ".".join(platform.python_version_tuple()[:2])
        return NO_TORCH.format(wanted=wanted, python=python, machine=machine, device=device.upper(), lower=device)
    missing = re.search(r"No matching distribution found for (\S+)", errors)
    if missing:
        return (
            f"pip found no {missing.group(1)} (its message is above): check the network and pip's index settings "
            "(pip config list), then run the same command again"
        )
    if re.search(r"command '\S*(cc|gcc|clang|g\+\+|c\+\+)\S*' failed|Unknown compiler|compiler .*not found", errors):
        return NO_COMPILER
    return "pip failed (its message is above): mend that and run the same command again"


def _reason_to_start_anew(unfinished: bool, recorded: list[str], device: str, works: bool) -> str | None:
    """Why an environment of ours must go (None: it may stay, or is not ours)."""
    if unfinished:
        return "The last installation did not finish"
    if recorded and not works:
        return "The Python of .venv is gone"
    if recorded and recorded[0] != device:
        return f".venv was made for {recorded[0]}, and CPU and CUDA builds cannot share one"
    return None


def _make_environment(environment: Path) -> None:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(NO_VENV.format(executable=sys.executable, missing=" and ".join(missing)))
    print(f"Making .venv with Python {platform.python_version()}", flush=True)
    code, _ = _run([sys.executable, "-m", "venv", str(environment)], environment.parent)
    if code:
        raise InstallError(NO_VENV.format(executable=sys.executable, missing="venv or ensurepip (see above)"))


def _run(command: list[str], folder: Path, quiet: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a command, which shows its output as it runs (a terminal's progress bars included)."""
    output = subprocess.DEVNULL if quiet else None
    # close_fds=False hands the lock on: a pip that outlives us still keeps the next installation waiting.
    process = subprocess.Popen(
        command, cwd=folder, stdout=output, stderr=subprocess.PIPE, text=True, errors="replace", close_fds=False
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if not quiet:
                sys.stderr.write(line)
        return process.wait(), "".join(lines)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


@contextlib.contextmanager
def _one_at_a_time(folder: Path):
    """Two installations at once (make train beside make test) would spoil one .venv: the second waits."""
    handle = os.open(folder, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another installation is under way: waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            print(f"note: no lock on {folder} here ({error.strerror}): run one installation at a time", file=sys.stderr)
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
