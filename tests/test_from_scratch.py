"""examples/from_scratch.py: the small compiler computes what a plain PyTorch step does, and trains."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.runtime import Runtime
from torch import Tensor, nn

from examples import from_scratch as small

pytestmark = pytest.mark.xdist_group("from_scratch")  # one process, so that its programs are made once

MASK = 0xFFFFFFFF


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return small.TinyDecoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "program.pte"
    small.lower(model, path)
    return path


def test_it_needs_torch_and_executorch_only() -> None:
    tree = ast.parse(Path(small.__file__).read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in modules} == {"__future__", "argparse", "pathlib", "torch", "executorch"}


def word(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def test_noise_is_what_whole_numbers_give() -> None:
    found = small.noise(torch.tensor([17], dtype=torch.int32), 50)
    for query in range(small.QUERIES):
        words = [word(word(counter) ^ word(word(17) + query & MASK)) for counter in range(50)]
        assert found[query].tolist() == [1.0 - 2.0 * (w & 1) for w in words]


def test_noise_has_no_preferred_direction() -> None:
    z = torch.cat([small.noise(torch.tensor([seed], dtype=torch.int32), 5000) for seed in range(8)])
    among = z @ z.t() / 5000 - torch.eye(len(z))
    # Means and products of 5000 independent signs have a standard deviation of .014; 6 of them for 8,000 pairs.
    assert z.mean(1).abs().max() < 6 / 5000**0.5 and among.abs().max() < 6 / 5000**0.5


class Plain:
    """The same in plain PyTorch: module hooks, one lane after the other, float64."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state, self.seen = copy.deepcopy(model).double(), torch.zeros(0), torch.zeros(0)
        offset = 0
        for name in small.LAYERS:  # they are called in this order
            layer: Any = self.model.get_submodule(name)
            adapter = small.Adapter(layer, offset, 1)
            layer.register_forward_hook(self.branch(adapter.a.double(), offset, offset + adapter.size))
            offset += adapter.size
        self.state = torch.zeros(offset, dtype=torch.float64)

    def branch(self, a: Tensor, start: int, end: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            return y + small.SCALING * args[0] @ a.t() @ self.seen[start:end].reshape(small.RANK, -1)

        return hook

    def logits(self, words: Tensor, state: Tensor) -> Tensor:
        self.seen = state
        return self.model(words)

    def step(self, words: Tensor, labels: Tensor, seed: int, learning_rate: float, eps: float) -> tuple[float, Tensor]:
        z_QP = small.noise(torch.tensor([seed], dtype=torch.int32), len(self.state)).double()
        lanes = [self.state + sign * eps * z_P for sign in (1, -1) for z_P in z_QP]
        losses = [F.cross_entropy(self.logits(words, lane).flatten(0, 1), labels.flatten()) for lane in lanes]
        loss_G = torch.stack(losses)
        g_Q = (loss_G[: small.QUERIES] - loss_G[small.QUERIES :]) / (2 * eps)
        self.state = self.state - learning_rate / small.QUERIES * (g_Q @ z_QP)
        return float(loss_G.mean()), g_Q


@pytest.mark.slow
def test_the_program_does_what_plain_pytorch_does(model: nn.Module, path: Path) -> None:
    program = Runtime.get().load_program(path)
    train_step, evaluate = program.load_method("train_step"), program.load_method("evaluate")
    state, plain = train_step._method.get_attribute("lora_b"), Plain(model)
    assert not state.any()
    # float32 losses of some 3.5 with an error of a few 1e-7 of their size: that over eps in the gradient, and the
    # learning rate times that in the state.
    eps, error = 0.05, 2e-6
    for seed in range(3):
        words, labels = small.batch(seed)
        seed_1, rate = torch.tensor([seed], dtype=torch.int32), torch.tensor([0.1])
        loss, g_Q = train_step.execute((words, labels, seed_1, rate, torch.tensor([eps])))
        wanted_loss, wanted_g_Q = plain.step(words, labels, seed, 0.1, eps)
        assert float(loss) == pytest.approx(wanted_loss, abs=error)
        torch.testing.assert_close(g_Q.double(), wanted_g_Q, rtol=0, atol=3 * error / eps)
        torch.testing.assert_close(state.double(), plain.state, rtol=0, atol=0.1 * 3 * error / eps * (seed + 1))
    assert state.abs().max() > 0.05, "the steps have moved the state"
    words, _ = small.batch(9)
    found = evaluate.execute((words,))[0]
    torch.testing.assert_close(found.double(), plain.logits(words, plain.state), rtol=0, atol=1e-4)
    assert (found - model(words)).abs().max() > 0.05, "evaluate has the adapter on"


@pytest.mark.slow
def test_learning_rate_0_changes_nothing(path: Path) -> None:
    train_step = Runtime.get().load_program(path).load_method("train_step")
    state = train_step._method.get_attribute("lora_b")
    state.copy_(torch.linspace(-1, 1, len(state)))
    before = state.clone()
    arguments = (*small.batch(0), torch.tensor([3], dtype=torch.int32))
    train_step.execute((*arguments, torch.zeros(1), torch.tensor([0.01])))
    assert torch.equal(state, before)
    train_step.execute((*arguments, torch.ones(1), torch.tensor([0.01])))
    assert not torch.equal(state, before)


@pytest.mark.slow
def test_it_learns(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = small.train(path, steps=300)
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:10]) / 10
    assert int(re.findall(r"(\d+)%", capsys.readouterr().out)[0]) > 50
