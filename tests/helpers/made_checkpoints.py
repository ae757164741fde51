"""Small checkpoints made by hand, as ranks would write them; and files of tensors that nobody would."""

import json
from pathlib import Path

import numpy as np
import torch

from trainer.checkpoint import Reader, write_commit_files, write_pieces
from trainer.checkpoint.manifest import fingerprint
from trainer.checkpoint.piece import Piece

FILE = "rank-00000.safetensors"


def whole(name, tensor, widths=None):
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, widths=widths)


def commit(path, *ranks, facts=None, texts=None):
    """Each of ``ranks`` is the pieces of one rank."""
    path.mkdir(parents=True)
    parts = []
    for rank, pieces in enumerate(ranks):
        name = f"rank-{rank:05}.safetensors"
        parts.append((name, write_pieces(path / name, pieces).to_dict()))
    write_commit_files(path, parts, facts or {}, texts or {})
    return path


def cut(generator, tensor, name, widths=None):
    """A tensor [rows, columns] as pieces of a random grid of rectangles."""
    edges = [
        sorted({0, size, *generator.integers(0, size + 1, generator.integers(0, 4)).tolist()}) for size in tensor.shape
    ]
    return [
        Piece(name, tuple(tensor.shape), (top, left), tensor[top:bottom, left:right], widths=widths)
        for top, bottom in zip(edges[0], edges[0][1:])
        for left, right in zip(edges[1], edges[1][1:])
    ]


def rewrite(path: Path, name: str, content) -> None:
    """Puts other bytes, or JSON, in the place of a file, and makes the manifest agree: a forgery, not damage."""
    (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest[name] = fingerprint(path / name)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def file_of(header, data=b"") -> bytes:
    """``header``: JSON, or bytes that pose as it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def values(path, name) -> np.ndarray:
    return Reader(path).read(name).numpy()


def table(rows=6, dim=4, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
