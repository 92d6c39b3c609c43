"""The test to copy: whole training steps with the operator, against plain PyTorch; and what must be refused."""

import mobizo_scan
import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler.errors import RowMixingError
from mobizo_compiler.testing import check_against_oracle


class Scanned(torch.nn.Module):
    """A layer, and the operator over its features, or over its rows."""

    def __init__(self, over_rows=False):
        super().__init__()
        self.up, self.over_rows = torch.nn.Linear(6, 5), over_rows

    def forward(self, x):
        """[rows, 5]."""
        y = self.up(x)
        return mobizo_scan.scan(y.t()).t() if self.over_rows else mobizo_scan.scan(y)


def test_scan():
    """Lanes stay apart; see docs/writing_an_estimator.md."""
    x = (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),)
    torch.manual_seed(0)
    check_against_oracle(Scanned().eval(), x, backend="eager", loss=mobizo.MSELoss())
    with pytest.raises(RowMixingError, match="the scan runs over the rows"):
        mobizo.compile(Scanned(over_rows=True).eval(), x, loss=mobizo.MSELoss(), backend="eager")
