"""Each table optimizer, fp32 and fp16, pooled and not: FBGEMM's kernels on this card against float64."""

import pytest
import torch

from trainer.doctor import fused

CUDA = torch.device("cuda", 0)


def name_of(case):
    return f"{case.optimizer}-{case.precision}-{'pooled' if case.pooled else 'sequence'}-{case.dim}"


@pytest.mark.parametrize("case", fused.all_cases(CUDA), ids=name_of)
def test_lookups_and_updates_are_those_of_the_formulas(case):
    found = fused.compare(case, CUDA)
    assert found["right"], found
