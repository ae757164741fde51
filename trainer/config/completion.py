"""Completion of `clicktrainer`'s command line in bash: commands, options, and the files of configuration groups."""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path

BASH = """\
_clicktrainer() {
  local IFS=$'\\n'
  COMPREPLY=($("$1" --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
}
complete -o default -F _clicktrainer clicktrainer"""
ALWAYS = ("--help", "--version", "--completion")


def candidates(words: Sequence[str], commands: Sequence[str], help_of: Callable[[str], str]) -> list[str]:
    """What may stand for the last word, which is being typed."""
    *before, last = _joined(words)
    if not before:
        found: Iterable[str] = (*commands, *ALWAYS)
    elif before[0] not in commands:
        found = ()
    elif last.startswith("-"):
        found = dict.fromkeys(re.findall(r"--[a-z][a-z-]*", help_of(before[0])))
    else:
        found = _choices(last, _folders(before))
    answered = last[: last.rfind("=") + 1]  # a word of its own to bash, which keeps it
    return [each.removeprefix(answered) for each in found if each.startswith(last)]


def _joined(words: Sequence[str]) -> list[str]:
    """bash splits words at ``=``: ``model=d`` comes as three."""
    return "\0".join(words).replace("\0=\0", "=").replace("\0=", "=").split("\0")


def _folders(words: Sequence[str]) -> list[Path]:
    """Where configuration lies: ours, and the folders that ``--config-dir`` names."""
    named = [after for word, after in zip(words, words[1:]) if word == "--config-dir"]
    named += [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    return [Path(str(files("conf"))), *(Path(folder).expanduser() for folder in named)]


def _choices(word: str, folders: Sequence[Path]) -> list[str]:
    """``model=`` and the like; behind it, the files that it may name."""
    group, equals, _ = word.partition("=")
    if not equals:
        return sorted({f"{each.name}=" for each in folders[0].iterdir() if each.is_dir() and each.name[0] != "_"})
    names = {
        path.relative_to(folder / group).with_suffix("").as_posix()
        for folder in folders
        for path in (folder / group).rglob("*.yaml")
    }
    return [f"{group}={name}" for name in sorted(names)]
