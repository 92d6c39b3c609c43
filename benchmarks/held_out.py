"""Measure finished demo runs on sentences that neither training nor the choice of the learning rate has seen.

python -m benchmarks.held_out runs/demo [more folders] [--split validation] [--rows 400]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import mobizo_compiler as mobizo
from examples.demo import SETUPS, TOKENS, compile_program, score
from examples.rotten_tomatoes import Prompter, balanced, load_sentences, split_by_movie


def main() -> None:
    """Print accuracy and AUC of the model alone and with the adapter of every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--adapters", choices=SETUPS, default="head")
    options = parser.parse_args()
    console = Console()
    setup = SETUPS[options.adapters]
    tokenizer, program, _ = compile_program(console, "xnnpack", "choice", setup=setup)
    session, prompter = mobizo.Session(program), Prompter(tokenizer, TOKENS)
    sentences = balanced(split_by_movie(load_sentences())[options.split], options.rows, seed=2)
    console.print("zero-shot", score(session, prompter, sentences, setup.rows))
    for folder in options.folders:
        session.import_adapter(folder / "adapter")
        console.print(str(folder), score(session, prompter, sentences, setup.rows))


if __name__ == "__main__":
    main()
