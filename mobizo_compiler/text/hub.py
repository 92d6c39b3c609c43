"""Models and tokenizers of transformers: from a folder, a GGUF file, or by the name of a hub. All of it is optional."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mobizo_compiler.errors import ModelSourceError
from mobizo_compiler.optional import optional
from mobizo_compiler.quiet import quiet

# Task on the command line, and the class of transformers that loads a model for it.
TASKS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}
_SECONDS = 5  # that a hub has to answer
SEED = 0  # of weights that a folder lacks


def load_model(
    source: str,
    task: str = "causal-lm",
    *,
    trust_remote_code: bool = False,
    init_missing: bool = False,
    classes: Sequence[str] = (),
    on_new: Callable[[Sequence[str]], object] = lambda names: None,
) -> Any:
    """The model as a program can be made of it: in eval mode, without a cache of keys and values, its experts computed
    for each row. Its weights have the precision in which they are stored, and are read when they are needed.

    Args:
        source: A folder, a GGUF checkpoint (`.gguf`; its weights are decoded to float32), or the name of a model on the
            hub, which transformers then downloads.
        task: A key of `TASKS`.
        trust_remote_code: Whether code that lies beside the model may be run.
        init_missing: Whether weights that the folder lacks may be drawn, from a fixed seed. Those of a head that
            classifies may be anyway.
        classes: Names of the classes that a head has; a head for another number of them is drawn anew. Those of the
            folder if empty.
        on_new: Told the names of the weights that were drawn.

    Raises:
        ModelSourceError: There is no such model, or it is not for that task, or weights are missing.
    """
    with quiet():
        transformers = optional("transformers", "loading a model by name")
    place, inside = _located(source, "config.json")
    options: dict[str, Any] = {
        **inside,
        "dtype": torch.float32 if inside else "auto",
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    if classes:
        names = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
        options |= {"num_labels": len(classes), "ignore_mismatched_sizes": True, **names}
    seeded = torch.random.fork_rng(devices=[])
    with _explained(source, "model"), _without_bar(transformers, Path(place).is_dir()), seeded:
        torch.manual_seed(SEED)
        model, found = getattr(transformers, TASKS[task]).from_pretrained(place, **options)
    if missing := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        base = f"{model.base_model_prefix}."
        head = task == "sequence-classification" and not any(name.startswith(base) for name in missing)
        if not head and not init_missing:
            named = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise ModelSourceError(
                f"the weights {named} are not there, and would be random",
                where=source,
                hint="name a folder that has them (a model saved with its head), or --init-missing draws them from a "
                "fixed seed",
            )
        on_new(missing)
    model.config.use_cache = False
    if inside:  # it says that it is quantized, which it is no more
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    if hasattr(model.config, "experts_implementation") or hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError, AttributeError), quiet():
            model.set_experts_implementation("batched_mm")  # the others sort tokens of all rows together
    return model.eval()


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, by the name of the model or from its folder.

    Args:
        source: A folder, a GGUF file, or a name on the hub.
        trust_remote_code: Whether code that lies beside the tokenizer may be run.

    Raises:
        ModelSourceError: There is none.
    """
    with quiet():
        transformers = optional("transformers", "loading a tokenizer")
    place, inside = _located(source, "tokenizer_config.json")
    with _explained(source, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **inside)
    if inside:
        tokenizer.name_or_path = source  # the file, not the folder that it is in
    return tokenizer


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model alone.

    Args:
        source: A folder, a GGUF file, or a name on the hub.
        trust_remote_code: Whether code that lies beside the model may be run.

    Raises:
        ModelSourceError: There is no such model.
    """
    with quiet():
        transformers = optional("transformers", "reading the configuration of a model")
    place, inside = _located(source, "config.json")
    with _explained(source, "configuration"):
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **inside)


@contextlib.contextmanager
def _without_bar(transformers: Any, wanted: bool) -> Iterator[None]:
    """A folder is loaded at once; a bar is for downloads."""
    logs = transformers.utils.logging
    hidden = wanted and logs.is_progress_bar_enabled()
    if hidden:
        logs.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logs.enable_progress_bar()


def _located(source: str, file: str) -> tuple[str, dict[str, str]]:
    """Where transformers looks for a model, and which file there has all of it."""
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        return find_source(source, file), {}
    if not path.is_file():
        raise ModelSourceError("there is no such file", where=source)
    with quiet():
        optional("gguf", "reading a GGUF checkpoint")
    return str(path.parent), {"gguf_file": path.name}


def find_source(source: str, file: str) -> str:
    """A folder as it is, or a name that a hub has; both are found out before anything is loaded.

    Args:
        source: A folder or a name.
        file: What a model of that name has, to look for among what was downloaded before.

    Raises:
        ModelSourceError: There is no such folder, and no hub that has such a name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    parent = path.parent
    folders = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, 1)
    hint = f"did you mean {parent / near[0]}?" if near else None
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source:
        raise ModelSourceError("there is no such folder", where=source, hint=hint)
    with quiet():
        hub = optional("huggingface_hub", "a model by name")
    with contextlib.suppress(ValueError):
        if isinstance(hub.try_to_load_from_cache(source, file), str):
            return source
    try:
        with quiet():
            hub.HfApi().model_info(source, timeout=_SECONDS)
    except Exception as error:  # of httpx, of the hub's client, of the system: all mean that it is not to be had
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "no hub has a model of that name" if status else f"the hub does not answer ({type(error).__name__})"
        raise ModelSourceError(f"there is no such folder, and {why}", where=source, hint=hint) from None
    return source


@contextlib.contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ModelSourceError):
            raise
        problem = " ".join(str(error).split())
        own_code = "trust_remote_code" in problem
        raise ModelSourceError(
            f"the {what} brings code of its own, which is not run unasked"
            if own_code
            else f"transformers cannot load this {what}: {problem}",
            where=source,
            hint="--trust-remote-code runs it; read it first"
            if own_code
            else "name a folder that save_pretrained wrote, a GGUF file, or a model of the hub",
        ) from None
