"""Capture a decoder of transformers once more, with a cache of keys and values, for the method that generates.

Given:  a causal language model, and the graph that `capture` made of it
Result: state  %b_key_cache_0: f32[1, heads, context, width]       state %b_value_cache_0: f32[1, heads, context, width]
        input  %input_ids: i64[1, tokens]                          input %cache_position: i64[tokens]
          %embedding = embedding(%p_model_embed_tokens_weight, %input_ids) : f32[1, tokens, width]
          %keys = index_put(%b_key_cache_0, [None, None, %place], %k)
        update %b_key_cache_0 <- %keys
Numbers: exact.

Inputs and output are what the language model runner of ExecuTorch calls. transformers' own module for this sets the
length of the cache from the first position in every call, so that a conversation begins anew where a host says 0; its
counters are then no state. Weights have the paths that they have in the graph of `capture`, by which adapters and
quantized weights find them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, TensorArgument

from mobizo_compiler.errors import CaptureError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.program import DynamicSize, GraphProgram, flat_call_graph
from mobizo_compiler.optional import optional
from mobizo_compiler.passes.capture import frozen, functional
from mobizo_compiler.passes.full_precision import in_float32, restored

aten = torch.ops.aten
TOKENS = "tokens"  # name of the dynamic size
_INSIDE = "model."  # where the wrapper has the model
_COUNTER = "cumulative_length_"
_EXAMPLE_TOKENS = 3


def capture_cache(model: object, captured: GraphProgram, context: int) -> GraphProgram:
    """Capture `model` for one row, with a cache of `context` tokens.

    Args:
        model: A causal language model of transformers, in eval mode.
        captured: What `capture` made of it.
        context: Most tokens of a prompt and what is generated for it.

    Raises:
        CaptureError: It is no such model, or cannot be exported with a cache.
    """
    if reason := _no_cache(model, context):
        raise CaptureError(
            f"{type(model).__name__} cannot generate with a cache of keys and values: {reason}",
            hint="leave generate out: evaluate gives the logits of whole rows",
        )
    assert isinstance(model, nn.Module)
    with in_float32(model) as originals:
        exported = functional(_export(model, context), (aten.index_copy.default,))
    _drop_counters(exported)
    _without_wrapper(exported)
    read = {node.name for node in captured.graph.find_nodes(op="placeholder") if node.users}
    known = {path: tensor.data_ptr() for name, (path, tensor) in captured.tensors().items() if name in read}
    every = {path: restored(frozen(value), originals) for path, value in _tensors(exported).items()}
    inputs, tensors = _by_path(exported, every, known)
    signature = ExportGraphSignature(inputs, exported.graph_signature.output_specs)
    constants: dict[str, Any] = {
        path: tensor for path, (kind, tensor) in tensors.items() if kind is not InputKind.PARAMETER
    }
    flat = ExportedProgram(
        root=nn.Module(),
        graph=exported.graph,
        graph_signature=signature,
        state_dict={path: tensor for path, (_, tensor) in tensors.items() if path not in constants},
        range_constraints=exported.range_constraints,
        module_call_graph=flat_call_graph(len(signature.user_inputs), len(signature.user_outputs)),
        constants=constants,
        verifiers=exported.verifiers,
    )
    (ids, _) = (node for node in flat.graph.nodes if node.name in signature.user_inputs)
    size = ids.meta["val"].shape[1]
    program = GraphProgram(
        flat,
        outputs=("logits",),
        dynamic={str(size.node.expr): DynamicSize(TOKENS, 1, context - 1)},
        facts=frozenset({facts.FUNCTIONAL}),
        history=(f"capture_cache(context={context})",),
    )
    if problems := facts.broken(program):
        raise CaptureError("the graph with a cache cannot be used:\n  - " + "\n  - ".join(problems))
    return program


def _no_cache(model: object, context: int) -> str | None:
    """Why a model has no cache that could be captured; None if it may have."""
    if not isinstance(model, nn.Module):
        return "it is captured already; pass the module that it was exported from"
    if not type(model).__module__.startswith("transformers"):
        transformers = optional("transformers", "generating with a cache")
        if not isinstance(model, transformers.PreTrainedModel):
            return "it is no model of transformers, whose caches are the ones that can be captured"
    config: Any = model.config
    if config.is_encoder_decoder or not model.can_generate():  # type: ignore[operator]
        return "it is no decoder that predicts the next token"
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        return f"it has {most} positions, and the context is {context}"
    return None


def _export(model: nn.Module, context: int) -> ExportedProgram:
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    ids = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long)
    size = Dim(TOKENS, max=context - 1)
    try:
        with torch.no_grad(), _with_static_cache(model, context):
            wrapped = TorchExportableModuleForDecoderOnlyLM(model, 1, context, torch.device("cpu"))
            # Without strict, the capture has calls of functions in it that cannot be decomposed.
            exported: ExportedProgram = wrapped.export(
                input_ids=ids,
                cache_position=torch.arange(_EXAMPLE_TOKENS),
                dynamic_shapes={"input_ids": {1: size}, "cache_position": {0: size}},
                strict=True,
            )
            return exported
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} with a cache of keys and values: {error}",
            hint="leave generate out; what transformers exports is written at "
            "https://huggingface.co/docs/transformers/main/en/executorch",
        ) from error


@contextlib.contextmanager
def _with_static_cache(model: nn.Module, context: int) -> Iterator[None]:
    """Within the block, the model is set up as transformers wants it for a cache of a fixed size."""
    from transformers import GenerationConfig

    config: Any = model.config
    before, text = model.generation_config, config.get_text_config()
    use_cache, wanted = text.use_cache, [p for p in model.parameters() if p.requires_grad]
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=context,
        cache_config={"batch_size": 1, "max_cache_len": context},
    )
    text.use_cache = True
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.generation_config, text.use_cache = before, use_cache
        for parameter in wanted:
            parameter.requires_grad_(True)


def _drop_counters(exported: ExportedProgram) -> None:
    """Take out the counters of what is in the cache: every call begins by setting them from its first position."""
    signature, graph = exported.graph_signature, exported.graph
    counters = {spec.arg.name for spec in signature.input_specs if (spec.target or "").startswith(_COUNTER)}
    for node in [node for node in graph.nodes if node.name in counters]:
        for user in list(node.users):
            if user.target is not aten.copy.default or operand(user) is not node:
                raise CaptureError(f"what is in the cache is counted in {node.name} from one call to the next")
            user.replace_all_uses_with(operand(user, 1))
            graph.erase_node(user)
        graph.erase_node(node)
    kept = [
        (spec, value)
        for spec, value in zip(signature.output_specs, graph.output_node().args[0], strict=True)
        if not (spec.kind is OutputKind.BUFFER_MUTATION and (spec.target or "").startswith(_COUNTER))
    ]
    graph.output_node().args = (tuple(value for _, value in kept),)
    inputs = [spec for spec in signature.input_specs if spec.arg.name not in counters]
    exported._graph_signature = ExportGraphSignature(inputs, [spec for spec, _ in kept])


def _tensors(exported: ExportedProgram) -> dict[str, Tensor]:
    every = {**exported.constants, **exported.state_dict}
    return {path: value for path, value in every.items() if isinstance(value, Tensor)}


def _by_path(
    exported: ExportedProgram, every: Mapping[str, Tensor], known: Mapping[str, int]
) -> tuple[list[InputSpec], dict[str, tuple[InputKind, Tensor]]]:
    """The inputs with the model's own paths, and kind and value of every tensor by path.

    A weight that modules share has the path that it has in `known`, or, where it has several there, that of the module
    which reads it.
    """
    inputs: list[InputSpec] = []
    tensors: dict[str, tuple[InputKind, Tensor]] = {}
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.target is None:
            inputs.append(spec)
            continue
        path, value, node = spec.target.removeprefix(_INSIDE), every[spec.target], nodes[spec.arg.name]
        names = [name for name, place in known.items() if place == value.data_ptr()]
        path = path if path in names or not names else names[0]
        readers: dict[str, list[fx.Node]] = {}
        for user in node.users:
            own = f"{_module(user)}.{path.rpartition('.')[2]}"
            readers.setdefault(own if own in names else path, []).append(user)
        for name, users in readers.items():
            node = nodes[spec.arg.name] if name == next(iter(readers)) else _another(exported.graph, node, users)
            inputs.append(InputSpec(spec.kind, TensorArgument(node.name), name, spec.persistent))
            tensors[name] = (spec.kind, value)
    return inputs, tensors


def _module(node: fx.Node) -> str:
    """Path in the model of the module that a call was made in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(next(reversed(stack.values()))[0])


def _without_wrapper(exported: ExportedProgram) -> None:
    """Let calls say where in the model they were made."""
    for node in exported.graph.nodes:
        (_, *inner) = (node.meta.get("nn_module_stack") or {"": ("", "")}).items()
        node.meta["nn_module_stack"] = {
            key: (f"{path}.".removeprefix(_INSIDE).rstrip("."), kind) for key, (path, kind) in inner
        }


def _another(graph: fx.Graph, node: fx.Node, users: list[fx.Node]) -> fx.Node:
    """A placeholder behind another one, of the same value, for some of its readers."""
    with graph.inserting_after(node):
        other = graph.placeholder(f"{node.name}_too")
    other.meta |= node.meta
    for user in users:
        user.replace_input_with(node, other)
    return other
