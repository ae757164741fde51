"""Schemas in few words, as a recipe would declare them."""

from data_loaders.prepare.declaration import (
    History,
    Make,
    PreparedFeature,
    PreparedSchema,
    PreparedTable,
    Vocabulary,
)


def schema_of(features, tables=None, **options):
    """``features``: name -> options of a feature, ``make`` as a map; ``tables``: name -> options of a table. A table that a
    feature names and nobody declares has a vocabulary of all values."""
    made = {}
    for name, values in features.items():
        make = dict(values.get("make", {}))
        if "history" in make:
            make["history"] = History(**make["history"])
        made[name] = PreparedFeature(**{**values, "make": Make(**make)})
    names = dict.fromkeys(feature.table for feature in made.values() if feature.table)
    given = {name: {} for name in names} | (tables or {})
    return PreparedSchema(tables={name: _table(values) for name, values in given.items()}, features=made, **options)


def _table(values):
    values = dict(values)
    if isinstance(values.get("vocabulary"), dict):
        values["vocabulary"] = Vocabulary(**values["vocabulary"])
    return PreparedTable(**values)
