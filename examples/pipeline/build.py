"""Compile the model that is shipped: python build.py OUTPUT

Put your own model, example inputs and options here; the rest of the pipeline does not care what they are.
"""

import sys

import torch

import mobizo_compiler as mobizo
from mobizo_compiler.testing import TinyCausalLM, tiny_batch


def main(output: str) -> None:
    """Write the program."""
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    lora = mobizo.LoraConfig(r=4, target_modules=("q_proj", "v_proj"))
    program = mobizo.compile(TinyCausalLM(layers=1).eval(), inputs, lora, mobizo.ZOConfig(queries=4), progress=print)
    print(f"{program.parameters} trained parameters, in {program.save(output)}")


if __name__ == "__main__":
    main(sys.argv[1])
