"""Where the exact gradient of a hybrid step begins: as early in the model as the bound on its memory allows."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence

from mobizo_compiler.analysis.costs import si
from mobizo_compiler.compiling import pipelines
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.insert_mp_lora import InsertMPLoRA
from mobizo_compiler.passes.recompute import Recompute, fewest_bytes
from mobizo_compiler.step.estimators import AUTO, Hybrid


def with_exact_from(
    options: Options, captured: GraphProgram, parts: pipelines.Parts, say: Callable[[str], None]
) -> Options:
    """The options with a block in place of `exact_from="auto"`; others as they are.

    The step is written for one block after the other, halving the range each time: the earlier a block, the more is
    kept. The first adapted block is always measured.

    Args:
        options: With `activation_memory_bytes`, if the block is to be found.
        captured: The captured graph.
        parts: What its pipelines need.
        say: Told what was found.

    Raises:
        ConfigError: All adapters are in one block, or in none; or not even the last block alone fits.
    """
    estimator, most = options.zo.estimator, options.activation_memory_bytes
    if not isinstance(estimator, Hybrid) or estimator.exact_from != AUTO or most is None:
        return options

    def chosen(block: int) -> Options:
        found = dataclasses.replace(estimator, exact_from=block)
        return dataclasses.replace(options, zo=dataclasses.replace(options.zo, estimator=found))

    steps = pipelines.train_step(chosen(0), parts)
    alike = len(_before(steps, InsertMPLoRA)) + 1  # passes that do not depend on the block
    adapted = Pipeline(steps[:alike]).run(captured)

    def needed(block: int) -> int:
        steps = _before(pipelines.train_step(chosen(block), parts), Recompute)
        return fewest_bytes(Pipeline(steps[alike:]).run(adapted), most)

    blocks = sorted({site.block for site in adapted.sites if site.block is not None})
    if len(blocks) < 2:
        raise ConfigError(
            f'exact_from is "{AUTO}", and the adapters are not in two numbered blocks or more',
            hint='estimator="exact" or "two-sided" for all of them',
        )
    later = blocks[1:]
    place = bisect_left(later, True, key=lambda block: needed(block) <= most)
    block = later[min(place, len(later) - 1)]  # where none fits, the last one says by how much
    say(f"the gradient itself from block {block} on, of blocks {blocks[0]} to {blocks[-1]}, within {si(most)}B")
    return chosen(block)


def _before(steps: Sequence[Pass], kind: type[Pass]) -> list[Pass]:
    """The passes before the first one of a kind."""
    return list(itertools.takewhile(lambda step: not isinstance(step, kind), steps))
