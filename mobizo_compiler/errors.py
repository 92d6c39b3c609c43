"""Every error a user can meet, one class per mistake.

A message starts with a stable code, then the problem, then where it is, then what to try. All classes derive from
`MobizoError`; those about bad arguments are also `ValueError`, so that callers who know nothing of this package can
still catch them.
"""

from __future__ import annotations

from typing import ClassVar


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


class ConfigError(MobizoError, ValueError):
    """A configuration value is out of range or of the wrong type."""

    code = "MBZ101"


class NotSupportedYetError(MobizoError, NotImplementedError):
    """A documented option that this version cannot honour."""

    code = "MBZ102"


class UnknownBackendError(MobizoError, ValueError):
    """No backend is registered under the given name, or two claim the same one."""

    code = "MBZ103"


class BackendUnavailableError(MobizoError, RuntimeError):
    """The backend is known but cannot be used: a package or runtime library is missing, or its plugin is broken."""

    code = "MBZ104"


class QuantizationError(MobizoError, ValueError):
    """A weight cannot be quantized by the recipe, or there is nothing to quantize."""

    code = "MBZ105"


class ExampleInputError(MobizoError, ValueError):
    """`example_inputs` do not have the form that `compile` takes."""

    code = "MBZ201"


class CaptureError(MobizoError):
    """The model cannot be captured with a symbolic number of rows."""

    code = "MBZ202"


class NoMatchingTargetError(MobizoError, ValueError):
    """No linear layer matches `target_modules` and `layers_to_transform`."""

    code = "MBZ203"


class UnsupportedGraphError(MobizoError):
    """A node of the captured graph cannot be transformed correctly."""

    code = "MBZ204"


class LossError(MobizoError):
    """The loss does not fit what the model returns."""

    code = "MBZ205"


class RowMixingError(UnsupportedGraphError):
    """An operation lets one row of the batch see another, so that lanes would not be independent."""

    code = "MBZ206"


class NoAxisRuleError(UnsupportedGraphError):
    """No rule says how rows go through an operator; see `mobizo_compiler.axes.axis_rule`."""

    code = "MBZ207"


class FixedRowsError(UnsupportedGraphError):
    """A graph that was captured with a fixed number of rows cannot be proved right for another number."""

    code = "MBZ208"


class PassOrderError(MobizoError):
    """A list of passes asks for facts that nothing before it provides."""

    code = "MBZ301"


class PassContractError(MobizoError):
    """A pass broke the contract that it declares."""

    code = "MBZ302"


class BackendRefusedError(MobizoError):
    """The backend cannot run this program; the message lists each reason."""

    code = "MBZ401"


class LoweringError(MobizoError):
    """The lowered program is not the program that was asked for (state lost, or numbers that differ)."""

    code = "MBZ402"


class ArtifactError(MobizoError):
    """A file is truncated, damaged, or not one of this compiler."""

    code = "MBZ501"


class InputError(MobizoError, ValueError):
    """A call of a session got an input of the wrong name, shape, dtype or value."""

    code = "MBZ601"


class TokenRangeError(InputError):
    """A token id or label lies outside the vocabulary."""

    code = "MBZ602"


class LabelError(InputError):
    """Labels that no loss can be computed from."""

    code = "MBZ603"


class StateError(MobizoError, ValueError):
    """A state of the wrong length, or one with values that are not finite."""

    code = "MBZ604"


class SessionBusyError(MobizoError, RuntimeError):
    """Two threads use one session at once."""

    code = "MBZ605"


class JournalError(MobizoError):
    """A journal or snapshot is damaged, of another program, or could not be written."""

    code = "MBZ701"


class JournalLockedError(JournalError):
    """Another session is training with this journal."""

    code = "MBZ702"


class RunMismatchError(JournalError, ValueError):
    """The folder holds a run that was begun with other data or other options."""

    code = "MBZ704"


class AdapterError(MobizoError, ValueError):
    """An adapter file is damaged, or is not one for this program."""

    code = "MBZ703"


class DataError(MobizoError, ValueError):
    """A file of examples is missing, damaged or empty, or a row of it does not suit the program."""

    code = "MBZ801"


class MissingPackageError(MobizoError, ImportError):
    """Something optional was asked for, and the package that does it is not installed."""

    code = "MBZ802"


class ModelSourceError(MobizoError, ValueError):
    """A model or a tokenizer cannot be loaded by that name or from that folder."""

    code = "MBZ803"


def raised_errors() -> list[type[MobizoError]]:
    """All error classes with a code of their own, sorted by code.

    >>> raised_errors()[0].__name__
    'ConfigError'
    """
    found: list[type[MobizoError]] = []
    pending = [MobizoError]
    while pending:
        for cls in pending.pop().__subclasses__():
            found.append(cls)
            pending.append(cls)
    return sorted(found, key=lambda cls: cls.code)
