"""Plain values as dataclasses, as OmegaConf makes them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_loaders.typed import check, made


@dataclass
class Inner:
    name: str
    rate: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [1])


@dataclass
class Outer:
    on: bool = False
    count: int | None = None
    inner: Inner | None = None
    by_name: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"on": "yes", "count": "16", "inner": {"name": 7, "rate": "1e-3"}},
        {"on": "Off", "count": None, "by_name": {"a": {"name": "x", "rate": 2, "sizes": ["3", 4]}, "b": {"name": "y"}}},
        {"on": 1, "free": {"any": [1, {"deep": "text"}], "none": None}},
    ],
)
def test_values_are_converted_as_omegaconf_converts_them(plain):
    check(plain, Outer)
    expected = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Outer), plain))
    assert repr(made(plain, Outer)) == repr(expected)


def test_defaults_are_not_shared():
    first, second = made({}, Outer), made({}, Outer)
    first.by_name["a"] = Inner("x")
    assert second.by_name == {}


def test_what_has_no_default_must_be_given():
    with pytest.raises(
        ValueError, match=r"^by_name\.a\.name has no value: give it on the command line, by_name\.a\.name=…$"
    ):
        made({"by_name": {"a": {"rate": 1.0}}}, Outer)
