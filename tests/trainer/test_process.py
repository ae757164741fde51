"""How a worker ends: one line and an exit code that says whether to start again may help."""

import pytest

from data_loaders.storage import StorageError
from trainer import process


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("'a.parquet', row group 3: storage failed 5 times"), 1),
        (OSError("'a.parquet': no permission"), 2),
    ],
)
def test_storage_that_keeps_failing_is_worth_another_start(monkeypatch, capsys, error, code):
    def leave(code):
        raise SystemExit(code)

    def job():
        raise error

    monkeypatch.setattr(process, "_leave", leave)
    monkeypatch.setattr(process, "_claim", lambda message: True)
    with pytest.raises(SystemExit) as ended:
        process.guarded(job)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"
