"""The exact estimator: its gradient is autograd's, on every engine, and its runs survive without scalars to replay."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig, passes
from mobizo_compiler.analysis.costs import tensor_bytes
from mobizo_compiler.backends.executorch.head import read_head
from mobizo_compiler.compiling import pipelines
from mobizo_compiler.compiling.exact_from import with_exact_from
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.device import run as runs
from mobizo_compiler.device.journal import fingerprint
from mobizo_compiler.device.run import SNAPSHOT
from mobizo_compiler.errors import ConfigError, JournalError, NotSupportedYetError
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.pipeline import Pipeline
from mobizo_compiler.inspection.program_file import inspect_file
from mobizo_compiler.passes.recompute import Recompute, fewest_bytes
from mobizo_compiler.step.estimators import Hybrid, directions, get_estimator, measured_numbers, rates_of
from mobizo_compiler.step.rules import Adam, AdamW
from mobizo_compiler.step.sites import in_their_places, trained_before
from mobizo_compiler.testing import TinyCausalLM, TokenWise, check_gradient, tiny_batch, zoo
from tests.killed_run import survives

EXACT = ZOConfig(estimator="exact")
ALL = LoraConfig(r=3, target_modules="all-linear")
ZOO = zoo()
# One of each kind that is differentiated in another way; the rest of the core by `make test-all`.
QUICK = {"gpt2", "swin"}
CORE = (
    *("llama", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "mixtral", "mamba", "gptj"),
    *("deepseek_v3", "bert", "distilbert", "albert", "deberta_v2", "modernbert", "mpnet", "t5", "bart", "vit", "swin"),
    *("convnext", "clip", "whisper", "wav2vec2", "attention_batch_second", "transformer_encoder", "lstm", "cnn"),
)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return TinyCausalLM().eval()


@functools.cache
def program(**options: Any) -> mobizo.Program:
    """On the eager backend, adapters on every linear layer."""
    zo, lora = options.pop("zo", EXACT), options.pop("lora", ALL)
    return mobizo.compile(tiny(), tiny_batch()[0], lora, zo, backend="eager", **options)


def session(**options: Any) -> Session:
    """From a state that is not zero."""
    made = Session(program(**options))
    state = made.state()
    state[: made.program.parameters] += torch.randn(made.program.parameters, generator=seeded()) * 0.1
    made.load_state(state)
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def step(trained: Session, number: int = 0, rate: float = 0.1) -> mobizo.StepResult:
    inputs, labels = tiny_batch(seed=number)
    return trained.train_step(inputs, labels, seed=number, learning_rate=rate)


# -- the gradient ------------------------------------------------------------------------------------------------------


def _cells() -> list[Any]:
    """B alone on the eager backend; A and B on that and on XNNPACK, where what a gradient of B needs is among it."""
    cells = []
    for name in CORE:
        for backend, train_a in (("eager", False), ("eager", True), ("xnnpack", True)):
            quick = backend == "eager" and not train_a and name in QUICK
            marks = [] if quick else [pytest.mark.slow]
            cells.append(pytest.param(name, backend, train_a, marks=marks))
    return cells


@pytest.mark.parametrize(("name", "backend", "train_a"), _cells())
def test_it_is_the_gradient(name: str, backend: str, train_a: bool) -> None:
    case = ZOO[name]
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=case.target_modules, train_a=train_a and name != "cnn")
    check_gradient(case.model(), case.inputs(), backend=backend, lora=lora, loss=case.loss, **case.options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xnnpack", "portable", "aot_inductor"])
def test_engines(backend: str, tmp_path: Path) -> None:
    """From the file, with A trained; the file has every weight once."""
    lora = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", train_a=True)
    report = check_gradient(TinyCausalLM(layers=1).eval(), tiny_batch()[0], backend=backend, lora=lora)
    assert report.program.manifest.methods == ("train_step", "evaluate")
    suffix = ".pt2" if backend == "aot_inductor" else ".pte"
    path = report.program.save(tmp_path / f"program{suffix}")
    loaded = Session(mobizo.load(path))
    assert math.isfinite(step(loaded).loss)


def test_the_file_has_no_weight_twice(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(16, 256), nn.Linear(256, 256), nn.Linear(256, 256)).eval()
    tokens = torch.arange(10).reshape(2, 5)
    sizes = {}
    for estimator in ("exact", "two-sided"):
        zo = ZOConfig(queries=1, estimator=estimator)
        compiled = mobizo.compile(model, (tokens,), LoraConfig(r=2, target_modules="all-linear"), zo, backend="xnnpack")
        sizes[estimator] = compiled.save(tmp_path / f"{estimator}.pte").stat().st_size
    assert sizes["exact"] < 1.1 * sizes["two-sided"]


def test_with_a_bound_weights_are_read_where_they_lie(tmp_path: Path) -> None:
    """No delegate has data of its own to pack, where a layer has rows enough; numbers are the same."""
    model = nn.Sequential(nn.Embedding(16, 256), nn.Linear(256, 256), nn.Linear(256, 256)).eval()
    losses, files = {}, {}
    for rows, bound, packed in ((8, None, True), (8, 1 << 23, False), (2, 1 << 23, True)):
        tokens = torch.arange(rows * 16).reshape(rows, 16) % 16
        compiled = mobizo.compile(
            model, (tokens,), ALL, ZOConfig(estimator="exact"), backend="xnnpack", activation_memory_bytes=bound
        )
        path = compiled.save(tmp_path / "program.pte")
        files[rows, bound] = path.stat().st_size
        head = read_head(path.read_bytes())
        sizes = [head.segments[index].size for index in head.named]
        assert (max(sizes, default=0) >= 256 * 256 * 4) == packed
        session = Session(mobizo.load(path))
        losses[rows, bound] = [session.train_step((tokens,), tokens, seed=0, learning_rate=0.1).loss for _ in range(3)]
    assert losses[8, None] == losses[8, 1 << 23]
    assert files[8, 1 << 23] == pytest.approx(files[8, None], rel=0.02)


def _mean_square(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels.reshape(-1, *[1] * (outputs.dim() - 1))).square().flatten(1).mean(dim=1)


class ManyAndFewRows(nn.Module):
    """Layers with biases, the last of which may have the weight of the one before, and fewer rows."""

    def __init__(self, one_weight: bool, rows_for_both: bool) -> None:
        super().__init__()
        self.table, self.first, self.wide = nn.Embedding(16, 128), nn.Linear(128, 128), nn.Linear(128, 128)
        self.second = nn.Linear(128, 128)
        if one_weight:
            self.second.weight = self.wide.weight
        self.rows_for_both = rows_for_both

    def forward(self, tokens: Tensor) -> Tensor:
        """One row of numbers for each row of tokens, or, where both have rows enough, for each token."""
        hidden: Tensor = self.wide(torch.relu(self.first(self.table(tokens))))
        second: Tensor = self.second(hidden if self.rows_for_both else hidden.mean(dim=1))
        return second


@pytest.mark.parametrize(
    ("one_weight", "rows_for_both", "quantization"),
    [
        (True, False, None),
        pytest.param(True, True, None, marks=pytest.mark.slow),
        pytest.param(False, True, "8da8w", marks=pytest.mark.slow),
        pytest.param(False, False, "8da8w", marks=pytest.mark.slow),
    ],
)
def test_biases_beside_weights_that_are_read_in_place(
    one_weight: bool, rows_for_both: bool, quantization: str | None
) -> None:
    """`compile` compares with autograd."""
    torch.manual_seed(0)
    model = ManyAndFewRows(one_weight, rows_for_both).eval()
    mobizo.compile(
        model,
        (torch.arange(128).reshape(8, 16) % 16,),
        LoraConfig(r=2, target_modules=("wide", "second")),
        ZOConfig(estimator="exact"),
        _mean_square,
        example_labels=torch.zeros(8),
        quantization=quantization,
        backend="xnnpack",
        activation_memory_bytes=1 << 23,
    )


def test_only_what_lies_behind_the_first_adapter_has_a_backward() -> None:
    last = program(lora=LoraConfig(r=3, target_modules="all-linear", layers_to_transform=(1,)))
    nodes = {name: len(p.methods["train_step"].graph.nodes) for name, p in (("all", program()), ("last", last))}
    evaluate = len(last.methods["evaluate"].graph.nodes)
    assert nodes["last"] - evaluate < 0.7 * (nodes["all"] - evaluate)


def test_a_prefix_is_kept_for_it() -> None:
    lora = LoraConfig(r=3, target_modules="all-linear", layers_to_transform=(1,))
    whole, split = session(lora=lora), session(lora=lora, split_prefix=True)
    results = [step(made) for made in (whole, split)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert torch.allclose(whole.state(), split.state(), atol=1e-6)


@pytest.mark.slow
def test_activations_have_a_bound() -> None:
    """The same numbers from fewer values that are kept, down to a bound that cannot be kept."""
    torch.manual_seed(0)
    model, batch = TinyCausalLM(layers=3).eval(), tiny_batch()[0]

    def compiled(most: int | None) -> mobizo.Program:
        return mobizo.compile(model, batch, ALL, EXACT, backend="eager", activation_memory_bytes=most)

    free = compiled(None)
    whole, calls = live_bytes(free), len(free.methods["train_step"].graph.nodes)
    state = torch.randn(free.parameters, generator=seeded()) * 0.1
    results = []
    for share in (1.6, 0.9):
        bounded = compiled(int(share * whole))
        assert live_bytes(bounded) <= share * whole
        more = len(bounded.methods["train_step"].graph.nodes) - calls
        assert (more > 0) == (share < 1), "what fits is not computed again"
        trained = Session(bounded)
        trained.load_state(state)
        results.append((step(trained).loss, trained.state()))
    assert all(loss == results[0][0] and torch.equal(after, results[0][1]) for loss, after in results)
    with pytest.raises(ConfigError, match=r"activation_memory_bytes is 2 kB; the exact gradient needs \d"):
        compiled(2000)
    with pytest.raises(ConfigError, match="activation_memory_bytes has no meaning for the two-sided estimator"):
        mobizo.compile(model, batch, ALL, activation_memory_bytes=1000)


def live_bytes(program: mobizo.Program) -> int:
    """The most bytes that the calls of a step hold at a time, if each is freed behind its last reader."""
    method = program.methods["train_step"]
    constant = set(method.graph.find_nodes(op="placeholder"))
    order = [node for node in method.graph.nodes if node.op == "call_function"]
    for node in order:
        if node.all_input_nodes and constant.issuperset(node.all_input_nodes) and "lora_b" not in str(node.args):
            constant.add(node)
    live, most = 0, 0
    left = {node: len(node.users) for node in order}
    for node in order:
        size = 0 if node in constant else tensor_bytes(node)
        live += size
        most = max(most, live)
        for inner in node.all_input_nodes:
            if inner in left:
                left[inner] -= 1
                live -= tensor_bytes(inner) if not left[inner] and inner not in constant else 0
    return most


@pytest.mark.parametrize(("recipe", "cosine"), [("8da8w", 0.98), pytest.param("fp16", 0.9999, marks=pytest.mark.slow)])
def test_quantized_weights(recipe: str, cosine: float) -> None:
    """Straight through the rounding of inputs, and with the weights as they are stored."""
    gradients = []
    for quantization in (None, recipe):
        made = session(quantization=quantization)
        before = made.state()
        step(made, rate=1.0)
        gradients.append(before - made.state())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > cosine
    weights = [name for name, _ in program(quantization=recipe).methods["train_step"].tensors().values()]
    assert not any(name.endswith("proj.weight") for name in weights), "float32 weights are stored as well"


# -- both: the last blocks exact, those before measured ----------------------------------------------------------------


@pytest.mark.parametrize("train_a", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hybrid_is_both(train_a: bool) -> None:
    lora = LoraConfig(r=3, target_modules="all-linear", train_a=train_a)
    zo = ZOConfig(queries=3, estimator={"name": "hybrid", "exact_from": -1})
    made, exact = session(zo=zo, lora=lora), session(lora=lora)
    sites, before = made.program.sites, made.state()
    exact.load_state(before)
    first = get_estimator(zo.estimator).measured(sites)
    assert [site.block for site in sites[first - 1 : first + 1]] == [0, 1]
    found, alone = step(made, rate=0.1), step(exact, rate=0.1)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6), "the loss is that of the lane that is not perturbed"
    measured = in_their_places(torch.ones(1, trained_before(sites, first)), sites, first)[0] > 0
    moves = [before - after.state() for after in (made, exact)]
    torch.testing.assert_close(moves[0][~measured], moves[1][~measured], rtol=1e-4, atol=1e-7)
    z_QP = directions(get_estimator(zo.estimator), sites, torch.tensor([0], dtype=torch.int32), 3, "gaussian")
    assert not z_QP[:, ~measured].any()
    slopes_Q = found.projected_gradient
    torch.testing.assert_close(moves[0][measured], 0.1 * (slopes_Q @ z_QP / 3)[measured], rtol=1e-4, atol=1e-6)
    eps = made.program.manifest.eps
    for lane in (0, 4):
        exact.load_state(before + (eps if lane < 3 else -eps) * z_QP[lane % 3])
        assert float(found.lane_losses[lane]) == pytest.approx(step(exact, rate=0.0).loss, rel=1e-5)
    torch.testing.assert_close(slopes_Q, (found.lane_losses[:3] - found.lane_losses[3:]) / (2 * eps))


def test_what_is_measured_has_a_rate_of_its_own() -> None:
    """Under a rule that moves by noise as far as by a gradient."""
    moves = {}
    for share in (1.0, 0.25):
        zo = ZOConfig(queries=2, estimator=Hybrid(-1, share))
        made = session(
            zo=zo, lora=LoraConfig(r=3, target_modules="all-linear", train_a=True), rule=AdamW(weight_decay=0.1)
        )
        before, sites = made.state(), made.program.sites
        step(made, rate=0.1)
        moves[share] = before - made.state()
    measured = measured_numbers(get_estimator(zo.estimator), sites) > 0
    whole, quarter = (move[: len(measured)] for move in moves.values())
    torch.testing.assert_close(quarter[measured], whole[measured] / 4)
    assert torch.equal(quarter[~measured], whole[~measured]) and whole[~measured].any()
    assert Hybrid.from_json(Hybrid(-1, 0.25).to_json()) == Hybrid(-1, 0.25)
    shares = rates_of(Hybrid(-1, 1e-7), sites)
    assert shares is not None and set(shares.tolist()) == {1.0, float(torch.tensor(1e-7))}
    with pytest.raises(ConfigError, match=r"Hybrid.measured_rate is -1.0; it must be above 0"):
        Hybrid(measured_rate=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_hybrid_on_engines(backend: str, tmp_path: Path) -> None:
    """`compile` compares it with autograd and with lanes that run alone."""
    zo = ZOConfig(queries=2, estimator={"name": "hybrid", "exact_from": 1, "measured_rate": 0.5}, clip=5.0)
    made = mobizo.compile(
        TinyCausalLM(layers=2).eval(), tiny_batch()[0], ALL, zo, backend=backend, activation_memory_bytes=1 << 20
    )
    assert made.manifest.methods == ("train_step", "evaluate")
    found = inspect_file(made.save(tmp_path / "program.pte"))["sites"]
    assert {site["gradient"] for site in found if ".0." in site["fqn"]} == {"measured"}
    assert {site["gradient"] for site in found if ".1." in site["fqn"]} == {"exact"}
    inputs, labels = tiny_batch()
    trained = Session(made)
    losses = [trained.train_step(inputs, labels, seed=i, learning_rate=0.05).loss for i in range(8)]
    assert losses[-1] < losses[0]


def test_hybrid_needs_adapters_on_both_sides() -> None:
    for exact_from, problem in ((0, "measured"), (7, "exact"), (-2, "measured")):
        zo = ZOConfig(estimator=Hybrid(exact_from))
        with pytest.raises(ConfigError, match=f"adapters are in blocks 0 to 1: nothing would be {problem}"):
            program(zo=zo)
    with pytest.raises(ConfigError, match="split_prefix has no meaning"):
        program(zo=ZOConfig(estimator="hybrid"), split_prefix=True)
    with pytest.raises(ConfigError, match='must be the number of a block, or "auto"'):
        Hybrid(exact_from="first")  # type: ignore[arg-type]


@pytest.mark.slow
def test_hybrid_is_exact_as_far_as_the_bound_allows() -> None:
    """One block earlier does not fit, and a larger bound takes it in."""
    torch.manual_seed(0)
    inputs = tiny_batch()[0]
    model = TinyCausalLM(layers=3).eval()
    captured = passes.capture(model, bind_example(model, inputs))
    parts = pipelines.Parts(rows=len(inputs["input_ids"]))

    def chosen(exact_from: int | Literal["auto"], most: int) -> Options:
        zo = ZOConfig(queries=2, estimator=Hybrid(exact_from))
        found = Options(lora=ALL, zo=zo, activation_memory_bytes=most)
        return with_exact_from(found, captured, parts, lambda line: None)

    def fits(block: int, most: int) -> bool:
        try:
            Pipeline(pipelines.train_step(chosen(block, most), parts)).run(captured)
        except ConfigError as error:
            assert "the exact gradient needs" in str(error)
            return False
        return True

    steps = pipelines.train_step(chosen(1, 1), parts)
    before = steps[: next(i for i, step in enumerate(steps) if isinstance(step, Recompute))]
    most = fewest_bytes(Pipeline(before).run(captured), 1)
    assert fits(1, most) and not fits(1, most - 2)
    assert chosen("auto", most).zo.estimator == Hybrid(1)
    assert chosen("auto", most - 2).zo.estimator == Hybrid(2) and fits(2, most - 2)
    assert chosen("auto", 1).zo.estimator == Hybrid(2) and not fits(2, 1)


def test_as_far_as_a_bound_that_is_missing() -> None:
    with pytest.raises(ConfigError, match="activation_memory_bytes is not given"):
        Options(zo=ZOConfig(estimator=Hybrid("auto")))
    one = Options(zo=ZOConfig(estimator=Hybrid("auto")), activation_memory_bytes=1)
    captured = passes.capture(TokenWise().eval(), bind_example(None, (torch.zeros(2, 5, dtype=torch.int64),)))
    with pytest.raises(ConfigError, match="not in two numbered blocks"):
        with_exact_from(one, captured, pipelines.Parts(), lambda line: None)


@pytest.mark.slow
def test_a_program_of_as_much_as_fits() -> None:
    """The manifest has the block."""
    torch.manual_seed(0)
    zo, said = ZOConfig(queries=2, estimator=Hybrid("auto")), list[str]()
    made = mobizo.compile(
        TinyCausalLM(layers=2).eval(), tiny_batch()[0], ALL, zo, activation_memory_bytes=1 << 20, progress=said.append
    )
    assert made.manifest.zo.estimator == Hybrid(1)
    assert any(line.startswith("the gradient itself from block 1 on, of blocks 0 to 1") for line in said)


# -- the configuration -------------------------------------------------------------------------------------------------


def test_there_is_one_direction_and_the_seed_changes_nothing() -> None:
    assert (EXACT.queries, EXACT.lanes) == (1, 1)
    first, second = session(), session()
    inputs, labels = tiny_batch()
    a = first.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=1e-2)
    b = second.train_step(inputs, labels, seed=2, learning_rate=0.1, eps=0.5)
    assert torch.equal(first.state(), second.state()) and a.loss == b.loss
    assert a.lane_losses.tolist() == [a.loss]


def test_its_projected_gradient_is_the_slope_along_the_gradient() -> None:
    made = session()
    before = made.state()
    result = step(made, rate=1.0)
    gradient = before - made.state()
    assert result.projected_gradient.item() == pytest.approx(float(gradient.norm()), rel=1e-5)
    rate, start = 1e-3, result.loss
    made.load_state(before)
    step(made, rate=rate)
    assert start - step(made, rate=0.0).loss == pytest.approx(rate * float(gradient.norm()) ** 2, rel=0.02)


def test_the_length_of_the_gradient_is_limited() -> None:
    made = session(zo=ZOConfig(estimator="exact", clip=0.25))
    before = made.state()
    result = step(made, rate=1.0)
    assert result.projected_gradient.item() > 0.25, "what was measured is said, not what is left of it"
    assert float((before - made.state()).norm()) == pytest.approx(0.25, rel=1e-5)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ConfigError, match="normalize has no meaning"):
        ZOConfig(estimator="exact", normalize=True)
    made = session()
    for refused in (lambda: made.replay(1, [0.5], 0.1), lambda: made.merge(["journal"])):
        with pytest.raises(ConfigError, match="a step is a gradient"):
            refused()
    dims = {
        "input_ids": {1: torch.export.Dim("tokens", max=32)},
        "attention_mask": {1: torch.export.Dim("tokens", max=32)},
    }
    with pytest.raises(NotSupportedYetError, match="sizes that are numbers"):
        mobizo.compile(tiny(), tiny_batch()[0], ALL, EXACT, backend="eager", dynamic_shapes=dims)


@pytest.mark.parametrize("rule", [AdamW(), AdamW(weight_decay=0.1, beta1=0.8), Adam()], ids=str)
def test_adam_is_that_of_pytorch(rule: Adam) -> None:
    """Bias correction, decoupled decay: five steps of `torch.optim.AdamW` on the same gradients."""
    made = session(rule=rule)
    reference = session()  # plain descent with rate 1 shows the gradient at a state
    count = made.program.parameters
    leaf = made.state()[:count].clone().requires_grad_()
    options = {"betas": (rule.beta1, rule.beta2), "eps": rule.delta, "weight_decay": rule.weight_decay}
    optimizer = torch.optim.AdamW([leaf], lr=0.01, **options)
    for number in range(5):
        reference.load_state(leaf.detach().clone())
        step(reference, number, rate=1.0)
        leaf.grad = leaf.detach() - reference.state()
        optimizer.step()
        step(made, number, rate=0.01)
        assert torch.allclose(made.state()[:count], leaf.detach(), atol=3e-5), number


# -- runs --------------------------------------------------------------------------------------------------------------


def data(number: int) -> tuple[dict[str, Tensor], Tensor]:
    return tiny_batch(seed=number)


def trained(folder: Path | None, steps: int, **options: Any) -> Session:
    made = Session(program(rule="adamw"))
    made.finetune(options.pop("batches", data), steps=steps, learning_rate=0.01, run=folder, **options)
    return made


class Killed(BaseException):
    pass


def killed_after(number: int) -> Any:
    def on_step(step: int, result: object) -> None:
        if step == number:
            raise Killed

    return on_step


@pytest.mark.parametrize("every", [2, 100])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, every: int) -> None:
    whole = trained(None, 8)
    for number in (0, 3, 4, 6):
        with pytest.raises(Killed):
            trained(tmp_path, 8, snapshot_every=every, on_step=killed_after(number))
    resumed = trained(tmp_path, 8, snapshot_every=every)
    assert torch.equal(resumed.state(), whole.state())
    again = Session(program(rule="adamw"))
    assert again.restore(tmp_path) == 8 and torch.equal(again.state(), whole.state())


@pytest.mark.slow
@pytest.mark.parametrize("zo", [EXACT, ZOConfig(queries=2, estimator={"name": "hybrid", "exact_from": 1})], ids=str)
def test_kills_at_random_instants(zo: ZOConfig, tmp_path: Path) -> None:
    """100 of them, in the stock runtime, during steps, journal writes and snapshots: each run goes on bit for bit."""
    model = TinyCausalLM(layers=2).eval()
    made = mobizo.compile(model, tiny_batch()[0], ALL, zo, backend="portable", rule="adamw")
    survives(made, tmp_path, kills=100, steps=40)


def test_steps_from_other_data_are_not_taken_for_the_same(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, 8, on_step=killed_after(3))
    with pytest.raises(JournalError, match="step 0, made again, has the loss"):
        trained(tmp_path, 8, batches=lambda number: tiny_batch(seed=number + 1))
    with pytest.raises(JournalError, match="the last 4 steps are not in a saved state"):
        Session(program(rule="adamw")).restore(tmp_path)


def test_no_more_than_a_minute_is_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(runs.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(Killed):
        trained(tmp_path, 8, on_step=killed_after(5))
    saved, at = runs.read_state(tmp_path / SNAPSHOT, Session(program(rule="adamw")))
    assert at >= 3 and bool(saved.any())


def test_its_steps_are_not_those_of_another_estimator() -> None:
    other = program(zo=ZOConfig(queries=1))
    assert fingerprint(program()) != fingerprint(other)
