"""Every model of conf/model: the loss and all gradients on the card are those on the CPU."""

from pathlib import Path

import pytest
import torch

import conf
from data_loaders.manifest import Manifest
from tests.helpers import tiny
from tests.helpers.samples import randomize
from trainer.models.construct import build_model
from trainer.modules.task import ClickTask
from trainer.run import build
from trainer.runtime.distributed import Ranks

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))
CPU = torch.device("cpu")
# Sums of up to some thousand terms in float32, in another order: thousands of half an ulp at worst, mostly their root.
RELATIVE, ABSOLUTE = 1e-4, 1e-6


def graded(task, batch, device):
    """The loss and the gradients of all parameters, in float64 on the CPU."""
    task.to(device).zero_grad(set_to_none=True)
    loss, _ = task(batch.to(device))
    loss.backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return loss.detach().double().cpu(), {name: gradient.double().cpu() for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_on_the_cpu(name, click_log):
    config = tiny.job(click_log, f"model={name}").config
    model = build_model(config.model, config.data.schema, config.seed, build.execution(config, 1))
    data = config.data
    columns = [*data.schema.columns(model.layout), *filter(None, (data.schema.label, data.schema.weight))]
    manifest = Manifest.scan(data.train, data.root, columns)
    loader, _ = build.build_train_loader(data, model.layout, 240, 1, Ranks(0, 1, 0, 1, CPU), manifest)
    batch = next(iter(loader.epoch(0)))
    model.to_empty(device=CPU)
    randomize(model, std=0.1)
    task = ClickTask(model).eval()  # without dropout; Dice by its running statistics
    expected_loss, expected = graded(task, batch, CPU)
    loss, found = graded(task, batch, torch.device("cuda", 0))
    assert expected and found.keys() == expected.keys()
    assert float((loss - expected_loss).abs()) <= RELATIVE * float(expected_loss.abs()) + ABSOLUTE
    for parameter, gradient in expected.items():
        error = float((found[parameter] - gradient).norm())
        assert error <= RELATIVE * float(gradient.norm()) + ABSOLUTE, (parameter, error)
