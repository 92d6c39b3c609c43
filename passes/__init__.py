"""The rewrites, one file each, in the order in which `mobizo_compiler.api` runs them."""

from mobizo_compiler.passes.add_clean_lane import AddCleanLane
from mobizo_compiler.passes.attach_loss import AttachLoss
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.passes.capture import capture, empty_program, outputs_of
from mobizo_compiler.passes.capture_cache import capture_cache
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.passes.difference_losses import DifferenceLosses
from mobizo_compiler.passes.differentiate import Differentiate, DifferentiateCleanLane
from mobizo_compiler.passes.duplicate_lanes import DuplicateLanes
from mobizo_compiler.passes.free_rows import FreeRows
from mobizo_compiler.passes.hoist_picks import HoistPicks
from mobizo_compiler.passes.insert_mp_lora import InsertMPLoRA
from mobizo_compiler.passes.last_token import LastToken
from mobizo_compiler.passes.merge_siblings import MergeSiblings
from mobizo_compiler.passes.pass_state import PassState
from mobizo_compiler.passes.perturb import Perturb
from mobizo_compiler.passes.prefix import AfterPrefix, Prefix
from mobizo_compiler.passes.quantize import Quantize
from mobizo_compiler.passes.recompute import Recompute
from mobizo_compiler.passes.replay import Replay
from mobizo_compiler.passes.slice_outputs import SliceOutputs
from mobizo_compiler.passes.specialize import Specialize
from mobizo_compiler.passes.tidy import Tidy
from mobizo_compiler.passes.update_state import UpdateState

__all__ = [
    "AddCleanLane",
    "AfterPrefix",
    "AttachLoss",
    "Canonicalize",
    "DecomposeAttention",
    "DifferenceLosses",
    "Differentiate",
    "DifferentiateCleanLane",
    "DuplicateLanes",
    "FreeRows",
    "HoistPicks",
    "InsertMPLoRA",
    "LastToken",
    "MergeSiblings",
    "PassState",
    "Perturb",
    "Prefix",
    "Quantize",
    "Recompute",
    "Replay",
    "SliceOutputs",
    "Specialize",
    "Tidy",
    "UpdateState",
    "capture",
    "capture_cache",
    "empty_program",
    "outputs_of",
]
