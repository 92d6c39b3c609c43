"""The test to copy: the suite has all that a loss must do, on outputs and labels of its kind."""

import torch
from mobizo_focal import FocalLoss

from mobizo_compiler.testing import check_loss


def test_focal():
    """Labels that count and labels that do not; see docs/writing_an_estimator.md."""
    outputs = {"logits": torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))}
    labels = torch.tensor([[-100, 4, -100, 2], [-100, 1, 0, -100], [-100, -100, 7, 3]])
    check_loss(FocalLoss(), outputs, labels)
    check_loss(FocalLoss(gamma=0.5), outputs, labels)
