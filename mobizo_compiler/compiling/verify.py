"""Trust nothing: lanes must be independent, and the artifact must compute what the graphs that it was made from do."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mobizo_compiler.errors import LoweringError, UnsupportedGraphError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program, Runner
from mobizo_compiler.graph.eager import EAGER, EagerArtifact
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, operator_name
from mobizo_compiler.graph.program import LABELS, STATE_INPUT, GraphProgram
from mobizo_compiler.step.estimators import get_estimator
from mobizo_compiler.step.losses import Loss
from mobizo_compiler.step.noise import noise

# Two engines add float32 products in different orders: losses agree to LOSS_TOLERANCE of their size. The projected
# gradient divides a difference of two losses by eps or 2 eps, so it agrees to the error of the losses divided by eps.
# Given the gradient, updates agree to the last bits of the noise, as a share of the update's norm; a rule that takes
# signs may turn a few of them.
LOSS_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-2
OUTPUT_TOLERANCE = 2e-3
LANE_TOLERANCE = 1e-5  # one engine, other batch sizes
# Where activations are rounded to integers, a value in the last place decides now and then which integer it is, and two
# engines that agree to rounding part by up to what all the rounding does. That is measured, by leaving it out.
ROUNDING = 4.0
EPS, LEARNING_RATE, SEED, STATE_SCALE = 1e-2, 1e-3, 20, 1e-2


def check_program(program: Program, loss: Loss, example_inputs: Sequence[Tensor]) -> str | None:
    """Check on the example inputs that lanes are independent, and that the artifact computes what the graphs say.

    Returns:
        Why the artifact was not run, where it says that it cannot run here; then the graphs alone are checked.

    Raises:
        UnsupportedGraphError: A lane has another loss among other lanes than alone: the model mixes rows.
        LoweringError: Artifact and graphs disagree by more than rounding explains; the message names the method and
            the numbers.
    """
    graphs = EagerArtifact(dict(program.methods)).runner()
    generator = torch.Generator().manual_seed(SEED)
    zo, parameters = program.manifest.zo, program.parameters
    start = program.initial_state()
    start[:parameters] += torch.randn(parameters, generator=generator) * STATE_SCALE
    inputs = [value.contiguous() for value in example_inputs]
    labels = random_labels(program.manifest, inputs, generator)
    scalars = torch.tensor([SEED], dtype=torch.int32), torch.tensor([LEARNING_RATE]), torch.tensor([EPS])
    starts = graphs.call("prefix", [*inputs, labels]) if program.manifest.prefix else inputs
    step = _ordered(program, starts, labels, *scalars)

    def run(runner: Runner, method: str, arguments: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        runner.state().copy_(state)
        return runner.call(method, arguments), runner.state().clone()

    (_, losses, gradient), updated = run(graphs, "train_step", step, start)
    size = max(1.0, float(losses.abs().max()))
    first = start.clone()
    directions = noise(SEED, zo.queries, parameters, zo.noise)
    first[:parameters] = get_estimator(zo.estimator).perturbed(start[:parameters], EPS * directions)[0]
    outputs, _ = run(graphs, "evaluate", inputs, first)
    rounding = [0.0] * (1 + len(outputs))
    if any(rounds(method) for method in program.methods.values()):
        exact = {name: without_rounding(method) for name, method in program.methods.items()}
        smooth = EagerArtifact(dict(exact)).runner()
        (_, smooth_losses, _), _ = run(smooth, "train_step", step, start)
        smooth_outputs, _ = run(smooth, "evaluate", inputs, first)
        pairs = [(smooth_losses, losses), *zip(smooth_outputs, outputs, strict=True)]
        rounding = [ROUNDING * float((a - b).abs().max()) for a, b in pairs]
    _check_lane(program, loss, outputs, labels, float(losses[0]), LANE_TOLERANCE * size + rounding[0])
    if program.manifest.backend == EAGER and isinstance(program.artifact, EagerArtifact):
        return None
    reason: str | None = program.artifact.cannot_run
    if reason:
        return reason

    compare = functools.partial(_compare, program.manifest.backend)
    # Where a switch of the engine rounds, it is the code that is compared; what rounding does is the user's choice.
    lowered = program.artifact.exact_runner()
    if program.manifest.prefix:
        for position, (a, b) in enumerate(zip(lowered.call("prefix", [*inputs, labels]), starts, strict=True)):
            a, b = a.float(), b.float()
            tolerance = OUTPUT_TOLERANCE * max(1.0, float(b.abs().max())) + max(rounding)
            compare("prefix", f"value {position}", a, b, tolerance)
    (_, found_losses, found_gradient), found_state = run(lowered, "train_step", step, start)
    allowed = LOSS_TOLERANCE * size + rounding[0]
    compare("train_step", "lane losses", found_losses, losses, allowed)
    slope = 2 * allowed / EPS
    if zo.normalize:  # multiplied by eps / spread of the losses, and the spread is off by as much as a loss
        slope = 2 * allowed / float(losses.std()) * (1 + float(gradient.abs().max()))
    compare("train_step", "projected gradient", found_gradient, gradient, slope)
    # The update is that of the graphs from the gradient that was found: rules may make much of a small difference.
    _, wanted = run(graphs, "replay", [scalars[0], found_gradient.clone(), scalars[1]], start)
    moved = UPDATE_TOLERANCE * float((wanted - start).norm())
    compare("train_step", "change of the state", (found_state - wanted).norm(), torch.zeros(()), moved)
    if torch.equal(found_state, start) and not torch.equal(updated, start):
        raise LoweringError("train_step does not change the state", where=f"backend {program.manifest.backend!r}")
    _, replayed = run(lowered, "replay", [scalars[0], found_gradient.clone(), scalars[1]], start)
    compare("replay", "state", replayed, found_state, 0.0)
    if program.manifest.memory:  # what the rule remembers counts from the second step on
        again = [scalars[0] + 1, found_gradient.clone(), scalars[1]]
        (_, wanted), (_, found) = run(graphs, "replay", again, found_state), run(lowered, "replay", again, found_state)
        moved = UPDATE_TOLERANCE * float((wanted - found_state).norm())
        compare("replay", "second change of the state", (found - wanted).norm(), torch.zeros(()), moved)
    found_outputs, kept = run(lowered, "evaluate", inputs, first)
    for position, (a, b) in enumerate(zip(found_outputs, outputs, strict=True)):
        allowed = OUTPUT_TOLERANCE * max(1.0, float(b.abs().max())) + rounding[1 + position]
        compare("evaluate", f"output {position}", a, b, allowed)
    compare("evaluate", "state", kept, first, 0.0)
    return None


def _check_lane(
    program: Program, loss: Loss, outputs: list[Tensor], labels: Tensor, among_others: float, allowed: float
) -> None:
    nesting = program.methods["evaluate"].nesting
    assert nesting is not None
    row_loss, row_weight = loss(nesting.unflatten(outputs), labels)
    alone = float(row_loss.sum() / row_weight.sum())
    if not abs(alone - among_others) <= allowed:
        raise UnsupportedGraphError(
            f"the model mixes rows: a lane has loss {alone:.6g} alone and {among_others:.6g} beside other lanes",
            hint="remove what computes over the batch (a mean over rows, batch statistics), or put it into eval mode",
        )


def rounds(program: GraphProgram) -> bool:
    """Whether values that depend on the inputs are rounded, to integers or to bfloat16."""
    return any(_unrounded(node) is not None for node in program.graph.nodes)


def without_rounding(program: GraphProgram) -> GraphProgram:
    """The same program with real numbers in place of integers, and float32 in place of bfloat16, for comparison."""
    edit = Editor(program)
    half = [node for node in edit.graph.nodes if _is_half(node) and edit.tensor(node) is not None]
    for node in list(edit.graph.nodes):
        source = _unrounded(node)
        if source is not None:
            edit.replace(node, source)
    for node in half:
        with edit.graph.inserting_before(min(node.users)):
            whole = edit.call(torch.ops.aten.to.dtype, node, torch.float32)
        edit.replace(node, whole, keep=whole)
    if half:
        edit.refresh()
    return edit.finish(program.facts, (*program.history, "without rounding"))


def _unrounded(node: fx.Node) -> fx.Node | None:
    """What a node rounds, if it does; torchao's operators round as one that quantizes and one that dequantizes."""
    if node.target is torch.ops.aten.round.default:
        return operand(node)
    if node.target is torch.ops.aten.to.dtype and _is_half(node) and operand(node).meta["val"].dtype == torch.float32:
        return operand(node)
    if operator_name(node) == "torchao::dequantize_affine" and isinstance(node.args[0], fx.Node):
        quantize = operand(node)
        if operator_name(quantize) == "torchao::quantize_affine":
            return operand(quantize)
    return None


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def random_labels(manifest: Manifest, inputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Labels for these inputs, anywhere in their range, as many of a row as may count."""
    spec = manifest.labels
    known: dict[str, int] = {}
    for value, size in zip(inputs, manifest.inputs, strict=True):
        known |= {name: n for name, n in zip(size.shape, value.shape, strict=True) if isinstance(name, str)}
    shape = tuple(known[size] if isinstance(size, str) else size for size in spec.shape)
    dtype = getattr(torch, spec.dtype)
    if spec.low is None or spec.high is None:
        normal = torch.randn(shape, generator=generator)
        return normal.to(dtype) if dtype.is_floating_point else (normal > 0).to(dtype)
    labels = torch.randint(spec.low, spec.high + 1, shape, generator=generator)
    if spec.choices is not None:
        labels = torch.tensor(spec.choices)[labels % len(spec.choices)]
    if manifest.max_labels is not None and spec.also is not None:
        labels[:, : max(0, labels.shape[1] - manifest.max_labels)] = spec.also
    return labels.to(getattr(torch, spec.dtype))


def _ordered(program: Program, inputs: Sequence[Tensor], labels: Tensor, *scalars: Tensor) -> list[Tensor]:
    """Arguments of `train_step`, whose inputs are the model's, then labels, seed, learning rate and eps."""
    arguments = [*inputs, labels, *scalars]
    names = [name for name in program.methods["train_step"].inputs if name != STATE_INPUT]
    assert names.index(LABELS) == len(inputs) and len(names) == len(arguments), names
    return arguments


def _compare(backend: str, method: str, what: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not error <= tolerance:
        raise LoweringError(
            f"the lowered program computes other numbers than the graph it was made from: {what} of {method} "
            f"differ by {error:.3g}, more than {tolerance:.3g}",
            where=f"backend {backend!r}, {method}: found {_few(found)}, expected {_few(wanted)}",
            hint="report this with the program text (MOBIZO_DUMP=folder), and try another backend",
        )


def _few(values: Tensor) -> str:
    return "[" + ", ".join(f"{float(v):.6g}" for v in values.flatten()[:4]) + ", ...]"
