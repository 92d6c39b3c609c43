"""One copy of everything: of a tied weight and of the initial state in the file, of packed weights in memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from executorch.exir._serialize._program import _flatbuffer_to_program
from torch import Tensor, fx, nn

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, Program, Session, ZOConfig
from mobizo_compiler.backends.executorch import lower as lowering
from mobizo_compiler.backends.executorch import program_file
from mobizo_compiler.backends.executorch.delegates import needed_delegates
from mobizo_compiler.backends.executorch.head import HEAD_BYTES, is_program, read_head, read_header
from mobizo_compiler.backends.executorch.one_copy import share_equal_data
from mobizo_compiler.backends.executorch.runtime_options import set_backend_option
from mobizo_compiler.backends.xnnpack import partition
from mobizo_compiler.testing import TinyCausalLM, tiny_batch

pytestmark = pytest.mark.xdist_group("memory")  # one process, so that its programs are made once

TABLE_BYTES = 1501 * 24 * 4


class Tied(nn.Module):
    """A language model whose head is its embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1501, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [rows, tokens, 1501]."""
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return nn.functional.linear(hidden, self.embedding.weight)


@pytest.fixture(scope="module")
def twice() -> Program:
    """The program as ExecuTorch writes it, with the table in it twice."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=("up", "down"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "share_equal_data", lambda path: 0)
        return mobizo.compile(
            Tied().eval(), (torch.zeros(3, 5, dtype=torch.int64),), lora, ZOConfig(queries=2), CausalLMLoss()
        )


def outcome(program: Program) -> list[Tensor]:
    session = Session(program)
    generator = torch.Generator().manual_seed(3)
    session.load_state(torch.randn(program.parameters, generator=generator) * 0.1)
    tokens = torch.randint(0, 1501, (3, 5), generator=generator)
    result = session.train_step((tokens,), tokens, seed=4, learning_rate=0.1, eps=0.05)
    return [result.lane_losses, session.state(), session.evaluate((tokens,))]


@pytest.mark.slow
def test_a_tied_weight_is_in_the_file_once(twice: Program, tmp_path: Path) -> None:
    path = twice.save(tmp_path / "program.pte")
    before = path.stat().st_size
    saved = share_equal_data(path)
    assert path.stat().st_size == before - saved
    assert TABLE_BYTES <= saved < TABLE_BYTES + 8192
    assert share_equal_data(path) == 0, "a second time there is nothing left to share"
    for a, b in zip(outcome(twice), outcome(mobizo.load(path)), strict=True):
        assert torch.equal(a, b)
    assert [file.name for file in tmp_path.iterdir()] == ["program.pte"]


def test_the_head_of_a_file_is_read_as_executorch_reads_it(twice: Program, tmp_path: Path) -> None:
    """ExecuTorch's own reader makes objects of the whole head; ours looks up what it is asked for."""
    path = twice.save(tmp_path / "program.pte")
    for _ in range(2):
        data = path.read_bytes()
        header = read_header(data[:HEAD_BYTES])
        assert header is not None and is_program(data)
        found, whole = read_head(data), _flatbuffer_to_program(data[: header.program_size])
        assert [(s.offset, s.size) for s in found.segments] == [(s.offset, s.size) for s in whole.segments]
        assert found.constant == whole.constant_segment.segment_index
        assert list(found.constants) == whole.constant_segment.offsets[1:]
        assert found.named == {named.segment_index for named in whole.named_data}
        delegates = [delegate.id for plan in whole.execution_plan for delegate in plan.delegates]
        assert found.delegates == needed_delegates(path) == tuple(dict.fromkeys(delegates)) == ("XnnpackBackend",)
        ends = [segment.offset + segment.size for segment in found.segments]
        assert header.segment_data_size == max(ends)
        share_equal_data(path)


def test_a_truncated_file_is_still_noticed(twice: Program, tmp_path: Path) -> None:
    path = twice.save(tmp_path / "program.pte")
    share_equal_data(path)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(mobizo.errors.ArtifactError, match="truncated"):
        mobizo.load(path)


@pytest.mark.slow
def test_the_initial_state_is_in_the_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for rank in (1, 401):
        torch.manual_seed(0)
        lora = LoraConfig(r=rank, lora_alpha=1, target_modules=("up",))
        program = mobizo.compile(Tied().eval(), (torch.zeros(3, 5, dtype=torch.int64),), lora, ZOConfig(queries=1))
        sizes.append(program.artifact.path.stat().st_size)  # type: ignore[attr-defined]
    state, lora_a = 400 * 40 * 4, 400 * 24 * 4
    # A is in the delegates, scaled, and in a constant method, as it is.
    assert sizes[1] - sizes[0] == pytest.approx(state + 2 * lora_a, abs=4096)


def test_shared_packed_weights_change_no_bit(twice: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = outcome(twice)
    monkeypatch.setattr(program_file, "shared_packed_weights", contextlib.nullcontext)
    for a, b in zip(shared, outcome(twice), strict=True):
        assert torch.equal(a, b)


def test_the_runtime_has_the_option() -> None:
    assert set_backend_option("XnnpackBackend", "weight_cache_enabled", False)
    assert not set_backend_option("NoSuchBackend", "weight_cache_enabled", True)


@pytest.mark.slow
def test_delegates_are_cut_into_parts_of_limited_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = TinyCausalLM(layers=3).eval()
    inputs, labels = tiny_batch()
    delegates, results = [], []
    for limit in (1 << 30, 8192):  # a layer has 11 kB of weights
        monkeypatch.setattr(partition, "MOST_WEIGHT_BYTES", limit)
        program = mobizo.compile(model, inputs, LoraConfig(r=2, lora_alpha=3), ZOConfig(queries=2))
        delegates.append(program.artifact.delegation["evaluate"].delegates)  # type: ignore[attr-defined]
        session = Session(program)
        session.load_state(torch.randn(program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1)
        step = session.train_step(inputs, labels, seed=4, learning_rate=0.1, eps=0.05)
        results.append((step.lane_losses, session.evaluate(inputs)))
    assert delegates[1] >= delegates[0] + 3
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_parts_are_cut_where_little_crosses() -> None:
    graph = fx.Graph()
    narrow = graph.placeholder("x")
    narrow.meta["val"] = torch.zeros(4, 2)
    calls = []
    for layer in range(4):
        up, down = graph.placeholder(f"up_{layer}"), graph.placeholder(f"down_{layer}")
        up.meta["val"], down.meta["val"] = torch.zeros(100, 2), torch.zeros(2, 100)
        wide = graph.call_function(torch.ops.aten.linear.default, (narrow, up))
        wide.meta["val"] = torch.zeros(4, 100)
        narrow = graph.call_function(torch.ops.aten.linear.default, (wide, down))
        narrow.meta["val"] = torch.zeros(4, 2)
        calls += [wide, narrow]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "MOST_WEIGHT_BYTES", 2000)  # a layer has 1600 bytes
        parts = partition._parts(calls, [[call] for call in calls], set())
        in_pairs = partition._parts(calls, [calls[1:3], calls[3:5], calls[5:7]], set())
        outside = partition._parts(calls, [], set(graph.find_nodes(op="placeholder")))
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    assert [node for part in parts for node in part] == calls
    assert [len(part) for part in in_pairs] == [3, 2, 2, 1], "what must stay together is not parted"
    assert outside == [calls], "weights that are read in the file are not packed"
