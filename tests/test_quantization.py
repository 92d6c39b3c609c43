"""Every recipe on every backend that can be run here, against layers that torchao itself quantized.

`docs/quantization.json` says what each cell does: "pass", or "refused" with our reason. After a change that is meant,
`pytest tests/test_quantization.py -m "slow or not slow" --accept` writes the record, and `make docs` the page.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_, to_nf4
from torchao.quantization.granularity import PerAxis

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, QuantizationConfig, Session, ZOConfig
from mobizo_compiler.backends import get_backend
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.backends.xnnpack import XnnpackBackend
from mobizo_compiler.errors import BackendRefusedError, ConfigError, QuantizationError
from mobizo_compiler.quantization.weights import RECIPES, pack_nibbles, torchao_config, unpack_nibbles
from mobizo_compiler.reference import ReferenceStep

RECORD = Path(__file__).parent.parent / "docs" / "quantization.json"
BACKENDS = ("eager", "portable", "xnnpack", "vulkan", "aot_inductor")
# Every recipe on the eager backend; on each other one those that go ways of their own, the rest by `make test-all`.
QUICK = {("eager", "fp16"), ("eager", "8da8w"), ("eager", "int4"), ("eager", "nf4"), ("xnnpack", "8da4w")}
# Integers with rounded activations, and a table of values.
KINDS = ("8da4w", "nf4")
OF_EACH_KIND = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in RECIPES]
# Cells that neither pass nor are refused, each with its cause; pytest fails when one of them starts to pass.
KNOWN_FAILURES: dict[tuple[str, str], str] = {}
ROWS, TOKENS, VOCABULARY = 3, 5, 16


def as_torchao(recipe: str) -> QuantizationConfig:
    """The recipe with nothing but what torchao itself does."""
    return QuantizationConfig(recipe, head=recipe, smoothing=0, asymmetric=False)  # type: ignore[arg-type]


class Wide(nn.Module):
    """Two layers, not square, whose inputs groups of 32 divide; a table, a bias and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.up = nn.Linear(64, 96)
        self.head = nn.Linear(96, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.up(self.embedding(tokens))))
        return result


def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Wide().eval().requires_grad_(False), torch.randint(0, VOCABULARY, (ROWS, TOKENS))


def by_torchao(model: nn.Module, recipe: str, rounding: bool = True) -> nn.Module:
    """The model with the layers of the recipe, made by torchao on modules; weights alone without `rounding`."""
    model = copy.deepcopy(model)
    bits = "int4" if recipe in ("8da4w", "int4", "nf4") else "int8"
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if recipe in ("fp16", "nf4"):
        for module in linears:
            module.weight.data = (
                module.weight.data.half().float()
                if recipe == "fp16"
                else to_nf4(module.weight.data, 64, block_of_scales(module.weight)).get_original_weight()
            )
    else:
        quantize_(model, torchao_config(recipe if rounding else bits, 32))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and recipe == "fp16":
            module.weight.data = module.weight.data.half().float()
        elif isinstance(module, nn.Embedding):
            module.weight.data = dequantized(module.weight.data)
    return model


def block_of_scales(weight: Tensor) -> int:
    count = weight.numel() // 64
    return max(size for size in range(1, 257) if count % size == 0)


def dequantized(table: Tensor) -> Tensor:
    """The rows of a table as torchao stores them, with 8 bits and a scale per row."""
    holder = nn.Linear(*reversed(table.shape), bias=False)
    holder.weight.data = table.clone()
    quantize_(holder, IntxWeightOnlyConfig(torch.int8, PerAxis(0)))
    weight: Any = holder.weight
    result: Tensor = weight.dequantize().float()
    return result


def outcome(recipe: str, backend: str) -> str:
    """ "pass", "lowered" where no runtime can run it here, or "refused" with code and reason; anything else raises."""
    model, tokens = wide()
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=("up", "head"))
    try:
        program = mobizo.compile(
            model, (tokens,), lora, ZOConfig(queries=2), backend=backend, quantization=as_torchao(recipe)
        )
    except BackendRefusedError as error:
        lines = error.problem.splitlines()
        reason = next((line for line in lines[1:] if line.startswith("  - ")), lines[min(1, len(lines) - 1)])
        return f"refused: [{error.code}] " + (reason.partition("): ")[2] or reason.strip(" -"))
    if getattr(program.artifact, "cannot_run", None):
        return "lowered"
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    step = {"seed": 1, "learning_rate": 0.05, "eps": 0.5}

    def reference(rounding: bool) -> Any:
        oracle = ReferenceStep(
            by_torchao(model, recipe, rounding), program.sites, program.lora_a_by_fqn, zo=program.manifest.zo
        )
        oracle.state.copy_(start)
        return oracle.train_step((tokens,), tokens, **step), oracle.evaluate((tokens,)), oracle.state

    wanted, outputs, state = reference(True)
    # Losses near 3 carry 3e-6 of rounding, and logits near 1 twice as much. Where activations are rounded to integers,
    # engines part by some of what that does, which is the difference to the same weights without it; but torchao itself
    # on the same engine does not.
    loss_error, output_error = 3e-6, 2e-5
    if recipe.startswith("8da") and backend != "eager":
        smooth, smooth_outputs, _ = reference(False)
        loss_error += 2 * float((smooth.lane_losses - wanted.lane_losses).abs().max())
        output_error += 2 * float((smooth_outputs - outputs).abs().max())
    session = Session(program)
    session.load_state(start)
    found = session.train_step((tokens,), tokens, **step)
    torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=loss_error)
    torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=loss_error / 0.5)
    torch.testing.assert_close(session.state(), state, rtol=0, atol=0.05 * 6 * loss_error / 0.5 + 1e-6)
    torch.testing.assert_close(session.evaluate((tokens,)), outputs, rtol=0, atol=output_error + loss_error)
    assert wanted.lane_losses.std() > 10 * loss_error, "the lanes must differ by more than is allowed"
    plain = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    plain.state.copy_(start)
    moved = (plain.train_step((tokens,), tokens, **step).lane_losses - wanted.lane_losses).abs().max()
    assert moved > (1e-7 if recipe == "fp16" else 1e-5), "the recipe must do something"
    return "pass"


def _cells() -> list[Any]:
    cells = []
    for backend in BACKENDS:
        for recipe in RECIPES:
            quick = (backend, recipe) in QUICK
            marks = [] if quick else [pytest.mark.slow]
            if (backend, recipe) in KNOWN_FAILURES:
                marks.append(pytest.mark.xfail(strict=True, reason=KNOWN_FAILURES[backend, recipe]))
            cells.append(pytest.param(backend, recipe, marks=marks, id=f"{backend}-{recipe}"))
    return cells


@pytest.mark.parametrize(("backend", "recipe"), _cells())
def test_cell(backend: str, recipe: str, request: pytest.FixtureRequest) -> None:
    if reason := get_backend(backend).unavailable():
        pytest.skip(f"{backend} cannot be used here: {reason}")
    found = outcome(recipe, backend)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if request.config.getoption("--accept") and not (found == "lowered" and record.get(backend, {}).get(recipe)):
        record.setdefault(backend, {})[recipe] = found
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    recorded = record[backend][recipe]
    assert found == recorded or (found == "lowered" and recorded == "pass"), "this cell changed: run pytest --accept"


def test_the_record_is_whole() -> None:
    record = json.loads(RECORD.read_text())
    assert {name: set(cells) for name, cells in record.items()} == {name: set(RECIPES) for name in BACKENDS}
    assert all(o.startswith(("pass", "lowered", "refused: [MBZ")) for cells in record.values() for o in cells.values())


@pytest.mark.parametrize("recipe", OF_EACH_KIND)
def test_weights_are_stored_once_and_small(recipe: str) -> None:
    """Bytes of all tensors that are not the adapters', beside float32."""
    model, tokens = wide()
    program = mobizo.compile(
        model, (tokens,), LoraConfig(r=3, target_modules=("up",)), backend="eager", quantization=recipe
    )
    train, evaluate = (program.methods[name].tensors().values() for name in ("train_step", "evaluate"))
    base = {path: tensor for path, tensor in train if "mobizo" not in path}
    assert not any(t.dtype == torch.float32 and t.numel() >= 64 * 96 for t in base.values()), "a layer stayed float32"
    assert {path for path, _ in evaluate if "mobizo" not in path} <= set(base)
    shared = {path: tensor for path, tensor in evaluate if "mobizo" not in path}
    assert all(base[path].data_ptr() == tensor.data_ptr() for path, tensor in shared.items()), "quantized twice"


@pytest.mark.parametrize("recipe", OF_EACH_KIND)
def test_a_choice_reads_the_head_that_evaluate_has(recipe: str) -> None:
    """`train_step` has a few rows of the head, and they are stored as the whole head is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    tokens = torch.randint(0, 64, (3, 5))
    labels = torch.full((3, 5), -100)
    labels[:, 3] = torch.tensor([3, 50, 3])
    loss = mobizo.ChoiceLoss((3, 50))
    lora = LoraConfig(r=2, target_modules=("1",))
    program = mobizo.compile(model, (tokens,), lora, ZOConfig(queries=1), loss, backend="eager", quantization=recipe)
    session = Session(program)
    result = session.train_step((tokens,), labels, seed=0, learning_rate=0.0, eps=1e-7)
    total, count = loss(session.evaluate((tokens,)), labels)
    torch.testing.assert_close(result.lane_losses, (total.sum() / count.sum()).expand(2), rtol=0, atol=2e-6)
    few, whole = (program.methods[name].exported for name in ("train_step", "evaluate"))
    assert ("rows_" in str(few.graph_signature)) == (recipe != "nf4"), "its rows share scales of scales"
    assert "rows_" not in str(whole.graph_signature)


def test_adapters_stay_in_full_precision() -> None:
    model, tokens = wide()
    program = mobizo.compile(
        model, (tokens,), LoraConfig(r=3, target_modules=("up",)), backend="eager", quantization="8da4w"
    )
    tensors = dict(program.methods["train_step"].tensors().values())
    assert all(tensor.dtype == torch.float32 for path, tensor in tensors.items() if "mobizo" in path)
    # The branch reads the input as it is, not what was rounded for the layer.
    graph = program.methods["train_step"].graph
    (branch,) = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default and "lora_a" in str(n.args[1])]
    assert "affine" not in str(branch.args[0].target)


def test_an_input_of_several_layers_is_rounded_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(11, 32), nn.Linear(32, 11), nn.Linear(32, 11)

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.tanh(self.embedding(tokens))
            result: Tensor = self.a(x) + self.b(x)
            return result

    tokens = torch.zeros(2, 5, dtype=torch.int64)
    program = mobizo.compile(
        Two().eval(), (tokens,), LoraConfig(r=2, target_modules=("a",)), backend="eager", quantization="8da8w"
    )
    chosen = [n for n in program.methods["evaluate"].graph.nodes if "choose_qparams" in str(n.target)]
    assert len(chosen) == 1


class Uneven(nn.Module):
    """Two layers that read a value, some of whose channels are a hundred times larger than the others."""

    def __init__(self, weight: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.up, self.gate = nn.Linear(64, 96, bias=False), nn.Linear(64, 96)
        self.head = nn.Linear(96, VOCABULARY, bias=False)
        sizes = torch.ones(64)
        sizes[::9] = 100.0
        self.embedding.weight.data *= sizes
        for layer in (self.up, self.gate):
            layer.weight.data = weight(layer.weight.data / sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        result: Tensor = self.head(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))
        return result


def evaluated(model: nn.Module, tokens: Tensor, backend: str, quantization: object) -> Tensor:
    lora = LoraConfig(r=2, target_modules=("up",))
    program = mobizo.compile(model, (tokens,), lora, ZOConfig(queries=1), backend=backend, quantization=quantization)
    result: Tensor = Session(program).evaluate((tokens,))
    return result


ENGINES = ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("portable", "xnnpack"))]


@pytest.mark.parametrize("backend", ENGINES)
def test_smoothing_keeps_small_channels(backend: str) -> None:
    """8 bits for a token with channels of 100 leave nothing below 0.4; divided, every channel has its share."""
    torch.manual_seed(0)
    model, tokens = Uneven().eval().requires_grad_(False), torch.randint(0, VOCABULARY, (8, 16))
    exact = model(tokens)

    def error(smoothing: float | str) -> float:
        config = QuantizationConfig("8da8w", embedding="none", head="none", smoothing=smoothing)
        return float((evaluated(model, tokens, backend, config) - exact).square().mean().sqrt())

    plain, smooth = error(0), error("auto")
    assert smooth < plain / 3
    assert error(0.5) == pytest.approx(smooth, rel=0.01), "the search takes what is better"


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("recipe", ["int4", pytest.param("8da4w", marks=pytest.mark.slow)])
def test_weights_of_16_levels_between_any_two_ends_are_held(recipe: str, backend: str) -> None:
    """A layer stored as GGUF's Q4_1 comes back; without offsets it is rounded a second time."""
    torch.manual_seed(0)

    def q4_1(weight: Tensor) -> Tensor:
        groups = weight.reshape(-1, 32)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / 15).bfloat16().float()
        return (torch.round((groups - low) / step).clamp(0, 15) * step + low).reshape(weight.shape)

    model, tokens = Uneven(q4_1).eval().requires_grad_(False), torch.randint(0, VOCABULARY, (8, 16))

    def error(asymmetric: bool, smoothing: float | str = 0) -> float:
        config = QuantizationConfig(
            recipe,  # type: ignore[arg-type]
            embedding="none",
            head="none",
            smoothing=smoothing,
            asymmetric=asymmetric,
        )
        return float((evaluated(model, tokens, backend, config) - model(tokens)).abs().max())

    if recipe == "int4":
        assert error(True) < 1e-5 < 1e-3 < error(False)
    else:
        assert error(True) < error(False)


class PassesOfXnnpack(EagerBackend):
    """The graphs that XNNPACK lowers, without lowering them."""

    name = "passes of xnnpack"

    def passes(self) -> Any:
        return XnnpackBackend().passes()


def test_integer_products_do_not_end_a_delegate() -> None:
    """Kernels outside of XNNPACK are 40 times slower right behind one."""
    torch.manual_seed(0)
    model, tokens = Uneven().eval().requires_grad_(False), torch.randint(0, VOCABULARY, (2, 5))
    lora, backend = LoraConfig(r=2, target_modules=("up",)), PassesOfXnnpack()
    program = mobizo.compile(model, (tokens,), lora, backend=backend, quantization="8da8w")
    for method in ("train_step", "evaluate"):
        graph = program.methods[method].graph
        (one,) = [n for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor and str(n.args[1]) == "b_mobizo_one"]
        weights = [n.name for n in one.args[0].all_input_nodes[-1:]]
        while not any("qdata" in name for name in weights):
            weights = [inner.name for n in graph.nodes if n.name in weights for inner in n.all_input_nodes]
        assert any("head_weight_qdata" in name for name in weights)


def test_one_product_for_layers_with_one_input() -> None:
    torch.manual_seed(0)
    model, tokens = Uneven().eval().requires_grad_(False), torch.randint(0, VOCABULARY, (2, 5))
    program = mobizo.compile(model, (tokens,), LoraConfig(r=2), backend="eager", quantization="8da4w")
    graph = program.methods["train_step"].graph
    products = [n for n in graph.nodes if n.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.linear.default)]
    factors = [n.args[1].name for n in products if "smoothing" in str(n.args[1])]
    sums = [n.args[1].name for n in products if "group_sums" in str(n.args[1])]
    assert len(factors) == len(set(factors)) and sums == ["b_group_sums_2_64"]


def test_what_stays_float32() -> None:
    model, tokens = wide()
    config = QuantizationConfig("8da4w", embedding="none", head="none", skip=("up",))
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        mobizo.compile(model, (tokens,), LoraConfig(target_modules=("up",)), backend="eager", quantization=config)
    config = QuantizationConfig("8da4w", embedding="none", head="int8")
    program = mobizo.compile(model, (tokens,), LoraConfig(target_modules=("up",)), backend="eager", quantization=config)
    tensors = dict(program.methods["evaluate"].tensors().values())
    assert tensors["embedding.weight"].dtype == torch.float32
    codes = [t for path, t in tensors.items() if path.startswith("head_weight_qdata")]
    assert len(codes) == 1 and codes[0].dtype == torch.int8 and int(codes[0].abs().max()) > 8
    assert json.loads(program.manifest.quantization or "")["head"] == "int8"


def test_tied_weights_and_addmm_layers() -> None:
    """GPT-2: Conv1D layers, whose weights lie the other way round, and a head that is the embedding table."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 50, (2, 6))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    plain = mobizo.compile(model, inputs, LoraConfig(r=2), backend="eager")
    program = mobizo.compile(model, inputs, LoraConfig(r=2), backend="eager", quantization="int8")
    tensors = dict(program.methods["train_step"].tensors().values())
    assert not any(t.dtype == torch.float32 and t.dim() == 2 and min(t.shape) >= 16 for t in tensors.values())
    found, wanted = Session(program).evaluate(inputs).logits, Session(plain).evaluate(inputs).logits
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert 1e-5 < error < 0.02, "8-bit weights change logits by less than a hundredth or so, but they change them"


def test_a_configuration_of_torchao() -> None:
    model, tokens = wide()
    config = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    lora = LoraConfig(r=3, target_modules=("up",))
    given = mobizo.compile(model, (tokens,), lora, backend="eager", quantization=config)
    named = mobizo.compile(
        model, (tokens,), lora, backend="eager", quantization=QuantizationConfig("int8", embedding="none")
    )
    assert torch.equal(Session(given).evaluate((tokens,)), Session(named).evaluate((tokens,)))
    assert "IntxWeightOnlyConfig" in (given.manifest.quantization or "")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: QuantizationConfig("8bit"), ConfigError, "recipe is '8bit'"),  # type: ignore[arg-type]
        (lambda: QuantizationConfig("int4", group_size=31), ConfigError, "group_size is 31"),
        (lambda: QuantizationConfig("int4", embedding="nf4"), ConfigError, "embedding is 'nf4'"),
        (lambda: QuantizationConfig("int4", skip="up"), ConfigError, "skip must be"),  # type: ignore[arg-type]
        (lambda: QuantizationConfig("8da8w", smoothing=2), ConfigError, "smoothing is 2"),
        (lambda: QuantizationConfig("int4", asymmetric=1), ConfigError, "asymmetric is 1"),  # type: ignore[arg-type]
        (lambda: compile_with(4), ConfigError, "quantization is 4"),
        (lambda: compile_with("8da3w"), ConfigError, "recipe is '8da3w'"),
        (lambda: compile_with(QuantizationConfig("int4", group_size=128)), QuantizationError, "layer up has 64 inputs"),
    ],
)
def test_bad_options(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def compile_with(quantization: object) -> object:
    model, tokens = wide()
    return mobizo.compile(
        model, (tokens,), LoraConfig(target_modules=("up",)), backend="eager", quantization=quantization
    )


def test_nibbles() -> None:
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    assert pack_nibbles(codes).shape == (5, 6)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes.float())


@pytest.mark.slow
def test_the_check_sees_a_lost_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ExecuTorch's XNNPACK does to weight-only layers must not pass as rounding, where activations are rounded."""
    from mobizo_compiler.backends.portable import PortableBackend
    from mobizo_compiler.errors import LoweringError

    lower = PortableBackend.lower

    def with_doubled_scale(self: Any, methods: Any, manifest: Any) -> Any:
        scale = dict(methods["train_step"].tensors().values())
        (wrong,) = (tensor for path, tensor in scale.items() if path.startswith("up_weight_scale"))
        wrong.mul_(2.0)
        artifact = lower(self, methods, manifest)
        wrong.mul_(0.5)
        return artifact

    monkeypatch.setattr(PortableBackend, "lower", with_doubled_scale)
    model, tokens = wide()
    with pytest.raises(LoweringError, match="computes other numbers"):
        mobizo.compile(model, (tokens,), LoraConfig(target_modules=("up",)), backend="portable", quantization="8da8w")
