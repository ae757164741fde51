"""Random-looking whole numbers from whole numbers, in arithmetic that every engine does alike and fast.

An MD5 of each row would take longer than everything else that is done to it.
"""

import ibis

BOUND = _PRIME = 2_147_483_647  # 2^31 - 1: products of two residues stay below 2^62
_FACTORS = (48_271, 1_103_515_245)  # the first is Park and Miller's


def of_number(value: ibis.Value, seed: int) -> ibis.Value:
    """int64 in [0, 2^31 - 1): squares between multiplications modulo a prime, so that neighbours are far apart."""
    low = value % _PRIME
    mixed = (low + (value // _PRIME) % _PRIME * _FACTORS[1] + seed % _PRIME) % _PRIME
    for factor in _FACTORS:
        mixed = (mixed * factor + 12_345) % _PRIME
        mixed = (mixed * mixed + mixed // 65_536) % _PRIME
    return mixed * _FACTORS[0] % _PRIME


def of_row(table: ibis.Table, seed: int) -> ibis.Value:
    """The same for a row's key."""
    return of_number(table["__row"] + of_number(table["__part"], seed), seed + 1)


def share(value: ibis.Value, seed: int) -> ibis.Value:
    """int64 in [0, 2^31 - 1), for dividing rows into shares: one round, as it is computed for each row in every pass."""
    low = (value % _PRIME + _PRIME) % _PRIME
    mixed = (low * _FACTORS[1] + seed % _PRIME) % _PRIME
    return mixed * mixed % _PRIME * _FACTORS[0] % _PRIME


def bound(part: float) -> int:
    """The number below which a ``part`` of all ``share``s lie."""
    return round(part * _PRIME)
