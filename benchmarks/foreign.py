"""The training step as two other compilers make it: ExecuTorch's joint graph, and onnxsim's step graph for onnxruntime.

    python -m benchmarks.foreign {joint,onnx} --adapters FILE --out FOLDER [--rewritten] [options of a workload]

Shape suffixes: N rows, T tokens, F features, R rank, O out features, V vocabulary, H head features.

joint   `torch.export.experimental._export_forward_backward`, lowered to portable kernels. Gradients come out, and
        `executorch.extension.training` has the optimizer.
onnx    `onnxsim.compile_torch_training_loop`: forward, backward and update are one graph. `pip install onnxsim==0.8.1
        onnxruntime onnxscript`; they are no dependency of this project.

Neither takes the model as it is, so `--rewritten` is the same model with what they refuse written in another way:

joint   attention as products (`attn_implementation="eager"`), SiLU as x * sigmoid(x)
onnx    the same attention and SiLU; norms and the loss without powers, means and a logarithm of softmax; angles of the
        positions and the causal mask as numbers that are there already; token ids in one dimension; constants folded by
        `onnxsim.simplify`, and what is left of them stored

Adapters are B of LoRA with the A of our programs, which is frozen; the update is plain SGD. Each is made in a
process of its own, because compilers take more memory than what they make.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.machine import PhaseTimer, memory_mb
from benchmarks.workload import Workload
from examples.record import write_json

Compiler = Literal["joint", "onnx"]
FILES: dict[Compiler, str] = {"joint": "step.pte", "onnx": "step.onnx"}
MASKED = -1e30


class Adapted(nn.Module):
    """A linear layer with a branch of low rank, of which B is trained."""

    a_RF: Tensor

    def __init__(self, base: nn.Module, a_RF: Tensor, out_features: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.register_buffer("a_RF", a_RF)
        self.b_OR = nn.Parameter(torch.zeros(out_features, len(a_RF)))

    def forward(self, x_NTF: Tensor) -> Tensor:
        """float32 [N, T, O]."""
        y_NTO: Tensor = self.base(x_NTF) + self.scaling * F.linear(F.linear(x_NTF, self.a_RF), self.b_OR)
        return y_NTO


class Loss(nn.Module):
    """The mean loss at the labelled position, from token ids, a mask and labels [N]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """A number."""
        return F.cross_entropy(self.logits_NV(input_ids, attention_mask), labels)

    def logits_NV(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the labelled position, which is the last but one."""
        logits: Tensor = self.model(input_ids, attention_mask, use_cache=False, logits_to_keep=2).logits
        return logits[:, 0]


class WrittenOutLoss(Loss):
    """The same in operators that onnxsim has gradients for; labels are float32 [N, V], a one for each."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """A number."""
        logits_NV = self.logits_NV(input_ids, attention_mask)
        losses_N = torch.log(torch.exp(logits_NV).sum(-1)) - (logits_NV * labels).sum(-1)
        return losses_N.sum() / len(losses_N)


class Product(nn.Module):
    """SiLU, whose own backward pass makes a tensor that the runtime has no kernel for."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return x * torch.sigmoid(x)


class Norm(nn.Module):
    """RMSNorm without a power and a mean."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.eps: Any = norm.variance_epsilon

    def forward(self, x_NTF: Tensor) -> Tensor:
        """float32 [N, T, F]."""
        y_NTF: Tensor = self.weight * (x_NTF / torch.sqrt((x_NTF * x_NTF).sum(-1, True) / x_NTF.shape[-1] + self.eps))
        return y_NTF


class Angles(nn.Module):
    """Rotary embeddings of the first positions, as numbers."""

    def __init__(self, rotary: nn.Module, tokens: int) -> None:
        super().__init__()
        cos_1TH, sin_1TH = rotary(torch.zeros(1), torch.arange(tokens)[None])
        self.register_buffer("cos_1TH", cos_1TH)
        self.register_buffer("sin_1TH", sin_1TH)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> tuple[Any, Any]:
        """Cosines and sines, float32 [1, T, H]."""
        return self.cos_1TH, self.sin_1TH


class FlatEmbedding(nn.Module):
    """An embedding that looks up ids in one dimension."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.weight: Any = embedding.weight

    def forward(self, ids_NT: Tensor) -> Tensor:
        """float32 [N, T, F]."""
        return F.embedding(ids_NT.reshape(-1), self.weight).reshape(*ids_NT.shape, -1)


def loss_module(
    workload: Workload, compiler: Compiler, rewritten: bool, lora_a: Mapping[str, Tensor]
) -> tuple[Loss, tuple[Tensor, ...]]:
    """The model with its adapters and its loss, and what it is called with."""
    model = workload.load_model()
    modules = dict(model.named_modules())
    if rewritten:
        model.set_attn_implementation("eager")
        for module in modules.values():
            if hasattr(module, "act_fn"):
                module.act_fn = Product()
    if rewritten and compiler == "onnx":
        for name, module in modules.items():
            if hasattr(module, "variance_epsilon"):
                replace(modules, name, Norm(module))
        model.model.rotary_emb = Angles(model.model.rotary_emb, workload.tokens)
        model.model.embed_tokens = FlatEmbedding(model.model.embed_tokens)
    for name in workload.adapted(model):
        base = modules[name]
        assert isinstance(base, nn.Linear)
        replace(modules, name, Adapted(base, lora_a[name], base.out_features, 16 / workload.rank))
    inputs, labels = workload.batch()
    ids, mask, targets = inputs["input_ids"], inputs["attention_mask"], labels[:, -1].contiguous()
    if not (rewritten and compiler == "onnx"):
        return Loss(model).eval(), (ids, mask, targets)
    mask = torch.full((workload.tokens, workload.tokens), MASKED).triu(1)[None, None]
    return WrittenOutLoss(model).eval(), (ids, mask, F.one_hot(targets, model.config.vocab_size).float())


def replace(modules: Mapping[str, nn.Module], name: str, by: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(modules[parent], last, by)


def make_joint(module: Loss, arguments: tuple[Tensor, ...], path: Path, timer: PhaseTimer) -> None:
    """Loss, gradients and the live parameters as outputs of one ExecuTorch method."""
    from executorch.exir import to_edge
    from torch.export.experimental import _export_forward_backward

    timer("capture")
    exported = torch.export.export(module, arguments)
    timer("differentiate")
    joint = _export_forward_backward(exported)
    timer("lower")
    executable = to_edge(joint).to_executorch()
    with path.open("wb") as file:
        executable.write_to_file(file)


def make_onnx(module: Loss, arguments: tuple[Tensor, ...], path: Path, timer: PhaseTimer, rewritten: bool) -> None:
    """The step as one ONNX graph, and beside it what it is called with: the batch, and B."""
    import numpy as np
    import onnx
    import onnxsim
    from onnxsim import torch_training

    def sgd(parameter: Tensor, gradient: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
        return (parameter - rate * gradient,)

    timer("capture")
    optimizer = torch_training.trace_torch_optimizer(sgd, num_state=0)
    trained = [name for name, _ in module.named_parameters() if name.endswith("b_OR")]
    if rewritten:
        exported = torch_training.export_torch_module_to_onnx(module, arguments)
        timer("simplify")
        exported, _ = onnxsim.simplify(
            exported, initializers_as_constants=False, skipped_optimizers=["eliminate_duplicate_initializer"]
        )
        store_constants(exported.graph)
        loop = onnxsim.compile_training_loop(exported, "loss", trained, optimizer=optimizer)
    else:
        loop = onnxsim.compile_torch_training_loop(module, arguments, params=trained, optimizer=optimizer)
    timer("differentiate")
    step = loop.step_graph
    state = loop.initial_state
    stored = {value.name for value in loop.model.graph.initializer}
    names = [value.name for value in loop.model.graph.input if value.name not in stored]
    onnx.save(step.model, path)
    batch = dict(zip(names, (value.numpy() for value in arguments), strict=True))
    np.savez(path.with_suffix(".npz"), **batch, **state)
    write_json(path.with_suffix(".names.json"), {"state": step.state, "loss": step.loss_name})


def store_constants(graph: Any) -> None:
    """Turn nodes that are constants into stored values: onnxsim has no gradient for such a node."""
    import onnx

    for node in [node for node in graph.node if node.op_type == "Constant"]:
        value = onnx.TensorProto()
        value.CopyFrom(node.attribute[0].t)
        value.name = node.output[0]
        graph.initializer.append(value)
        graph.node.remove(node)


def main() -> None:
    """Make one file, and last its record; or a record of the error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiler", choices=get_args(Compiler))
    parser.add_argument("--adapters", type=Path, required=True, help="A of every layer, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--rewritten", action="store_true")
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / FILES[options.compiler]
    record: dict[str, Any] = {}
    timer = PhaseTimer("load")
    try:
        with timer:
            lora_a = load_file(options.adapters)
            module, arguments = loss_module(workload, options.compiler, options.rewritten, lora_a)
            if options.compiler == "joint":
                make_joint(module, arguments, path, timer)
            else:
                make_onnx(module, arguments, path, timer, options.rewritten)
        record["file_mb"] = round(path.stat().st_size / 1e6, 2)
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {str(error).strip()}"
    record |= {"seconds": timer.seconds, "peak_mb": memory_mb()["VmHWM"]}
    write_json(options.out / "record.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
