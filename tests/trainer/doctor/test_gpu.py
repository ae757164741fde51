"""`trainer.doctor --gpu` without a card: its reference against PyTorch and FBGEMM's CPU kernels, and what it says of made-up
cards."""

import json

import pytest
import torch

from trainer.doctor import fused, gpu, processes, training
from trainer.doctor.__main__ import main
from trainer.doctor.finding import passed

CPU = torch.device("cpu")


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_the_formulas_are_those_of_pytorch_where_every_row_is_touched(optimizer):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(weights.clone())
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=fused.LR),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=fused.LR, eps=fused.EPS),
        "adam": lambda p: torch.optim.Adam(p, lr=fused.LR, eps=fused.EPS, betas=(fused.BETA1, fused.BETA2)),
    }
    theirs, ours = kinds[optimizer]([parameter]), fused.Update(optimizer)
    for _ in range(3):
        parameter.grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        weights = ours(weights, parameter.grad, torch.arange(5))
        theirs.step()
    torch.testing.assert_close(weights, parameter.detach(), rtol=1e-12, atol=1e-12)


def test_row_wise_adagrad_keeps_a_mean_and_leaves_other_rows_alone():
    update, gradient = fused.Update("rowwise_adagrad"), torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = update(torch.zeros(2, 2, dtype=torch.float64), gradient, torch.tensor([0]))
    torch.testing.assert_close(found[0], -fused.LR * gradient[0] / 12.5**0.5, rtol=1e-7, atol=0)
    assert found[1].tolist() == [0, 0]


@pytest.mark.parametrize("case", fused.all_cases(CPU), ids=lambda case: f"{case.optimizer}-{case.pooled}-{case.dim}")
def test_fbgemm_on_the_cpu_passes_and_a_wrong_rate_does_not(case, monkeypatch):
    assert fused.compare(case, CPU)["right"]
    right = fused.Update._direction
    monkeypatch.setattr(fused.Update, "_direction", lambda *arguments: 1.001 * right(*arguments))
    assert not fused.compare(case, CPU)["right"]


def test_without_a_gpu_it_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    seen = {"build": None, "devices": [], "apart": [], "unusable": []}
    monkeypatch.setattr(gpu, "run_probes", lambda arguments, seconds, probe=None: [seen])
    monkeypatch.setattr(gpu, "driver", lambda: None)
    assert main(["--gpu", "--folder", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: --gpu: PyTorch sees no GPU here (no NVIDIA driver, torch is a CPU build)")
    monkeypatch.setattr(gpu, "run_probes", lambda *_: (_ for _ in ()).throw(gpu.ProbeError("ImportError: numpy")))
    assert main(["--gpu", "--folder", str(tmp_path)]) == 2
    assert "PyTorch cannot look for GPUs (ImportError: numpy)" in capsys.readouterr().err


def answer(arguments, seconds, probe=None):
    """Two cards, on which row-wise AdaGrad of fp16 is wrong."""
    if arguments == [["gpus"]]:
        card = {"name": "H200", "capability": [9, 0], "free": 130 << 30, "total": 140 << 30}
        return [{"build": "13.0", "devices": [card] * 2, "apart": [], "unusable": []}]
    if probe == processes.FUSED:
        kinds = [("adagrad", "fp32", True), ("rowwise_adagrad", "fp32", True), ("rowwise_adagrad", "fp16", False)]
        case = {"pooled": True, "dim": 8, "lookup": 0.0, "update": 1e-7}
        return [[{"optimizer": o, "precision": p, "right": r, **case} for o, p, r in kinds]]
    if arguments[0][0] == "pinned":
        return [{"right": True, "copy_gb_per_s": 50.0, "write_gb_per_s": 2.0}]
    return [{"right": True, "gb_per_s": {"all_reduce": 400.0 - rank, "all_to_all": 300.0}} for rank in range(2)]


def test_a_page_and_a_json_file_say_what_is_right_and_how_fast(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "run_probes", answer)
    monkeypatch.setattr(training, "check", lambda model, *_: ([passed(f"training {model}", "200 steps")], {"a": 1}))
    assert main(["--gpu", "--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "fail  fused rowwise_adagrad: 2 cases" in out and "wrong: fp16, pooled, 8" in out
    assert "pass  NCCL: 2 GPU(s): all_reduce 399.0 GB/s, all_to_all 300.0 GB/s" in out
    page = json.loads((tmp_path / gpu.NAME).read_text())
    assert not page["ok"] and page["measured"]["GPUs"]["devices"][0]["capability"] == [9, 0]
    assert set(page["measured"]) == {
        *("machine", "GPUs", "lookups", "nccl", "pinned writes"),
        *(f"training {model}" for model in training.MODELS),
    }


def test_a_run_that_fails_is_named_by_its_own_words(monkeypatch, tmp_path):
    class Done:
        returncode, stderr = 2, "note\nerror: GPU 0 cannot be used\nlaunch: rank 0 …\n"

    monkeypatch.setattr(training.subprocess, "run", lambda *_, **__: Done)
    (found,), _ = training.check("din", 1, tmp_path, 1)
    assert found.state == "fail" and "exit code 2 before step 200: error: GPU 0 cannot be used" in found.message
