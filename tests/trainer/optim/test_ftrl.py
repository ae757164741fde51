"""The update against algorithm 1 of McMahan et al., 2013, written out for one coordinate."""

import math
import random

import torch

from trainer.config.optim import TableOptimizerConfig
from trainer.optim.ftrl import ftrl_update


class Coordinate:
    """Algorithm 1 as printed: z and n are kept, w is computed when it is needed."""

    def __init__(self, config: TableOptimizerConfig) -> None:
        self.alpha, self.beta, self.l1, self.l2 = config.lr, config.beta, config.l1, config.l2
        self.z = self.n = 0.0

    @property
    def w(self) -> float:
        if abs(self.z) <= self.l1:
            return 0.0
        sign = math.copysign(1.0, self.z)
        return -(self.z - sign * self.l1) / ((self.beta + math.sqrt(self.n)) / self.alpha + self.l2)

    def learn(self, g: float) -> None:
        sigma = (math.sqrt(self.n + g * g) - math.sqrt(self.n)) / self.alpha
        self.z += g - sigma * self.w
        self.n += g * g


def test_update_is_algorithm_1() -> None:
    for settings in ({}, {"l1": 0.5, "l2": 0.3}, {"beta": 0.0, "l1": 2.0}, {"lr": 1.7, "beta": 0.1, "l2": 2.0}):
        config = TableOptimizerConfig("ftrl", **{"lr": 0.1, **settings})
        numbers = random.Random(5)
        coordinates = [Coordinate(config) for _ in range(20)]
        rows = torch.zeros(20, 4, dtype=torch.float64)
        zeros = 0
        for _ in range(30):
            gradients = [numbers.gauss(0.2, 1.0) for _ in coordinates]
            rows[:, 3] = -torch.tensor(gradients, dtype=torch.float64)
            rows = ftrl_update(rows, config)
            for coordinate, g in zip(coordinates, gradients, strict=True):
                coordinate.learn(g)
            expected = torch.tensor([[c.w, c.z, c.n, 0.0] for c in coordinates], dtype=torch.float64)
            torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
            zeros += int((rows[:, 0] == 0).sum())
        assert (zeros > 0) == (config.l1 > 0)


def test_a_row_without_gradient_stays_as_it_is() -> None:
    config = TableOptimizerConfig("ftrl", lr=0.1, beta=0.0, l1=0.3)
    rows = torch.tensor([[0.7, 0.1, 0.0, 0.0], [-0.3, 5.0, 2.0, -0.0], [0.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.0, 1e-3]])
    updated = ftrl_update(rows.clone(), config)
    assert torch.equal(updated[:3], rows[:3])  # beta and n of 0 would divide 0 by 0
    assert not torch.equal(updated[3], rows[3])
