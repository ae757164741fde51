"""A finished output folder, as a later day or a scoring job reads it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import ibis

from data_loaders import safe_yaml
from data_loaders.errors import UserError
from data_loaders.prepare import compose
from data_loaders.prepare.declaration import Declaration
from data_loaders.prepare.engine import Engine
from data_loaders.prepare.outputs import DECLARATION, REPORT, STATISTICS
from data_loaders.prepare.statistics import Statistics


@dataclass(frozen=True)
class Prepared:
    """``identity`` changes with the contents."""

    folder: Path
    declaration: Declaration
    statistics: Statistics
    identity: str

    @classmethod
    def open(cls, folder: str | Path) -> "Prepared":
        """Raises ``UserError`` for a folder that ``prepare`` did not finish."""
        folder = Path(folder).expanduser().absolute()
        for name in (DECLARATION, STATISTICS, REPORT):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} is not a prepared data set ({name} is missing): name prepare's output folder"
                )
        texts = [(folder / name).read_text() for name in (DECLARATION, STATISTICS, REPORT)]
        declaration = compose.check(safe_yaml.parse(texts[0], str(folder / DECLARATION)), str(folder / DECLARATION))
        identity = hashlib.sha256("".join([str(folder), *texts]).encode()).hexdigest()
        return cls(folder, declaration, Statistics.from_dict(json.loads(texts[1])), identity)

    def vocabularies(self) -> dict[str, Path]:
        """The vocabulary file of each table that has one. Raises ``UserError`` for one that is missing."""
        found = {}
        for table in self.declaration.schema.tables:
            if self.declaration.schema.has_vocabulary(table):
                found[table] = self.folder / "vocabulary" / f"{table}.parquet"
                if not found[table].is_file():
                    raise UserError(f"{found[table]} is missing: the prepared data set is damaged; prepare it again")
        return found

    def vocabulary(self, engine: Engine, table: str) -> tuple[ibis.Table, ibis.Table | None] | None:
        """A table's vocabulary and its rare values; None for a table that was not there."""
        path = self.vocabularies().get(table)
        if path is None:
            return None
        rare = self.folder / "vocabulary" / "rare" / f"{table}.parquet"
        return engine.read_parquet(path), engine.read_parquet(rare) if rare.is_file() else None

    def check_extends(self, declaration: Declaration) -> None:
        """Raises ``UserError`` where what this one learnt does not fit another declaration: a number's transforms differ,
        or a table changes between a vocabulary and another kind."""
        before, now = self.declaration.schema, declaration.schema
        for name in now.features:
            if now.numbers(name) and (name not in before.features or now.numbers(name) != before.numbers(name)):
                raise UserError(
                    f"schema.features.{name}.make.numbers is not that of {self.folder}, whose statistics are kept: "
                    "prepare without extend="
                )
        for name in now.tables:
            if name in before.tables and now.has_vocabulary(name) != before.has_vocabulary(name):
                raise UserError(f"schema.tables.{name} has a vocabulary on one day only: prepare without extend=")
