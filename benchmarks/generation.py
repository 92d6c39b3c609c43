"""Tokens per second of SmolLM2 from the file that also trains, against the same model exported as upstream documents.

    python -m benchmarks.generation PROGRAM.pte [--quantization 8da4w] [--rounds 5] [--new 64] [--out runs/generation]

PROGRAM.pte is ours, with `--generate-context`. The peer is transformers' `TorchExportableModuleForDecoderOnlyLM`
with a static cache of the same context, lowered by ExecuTorch's recipe for XNNPACK (torchao's quantization of the same
name before it), and kept in the output folder. Both are run by the wheel's `TextLLMRunner`, and ours by
`Session.generate` too, in turns, in one process; the numbers are medians over the rounds after one to warm up. Tokens
are greedy.

`whole text` is what `generate` without a cache does: an evaluation of the whole length for every token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, memory_mb, set_threads
from examples.record import write_json
from examples.smollm2 import converted_folder, load_smollm2, load_tokenizer

PROMPT = (
    "<|im_start|>user\nWrite a short story about a lighthouse keeper who finds a letter in a bottle, and what the "
    "letter asks of him. Keep to simple words, and end with a question.<|im_end|>\n<|im_start|>assistant\n"
)


def main() -> None:
    """Measure, print, and leave generation.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--quantization", choices=("8da4w", "8da8w"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/generation"))
    options = parser.parse_args()
    import mobizo_compiler as mobizo

    options.out.mkdir(parents=True, exist_ok=True)
    threads = set_threads(options.threads)
    session = mobizo.Session(options.program)
    generation = session.program.manifest.generate
    if generation is None:
        parser.error(f"{options.program} was compiled without --generate-context")
    peer = options.out / f"peer_{options.quantization or 'float32'}_{generation.context}.pte"
    if not peer.exists():
        export_peer(peer, generation.context, options.quantization)
    data = session.export_ptd(options.out / "state.ptd") if session.program.manifest.state == "data" else None
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "peer, stock runner": by_runner(peer, options.new),
        "ours, stock runner": by_runner(options.program, options.new, data),
        "ours, session": by_session(session, options.new),
    }
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            result = way()
            if turn:
                found[name].append(result)
    whole = whole_text(session)
    rows = {name: summary(results) for name, results in found.items()}
    for name, row in rows.items():
        ratios = {key: row[key] / rows["peer, stock runner"][key] for key in ("prompt", "decode")}
        print(
            f"{name:20s} prompt {row['prompt']:7.1f} tokens/s ({ratios['prompt']:.2f} x)   "
            f"decode {row['decode']:6.1f} tokens/s ({ratios['decode']:.2f} x)"
        )
    print(f"{'ours, whole text':20s} {'':32s}decode {whole:6.2f} tokens/s")
    same = len({row["text"] for row in rows.values()}) == 1
    print("the texts are the same" if same else "the texts differ")
    write_json(
        options.out / "generation.json",
        {
            "machine": describe(),
            "threads": threads,
            "quantization": options.quantization,
            "context": generation.context,
            "new": options.new,
            "ways": rows,
            "whole_text_tokens_per_second": whole,
            "same_text": same,
            "bytes": {"program": options.program.stat().st_size, "peer": peer.stat().st_size},
            "peak_mb": memory_mb()["VmHWM"],
        },
    )


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the text is that of the last."""
    medians = {key: statistics.median(result[key] for result in results) for key in ("prompt", "decode")}
    return {**medians, "text": results[-1]["text"]}


def by_runner(path: Path, new: int, data: Path | None = None) -> Callable[[], dict[str, Any]]:
    """The wheel's runner, which counts for itself; with the state of a data file, if there is one."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(path), str(converted_folder() / "tokenizer.json"), *([str(data)] if data else []))
    config = GenerationConfig(max_new_tokens=new, temperature=0.0, echo=False)

    def run() -> dict[str, Any]:
        runner.reset()
        pieces: list[str] = []
        stats: list[dict[str, Any]] = []
        runner.generate(PROMPT, config, pieces.append, lambda found: stats.append(json.loads(found.to_json_string())))
        last = stats[-1]
        prompt_ms = last["prompt_eval_end_ms"] - last["inference_start_ms"]
        decode_ms = last["inference_end_ms"] - last["prompt_eval_end_ms"]
        return {
            "prompt": 1e3 * last["prompt_tokens"] / prompt_ms,
            "decode": 1e3 * last["generated_tokens"] / decode_ms,
            "text": "".join(pieces),
        }

    return run


def by_session(session: Any, new: int) -> Callable[[], dict[str, Any]]:
    """`Session.generate`: the first token comes when the prompt is done."""
    tokenizer = load_tokenizer()
    prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids

    def run() -> dict[str, Any]:
        begin, times, tokens = time.perf_counter(), [], []
        for token in session.generate(prompt, new):
            times.append(time.perf_counter())
            tokens.append(token)
        return {
            "prompt": len(prompt) / (times[0] - begin),
            "decode": (len(times) - 1) / (times[-1] - times[0]),
            "text": tokenizer.decode(tokens),
        }

    return run


def whole_text(session: Any, calls: int = 3) -> float:
    """Tokens per second where every token is an evaluation of a whole batch, as long as it was compiled for."""
    inputs = {
        spec.name: torch.ones([int(n) for n in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in session.program.manifest.inputs
    }
    session.evaluate(inputs)
    begin = time.perf_counter()
    for _ in range(calls):
        session.evaluate(inputs)
    return calls / (time.perf_counter() - begin)


def export_peer(path: Path, context: int, quantization: str | None) -> None:
    """The model with a static cache, as transformers exports it and ExecuTorch lowers it to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    _, model = load_smollm2()
    model.requires_grad_(False)
    if quantization is not None:
        quantize(model, quantization)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=context,
        cache_config={"batch_size": 1, "max_cache_len": context},
        eos_token_id=2,
    )
    module: Any = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=context, device="cpu")
    tokens = torch.export.Dim("tokens", max=context - 1)
    with torch.no_grad():
        exported = module.export(
            input_ids=torch.zeros(1, 3, dtype=torch.long),
            cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
            strict=True,
        )
    constants = {
        "get_max_seq_len": context - 1,
        "get_max_context_len": context,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": [2],
        "get_bos_id": 1,
        "get_vocab_size": model.config.vocab_size,
        "use_sdpa_with_kv_cache": False,
    }
    edge = to_edge_transform_and_lower(
        {"forward": exported},
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constants,
    )
    path.write_bytes(edge.to_executorch(ExecutorchBackendConfig()).buffer)


def quantize(model: Any, recipe: str) -> None:
    """Linear layers in 4 or 8 bits with activations in 8, as torchao documents it for ExecuTorch."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    kind, granularity = (torch.int4, PerGroup(32)) if recipe == "8da4w" else (torch.int8, PerAxis(0))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # untied
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity))


if __name__ == "__main__":
    main()
