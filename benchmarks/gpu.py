"""One training step on an NVIDIA GPU beside its peers, in float32, TF32 and bfloat16: one command with a card.

    python -m benchmarks.gpu --prepare graphs              # on any machine: captures and rewrites, without weights
    python -m benchmarks.gpu --run graphs --out runs/gpu   # with a card: compiles side by side, measures; a table last

a  the forward of the rows of all lanes, 2qb, logits of the last position, compiled by AOTInductor, as one CUDA graph
b  the same MP-LoRA step in eager PyTorch (`reference.py`)
c  sequential MeZO: 2q forwards of b rows by AOTInductor, each a CUDA graph, with noise and update in eager PyTorch.
   These forwards have no adapters, so this is less than the whole of it
d  LoRA by backpropagation and plain SGD in eager PyTorch, on qb rows
e  our step with the estimator "exact" on qb rows, one CUDA graph
f  our step with the two-sided estimate, one CUDA graph

Times are medians of device events after warm-up; "call" is what a host waits for `Runner.call`, with copies. bfloat16
is the whole model in a and c, autocast in b and d, and precision="bfloat16" in f. Weights are random. The peak is what
PyTorch's allocator held at most, weights with it, while one program was loaded and run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.workload import CONFIGURATIONS, LastPosition, Workload
from examples.record import write_json
from mobizo_compiler import CausalLMLoss, ZOConfig
from mobizo_compiler.backends.aot_inductor import AotInductorBackend, round_products
from mobizo_compiler.backends.aot_inductor.artifact import (
    AotInductorRunner,
    Target,
    _CudaGraph,
    _rounded_products,
    release,
)
from mobizo_compiler.compiling.methods import captured_and_rewritten
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.program import STATE, GraphProgram
from mobizo_compiler.passes.insert_mp_lora import LORA_A, initial_lora_a
from mobizo_compiler.step.sites import Site

CASES = {
    "smollm2": Workload("smollm2", queries=4, rows=2, tokens=64),
    "tinyllama": Workload("tinyllama", queries=4, rows=2, tokens=128),
    "tinyllama-q16": Workload("tinyllama", queries=16, rows=1, tokens=128),
    "llama2-7b": Workload("llama2-7b", queries=4, rows=2, tokens=128),
}
PRECISIONS = ("float32", "tf32", "bfloat16")
ONLY_BFLOAT16 = ("llama2-7b",)  # weights of 27 GB in float32, and as much again for peers, are left out
OURS = ("ours", "exact")  # kinds of graphs that are our methods; the others are plain forwards
KEPT = 1 << 14  # tensors of at most so many numbers (norms, frequencies) are kept; larger ones are drawn
ROUNDS, COSINE_SEEDS, EPS, LEARNING_RATE = 15, 8, 1e-2, 1e-3
PLAIN = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}


def main() -> None:
    """Prepare, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--run", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many programs are compiled at once")
    parser.add_argument(
        "--device", default="cuda:0", help="cpu for a rehearsal without a card: no peaks, times by the clock"
    )
    parser.add_argument("--most-seconds", type=float, default=270, help="what is not compiled by then is left out")
    parser.add_argument("--layers", type=int, help="keep the first so many layers only, for a rehearsal")
    options = parser.parse_args()
    if options.prepare:
        for name in options.cases:
            prepare(name, dataclasses.replace(CASES[name], layers=options.layers), options.prepare)
    if options.run:
        if options.device != "cpu" and not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no GPU here: --prepare works everywhere, --run needs a card or --device cpu")
        device, precisions = torch.device(options.device), tuple(options.precisions)
        run = Run(device, options.run, options.out, precisions, options.most_seconds)
        run.all_cases(options.cases, options.jobs)


# -- without a card ----------------------------------------------------------------------------------------------------


def prepare(name: str, workload: Workload, folder: Path) -> None:
    """Write the graphs of a case: our methods in float32 and bfloat16, and the forward of 2qb and of b rows in both."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (torch.bfloat16,) if name in ONLY_BFLOAT16 else (torch.float32, torch.bfloat16)
    inputs, _ = workload.batch()
    for dtype in wanted:
        wrapped = LastPosition(workload.load_model(weights=False, dtype=dtype)).eval()
        for kind, rows in (("forward", workload.lane_rows), ("small", workload.rows)):
            given = tuple(value[:1].repeat(rows, 1) for value in inputs.values())
            with torch.no_grad():
                program = GraphProgram(torch.export.export(wrapped, given), outputs=("logits",))
            torch.save({"methods": {"forward": _packed(program)}}, folder / f"{name}.{kind}.{_name(dtype)}.pt")
    _prepare_ours(name, "ours", workload, ZOConfig(queries=workload.queries), wanted, folder)
    if name not in ONLY_BFLOAT16:
        whole = dataclasses.replace(workload, rows=workload.queries * workload.rows)
        _prepare_ours(name, "exact", whole, ZOConfig(queries=1, estimator="exact"), wanted, folder)
    print(f"{name}: prepared in {time.perf_counter() - began:.0f} s", flush=True)


def _prepare_ours(
    name: str, kind: str, workload: Workload, zo: ZOConfig, wanted: Sequence[torch.dtype], folder: Path
) -> None:
    """Write our methods with an estimator."""
    model, (inputs, _) = workload.load_model(weights=False), workload.batch()
    example = bind_example(model, inputs, None, None)
    options = Options(lora=workload.lora, zo=zo, loss=CausalLMLoss(max_labels=1))
    methods = captured_and_rewritten(model, example, options, AotInductorBackend(), {}, None, lambda line: None).methods
    # The rounded weights are of no interest here, and would be written.
    with mock.patch.object(round_products, "_half", lambda tensor: _shape(tensor, torch.bfloat16)):
        rounded = {**methods, "train_step": round_products.RoundProducts()(methods["train_step"])}
    for dtype, programs in zip((torch.bfloat16, torch.float32), (rounded, methods), strict=True):
        if dtype in wanted:
            kept = {
                "workload": dataclasses.asdict(workload),
                "sites": [dataclasses.asdict(site) for site in programs["train_step"].sites],
                "methods": {m: _packed(programs[m]) for m in ("train_step", "replay") if m in programs},
            }
            torch.save(kept, folder / f"{name}.{kind}.{_name(dtype)}.pt")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape that takes no space."""
    return torch.zeros((), dtype=dtype).expand(tensor.shape)


def _packed(program: GraphProgram) -> dict[str, Any]:
    """A method as values that can be saved: the graph with tensors that are shapes, and the small ones as they are."""
    exported, small = program.exported, {}
    for tensors in (exported.state_dict, exported.constants):
        for path, tensor in tensors.items():
            if tensor.numel() <= KEPT and path != STATE:
                small[path] = tensor.detach().clone()
            shape, whole = _shape(tensor, tensor.dtype), isinstance(tensor, nn.Parameter)
            tensors[path] = nn.Parameter(shape, requires_grad=False) if whole else shape
    for node in program.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    file = io.BytesIO()
    torch.export.save(exported, file)
    shapes = {path: (tuple(tensor.shape), tensor.dtype) for path, tensor in program.tensors().values()}
    kept = {"outputs": program.outputs, "values": dict(program.values), "facts": program.facts & {facts.STATIC}}
    return {"exported": file.getvalue(), "small": small, "shapes": shapes, "program": kept}


# -- with a card -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A file of graphs to compile to a package for a device."""

    file: Path
    package: Path
    device: str


def compile_file(job: Job) -> tuple[str, float, str]:
    """Compile the methods of one file; its name, seconds, and what went wrong."""
    began = time.perf_counter()
    try:
        saved = torch.load(job.file, weights_only=False)
        methods = {}
        for name, packed in saved["methods"].items():
            exported = torch.export.load(io.BytesIO(packed["exported"]))
            methods[name] = GraphProgram(exported, **packed["program"])
        backend = AotInductorBackend(job.device)
        with tempfile.TemporaryDirectory() as folder:
            options: tuple[Any, ...] = () if job.file.name.split(".")[1] in OURS else (PLAIN, ())
            shutil.move(backend.compile(methods, Path(folder), *options), job.package)
        return job.file.name, time.perf_counter() - began, ""
    except Exception:
        return job.file.name, time.perf_counter() - began, traceback.format_exc()


class Forward:
    """A forward of AOTInductor, as one CUDA graph on a GPU."""

    def __init__(self, package: Path, weights: Mapping[str, Tensor], device: torch.device, tf32: bool) -> None:
        self.tf32, self.weights = tf32, weights
        on_gpu = device.type == "cuda"
        self.method = torch._C._aoti.AOTIModelPackageLoader(
            str(package), "forward", on_gpu, 1, device.index if on_gpu else -1
        )
        names = self.method.get_constant_fqns()
        self.method.load_constants({name: weights[name] for name in names}, False, True, True)
        self.launch = _CudaGraph("forward", self.method) if on_gpu else self.method.boxed_run

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """The results, good until the next call."""
        with _rounded_products(self.tf32):
            return list(self.launch(list(inputs)))


@dataclasses.dataclass(frozen=True)
class _State:
    """What a runner asks of a manifest."""

    state_size: int
    state: str = "shared"
    sizes: tuple[Any, ...] = ()


class Run:
    """Compiles what was prepared, and measures it.

    Args:
        device: The GPU; or the CPU, for a rehearsal.
        folder: What was prepared.
        out: Where gpu.json goes.
        precisions: What is measured.
        most_seconds: What is not compiled by then is left out.
    """

    def __init__(
        self, device: torch.device, folder: Path, out: Path, precisions: tuple[str, ...], most_seconds: float
    ) -> None:
        self.device, self.folder, self.out, self.most_seconds = device, folder, out, most_seconds
        self.on_gpu = device.type == "cuda"
        self.precisions = precisions if self.on_gpu else tuple(p for p in precisions if p != "tf32")
        self.record: dict[str, Any] = {"machine": self._machine(), "compile_seconds": {}, "failed": {}, "cases": {}}

    def all_cases(self, cases: Sequence[str], jobs: int) -> None:
        """Compile everything side by side, then measure one program after the other; gpu.json and a table."""
        began = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as built:
            self._compile(cases, Path(built), jobs)
            self.record["compile_wall_seconds"] = round(time.perf_counter() - began, 1)
            for name in cases:
                measured = self.record["cases"][name] = {}
                for precision in self.precisions:
                    if name in ONLY_BFLOAT16 and precision != "bfloat16":
                        continue
                    measured[precision] = {}
                    try:
                        _Case(self, name, precision, Path(built)).measure(measured[precision], measured)
                    except Exception:
                        self.failed(f"{name} {precision}", traceback.format_exc())
                    write_json(self.out / "gpu.json", self.record)
        self.record["wall_seconds"] = round(time.perf_counter() - began, 1)
        write_json(self.out / "gpu.json", self.record)
        show(self.record, Console(width=200))

    def failed(self, what: str, problem: str) -> None:
        """Note what went wrong; the rest goes on."""
        self.record["failed"][what] = problem
        print(f"failed: {what}: {problem[-2000:]}", flush=True)

    def _compile(self, cases: Sequence[str], built: Path, count: int) -> None:
        wanted = {label_of(precision) for precision in self.precisions}
        files = [
            f for name in cases for f in sorted(self.folder.glob(f"{name}.*.pt")) if f.stem.split(".")[2] in wanted
        ]
        jobs = [Job(file, built / f"{file.stem}.pt2", str(self.device)) for file in files]
        jobs.sort(key=lambda job: -job.file.stat().st_size)  # the longest first
        count = max(1, min(count, len(jobs)))
        threads = str(max(1, (os.cpu_count() or 1) // count))
        os.environ.update(TORCHINDUCTOR_COMPILE_THREADS=threads, OMP_NUM_THREADS=threads)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
            running = {pool.submit(compile_file, job): job for job in jobs}
            try:
                for done in concurrent.futures.as_completed(running, timeout=self.most_seconds):
                    name, seconds, problem = done.result()
                    self.record["compile_seconds"][name] = round(seconds, 1)
                    print(f"compiled {name} in {seconds:.0f} s", flush=True)
                    if problem:
                        self.failed(name, problem)
            except TimeoutError:
                for late in (job for future, job in running.items() if not future.done()):
                    self.failed(late.file.name, f"not compiled within {self.most_seconds} s")
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()

    def _machine(self) -> dict[str, Any]:
        found = {
            "device": str(self.device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cores": os.cpu_count(),
        }
        if self.on_gpu:
            import triton

            card = torch.cuda.get_device_properties(self.device)
            found |= {"gpu": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "triton": triton.__version__}
        return found


class _Case:
    """One case in one precision."""

    def __init__(self, run: Run, name: str, precision: str, built: Path) -> None:
        self.run, self.name, self.precision, self.built = run, name, precision, built
        self.device, self.label, self.tf32 = run.device, label_of(precision), precision == "tf32"
        self.ours = self._prepared("ours")
        self.workload = Workload(**self.ours["workload"])
        self.sites = tuple(
            Site(**{**s, "kernel": tuple(s["kernel"]), "outputs": tuple(s["outputs"])}) for s in self.ours["sites"]
        )
        self.lora_a = initial_lora_a(self.sites, self.workload.lora.init_seed)
        self.parameters = sum(site.trained for site in self.sites)
        self.start = torch.randn(self.parameters, generator=torch.Generator().manual_seed(7)) * 1e-2

    def measure(self, found: dict[str, Any], others: Mapping[str, Any]) -> None:
        """Every peer, each alone in memory."""
        found["workload"] = dataclasses.asdict(self.workload)
        inputs, _ = self.workload.batch()
        with self._alone(found, "f"):
            self._our_step(found, others.get("float32", {}).get("gradient"))
        if self.name not in ONLY_BFLOAT16:
            with self._alone(found, "e"):
                self._exact_step(found)
        for letter, kind, rows in (("a", "forward", self.workload.lane_rows), ("c", "small", self.workload.rows)):
            with self._alone(found, letter):
                saved = self._prepared(kind)
                package = self.built / f"{self.name}.{kind}.{self.label}.pt2"
                weights = self._tensors(saved)
                self._reset_peak()
                forward = Forward(package, weights, self.device, self.tf32)
                given = [value[:1].repeat(rows, 1).to(self.device) for value in inputs.values()]
                step = functools.partial(forward, given)
                if letter == "c":
                    b_P = torch.zeros(self.parameters, device=self.device)
                    step = functools.partial(sequential, forward, given, b_P, self.workload.queries)
                found[letter] = self._timed(step)
                self._note_peak(found, letter)
                del forward, step
                self._release(weights)
        if self.name in ONLY_BFLOAT16:
            return
        half = self.precision == "bfloat16"
        for letter in "bd":
            rounding = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
            with self._alone(found, letter), rounding, _rounded_products(self.tf32):
                self._eager(found, letter)

    def _prepared(self, kind: str) -> dict[str, Any]:
        return dict(torch.load(self.run.folder / f"{self.name}.{kind}.{self.label}.pt", weights_only=False))

    def _runner(
        self, kind: str, saved: Mapping[str, Any]
    ) -> tuple[AotInductorRunner, dict[str, Tensor], Callable[..., list[Tensor]]]:
        """Our methods of a kind with their weights, and what makes the arguments of a step of a seed and a rate."""
        keys = {method: {path: path for path in packed["shapes"]} for method, packed in saved["methods"].items()}
        target = dataclasses.replace(Target.here(str(self.device)), precision=self.precision)  # type: ignore[arg-type]
        manifest: Any = _State(self.parameters)
        package = self.built / f"{self.name}.{kind}.{self.label}.pt2"
        weights = self._tensors(saved)
        self._reset_peak()
        inputs, labels = Workload(**saved["workload"]).batch()

        def arguments(seed: int, rate: float = LEARNING_RATE) -> list[Tensor]:
            scalars = [torch.tensor([seed], dtype=torch.int32), torch.tensor([rate]), torch.tensor([EPS])]
            return [*inputs.values(), labels, *scalars]

        return AotInductorRunner(package, manifest, target, keys, weights), weights, arguments

    def _exact_step(self, found: dict[str, Any]) -> None:
        runner, weights, arguments = self._runner("exact", self._prepared("exact"))
        runner.state().copy_(self.start)
        loss = runner.call("train_step", arguments(1))[0]
        found["exact_loss"] = float(loss)
        assert not torch.equal(runner.state(), self.start)
        near = [value.to(self.device) for value in arguments(1)]
        found["e"] = self._timed(lambda: runner.launch("train_step", near))
        self._note_peak(found, "e")
        self._release(weights)

    def _our_step(self, found: dict[str, Any], exact: list[float] | None) -> None:
        runner, weights, arguments = self._runner("ours", self.ours)
        runner.state().copy_(self.start)
        measured = [runner.call("train_step", arguments(seed, 0.0)) for seed in range(COSINE_SEEDS)]
        assert torch.equal(runner.state(), self.start), "learning rate 0 changed the state"
        found["lane_losses"] = measured[0][1].tolist()
        found["gradient"] = torch.cat([gradient for _, _, gradient in measured]).tolist()
        if exact is not None:
            pair = torch.tensor(found["gradient"]).double(), torch.tensor(exact).double()
            found["cosine_with_float32"] = float(F.cosine_similarity(*pair, dim=0))
        gradient = runner.call("train_step", arguments(3))[2]
        after = runner.state().clone()
        assert not torch.equal(after, self.start)
        runner.state().copy_(self.start)
        runner.call("replay", [arguments(3)[-3], gradient, arguments(3)[-2]])
        found["replay_differs_in"] = int((runner.state() != after).sum())
        near = [value.to(self.device) for value in arguments(1)]
        found["f"] = self._timed(lambda: runner.launch("train_step", near))
        found["f"]["call_ms"] = waited(lambda: runner.call("train_step", arguments(1)))
        update = [near[-3], gradient.to(self.device), near[-2]]
        found["f"]["replay_ms"] = self._timed(lambda: runner.launch("replay", update))["ms"]
        self._note_peak(found, "f")
        self._release(weights)

    def _eager(self, found: dict[str, Any], letter: str) -> None:
        model = self.workload.load_model(weights=False)
        for path, parameter in model.named_parameters():
            if parameter.numel() > KEPT:
                parameter.data = self._weight(path, parameter.shape, torch.float32)
        model.to(self.device)
        self._reset_peak()
        if letter == "b":
            peer = peers.eager_step(self.workload, model, self.sites, self.lora_a, start=self.start)
            losses = peer.step(0)
            assert losses is not None
            difference = (losses.float().cpu() - torch.tensor(found["lane_losses"])).abs().max()
            found["largest_difference_of_lane_losses"] = float(difference)
        else:
            peer = peers.backpropagation(self.workload, model)
        found[letter] = self._timed(lambda: peer.step(1), 5)
        self._note_peak(found, letter)

    def _weight(self, path: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A weight of that path: the same in every program and peer, rounded where it is stored rounded."""
        path = path.removesuffix("_bfloat16").removeprefix("model.model.").removeprefix("model.")
        if CONFIGURATIONS[self.workload.model]["tie_word_embeddings"] and path == "lm_head.weight":
            path = "embed_tokens.weight"  # one weight of two names
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(path.encode()))
        return (torch.randn(*shape, generator=generator, device=self.device) * 0.02).to(dtype)

    def _tensors(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every weight of the methods in a file, on the device, by path."""
        found: dict[str, Tensor] = {}
        for packed in saved["methods"].values():
            for path, (shape, dtype) in packed["shapes"].items():
                if path == STATE or path in found:
                    continue
                if path.startswith(LORA_A):
                    numbers = path.removeprefix(LORA_A).removesuffix("_bfloat16").split("_")
                    sites = [self.sites[int(number)] for number in numbers]
                    merged = torch.cat([self.lora_a[site.fqn] * site.scaling for site in sites])
                    found[path] = merged.to(self.device, dtype)
                elif path in packed["small"]:
                    found[path] = packed["small"][path].to(self.device)
                else:
                    found[path] = self._weight(path, shape, dtype)
        return found

    @contextlib.contextmanager
    def _alone(self, found: dict[str, Any], letter: str) -> Iterator[None]:
        """One program in memory at a time. What fails is recorded, and the others go on."""
        gc.collect()
        if self.run.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            found.setdefault("left_over_mb", {})[letter] = round(torch.cuda.memory_allocated() / 1e6, 1)
        try:
            yield
        except Exception:
            self.run.failed(f"{self.name} {self.precision} {letter}", traceback.format_exc())

    def _release(self, weights: Mapping[str, Tensor]) -> None:
        if self.run.on_gpu:  # in main memory some of them are the file's
            release(list(weights.values()))

    def _reset_peak(self) -> None:
        """The peak counts from here, where the weights are in memory, and what made them is not any more."""
        if self.run.on_gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self, found: dict[str, Any], letter: str) -> None:
        if self.run.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e6
            found[letter]["peak_mb"] = round(peak - found["left_over_mb"][letter], 1)

    def _timed(self, step: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Any]:
        """Milliseconds between device events around a step after three others: median, least and most."""
        for _ in range(3):
            step()
        values = []
        for _ in range(rounds if self.run.on_gpu else 1):
            if not self.run.on_gpu:
                values.append(waited(step, 1))
                continue
            torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            torch.cuda.synchronize()
            values.append(first.elapsed_time(last))
        return {
            name: round(of(values), 3) for name, of in (("ms", statistics.median), ("least_ms", min), ("most_ms", max))
        }


def label_of(precision: str) -> str:
    """The precision of the weights, by which files are named."""
    return "bfloat16" if precision == "bfloat16" else "float32"


def sequential(forward: Forward, given: list[Tensor], b_P: Tensor, queries: int) -> None:
    """MeZO, one direction after the other, everything where the model is. The forward does not read B."""
    z_QP = torch.randn(queries, b_P.numel(), device=b_P.device)
    slopes = []
    for z_P in z_QP:
        sides = []
        for eps in (EPS, -EPS):
            torch.add(b_P, z_P, alpha=eps)
            (logits_N1V,) = forward(given)
            sides.append(F.cross_entropy(logits_N1V[:, 0].float(), given[0][:, -1]))
        slopes.append((sides[0] - sides[1]) / (2 * EPS))
    b_P -= (torch.stack(slopes) @ z_QP) * (LEARNING_RATE / queries)


def waited(step: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Milliseconds that a host waits for a step: the median."""
    values = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        values.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(values), 3)


def show(record: Mapping[str, Any], console: Console) -> None:
    """One line a case and precision."""
    machine = record["machine"]
    columns = (
        "case",
        "precision",
        "f",
        "call",
        "a",
        "b",
        "c",
        "d",
        "e",
        "e/d",
        "f/a",
        "f/c",
        "f MB",
        "a MB",
        "f/a MB",
        "e MB",
        "d MB",
        "cosine",
        "replay",
    )
    table = Table(*columns, title=f"{machine.get('gpu', machine['device'])}, torch {machine['torch']}: ms, peak MB")

    def cell(found: Mapping[str, Any], letter: str, key: str = "ms") -> str:
        value = found.get(letter, {}).get(key)
        return "-" if value is None else f"{value:.4g}"

    def ratio(found: Mapping[str, Any], one: str, other: str, key: str = "ms") -> str:
        values = [found.get(letter, {}).get(key) for letter in (one, other)]
        return "-" if None in values else f"{values[0] / values[1]:.2f}"

    for name, precisions in record["cases"].items():
        for precision, found in precisions.items():
            table.add_row(
                name,
                precision,
                cell(found, "f"),
                cell(found, "f", "call_ms"),
                *(cell(found, letter) for letter in "abcde"),
                ratio(found, "e", "d"),
                ratio(found, "f", "a"),
                ratio(found, "f", "c"),
                cell(found, "f", "peak_mb"),
                cell(found, "a", "peak_mb"),
                ratio(found, "f", "a", "peak_mb"),
                cell(found, "e", "peak_mb"),
                cell(found, "d", "peak_mb"),
                f"{found['cosine_with_float32']:.5f}" if "cosine_with_float32" in found else "-",
                str(found.get("replay_differs_in", "-")),
            )
    console.print(table)
    for what, problem in record["failed"].items():
        console.print(f"failed: {what}: {problem.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
