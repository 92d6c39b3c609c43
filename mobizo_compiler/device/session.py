"""`Session`: a program being trained. It checks every input before anything runs, and owns the state."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

import mobizo_compiler.device.run as runs
from mobizo_compiler.device.batches import filled, labelled, without_labels
from mobizo_compiler.device.generation import Ending, Sampling, continued, prompt_of
from mobizo_compiler.device.journal import fingerprint, read_journal, replayed
from mobizo_compiler.device.prefix_cache import PrefixCache
from mobizo_compiler.device.private_run import finetune_privately
from mobizo_compiler.device.scalars import float32, scalar_tensor, seed_tensor, whole
from mobizo_compiler.errors import (
    ConfigError,
    ExtensionUnavailableError,
    InputError,
    LabelError,
    SessionBusyError,
    StateError,
    UnknownExtensionError,
)
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.format.manifest import TensorSpec, nesting_from_json
from mobizo_compiler.format.peft import lora_a, merge_into, read_peft, state_of, write_peft
from mobizo_compiler.format.probe import Probe, answer_of, asked_of, probe_inputs
from mobizo_compiler.format.program import DeviceRunner, Program, StepResult
from mobizo_compiler.graph.example import flat_names
from mobizo_compiler.graph.program import Nesting
from mobizo_compiler.load import load
from mobizo_compiler.options import MAX_SEED
from mobizo_compiler.step.estimators import directions, get_estimator, lanes_of

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
P = ParamSpec("P")
R = TypeVar("R")


def _by_one_thread(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Refuse a call while another thread is in one; a thread may call again from inside, in a lane or a callback."""

    @functools.wraps(method)
    def guarded(session: Session, /, *args: P.args, **options: P.kwargs) -> R:
        with session._held():
            return method(session, *args, **options)

    return guarded


class Session:
    """A loaded program with a state of its own.

    Sessions do not disturb each other, also where they share a program, a file, or XNNPACK's packed weights. One
    session is for one thread at a time: a call from a second one meanwhile is a `SessionBusyError`.

    Args:
        program: A compiled program, or the path of a program file.
        prefix_cache: A file that keeps what comes before the first adapter for every row that was trained on or
            measured, so that later steps on the same rows start from there; for programs compiled with
            `split_prefix=True`.
        prefix_cache_bytes: How large it may become; None for no limit.

    Raises:
        ArtifactError: The file is damaged, or not a program of this compiler.
        InputError: The program has no prefix.
        JournalLockedError: Another session has the prefix cache open.
    """

    ranks = 1  # batches of a step; more in a `DistributedSession`
    noised = False  # its steps tell what they measured

    def __init__(
        self,
        program: Program | str | PathLike[str],
        *,
        prefix_cache: str | PathLike[str] | None = None,
        prefix_cache_bytes: int | None = None,
    ) -> None:
        if not isinstance(program, Program):
            program = load(program)
        self.program = program
        runner = self._runner = program.artifact.runner()
        self._live_state = runner.live_state if isinstance(runner, DeviceRunner) else runner.state  # where it changes
        if program.manifest.state != "shared":  # what is passed in, or looked up in a file, begins with zeros here
            self._runner.state().copy_(program.initial_state())
        self._prefix_cache = None
        if prefix_cache is None and prefix_cache_bytes is not None:
            raise InputError("prefix_cache_bytes is given, and prefix_cache is not", hint="name the file")
        if prefix_cache is not None:
            self._prefix_cache = PrefixCache(prefix_cache, program, prefix_cache_bytes)
        self._sizes = {size.name: size for size in program.manifest.sizes}
        self._lock = threading.RLock()
        self._base: tuple[float, ...] | None = None  # the answer of the model without an adapter to `probe_inputs`
        self._cache_of: object = None  # the generation that the cache of keys and values belongs to

    @functools.cached_property
    def _nesting(self) -> Nesting | None:
        """How outputs nest; late, for the classes of transformers take seconds to import."""
        return _nesting(self.program.manifest.nesting)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise SessionBusyError(
                "another thread is in a call of this session",
                hint="give every thread a session of its own: Session(session.program)",
            )
        try:
            yield
        finally:
            self._lock.release()

    @_by_one_thread
    def train_step(
        self,
        inputs: Inputs,
        labels: Tensor | None = None,
        *,
        seed: int,
        learning_rate: float,
        eps: float | None = None,
    ) -> StepResult:
        """One step: a forward of all perturbed copies, losses, projected gradient and update, in one call.

        A batch may have fewer rows than the program, where the loss has a label that does not count: the missing rows
        are filled with rows that do not.

        Args:
            inputs: As `example_inputs` of `compile`.
            labels: As the loss takes them; for a language model int64, the shape of `input_ids`, -100 does not count.
                They may also lie among the inputs, as "labels".
            seed: 0..2^31-1; the step's noise is a function of it alone.
            learning_rate: Finite in float32; 0 measures and leaves the state as it is.
            eps: Size of the perturbation, above 0 in float32; if None, what suits the program's quantization
                (`manifest.eps`).

        Raises:
            InputError: An input is missing, unknown, or of the wrong shape, dtype or value. Nothing has run then.
            StateError: The update is too large for float32. The state is what it was.
        """
        manifest = self.program.manifest
        size = manifest.eps if eps is None else eps
        scalars = [
            seed_tensor(seed),
            scalar_tensor("learning_rate", learning_rate),
            scalar_tensor("eps", size, above=0),
        ]
        sizes: dict[str, int] = {}
        inputs, labels = labelled(inputs, labels, manifest.inputs)
        values, labels = filled(self._leaves(inputs), labels, manifest.inputs, manifest.labels)
        given, checked = self._checked(values, sizes), self._labels(labels, sizes)
        start = self._prefix(given, checked) if manifest.prefix else given
        loss, lane_losses, projected_gradient, *of_rows = self._update("train_step", [*start, checked, *scalars])
        return StepResult(float(loss), lane_losses, projected_gradient, *of_rows)

    @_by_one_thread
    def row_losses(
        self, inputs: Inputs, labels: Tensor | None = None, instead: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """The loss of every row with the adapter as it is: from what is kept of the rows, where the session keeps it.

        Args:
            inputs: As for `train_step`; a batch may have fewer rows than the program here as well.
            labels: As for `train_step`.
            instead: More labels for the same rows, such as other answers. They count where `labels` do.

        Returns:
            For `labels`, then for each of `instead`: the sum of a row's losses, and their number. Both are
            float32 [1 + instead, rows].

        Raises:
            ConfigError: The program was compiled without `split_prefix`.
            InputError: As for `train_step`, or other labels count elsewhere.
        """
        manifest = self.program.manifest
        if not manifest.prefix:
            raise ConfigError("the program has no prefix that rows start from", hint="compile(..., split_prefix=True)")
        sizes: dict[str, int] = {}
        inputs, labels = labelled(inputs, labels, manifest.inputs)
        leaves = self._leaves(inputs)
        values, first = filled(leaves, labels, manifest.inputs, manifest.labels)
        given, first = self._checked(values, sizes), self._labels(first, sizes)
        others = [filled(leaves, other, manifest.inputs, manifest.labels)[1] for other in instead]
        others, ignored = [self._labels(other, sizes) for other in others], manifest.labels.also
        if ignored is not None and any(not torch.equal(other == ignored, first == ignored) for other in others):
            raise InputError("labels in `instead` do not count where `labels` do")
        start = [value.clone() for value in self._prefix(given, first)]
        found = []
        for each in (first, *others):
            loss, weight = self._runner.call("row_losses", [*start, each])
            found.append(torch.stack((loss, weight))[:, : len(labels)])
        loss, weight = torch.stack(found, dim=1)
        return loss, weight

    @_by_one_thread
    def evaluate(self, inputs: Inputs) -> Any:
        """What the model returns for these inputs, with the adapter on and nothing perturbed.

        Args:
            inputs: As `example_inputs` of `compile`; labels among them are left out.
        """
        given = self._checked(self._leaves(without_labels(inputs, self.program.manifest.inputs)), {})
        outputs = self._runner.call("evaluate", given)
        if self._nesting is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return self._nesting.unflatten(outputs)

    def generate(
        self,
        tokens: Sequence[int] | Tensor,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Generator[int, None, Ending]:
        """Go on with a prompt: token ids, one after the other, with the adapter as it is when each is computed.

        It is a generator, so that it can be left at any token; the next prompt begins with an empty cache. Its result
        (`reason = yield from session.generate(...)`) is "end" at a stop token, which is not handed out, "limit" after
        `max_new_tokens`, or "length" where the cache is full.

        Args:
            tokens: Token ids of the prompt, [T] or [1, T], with what the model wants before a text.
            max_new_tokens: Most tokens to add.
            temperature: 0 takes the most likely token; else one is drawn from the logits divided by it.
            top_p: Draw among the most likely tokens that have this share of the probability together.
            top_k: Draw among so many of the most likely tokens; 0 for all.
            seed: 0..2^31-1; the same seed draws the same tokens.
            stop_ids: Tokens that end the text; if None, those of the program (`manifest.generate.stop_ids`).

        Raises:
            ConfigError: The program was compiled without `generate`.
            InputError: The prompt is too long or no token ids, or a number is out of range. Nothing has run then.
            SessionBusyError: Another prompt was begun meanwhile, and has the cache.
        """
        generation = self.program.manifest.generate
        if generation is None:
            raise ConfigError(
                "the program has no method that generates with a cache of keys and values",
                hint="compile(..., generate=GenerateConfig())",
            )
        prompt = prompt_of(tokens, generation)
        sampling = Sampling(temperature, top_k, top_p, seed)
        most = whole("max_new_tokens", max_new_tokens, 1)
        stops = frozenset(
            whole("stop_ids", stop, 0) for stop in (generation.stop_ids if stop_ids is None else stop_ids)
        )
        mine = self._cache_of = object()

        def forward(ids: Tensor, positions: Tensor) -> Tensor:
            with self._held():
                if self._cache_of is not mine:
                    raise SessionBusyError(
                        "another prompt was begun, and has the cache of keys and values",
                        hint="take one prompt after the other, or a second Session(session.program)",
                    )
                (logits,) = self._runner.call("forward", [ids, positions])
                return logits

        return continued(forward, prompt, generation.context, most, sampling, stops)

    @_by_one_thread
    def replay(self, seed: int, projected_gradient: Tensor | Sequence[float], learning_rate: float) -> None:
        """Repeat the update of a step from its seed and projected gradient, without a forward pass.

        Args:
            seed: Seed of the step.
            projected_gradient: float32 [q], finite. It may come from a step, or from rewards that a host computed.
            learning_rate: Finite in float32.

        Raises:
            InputError: A number is out of range.
            StateError: The update is too large for float32. The state is what it was.
            ConfigError: The program's steps have the gradient itself, which no list of scalars holds.
        """
        self._replays("replayed")
        gradient = torch.as_tensor(projected_gradient, dtype=torch.float32).contiguous()
        queries = self.program.manifest.zo.queries
        if tuple(gradient.shape) != (queries,) or not bool(gradient.isfinite().all()):
            raise InputError(f"projected_gradient must be {queries} finite numbers, not {gradient.tolist()}")
        self._update("replay", [seed_tensor(seed), gradient, scalar_tensor("learning_rate", learning_rate)])

    finetune = _by_one_thread(runs.finetune)
    finetune_privately = _by_one_thread(finetune_privately)
    restore = _by_one_thread(runs.restore)

    @_by_one_thread
    def merge(self, journals: Sequence[str | PathLike[str]], weight: float | None = None) -> int:
        """Add the steps that several devices made from the state that this session has now (federated ZO).

        Args:
            journals: Files of programs with the same model, sites, A and noise; backends may differ. Each counts once.
            weight: Factor of every learning rate; if None, 1 / number of journals, which averages the devices.

        Returns:
            The number of steps replayed.

        Raises:
            JournalError: A journal is damaged or of another program.
            InputError: Two journals hold the same steps, or a learning rate times the weight is no number of float32.
            StateError: A sum of steps is not finite.
            ConfigError: The update rule remembers its steps, so that steps of others cannot be put between them; or
                steps have the gradient itself, and cannot be replayed.

        After an error the state is what it was.
        """
        paths = [journals] if isinstance(journals, (str, PathLike)) else list(journals)
        if not paths:
            raise InputError("journals is empty")
        self._replays("merged")
        if self.program.manifest.memory:
            raise ConfigError(
                f"steps of several devices cannot be merged under the rule {self.program.manifest.rule['name']!r}, "
                "which remembers its own steps",
                hint='compile with rule="sgd"',
            )
        factor = 1 / len(paths) if weight is None else float32("weight", weight)
        found = [read_journal(path, self.program) for path in paths]
        for position, records in enumerate(found):
            if records and (first := found.index(records)) < position:
                raise InputError(
                    f"journals {paths[first]} and {paths[position]} hold the same steps",
                    hint="give each once; devices need distinct seeds",
                )
        steps = [step for records in found for step in replayed(records)]
        with runs.all_or_none(self):
            for seed, gradient, learning_rate in steps:
                self.replay(seed, gradient, learning_rate * factor)
        return len(steps)

    @contextlib.contextmanager
    def lane(self, index: int, *, seed: int, eps: float) -> Iterator[None]:
        """Within the block, `evaluate` runs with the B of one lane of a step; afterwards the state is what it was.

        For rewards that no graph can express: run the model in each lane as often as it takes (to generate text, say),
        score what came out, and hand the differences to `replay`. For the two-sided estimator, lanes 0..q-1 have
        B + eps z and lanes q..2q-1 B - eps z; for the one-sided one, lane 0 has B and lanes 1..q B + eps z.

        Args:
            index: 0..lanes-1.
            seed: Seed of the step.
            eps: Size of the perturbation, above 0.

        Raises:
            InputError: There is no such lane, or a number is out of range.
            ConfigError: The program's estimator is not installed here, so that nobody knows its lanes.
        """
        zo = self.program.manifest.zo
        index, seed = whole("lane", index, 0, zo.lanes - 1), whole("seed", seed, 0, MAX_SEED)
        size = float32("eps", eps, above=0)
        try:
            estimator = get_estimator(zo.estimator)
        except (UnknownExtensionError, ExtensionUnavailableError) as error:
            raise ConfigError(
                f"the lanes of this program are those of an estimator that is not installed here: {error.problem}",
                hint="install its package, or call register_estimator; train_step and replay need neither, and "
                "train_step with learning rate 0 measures the losses of all lanes",
            ) from None
        parameters = self.program.parameters
        with self._held():
            alias = self._runner.state()
            before = alias.clone()
            seed_1 = torch.tensor([seed], dtype=torch.int32)
            step = directions(estimator, self.program.sites, seed_1, zo.queries, zo.noise) * size
            alias[:parameters] = lanes_of(estimator, before[:parameters], step)[index]
            try:
                yield
            finally:
                self._runner.state().copy_(before)

    @_by_one_thread
    def state(self) -> Tensor:
        """A copy of the flat state, float32 [S]: the trained parameters, then what the update rule remembers."""
        return self._runner.state().clone()

    @_by_one_thread
    def load_state(self, flat: Tensor) -> None:
        """Set the flat state from float32 [S], finite."""
        alias = self._runner.state()
        if not isinstance(flat, Tensor) or flat.shape != alias.shape or flat.dtype != torch.float32:
            found = f"{flat.dtype}{list(flat.shape)}" if isinstance(flat, Tensor) else type(flat).__name__
            raise StateError(f"the state is torch.float32{list(alias.shape)}, not {found}")
        if not bool(flat.isfinite().all()):
            raise StateError("the state has values that are not finite")
        alias.copy_(flat)

    def export_ptd(self, path: str | PathLike[str]) -> Path:
        """Write the state as a data file of ExecuTorch, whole or not at all, and return its path.

        The stock runtime starts a program that was compiled with `state="data"` from it:
        `Runtime.get().load_program(program, data_path=path)`, in C++ `Module(program, path)`.
        """
        from mobizo_compiler.format import data_file  # it imports ExecuTorch, which other sessions need not have

        target = Path(path)
        with self._held():
            packed = data_file.packed(self.state(), fingerprint(self.program), self.probe())
        with whole_file(target) as file:
            file.write(packed)
        return target

    def import_ptd(self, path: str | PathLike[str], *, verify: bool = True) -> None:
        """Set the state from a data file, of any backend's program of the same model, sites, A and noise.

        Args:
            path: What `export_ptd` wrote.
            verify: False for a file without our checksum and fingerprint, as ExecuTorch's `save_ptd` writes it in C++.

        Raises:
            ArtifactError: The file is damaged, or has no state, or that of another program, or does not say of which.
            StateError: The state has another length, or values that are not finite.
            AdapterError: The adapter does not do here what it did where the file was written (`Session.probe`).
                After any of these, the state is what it was.
        """
        from mobizo_compiler.format import data_file

        self._load_adapter(*data_file.read(Path(path), fingerprint(self.program), verify), str(path))

    @_by_one_thread
    def lora_b(self, fqn: str) -> Tensor:
        """A copy of B of one site, float32 [r, out_features]."""
        return self.program.site(fqn).lora_b(self._runner.state()).clone()

    @_by_one_thread
    def lora_a(self, fqn: str) -> Tensor:
        """A copy of A of one site, float32 [r, in_features], as it is now."""
        site = self.program.site(fqn)
        return lora_a(self.program, site, self._runner.state()).clone(memory_format=torch.contiguous_format)

    def export_adapter(self, folder: str | PathLike[str], base_model: str | None = None) -> Path:
        """Write the adapter in peft's format and return the folder; `PeftModel.from_pretrained` loads it.

        Args:
            folder: Gets `adapter_model.safetensors` and `adapter_config.json`.
            base_model: Name or path of the model, for those who load the adapter.

        Raises:
            AdapterError: The model is a single layer without a name.
        """
        with self._held():
            state, probe = self.state(), self.probe()
        write_peft(self.program, state, Path(folder), base_model, probe)
        return Path(folder)

    def import_adapter(self, folder: str | PathLike[str]) -> None:
        """Set the state from an adapter in peft's format whose A the program has.

        That is one which `export_adapter` wrote, or the one given to `compile(..., adapter=folder)`.

        Raises:
            AdapterError: The files are damaged, or layers, rank, scaling or A differ, or the adapter was trained on
                another model, or it does not do here what it did where it was exported (`Session.probe`). The state
                is what it was.
        """
        adapter = read_peft(Path(folder))
        self._load_adapter(state_of(self.program, adapter, str(folder)), adapter.probe, str(folder))

    @_by_one_thread
    def _load_adapter(self, state: Tensor, probe: Probe | None, where: str) -> None:
        """Set the state, if the adapter does here what it did where it was exported."""
        with runs.all_or_none(self):
            self.load_state(state)
            if probe is not None:
                probe.check(self.probe(), where)

    @_by_one_thread
    def probe(self) -> Probe:
        """Whether the adapter is active: the model's answer to a fixed input, with it and without it."""
        inputs, alias = probe_inputs(self.program.manifest), self._runner.state()
        adapted = answer_of(self._runner.call("evaluate", inputs))
        if self._base is None:  # one answer for all adapters
            before = alias.clone()
            for site in self.program.sites:
                alias[site.offset : site.offset + site.size].zero_()
            try:
                self._base = answer_of(self._runner.call("evaluate", inputs))
            finally:
                self._runner.state().copy_(before)
        return Probe(self._base, adapted, asked_of(self.program.manifest.inputs, inputs))

    def merge_into(self, model: nn.Module) -> None:
        """Add the adapter to the weights of the model that was compiled, in place: W + scaling * B^T A.

        Raises:
            AdapterError: The model is another one, or its weights are quantized; then nothing was changed.
        """
        merge_into(self.program, self.state(), model)

    @property
    def keeps_prefix(self) -> bool:
        """Whether what comes before the first adapter is kept for every row: then `row_losses` costs the rest alone."""
        return self._prefix_cache is not None

    def close(self) -> None:
        """Close the prefix cache, so that another session can open it; the session works on without it."""
        if self._prefix_cache is not None:
            self._prefix_cache.close()
            self._prefix_cache = None

    def _replays(self, what: str) -> None:
        if self.program.manifest.zo.differentiates:
            raise ConfigError(
                f"steps of the {self.program.manifest.zo.estimator} estimator cannot be {what}: "
                "a step is a gradient, not a few scalars",
                hint='exchange states or adapters (state, export_adapter), or compile with estimator="two-sided"',
            )

    def _update(self, method: str, arguments: list[Tensor]) -> list[Tensor]:
        """Call a method that changes the state, and keep no state that is not finite: nothing leads back from one."""
        before = self._live_state().clone()
        results = self._runner.call(method, arguments)
        if not bool(self._live_state().isfinite().all()):
            self._runner.state().copy_(before)
            raise StateError("the update is too large for float32", hint="give a lower learning rate")
        return results

    def _leaves(self, inputs: Inputs) -> list[Any]:
        """The inputs in flat order, as many as the program takes."""
        manifest = self.program.manifest
        specs = manifest.inputs
        if isinstance(inputs, Mapping):
            return _by_name(inputs, specs, manifest.fixed)
        if manifest.keywords:
            names = [spec.name for spec in specs]
            raise InputError(f"inputs must be a dict with the keys {names}, not a {type(inputs).__name__}")
        leaves = flat_names((inputs,) if isinstance(inputs, Tensor) else tuple(inputs))
        values = [value for name, value in leaves if not _is_fixed(name, value, manifest.fixed)]
        if len(values) != len(specs):
            raise InputError(f"the model takes {len(specs)} inputs, {len(values)} were given")
        return values

    def _checked(self, values: Sequence[Any], sizes: dict[str, int]) -> list[Tensor]:
        """The inputs as tensors that methods take; the dynamic sizes of this call go to `sizes`."""
        specs = self.program.manifest.inputs
        return [spec.check(value, self._sizes, sizes) for spec, value in zip(specs, values, strict=True)]

    def _prefix(self, inputs: list[Tensor], labels: Tensor) -> list[Tensor]:
        """What a step starts from: the values before the first adapter."""
        arguments = [*inputs, labels]

        def compute() -> list[Tensor]:
            return self._runner.call("prefix", arguments)

        if self._prefix_cache is None:
            return compute()
        return self._prefix_cache.values(
            arguments, [value.shape[:1] == labels.shape[:1] for value in arguments], compute
        )

    def _labels(self, labels: Tensor, sizes: dict[str, int]) -> Tensor:
        manifest = self.program.manifest
        checked = manifest.labels.check(labels, self._sizes, sizes)
        ignored = manifest.labels.also
        if ignored is None:
            return checked
        counts = (checked.reshape(checked.shape[0], -1)[:, manifest.first_label :] != ignored).sum(dim=1)
        if not bool(counts.any()):
            raise LabelError(
                f"nothing is labelled: all labels that count are {ignored}",
                hint="set labels to what the model should predict"
                + ("; the first token of a row never counts" if manifest.first_label else ""),
            )
        most = manifest.max_labels
        if most is not None and int(counts.max()) > most:
            row = int(counts.argmax())
            raise LabelError(
                f"row {row} has {int(counts[row])} labelled tokens; the loss was compiled for at most {most} in a row",
                hint="compile with a larger CausalLMLoss(max_labels=...)",
            )
        return checked


def _by_name(inputs: Mapping[str, Any], specs: Sequence[TensorSpec], fixed: Mapping[str, str]) -> list[Any]:
    names = [spec.name for spec in specs]
    given: dict[str, Any] = {name: value for name, value in inputs.items() if name in names}
    nested = {name: value for name, value in inputs.items() if name not in names}
    given |= {name: value for name, value in flat_names(nested) if not _is_fixed(name, value, fixed)}
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        problem = f"input {missing[0]!r} is missing" if missing else f"there is no input {unknown[0]!r}"
        raise InputError(f"{problem}; the program takes {names}")
    return [given[name] for name in names]


def _is_fixed(name: str, value: object, fixed: Mapping[str, str]) -> bool:
    """Whether this is an input that the capture fixed; then it may be left out, but not differ."""
    if name not in fixed or isinstance(value, Tensor):
        return False
    if repr(value) != fixed[name]:
        raise InputError(
            f"input {name!r} is {value!r}; the program was compiled with {fixed[name]}",
            hint="values that are no tensors are fixed when compiling",
        )
    return True


def _nesting(text: str | None) -> Nesting | None:
    """The nesting of the outputs; None (a tensor or a tuple) where its classes cannot be had on this machine."""
    if text is None:
        return None
    try:
        return nesting_from_json(text)
    except NotImplementedError:
        pass
    try:
        import transformers.modeling_outputs  # noqa: F401  (its output classes register themselves)

        return nesting_from_json(text)
    except (ImportError, NotImplementedError):
        return None
