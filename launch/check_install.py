"""`python -m launch.check_install [--device cpu|cuda]`: do torch, torchrec and fbgemm load and work together?

Says in one line a mistake what is wrong and what to do about it.
"""

import argparse
import importlib.metadata
import logging
import subprocess
import sys
from collections.abc import Callable

# torch -> (torchrec, fbgemm): what was released, and is tested here, together.
TRIPLES = {"2.13": ("1.8", "1.8"), "2.11": ("1.6", "1.6")}
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
ANEW = "run `make clean setup` (with DEVICE=cuda for GPUs)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.check_install", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="what the installation is meant for")
    device = parser.parse_args().device
    for check in (check_versions, check_build, check_imports, check_operators, check_requirements):
        problem = check(device)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    found = {name: version(name) for name in ("torch", "torchrec", *FBGEMM)}
    print("Checked: " + ", ".join(f"{name} {number}" for name, number in found.items() if number) + " work together")
    return 0


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
    if device == "cuda" and not torch.cuda.device_count():
        print("note: no GPU is visible here; the installation is checked on the CPU alone", file=sys.stderr)
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
    """`pip check`, but for torchrec's wish for fbgemm's CUDA build, which a CPU installation leaves out."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line and not line.startswith("No broken")]
    others = [line for line in lines if not (line.startswith("torchrec ") and "requires fbgemm-gpu," in line)]
    return f"packages do not fit together ({'; '.join(others)}): {ANEW}" if others else None


def _short(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(version.split("+")[0].split(".")[:2])


def _does_not_load(what: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{what} does not load ({first.strip()}): {ANEW}"


if __name__ == "__main__":
    sys.exit(main())
