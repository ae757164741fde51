"""Tests that need a card. Without one they are skipped, each with the reason; what they start runs as far as it can under the
rehearsal of the CUDA path too (`rehearse -- python -m pytest tests/gpu`), where numbers are zeros and comparisons fail."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def why_not(cards: int) -> str | None:
    """Why tests on so many GPUs cannot run here; None where they can."""
    if torch.version.cuda is None:
        return f"needs {cards} GPU(s): torch is a CPU build (make setup DEVICE=cuda)"
    count = torch.cuda.device_count()
    return f"needs {cards} GPU(s): PyTorch sees {count}" if count < cards else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            reason = why_not(2 if item.get_closest_marker("two_cards") else 1)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
