"""The integer stream is the same, bit for bit, in eager PyTorch and in both ExecuTorch backends."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

from mobizo_compiler.step.noise import noise_values, noise_words

SEEDS = (0, 1, 17, 2**31 - 1)


class Words(nn.Module):
    def forward(self, seed: Tensor) -> tuple[Tensor, ...]:
        first, second = noise_words(seed, 3, 1001)
        return first, second, noise_values(seed, 3, 1001, "rademacher"), noise_values(seed, 3, 1001, "gaussian")


@pytest.mark.slow
@pytest.mark.parametrize("delegate", ["portable", "xnnpack"])
def test_integer_stream(delegate: str) -> None:
    exported = torch.export.export(Words(), (torch.tensor([3], dtype=torch.int32),))
    config = EdgeCompileConfig(
        _check_ir_validity=False,
        _core_aten_ops_exception_list=[torch.ops.aten.bitwise_right_shift.Tensor_Scalar],
    )
    partitioner = [XnnpackPartitioner()] if delegate == "xnnpack" else []
    edge = to_edge_transform_and_lower(exported, partitioner=partitioner, compile_config=config)
    text = edge.exported_program().graph_module.code
    assert ("executorch_call_delegate" in text) == (delegate == "xnnpack")
    buffer = edge.to_executorch().buffer
    method = Runtime.get().load_program(buffer).load_method("forward")
    for seed in SEEDS:
        tensor = torch.tensor([seed], dtype=torch.int32)
        first, second, rademacher, gaussian = method.execute((tensor,))
        wanted = Words()(tensor)
        assert torch.equal(first, wanted[0])
        assert torch.equal(second, wanted[1])
        assert torch.equal(rademacher, wanted[2])
        # XNNPACK reduces an angle below 2 pi with an error of up to 1e-6, and a radius below 6 multiplies it.
        torch.testing.assert_close(gaussian, wanted[3], rtol=0, atol=6e-6)
