"""`compile`: from a model to a program that trains itself."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.export import ExportedProgram

from mobizo_compiler.analysis.costs import si
from mobizo_compiler.analysis.ranges import explain_lookup
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.compiling.cache import cached
from mobizo_compiler.compiling.captured_forward import CapturedForward
from mobizo_compiler.compiling.captured_step import CapturedStep
from mobizo_compiler.compiling.described import described_program
from mobizo_compiler.compiling.methods import captured_and_rewritten
from mobizo_compiler.compiling.model_config import answer_names, generation, padding_of, saved_weights, words_of
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.compiling.verify import check_program
from mobizo_compiler.config import GenerateConfig, LoraConfig, ZOConfig
from mobizo_compiler.errors import BackendRefusedError, BackendUnavailableError, ConfigError
from mobizo_compiler.format.gguf_adapter import read_gguf
from mobizo_compiler.format.peft import PeftAdapter, check_base, read_peft
from mobizo_compiler.format.program import Program
from mobizo_compiler.format.vocabulary import located, name_of, vocabulary_of
from mobizo_compiler.graph.example import DynamicShapes, Example, ExampleInputs, RowAxes, bind_example
from mobizo_compiler.graph.paging import give_back
from mobizo_compiler.graph.pipeline import Insertion
from mobizo_compiler.passes.capture import outputs_of, unwrapped
from mobizo_compiler.passes.full_precision import is_half
from mobizo_compiler.quantization.weights import QuantizationConfig
from mobizo_compiler.step.agreement import check_half
from mobizo_compiler.step.losses import CallableLoss, Loss
from mobizo_compiler.step.rules import UpdateRule
from mobizo_compiler.step.sites import initial_state

Progress = Callable[[str], None]
LossFunction = Callable[[Any, Tensor], Tensor]
# What `Options` takes the place of, with the defaults of `compile`.
_DEFAULTS: Mapping[str, Any] = {
    "lora": None,
    "zo": None,
    "loss": None,
    "quantization": None,
    "rule": "sgd",
    "state": "shared",
    "split_prefix": False,
    "activation_memory_bytes": None,
    "passes": (),
    "generate": None,
}


class _OneAtATime(contextlib.ContextDecorator):
    """One compilation at a time, without Python's garbage collector; `between_phases` runs it.

    What torch knows of a trace under way is the process's, so that other threads wait. The collector visits every
    object of a graph, again and again; and where it runs in the midst of a trace, it may leave a weak reference behind
    to the memory of a parameter, which crashes the process when the model is freed (torch 2.13).
    """

    _lock, _inside, _enabled = threading.RLock(), 0, True

    def __enter__(self) -> None:
        self._lock.acquire()
        if not _OneAtATime._inside:
            _OneAtATime._enabled = gc.isenabled()
            gc.disable()
        _OneAtATime._inside += 1

    def __exit__(self, *error: object) -> None:
        _OneAtATime._inside -= 1
        if not _OneAtATime._inside and _OneAtATime._enabled:
            gc.enable()
        self._lock.release()

    @classmethod
    def between_phases(cls) -> None:
        """Collect what is new since the last time, for a process that would have; what is old is not visited again."""
        if cls._enabled:
            gc.collect(1)


@_OneAtATime()
def compile(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    lora: LoraConfig | None = None,
    zo: ZOConfig | None = None,
    loss: Loss | LossFunction | str | None = None,
    quantization: str | QuantizationConfig | object | None = None,
    backend: str | Backend = "xnnpack",
    dynamic_shapes: DynamicShapes | None = None,
    *,
    state: str = "shared",
    row_axes: RowAxes | None = None,
    adapter: str | PathLike[str] | None = None,
    rule: str | UpdateRule = "sgd",
    split_prefix: bool = False,
    activation_memory_bytes: int | None = None,
    passes: Sequence[Insertion | str] = (),
    generate: GenerateConfig | None = None,
    options: Options | None = None,
    example_labels: Tensor | None = None,
    answers: Sequence[str] | None = None,
    prompt: Mapping[str, Any] | None = None,
    new_weights: Sequence[str] = (),
    base_model: str | None = None,
    tokenizer: Any = None,
    dump_dir: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Program:
    """Compile a model into a program that fine-tunes itself in an inference engine.

    Args:
        model: A module in eval mode, or a `torch.export.ExportedProgram`. A module in bfloat16 or float16 is compiled
            as its float32 self, from the weights as they are: they are made float32 one at a time.
        example_inputs: A tuple, or a dict for keyword arguments, nested as the model wants it. Their shapes are the
            shapes that the program takes. Values that are no tensors are fixed by the capture.
        lora: Which layers are adapted; `LoraConfig()` if None.
        zo: How the gradient is estimated; `ZOConfig()` if None.
        loss: `CausalLMLoss()` if None; a loss of `mobizo_compiler` or its name, or a traceable function of the model's
            outputs and the labels to one loss per row, [rows].
        quantization: How the frozen base weights are stored: a recipe ("fp16", "8da8w", "8da4w", "int8", "int4" or
            "nf4"), a `QuantizationConfig`, or a configuration of torchao for all linear layers. None leaves them as
            they are, also if torchao quantized the model before.
        backend: Name of an installed backend, or a backend.
        dynamic_shapes: Sizes that may differ from call to call, as in `torch.export`: for each input (by name or
            position) a dict from axis to `torch.export.Dim(name, max=...)`. The row axis may be among them.
        answers: Names of the classes, or of the choices of a `ChoiceLoss`, in their order, kept in the program for
            those who have rows with names; if None, classes have the names that the model's configuration gives.
        prompt: How rows become prompts, as `PromptConfig.to_json` says it, kept in the program for the commands that
            make them.
        new_weights: Names of parameters that the base model lacks, as a head that was drawn for this: they are kept in
            the program and travel with exported adapters, as `modules_to_save` of peft.
        base_model: Name or folder of the model, kept in the program for those who load its tokenizer or the adapter.
        tokenizer: The model's tokenizer; the program keeps a checksum of it, so that that of another model is refused.
        dump_dir: Write the program text after every pass here; the environment variable MOBIZO_DUMP does the same.
        cache_dir: Reuse a program compiled before from the same graph, weights, options and versions.
        state: "shared": a buffer that all methods share, which the Python and C++ runtimes do; it starts at zero.
            "data": the same, but it starts from a data file (`.ptd`) that the runtime is given beside the program;
            sessions write such files, and need none. "io": the last input of every method and the last output of
            those that change it, for Android and iOS.
        row_axes: The axis of the rows of an input, by name or position, where it is not axis 0; None for an input
            without rows, which all lanes share. An input without axes, or with a first axis of 1 where the first
            input has more rows, has none anyway.
        adapter: Folder of a LoRA that peft saved, or a LoRA of llama.cpp (.gguf), in place of `lora`: its layers are
            adapted, with its A. `Session.import_adapter` starts from its B.
        rule: What a step does with the estimate: "sgd", "momentum", "sign", "adam", "scalar-adam", the name of another
            installed rule, or an `UpdateRule`.
        split_prefix: Make what no adapter reaches a method of its own, whose results a `Session` can keep on disk; for
            adapters in the last blocks (`LoraConfig.layers_to_transform`).
        activation_memory_bytes: For `ZOConfig(estimator="exact")`: the most bytes of values that a step keeps at a
            time; what does not fit is computed again, and packed copies of weights are not kept where the engine can
            do without, which takes up to half as long again. None for no limit.
        passes: Passes of one's own, each with its place; see docs/writing_a_pass.md.
        generate: Add a method `forward` with a cache of keys and values, which `Session.generate` and the language
            model runner of ExecuTorch call; for decoders of transformers.
        options: `lora`, `zo`, `loss`, `rule`, `quantization`, `state`, `split_prefix`, `activation_memory_bytes`,
            `passes` and `generate` in one, in place of them.
        example_labels: Labels for a loss that is a function; the first axis is rows.
        progress: Called with a line of text when a phase begins: capture, rewrite, lower, check.

    Raises:
        MobizoError: See `errors.py`; nothing has been written then.

    >>> import torch
    >>> model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 11)).eval()
    >>> program = compile(
    ...     model, (torch.zeros(2, 5, dtype=torch.long),), LoraConfig(r=2, target_modules=("1",)), backend="eager"
    ... )
    >>> program.sites
    (Site(fqn='1', offset=0, r=2, in_features=12, out_features=11, scaling=8.0, kernel=(), a_offset=None, outputs=()),)
    """

    def say(line: str) -> None:
        _OneAtATime.between_phases()
        give_back()
        if progress is not None:
            progress(line)

    chosen = _options(
        options,
        example_labels,
        lora=lora,
        zo=zo,
        loss=loss,
        quantization=quantization,
        rule=rule,
        state=state,
        split_prefix=split_prefix,
        activation_memory_bytes=activation_memory_bytes,
        passes=passes,
        generate=generate,
    )
    given: Mapping[str, tuple[Tensor, Tensor]] = {}
    found = None
    if adapter is not None:
        if lora is not None or chosen.lora != LoraConfig():
            raise ConfigError("lora and adapter are both given", hint="the adapter says which layers, and how")
        found = _adapter_of(Path(adapter), unwrapped(model))
        if found.saved:
            raise ConfigError(
                f"the adapter brings {', '.join(found.saved)}, which are weights of the model",
                hint="load it with peft and save the model with them; or import_adapter into the program it was of",
            )
        chosen = dataclasses.replace(chosen, lora=found.lora)
        given = {fqn: (found.a[fqn], found.b[fqn]) for fqn in found.a}
    model = cast(nn.Module, unwrapped(model))
    target = get_backend(backend)
    if reason := target.unavailable():
        raise BackendUnavailableError(f"backend {target.name!r} cannot be used on this machine: {reason}")
    suffix = target.suffix
    if cache_dir is not None and suffix is None:
        raise ConfigError(f"programs of backend {target.name!r} cannot be cached: they have no file format")
    if chosen.state == "data" and not target.data_files:
        raise BackendRefusedError(
            f"programs of backend {target.name!r} cannot look up their state in a data file",
            hint='state="shared", and Session.import_ptd',
        )
    if chosen.generate is not None and not target.caches:
        raise BackendRefusedError(
            f"programs of backend {target.name!r} cannot keep a cache of keys and values between calls",
            hint='backend="xnnpack", or leave generate out',
        )
    if chosen.split_prefix and dynamic_shapes:
        raise ConfigError("split_prefix and dynamic_shapes exclude each other", hint="pad rows to one length")
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, words_of(model))
    example = bind_example(model, example_inputs, row_axes, dynamic_shapes)

    captured, methods, store, chosen, cached_one = captured_and_rewritten(
        model, example, chosen, target, given, dump_dir, say
    )
    manifest = described_program(captured, methods, example, chosen, target.name, base_model)
    if found is not None:
        check_base(found, manifest.weights, str(adapter))
    manifest = dataclasses.replace(
        manifest,
        answers=answer_names(answers, model, manifest),
        padding=padding_of(model, manifest),
        tokenizer=None if (name := name_of(tokenizer)) == located(base_model) else name,
        vocabulary=vocabulary,
        prompt=prompt,
        saved=saved_weights(new_weights, model),
        generate=generation(chosen.generate, model, cached_one),
    )
    if reasons := [f"{method}: {reason}" for method, p in methods.items() for reason in target.unsupported(p)]:
        raise BackendRefusedError(f"backend {target.name!r} cannot run this program:\n  - " + "\n  - ".join(reasons))

    def compile_anew() -> Program:
        lora_a = methods["train_step"].lora_a
        wanted = CapturedStep(captured, manifest.sites, lora_a, example.rows, store, chosen.zo, chosen.loss)
        at_zero = _outputs(model, wanted, example, say)
        made: dict[int, Tensor] = {}
        whole = {name: method.whole(made) for name, method in methods.items()}
        forward = None
        if cached_one is not None and manifest.generate is not None:
            itself = model if isinstance(model, nn.Module) and not store and not is_half(model) else None
            forward = CapturedForward(cached_one, manifest.sites, lora_a, store, manifest.generate, itself)
        say("lower")
        program = Program(manifest, target.lower(whole, manifest), lora_a, whole)
        if (most := chosen.activation_memory_bytes) is not None:
            _check_planned(program, most, say)
        say("check")
        if reason := check_program(program, wanted, example, at_zero, forward):
            say(f"not run: {reason}; the program can be saved, but its graphs alone were compared with the model")
        return program

    if cache_dir is None or suffix is None:
        return compile_anew()
    return cached(Path(cache_dir), methods, manifest, suffix, say, compile_anew, _backend_options(target))


def _check_planned(program: Program, most: int, say: Progress) -> None:
    """Say how much memory the engine has planned for a step, and refuse more than what was asked for."""
    planned = program.artifact.planned_bytes("train_step")
    if planned is None:
        return
    say(f"a step has {si(planned)}B planned for what it keeps; the bound is {si(most)}B")
    if planned > most:
        raise ConfigError(
            f"activation_memory_bytes is {si(most)}B; the engine has planned {si(planned)}B, because values lie beside "
            "each other in it with gaps",
            hint=f"activation_memory_bytes={most * most // planned}",
        )


def _adapter_of(path: Path, model: object) -> PeftAdapter:
    """The adapter that a model is compiled with."""
    if path.suffix != ".gguf":
        return read_peft(path)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConfigError("the layers of a GGUF file are found by the configuration of a model of transformers")
    layers = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    return read_gguf(path, model.config, layers)


def _backend_options(backend: Backend) -> str:
    """The options of a backend as text; those of one that has none are its name."""
    return repr(backend) if dataclasses.is_dataclass(backend) else backend.name


def _outputs(
    model: nn.Module | ExportedProgram, wanted: CapturedStep, example: Example, say: Callable[[str], None]
) -> list[Tensor]:
    """What the model returns for the example inputs: the module itself, or its graph where weights were quantized or
    the module computes in half precision."""
    comparable = model if isinstance(model, nn.Module) and not wanted.store else None
    try:
        if comparable is not None and not is_half(comparable):
            return outputs_of(comparable, example)
        found = wanted.evaluate(example.tensors, initial_state(wanted.sites, wanted.lora_a))
    except IndexError:
        explain_lookup(wanted.captured, example.tensors)
        raise
    if comparable is not None:
        try:
            itself = outputs_of(comparable, example, in_half=True)
        except RuntimeError as error:
            say(f"not compared with the model, which does not run in half precision: {error}")
        else:
            check_half(found, itself)
    return found


def _options(options: Options | None, example_labels: Tensor | None, **fields: Any) -> Options:
    """The options, given as such or one by one."""
    given = {name: value for name, value in fields.items() if value != _DEFAULTS[name]}
    if options is None:
        if callable(given.get("loss")) and not isinstance(given["loss"], (Loss, type)):
            given["loss"] = _callable_loss(given["loss"], example_labels)
        elif example_labels is not None:
            raise ConfigError("example_labels are only for a loss that is a function", hint="leave them out")
        return Options(**{name: value for name, value in given.items() if value is not None})
    if not isinstance(options, Options):
        raise ConfigError(f"options must be Options, not {type(options).__name__}")
    if given or example_labels is not None:
        name = next(iter(given), "example_labels")
        raise ConfigError(f"options and {name} are both given", hint=f"dataclasses.replace(options, {name}=...)")
    return options


def _callable_loss(loss: Any, example_labels: Tensor | None) -> CallableLoss:
    if not isinstance(example_labels, Tensor) or not example_labels.dim():
        raise ConfigError(
            f"the loss {loss!r} is a function, so example_labels must be a tensor with rows in its first axis",
            hint="compile(..., loss=function, example_labels=labels of one batch)",
        )
    return CallableLoss(loss, tuple(example_labels.shape[1:]), example_labels.dtype)
