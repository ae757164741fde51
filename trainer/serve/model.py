"""The exported model: its own class, with lookups in the export's files and the dense layers' exported values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from data_loaders.errors import UserError
from trainer.checkpoint.tensor_file import TensorFile
from trainer.config.job import TrainConfig
from trainer.models.construct import build_model
from trainer.modules.embeddings import is_wide_table
from trainer.serve.artifact import DENSE, TableEntry
from trainer.serve.tables import KEY, MappedTable, replace_lookups


def load_tables(folder: Path, entries: Sequence[TableEntry]) -> dict[str, MappedTable]:
    """Raises ``UserError`` where a file is not what its entry says."""
    found = {}
    for entry in entries:
        rows = open_tensors(folder, entry.file)[KEY]
        if len(rows) != entry.rows:
            raise UserError(f"export {folder}: {entry.file} has {len(rows)} rows, not {entry.rows}: damaged")
        found[entry.name] = MappedTable(rows, wide=is_wide_table(entry.name))
    return found


def load_model(config: TrainConfig, tables: Mapping[str, MappedTable], folder: Path) -> nn.Module:
    """``model(batch)`` gives logits, for a batch whose ids are ``RequestIds``; its dense layers are those of ``folder``. Raises
    ``UserError``."""
    model = build_model(config.model, config.data.schema, config.seed)
    replace_lookups(model, tables)
    dense = open_tensors(folder, DENSE)
    try:
        model.load_state_dict({name: dense[name].clone() for name in dense.tensors})
    except RuntimeError as error:
        raise UserError(
            f"export {folder}: {DENSE} does not fit model {config.model['name']} ({str(error).splitlines()[-1].strip()}): "
            "export the run again with this program"
        ) from None
    return model.eval().requires_grad_(False)


def open_tensors(folder: Path, name: str) -> TensorFile:
    try:
        return TensorFile(folder / name)
    except (OSError, ValueError) as error:
        raise UserError(f"export {folder}: {name} {error}") from None
