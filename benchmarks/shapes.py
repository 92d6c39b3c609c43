"""Models of a billion parameters and more, from checkpoints in half precision: what compiling and a step take.

    python -m benchmarks.shapes qwen2.5-0.5b tinyllama [--quantization 8da4w] [--rows 1] [--out runs/shapes]
    python -m benchmarks.shapes --config FOLDER/config.json ...    any decoder of transformers
    python -m benchmarks.shapes llama2-7b --layers 2 --check       losses against plain PyTorch

For each shape a checkpoint of random bfloat16 weights is written in shards, as models are published, if it is not
there; a new process compiles it as `mobizo compile` would, with adapters on `q_proj` and `v_proj`; another makes three
steps in the stock runtime. Of both, the peak is VmHWM; of the second, what was no file's at the end is said too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import alone, describe, memory_mb, set_threads
from benchmarks.workload import LAYERS, LLAMA2_7B, TINYLLAMA
from examples.record import write_json

_QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {  # the public configurations
    "qwen2.5-0.5b": {
        **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, **_QWEN},
    },
    "qwen3-0.6b": {
        **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "head_dim": 128, **_QWEN, "num_key_value_heads": 8},
    },
    "llama3.2-1b": {
        **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True},
    },
    "gemma3-1b": {
        **{"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
        **{"sliding_window": 512, "tie_word_embeddings": True},
    },
    "tinyllama": {"model_type": "llama", "num_hidden_layers": LAYERS["tinyllama"], **TINYLLAMA},
    "llama2-7b": {"model_type": "llama", "num_hidden_layers": LAYERS["llama2-7b"], **LLAMA2_7B},
}
SHARD_BYTES, STEPS = 1 << 30, 3


def main() -> None:
    """Write what is missing, compile, step, print, and leave shapes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--config", type=Path, nargs="+", default=[], help="configurations of transformers")
    parser.add_argument("--layers", type=int, help="only so many blocks")
    parser.add_argument("--quantization", default="8da4w", help='a recipe, or "none"')
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="lane losses against plain PyTorch; float32 only")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    options = parser.parse_args()
    if unknown := set(options.shape).difference(SHAPES):
        parser.error(f"{sorted(unknown)[0]} is none of {', '.join(SHAPES)}")
    options.quantization = None if options.quantization == "none" or options.check else options.quantization
    options.out.mkdir(parents=True, exist_ok=True)
    shapes = {name: SHAPES[name] for name in options.shape}
    shapes |= {path.parent.name or path.stem: json.loads(path.read_text()) for path in options.config}
    records = []
    for name, values in shapes.items():
        if options.layers:
            name, values = f"{name}-{options.layers}", {**values, "num_hidden_layers": options.layers}
        folder = options.out / name
        if not (folder / "config.json").exists():
            alone(write_checkpoint, folder, values)
        program = options.out / f"{name}-{options.quantization or 'float32'}.pte"
        record = {"shape": name, "quantization": options.quantization or "float32"}
        record["weights_gb"] = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        record |= {f"compile_{key}": value for key, value in alone(compile_it, folder, program, options).items()}
        record["file_gb"] = program.stat().st_size / 1e9
        record |= {f"step_{key}": value for key, value in alone(steps, program).items()}
        if options.check:
            record["largest_difference"] = alone(against_pytorch, folder, program)
        records.append(record)
        print(json.dumps(record), flush=True)
    show(records)
    settings = {name: getattr(options, name) for name in ("layers", "queries", "rows", "tokens")}
    write_json(options.out / "shapes.json", {"machine": describe(), **settings, "shapes": records})


def write_checkpoint(folder: Path, values: dict[str, Any]) -> None:
    """Random bfloat16 weights in shards; `config.json` last."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**values, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    places: dict[str, str] = {}
    torch.manual_seed(0)
    shards = list(_shards({name: v for name, v in model.named_parameters(remove_duplicate=False) if name not in tied}))
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        drawn = {name: _drawn(value) for name, value in shard.items()}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(drawn, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _shards(values: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, value in values.items():
        if shard and 2 * (value.numel() + sum(other.numel() for other in shard.values())) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _drawn(value: Tensor) -> Tensor:
    empty = torch.empty(value.shape, dtype=torch.bfloat16)
    return empty.fill_(1.0) if value.dim() == 1 else empty.normal_(std=0.02)


def batch(vocabulary: int, rows: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens, of which the last is labelled."""
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def compile_it(folder: Path, program: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, and the peak in megabytes."""
    import mobizo_compiler as mobizo
    from mobizo_compiler.text.hub import load_model

    set_threads(2)
    begin, spent = time.perf_counter(), time.process_time()
    model = load_model(str(folder))
    mobizo.compile(
        model,
        batch(model.config.vocab_size, options.rows, options.tokens)[0],
        mobizo.LoraConfig(r=16, lora_alpha=16, target_modules=("q_proj", "v_proj")),
        mobizo.ZOConfig(queries=options.queries),
        mobizo.CausalLMLoss(max_labels=1),
        quantization=options.quantization,
        backend="xnnpack",
    ).save(program)
    seconds, processor = time.perf_counter() - begin, time.process_time() - spent
    return {"seconds": seconds, "processor_seconds": processor, "peak_mb": memory_mb()["VmHWM"]}


def steps(path: Path) -> dict[str, float]:
    """The median of steps after the first, and the peak in megabytes."""
    import mobizo_compiler as mobizo

    set_threads(2)
    session = mobizo.Session(path)
    inputs, labels = batch(*_sizes(session.program))
    seconds = []
    for number in range(STEPS):
        begin = time.perf_counter()
        session.train_step(inputs, labels, seed=number, learning_rate=1e-3)
        seconds.append(time.perf_counter() - begin)
    memory = memory_mb()
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": memory["VmHWM"], "own_mb": memory["RssAnon"]}


def against_pytorch(folder: Path, path: Path) -> float:
    """The largest difference of a lane's loss, over three steps."""
    import mobizo_compiler as mobizo
    from mobizo_compiler.reference import ReferenceStep
    from mobizo_compiler.text.hub import load_model

    session = mobizo.Session(path)
    reference = ReferenceStep.of(load_model(str(folder)).float(), session.program)
    inputs, labels = batch(*_sizes(session.program))
    options = {"learning_rate": 1e-3, "eps": session.program.manifest.eps}
    found = []
    for seed in range(STEPS):
        ours, theirs = (who.train_step(inputs, labels, seed=seed, **options) for who in (session, reference))
        found.append(float((ours.lane_losses - theirs.lane_losses).abs().max()))
    return max(found)


def _sizes(program: Any) -> tuple[int, int, int]:
    rows, tokens = program.manifest.inputs[0].shape
    return 1000, int(rows), int(tokens)


def show(records: list[dict[str, Any]]) -> None:
    """A line for each shape."""
    table = Table(
        "shape", "weights", "GB", "compile s", "of processor", "peak MB", "file GB", "step s", "peak MB", "own MB"
    )
    for r in records:
        values = [r["weights_gb"], r["compile_seconds"], r["compile_processor_seconds"], r["compile_peak_mb"]]
        values += [r["file_gb"], r["step_seconds"], r["step_peak_mb"], r["step_own_mb"]]
        formats = ("{:.2f}", "{:.0f}", "{:.0f}", "{:.0f}", "{:.2f}", "{:.2f}", "{:.0f}", "{:.0f}")
        table.add_row(r["shape"], r["quantization"], *(f.format(v) for f, v in zip(formats, values, strict=True)))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
