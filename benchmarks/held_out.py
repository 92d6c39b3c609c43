"""Measure finished demo runs on sentences that neither training nor the choice of the learning rate has seen.

python -m benchmarks.held_out runs/demo [more folders] [--split validation] [--rows 400]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

import mobizo_compiler as mobizo
from examples.demo import TOKENS, compile_program, score
from examples.rotten_tomatoes import Prompter, balanced, load_sentences, split_by_movie


def main() -> None:
    """Print accuracy and AUC of the model alone and with the adapter of every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--rows", type=int, default=400)
    options = parser.parse_args()
    console = Console()
    tokenizer, program, _ = compile_program(console, "xnnpack", "choice")
    session, prompter = mobizo.Session(program), Prompter(tokenizer, TOKENS)
    sentences = balanced(split_by_movie(load_sentences())[options.split], options.rows, seed=2)
    console.print("zero-shot", score(session, prompter, sentences))
    for folder in options.folders:
        adapter = load_file(folder / "adapter.safetensors")
        session.load_state(torch.cat([adapter[f"{site.fqn}.lora_B"].flatten() for site in program.sites]))
        console.print(str(folder), score(session, prompter, sentences))


if __name__ == "__main__":
    main()
