"""Label smoothing, and probabilities after negative downsampling, by their formulas."""

import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from tests.helpers.samples import make_batch, random_rows, small_schema
from trainer.config.job import LossConfig
from trainer.modules.task import ClickTask, WeightedLogLoss


class Numbers(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.layout = schema.layout()
        self.head = nn.Linear(len(schema.dense), 1)

    def forward(self, batch):
        return self.head(batch.dense).squeeze(1)


def test_label_smoothing_is_the_loss_of_smoothed_labels():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, generator=generator), (torch.rand(50, generator=generator) < 0.3).float()
    weights = torch.rand(50, generator=generator)
    found = WeightedLogLoss(0.2)(logits, labels, weights, torch.tensor(50.0))
    # A row with the label 0.9 is 0.9 of a click and 0.1 of none.
    p = torch.sigmoid(logits.double()).numpy()
    mixed = sum(
        log_loss([1.0] * 50 if click else [0.0] * 50, p, sample_weight=weights * share, normalize=False, labels=[0, 1])
        for click in (True, False)
        for share in [torch.where(labels > 0, 0.9, 0.1) if click else torch.where(labels > 0, 0.1, 0.9)]
    )
    assert found.item() == pytest.approx(mixed / 50, rel=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_scores_are_corrected_for_negatives_left_out_and_training_is_not(share):
    schema = small_schema()
    torch.manual_seed(0)
    task = ClickTask(Numbers(schema), negative_sampling_rate=share, label_smoothing=0.1)
    batch = make_batch(schema, task.model.layout, random_rows(schema, 40))
    loss, trained = task(batch)
    task.eval()
    scored_loss, scored = task(batch)
    assert torch.equal(trained.logits, task.model(batch)) and torch.equal(loss, scored_loss)
    p, q = torch.sigmoid(trained.logits.double()), torch.sigmoid(scored.logits.double())
    torch.testing.assert_close(q, p / (p + (1 - p) / share), rtol=1e-6, atol=0)
    labels = batch.labels.numpy()
    assert torch.equal(trained.labels, batch.labels)  # never the smoothed ones
    assert roc_auc_score(labels, p) == roc_auc_score(labels, q)


def test_the_correction_brings_back_the_rate_of_clicks():
    """Of 40 clicks in 1000 rows, one in ten negatives was kept: what a constant model learns there becomes 0.04 again."""
    share = 0.1
    learnt = 40 / (40 + share * 960)
    schema = small_schema()
    model = Numbers(schema)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(math.log(learnt / (1 - learnt)))
    task = ClickTask(model, negative_sampling_rate=share).eval()
    _, scored = task(make_batch(schema, model.layout, random_rows(schema, 3)))
    assert torch.sigmoid(scored.logits).tolist() == pytest.approx([0.04] * 3, rel=1e-6)


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0"),
        ({"negative_sampling_rate": 0.0}, "loss.negative_sampling_rate is 0.0"),
        ({"negative_sampling_rate": 1.5}, "at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LossConfig(**options)
