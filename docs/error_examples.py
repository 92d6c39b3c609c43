"""One example of every error, which docs/generate.py runs for the page about errors. `setup` is what they share.

The names of the functions are the codes of the errors; what a function holds is shown on the page.
"""

# ruff: noqa: D103
# mypy: ignore-errors
# -- setup
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from torch import nn

import mobizo_compiler as mobizo
from mobizo_compiler import passes
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.format.bundle import LARGEST, Expected, check_expected
from mobizo_compiler.graph import facts, parse
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.step.rules import RULES
from mobizo_compiler.testing import check_backend
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.hub import load_model
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.training import TrainingConfig, train

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
words = torch.randint(0, 16, (2, 5))
program = mobizo.compile(model, (words,), backend="eager")
session = mobizo.Session(program)
step = {"seed": 1, "learning_rate": 0.01}


# -- examples
def mbz101():
    mobizo.LoraConfig(r=0)


def mbz102():
    program.save("program.pte")


def mbz103():
    mobizo.compile(model, (words,), backend="tensorflow")


def mbz104():
    class Npu(EagerBackend):
        name = "npu"

        def unavailable(self):
            return "libnpu.so is not installed"

    mobizo.compile(model, (words,), backend=Npu())


def mbz105():
    mobizo.compile(model, (words,), quantization=mobizo.QuantizationConfig("8da4w", group_size=32), backend="eager")


def mbz106():
    mobizo.compile(model, (words,), rule="newton", backend="eager")


def mbz107():
    with patch.dict(RULES.built_in, lion="lion_rule:Lion"):  # as an entry point of a package that is half there
        mobizo.compile(model, (words,), rule="lion", backend="eager")


def mbz201():
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - y

    mobizo.compile(Difference().eval(), (torch.ones(3, 4), torch.ones(2, 4)), backend="eager")


def mbz202():
    mobizo.compile(model.train(), (words,), backend="eager")


def mbz203():
    mobizo.compile(model.eval(), (words,), mobizo.LoraConfig(target_modules=("q_proj",)), backend="eager")


def mbz204():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.up(x)

    mobizo.compile(Counting().eval(), (torch.ones(2, 4),), loss=mobizo.MSELoss(), backend="eager")


def mbz205():
    mobizo.compile(model, (words,), loss=mobizo.SequenceClassificationLoss(), backend="eager")


def mbz206():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x):
            return self.up(x - x.mean(0))

    mobizo.compile(Centred().eval(), (torch.ones(2, 4),), loss=mobizo.MSELoss(), backend="eager")


def mbz207():
    @torch.library.custom_op("yourlib::shuffle", mutates_args=())
    def shuffle(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)

    shuffle.register_fake(torch.empty_like)

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x):
            return self.up(shuffle(x))

    mobizo.compile(Shuffled().eval(), (torch.ones(2, 4),), loss=mobizo.MSELoss(), backend="eager")


def mbz208():
    normed = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6)).eval()
    exported = torch.export.export(normed, (torch.ones(2, 4),)).run_decompositions()
    mobizo.compile(exported, (torch.ones(2, 4),), loss=mobizo.MSELoss(), backend="eager")


def mbz301():
    Pipeline([passes.UpdateState()]).run(passes.empty_program())


def mbz302():
    @dataclasses.dataclass(frozen=True)
    class Boaster(Pass):
        gives = frozenset({facts.LOSS})

        def rewrite(self, edit):
            pass

    Pipeline([Boaster()]).run(passes.empty_program())


def mbz303():
    parse("input %x: f32[rows, 3]\n%y = tanh(%z) : f32[rows, 3]\nreturn output_0 = %y")


def mbz304():
    class Npu(EagerBackend):
        name = "npu"

        def passes(self):
            return ["fuse_everything"]

    check_backend(Npu())


def mbz401():
    mobizo.compile(model, (words,), quantization="int8", backend="vulkan")


def mbz402():
    class Rounded(EagerBackend):
        name = "rounded"

        def lower(self, methods, manifest):
            artifact = super().lower(methods, manifest)
            exact = artifact.runner

            def runner():  # an engine that computes in bfloat16
                made = exact()
                call = made.call
                made.call = lambda *arguments: [result.bfloat16().float() for result in call(*arguments)]
                return made

            artifact.runner = runner
            return artifact

    mobizo.compile(model, (words,), backend=Rounded())


def mbz501():
    Path("program.pte").write_bytes(bytes(100))
    mobizo.load("program.pte")


def mbz502():
    losses = {"step/0": torch.tensor([2.31]), "wanted step/0": torch.tensor([2.07])}
    check_expected(Expected("step/0", "wanted step/0", LARGEST, 2e-4), losses, "program.pte")


def mbz601():
    session.train_step((words[:1],), words, **step)


def mbz602():
    session.train_step((words + 1000,), words, **step)


def mbz603():
    session.train_step((words,), torch.full_like(words, -100), **step)


def mbz604():
    session.load_state(torch.zeros(3))


def mbz605():
    def batch(number):
        with ThreadPoolExecutor(1) as threads:  # while a step of this thread is being prepared
            threads.submit(session.evaluate, (words,)).result()

    session.finetune(batch, steps=1, learning_rate=0.01, run="runs/busy")


def mbz606():
    ranks = {"is_initialized": lambda: True, "get_rank": lambda: 0, "get_world_size": lambda: 2}
    gone = Mock(side_effect=RuntimeError("Connection closed by peer [10.0.0.2]:29500"))
    with patch.multiple("torch.distributed", **ranks, all_gather=gone):
        mobizo.DistributedSession(program)


def mbz701():
    session.restore("runs/none")


def mbz702():
    def batch(number):
        mobizo.Session(program).finetune([((words,), words)], steps=9, learning_rate=0.01, run="runs/mine")

    session.finetune(batch, steps=9, learning_rate=0.01, run="runs/mine")


def mbz703():
    session.import_adapter("adapter")


def mbz704():
    layout = BatchShape(
        rows=2, tokens=5, shortest=5, inputs=("input_ids",), vocabulary=16, classes=None, max_labels=1, choices=None
    )
    rows = TextData((Encoded((3, 1, 4), 1, None, 0),), layout, None, (), 0, PromptConfig())
    train(session, rows, None, TrainingConfig(seed=1), "runs/text", stop=lambda: True)  # interrupted at once
    train(session, rows, None, TrainingConfig(seed=2), "runs/text")


def mbz801():
    Path("mine.csv").write_text("prompt,answer\nIs it raining?,no,really\n")
    read_rows(Path("mine.csv"))


def mbz802():
    Path("rows").mkdir()
    with patch.dict(sys.modules, {"datasets": None}):  # as where it is not installed
        read_rows(Path("rows"))


def mbz803():
    Path("model").mkdir()
    load_model("model")
