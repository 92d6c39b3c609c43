"""The noise is the same, bit for bit, in eager PyTorch and in both ExecuTorch backends."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

from mobizo_compiler.step.noise import noise_values, noise_words, normal_table

SEEDS = (0, 1, 17, 2**31 - 1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", normal_table().clone())

    def forward(self, seed: Tensor) -> tuple[Tensor, ...]:
        made = [noise_values(seed, 3, 1001, distribution, self.table) for distribution in ("rademacher", "gaussian")]
        return noise_words(seed, 3, 1001), *made


@pytest.mark.slow
@pytest.mark.parametrize("delegate", ["portable", "xnnpack"])
def test_bits(delegate: str) -> None:
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
        for found, wanted in zip(method.execute((tensor,)), Words()(tensor), strict=True):
            assert torch.equal(found, wanted)
