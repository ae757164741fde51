"""`python -m trainer.doctor.check_install [--device cpu|cuda] [--json]`: do torch, torchrec and fbgemm load and work together?

The one answer to that: `make setup` ends with it, and the doctor shows its findings among its own. Exit codes: 0; 1 where
something is wrong; 3 where there is no NVIDIA driver, which FBGEMM's CUDA build needs to load at all: all else is well, but
nothing was computed. With --json, for the doctor, 0 always: the findings say it. Without the packages it still runs: they are
imported where they are checked.
"""

import argparse
import importlib
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from data_loaders.messages import one_line
from trainer.doctor import pins
from trainer.doctor.finding import FAIL, Finding, failed, passed, shown, warned
from trainer.runtime import gpus

# torch -> (torchrec, fbgemm): what was released, and is tested here, together.
TRIPLES = {"2.13": ("1.8", "1.8"), "2.11": ("1.6", "1.6")}
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
SHOWN = ("torch", "torchrec", *FBGEMM, "numpy", "pyarrow")
NOT_CHECKED = 3
ROOT = Path(__file__).resolve().parents[2]
ANEW = "run `make clean setup` (with DEVICE=cuda for GPUs)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.doctor.check_install", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="what the installation is meant for")
    parser.add_argument("--json", action="store_true", help="print the findings as one line of JSON")
    options = parser.parse_args()
    found = list(findings(options.device))
    if options.json:
        print(json.dumps([asdict(finding) for finding in found]))
        return 0
    for finding in found:
        print(shown(finding, colour=sys.stdout.isatty()), flush=True)
    if any(finding.state == FAIL for finding in found):
        return 1
    return 0 if can_load() else NOT_CHECKED


def findings(device: str | None) -> Iterator[Finding]:
    there = ", ".join(f"{name} {number}" for name in SHOWN if (number := version(name)))
    yield passed("versions", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; {there}")
    loaded = can_load()
    checks = (check_versions, check_build, *((check_imports, check_gpus, check_operators) if loaded else ()))
    problem = next(filter(None, (check(device) for check in checks)), None)
    if problem:
        yield problem
    elif loaded:
        yield passed("installation", f"torch, torchrec and fbgemm load and work together ({_where(device)})")
    else:
        remedy = (
            "run `python -m trainer.doctor.check_install --device cuda` on a machine with a driver, as the next make there does "
            "by itself; in a container: --gpus all"
        )
        yield warned("installation", "not checked: the CUDA packages do not load without an NVIDIA driver", remedy)
    yield from check_requirements()
    for line in changed_pins():
        yield warned("packages", line, "`make setup` installs the pinned version")


def can_load() -> bool:
    """Whether what FBGEMM's CUDA build is linked to is here: it comes with the driver."""
    return version("fbgemm-gpu") is None or gpus.has_driver()


def changed_pins() -> list[str]:
    """Packages of .venv that something has changed since `make setup`; nothing where this is not that environment."""
    environment, requirements = ROOT / ".venv", ROOT / "requirements" / "common.txt"
    if not (requirements.is_file() and environment.is_dir() and Path(sys.prefix).samefile(environment)):
        return []
    return pins.differing(environment, [requirements])


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(device: str | None, version: Callable[[str], str | None] = version) -> Finding | None:
    """The three belong together, and there is one fbgemm."""
    missing = [name for name in ("torch", "torchrec") if version(name) is None]
    fbgemms = {name: version(name) for name in FBGEMM if version(name)}
    if missing or not fbgemms:
        return _wrong(f"{' and '.join([*missing, *([] if fbgemms else ['fbgemm-gpu'])])} not installed")
    if len(fbgemms) > 1:
        return _wrong("both fbgemm-gpu and fbgemm-gpu-cpu are installed, and write into the same folder")
    torch, torchrec, fbgemm = (_short(v) for v in (version("torch"), version("torchrec"), *fbgemms.values()))
    if TRIPLES.get(torch) != (torchrec, fbgemm):
        sets = " or ".join(f"torch {t}, torchrec {r}, fbgemm {f}" for t, (r, f) in TRIPLES.items())
        return _wrong(f"torch {torch}, torchrec {torchrec} and fbgemm {fbgemm} do not belong together (known: {sets})")
    if device == "cpu" and "fbgemm-gpu" in fbgemms:
        return _wrong("fbgemm-gpu is the CUDA build, which does not load beside a CPU torch")
    if device == "cuda" and "fbgemm-gpu-cpu" in fbgemms:
        return _wrong("fbgemm-gpu-cpu cannot compute on GPUs")
    return None


def check_build(device: str | None) -> Finding | None:
    """torch's build is that of the device."""
    problem = _load("torch")
    if problem:
        return problem
    torch = sys.modules["torch"]
    if device == "cpu" and torch.version.cuda:
        return _wrong(f"torch {torch.__version__} is a CUDA build in a CPU installation", f"{ANEW}, or use DEVICE=cuda")
    if device == "cuda" and not torch.version.cuda:
        return _wrong(
            f"torch {torch.__version__} is not a CUDA build: pip took it from an index or folder of CPU builds",
            "name an index with CUDA builds: make clean setup DEVICE=cuda TORCH_INDEX=<address>",
        )
    return None


def check_imports(device: str | None) -> Finding | None:
    return _load("fbgemm_gpu") or _load("torchrec")


def check_gpus(device: str | None) -> Finding | None:
    """The GPUs here can train: CUDA starts on them, and FBGEMM has code for them."""
    import torch

    if device == "cpu" or not torch.version.cuda:
        return None
    for index in range(torch.cuda.device_count()):
        try:
            problem = gpus.refusal(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        except (RuntimeError, AssertionError) as error:
            problem = gpus.explain_start(str(error), torch.version.cuda)
        if problem:
            remedy = "choose other GPUs by CUDA_VISIBLE_DEVICES, or train with device=cpu"
            return _wrong(f"GPU {index} cannot be used: {problem}", remedy)
    return None


def check_operators(device: str | None) -> Finding | None:
    """fbgemm's operators are registered and right; torchrec looks embeddings up through them."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # a deprecation that is torchrec's to mend
    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    where = torch.device(_where(device))
    try:
        sums = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 1], device=where)).tolist()
        table = EmbeddingBagConfig(name="table", embedding_dim=4, num_embeddings=8, feature_names=["feature"])
        lengths, ids = torch.tensor([2, 0, 1], device=where), torch.tensor([1, 7, 3], device=where)
        features = KeyedJaggedTensor(keys=["feature"], values=ids, lengths=lengths)
        bags = EmbeddingBagCollection(tables=[table], device=where)
        pooled = bags(features).values()  # [3, 4]
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return _wrong(f"an operator of fbgemm does not load ({one_line(error, 300)})")
    rows = bags.embedding_bags["table"].weight
    expected = torch.stack([rows[1] + rows[7], torch.zeros_like(rows[0]), rows[3]])
    if sums != [0, 2, 2, 3] or not torch.allclose(pooled, expected):
        return _wrong(f"fbgemm computes wrong values on {where}")
    return None


def check_requirements() -> Iterator[Finding]:
    """`pip check` of what the trainer needs. Not reported: torchrec's wish for fbgemm's CUDA build, which a CPU installation
    leaves out. Only warned of: wishes of packages that are not from here, such as MLflow's for an older pyarrow."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    known = _ours()
    for line in result.stdout.splitlines():
        if (
            not line
            or line.startswith("No broken")
            or (line.startswith("torchrec ") and "requires fbgemm-gpu," in line)
        ):
            continue
        if pins.normal(line.split()[0]) in known:
            yield failed("packages", line, ANEW)
        else:
            yield warned("packages", line, "none is needed by the trainer, which does not use that package")


def _where(device: str | None) -> str:
    """What the operators are computed on."""
    return "cuda" if device == "cuda" and sys.modules["torch"].cuda.device_count() else "cpu"


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


def _wrong(message: str, remedy: str = ANEW) -> Finding:
    return failed("installation", message, remedy)


def _load(name: str) -> Finding | None:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return _wrong(f"{name} does not load ({one_line(error, 300)})")
    return None


if __name__ == "__main__":
    sys.exit(main())
