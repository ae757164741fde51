"""`python -m trainer.checkpoint inspect|verify|diff`: what is printed, and the exit codes."""

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.made_checkpoints import FILE, commit, table, whole
from trainer.checkpoint import inspection
from trainer.checkpoint.__main__ import main

FACTS = {
    "progress": {"step": 10, "rows": 5120, "epoch": 1, "epoch_step": 4},
    "identity": {"seed": 1, "model": {"name": "deepfm"}},
    "world_size": 2,
    "written": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "metrics": {"last": {"valid.auc": 0.75}},
    "plan": [{"table": "user_id", "sharding": "row_wise", "optimizer": "adagrad_row_wise", "kernel": "fused"}],
}


def pieces(change=0.0):
    weight = table(1000, 8)
    weight[[3, 700], 2] += change
    return [
        whole("tables/user_id/weight", weight),
        whole("tables/user_id/sum", table(1000, 2), widths=(4, 4)),
        whole("tables/a b/ü/weight", table(5, 4)),
        whole("dense/over.weight", torch.ones(3, 5)),
        whole("dense/bias", torch.tensor(1 + change)),
        whole("optimizer/over.weight/exp_avg", torch.ones(3, 5)),
    ]


@pytest.fixture
def run(tmp_path):
    commit(tmp_path / "checkpoints" / "step-9", pieces(), facts=FACTS, texts={"data.json": "{}"})
    commit(tmp_path / "checkpoints" / "step-10", pieces(0.5), facts=FACTS, texts={"data.json": "{}"})
    return tmp_path


def test_inspect_shows_what_is_in_the_newest(run, capsys):
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-10"):
        assert main(["inspect", str(path)]) == 0
        lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
        for expected in (
            f"path {run / 'checkpoints' / 'step-10'}",
            *("step 10", "epoch 1", "rows trained 5,120", "data position batch 4 of epoch 1", "world size 2"),
            *("written 2026-01-02T03:04:05+00:00", "versions torch 2.13.0", "metrics last valid.auc 0.75"),
            "user_id 1,000 8 float32 adagrad_row_wise: sum 1000×2 1 row_wise 0.040",
            "a b/ü 5 4 float32 1 – 0.000",
            *("dense 2 16 0.000", "optimizer 1 15 0.000", "data.json 0.000"),
        ):
            assert expected in lines, lines
        assert any(line.startswith(f"{FILE} 0.04") for line in lines)
        assert not any("deepfm" in line for line in lines)


def test_inspect_tells_machines_everything(run, capsys):
    assert main(["inspect", "--json", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"] == FACTS and found["path"].endswith("step-10")
    users = next(row for row in found["tables"] if row["table"] == "user_id")
    assert users == {
        **{"table": "user_id", "rows": 1000, "dim": 8, "dtype": "float32", "states": {"sum": [1000, 2]}, "parts": 1},
        **{"bytes": 40_000, "optimizer": "adagrad_row_wise", "sharding": "row_wise"},
    }
    assert found["kinds"]["dense"] == {"tensors": 2, "values": 16, "bytes": 64}
    assert set(found["files"]) == {"MANIFEST.json", "state.json", "index.json", "data.json", FILE}


def test_verify_looks_at_all_of_them(run, tmp_path, capsys):
    commit(tmp_path / "other" / "checkpoints" / "step-1", pieces())
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == ["step-10: whole", "step-9: whole", "step-1: whole"]
    (run / "checkpoints" / "step-9" / "data.json").write_text("[]")
    assert main(["verify", str(run / "checkpoints")]) == 1
    assert "step-10: whole\n" in (shown := capsys.readouterr().out) and "step-9: data.json differs from" in shown
    assert main(["verify", str(run / "checkpoints" / "step-9")]) == 1


def test_diff_shows_facts_and_values(run, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "SLAB_BYTES", 1000)
    later = {**FACTS, "progress": {**FACTS["progress"], "step": 11}, "seen": True}
    more = [whole("dense/new", torch.ones(1)), *pieces(-1.0)[:1], *pieces(0.5)[3:]]
    more.append(whole("tables/user_id/sum", table(1000, 1), widths=(8,)))
    commit(run / "checkpoints" / "step-11", more, facts=later, texts={"data.json": "[]"})
    assert main(["diff", str(run / "checkpoints" / "step-10"), str(run)]) == 1
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        *("progress.step 10 11", "seen – True", "data.json another text"),
        "tables/user_id/sum [1000, 2] float32 widths [4, 4] [1000, 1] float32 widths [8]",
        *("tables/a b/ü/weight only here", "dense/new only here"),
        *("tables/user_id/weight 2 of 1,000 1.5", "3 tensors are equal"),
    ):
        assert expected in lines, lines
    assert not any(line.startswith(("dense/bias", "progress.rows", "identity")) for line in lines)


def test_diff_of_equals(run, capsys):
    path = str(run / "checkpoints" / "step-10")
    assert main(["diff", path, path]) == 0
    assert capsys.readouterr().out == "6 tensors are equal, and all facts\n"
    assert main(["diff", path, str(run / "checkpoints" / "step-9")]) == 1
    assert "dense/bias" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["verify"]])
def test_a_wrong_path_is_one_clear_line(tmp_path, arguments, capsys):
    (tmp_path / "file").write_text("")
    for path, problem in (("nowhere", "does not exist"), ("file", "is no folder"), ("", "holds no checkpoint")):
        assert main([*arguments, str(tmp_path / path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and problem in err and "give" in err
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2


def test_a_damaged_one_is_one_clear_line(run, capsys):
    (run / "checkpoints" / "step-10" / "index.json").write_text("{}")
    for arguments in (["inspect", str(run)], ["diff", str(run), str(run)]):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "step-10: index.json differs from MANIFEST.json" in err


def test_it_starts_without_the_heavy_libraries(run):
    heavy = "('torchrec', 'fbgemm_gpu', 'hydra', 'omegaconf', 'duckdb')"
    code = (
        f"import sys; from trainer.checkpoint.__main__ import main; code = main(sys.argv[1:]); "
        f"sys.exit(code or ' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    )
    for arguments in (["inspect", run], ["verify", run], ["diff", run / "checkpoints" / "step-10", run]):
        found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, ""), found.stderr
