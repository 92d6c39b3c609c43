"""What lies in a file: programs with their manifest and checksum, the state, peft's adapters; files appear whole.

`Program` is what `compile` and `load` return; a backend adds its `Artifact` and `Runner`. May import `config`,
`step` and the graph that a program holds, but not what rewrites graphs.
"""

from mobizo_compiler.format.manifest import Manifest, TensorSpec
from mobizo_compiler.format.program import Artifact, Program, Runner, StepResult

__all__ = ["Artifact", "Manifest", "Program", "Runner", "StepResult", "TensorSpec"]
