"""Dense tensors: what becomes of each, and of the parts of a first layer that belong to features.

Such a part follows its feature by name: old columns move to their new place, a new feature's keep their fresh values, a
removed one's are left behind. The optimizer's moments move along.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from trainer.checkpoint.format import Reader
from trainer.pieces import Piece
from trainer.warm_start.matching import DROPPED, KEPT, NEW, REMAPPED, Matching
from trainer.warm_start.sides import Side

NOT_SCALED = ("step", "mu_product")  # they count, or follow from a count


@dataclass(frozen=True)
class Block:
    """``width`` entries of an axis, from ``old`` to ``new``."""

    new: int
    old: int
    width: int


@dataclass(frozen=True)
class DensePlan:
    """``blocks`` of ``axis`` that come from the old tensor; None: all of it. ``kept``, ``added``, ``removed``: the features
    these belong to, for a tensor that is made of features."""

    name: str
    source: str | None
    status: str
    size: int
    factor: float | None
    has_state: bool
    axis: int = 0
    blocks: tuple[Block, ...] | None = None
    kept: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def plan_dense(matching: Matching) -> list[DensePlan]:
    found = [_plan(matching, name) for name in sorted(matching.new.dense)]
    used = {plan.source for plan in found}
    for name in sorted(set(matching.old.dense) - used):
        _check_lost(matching, name)
        found.append(DensePlan(name, None, DROPPED, prod(matching.old.dense[name].shape), None, has_state=False))
    return found


def load_dense(plan: DensePlan, piece: Piece, reader: Reader) -> None:
    """Writes what comes from the old run into a parameter, a buffer, or a state of the parameter's optimizer."""
    kind, _, rest = piece.name.partition("/")
    state = rest.rpartition("/")[2] if kind == "optimizer" else None
    if plan.source is None or (state is not None and plan.factor is None):
        return
    old = reader.read(f"{kind}/{plan.source}" + (f"/{state}" if state is not None else ""))
    if state is not None and state not in NOT_SCALED and plan.factor != 1:
        old = old * plan.factor
    _copy(old.to(piece.tensor.device), piece.tensor, plan)


def _copy(old: Tensor, new: Tensor, plan: DensePlan) -> None:
    if plan.blocks is None or new.dim() == 0:
        new.copy_(old)
        return
    for block in plan.blocks:
        new.narrow(plan.axis, block.new, block.width).copy_(old.narrow(plan.axis, block.old, block.width))


def _plan(matching: Matching, name: str) -> DensePlan:
    canonical, spec = f"dense/{name}", matching.new.dense[name]
    features, has_state = matching.dense_features(name, matching.new), name in matching.new.states
    added = tuple(dict.fromkeys(features)) if name in (matching.new.axes or {}) else ()
    fresh = DensePlan(name, None, NEW, prod(spec.shape), None, has_state, added=added)
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
        return DensePlan(name, source, NEW, prod(spec.shape), None, has_state)
    states = matching.old.states.get(source, {}), matching.new.states.get(name, {})
    factor = matching.state(canonical, *states, None)
    if name not in (matching.new.axes or {}):
        return DensePlan(name, source, KEPT, prod(spec.shape), factor, has_state)
    return _plan_by_features(matching, name, source, factor, has_state)


def _mismatch(matching: Matching, name: str, source: str) -> str | None:
    """What keeps an old tensor from becoming the new one, None where nothing does."""
    old, new = matching.old.dense[source], matching.new.dense[name]
    if old.dtype != new.dtype:
        return f"is {new.dtype}, was {old.dtype}"
    axes = [(side.axes or {}).get(key) for side, key in ((matching.old, source), (matching.new, name))]
    if (axes[0] is None) != (axes[1] is None):
        return "is of another model, whose columns belong to nobody knows which feature"
    shapes = [list(spec.shape) for spec in (old, new)]
    if axes[0] is not None and axes[1] is not None and len(shapes[0]) == len(shapes[1]):
        for (axis, blocks), shape in zip(axes, shapes):
            total = sum(width for _, width in blocks)
            assert shape[axis] == total or shape is shapes[0], (name, shape, total)
            if shape[axis] != total:
                return f"has {shape[axis]} columns in the checkpoint, {total} by its schema"
            shape[axis] = 0
    return f"has shape {list(new.shape)}, had {list(old.shape)}" if shapes[0] != shapes[1] else None


def _plan_by_features(matching: Matching, name: str, source: str, factor: float | None, has_state: bool) -> DensePlan:
    axis, blocks = matching.new.axes[name]
    _, old_blocks = matching.old.axes[source]
    places, ends = _places(old_blocks), [end for _, (_, end) in _places(blocks).items()]
    found, kept, used = [], [], set()
    for key, (start, end) in _places(blocks).items():
        before = (matching.source_feature(key[0]), key[1])
        if before in places and places[before][1] - places[before][0] == end - start:
            found.append(Block(start, places[before][0], end - start))
            kept.append(key[0])
            used.add(before)
    size = prod(matching.new.dense[name].shape)
    whole = len(found) == len(places) == len(ends) and all(block.new == block.old for block in found)
    return DensePlan(
        name,
        source,
        KEPT if whole else REMAPPED,
        size,
        factor,
        has_state,
        axis,
        tuple(found),
        tuple(dict.fromkeys(kept)),
        tuple(dict.fromkeys(feature for feature, _ in blocks if feature not in kept)),
        tuple(dict.fromkeys(feature for feature, number in places if (feature, number) not in used)),
    )


def _places(blocks: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, int]]:
    """(feature, how often it was there before) -> first and past-the-last entry."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    count: dict[str, int] = {}
    start = 0
    for feature, width in blocks:
        found[feature, count.setdefault(feature, 0)] = (start, start + width)
        count[feature] += 1
        start += width
    return found


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
