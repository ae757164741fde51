"""The hash of ids in plain Python."""

MASK = (1 << 64) - 1


def reference_mix(value):
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def reference_bytes(data):
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = sum(word * pow(0xD6E8FEB86659FD93, k, 1 << 64) for k, word in enumerate(words))
    return reference_mix((total + len(data) * 0xA0761D6478BD642F) & MASK)
