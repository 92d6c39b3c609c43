"""What `forward` adds to SmolLM2's file and to the process that trains, and that all who generate say the same.

    python -m benchmarks.train_and_generate [--quantization 8da4w] [--context 512] [--new 64] [--out FOLDER]

Two programs with the exact gradient of all `q_proj` and `v_proj`, one with `forward`. The peaks are VmHWM of new
processes: one trains with the program without, one with the other program trains and then generates. Then 64 greedy
tokens after a prompt, with the base and with an adapter that was trained before in that process: of `Session.generate`
and of transformers (float32 only), and, in a new process from the `.ptd` files, of the wheel's `TextLLMRunner` and of a
session.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import PROMPT, by_runner
from benchmarks.machine import alone, describe, memory_mb, set_threads
from examples.record import write_json
from examples.smollm2 import converted_folder, load_smollm2, load_tokenizer

ROWS, TOKENS, STEPS, RATE = 4, 64, 12, 2e-3
ANSWER = "Arr! The sea, the sea, the salty sea, said the old pirate, and he sang it again and again."


def main() -> None:
    """Measure, print, and leave train_and_generate.json; fails where texts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", choices=("8da4w", "8da8w"))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/train_and_generate"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.quantization or "float32"
    without, program = (options.out / f"{name}{end}.pte" for end in ("", "_forward"))
    for path in (without, program):
        if not path.exists():
            alone(compile_program, path, options.quantization, options.context if path is program else None)
    peaks = {"trains": alone(peak, without, 0), "trains, then generates": alone(peak, program, options.new)}
    texts, cache_mb = alone(in_this_process, program, options.new, options.quantization is None)
    for adapter in ("base", "trained"):
        texts |= alone(from_file, program, program.with_suffix(f".{adapter}.ptd"), options.new, adapter)
    size = program.stat().st_size / without.stat().st_size
    growth = (peaks["trains, then generates"] - cache_mb) / peaks["trains"]
    print(f"file {size:.3f} x, peak {peaks} MB, {growth:.3f} x without the cache of {cache_mb:.0f} MB")
    for adapter in ("base", "trained"):
        said = {who: text for who, text in texts.items() if who.startswith(adapter)}
        print(f"{len(said)} ways, {'all the same' if len(set(said.values())) == 1 else 'NOT the same'}: {said}")
    record = {"quantization": options.quantization, "context": options.context, "peaks_mb": peaks, "cache_mb": cache_mb}
    record |= {"file": size, "growth": growth, "texts": texts, "machine": describe()}
    write_json(options.out / f"{name}.json", record)
    if len(set(texts.values())) != 2:
        raise SystemExit("texts differ, or the adapter has no effect")


def compile_program(path: Path, quantization: str | None, context: int | None) -> None:
    """All `q_proj` and `v_proj` by the exact gradient."""
    import mobizo_compiler as mobizo

    _, model = load_smollm2()
    mobizo.compile(
        model,
        batch()[0],
        mobizo.LoraConfig(r=8, target_modules=("q_proj", "v_proj")),
        mobizo.ZOConfig(estimator="exact"),
        mobizo.CausalLMLoss(),
        rule="adamw",
        backend="xnnpack",
        quantization=quantization,
        state="data",
        generate=None if context is None else mobizo.GenerateConfig(context),
    ).save(path)


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """The prompt with another answer than the model's, in every row; the answer is labelled."""
    tokenizer = load_tokenizer()
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, ANSWER))
    ids = torch.tensor([(prompt + answer)[:TOKENS]]).repeat(ROWS, 1)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def train(session: Any) -> None:
    """Some steps."""
    inputs, labels = batch()
    for step in range(STEPS):
        session.train_step(inputs, labels, seed=step, learning_rate=RATE)


def generate(session: Any, new: int) -> str:
    """Greedy tokens after the prompt, as text."""
    tokenizer = load_tokenizer()
    prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids
    return str(tokenizer.decode(list(session.generate(prompt, new)), skip_special_tokens=True))


def peak(path: Path, new: int) -> float:
    """Megabytes of this process after training, and after generating if `new` is not 0."""
    import mobizo_compiler as mobizo

    set_threads(2)
    session = mobizo.Session(path)
    train(session)
    if new:
        generate(session, new)
    return memory_mb()["VmHWM"]


def in_this_process(path: Path, new: int, whole: bool) -> tuple[dict[str, str], float]:
    """What a session says before and after training, and transformers with its weights; the cache's megabytes."""
    import mobizo_compiler as mobizo
    from mobizo_compiler.text.hub import load_config

    set_threads(2)
    session, tokenizer = mobizo.Session(path), load_tokenizer()
    texts: dict[str, str] = {}
    for adapter in ("base", "trained"):
        if adapter == "trained":
            train(session)
        session.export_ptd(path.with_suffix(f".{adapter}.ptd"))
        texts[f"{adapter}, session"] = generate(session, new)
        if whole:
            _, model = load_smollm2()
            session.merge_into(model)
            prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                found = model.generate(prompt, max_new_tokens=new, do_sample=False)
            texts[f"{adapter}, transformers"] = tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
    config, generation = load_config(str(converted_folder())), session.program.manifest.generate
    assert generation is not None
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return texts, 2 * config.num_hidden_layers * width * generation.context * 4 / 1e6


def from_file(path: Path, data: Path, new: int, adapter: str) -> dict[str, str]:
    """What the stock runner and a new session say from a data file."""
    import mobizo_compiler as mobizo

    set_threads(2)
    said = by_runner(path, new, data)()["text"]
    session = mobizo.Session(path)
    session.import_ptd(data)
    return {f"{adapter}, stock runner": said, f"{adapter}, session from the file": generate(session, new)}


if __name__ == "__main__":
    main()
