"""What needs an NVIDIA GPU: `aot_inductor_cuda` compiled and run there. Elsewhere every test says what is missing.

Compiling takes tens of seconds a program; with a card: pytest tests/test_gpu.py -n 8
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Program, Session, ZOConfig
from mobizo_compiler.backends import assert_backend_contract
from mobizo_compiler.backends.aot_inductor import AotInductorBackend
from mobizo_compiler.errors import BackendUnavailableError
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

LORA = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj", "down_proj"))
EPS, RATE = 0.02, 0.01
MISSING = AotInductorBackend("cuda").unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"needs a GPU: {MISSING}")]


def model() -> TinyCausalLM:
    torch.manual_seed(2)
    return TinyCausalLM().eval()


def compiled(queries: int = 3, **options: object) -> Program:
    inputs, _ = tiny_batch()
    backend = options.pop("backend", AotInductorBackend("cuda"))
    return mobizo.compile(model(), inputs, LORA, ZOConfig(queries=queries), backend=backend, **options)  # type: ignore[arg-type]


def start_of(program: Program) -> Tensor:
    start = program.initial_state()
    start[: program.parameters] = torch.randn(program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
    return start


def steps(session: Session, count: int = 4) -> list[Tensor]:
    """What some steps measure, and the state after each, from a B that is not zero."""
    inputs, labels = tiny_batch()
    session.load_state(start_of(session.program))
    found = []
    for seed in range(count):
        result = session.train_step(inputs, labels, seed=seed, learning_rate=RATE, eps=EPS)
        found += [result.lane_losses, result.projected_gradient, session.state()]
    return found


def test_contract() -> None:
    assert_backend_contract("aot_inductor_cuda")


def test_noise_is_that_of_the_cpu() -> None:
    for seed in (0, 17, 2**31 - 1):
        for distribution in ("rademacher", "gaussian"):
            made = [mobizo.noise(seed, 3, 1001, distribution, device) for device in ("cpu", "cuda")]
            assert torch.equal(made[0], made[1].cpu())


@pytest.mark.parametrize("queries", [3, 16])
def test_five_steps_agree_with_the_reference_and_a_replay_is_the_step(queries: int, tmp_path: Path) -> None:
    """With few queries a sum is written out by Inductor, with many it would be a loop whose order is timed."""
    inputs, labels = tiny_batch()
    program = compiled(queries)
    session, other = Session(program.save(tmp_path / "on.pt2")), Session(tmp_path / "on.pt2")
    net = model()
    reference = ReferenceStep(net.double(), program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    session.load_state(start_of(program))
    other.load_state(start_of(program))
    reference.state.copy_(start_of(program))
    loss_error = 4e-6  # as in test_aot_inductor.py
    for seed in range(5):
        found = session.train_step(inputs, labels, seed=seed, learning_rate=RATE, eps=EPS)
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=RATE, eps=EPS)
        torch.testing.assert_close(found.lane_losses.double(), wanted.lane_losses, rtol=0, atol=2 * loss_error)
        slope = 2 * loss_error / EPS
        torch.testing.assert_close(found.projected_gradient.double(), wanted.projected_gradient, rtol=0, atol=slope)
        torch.testing.assert_close(session.state().double(), reference.state, rtol=0, atol=(seed + 1) * 1e-5)
        other.replay(seed, found.projected_gradient, RATE)
        assert torch.equal(other.state(), session.state()), "a replay must give the step's bits"
    assert (session.state() - start_of(program)).abs().max() > 1e-3
    outputs = session.evaluate(inputs)["logits"]
    torch.testing.assert_close(outputs.double(), reference.evaluate(inputs)["logits"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", ["adam", "scalar-adam"])
def test_rules_replay_bit_for_bit(rule: str) -> None:
    program = compiled(9, rule=rule)  # the check of every compilation compares replay with the step, bit for bit
    assert len(steps(Session(program))) == 12


@pytest.mark.parametrize("state", ["shared", "io"])
def test_a_graph_launches_what_single_kernels_do(state: str) -> None:
    program = compiled(state=state)
    one, other = Session(program), Session(program)
    assert one._runner._graphs  # type: ignore[attr-defined]
    other._runner._graphs.clear()  # type: ignore[attr-defined]
    for a, b in zip(steps(one), steps(other), strict=True):
        assert torch.equal(a, b)
    assert all(g._graph is not None for n, g in one._runner._graphs.items() if n == "train_step")  # type: ignore[attr-defined]
    inputs, _ = tiny_batch()
    for _ in range(3):
        assert torch.equal(one.evaluate(inputs)["logits"], other.evaluate(inputs)["logits"])


def test_the_state_is_not_copied_where_nobody_looks() -> None:
    inputs, labels = tiny_batch()
    session = Session(compiled())
    session.load_state(start_of(session.program))
    for seed in range(3):
        session.train_step(inputs, labels, seed=seed, learning_rate=RATE, eps=EPS)
    state = session._runner._state  # type: ignore[attr-defined]
    assert state.live.is_cuda and state._host.is_pinned()
    assert not torch.equal(state.live.cpu(), state._host), "main memory has the state of before, because nobody asked"
    assert torch.equal(session.state(), state.live.cpu())


def test_a_session_that_is_gone_leaves_no_memory() -> None:
    program = compiled()
    before = None
    for _ in range(3):
        session = Session(program)
        steps(session)
        del session
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        assert before is None or held <= before
        before = held


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_precision_is_that_of_the_program(precision: str, tmp_path: Path) -> None:
    backend = AotInductorBackend("cuda", precision=precision)  # type: ignore[arg-type]
    exact, rounded = Session(compiled(8)), Session(compiled(8, backend=backend).save(tmp_path / "on.pt2"))
    assert rounded.program.artifact.target.precision == precision  # type: ignore[attr-defined]
    inputs, labels = tiny_batch()
    gradients = []
    for session in (exact, rounded):
        session.load_state(start_of(session.program))
        results = [session.train_step(inputs, labels, seed=seed, learning_rate=0.0) for seed in range(4)]
        gradients.append(torch.cat([result.projected_gradient for result in results]))
    assert not torch.equal(*gradients), "nothing was rounded"
    assert float(F.cosine_similarity(*gradients, dim=0)) > 0.97


def test_what_the_process_chose_does_not_change_a_program() -> None:
    products = torch.backends.cuda.matmul
    program = compiled()
    plain = steps(Session(program))
    try:
        products.allow_tf32 = True
        for a, b in zip(plain, steps(Session(program)), strict=True):
            assert torch.equal(a, b)
        products.allow_tf32 = False
        products.fp32_precision = "tf32"
        for a, b in zip(plain, steps(Session(program)), strict=True):
            assert torch.equal(a, b)
        assert products.fp32_precision == "tf32"
    finally:
        products.allow_tf32 = False


def test_another_process_loads_the_file(tmp_path: Path) -> None:
    path = compiled().save(tmp_path / "on.pt2")
    wanted = steps(Session(path))
    code = f"""
import sys, torch
import mobizo_compiler as mobizo
from tests.test_gpu import steps
torch.save(steps(mobizo.Session({str(path)!r})), {str(tmp_path / "found.pt")!r})
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(wanted, torch.load(tmp_path / "found.pt"), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on(tmp_path: Path) -> None:
    program, batches = compiled(), [tiny_batch()]
    first = Session(program)
    first.finetune(batches, steps=3, learning_rate=RATE, run=tmp_path / "run")
    again, whole = Session(program), Session(program)
    again.finetune(batches, steps=6, learning_rate=RATE, run=tmp_path / "run")
    whole.finetune(batches, steps=6, learning_rate=RATE, run=tmp_path / "whole")
    assert torch.equal(again.state(), whole.state())
    assert not torch.equal(first.state(), whole.state())


@pytest.mark.parametrize("quantization", ["int8", "int4", "8da8w"])
def test_quantized_weights(quantization: str) -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 32), nn.Linear(32, 64), nn.Linear(64, 11)).eval()  # whole groups of 32
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=("1",))
    backends = (AotInductorBackend("cuda"), "eager")
    results = []
    for backend in backends:
        options = {"quantization": quantization, "backend": backend}
        session = Session(mobizo.compile(net, (ids,), lora, ZOConfig(queries=2), **options))  # type: ignore[arg-type]
        results.append(session.train_step((ids,), ids, seed=1, learning_rate=0.05, eps=0.1))
        assert bool(session.state().any())
    # Losses near 2.4; one entry of 8 bits that is rounded the other way moves them by less than this.
    torch.testing.assert_close(results[0].lane_losses, results[1].lane_losses, rtol=0, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exact_steps_are_those_of_the_cpu(precision: str) -> None:
    inputs, labels = tiny_batch()
    zo = ZOConfig(estimator="exact")
    backend = AotInductorBackend("cuda", precision=precision)  # type: ignore[arg-type]
    states = []
    for each in (backend, "eager"):
        session = Session(mobizo.compile(model(), inputs, LORA, zo, backend=each))
        session.load_state(start_of(session.program))
        for seed in range(4):
            session.train_step(inputs, labels, seed=seed, learning_rate=RATE)
        states.append(session.state() - start_of(session.program))
    assert float(states[1].norm()) > 0
    # float32: some hundred roundings of 6e-8 in a gradient. Products of 8 bits: 2e-3 each, of either sign.
    share = 1e-4 if precision == "float32" else 2e-2
    assert float((states[0] - states[1]).norm()) < share * float(states[1].norm())


def test_dynamic_sizes() -> None:
    torch.manual_seed(0)
    net, ids = TokenWise().eval(), torch.zeros(2, 5, dtype=torch.int64)
    lora, dynamic = LoraConfig(r=4, lora_alpha=6, target_modules=("up",)), {0: {1: Dim("T", max=32)}}
    program = mobizo.compile(
        net, (ids,), lora, ZOConfig(queries=2), backend=AotInductorBackend("cuda"), dynamic_shapes=dynamic
    )
    session = Session(program)
    reference = ReferenceStep(net, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    for size in (5, 9, 31):
        ids = torch.randint(0, 11, (2, size))
        session.load_state(start_of(program))
        reference.state.copy_(start_of(program))
        found = session.train_step((ids,), ids, seed=size, learning_rate=0.05, eps=0.02)
        wanted = reference.train_step((ids,), ids, seed=size, learning_rate=0.05, eps=0.02)
        torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=2e-5)


def test_a_card_that_is_not_there_is_refused() -> None:
    backend = AotInductorBackend(f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(BackendUnavailableError, match="there is no GPU with index"):
        compiled(backend=backend)


def test_the_reference_runs_where_the_model_is() -> None:
    program = mobizo.compile(model(), tiny_batch()[0], LORA, ZOConfig(queries=2), backend="eager")
    inputs, labels = tiny_batch()
    results = []
    for device in ("cpu", "cuda"):
        net = model().to(device)
        reference = ReferenceStep(net, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
        given = {name: value.to(device) for name, value in inputs.items()}
        results.append(reference.train_step(given, labels.to(device), seed=1, learning_rate=RATE, eps=EPS))
        reference.remove()
    torch.testing.assert_close(results[0].lane_losses, results[1].lane_losses.cpu(), rtol=0, atol=1e-5)
