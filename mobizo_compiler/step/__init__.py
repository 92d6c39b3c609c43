"""What a training step is, free of graphs and of files: all that the author of an estimator, a rule or a loss imports.

`Estimator` says where the lanes are and what their losses say about the gradient, `UpdateRule` what a step does with
that, `Loss` what is learnt; `noise` makes the directions, and a `Site` is one adapted layer in the flat state.
"""

from mobizo_compiler.step.estimators import Estimator
from mobizo_compiler.step.losses import LabelSpec, Loss
from mobizo_compiler.step.noise import noise
from mobizo_compiler.step.rules import Memory, UpdateRule
from mobizo_compiler.step.sites import Site

__all__ = ["Estimator", "LabelSpec", "Loss", "Memory", "Site", "UpdateRule", "noise"]
