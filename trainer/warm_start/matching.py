"""Which old name each new one comes from by the rules, and what no rule explains."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainer.config.warm_start import WarmStartConfig, matches
from trainer.modules.embeddings import is_wide_table, wide_table
from trainer.warm_start.sides import Side, Spec
from trainer.warm_start.vocabularies import Vocabularies

KEPT, REMAPPED, GROWN, NEW, DROPPED = "kept", "remapped", "grown", "new", "dropped"


@dataclass
class Matching:
    """Both sides, held against each other. ``problems`` gathers what is to be an error, all of it at once."""

    rules: WarmStartConfig
    old: Side
    new: Side
    vocabularies: Vocabularies
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sources = {new: old for old, new in self.rules.rename.items()}

    def source(self, kind: str, name: str, olds: Iterable[str]) -> str | None:
        """The old one of ``olds`` that ``name`` was: by a rename, or of the same name; None where there is none."""
        renamed = self._sources.get(f"{kind}/{name}")
        old = renamed.partition("/")[2] if renamed else name
        away = not renamed and f"{kind}/{name}" in self.rules.rename
        return None if away or old not in olds else old

    def source_feature(self, feature: str) -> str | None:
        skipped = matches(f"features/{feature}", self.rules.skip)
        return None if skipped else self.source("features", feature, self.old.features)

    def source_part(self, feature: str) -> str | None:
        """As ``source_feature``, skipped or not: the feature whose values a cross takes."""
        return self.source("features", feature, self.old.schema.features)

    def source_table(self, table: str) -> str | None:
        (feature, *_) = self.new.readers(table) or [None]
        if is_wide_table(table) and feature is not None and f"tables/{table}" not in self._sources:
            before = self.source_feature(feature)
            found = None if before is None else wide_table(before)
            return found if found in self.old.tables else None
        return self.source("tables", table, self.old.tables)

    def source_dense(self, name: str) -> str | None:
        """As by ``source``; the parts of a module that belongs to features follow these."""
        found = _module_of(name, self.new)
        if found is None or f"dense/{name}" in self._sources:
            return self.source("dense", name, self.old.dense)
        before = {self.source_feature(feature) for feature in self.new.modules[found]} - {None}
        for module, features in self.old.modules.items():
            if before & set(features):
                old = module + name.removeprefix(found)
                return old if old in self.old.dense else None
        return None

    def dense_features(self, name: str, side: Side) -> Sequence[str]:
        """The features that alone make up a dense tensor or its module; none for one that all share."""
        module = _module_of(name, side)
        parts = (side.axes or {}).get(name)
        return side.modules[module] if module else parts.features if parts else []

    def skips(self, name: str, features: Sequence[str]) -> bool:
        """Whether a new tensor keeps its initial values: it, or every feature that it is there for, is skipped."""
        return matches(name, self.rules.skip) or _all_match(features, self.rules.skip)

    def drops(self, name: str, features: Sequence[str]) -> bool:
        return matches(name, self.rules.drop) or _all_match(features, self.rules.drop)

    def grows(self, name: str) -> bool:
        return matches(name, self.rules.grow)

    def explained_by_features(self, features: Sequence[str], side: Side) -> bool:
        """Whether a tensor is on one side only because all its features are (they are reported then)."""
        if side is self.new:
            return bool(features) and all(self.source_feature(feature) is None for feature in features)
        used = {self.source_feature(feature) for feature in self.new.features}
        return bool(features) and not used & set(features)

    def problem(self, name: str, what: str, remedy: str) -> None:
        self.problems.append(f"{name} {what}: {remedy}")

    def new_one(self, name: str, olds: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(olds), n=1, cutoff=0.5)
        hint = near[0] if near else f"{name.partition('/')[0]}/<old name>"
        self.problem(name, "is new", f"skip: ['{name}'], or rename: {{'{hint}': '{name}'}}")

    def lost_one(self, name: str) -> None:
        self.problem(name, "of the old run is not used", f"drop: ['{name}'], or rename: {{'{name}': <new name>}}")

    def state(self, name: str, old: dict[str, Spec], new: dict[str, Spec], what: str | None) -> float | None:
        """What optimizer state is multiplied by, None where it starts anew. ``what``: the names of two optimizers that
        differ."""
        factor = self.rules.factor(name)
        if factor is None:
            return None
        if what is None and {key: _kind(spec) for key, spec in old.items()} != {k: _kind(s) for k, s in new.items()}:
            what = f"state {_shown(old)}, now {_shown(new)}"
        if what is not None:
            self.problem(name, f"has another optimizer ({what})", f"optimizer: {{'{name}': reset}}")
        return factor

    def check_features(self) -> None:
        olds = [f"features/{feature}" for feature in self.old.features]
        used = {self.source_feature(feature) for feature in self.new.features}
        for feature in self.new.features:
            if self.source_feature(feature) is None and not matches(f"features/{feature}", self.rules.skip):
                self.new_one(f"features/{feature}", olds)
        for feature in self.old.features:
            skipped = feature in self.new.features and matches(f"features/{feature}", self.rules.skip)
            if feature not in used and not skipped and not matches(f"features/{feature}", self.rules.drop):
                self.lost_one(f"features/{feature}")

    def check_rules(self) -> None:
        """A rule that applies to nothing is a slip of the pen (``skip`` and ``drop`` may outlive their day)."""
        olds, news = (_names(side) for side in (self.old, self.new))
        for old, new in self.rules.rename.items():
            for name, names, which in ((old, olds, "old"), (new, news, "new")):
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                    hint = f"did you mean '{near[0]}'?" if near else "correct the rule"
                    self.problem(f"warm_start.rename: '{name}'", f"is not in the {which} run", hint)
        for rule in ("require", "grow", "optimizer"):
            for pattern in getattr(self.rules, rule):
                if not any(matches(name, [pattern]) for name in news):
                    self.problem(
                        f"warm_start.{rule}: '{pattern}'", "matches nothing", "correct the rule or leave it out"
                    )


def _module_of(name: str, side: Side) -> str | None:
    return next((module for module in side.modules if name.startswith(f"{module}.")), None)


def _all_match(features: Sequence[str], patterns: Sequence[str]) -> bool:
    return bool(features) and all(matches(f"features/{feature}", patterns) for feature in features)


def _kind(spec: Spec) -> tuple[bool, bool, object]:
    """How states of one name may differ: one value a row or a column each, one for all, the type."""
    return spec.widths is not None, not spec.shape, spec.dtype


def _shown(states: dict[str, Spec]) -> str:
    return (
        ", ".join(f"{key} {str(spec.dtype).removeprefix('torch.')}" for key, spec in sorted(states.items())) or "none"
    )


def _names(side: Side) -> list[str]:
    features = [f"features/{name}" for name in side.features]
    return [*features, *(f"tables/{name}" for name in side.tables), *(f"dense/{name}" for name in side.dense)]
