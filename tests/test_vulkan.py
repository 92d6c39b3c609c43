"""The Vulkan backend: what is delegated, what is refused and why, and steps where a Vulkan runtime is there."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization import quantize_ as quantize
from torchao.quantization.granularity import PerAxis, PerGroup

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.backends.vulkan import VulkanBackend, load_runtime
from mobizo_compiler.backends.vulkan.known_faults import RULES, check_delegates, violations
from mobizo_compiler.backends.vulkan.operators import PRODUCTS
from mobizo_compiler.errors import BackendRefusedError, BackendUnavailableError
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.testing import TinyCausalLM, tiny_batch

RECIPES: dict[str, Any] = {
    "fp32": None,
    "4w": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "8da8w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
    "8w": Int8WeightOnlyConfig(),
}
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "o_proj", "down_proj"))
pytestmark = pytest.mark.xdist_group("vulkan")  # one process, so that its programs are made once
ROWS, TOKENS = 3, 5
# Calls that a method keeps in portable kernels, and why.
MASK = {"aten::full", "arange.start_step", "unsqueeze_copy", "sub.Tensor", "le.Scalar", "logical_and"}
MASK |= {"full", "bitwise_and.Tensor", "dim_order_ops::_to_dim_order_copy", "view_copy", "repeat"}
LABELS = {"slice_copy.Tensor", "ne.Scalar", "clamp"}
NOISE = {"bitwise_xor.Tensor", "bitwise_and.Scalar", "bitwise_right_shift.Tensor_Scalar", "mul.Tensor", "add.Tensor"}
NOISE |= {"embedding"}  # in the table of normal numbers
UPDATE = {"sum.dim_IntList", "eq.Scalar", "full_like", "where.self"}
# A loss selects what counts by a truth value, which stays outside with what follows: a number for each labelled token.
SELECTED = {"gt.Scalar", "neg", "mean.dim", "div.Tensor"}
RUNTIME_IS_MISSING = "no VulkanBackend in this ExecuTorch runtime; MOBIZO_VULKAN_LIBRARY names a library that brings it"


class Decoder(nn.Module):
    """One layer of grouped-query attention and a gated block, in widths that groups of 32 divide; none is square."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 64)
        self.norm, self.norm2 = nn.RMSNorm(64, eps=1e-5), nn.LayerNorm(64)
        self.q_proj, self.k_proj = nn.Linear(64, 32, bias=False), nn.Linear(64, 16, bias=False)
        self.v_proj, self.o_proj = nn.Linear(64, 16, bias=False), nn.Linear(32, 64)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.lm_head = nn.Linear(64, 16, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        rows, tokens = input_ids.shape
        x = self.embedding(input_ids)
        normed = self.norm(x)
        query = self.q_proj(normed).view(rows, tokens, 4, 8).transpose(1, 2)
        key, value = (
            layer(normed).view(rows, tokens, 2, 8).transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
            for layer in (self.k_proj, self.v_proj)
        )
        key, value = (side.reshape(rows, 4, tokens, 8) for side in (key, value))
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal[None, None] & attention_mask[:, None, None, :].to(torch.bool)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(rows, tokens, 32))
        normed = self.norm2(x)
        x = x + self.down_proj(F.gelu(self.gate_proj(normed)) * self.up_proj(normed))
        return {"logits": self.lm_head(x)}


def decoder(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder().eval()
    if RECIPES[recipe] is not None:
        quantize(model, RECIPES[recipe])
    return model


def batch(rows: int = ROWS, tokens: int = TOKENS) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(0, 16, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.where(mask.bool(), ids, -100)


class Rewritten(EagerBackend):
    """The passes of the Vulkan backend, run by PyTorch."""

    name = "rewritten"

    def passes(self) -> Any:
        return VulkanBackend().passes()


@functools.cache
def rewritten(recipe: str) -> mobizo.Program:
    """Compiled once for all tests."""
    return mobizo.compile(decoder(recipe), batch()[0], LORA, ZOConfig(queries=2), backend=Rewritten())


_programs: dict[tuple[str, str], tuple[mobizo.Program, list[str]]] = {}


def compiled(recipe: str, state: str = "shared") -> tuple[mobizo.Program, list[str]]:
    """Compiled once for all tests, with what compile said."""
    if (recipe, state) not in _programs:
        said: list[str] = []
        program = mobizo.compile(
            decoder(recipe), batch()[0], LORA, ZOConfig(queries=2), backend="vulkan", state=state, progress=said.append
        )
        _programs[recipe, state] = program, said
    return _programs[recipe, state]


CASES = [
    ("fp32", "shared"),
    pytest.param("fp32", "io", marks=pytest.mark.slow),
    pytest.param("4w", "shared", marks=pytest.mark.slow),
    pytest.param("8da4w", "shared", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "state"), CASES)
def test_the_network_is_one_delegate(recipe: str, state: str) -> None:
    program, _ = compiled(recipe, state)
    delegation: Mapping[str, Any] = program.artifact.delegation  # type: ignore[attr-defined]
    assert [delegation[method].delegates for method in ("train_step", "evaluate", "replay")] == [1, 1, 0]
    assert set(delegation["evaluate"].outside) <= MASK, delegation["evaluate"].outside
    assert set(delegation["train_step"].outside) >= NOISE
    assert set(delegation["train_step"].outside) <= MASK | LABELS | NOISE | UPDATE | SELECTED, delegation[
        "train_step"
    ].outside


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int4", "8da4w"])
def test_layers_and_embeddings_that_compile_quantizes(recipe: str) -> None:
    """Rows of quantized tables are looked up and decoded outside; the check after lowering runs where it can."""
    program = mobizo.compile(
        decoder("fp32"),
        batch()[0],
        LORA,
        ZOConfig(queries=2),
        backend="vulkan",
        quantization=mobizo.QuantizationConfig(recipe, head=recipe),  # type: ignore[arg-type]
    )
    delegation: Mapping[str, Any] = program.artifact.delegation  # type: ignore[attr-defined]
    assert [delegation[method].delegates for method in ("train_step", "evaluate", "replay")] == [1, 1, 0]
    rows = {"embedding", "bitwise_right_shift.Tensor_Scalar", "bitwise_and.Scalar", "mul.Tensor", "cat"}
    rows |= {"add.Tensor", "stack", "slice_copy.Tensor"}
    assert set(delegation["evaluate"].outside) <= MASK | rows, delegation["evaluate"].outside


@pytest.mark.slow
@pytest.mark.parametrize(
    "zo", [ZOConfig(estimator="exact"), ZOConfig(queries=2, estimator={"name": "hybrid", "exact_from": 1})], ids=str
)
def test_products_of_a_gradient_are_in_delegates(zo: ZOConfig) -> None:
    """Three: up to the labels, which are integers, from there to the loss, and back."""
    lora = LoraConfig(r=3, target_modules="all-linear")
    model = TinyCausalLM(layers=2).eval()
    program = mobizo.compile(model, tiny_batch()[0], lora, zo, rule="adamw", backend="vulkan")
    delegation: Mapping[str, Any] = program.artifact.delegation  # type: ignore[attr-defined]
    assert [delegation[method].delegates for method in ("train_step", "evaluate")] == [3, 1]
    assert not PRODUCTS.intersection(delegation["train_step"].outside), delegation["train_step"].outside
    rewritten = mobizo.compile(model, tiny_batch()[0], lora, zo, rule="adamw", backend=Rewritten())
    assert rewritten.parameters == program.parameters, "and compiled where the check against autograd can run it"


def test_a_gradient_through_4_bit_weights_is_refused() -> None:
    with pytest.raises(BackendRefusedError, match=r"4-bit weights are multiplied by a gradient here"):
        mobizo.compile(decoder("4w"), batch()[0], LORA, ZOConfig(estimator="exact"), backend="vulkan")


@pytest.mark.slow
def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(BackendRefusedError, match=r"varying_weight(.|\n)*aten_mm"):
        mobizo.compile(decoder("fp32"), batch()[0], LORA, ZOConfig(queries=1), backend="vulkan", quantization="fp16")


@pytest.mark.parametrize("recipe", ["fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("4w", "8da4w"))])
def test_the_rewritten_graph_computes_the_same(recipe: str) -> None:
    """Three steps in PyTorch: what passes do to the numbers, apart from what kernels do."""
    inputs, labels = batch()
    model, program = decoder(recipe), rewritten(recipe)
    # Losses near 2.6 carry 1e-6 of rounding, GELU 1.5e-7 of its input. In 8da4w an activation at the edge of two
    # entries may round the other way: one of 64 inputs of a layer then moves by 1/255 of its range.
    compare_steps(program, model, inputs, labels, loss_error=5e-6 if recipe != "8da4w" else 2e-3)


def compare_steps(
    program: mobizo.Program, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, loss_error: float
) -> None:
    session = Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
    session.load_state(start)
    reference.state.copy_(start)
    # g is a difference of two losses over 2 eps; the state moves by learning_rate * |z| of it, and |z| < 6.
    eps, learning_rate = 0.5, 0.01
    for seed in range(3):
        found = session.train_step(inputs, labels, seed=seed, learning_rate=learning_rate, eps=eps)
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=learning_rate, eps=eps)
        torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=loss_error)
        torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=loss_error / eps)
        assert wanted.lane_losses.std() > 5 * loss_error, "the lanes must differ by more than is allowed"
        # A state that is off by d moves a loss by far less than 10 d; so the errors of three steps add up.
        moved = (seed + 1) * learning_rate * 6 * loss_error / eps
        torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=moved + 1e-6)
    reference.remove()


@pytest.mark.parametrize(("recipe", "state"), CASES)
def test_three_steps_on_vulkan(recipe: str, state: str) -> None:
    if not load_runtime():
        pytest.skip(RUNTIME_IS_MISSING)
    program, said = compiled(recipe, state)
    assert said[-1] == "check"
    compare_steps(program, decoder(recipe), *batch(), loss_error=5e-5 if recipe != "8da4w" else 5e-3)


@pytest.mark.slow
def test_without_a_runtime_programs_are_made_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a runtime, it is hidden from the question which delegates there are."""
    program, _ = compiled("fp32")
    monkeypatch.setattr("mobizo_compiler.backends.executorch.delegates._registered", lambda: ["XnnpackBackend"])
    saved = program.save(tmp_path / "program.pte")
    for session_of in (program, saved):
        with pytest.raises(BackendUnavailableError, match="runtime here has no VulkanBackend"):
            Session(session_of)
    said: list[str] = []
    model, tokens = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 11)).eval(), torch.zeros(2, 5, dtype=torch.int64)
    lora = LoraConfig(r=2, target_modules=("1",))
    mobizo.compile(model, (tokens,), lora, ZOConfig(queries=1), backend="vulkan", progress=said.append)
    assert said[-2:] == [
        "check",
        "not run: the ExecuTorch runtime here has no VulkanBackend; the program can be saved, but its graphs alone "
        "were compared with the model",
    ]


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    if load_runtime():
        pytest.skip("this runtime has VulkanBackend already, so that nothing is loaded")
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        load_runtime(tmp_path / "libnothing.so")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [("8da8w", "from -128 to 127 abort"), pytest.param("8w", "int8 weight", marks=pytest.mark.slow)],
)
def test_8_bit_weights_are_refused(recipe: str, reason: str) -> None:
    with pytest.raises(BackendRefusedError, match=rf"{reason}(.|\n)*groups of 32"):
        mobizo.compile(decoder(recipe), batch()[0], LORA, ZOConfig(queries=1), backend="vulkan")


class ThreeAxes(nn.Module):
    """Attention whose heads are rows, which no pass writes as products."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x)
        return F.scaled_dot_product_attention(y, y, y)


def test_whole_attention_is_refused_at_its_line() -> None:
    lora, loss = LoraConfig(r=2, target_modules=("q_proj",)), mobizo.MSELoss()
    with pytest.raises(BackendRefusedError, match=r"scaled_dot_product(.|\n)*test_vulkan.py(.|\n)*abort"):
        mobizo.compile(ThreeAxes().eval(), (torch.randn(3, 5, 8),), lora, ZOConfig(queries=1), loss, backend="vulkan")


def test_4_bit_layers_whose_width_lowering_cannot_pad() -> None:
    model = decoder("fp32")
    model.lm_head = nn.Linear(64, 13, bias=False)
    quantize(model, RECIPES["4w"])
    with pytest.raises(BackendRefusedError, match=r"13 outputs(.|\n)*multiple of 8"):
        mobizo.compile(model, batch()[0], LORA, ZOConfig(queries=1), backend="vulkan")


@pytest.mark.slow
def test_one_row_of_8da4w_is_refused_at_its_line() -> None:
    """A batch of one token: `evaluate` has one row, where the kernel leaves activations as they are."""
    inputs, _ = batch(rows=1, tokens=2)
    inputs = {name: value[:, :1] for name, value in inputs.items()}
    with pytest.raises(BackendRefusedError, match=r"single_row_8da4w_linear(.|\n)*test_vulkan.py"):
        mobizo.compile(
            decoder("8da4w"), inputs, LORA, ZOConfig(queries=1), backend="vulkan", loss=mobizo.MaskedLMLoss()
        )


# -- rules -------------------------------------------------------------------------------------------------------------


def tagged(module: nn.Module, *inputs: Tensor) -> Any:
    """The module in the edge dialect, with the tags of ExecuTorch's own partitioner."""
    exported = torch.export.export(module.eval(), inputs, strict=True)
    edge = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False)).exported_program()
    return VulkanPartitioner({}).partition(edge).tagged_exported_program


def broken(module: nn.Module, *inputs: Tensor) -> set[str]:
    return {violation.rule for violation in violations(tagged(module, *inputs))}


class Call(nn.Module):
    """A function as a module, with a buffer that it may change."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.ones(3))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _linear(recipe: str, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Linear(width, 32))
    if RECIPES[recipe] is not None:
        quantize(model, RECIPES[recipe])
    return model


class _InFrontOfView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _linear("8da4w")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x).reshape(5, 4, 8))


class _BehindView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _linear("4w")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers[1](torch.tanh(x).reshape(5, 64))  # type: ignore[index]
        return result


def _norm(_: Any, x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def _update(module: Any, x: Tensor) -> Tensor:
    module.state.add_(x)
    return x * 2.0


X, INDEX = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.int64)
BREAKING: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "negative_gather_axis": (Call(lambda _, x, i: (x * 2.0).gather(-1, i)), (X, INDEX)),
    "batched_4bit_linear": (_linear("4w"), (torch.randn(3, 5, 64),)),
    "batched_8da4w_linear": (_linear("8da4w"), (torch.randn(3, 5, 64),)),
    "single_row_8da4w_linear": (_linear("8da4w"), (torch.randn(1, 64),)),
    "view_before_4bit_linear": (_BehindView(), (torch.randn(10, 32),)),
    "view_behind_8da4w_linear": (_InFrontOfView(), (torch.randn(5, 64),)),
    "not_4bit_weight": (_linear("8da8w"), (torch.randn(5, 64),)),
    "integer_equality": (Call(lambda _, i, j: i == j), (INDEX, INDEX.clone())),
    "no_axes": (Call(lambda _, x, s: x * s), (X, torch.tensor(2.0))),
    "mutated_buffer": (Call(_update), (torch.randn(3),)),
    "varying_table": (Call(lambda _, w, i: F.embedding(i, w) * 2.0), (X, torch.zeros(3, dtype=torch.int64))),
    "varying_weight": (
        Call(lambda _, x, w: F.linear(torch.tanh(x), w.to(torch.float32))),
        (X, torch.randn(3, 8).half()),
    ),
    "exact_gelu": (Call(lambda _, x: F.gelu(x)), (X,)),
}


# One of those about layers in 4 bits and one about views before them, and what needs no weights.
QUICK = {"batched_8da4w_linear", "view_before_4bit_linear", "integer_equality", "mutated_buffer", "varying_weight"}


@pytest.mark.parametrize("rule", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in BREAKING])
def test_rule(rule: str) -> None:
    module, inputs = BREAKING[rule]
    program = tagged(module, *inputs)
    found = {violation.rule: violation for violation in violations(program)}
    assert set(found) == {rule}
    with pytest.raises(BackendRefusedError, match=rf"{rule}(.|\n)*at: (.|\n)*try: "):
        check_delegates(program)


def test_an_rms_norm_whose_weight_varies() -> None:
    assert broken(Call(_norm), X, torch.ones(8)) == {"varying_table"}


def test_equality_of_floats() -> None:
    assert broken(Call(lambda _, x, y: x == y), X, X.clone()) == {"integer_equality"}


def test_half_precision() -> None:
    program = tagged(Call(lambda _, x: x * 2.0), X)
    specs = VulkanPartitioner({"force_fp16": True}).delegation_spec.compile_specs
    assert [violation.rule for violation in violations(program, specs)] == ["half_precision"]
    assert not violations(program, VulkanPartitioner({"force_fp16": False}).delegation_spec.compile_specs)


def test_every_rule_has_a_test() -> None:
    assert {rule.__name__ for rule in RULES} == {*BREAKING, "half_precision"}


@pytest.mark.slow
def test_what_is_right_is_let_through() -> None:
    assert not broken(_linear("4w"), torch.randn(5, 64))
    assert not broken(_linear("8da4w"), torch.randn(5, 64))
    assert not broken(_linear("fp32"), torch.randn(3, 5, 64))
    assert not broken(Call(lambda _, x, i: (x * 2.0).gather(1, i)), X, INDEX)
    assert not broken(Call(lambda _, x: F.gelu(x, approximate="tanh")), X)
    assert not broken(nn.Sequential(nn.Embedding(5, 8), nn.RMSNorm(8, eps=1e-6)), INDEX)


# -- passes ------------------------------------------------------------------------------------------------------------


class Corners(nn.Module):
    """What passes write otherwise: a number without axes, a negative axis, reductions, powers, logarithms, erf."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.up = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x)) * self.scale.exp() + 2.0
        z = torch.log(y.square() + 1.0)
        z = z - z.mean((1, 2), keepdim=True) + y.sum(1)[:, None] - y.amax(-2, keepdim=True)
        return z[..., :4]


def test_what_the_passes_write_otherwise() -> None:
    """The same outputs, and none of the operators or forms that Vulkan has no kernel for."""
    torch.manual_seed(0)
    model, x = Corners().eval(), torch.randn(3, 5, 6) * 3.0
    lora, loss = LoraConfig(r=2, target_modules=("up",)), mobizo.MSELoss()
    program = mobizo.compile(model, (x,), lora, ZOConfig(queries=1), loss, backend=Rewritten())
    with torch.no_grad():
        # erf is approximated to 1.5e-7 of its input, which is below 10; log and the means do not make that larger.
        torch.testing.assert_close(Session(program).evaluate((x,)), model(x), rtol=0, atol=1e-5)
    for method in ("train_step", "evaluate"):
        graph = program.methods[method].graph
        calls = {str(node.target) for node in graph.nodes if node.op == "call_function"}
        assert not {"aten.gelu.default", "aten.square.default", "aten.pow.Tensor_Scalar"} & calls
        assert method == "train_step" or "aten.log.default" not in calls
    evaluate = program.methods["evaluate"].graph
    numbers = [node for node in evaluate.nodes if node.op == "call_function" and node.meta["val"].dim() == 0]
    assert not numbers
    assert all(node.args[2] for node in evaluate.nodes if node.target is torch.ops.aten.mean.dim)


def test_attention_is_one_pass_for_both_backends() -> None:
    assert any(isinstance(step, DecomposeAttention) for step in VulkanBackend().passes())


def test_quantized_layers_read_matrices() -> None:
    """No value of more than two axes reaches a layer, and no reshape is right in front of a quantized one."""
    program = rewritten("4w")
    for method in ("train_step", "evaluate"):
        layers = [n for n in program.methods[method].graph.nodes if n.target is torch.ops.aten.linear.default]
        assert len(layers) == 8 + 3
        for layer in layers:
            source, weight = layer.args[:2]
            assert source.meta["val"].dim() == 2
            if weight.op == "call_function":
                assert source.target is not torch.ops.aten.reshape.default


def test_the_library_is_named_by_a_variable() -> None:
    from mobizo_compiler.backends.vulkan.backend import LIBRARY_VARIABLE

    assert LIBRARY_VARIABLE == "MOBIZO_VULKAN_LIBRARY"
    if os.environ.get(LIBRARY_VARIABLE):
        assert load_runtime(), "the library that the variable names must bring VulkanBackend"
