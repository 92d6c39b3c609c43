"""The test to copy: the suite has all that an estimator must do."""

from mobizo_leave_one_out import LeaveOneOut

from mobizo_compiler.testing import check_estimator


def test_leave_one_out():
    """Its mean is the gradient; see docs/writing_an_estimator.md."""
    check_estimator(LeaveOneOut())
