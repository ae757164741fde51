"""Dense tensors: what becomes of each, and of the parts of a first layer that belong to features.

Such a part follows its feature by name: old columns move to their new place, a new feature's keep their fresh values, a
removed one's are left behind. A part of several features, such as the weight of their product, moves where all of them are
known. The optimizer's moments move along.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trainer.checkpoint.format import Reader
from trainer.checkpoint.piece import Piece
from trainer.warm_start.matching import DROPPED, KEPT, NEW, REMAPPED, Matching
from trainer.warm_start.sides import FeatureParts, Side

NOT_SCALED = ("step", "mu_product")  # they count, or follow from a count
Part = tuple[tuple[str, ...], int]  # its features in alphabetical order, and how many parts they had before it


@dataclass(frozen=True)
class Block:
    """``width`` entries of an axis, from ``old`` to ``new``."""

    new: int
    old: int
    width: int


@dataclass(frozen=True)
class DenseTransfer:
    """``blocks`` of each of ``axes`` that come from the old tensor; None: all of it. ``kept``, ``added``, ``removed``: the
    features these belong to, for a tensor that is made of features."""

    name: str
    source: str | None
    status: str
    size: int
    factor: float | None
    has_state: bool
    axes: tuple[int, ...] = (0,)
    blocks: tuple[Block, ...] | None = None
    kept: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def plan_dense(matching: Matching) -> list[DenseTransfer]:
    found = [_plan(matching, name) for name in sorted(matching.new.dense)]
    used = {plan.source for plan in found}
    for name in sorted(set(matching.old.dense) - used):
        _check_lost(matching, name)
        found.append(DenseTransfer(name, None, DROPPED, prod(matching.old.dense[name].shape), None, has_state=False))
    return found


def load_dense(plan: DenseTransfer, piece: Piece, reader: Reader) -> None:
    """Writes what comes from the old run into a parameter, a buffer, or a state of the parameter's optimizer."""
    kind, _, rest = piece.name.partition("/")
    state = rest.rpartition("/")[2] if kind == "optimizer" else None
    if plan.source is None or (state is not None and plan.factor is None):
        return
    old = reader.read(f"{kind}/{plan.source}" + (f"/{state}" if state is not None else ""))
    if state is not None and state not in NOT_SCALED and plan.factor != 1:
        old = old * plan.factor
    _copy(old.to(piece.tensor.device), piece.tensor, plan)


def _copy(old: Tensor, new: Tensor, plan: DenseTransfer) -> None:
    if plan.blocks is None or new.dim() == 0:
        new.copy_(old)
        return
    to, of = [(b.new, b.width) for b in plan.blocks], [(b.old, b.width) for b in plan.blocks]
    new[_entries(new, plan.axes, to)] = old[_entries(old, plan.axes, of)]


def _entries(tensor: Tensor, axes: tuple[int, ...], runs: Sequence[tuple[int, int]]) -> tuple[slice | Tensor, ...]:
    """The index of all entries that lie in ``runs`` (first, width) along each of ``axes``."""
    places = torch.tensor([start + offset for start, width in runs for offset in range(width)], dtype=torch.int64)
    index: list[slice | Tensor] = [slice(None)] * tensor.dim()
    for number, axis in enumerate(axes, start=1):
        index[axis] = places.to(tensor.device).view(-1, *[1] * (len(axes) - number))
    return tuple(index)


def _plan(matching: Matching, name: str) -> DenseTransfer:
    canonical, spec = f"dense/{name}", matching.new.dense[name]
    features, has_state = matching.dense_features(name, matching.new), name in matching.new.states
    added = tuple(features) if name in (matching.new.axes or {}) else ()
    fresh = DenseTransfer(name, None, NEW, prod(spec.shape), None, has_state, added=added)
    if matching.skips(canonical, features):
        return fresh
    source = matching.source_dense(name)
    if source is None:
        if not matching.explained_by_features(features, matching.new):
            matching.new_one(canonical, (f"dense/{old}" for old in matching.old.dense))
        return fresh
    problem = _mismatch(matching, name, source)
    if problem:
        matching.problem(canonical, problem, f"skip: ['{canonical}']")
        return DenseTransfer(name, source, NEW, prod(spec.shape), None, has_state)
    states = matching.old.states.get(source, {}), matching.new.states.get(name, {})
    factor = matching.state(canonical, *states, None)
    if name not in (matching.new.axes or {}):
        return DenseTransfer(name, source, KEPT, prod(spec.shape), factor, has_state)
    return _plan_by_features(matching, name, source, factor, has_state)


def _mismatch(matching: Matching, name: str, source: str) -> str | None:
    """What keeps an old tensor from becoming the new one, None where nothing does."""
    old, new = matching.old.dense[source], matching.new.dense[name]
    if old.dtype != new.dtype:
        return f"is {new.dtype}, was {old.dtype}"
    before, now = (matching.old.axes or {}).get(source), (matching.new.axes or {}).get(name)
    if (before is None) != (now is None):
        return "is of another model, whose columns belong to nobody knows which feature"
    shapes = [list(old.shape), list(new.shape)]
    if before is not None and now is not None and len(old.shape) == len(new.shape):
        assert all(new.shape[axis] == now.width for axis in now.axes), (name, new.shape, now.width)
        for axis in before.axes:
            if old.shape[axis] != before.width:
                return f"has {old.shape[axis]} columns in the checkpoint, {before.width} by its schema"
        for shape, parts in zip(shapes, (before, now)):
            for axis in parts.axes:
                shape[axis] = 0
    return f"has shape {list(new.shape)}, had {list(old.shape)}" if shapes[0] != shapes[1] else None


def _plan_by_features(
    matching: Matching, name: str, source: str, factor: float | None, has_state: bool
) -> DenseTransfer:
    now, before = matching.new.axes[name], matching.old.axes[source]
    new, old = _places(now), _places(before)
    came = {part: _source_part(matching, part) for part in new}
    found = {part: was for part, was in came.items() if was in old and _width(old[was]) == _width(new[part])}
    blocks = tuple(Block(new[part][0], old[was][0], _width(new[part])) for part, was in found.items())
    unused = old.keys() - found.values()
    kept, held = _features_of(found), _features_of(found.values())
    whole = len(found) == len(new) == len(old) and all(block.new == block.old for block in blocks)
    return DenseTransfer(
        name,
        source,
        KEPT if whole else REMAPPED,
        prod(matching.new.dense[name].shape),
        factor,
        has_state,
        now.axes,
        blocks,
        tuple(feature for feature in now.features if feature in kept),
        tuple(feature for feature in now.features if feature not in kept),
        tuple(feature for feature in before.features if feature in _features_of(unused) - held),
    )


def _source_part(matching: Matching, part: Part) -> Part | None:
    """The old part whose features are now those of ``part``; None where one of them is new."""
    features, number = part
    before = [matching.source_feature(feature) for feature in features]
    return None if None in before else (tuple(sorted(before)), number)


def _places(parts: FeatureParts) -> dict[Part, tuple[int, int]]:
    """First and past-the-last entry of each part."""
    found: dict[Part, tuple[int, int]] = {}
    count: Counter[tuple[str, ...]] = Counter()
    start = 0
    for features, width in parts.parts:
        owners = tuple(sorted(features))
        found[owners, count[owners]] = (start, start + width)
        count[owners] += 1
        start += width
    return found


def _width(place: tuple[int, int]) -> int:
    return place[1] - place[0]


def _features_of(parts: Iterable[Part]) -> set[str]:
    return {feature for features, _ in parts for feature in features}


def _check_lost(matching: Matching, name: str) -> None:
    canonical = f"dense/{name}"
    features = matching.dense_features(name, matching.old)
    explained = matching.explained_by_features(features, matching.old)
    if not (_is_skipped(matching, name) or explained or matching.drops(canonical, features)):
        matching.lost_one(canonical)


def _is_skipped(matching: Matching, name: str) -> bool:
    """Whether a new tensor of the same name is skipped, which says enough of the old one."""
    new: Side = matching.new
    return name in new.dense and matching.skips(f"dense/{name}", matching.dense_features(name, new))
