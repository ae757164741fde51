"""What must not be recorded or printed: values under names such as ``password`` and ``api_key``, credentials in
addresses and connection strings, and what the environment provided.

The one place that says what a secret looks like. ``redact`` is for records (a run's ``config.yaml``, and with it checkpoints,
trackers and reports; ``preparation.yaml``), ``scrub`` for messages and logs.
"""

import re
from typing import Any
from urllib.parse import unquote

REDACTED = "<redacted>"
# Maps whose keys are a user's own names of tables, features and columns: a feature called "token" is no secret.
NAMES = frozenset(
    ("tables", "features", "crosses", "columns", "by_table", "rename", "optimizer", "select", "sources", "views")
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Anywhere in a name written as one word: AWSAccessKeyId, client_secret_2, X-Amz-Signature.
_TELLING = re.compile(
    r"secret|passw|passphrase|credential|signature|bearer|authorization|connection_?str|connstr"
    r"|(api|access|account|private|shared|signing|encryption|storage|master|sas|subscription|function)keys?"
    r"|(session|security|access|auth|refresh|api|id)tokens?$"
)
_LAST = frozenset(("token", "auth", "oauth", "sig", "sas", "pass", "pwd", "pw", "jwt", "psk", "cookie", "apikey"))
_PLURAL = frozenset(("tokens", "pwds", "cookies"))  # of numbers: how many
_TAIL = frozenset(("header", "value", "string", "str", "text", "base", "b", "env", "file"))
# ://user:password@, where a password may hold '/'; ://host:9000/path@x has a port. Of these schemes any user is a secret.
_USERINFO = re.compile(r"""(?<=://)([^/\s'"@:]*):(?!\d{1,5}(?:[/?#]|$))[^\s'"]*(?=@)""")
_USER = re.compile(r"""\b(s3[an]?|gs|gcs|https?)://[^/\s'"@<]+@""")
_OPTION = re.compile(r"([?&#])([^=&?#\s'\"]+)=([^&\s'\"]*)")  # in a message, where an address ends at a blank
_WHOLE_OPTION = re.compile(r"([?&#])([^=&?#\s]+)=([^&]*)")
_IN_BRACES = re.compile(r"""(?<=[{,])(\s*['"]?)([\w.-]+)(['"]?\s*:\s*)(\$\{[^}]*\}|"[^"]*"|'[^']*'|[^\s,}\]]+)""")
_ASSIGNED = re.compile(r"""(?<![\w?&#.-])([\w.+-]+)(\s*=\s*)(\$\{[^}]*\}|"[^"]*"|'[^']*'|[^\s,;&}\]'"]+)""")
_CONNECTION = re.compile(r"(^|;)(\s*)([\w .-]+?)(\s*=\s*)([^;]*)")
# Recorded as it is: an interpolation holds nothing of its value.
_ASKED = re.compile(r"\$\{\s*(oc\.env:\s*\w+(\s*,\s*null)?|[\w.]+)\s*\}")
_SHORTEST = 4  # characters of the environment's that a message is searched for
_provided: dict[str, str] = {}


def is_secret_name(name: str) -> bool:
    """Whether a key, an option of an address or a variable is called like a secret: ``api_key``, ``apiKey``, ``DB_PWD``."""
    words = [word.lower() for word in _WORD.findall(name)]
    if _TELLING.search("".join(words)):
        return True
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _TAIL):
        words.pop()
    return bool(words) and words[-1] in _LAST | _PLURAL


def redact(value: Any, key: str = "") -> Any:
    """``value`` (plain: maps, lists, scalars) as it may be recorded. ``key``: the key that holds it. Interpolations stay as
    they are, so that a record of ``${oc.env:NAME}`` can be used again."""
    return _redact(value, key, is_secret_name(key))


def _redact(value: Any, key: str, secret: bool) -> Any:
    if isinstance(value, dict):
        own = key in NAMES and not secret
        return {k: _redact(v, str(k), not own and (secret or is_secret_name(str(k)))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(item, key, secret) for item in value]
    if secret and value is not None and not isinstance(value, bool):
        number = isinstance(value, (int, float))
        return value if number and key.lower().endswith("s") or _is_asked(value) else REDACTED
    return _redact_text(value) if isinstance(value, str) else value


def redact_override(text: str) -> str:
    """``key=value`` of a command line."""
    key, equals, value = text.partition("=")
    if equals and is_secret_name(key.rpartition(".")[2]):
        return f"{key}={value if _is_asked(value) else REDACTED}"
    return _in_braces(key + equals + _redact_text(value))


def holds_credentials(address: str) -> bool:
    """Whether an address, or a connection string, holds what should come from the environment instead."""
    return _redact_text(address) != address


def scrub(text: str) -> str:
    """A message without secrets: addresses, ``password=…`` pairs, and values that ``remember`` was given."""
    text = _OPTION.sub(_without_option, _without_user(as_asked(text)))
    text = _ASSIGNED.sub(_without_pair, text)
    return _in_braces(text)


def as_asked(value: Any) -> Any:
    """A tree or text, with ``${oc.env:NAME}`` in place of values that the environment provided: for what was resolved before it
    is recorded."""
    if isinstance(value, dict):
        return {key: as_asked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_asked(inner) for inner in value]
    if isinstance(value, str):
        for provided, asked in sorted(_provided.items(), key=lambda item: -len(item[0])):
            value = re.sub(rf"(?<!\w){re.escape(provided)}(?!\w)", asked.replace("\\", r"\\"), value)
    return value


def remember(name: str, value: str) -> None:
    """That the environment variable ``name`` provided ``value``, which messages then show as its interpolation."""
    if len(value) >= _SHORTEST:
        _provided[value] = f"${{oc.env:{name}}}"


def _redact_text(text: str) -> str:
    text = _WHOLE_OPTION.sub(_without_option, _without_user(text))
    # "token=a/part.parquet" is a folder's name, "AccountName=a;AccountKey=b" a connection string.
    return _CONNECTION.sub(_without_part, text) if ";" in text or "/" not in text else text


def _without_user(text: str) -> str:
    return _USER.sub(rf"\1://{REDACTED}@", _USERINFO.sub(REDACTED, text))


def _without_option(found: re.Match[str]) -> str:
    before, name, value = found.groups()
    bare = unquote(name).rpartition(".")[2]
    secret = is_secret_name(bare) or re.search(r"(^|[_-])key$", bare, re.IGNORECASE)
    inner = unquote(value)
    if _is_asked(value) or not secret and _without_user(inner) == inner:
        return found[0]
    return f"{before}{name}={REDACTED}"


def _without_pair(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    secret = is_secret_name(name.rpartition(".")[2]) and not _is_asked(value)
    return f"{name}{between}{REDACTED}" if secret else found[0]


def _without_part(found: re.Match[str]) -> str:
    before, space, name, between, value = found.groups()
    secret = is_secret_name(name) and value and not _is_asked(value)
    return f"{before}{space}{name}{between}{REDACTED}" if secret else found[0]


def _in_braces(text: str) -> str:
    def without(found: re.Match[str]) -> str:
        before, name, between, value = found.groups()
        secret = is_secret_name(name) and not _is_asked(value)
        return f"{before}{name}{between}{REDACTED}" if secret else found[0]

    return _IN_BRACES.sub(without, text)


def _is_asked(value: Any) -> bool:
    return isinstance(value, str) and _ASKED.fullmatch(value.strip("'\"")) is not None
