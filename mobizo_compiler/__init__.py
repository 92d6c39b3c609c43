"""A compiler that turns any traced inference graph into a program that fine-tunes itself with forward passes only."""

from mobizo_compiler.api import compile
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.device.journal import JournalWarning
from mobizo_compiler.device.run import RunSummary
from mobizo_compiler.device.schedules import schedule
from mobizo_compiler.device.session import Session
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
    "JournalWarning",
    "LabelSpec",
    "LoraConfig",
    "Loss",
    "MSELoss",
    "MaskedLMLoss",
    "MobizoError",
    "Options",
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
]
