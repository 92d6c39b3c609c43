"""The test to copy: the suite has all that an update rule must do."""

from mobizo_lion import Lion

from mobizo_compiler.testing import check_rule


def test_lion():
    """With its defaults, and with options; see docs/writing_an_estimator.md."""
    check_rule(Lion())
    check_rule(Lion(beta1=0.0, beta2=0.5, weight_decay=0.1))
