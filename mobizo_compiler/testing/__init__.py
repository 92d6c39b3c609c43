"""What authors of backends, passes, estimators, rules and losses test with: suites, small models, a zoo, the oracle.

`check_against_oracle` compiles any model for any backend and compares training steps with plain PyTorch; `zoo` has
models to try it on. Models of transformers need that package when they are built.
"""

from mobizo_compiler.testing.backend import check_backend
from mobizo_compiler.testing.case import Case
from mobizo_compiler.testing.check import Report, check_against_oracle, check_gradient
from mobizo_compiler.testing.estimator import check_estimator
from mobizo_compiler.testing.loss import check_loss
from mobizo_compiler.testing.models import TinyCausalLM, TinyEncoder, TokenWise, tiny_batch
from mobizo_compiler.testing.oracle import Oracle
from mobizo_compiler.testing.passes import check_pass
from mobizo_compiler.testing.rule import check_rule
from mobizo_compiler.testing.zoo import zoo

__all__ = [
    "Case",
    "Oracle",
    "Report",
    "TinyCausalLM",
    "TinyEncoder",
    "TokenWise",
    "check_against_oracle",
    "check_backend",
    "check_estimator",
    "check_gradient",
    "check_loss",
    "check_pass",
    "check_rule",
    "tiny_batch",
    "zoo",
]
