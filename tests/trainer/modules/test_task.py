import pytest
import torch
from torch import nn

from data_loaders.batch import Batch, Cursor
from data_loaders.schema import Layout, Schema
from tests.helpers.samples import make_batch, random_rows, small_schema
from trainer.modules.task import ClickTask, WeightedLogLoss


class Linear(nn.Module):
    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.layout: Layout = schema.layout()
        self.head = nn.Linear(len(schema.dense), 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.head(batch.dense).squeeze(1)


def test_loss_is_the_weighted_log_loss():
    logits, labels = torch.tensor([0.3, -2.0, 1.5, 9.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    probabilities = 1 / (1 + (-logits.double()).exp())
    terms = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log())
    found = WeightedLogLoss()(logits, labels, weights, torch.tensor(3.0))
    assert found.item() == pytest.approx(((terms * weights).sum() / 3).item(), rel=1e-6)


def test_loss_of_extreme_and_half_precision_logits():
    logits = torch.tensor([1e4, -1e4], dtype=torch.bfloat16, requires_grad=True)
    loss = WeightedLogLoss()(logits, torch.tensor([1.0, 1.0]), torch.ones(2), torch.tensor(2.0))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e4 / 2, rel=1e-2)
    assert logits.grad.tolist() == [0.0, -0.5]


def test_step_of_a_padded_batch():
    schema = small_schema()
    task = ClickTask(Linear(schema))
    rows = random_rows(schema, 3)
    cursor = Cursor(epoch=2, step=7, rows=3, local_rows=3)
    padded = make_batch(
        schema, task.model.layout, [*rows, {}, {}], weights=[1.0, 1, 1, 0, 0], normalizer=3.0, cursor=cursor
    )
    loss, output = task(padded)
    plain, _ = task(make_batch(schema, task.model.layout, rows))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert output.cursor == cursor
    assert torch.equal(output.logits, task.model(padded)) and not output.logits.requires_grad
    assert torch.equal(output.loss, loss) and not output.loss.requires_grad
    assert output.labels is padded.labels and output.weights is padded.weights


def test_two_ranks_average_to_the_mean_loss():
    """normalizer = rows of all ranks / ranks: the mean of both ranks' losses is the mean over all rows."""
    schema = small_schema()
    task = ClickTask(Linear(schema))
    rows = random_rows(schema, 5)
    labels = [1.0, 0.0, 1.0, 1.0, 0.0]
    parts = [
        make_batch(schema, task.model.layout, rows[:3], labels=labels[:3], normalizer=5 / 2),
        make_batch(
            schema, task.model.layout, [*rows[3:], {}], labels=[*labels[3:], 0.0], weights=[1.0, 1, 0], normalizer=5 / 2
        ),
    ]
    whole, _ = task(make_batch(schema, task.model.layout, rows, labels=labels))
    mean = sum(task(part)[0] for part in parts) / 2
    assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
