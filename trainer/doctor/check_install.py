"""`python -m trainer.doctor.check_install [--device cpu|cuda]`: do torch, torchrec and fbgemm load and work together?

Says in one line a mistake what is wrong and what to do about it. Exit codes: 0; 1 for a mistake; 3 where there is no NVIDIA
driver, which FBGEMM's CUDA build needs to load at all: all else is well, but nothing was computed.
"""

import argparse
import ctypes
import importlib.metadata
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data_loaders import packages
from trainer.doctor import pins
from trainer.runtime import gpus

# torch -> (torchrec, fbgemm): what was released, and is tested here, together.
TRIPLES = {"2.13": ("1.8", "1.8"), "2.11": ("1.6", "1.6")}
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
NOT_CHECKED = 3
ROOT = Path(__file__).resolve().parents[2]
ANEW = "run `make clean setup` (with DEVICE=cuda for GPUs)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.doctor.check_install", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="what the installation is meant for")
    device = parser.parse_args().device
    can_load = loads_here()
    needs_to_load = (check_imports, check_gpus, check_operators) if can_load else ()
    for check in (check_versions, check_build, *needs_to_load, check_requirements):
        problem = check(device)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    for line in changed_pins():
        print(f"note: {line}: `make setup` installs the pinned version", file=sys.stderr)
    found = {name: version(name) for name in ("torch", "torchrec", *FBGEMM)}
    told = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    if not can_load:
        print(
            f"Not checked, as there is no NVIDIA driver here ({packages.DRIVER_LIBRARY}): whether {told} work together"
        )
        return NOT_CHECKED
    print(f"Checked: {told} work together")
    return 0


def loads_here() -> bool:
    """Whether what FBGEMM's CUDA build is linked to is here: it comes with the driver."""
    if version("fbgemm-gpu") is None:
        return True
    try:
        ctypes.CDLL(packages.DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def changed_pins() -> list[str]:
    """Packages of .venv that something has changed since `make setup`; nothing where this is not that environment."""
    environment, files = ROOT / ".venv", ROOT / "requirements"
    python = pins.python_of(environment)
    if python is None or not (files / "common.txt").is_file() or not Path(sys.prefix).samefile(environment):
        return []
    return pins.changed(pins.pins([files / "common.txt"], python), pins.installed(environment))


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(device: str | None, version: Callable[[str], str | None] = version) -> str | None:
    """The three belong together, and there is one fbgemm."""
    missing = [name for name in ("torch", "torchrec") if version(name) is None]
    fbgemms = {name: version(name) for name in FBGEMM if version(name)}
    if missing or not fbgemms:
        return f"{' and '.join([*missing, *([] if fbgemms else ['fbgemm-gpu'])])} not installed: {ANEW}"
    if len(fbgemms) > 1:
        return f"both fbgemm-gpu and fbgemm-gpu-cpu are installed, and write into the same folder: {ANEW}"
    torch, torchrec, fbgemm = (_short(v) for v in (version("torch"), version("torchrec"), *fbgemms.values()))
    if TRIPLES.get(torch) != (torchrec, fbgemm):
        sets = " or ".join(f"torch {t}, torchrec {r}, fbgemm {f}" for t, (r, f) in TRIPLES.items())
        return f"torch {torch}, torchrec {torchrec} and fbgemm {fbgemm} do not belong together (known: {sets}): {ANEW}"
    if device == "cpu" and "fbgemm-gpu" in fbgemms:
        return f"fbgemm-gpu is the CUDA build, which does not load beside a CPU torch: {ANEW}"
    if device == "cuda" and "fbgemm-gpu-cpu" in fbgemms:
        return f"fbgemm-gpu-cpu cannot compute on GPUs: {ANEW}"
    return None


def check_build(device: str | None) -> str | None:
    """torch's build is that of the device."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return _does_not_load("torch", error)
    if device == "cpu" and torch.version.cuda:
        return f"torch {torch.__version__} is a CUDA build in a CPU installation: {ANEW}, or use DEVICE=cuda"
    if device == "cuda" and not torch.version.cuda:
        return (
            f"torch {torch.__version__} is not a CUDA build: pip took it from an index or folder of CPU builds; name "
            "one with CUDA builds, make clean setup DEVICE=cuda TORCH_INDEX=<address>"
        )
    return None


def check_gpus(device: str | None) -> str | None:
    """The GPUs here can train: CUDA starts on them, and FBGEMM has code for them."""
    import torch

    if device == "cpu" or not torch.version.cuda:
        return None
    if not torch.cuda.device_count():
        print("note: no GPU is visible here; the installation is checked on the CPU alone", file=sys.stderr)
    for index in range(torch.cuda.device_count()):
        try:
            problem = gpus.refusal(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        except (RuntimeError, AssertionError) as error:
            problem = gpus.explain_start(str(error), torch.version.cuda)
        if problem:
            return f"GPU {index} cannot be used: {problem}"
    return None


def check_imports(device: str | None) -> str | None:
    for name in ("fbgemm_gpu", "torchrec"):
        try:
            __import__(name)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            return _does_not_load(name, error)
    return None


def check_operators(device: str | None) -> str | None:
    """fbgemm's operators are registered and right; torchrec looks embeddings up through them."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # a deprecation that is torchrec's to mend
    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    where = torch.device("cuda" if device == "cuda" and torch.cuda.device_count() else "cpu")
    try:
        sums = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 1], device=where)).tolist()
        table = EmbeddingBagConfig(name="table", embedding_dim=4, num_embeddings=8, feature_names=["feature"])
        lengths, ids = torch.tensor([2, 0, 1], device=where), torch.tensor([1, 7, 3], device=where)
        features = KeyedJaggedTensor(keys=["feature"], values=ids, lengths=lengths)
        bags = EmbeddingBagCollection(tables=[table], device=where)
        pooled = bags(features).values()  # [3, 4]
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return _does_not_load("an operator of fbgemm", error)
    rows = bags.embedding_bags["table"].weight
    expected = torch.stack([rows[1] + rows[7], torch.zeros_like(rows[0]), rows[3]])
    if sums != [0, 2, 2, 3] or not torch.allclose(pooled, expected):
        return f"fbgemm computes wrong values on {where}: {ANEW}"
    return None


def check_requirements(device: str | None) -> str | None:
    """`pip check` of what the trainer needs. Not told: torchrec's wish for fbgemm's CUDA build, which a CPU installation leaves
    out. Only noted: wishes of packages that are not from here, such as MLflow's for an older pyarrow."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line and not line.startswith("No broken")]
    others = [line for line in lines if not (line.startswith("torchrec ") and "requires fbgemm-gpu," in line)]
    known = _ours()
    problems = [line for line in others if pins.normal(line.split()[0]) in known]
    for line in others:
        if line not in problems:
            print(f"note: {line} The trainer does not need that package.", file=sys.stderr)
    return f"packages do not fit together ({'; '.join(problems)}): {ANEW}" if problems else None


def _ours() -> set[str]:
    """The packages that are pinned, or, without the files that pin them, those that a package needs."""
    files = [path for path in (ROOT / "requirements").glob("*.txt") if path.name != "spark.txt"]
    python = sys.version_info[:2]
    if files:
        return {"clicktrainer", *pins.pins(files, python)}
    names = [re.split(r"[\s;<>=!~\[(]", each)[0] for each in importlib.metadata.requires("clicktrainer") or ()]
    return {"clicktrainer", *map(pins.normal, names)}


def _short(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(version.split("+")[0].split(".")[:2])


def _does_not_load(what: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{what} does not load ({first.strip()}): {ANEW}"


if __name__ == "__main__":
    sys.exit(main())
