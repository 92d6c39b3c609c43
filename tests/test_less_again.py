"""What is left out while programs are compiled changes nothing, and torch is as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig
from mobizo_compiler.compiling.less_again import LessAgain
from mobizo_compiler.errors import NoMatchingTargetError
from mobizo_compiler.testing import TokenWise
from mobizo_compiler.upstream import NodeSource, export_utils


def test_an_operator_that_is_new_is_found() -> None:
    with LessAgain():
        before = export_utils._collect_all_valid_cia_ops()
        library = torch.library.Library("mobizo_less_again", "DEF")
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
        after = export_utils._collect_all_valid_cia_ops()
    assert after - before == {torch.ops.mobizo_less_again.twice.default}
    assert after == export_utils._collect_all_valid_cia_ops()


def test_torch_is_as_it_was() -> None:
    materialize, node = export_utils._materialize_cpp_cia_ops, torch.fx.Graph().placeholder("x")
    source = NodeSource(node)
    with LessAgain():
        assert copy.deepcopy([source])[0] is source
        with pytest.raises(NoMatchingTargetError):
            tokens = (torch.zeros(2, 5, dtype=torch.int64),)
            mobizo.compile(TokenWise().eval(), tokens, LoraConfig(target_modules=("nothing",)), backend="eager")
        assert copy.deepcopy(source) is source, "the outer block has not ended"
    assert export_utils._materialize_cpp_cia_ops is materialize
    assert copy.deepcopy(source) is not source and copy.deepcopy(source) == source
