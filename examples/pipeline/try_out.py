"""Train a program for some steps, as a device would: python try_out.py PROGRAM

Random inputs and labels of the shapes and ranges that the program states; so this fits every program as it is. It
shows that the file loads, that training lowers the loss of one batch, and that a killed run can be taken up.
"""

import sys
import tempfile

import torch
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler.format.manifest import TensorSpec

STEPS = 40


def random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """A tensor that an input or the labels may be; dynamic sizes are 2."""
    shape = [size if isinstance(size, int) else 2 for size in spec.shape]
    if spec.dtype.startswith("float"):
        return torch.randn(shape, generator=generator)
    high = 1 if spec.high is None else spec.high  # a mask, if it says nothing
    return torch.randint(high if spec.high is None else 0, high + 1, shape, generator=generator)


def main(path: str) -> None:
    """Train, or stop with what is wrong."""
    generator = torch.Generator().manual_seed(0)
    session = mobizo.Session(path)
    manifest = session.program.manifest
    inputs = {spec.name: random(spec, generator) for spec in manifest.inputs}
    labels = random(manifest.labels, generator)
    if manifest.max_labels is not None:  # only so many of a row may count
        labels[:, manifest.first_label + manifest.max_labels :] = manifest.labels.also
    batches = [(inputs if manifest.keywords else tuple(inputs.values()), labels)]
    with tempfile.TemporaryDirectory() as run:
        session.finetune(batches, steps=STEPS // 2, learning_rate=0.05, run=run)
        session = mobizo.Session(path)  # as after a kill
        summary = session.finetune(batches, steps=STEPS, learning_rate=0.05, run=run)
    first, last = (sum(part) / 5 for part in (summary.losses[:5], summary.losses[-5:]))
    print(f"loss {first:.4f} to {last:.4f} in {summary.steps} steps, taken up at {summary.resumed_at}")
    if summary.void or not last < first:
        sys.exit("the program does not learn")


if __name__ == "__main__":
    main(sys.argv[1])
