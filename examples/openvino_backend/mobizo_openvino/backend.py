"""The members of the backend. Nothing of OpenVINO is imported before it is needed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

from mobizo_compiler.backends import Artifact
from mobizo_compiler.backends.executorch import ExecuTorchBackend
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph import GraphProgram, Pass, operator_name, source_line
from mobizo_openvino.attention import AttentionAsProducts

_DELEGATE = "OpenvinoBackend"  # its name in the registry of ExecuTorch's runtime


class MobizoOpenvino(ExecuTorchBackend):
    """Runs the network on the CPU with OpenVINO, in float32."""

    name = "openvino"

    def unavailable(self) -> str | None:
        """OpenVINO may be missing, and the runtime may have been built without its delegate."""
        try:
            importlib.metadata.version("openvino")
            from executorch.runtime import Runtime

            registry = Runtime.get().backend_registry
            if _DELEGATE not in registry.registered_backend_names:
                return f"this ExecuTorch runtime has no {_DELEGATE}"
            if not registry.is_available(_DELEGATE):
                return f"{_DELEGATE} cannot load OpenVINO; set OPENVINO_LIB_PATH to the path of libopenvino_c"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def unsupported(self, program: GraphProgram) -> list[str]:
        """The delegate takes fixed shapes alone, and layers that torchao quantized have no kernels outside of it."""
        quantized = [
            f"{source_line(node)}: quantized layers cannot be lowered here"
            for node in program.graph.nodes
            if operator_name(node).startswith("torchao::")
        ]
        return quantized + [
            f"size {size.name!r} is dynamic, and shapes are fixed in OpenVINO" for size in program.dynamic.values()
        ]

    def passes(self) -> Sequence[Pass]:
        """Attention without operators on truth values, which would cut the network into pieces."""
        return (AttentionAsProducts(),)

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> Artifact:
        """Lower through ExecuTorch, with a partitioner for each method that knows the names of its inputs."""
        from mobizo_compiler.backends.executorch import lower_to_executorch
        from mobizo_openvino.partition import NetworkPartitioner
        from mobizo_openvino.preprocess import check_alone

        check_alone()
        partitioners = {name: [NetworkPartitioner(tuple(program.inputs))] for name, program in methods.items()}
        return lower_to_executorch(methods, manifest, partitioners)
