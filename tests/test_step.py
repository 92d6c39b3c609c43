"""What a step computes, on the eager backend: against plain PyTorch, against single lanes, and against calculus."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, ChoiceLoss, LabelSpec, LoraConfig, Loss, Session, ZOConfig
from mobizo_compiler.errors import ExampleInputError
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.losses import register_loss
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

pytestmark = pytest.mark.xdist_group("step")  # one process, so that its programs are made once

TARGETS = ("q_proj", "v_proj", "down_proj")


@functools.cache
def tiny_compiled(queries: int, noise: Any) -> mobizo.Program:
    torch.manual_seed(1)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS)
    zo = ZOConfig(queries=queries, noise=noise)
    return mobizo.compile(TinyCausalLM(layers=1).eval(), tiny_batch()[0], lora=lora, zo=zo, backend="eager")


def tiny_program(queries: int = 3, noise: Any = "gaussian") -> Any:
    """A model, its program, which is compiled once for all tests, and a batch."""
    torch.manual_seed(1)
    return TinyCausalLM(layers=1).eval(), tiny_compiled(queries, noise), *tiny_batch()


def random_state(program: mobizo.Program, seed: int = 0, scale: float = 0.1) -> Tensor:
    return torch.randn(program.parameters, generator=torch.Generator().manual_seed(seed)) * scale


def test_float64_reference_says_what_a_step_is() -> None:
    """In float64 the graph's float32 numbers are within rounding: 1e-6 in a loss, that over eps in a difference."""
    model, program, inputs, labels = tiny_program()
    start = random_state(program)
    session = Session(program)
    session.load_state(start)
    reference = ReferenceStep(model.double(), program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    reference.state.copy_(start)
    for seed in range(5):
        found = session.train_step(inputs, labels, seed=seed, learning_rate=0.02, eps=0.01)
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=0.02, eps=0.01)
        torch.testing.assert_close(found.lane_losses.double(), wanted.lane_losses, rtol=0, atol=3e-6)
        torch.testing.assert_close(
            found.projected_gradient.double(), wanted.projected_gradient, rtol=0, atol=3e-6 / 0.01
        )
        # |z| < 6, three queries: each step may add 0.02 * 6 * 3e-4 to the error of the state.
        torch.testing.assert_close(session.state().double(), reference.state, rtol=0, atol=(seed + 1) * 3.6e-5)
    reference.remove()


def test_sites_layout_and_a() -> None:
    model, program, _, _ = tiny_program()
    modules = dict(model.named_modules())
    end = 0
    for site in program.sites:
        linear = modules[site.fqn]
        assert (site.in_features, site.out_features) == (linear.in_features, linear.out_features)
        assert site.in_features != site.out_features
        assert (site.offset, site.r, site.scaling) == (end, 3, 5 / 3)
        a = program.lora_a(site.fqn)
        assert a.shape == (3, site.in_features)
        limit = 1 / math.sqrt(site.in_features)  # Kaiming-uniform with a = sqrt 5
        assert 0.7 * limit < a.abs().max() <= limit
        end += site.size
    assert program.parameters == end == Session(program).state().numel()
    assert {s.fqn for s in program.sites} == {f"layers.0.{t}" for t in TARGETS}
    again = tiny_compiled.__wrapped__(3, "gaussian")
    assert again is not program
    assert all(torch.equal(again.lora_a(s.fqn), program.lora_a(s.fqn)) for s in program.sites)


def test_zero_b_is_the_model_itself() -> None:
    model, program, inputs, _ = tiny_program()
    with torch.no_grad():
        wanted = model(**inputs)["logits"]
    outputs = Session(program).evaluate(inputs)
    assert set(outputs) == {"logits"}
    torch.testing.assert_close(outputs["logits"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_lanes_in_parallel_equal_lanes_one_by_one(noise: str) -> None:
    _, program, inputs, labels = tiny_program(noise=noise)
    session = Session(program)
    start, eps, seed = random_state(program), 0.03, 11
    session.load_state(start)
    result = session.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=eps)
    z = mobizo.noise(seed, 3, program.parameters, noise)
    for lane in range(6):
        sign = 1 if lane < 3 else -1
        session.load_state(start + sign * eps * z[lane % 3])
        losses, counts = CausalLMLoss()(session.evaluate(inputs), labels)
        torch.testing.assert_close(result.lane_losses[lane], losses.sum() / counts.sum(), rtol=0, atol=2e-6)
    assert result.loss == pytest.approx(float(result.lane_losses.mean()), abs=1e-6)


def test_loss_is_that_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.randn(3, 7, 23)
    _, labels = tiny_batch()
    total, count = CausalLMLoss()(logits, labels)
    wanted = ForCausalLMLoss(logits, labels, vocab_size=23)
    torch.testing.assert_close(total.sum() / count.sum(), wanted)
    few = torch.where(torch.arange(7) == 4, labels, -100)
    torch.testing.assert_close(CausalLMLoss(max_labels=2)(logits, few), CausalLMLoss()(logits, few))


def test_choice_loss_is_cross_entropy_among_the_choices() -> None:
    logits, labels = torch.randn(3, 7, 23), torch.full((3, 7), -100)
    labels[0, 3], labels[1, 6], labels[2, 1] = 9, 4, 17
    total, count = ChoiceLoss(choices=(4, 9, 17))(logits, labels)
    picked = torch.stack([logits[0, 2], logits[1, 5], logits[2, 0]])[:, [4, 9, 17]]
    wanted = torch.nn.functional.cross_entropy(picked, torch.tensor([1, 0, 2]), reduction="none")
    torch.testing.assert_close(total, wanted)
    assert count.tolist() == [1, 1, 1]


def test_max_labels_changes_cost_not_results() -> None:
    torch.manual_seed(1)
    model = TinyCausalLM(layers=1).eval()
    inputs, labels = tiny_batch()
    labels[:, :5] = -100
    results = []
    for most in (None, 2):
        program = mobizo.compile(
            model, inputs, LoraConfig(r=3, target_modules=TARGETS), loss=CausalLMLoss(max_labels=most), backend="eager"
        )
        heads = [n for n in program.methods["train_step"].graph.nodes if "lm_head" in str(n.args)]
        assert [n.meta["val"].shape[1] for n in heads] == [7 if most is None else 2]
        session = Session(program)
        session.load_state(random_state(program))
        results.append(session.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=0.01).lane_losses)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-6)


@dataclasses.dataclass(frozen=True)
class SquaredError(Loss):
    """Quadratic in the outputs, and so in B of a model of one linear layer."""

    def label_spec(self, outputs: Tensor) -> LabelSpec:
        return LabelSpec(tuple(outputs.shape), torch.float32)

    def __call__(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        error = (outputs - labels).square().mean(dim=(1, 2))
        return error, torch.ones_like(error)


register_loss("squared-error", SquaredError)


@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 5),
    widths=st.tuples(st.integers(2, 9), st.integers(2, 9)).filter(lambda w: w[0] != w[1]),
    r=st.integers(1, 4),
    queries=st.integers(1, 4),
    eps=st.sampled_from([0.02, 0.1]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_two_sided_estimate_of_a_quadratic_is_its_gradient(
    rows: int, tokens: int, widths: tuple[int, int], r: int, queries: int, eps: float, seed: int
) -> None:
    """A two-sided difference of a quadratic has no error: g = <gradient, z> at any eps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*widths)).eval()
    x, labels = torch.randn(rows, tokens, widths[0]), torch.randn(rows, tokens, widths[1])
    program = mobizo.compile(
        model,
        (x,),
        lora=LoraConfig(r=r, lora_alpha=3, target_modules=("0",)),
        zo=ZOConfig(queries=queries),
        loss=SquaredError(),
        backend="eager",
    )
    session = Session(program)
    start = random_state(program, seed % 7, 0.5)
    session.load_state(start)
    same = session.train_step((x,), labels, seed=seed, learning_rate=0.0, eps=eps)
    assert torch.equal(session.state(), start), "learning rate 0 must keep every bit"
    result = session.train_step((x,), labels, seed=seed, learning_rate=0.3, eps=eps)
    assert torch.equal(same.projected_gradient, result.projected_gradient)

    b = start.clone().requires_grad_(True)
    (site,) = program.sites
    adapted = model(x) + site.scaling * (x @ program.lora_a(site.fqn).T) @ b.reshape(r, widths[1])
    (adapted - labels).square().mean(dim=(1, 2)).mean().backward()
    z = mobizo.noise(seed, queries, program.parameters)
    size = float(result.lane_losses.abs().max()) + 1
    torch.testing.assert_close(result.projected_gradient, z @ b.grad, rtol=1e-4, atol=2e-6 * size / eps)
    wanted = start - 0.3 / queries * (result.projected_gradient @ z)
    torch.testing.assert_close(session.state(), wanted, rtol=1e-5, atol=1e-5 * size)


def test_steps_can_be_interrupted() -> None:
    _, program, inputs, labels = tiny_program()
    whole, first = Session(program), Session(program)
    for seed in range(6):
        whole.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.01)
    for seed in range(2):
        first.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.01)
    second = Session(program)
    second.load_state(first.state())
    for seed in range(2, 6):
        second.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.01)
    assert torch.equal(second.state(), whole.state())


def test_rewards_that_no_graph_computes_train_through_replay() -> None:
    """Score the lanes with learning rate 0, turn any reward into a projected gradient, replay it."""
    _, program, inputs, labels = tiny_program(queries=2)
    direct, by_reward = Session(program), Session(program)
    for seed in range(4):
        direct.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.01)
        scored = by_reward.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=0.01)
        plus, minus = scored.lane_losses.split(2)
        by_reward.replay(seed, (plus - minus) / (2 * torch.tensor(0.01)), 0.05)
    torch.testing.assert_close(by_reward.state(), direct.state(), rtol=0, atol=1e-6)


def test_training_lowers_the_loss() -> None:
    _, program, inputs, labels = tiny_program(queries=8)
    session = Session(program)
    losses = [session.train_step(inputs, labels, seed=s, learning_rate=2.0, eps=0.01).loss for s in range(120)]
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:10]) / 10


def test_compile_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = TokenWise().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mobizo.compile(
        model, (torch.zeros(2, 5, dtype=torch.int64),), LoraConfig(r=2, target_modules=("up",)), backend="eager"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_number_of_rows_also_one(rows: int) -> None:
    torch.manual_seed(0)
    model = TokenWise().eval()
    tokens = torch.randint(0, 11, (rows, 5))
    program = mobizo.compile(model, (tokens,), LoraConfig(r=2, target_modules=("up",)), backend="eager")
    session = Session(program)
    session.load_state(random_state(program))
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    reference.state.copy_(session.state())
    found = session.train_step((tokens,), tokens, seed=1, learning_rate=0.1, eps=0.01)
    wanted = reference.train_step((tokens,), tokens, seed=1, learning_rate=0.1, eps=0.01)
    torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=2e-6)


def test_an_exported_program_is_taken_too() -> None:
    torch.manual_seed(0)
    model = TinyCausalLM(layers=1).eval()
    inputs, labels = tiny_batch()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs})
    lora = LoraConfig(r=3, target_modules=TARGETS)
    results = []
    turned = dict(reversed(inputs.items()))
    for source, example in ((model, inputs), (exported, inputs), (exported, turned)):
        program = mobizo.compile(source, example, lora, backend="eager")
        results.append(Session(program).train_step(inputs, labels, seed=1, learning_rate=0.1, eps=0.01).lane_losses)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with pytest.raises(ExampleInputError, match="take the keywords"):
        mobizo.compile(exported, tuple(inputs.values()), lora, backend="eager")


def test_tied_weights_adapt_the_module_that_was_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.up = nn.Embedding(11, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.up(self.embedding(tokens)))

    program = mobizo.compile(
        Tied().eval(),
        (torch.zeros(2, 5, dtype=torch.int64),),
        LoraConfig(r=2, target_modules=("head",)),
        backend="eager",
    )
    assert [site.fqn for site in program.sites] == ["head"]


def test_a_module_called_twice_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mix, self.head = nn.Embedding(11, 12), nn.Linear(12, 12), nn.Linear(12, 11)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(torch.tanh(self.mix(self.embedding(tokens))))))

    torch.manual_seed(0)
    model = Twice().eval()
    tokens = torch.randint(0, 11, (2, 5))
    program = mobizo.compile(model, (tokens,), LoraConfig(r=2, target_modules=("mix",)), backend="eager")
    session = Session(program)
    session.load_state(random_state(program))
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    reference.state.copy_(session.state())
    assert len(program.sites) == 1
    torch.testing.assert_close(session.evaluate(tokens), reference.evaluate((tokens,)), rtol=0, atol=2e-6)
