"""Every backend through the public contract; fifty steps against plain PyTorch in the stock runtime; the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig, backends, extensions
from mobizo_compiler.backends import assert_backend_contract, backend_names, get_backend
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.compiling.cache import content_key
from mobizo_compiler.errors import BackendRefusedError, BackendUnavailableError, ConfigError, UnknownBackendError
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch
from mobizo_compiler.testing.backend import _check_members, _check_programs

BACKENDS = ("eager", "portable", "xnnpack")
SLOW_PORTABLE = pytest.param("portable", marks=pytest.mark.slow)
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("name", ["eager", *(pytest.param(n, marks=pytest.mark.slow) for n in ("portable", "xnnpack"))])
def test_contract(name: str) -> None:
    assert_backend_contract(name)


@pytest.mark.slow
def test_contract_of_the_smallest_model() -> None:
    """What of the contract is about runners, the state and files: the networks on XNNPACK are slow."""
    _check_members(get_backend("xnnpack"), "xnnpack")
    _check_programs(get_backend("xnnpack"), "xnnpack")


@pytest.mark.parametrize("name", ["eager", SLOW_PORTABLE, pytest.param("xnnpack", marks=pytest.mark.slow)])
def test_fifty_steps_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    """From a B that is not zero; through a file where the backend has one."""
    torch.manual_seed(2)
    model = TinyCausalLM(layers=1).eval()
    inputs, labels = tiny_batch()
    program = mobizo.compile(
        model, inputs, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS), ZOConfig(queries=2), backend=name
    )
    if name != "eager":
        program = mobizo.load(program.save(tmp_path / "tiny.pte"))
    session = Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
    session.load_state(start)
    reference.state.copy_(start)
    eps, learning_rate = 0.02, 0.01
    # One step: losses near 4 carry 2e-6 of rounding, g that over eps, B learning_rate * |z| of that with |z| < 6.
    # Over n steps the errors of B add up, and a B that is off by d moves a loss by at most |gradient| * |d|.
    loss_error, b_error = 4e-6, 0.0
    for seed in range(50):
        found = session.train_step(inputs, labels, seed=seed, learning_rate=learning_rate, eps=eps)
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=learning_rate, eps=eps)
        step_error = loss_error + 10 * b_error
        torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=step_error)
        torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=step_error / eps)
        b_error += learning_rate * 6 * loss_error / eps / 10
        torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=b_error)
    assert (session.state() - start).abs().max() > 100 * b_error, "the comparison must be sharper than the movement"
    torch.testing.assert_close(
        session.evaluate(inputs)["logits"], reference.evaluate(inputs)["logits"], rtol=0, atol=1e-5 + 50 * b_error
    )
    reference.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "xnnpack"])
def test_methods_share_state_and_sessions_do_not(name: str) -> None:
    torch.manual_seed(0)
    inputs, labels = tiny_batch()
    program = mobizo.compile(TinyCausalLM().eval(), inputs, LoraConfig(r=3), backend=name)
    first, second = Session(program), Session(program)
    untouched = second.evaluate(inputs)["logits"]
    result = first.train_step(inputs, labels, seed=3, learning_rate=1.0, eps=0.01)
    assert not torch.equal(first.evaluate(inputs)["logits"], untouched), "evaluate must see what train_step learnt"
    assert torch.equal(second.state(), torch.zeros_like(second.state()))
    assert torch.equal(second.evaluate(inputs)["logits"], untouched)
    second.replay(3, result.projected_gradient, 1.0)
    assert torch.equal(first.state(), second.state())
    assert torch.equal(first.evaluate(inputs)["logits"], second.evaluate(inputs)["logits"])
    copy = first.state()
    copy.zero_()
    assert first.state().any(), "state() must be a copy"


@pytest.mark.slow
def test_results_stay_valid_after_the_next_call() -> None:
    inputs, labels = tiny_batch()
    session = Session(mobizo.compile(TinyCausalLM().eval(), inputs, LoraConfig(r=3), backend="portable"))
    first = session.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=0.01)
    losses = first.lane_losses.clone()
    session.train_step(inputs, labels, seed=2, learning_rate=0.1, eps=0.01)
    assert torch.equal(first.lane_losses, losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "xnnpack"])
def test_padding_on_the_left(name: str) -> None:
    """Query positions that may attend to nothing must not poison the others."""
    torch.manual_seed(0)
    model = TinyCausalLM().eval()
    inputs, labels = tiny_batch()
    inputs["attention_mask"][:, :3] = 0
    program = mobizo.compile(model, inputs, LoraConfig(r=3), backend=name)
    session = Session(program)
    with torch.no_grad():
        wanted = model(**inputs)["logits"]
    torch.testing.assert_close(session.evaluate(inputs)["logits"], wanted, rtol=0, atol=2e-5)
    assert session.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=0.01).projected_gradient.isfinite().all()


@pytest.mark.slow
def test_networks_stay_in_few_delegates() -> None:
    inputs, _ = tiny_batch()
    program = mobizo.compile(TinyCausalLM(layers=3).eval(), inputs, LoraConfig(r=3), backend="xnnpack")
    delegation = program.artifact.delegation["evaluate"]  # type: ignore[attr-defined]
    assert delegation.delegates <= 4
    assert not {"mean.dim", "_softmax", "bmm", "mm", "linear", "expand_copy", "where.self"} & set(delegation.outside)


class _Refuser(EagerBackend):
    name = "refuser"

    def unsupported(self, program: Any) -> list[str]:
        return ["%tanh: no kernel"]


def test_a_backend_refuses_with_reasons() -> None:
    with pytest.raises(BackendRefusedError, match=r"refuser(.|\n)*train_step: %tanh: no kernel"):
        mobizo.compile(
            TokenWise().eval(),
            (torch.zeros(2, 5, dtype=torch.int64),),
            LoraConfig(target_modules=("up",)),
            backend=_Refuser(),
        )


def test_unknown_backend_lists_what_there_is() -> None:
    with pytest.raises(UnknownBackendError, match=r"no backend 'tpu'(.|\n)*eager, portable, vulkan, xnnpack"):
        mobizo.compile(TokenWise().eval(), (torch.zeros(2, 5, dtype=torch.int64),), backend="tpu")
    with pytest.raises(UnknownBackendError, match="neither"):
        get_backend(3)  # type: ignore[arg-type]


def _with_points(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    group = backends.ENTRY_POINT_GROUP
    found = {name: (extensions.Origin(value, "a package 1.0"),) for name, value in points.items()}
    monkeypatch.setattr(extensions, "_entry_points", lambda asked: found if asked == group else {})


def test_plugins_are_found_listed_lazily_and_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    good = "mobizo_compiler.backends.eager:EagerBackend"
    _with_points(monkeypatch, mine=good, broken="no_such_module:Backend", wrong="pathlib:Path")
    assert {"mine", "broken", "wrong", *BACKENDS} <= set(backend_names())
    assert get_backend("mine").name == "eager"
    assert get_backend("portable").name == "portable", "a broken neighbour is harmless"
    with pytest.raises(BackendUnavailableError, match="no_such_module"):
        get_backend("broken")
    with pytest.raises(BackendUnavailableError, match="not a backend"):
        get_backend("wrong")


def test_a_name_that_two_packages_claim_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_points(monkeypatch, xnnpack="other:Backend")
    with pytest.raises(UnknownBackendError, match="claimed by"):
        get_backend("xnnpack")
    assert get_backend("portable").name == "portable", "only the name that is claimed twice is unusable"


def test_cache_is_by_content(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TokenWise().eval()
    tokens = (torch.zeros(2, 5, dtype=torch.int64),)

    def phases(until: str = "") -> list[str]:
        seen: list[str] = []

        def say(line: str) -> None:
            seen.append(line.partition(":")[0])
            if seen[-1] == until:
                raise InterruptedError(until)

        lora, zo = LoraConfig(r=2, target_modules=("up",)), ZOConfig(queries=1)
        program = mobizo.compile(model, tokens, lora, zo, backend="portable", cache_dir=tmp_path, progress=say)
        assert Session(program).state().numel() == program.parameters
        return seen

    assert phases() == ["capture", "rewrite", "lower", "check"]
    assert phases() == ["capture", "rewrite", "cached"]
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(InterruptedError, match="lower"):  # there is none with these weights
        phases(until="lower")
    with torch.no_grad():
        model.head.weight.copy_(before)
    assert phases()[-1] == "cached"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match="eager"):
        mobizo.compile(model, tokens, LoraConfig(target_modules=("up",)), backend="eager", cache_dir=tmp_path)


def test_keys_are_of_options_and_of_buffers_without_dimensions_too() -> None:
    class Scaled(TokenWise):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) * self.scale

    tokens = (torch.zeros(2, 5, dtype=torch.int64),)
    keys = set()
    for scale, queries in ((2.0, 1), (2.0, 1), (3.0, 1), (2.0, 2)):
        torch.manual_seed(0)
        model = Scaled().eval()
        model.scale.fill_(scale)
        lora, zo = LoraConfig(r=2, target_modules=("up",)), ZOConfig(queries=queries)
        program = mobizo.compile(model, tokens, lora, zo, backend="eager")
        keys.add(content_key(program.methods, program.manifest))
    assert len(keys) == 3
