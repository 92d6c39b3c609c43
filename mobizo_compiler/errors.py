"""Every error a user can meet, one class per mistake.

A message starts with a stable code, then the problem, then where it is, then what to try. All classes derive from
`MobizoError`; those about bad arguments are also `ValueError`, so that callers who know nothing of this package can
still catch them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar


class MobizoError(Exception):
    """Base of all errors of this package.

    Args:
        problem: What is wrong, in one sentence.
        where: The graph node, source line or file it concerns, if any.
        hint: What the user can do about it.
    """

    code: ClassVar[str] = "MBZ000"

    def __init__(self, problem: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.problem, self.where, self.hint = problem, where, hint
        lines = [f"[{self.code}] {problem}"]
        if where:
            lines.append(f"  at: {where}")
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes whole: by what it was made of, where the default is to make it again of its message."""
        return partial(type(self), self.problem, where=self.where, hint=self.hint), (), self.__dict__


class ConfigError(MobizoError, ValueError):
    """A configuration value is out of range or of the wrong type.

    The message names the field, its value and what it may be. Nothing was compiled: correct the argument.
    """

    code = "MBZ101"


class NotSupportedYetError(MobizoError, NotImplementedError):
    """A documented option that this version cannot honour.

    The message names the option and the nearest one that works. Nothing was written.
    """

    code = "MBZ102"


class UnknownBackendError(MobizoError, ValueError):
    """No backend is registered under the given name, or two claim the same one.

    The message lists the installed names. Correct the name, install the package that brings the backend, or, where
    two packages claim one name, uninstall one of them. `mobizo backends` shows where each comes from.
    """

    code = "MBZ103"


class BackendUnavailableError(MobizoError, RuntimeError):
    """The backend is known but cannot be used: a package or runtime library is missing, or its plugin is broken.

    Install what the message says is missing, or compile on a machine that has it. `mobizo backends` says for each
    backend whether it can be used here.
    """

    code = "MBZ104"


class QuantizationError(MobizoError, ValueError):
    """A weight cannot be quantized by the recipe, or there is nothing to quantize.

    The message names the layer. Choose another group size, another recipe, or leave the layer as it is with
    `QuantizationConfig(recipe, skip=(layer,))`.
    """

    code = "MBZ105"


class UnknownExtensionError(ConfigError):
    """No estimator, update rule, loss or axis rule has the given name, or two packages claim the same one.

    The message lists the installed names. Correct the name, install the package that brings it, or, where two packages
    claim one name, uninstall one of them. `mobizo extensions` shows where each comes from.
    """

    code = "MBZ106"


class ExtensionUnavailableError(MobizoError, RuntimeError):
    """An estimator, update rule, loss or axis rule is installed but cannot be loaded: its package is broken.

    The message names the package's object and what is wrong. Reinstall the package, or report it to its authors, who
    can check it with `mobizo_compiler.testing`. `mobizo extensions` shows what can be loaded.
    """

    code = "MBZ107"


class ExampleInputError(MobizoError, ValueError):
    """`example_inputs` do not have the form that `compile` takes.

    Pass a tuple of tensors, or a dict for keyword arguments, whose first axis is the rows; `row_axes` says which
    inputs have their rows elsewhere or have none, and `dynamic_shapes` which sizes may change.
    """

    code = "MBZ201"


class CaptureError(MobizoError):
    """The model cannot be captured, with a symbolic number of rows or with a cache of keys and values.

    `torch.export` could not trace the model, and its own message is part of this one. Check that the model is in
    eval mode and runs on the example inputs; then take out of it what depends on the values of tensors (`if x.sum()
    > 0`, `.item()`, loops over data). Mixtures of experts have a switch for that, see the sharp edges.
    `generate` is for decoders of transformers, whose caches are the ones that can be captured.
    """

    code = "MBZ202"


class NoMatchingTargetError(MobizoError, ValueError):
    """No linear layer matches `target_modules` and `layers_to_transform`.

    The message lists the names that there are. `target_modules=None` chooses by itself, `"all-linear"` takes every
    layer but the output layer.
    """

    code = "MBZ203"


class UnsupportedGraphError(MobizoError):
    """A node of the captured graph cannot be transformed correctly.

    The message names the node and your source line. Typical causes: a graph that was exported in half
    precision (pass the module), a model that changes its buffers, an adapted layer that also works on a value without
    rows. Change the model, or leave the layer out of `target_modules`.
    """

    code = "MBZ204"


class LossError(MobizoError):
    """The loss does not fit what the model returns.

    Take the loss that fits the outputs, return the outputs in the form that the message asks for, or pass a
    function of outputs and labels to one loss per row, with `example_labels`.
    """

    code = "MBZ205"


class RowMixingError(UnsupportedGraphError):
    """An operation lets one row of the batch see another, so that lanes would not be independent.

    The message names the operation and your source line. Compute it per row, put batch statistics into eval mode,
    or leave its result out of the loss. For a loss: `reduction="none"`, then the mean over all axes but the rows.
    """

    code = "MBZ206"


class NoAxisRuleError(UnsupportedGraphError):
    """No rule says how rows go through an operator; see `mobizo_compiler.analysis.axes.axis_rule`.

    Write the model without the operator, or register a rule for it, or install a package that has one; the sharp edges
    have an example.
    """

    code = "MBZ207"


class FixedRowsError(UnsupportedGraphError):
    """A graph that was captured with a fixed number of rows cannot be proved right for another number.

    Only programs that were exported with fixed sizes, or models whose code fixes the batch, can meet this. Export
    with `dynamic_shapes={...: {0: torch.export.Dim("rows", min=2)}}`, or pass the module instead of the exported
    program.
    """

    code = "MBZ208"


class PassOrderError(MobizoError):
    """A list of passes asks for facts that nothing before it provides.

    For authors of passes and backends: the message names every need that is not met, and the pass that would meet
    it.
    """

    code = "MBZ301"


class PassContractError(MobizoError):
    """A pass broke the contract that it declares.

    For authors of passes and backends: the message names the pass and the fact that does not hold. If it names a
    pass of this package, that is a mistake of ours: report it with the program text (`MOBIZO_DUMP=folder`).
    """

    code = "MBZ302"


class ProgramTextError(MobizoError, ValueError):
    """A text is not a program, or not the one that it says it is.

    For authors of passes, who write programs as text in their tests: the message has the line with its number. What a
    line may be is written in `mobizo_compiler/graph/parser.py`; the surest way is to start from a text that
    `program_text` printed.
    """

    code = "MBZ303"


class ContractError(MobizoError, AssertionError):
    """An extension does not keep the contract of its kind, or a program computes other numbers than plain PyTorch.

    For authors of backends and other extensions: the suites of `mobizo_compiler.testing` raise it. The message names
    the extension, what it must do, and the numbers, where it is about numbers.
    """

    code = "MBZ304"


class BackendRefusedError(MobizoError):
    """The backend cannot run this program; the message lists each reason.

    Nothing was lowered. Follow the reasons (another quantization, fixed sizes), or take another backend: `portable`
    refuses nothing.
    """

    code = "MBZ401"


class LoweringError(MobizoError):
    """The lowered program is not the program that was asked for (state lost, or numbers that differ).

    The compiler compares a step, a replay and evaluations with the model that it was given, and refuses a
    program that computes something else. It names the method and the numbers. Try `backend="portable"`: if that
    works, the engine under the other backend is at fault. Report it either way.
    """

    code = "MBZ402"


class ArtifactError(MobizoError):
    """A file is truncated, damaged, or not one of this compiler.

    Copy the file again, or compile again. A file of another format version asks for the version that made it.
    """

    code = "MBZ501"


class VerificationError(MobizoError):
    """A program computes other numbers on this machine than where its bundle was made.

    Copy the program again. If that does not help, the processor, the emulator or the runtime here is at fault: the
    message names the value, how far it is off and how far it may be. Do not train there, and report it.
    """

    code = "MBZ502"


class InputError(MobizoError, ValueError):
    """A call of a session got an input of the wrong name, shape, dtype or value.

    Nothing has run. Shapes are those of `example_inputs`: pad to them, or compile with `dynamic_shapes`.
    """

    code = "MBZ601"


class TokenRangeError(InputError):
    """A token id or label lies outside the vocabulary.

    Nothing has run; kernels do not check, and would read beyond the table. The tokenizer is that of another model,
    or padding is marked with an id that is not in the vocabulary.
    """

    code = "MBZ602"


class LabelError(InputError):
    """Labels that no loss can be computed from.

    Nothing has run. Label at least one token that counts (the first of a row never does where the loss shifts by
    one), and no more of a row than `max_labels`.
    """

    code = "MBZ603"


class StateError(MobizoError, ValueError):
    """A state of the wrong length, or one with values that are not finite, given or made by an update.

    The state is as it was. Load a state of the same program; `Session.state` gives one. Give a lower learning rate.
    """

    code = "MBZ604"


class SessionBusyError(MobizoError, RuntimeError):
    """Two threads use one session at once, or a second prompt was begun before the first one ended.

    Give every thread a session of its own; sessions of one program do not disturb each other. A session has one cache
    of keys and values, which belongs to the prompt that was begun last.
    """

    code = "MBZ605"


class DistributedError(MobizoError, RuntimeError):
    """A rank of a distributed run failed, is gone, or is not in the same step with the same state as the others.

    Start all ranks again; a run with a folder goes on from its journal, with as many ranks as there are then.
    """

    code = "MBZ606"


class JournalError(MobizoError):
    """A journal or snapshot is damaged, of another program, or could not be written.

    The message says which file and how to go on. A torn last record is cut off by itself and is no error; damage
    before the end is one. Nothing is overwritten: move the folder away to start anew.
    """

    code = "MBZ701"


class JournalLockedError(JournalError):
    """Another session is training with this journal.

    Wait until the other session has ended, or give this one a folder of its own.
    """

    code = "MBZ702"


class RunMismatchError(JournalError, ValueError):
    """The folder holds a run that was begun with other data or other options.

    Give the run a folder of its own, or repeat the command that began it.
    """

    code = "MBZ704"


class AdapterError(MobizoError, ValueError):
    """An adapter file is damaged, or is not one for this program.

    The state is as it was. An adapter fits the program whose A it has: one that `export_adapter` wrote, or the one
    given to `compile(..., adapter=folder)`. DoRA, rank patterns, trained biases and pickled files are refused.
    """

    code = "MBZ703"


class DataError(MobizoError, ValueError):
    """A file of examples is missing, damaged or empty, or a row of it does not suit the program.

    The message names the file and the line. Correct the row, or choose other columns or another template.
    """

    code = "MBZ801"


class MissingPackageError(MobizoError, ImportError):
    """Something optional was asked for, and the package that does it is not installed.

    Install the package that the message names, or leave out what asks for it.
    """

    code = "MBZ802"


class ModelSourceError(MobizoError, ValueError):
    """A model or a tokenizer cannot be loaded by that name or from that folder.

    A folder must be one that `save_pretrained` wrote. A name is looked up on the hub, which needs network access.
    """

    code = "MBZ803"


def raised_errors() -> list[type[MobizoError]]:
    """All error classes of this package, sorted by code; those that other packages derive are theirs.

    >>> raised_errors()[0].__name__
    'ConfigError'
    """
    found: list[type[MobizoError]] = []
    pending = [MobizoError]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if cls.__module__ == __name__:
                found.append(cls)
    return sorted(found, key=lambda cls: cls.code)
