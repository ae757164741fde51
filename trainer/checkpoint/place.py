"""Which place a path belongs to, folders of this machine (``local``) or an object store (``store``), and where a run keeps its
checkpoints.

A local checkpoint is written to a fresh temporary folder, and the rename to ``step-N`` is the commit. An object store has
no rename: there the files go to ``step-N`` itself, under names that no other attempt at that step has, and the manifest,
written last, is the commit.
"""

from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.state_files import write_text
from data_loaders.storage import is_uri, root_name
from trainer.checkpoint.local import Local
from trainer.checkpoint.paths import AnyPath, Place, StorePath
from trainer.checkpoint.store import Store
from trainer.checkpoint.tensor_file import open_plain

ELSEWHERE = "elsewhere.txt"  # in a run's ``checkpoints``: the address of the place that holds them
LONGEST_ADDRESS = 8192


_LOCAL = Local()


def place_of(path: AnyPath) -> Place:
    """Raises ``UserError`` for a store that nobody knows, as ``data_loaders.storage``."""
    return _LOCAL if isinstance(path, Path) else Store.of(path)


def parse(text: str) -> AnyPath:
    """A local path or a URI, as a person gives it. Raises ``UserError`` where it holds credentials."""
    if "://" not in text:
        return Path(text)
    name = root_name(text)
    return StorePath(name, text.partition("?")[2]) if is_uri(name) else Path(name)


def chosen(root: str | None, run: Path, *, dated: bool) -> AnyPath:
    """The folder of the checkpoints of the run in ``run``: its own, or under ``root``, by the name of the run's folder; by
    that and its parent's where the name is a date only (``dated``)."""
    if root is None:
        return run / "checkpoints"
    run = run.absolute()
    return parse(root) / (f"{run.parent.name}/{run.name}" if dated else run.name)


def note(run: Path, folder: AnyPath) -> None:
    """Writes down in a run's folder where its checkpoints are, for whoever looks for them by that."""
    address = run / "checkpoints" / ELSEWHERE
    if folder == run / "checkpoints":
        address.unlink(missing_ok=True)
    else:
        options = folder.options if isinstance(folder, StorePath) else ""
        write_text(address, f"{folder}" + (f"?{options}" if options else "") + "\n")


def of_run(run: AnyPath) -> AnyPath:
    """The folder of a run's checkpoints, where ``note`` said; in a store it is the run's folder itself."""
    if isinstance(run, StorePath):
        return run
    address = run / "checkpoints" / ELSEWHERE
    try:
        with open_plain(address) as file:
            text = file.read(LONGEST_ADDRESS + 1).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return run / "checkpoints"
    if not text or len(text) > LONGEST_ADDRESS or not text.isprintable():
        raise UserError(f"{address} holds no address of checkpoints: write it there, or delete the file")
    return parse(text)
