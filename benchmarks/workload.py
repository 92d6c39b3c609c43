"""What the measurements share: a model, a batch, and how it is compiled by us and by stock ExecuTorch.

Terms: q queries, b rows; a training step runs 2q lanes of b rows, 2qb rows in all, each of T tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import PhaseTimer

if TYPE_CHECKING:  # processes whose memory is measured import it only where they need it
    import mobizo_compiler as mobizo

TINYLLAMA = {  # the public configuration of TinyLlama-1.1B
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SMOLLM2 = {  # that of SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA2_7B = {  # that of Llama2-7B
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {"smollm2": SMOLLM2, "tinyllama": TINYLLAMA, "llama2-7b": LLAMA2_7B}
LAYERS = {"smollm2": 30, "tinyllama": 22, "llama2-7b": 32}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained, and how much of it in a step.

    Args:
        model: SmolLM2-135M with its weights, or TinyLlama-1.1B or Llama2-7B with random weights; all in float32.
        layers: Keep the first so many decoder layers only; all if None.
        queries: Number q of directions; 1 for the exact estimator.
        rows: Number b of rows in a batch.
        tokens: Number T of tokens in a row; only the last one is labelled.
        rank: Rank of the adapters.
        targets: Adapters on every linear layer but the head, or on q_proj and v_proj.
        last: Adapters in the last so many layers only; in all if None.
        quantization: Recipe of the frozen base weights; float32 if None.
        seed: Seed of the batch.
        estimator: As `ZOConfig.estimator`; the peers that have lanes are for "two-sided".
        activation_mb: Bound of what an exact gradient keeps, in 10^6 bytes; none if None.
    """

    model: Literal["smollm2", "tinyllama", "llama2-7b"] = "smollm2"
    layers: int | None = None
    queries: int = 4
    rows: int = 4
    tokens: int = 48
    rank: int = 8
    targets: Literal["all-linear", "qv"] = "all-linear"
    last: int | None = None
    quantization: str | None = None
    seed: int = 0
    estimator: str = "two-sided"
    activation_mb: int | None = None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """One option per field."""
        for field in dataclasses.fields(Workload):
            choices = {"model": tuple(LAYERS), "targets": ("all-linear", "qv")}.get(field.name)
            kind = str if choices or field.name in ("quantization", "estimator") else int
            parser.add_argument(f"--{field.name}", type=kind, choices=choices, default=field.default)

    @classmethod
    def from_arguments(cls, options: argparse.Namespace) -> Self:
        """The workload of parsed options."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})

    def to_arguments(self) -> list[str]:
        """The options that make this workload, for another process."""
        return [
            part
            for name, value in dataclasses.asdict(self).items()
            if value is not None
            for part in (f"--{name}", str(value))
        ]

    @property
    def lane_rows(self) -> int:
        """Rows of all lanes, 2qb for the two-sided estimator."""
        return self.zo.lanes * self.rows

    @property
    def zo(self) -> mobizo.ZOConfig:
        """The estimator."""
        import mobizo_compiler as mobizo

        return mobizo.ZOConfig(queries=self.queries, estimator=self.estimator)

    def adapted(self, model: nn.Module) -> list[str]:
        """Paths of the layers that `lora` adapts, for peers that do not ask the compiler."""
        first = 0 if self.last is None else (self.layers or LAYERS[self.model]) - self.last
        names = ("q_proj", "v_proj") if self.targets == "qv" else ("_proj",)  # all of a layer, but not lm_head
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return [n for n in linear if n.endswith(names) and int(n.split("layers.")[1].split(".")[0]) >= first]

    @property
    def lora(self) -> mobizo.LoraConfig:
        """The adapters."""
        import mobizo_compiler as mobizo

        count = self.layers or LAYERS[self.model]
        return mobizo.LoraConfig(
            r=self.rank,
            lora_alpha=16,
            target_modules="all-linear" if self.targets == "all-linear" else ("q_proj", "v_proj"),
            layers_to_transform=None if self.last is None else tuple(range(count - self.last, count)),
        )

    def load_model(self, weights: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        """The model, in eval mode; nothing of it is trained.

        Args:
            weights: False for memory that nobody wrote to in place of large weights; it costs neither time nor space.
            dtype: Of the weights, where they are not loaded.
        """
        if self.model == "smollm2" and weights:
            from transformers import AutoModelForCausalLM

            from examples.smollm2 import cache_folder, load_smollm2

            folder = cache_folder() / "smollm2-135m-instruct"  # not its tokenizer, whose memory would be counted
            if not (folder / "config.json").exists():
                load_smollm2()
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if self.layers is not None:
                model.model.layers = model.model.layers[: self.layers]
                model.config.num_hidden_layers = self.layers
        else:
            from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

            torch.manual_seed(0)
            config = LlamaConfig(**CONFIGURATIONS[self.model], num_hidden_layers=self.layers or LAYERS[self.model])
            with contextlib.nullcontext() if weights else _not_drawn(PreTrainedModel, dtype):
                model = LlamaForCausalLM(config)
            model.tie_weights()
        return (model.float() if weights else model).eval().requires_grad_(False)

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Random tokens: input_ids and attention_mask, int64 [b, T]; labels, int64 [b, T], the last token's only."""
        vocabulary = CONFIGURATIONS[self.model]["vocab_size"]
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, int(vocabulary), (self.rows, self.tokens), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels

    def call_arguments(self, method: str) -> list[Tensor]:
        """What a method of our program, or `forward` of the stock one, is called with."""
        inputs, labels = self.batch()
        rows, seed, rate = list(inputs.values()), torch.tensor([1], dtype=torch.int32), torch.tensor([1e-3])
        return {
            "train_step": [*rows, labels, seed, rate, torch.tensor([1e-2])],
            "evaluate": rows,
            "replay": [seed, torch.ones(self.queries), rate],
            "forward": [value.repeat(self.zo.lanes, 1) for value in rows],
        }[method]

    def compile(self, backend: str = "xnnpack") -> tuple[mobizo.Program, dict[str, float]]:
        """The program that trains itself, and the seconds of every phase."""
        import mobizo_compiler as mobizo

        with PhaseTimer("load") as timer:
            program = mobizo.compile(
                self.load_model(),
                self.batch()[0],
                lora=self.lora,
                zo=self.zo,
                loss=mobizo.CausalLMLoss(max_labels=1),
                quantization=self.quantization,
                backend=backend,
                activation_memory_bytes=None if self.activation_mb is None else self.activation_mb * 1_000_000,
                progress=timer,
            )
        return program, timer.seconds

    def compile_one_position(self) -> tuple[mobizo.Program, dict[str, float]]:
        """A program whose `evaluate` gives the logits of the labelled position only, for a host that does the rest.

        Its adapters are those of `compile`. Its `train_step` is not used, so it has one direction.
        """
        import mobizo_compiler as mobizo

        inputs, labels = self.batch()
        with PhaseTimer("load") as timer:
            program = mobizo.compile(
                LabelledPosition(self.load_model()).eval(),
                inputs,
                lora=self.lora,
                zo=mobizo.ZOConfig(queries=1),
                quantization=self.quantization,
                loss=one_position_loss,
                example_labels=labels[:, -1],
                progress=timer,
            )
        return program, timer.seconds


@contextlib.contextmanager
def _not_drawn(base: Any, dtype: torch.dtype) -> Iterator[None]:
    """Modules made in this block leave their weights as the allocator gave them; norms and frequencies are set."""
    with contextlib.ExitStack() as stack:
        for owner in (nn.Linear, nn.Embedding):
            stack.enter_context(mock.patch.object(owner, "reset_parameters", lambda module: None))
        stack.enter_context(mock.patch.object(base, "init_weights", lambda module: None))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class LabelledPosition(nn.Module):
    """The model, up to the logits that predict the last token of a row: those of position T - 2, [b, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32 [b, V]."""
        logits: Tensor = self.model(input_ids, attention_mask, use_cache=False, logits_to_keep=2).logits
        return logits[:, 0]


class LastPosition(LabelledPosition):
    """The model as upstream exports it for inference: the logits of the last token of a row, [b, 1, V]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32 [b, 1, V]."""
        logits: Tensor = self.model(input_ids, attention_mask, use_cache=False, logits_to_keep=1).logits
        return logits


def one_position_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of every row, [b], from logits [b, V] and labels [b]."""
    return F.cross_entropy(logits, labels, reduction="none")


def stock_inference(model: nn.Module, rows: int, tokens: int, path: Path) -> tuple[dict[str, float], Any]:
    """Lower the model as upstream documents it, static shapes, and write it to `path`.

    Returns:
        Seconds of every phase, and the exported program that was lowered.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    with PhaseTimer("capture") as timer, torch.no_grad():
        exported = torch.export.export(LastPosition(model).eval(), (ids, torch.ones_like(ids)))
        timer("lower")
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        executable = edge.to_executorch()
        with path.open("wb") as file:
            executable.write_to_file(file)
    return timer.seconds, exported
