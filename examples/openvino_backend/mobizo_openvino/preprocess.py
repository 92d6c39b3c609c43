"""From a part of a graph to the bytes that ExecuTorch's OpenVINO delegate imports at run time.

The delegate imports a compiled model and passes it no properties, so OpenVINO chooses the precision where the program
runs: bfloat16 on processors that have it, in which the difference of two losses is lost. What a model was compiled
with is not part of its export. But HETERO, OpenVINO's device for models that are spread over several devices, writes
its configuration in front of the model and reads it back, properties for the devices below it among them. So models
are compiled for HETERO over the one device, and the property is written there.

ExecuTorch has such a module too, `executorch.backends.openvino`. It cannot do this, and it needs the package nncf,
which does not take the version of networkx that mobizo_compiler is tested with. The half of the delegate that runs is
ExecuTorch's, as it is.
"""

from __future__ import annotations

from typing import final

import openvino
import torch
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.passes.memory_format_ops_pass import DimOrderOpsRevertPass
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch.export import ExportedProgram

from mobizo_compiler.errors import LoweringError

DEVICE = "HETERO:CPU"
_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


@final
class OpenvinoBackend(BackendDetails):  # type: ignore[misc]
    """The half of ExecuTorch's OpenVINO delegate that lowers; the delegate's name is the name of this class."""

    @staticmethod
    def preprocess(exported: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """Convert, compile, export."""
        DimOrderOpsRevertPass()(exported.graph_module)
        decoder = TorchFXPythonDecoder(exported.module(check_guards=False))  # the model's constants lie in its tensors
        core, model = openvino.Core(), _converted(decoder, exported)
        blob = core.compile_model(model, DEVICE, _PRECISION).export_model()
        return PreprocessResult(processed_bytes=in_float32(blob.getvalue()))


def in_float32(exported: bytes) -> bytes:
    """An exported model, with the property in its header that makes it compute in float32 wherever it is imported.

    Raises:
        LoweringError: The header is another than that of OpenVINO 2025.4, or the model is in several parts.
    """
    header, end, rest = exported.partition(b"</hetero_config>")
    if not end or header.count(b"<compiled_submodel ") != 1:
        raise LoweringError(
            f"OpenVINO {openvino.__version__} exported a model in a form that the backend 'openvino' does not know",
            hint="install openvino==2025.4.1",
        )
    properties = "".join(f'<config key="{key}" value="{value}"/>' for key, value in _PRECISION.items())
    return header + properties.encode() + end + rest


def _converted(decoder: TorchFXPythonDecoder, exported: ExportedProgram) -> openvino.Model:
    """A part of a graph, whose inputs are float32 tensors of fixed shapes, as a model of OpenVINO."""
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    names = exported.graph_signature.user_inputs
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    for place, value in zip(model.inputs, values, strict=True):
        assert value.dtype == torch.float32, f"the partitioner let {value} in"
        place.get_node().set_element_type(openvino.Type.f32)
        place.get_node().set_partial_shape(openvino.PartialShape(list(value.shape)))
    model.validate_nodes_and_infer_types()
    return model


def check_alone() -> None:
    """ExecuTorch finds the class by its name, and takes one of several.

    Raises:
        LoweringError: There are several.
    """
    others = [
        c for c in BackendDetails.__subclasses__() if c.__name__ == "OpenvinoBackend" and c is not OpenvinoBackend
    ]
    if others:
        raise LoweringError(
            f"{others[0].__module__} is imported, which lowers for the same delegate, but not in float32",
            hint="lower in a process that does not import it",
        )
