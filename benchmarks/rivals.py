"""Our step beside the ways that others take it, each in a fresh process: time, memory, and the loss that it arrives at.

    python -m benchmarks.rivals [--peers ...] [--steps 10] [--threads 2] [--onnx-python PYTHON] [options of a workload]

peft               PyTorch and peft, backpropagation of LoRA: A and B
peft-checkpointed  the same with gradient checkpointing
peft-b             the same without it, B alone, as all that follow
joint              ExecuTorch's joint graph, portable kernels, its own SGD (`benchmarks/foreign.py`)
joint-rewritten    the same with the model written in another way
onnx               onnxsim's step graph on onnxruntime (needs packages, or a Python that has them: `--onnx-python`)
onnx-rewritten     the same with the model written in another way
exact              ours, the gradient itself
exact-bounded      the same with a bound on what it keeps (`--activation_mb`, 300 if it is not given)
hybrid             ours, the gradient in the last four blocks, lanes before them (`--queries`)
two-sided          ours, lanes alone (`--queries`)

All start from the same weights and the same A, B = 0, and take steps of SGD on the same rows. Each peer is a process of
its own. It takes turns with another that runs stock ExecuTorch inference of the rows as they are: after a turn to warm
up, there is a median of each, and their ratio. The peak is VmHWM of the peer's process after the last step; next to it
stands what of it is above the imports. Then the loss of the rows is computed once more. A peer that fails is listed
with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.machine import describe, memory_mb, set_threads
from benchmarks.workload import Workload

OURS = ("exact", "exact-bounded", "hybrid", "two-sided")
PEFT = ("peft", "peft-checkpointed", "peft-b")
FOREIGN = ("joint", "joint-rewritten", "onnx", "onnx-rewritten")
PEERS = (*PEFT, *FOREIGN, *OURS)
LANES = ("hybrid", "two-sided")
BOUND_MB = 300
EPS, NO_EPS = 1e-2, 1e-6
PAUSE = 0.1  # seconds between turns, in which threads stop spinning
Step = Callable[[int, float], float]  # a step of a number and a rate: the loss before it


def main() -> None:
    """Make what is missing, measure, and leave rivals.json in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=10, help="of each peer; the first is the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lanes-learning-rate", type=float, default=1e-5, help="of hybrid and two-sided")
    parser.add_argument("--onnx-python", default=sys.executable, help="a Python that has onnxsim")
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--child", choices=["stock", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    Workload.add_arguments(parser)
    parser.set_defaults(rows=8, tokens=64)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    if options.child:
        child(options.child, workload, options.file, options.threads)
    else:
        parent(workload, options)


def child(name: str, workload: Workload, file: Path, threads: int) -> None:
    """Load, then do what each line of the input says, and answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print goes with the errors
    stages = {}
    load = prepare(name, workload, file, threads)
    stages["imports"] = memory_mb()
    step = load()
    stages["loaded"] = memory_mb()
    print(json.dumps(stages), file=answers)
    for line in sys.stdin:
        number, rate = json.loads(line)
        began = time.perf_counter()
        loss = step(number, rate)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory_mb()}), file=answers)


def prepare(name: str, workload: Workload, file: Path, threads: int) -> Callable[[], Step]:
    """Import what the child needs; what is returned loads it and gives its step."""
    if name == "stock" or name in OURS:
        from executorch.runtime import Runtime

        set_threads(threads)
        return lambda: engine_step(Runtime.get().load_program(file), name, workload)
    if name.startswith("joint"):
        import executorch.extension.training  # noqa: F401

        set_threads(threads)
        return lambda: joint_step(file, workload)
    if name.startswith("onnx"):
        import numpy
        import onnxruntime

        return lambda: onnx_step(onnxruntime, numpy, file, threads)
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(threads)
    return lambda: peft_step(name, workload, file)


def engine_step(program: Any, name: str, workload: Workload) -> Step:
    """A step of our program, or inference of the stock one."""
    import torch

    from benchmarks.memory import shared_packed_weights

    if name == "stock":
        stock, rows = program.load_method("forward"), list(workload.batch()[0].values())

        def inference(number: int, rate: float) -> float:
            stock.execute(rows)
            return 0.0

        return inference
    with shared_packed_weights():
        method = program.load_method("train_step")
    arguments = workload.call_arguments("train_step")[:-3]

    def step(number: int, rate: float) -> float:
        eps = EPS if rate else NO_EPS  # lanes that are not perturbed have the loss of the state
        scalars = [torch.tensor([number], dtype=torch.int32), torch.tensor([rate]), torch.tensor([eps])]
        return float(method.execute([*arguments, *scalars])[0])

    return step


def joint_step(file: Path, workload: Workload) -> Step:
    """Forward and backward in one method, and the update by the runtime's own optimizer."""
    from executorch.extension import training

    inputs, labels = workload.batch()
    arguments = [*inputs.values(), labels[:, -1].contiguous()]
    module = training._load_for_executorch_for_training(str(file))
    optimizers: dict[float, Any] = {}

    def step(number: int, rate: float) -> float:
        loss = module.forward_backward("forward", arguments)[0]
        if rate and rate not in optimizers:  # the parameters are known after a first call
            optimizers[rate] = training.get_sgd_optimizer(module.named_parameters(), rate)
        if rate:
            optimizers[rate].step(module.named_gradients())
        return float(loss)

    return step


def onnx_step(runtime: Any, numpy: Any, file: Path, threads: int) -> Step:
    """The step graph in a session of onnxruntime; B goes from its outputs back to its inputs, without a copy."""
    names = json.loads(file.with_suffix(".names.json").read_text())
    session_options = runtime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])
    value = runtime.OrtValue.ortvalue_from_numpy
    with numpy.load(file.with_suffix(".npz")) as stored:
        given = {name: value(stored[name]) for name in stored.files}

    def step(number: int, rate: float) -> float:
        scalars = {"lr": value(numpy.array(rate, numpy.float32))}
        outputs = [names["loss"], *names["state"].values()]
        loss, *state = session.run_with_ort_values(outputs, given | scalars)
        given.update(zip(names["state"], state, strict=True))
        return float(loss.numpy())

    return step


def peft_step(name: str, workload: Workload, file: Path) -> Step:
    """LoRA of peft, with the A of our program, by PyTorch's backpropagation and plain SGD."""
    import peft
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    base = workload.load_model()
    sites = workload.adapted(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=workload.rank, lora_alpha=16, target_modules=sites))
    layers = dict(base.named_modules())
    for site, a_RF in load_file(file).items():
        weight = layers[site].lora_A["default"].weight
        weight.data.copy_(a_RF)
        weight.requires_grad_(name != "peft-b")
    if name == "peft-checkpointed":
        model.train()
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    inputs, labels = workload.batch()

    def step(number: int, rate: float) -> float:
        logits = model(**inputs, use_cache=False, logits_to_keep=2).logits[:, 0]
        loss = F.cross_entropy(logits, labels[:, -1])
        if rate:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


class Process:
    """A child, that answers."""

    def __init__(self, name: str, file: Path, python: str, threads: int, workload: Workload) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, "-W", "ignore", "-m", "benchmarks.rivals", "--child", name, "--file", str(file)]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads), *workload.to_arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        self.stages = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def step(self, number: int, rate: float) -> dict[str, Any]:
        """Take a step; its seconds, the loss before it, and the memory after it.

        Raises:
            RuntimeError: The child has ended; what it said last.
        """
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([number, rate]) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-4:]
            raise RuntimeError("\n".join([*said, f"the process ended with {status}"]))
        found: dict[str, Any] = json.loads(line)
        return found


def parent(workload: Workload, options: argparse.Namespace) -> None:
    """Measure each peer beside stock inference, and report."""
    from rich.console import Console

    from benchmarks.compiled import compiled
    from examples.record import write_json

    one_lane = dataclasses.replace(workload, estimator="exact", queries=1, activation_mb=None)
    workloads = {name: dataclasses.replace(workload, estimator=name, activation_mb=None) for name in LANES}
    workloads["exact"] = one_lane
    workloads["exact-bounded"] = dataclasses.replace(one_lane, activation_mb=workload.activation_mb or BOUND_MB)
    files = {name: compiled("program", workloads[name], options.cache).path for name in OURS if name in options.peers}
    adapters = compiled("program", one_lane, options.cache).path.with_suffix(".safetensors")
    stock = compiled("stock", one_lane, options.cache).path
    record: dict[str, Any] = {
        "machine": describe() | {"threads": options.threads},
        "workload": dataclasses.asdict(workload),
        "bound_mb": workloads["exact-bounded"].activation_mb,
        "steps": options.steps,
        "load_before": os.getloadavg(),
        "peers": {},
    }
    for name in options.peers:
        python = options.onnx_python if name.startswith("onnx") else sys.executable
        rate = options.lanes_learning_rate if name in LANES else options.learning_rate
        found: dict[str, Any] = {"learning_rate": rate}
        file = files.get(name, adapters)
        if name in FOREIGN:
            found["made"], file = foreign(name, one_lane, python, adapters, options.cache)
        if "failed" in found.get("made", {}):
            found["failed"] = found["made"]["failed"]
        else:
            with Process("stock", stock, sys.executable, options.threads, one_lane) as beside:
                peer = Process(name, file, python, options.threads, workloads.get(name, one_lane))
                found |= turns(peer, beside, options.steps, rate)
        record["peers"][name] = found
        print(name, found.get("failed") or f"{found['seconds']:.3f} s, loss {found['loss']:.4f}", flush=True)
        write_json(options.out / "rivals.json", record | {"load_after": os.getloadavg()})
    show(record, Console(width=150))
    print(f"in {options.out}: rivals.json")


def turns(peer: Process, beside: Process, steps: int, rate: float) -> dict[str, Any]:
    """Steps of a peer and stock inference, one after the other; what failed where the peer does."""
    taken: list[dict[str, Any]] = []
    stock: list[dict[str, Any]] = []
    try:
        with peer:
            for number in range(1, steps + 1):
                stock.append(beside.step(number, rate))
                taken.append(peer.step(number, rate))
            loss = peer.step(steps + 1, 0.0)["loss"]
    except RuntimeError as error:
        return {"failed": str(error)}
    seconds = [step["seconds"] for step in taken[1:]]
    beside_seconds = statistics.median(step["seconds"] for step in stock[1:])
    memory = taken[-1]["memory"]
    return {
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "most_seconds": max(seconds),
        "stock_seconds": beside_seconds,
        "to_stock": statistics.median(seconds) / beside_seconds,
        "peak_mb": memory["VmHWM"],
        "above_imports_mb": round(memory["VmHWM"] - peer.stages["imports"]["VmHWM"], 1),
        "memory": memory,
        "stock_peak_mb": stock[-1]["memory"]["VmHWM"],
        "losses": [step["loss"] for step in taken],
        "loss": loss,
    }


def foreign(name: str, workload: Workload, python: str, adapters: Path, cache: Path) -> tuple[dict[str, Any], Path]:
    """The record of a file of `benchmarks.foreign`, and the file; it is made first if it is not in the cache."""
    from benchmarks.foreign import FILES, Compiler

    compiler: Compiler = "joint" if name.startswith("joint") else "onnx"
    here = Path(__file__).parent
    digest = hashlib.sha256(json.dumps([name, python, adapters.name, workload.to_arguments()]).encode())
    for source in ("foreign.py", "workload.py"):
        digest.update((here / source).read_bytes())
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    record = folder / "record.json"
    if not record.exists():
        print(f"making {name}", flush=True)
        command = [python, "-W", "ignore", "-m", "benchmarks.foreign", compiler, *workload.to_arguments()]
        command += ["--adapters", str(adapters), "--out", str(folder)]
        command += ["--rewritten"] if name.endswith("-rewritten") else []
        done = subprocess.run(command, capture_output=True, text=True)
        if not record.exists():
            said = done.stderr.strip().splitlines()[-1:]
            return {"failed": "\n".join([*said, f"the process ended with {done.returncode}"])}, folder
    found: dict[str, Any] = json.loads(record.read_text())
    return found, folder / FILES[compiler]


def show(record: dict[str, Any], console: Any) -> None:
    """One table."""
    from rich.table import Table

    title = f"{record['steps']} steps on the same rows"
    table = Table(
        "peer", "median s", "least", "most", "x stock", "peak MB", "above imports", "rate", "loss", title=title
    )
    for name, found in record["peers"].items():
        if "failed" in found:
            table.add_row(name, "[red]failed")
            continue
        seconds = (f"{found[key]:.3f}" for key in ("seconds", "least_seconds", "most_seconds"))
        megabytes = (f"{found[key]:.0f}" for key in ("peak_mb", "above_imports_mb"))
        rate = f"{found['learning_rate']:g}"
        table.add_row(name, *seconds, f"{found['to_stock']:.2f}", *megabytes, rate, f"{found['loss']:.4f}")
    console.print(table)
    ran = [found for found in record["peers"].values() if "losses" in found]
    if ran:
        beside = [found["stock_seconds"] for found in ran]
        peak = max(found["stock_peak_mb"] for found in ran)
        console.print(f"stock inference: {min(beside):.3f} to {max(beside):.3f} s, peak {peak:.0f} MB")
    started = [found["losses"][0] for name, found in record["peers"].items() if "losses" in found and name not in LANES]
    if started:
        console.print(f"loss before the first step {min(started):.4f} to {max(started):.4f}")
    for name, found in record["peers"].items():
        if "failed" in found:
            console.print(f"{name}: {' '.join(found['failed'].split())}", style="red", markup=False)


if __name__ == "__main__":
    main()
