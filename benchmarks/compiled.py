"""Compiled files, kept by what they are made from. Each is made in a fresh process, so that its peak memory is its own.

python -m benchmarks.compiled {program,position,stock} [options of a workload] [--cache runs/cache]

`program` is the one that trains itself; `position` evaluates at the labelled position only, for training from the
host; `stock` is inference of the rows of all lanes, lowered as upstream documents it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor

import mobizo_compiler
from benchmarks.machine import memory_mb
from benchmarks.workload import Workload, stock_inference
from examples.record import write_json
from mobizo_compiler.analysis.costs import multiply_adds
from mobizo_compiler.compiling.described import installed_versions
from mobizo_compiler.inspection.plan import read_plans
from mobizo_compiler.step.sites import Site

Kind = Literal["program", "position", "stock"]
CACHE = Path("runs/cache")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program file with its adapters and what was measured when it was made."""

    path: Path
    record: dict[str, Any]

    def adapters(self) -> tuple[tuple[Site, ...], Mapping[str, Tensor]]:
        """Sites, and A of every site; the program file is not opened."""
        sites = tuple(Site(**(site | {"kernel": tuple(site["kernel"])})) for site in self.record["sites"])
        return sites, load_file(self.path.with_suffix(".safetensors"))


def compiled(kind: Kind, workload: Workload, cache: Path = CACHE) -> Compiled:
    """The file in `cache`, made first if it is not there."""
    path = cache / f"{kind}-{content_key(kind, workload)}.pte"
    if not path.with_suffix(".json").exists():
        print(f"compiling {kind}: {' '.join(workload.to_arguments())}", flush=True)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled", kind, *workload.to_arguments()]
        subprocess.run([*command, "--cache", str(cache)], check=True, stdout=subprocess.DEVNULL)
    return Compiled(path, json.loads(path.with_suffix(".json").read_text()))


def content_key(kind: Kind, workload: Workload) -> str:
    """Hash of what makes a difference: the workload, versions, and our sources or the stock lowering."""
    fields: dict[str, Any] = dataclasses.asdict(workload)
    fields.pop("seed")
    here, compiler = Path(__file__).parent, Path(mobizo_compiler.__file__).parent
    sources = [here / "workload.py"]
    if kind == "stock":
        sources.append(compiler / "inspection" / "plan.py")
        fields = {name: fields[name] for name in ("model", "layers", "tokens")} | {"lane_rows": workload.lane_rows}
    else:
        folders = (compiler, compiler / "passes", compiler / "backends")
        sources += sorted({file.resolve() for folder in folders for file in folder.rglob("*.py")})
    if kind == "position":
        fields.pop("queries")
    digest = hashlib.sha256(json.dumps([fields, installed_versions()]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def make(kind: Kind, workload: Workload, path: Path) -> None:
    """Compile, and write the program, its adapters and, last, its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sites: list[dict[str, Any]] = []
    if kind == "stock":
        model = workload.load_model()
        loaded = memory_mb()
        partial = path.with_suffix(".partial")
        seconds, exported = stock_inference(model, workload.lane_rows, workload.tokens, partial)
        peak = memory_mb()
        partial.replace(path)
        products = {"forward": sum(map(multiply_adds, exported.graph.nodes))}
    else:
        program, seconds = workload.compile() if kind == "program" else workload.compile_one_position()
        peak, loaded = memory_mb(), None
        sites = [dataclasses.asdict(site) for site in program.sites]
        save_file(
            {name: value.contiguous() for name, value in program.lora_a_by_fqn.items()},
            path.with_suffix(".safetensors"),
        )
        program.save(path)
        products = {name: sum(map(multiply_adds, method.graph.nodes)) for name, method in program.methods.items()}
    methods = {}
    for name, plan in read_plans(path).items():
        total = products.get(name, 0)
        inside = 1 - plan.outside_multiply_adds / total if total else None
        methods[name] = dataclasses.asdict(plan) | {"multiply_adds": total, "share_of_multiply_adds_inside": inside}
    record = {
        "kind": kind,
        "workload": dataclasses.asdict(workload),
        "seconds": {phase: s for phase, s in seconds.items() if phase != "load"},
        "total_seconds": round(sum(s for phase, s in seconds.items() if phase != "load"), 2),
        "peak_mb": peak["VmHWM"],
        "model_loaded_mb": loaded and loaded["VmRSS"],
        "file_mb": round(path.stat().st_size / 1e6, 2),
        "methods": methods,
        "sites": sites,
    }
    write_json(path.with_suffix(".json"), record)


def main() -> None:
    """Make one file, if it is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("--cache", type=Path, default=CACHE)
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    path = options.cache / f"{options.kind}-{content_key(options.kind, workload)}.pte"
    if not path.with_suffix(".json").exists():
        make(options.kind, workload, path)
    print(path.with_suffix(".json").read_text())


if __name__ == "__main__":
    main()
