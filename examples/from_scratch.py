"""The compiler again, small: one file that needs torch and executorch only, to read from top to bottom.

    python -m examples.from_scratch [--steps 300] [--output runs/from_scratch]

It captures a language model, gives its layers low-rank adapters that differ from lane to lane, puts noise, losses and
the update into the same graph, lowers that to one `.pte`, and trains it in the stock ExecuTorch runtime.
`docs/from_scratch.md` walks through it, and says what the real compiler does beyond this.

Shape suffixes: N rows of all lanes, T tokens, D width, V words, G lanes, Q queries, P parameters, R rank.
"""

# -- imports
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.runtime import Runtime
from torch import Tensor, fx, nn
from torch.export import export

ROWS, TOKENS, WORDS = 4, 8, 24  # a batch, and the vocabulary
QUERIES, RANK, SCALING = 16, 8, 2.0
LAYERS = ("q_proj", "v_proj", "up_proj", "head")  # those that get an adapter


# -- model
class TinyDecoder(nn.Module):
    """The model to fine-tune: a block of attention and a hidden layer. Any model with linear layers would do."""

    def __init__(self, width: int = 20, hidden: int = 28) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(WORDS, width), nn.Embedding(TOKENS, width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, words_NT: Tensor) -> Tensor:
        """Logits of the next word, [N, T, V]."""
        x_NTD = self.embedding(words_NT) + self.position(torch.arange(TOKENS))
        scores_NTT = torch.bmm(self.q_proj(x_NTD), self.k_proj(x_NTD).transpose(1, 2)) * x_NTD.shape[2] ** -0.5
        future_TT = torch.ones(TOKENS, TOKENS).triu(1) * -1e4
        x_NTD = x_NTD + torch.bmm(torch.softmax(scores_NTT + future_TT, dim=-1), self.v_proj(x_NTD))
        return self.head(x_NTD + self.down_proj(F.silu(self.up_proj(x_NTD))))


# -- noise
def mix(x: Tensor) -> Tensor:
    """lowbias32 of Chris Wellons: a bijection of 32-bit words that looks random. All products wrap around."""
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = torch.bitwise_xor(x, _shift_right(x, bits)) * factor
    return torch.bitwise_xor(x, _shift_right(x, 16))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(torch.bitwise_right_shift(x, bits), (1 << (32 - bits)) - 1)


def noise(seed: Tensor, parameters: int) -> Tensor:
    """Q directions of P signs, a function of the seed (int32 [1]) alone: the same on every engine."""
    query_Q1 = torch.arange(QUERIES, dtype=torch.int32).reshape(-1, 1)
    counter_P = torch.arange(parameters, dtype=torch.int32)
    words_QP = mix(torch.bitwise_xor(mix(counter_P), mix(mix(seed) + query_Q1)))
    return 1.0 - 2.0 * torch.bitwise_and(words_QP, 1).to(torch.float32)


# -- adapter
class Adapter(nn.Module):
    """The branch beside one layer: A is drawn once, frozen and shared; every lane has a B of its own."""

    def __init__(self, layer: nn.Linear, offset: int, lanes: int) -> None:
        super().__init__()
        self.offset, self.size, self.lanes = offset, RANK * layer.weight.shape[0], lanes
        bound = layer.weight.shape[1] ** -0.5
        generator = torch.Generator().manual_seed(offset)
        self.register_buffer("a", torch.rand(RANK, layer.weight.shape[1], generator=generator) * 2 * bound - bound)

    def forward(self, y: Tensor, x: Tensor, lora_b_GP: Tensor) -> Tensor:
        """`y + scaling * (x A^T) B`, where rows are lane after lane."""
        b_GRO = lora_b_GP[:, self.offset : self.offset + self.size].reshape(self.lanes, RANK, -1)
        h_GNR = F.linear(x, self.a).reshape(self.lanes, -1, RANK)
        return y + SCALING * torch.bmm(h_GNR, b_GRO).reshape(y.shape)


# -- rewrite
def capture_with_adapters(model: nn.Module, lanes: int) -> tuple[fx.GraphModule, int]:
    """The model as a graph for `lanes` copies of a batch, with adapters, and the number P of their parameters.

    The graph takes the words of all rows and, as a second input, B of all lanes and layers as one matrix, [G, P].
    """
    example = torch.zeros(lanes * ROWS, TOKENS, dtype=torch.int64)
    network = export(model, (example,)).module(check_guards=False)
    graph, offset = network.graph, 0
    graph.set_codegen(fx.graph.CodeGen())  # inputs and outputs are what the graph says, from here on
    (words,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(words):
        lora_b_GP = graph.placeholder("lora_b")
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        name = node.args[1].target.removesuffix(".weight")
        if name in LAYERS:
            adapter = Adapter(model.get_submodule(name), offset, lanes)
            network.add_submodule(f"{name}_adapter", adapter)
            with graph.inserting_after(node):
                adapted = graph.call_module(f"{name}_adapter", (node, node.args[0], lora_b_GP))
            node.replace_all_uses_with(adapted, delete_user_cb=lambda user, new=adapted: user is not new)
            offset += adapter.size
    graph.lint()
    return fx.GraphModule(network, graph), offset


# -- methods
class TrainStep(nn.Module):
    """One call is one step: noise, perturbation, all lanes, their losses, the estimate and the update."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network, parameters = capture_with_adapters(model, 2 * QUERIES)
        self.register_buffer("lora_b", torch.zeros(parameters))

    def forward(self, words: Tensor, labels: Tensor, seed: Tensor, learning_rate: Tensor, eps: Tensor) -> list[Tensor]:
        """Loss [1] and projected gradient [Q]; `lora_b` is changed in place."""
        z_QP = noise(seed, self.lora_b.shape[0])
        lanes_GP = torch.cat((self.lora_b + eps * z_QP, self.lora_b - eps * z_QP))
        (logits_NTV,) = self.network(words.repeat(2 * QUERIES, 1), lanes_GP)
        log_p_NTV = F.log_softmax(logits_NTV, dim=-1)
        picked_NT = log_p_NTV.gather(2, labels.repeat(2 * QUERIES, 1).unsqueeze(2)).squeeze(2)
        loss_G = -picked_NT.reshape(2 * QUERIES, -1).mean(dim=1)
        g_Q = (loss_G[:QUERIES] - loss_G[QUERIES:]) / (2 * eps)
        self.lora_b.sub_(learning_rate / QUERIES * (g_Q.unsqueeze(1) * z_QP).sum(dim=0))
        return [loss_G.mean(dim=0, keepdim=True), g_Q]


class Evaluate(nn.Module):
    """The model with its adapters on and nothing perturbed; it has the same `lora_b`, by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network, parameters = capture_with_adapters(model, lanes=1)
        self.register_buffer("lora_b", torch.zeros(parameters))

    def forward(self, words: Tensor) -> Tensor:
        """Logits, [N, T, V]."""
        return self.network(words, self.lora_b.reshape(1, -1))[0]


# -- lower
def lower(model: nn.Module, path: Path) -> None:
    """Write one program with the methods `train_step` and `evaluate`, which share `lora_b`."""
    model = model.eval().requires_grad_(False)
    words = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    # Five different tensors: export takes one tensor that is given twice for one input.
    inputs = (words, words.clone(), torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1))
    edge = to_edge_transform_and_lower(
        {"train_step": export(TrainStep(model), inputs), "evaluate": export(Evaluate(model), (words,))},
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    kept = [edge.exported_program(method).graph_signature for method in ("train_step", "evaluate")]
    assert all("lora_b" in signature.inputs_to_buffers.values() for signature in kept), "a delegate took the state"
    assert "lora_b" in kept[0].buffers_to_mutate.values(), "the update is gone"
    edge = edge.transform([InitializedMutableBufferPass(["b_lora_b"])])  # store its first value, too
    plan = MemoryPlanningPass(share_mutable_buffers=True)
    config = ExecutorchBackendConfig(memory_planning_pass=plan, emit_mutable_buffer_names=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(edge.to_executorch(config).buffer)


# -- train
def batch(number: int) -> tuple[Tensor, Tensor]:
    """Words and the words that come next, in a language that counts in threes."""
    first = torch.randint(0, WORDS, (ROWS, 1), generator=torch.Generator().manual_seed(number))
    words = (first + 3 * torch.arange(TOKENS + 1)) % WORDS
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def train(path: Path, steps: int, learning_rate: float = 0.15, eps: float = 0.01) -> list[float]:
    """Train in the stock runtime; the loss of every step."""
    program = Runtime.get().load_program(path)
    train_step, evaluate = program.load_method("train_step"), program.load_method("evaluate")  # both, before any runs
    losses = []
    for number in range(steps):
        rate = torch.tensor([learning_rate * (1 - number / steps)])
        seed = torch.tensor([number], dtype=torch.int32)
        loss, _ = train_step.execute((*batch(number), seed, rate, torch.tensor([eps])))
        losses.append(float(loss))
    words, labels = batch(steps)
    right = (evaluate.execute((words,))[0].argmax(-1) == labels).float().mean()
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; {right:.0%} of the next words are right")
    return losses


# -- main
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/from_scratch"))
    options = parser.parse_args()
    torch.manual_seed(0)
    lower(TinyDecoder(), options.output / "program.pte")
    train(options.output / "program.pte", options.steps)
