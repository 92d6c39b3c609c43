"""A compiler that turns any traced inference graph into a program that fine-tunes itself with forward passes only."""

from mobizo_compiler.api import compile, load
from mobizo_compiler.artifact import Program, StepResult
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.finetune import RunSummary
from mobizo_compiler.journal import JournalWarning
from mobizo_compiler.losses import (
    CausalLMLoss,
    ChoiceLoss,
    LabelSpec,
    Loss,
    MaskedLMLoss,
    MSELoss,
    SequenceClassificationLoss,
    TokenClassificationLoss,
)
from mobizo_compiler.noise import noise
from mobizo_compiler.program import Site
from mobizo_compiler.quantization import QuantizationConfig
from mobizo_compiler.schedules import schedule
from mobizo_compiler.session import Session

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
