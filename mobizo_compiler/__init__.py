"""A compiler that turns any traced inference graph into a program that fine-tunes itself in an inference engine."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mobizo_compiler.quiet  # noqa: F401  (it holds back what torchao logs about its build)
from mobizo_compiler.late import late_names

if TYPE_CHECKING:
    from mobizo_compiler.api import compile
    from mobizo_compiler.compiling.options import Options
    from mobizo_compiler.config import GenerateConfig, LoraConfig, ZOConfig
    from mobizo_compiler.device.accountant import Privacy
    from mobizo_compiler.device.journal import JournalWarning
    from mobizo_compiler.device.limits import Limits
    from mobizo_compiler.device.ranks import DistributedSession
    from mobizo_compiler.device.run import RunSummary
    from mobizo_compiler.device.schedules import schedule
    from mobizo_compiler.device.session import Session
    from mobizo_compiler.device.verification import verify_bundle, write_bundle
    from mobizo_compiler.errors import MobizoError
    from mobizo_compiler.format.program import Program, StepResult
    from mobizo_compiler.load import load
    from mobizo_compiler.quantization.weights import QuantizationConfig
    from mobizo_compiler.step.losses import (
        CausalLMLoss,
        ChoiceLoss,
        LabelSpec,
        Loss,
        MaskedLMLoss,
        MSELoss,
        SequenceClassificationLoss,
        TokenClassificationLoss,
    )
    from mobizo_compiler.step.noise import noise
    from mobizo_compiler.step.sites import Site

__version__ = "0.1.0"

__all__ = [
    "CausalLMLoss",
    "ChoiceLoss",
    "DistributedSession",
    "GenerateConfig",
    "JournalWarning",
    "LabelSpec",
    "Limits",
    "LoraConfig",
    "Loss",
    "MSELoss",
    "MaskedLMLoss",
    "MobizoError",
    "Options",
    "Privacy",
    "Program",
    "QuantizationConfig",
    "RunSummary",
    "SequenceClassificationLoss",
    "Session",
    "Site",
    "StepResult",
    "TokenClassificationLoss",
    "ZOConfig",
    "compile",
    "load",
    "noise",
    "schedule",
    "verify_bundle",
    "write_bundle",
]

# Where the public names are. They are imported when they are asked for, so that the command can handle Ctrl-C before
# PyTorch and the engine are loaded, which takes seconds.
_HOMES = {
    "CausalLMLoss": "mobizo_compiler.step.losses",
    "ChoiceLoss": "mobizo_compiler.step.losses",
    "DistributedSession": "mobizo_compiler.device.ranks",
    "GenerateConfig": "mobizo_compiler.config",
    "JournalWarning": "mobizo_compiler.device.journal",
    "LabelSpec": "mobizo_compiler.step.losses",
    "Limits": "mobizo_compiler.device.limits",
    "LoraConfig": "mobizo_compiler.config",
    "Loss": "mobizo_compiler.step.losses",
    "MSELoss": "mobizo_compiler.step.losses",
    "MaskedLMLoss": "mobizo_compiler.step.losses",
    "MobizoError": "mobizo_compiler.errors",
    "Options": "mobizo_compiler.compiling.options",
    "Privacy": "mobizo_compiler.device.accountant",
    "Program": "mobizo_compiler.format.program",
    "QuantizationConfig": "mobizo_compiler.quantization.weights",
    "RunSummary": "mobizo_compiler.device.run",
    "SequenceClassificationLoss": "mobizo_compiler.step.losses",
    "Session": "mobizo_compiler.device.session",
    "Site": "mobizo_compiler.step.sites",
    "StepResult": "mobizo_compiler.format.program",
    "TokenClassificationLoss": "mobizo_compiler.step.losses",
    "ZOConfig": "mobizo_compiler.config",
    "compile": "mobizo_compiler.api",
    "load": "mobizo_compiler.load",
    "noise": "mobizo_compiler.step.noise",
    "schedule": "mobizo_compiler.device.schedules",
    "verify_bundle": "mobizo_compiler.device.verification",
    "write_bundle": "mobizo_compiler.device.verification",
}


__getattr__ = late_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: a module of it does not take the place of what is public under the same name (`load`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
