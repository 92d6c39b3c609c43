"""Backends of other packages: the OpenVINO example, installed as a package of its own, and plugins that are broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.backends import assert_backend_contract, backend_names, get_backend
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.errors import BackendUnavailableError, LoweringError, MobizoError, UnknownBackendError
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "openvino_backend"


# -- the example ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openvino_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: this one's packages, and on top the example with what pip says it needs."""
    folder = tmp_path_factory.mktemp("plugin")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    site = folder / "env" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    shutil.copytree(EXAMPLE, folder / "source")  # building leaves files beside the source
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-build-isolation", "-c", ROOT / "constraints.txt", folder / "source"],
        check=True,
        cwd=folder,
        timeout=600,
    )
    reason = run(
        python,
        """
        import json
        from mobizo_compiler.backends import get_backend
        print(json.dumps(get_backend("openvino").unavailable()))
        """,
    )
    if reason is not None and "this ExecuTorch runtime has no" in reason:
        pytest.skip(f"{reason} on this platform")
    assert reason is None
    return python


def run(python: Path, code: str) -> Any:
    """What the code prints last, as JSON; it runs outside of the checkout."""
    settings = {**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [python, "-P", "-c", textwrap.dedent(code)],
        cwd=python.parent,
        env=settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["programs", "whole"])
def test_the_installed_example_keeps_the_contract(part: str, openvino_python: Path) -> None:
    """What of the contract is about runners, the state and files; the networks are slow."""
    found = run(
        openvino_python,
        f"""
        import json, sys, torch
        torch.set_num_threads(1)
        from mobizo_compiler.backends import assert_backend_contract, backend_names, get_backend
        from mobizo_compiler.testing.backend import _check_programs
        listed = backend_names()["openvino"]
        lazy = not {{"mobizo_openvino", "openvino"}} & set(sys.modules)
        if {part == "whole"}:
            assert_backend_contract("openvino")
        else:
            _check_programs(get_backend("openvino"), "openvino")
        import mobizo_openvino
        print(json.dumps([listed, lazy, mobizo_openvino.__file__.startswith(sys.prefix)]))
        """,
    )
    assert found == ["mobizo_openvino:MobizoOpenvino", True, True]


@pytest.mark.slow
def test_a_decoder_in_openvino(openvino_python: Path) -> None:
    """Ten steps with attention, a mask and rows without anything to attend to; how much is outside; what is refused."""
    found = run(
        openvino_python,
        """
        import json, torch, mobizo_compiler as mobizo
        torch.set_num_threads(1)
        from mobizo_compiler import LoraConfig, Session, ZOConfig
        from mobizo_compiler.reference import ReferenceStep
        from mobizo_compiler.testing import TinyCausalLM, tiny_batch
        torch.manual_seed(2)
        model = TinyCausalLM().eval()
        inputs, labels = tiny_batch()
        inputs["attention_mask"][:, :3] = 0
        lora = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj", "down_proj"))
        program = mobizo.compile(model, inputs, lora, ZOConfig(queries=2), backend="openvino")
        delegation = {name: [d.delegates, dict(d.outside)] for name, d in program.artifact.delegation.items()}
        try:
            mobizo.compile(
                model, inputs, lora, backend="openvino",
                dynamic_shapes={name: {1: torch.export.Dim("tokens", max=32)} for name in inputs},
            )
            refusal = None
        except mobizo.errors.BackendRefusedError as error:
            refusal = str(error)
        session = Session(mobizo.load(program.save("tiny.pte")))
        reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
        start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
        session.load_state(start)
        reference.state.copy_(start)
        g_error, size = 0.0, 0.0
        for seed in range(10):
            a = session.train_step(inputs, labels, seed=seed, learning_rate=0.01, eps=0.02)
            b = reference.train_step(inputs, labels, seed=seed, learning_rate=0.01, eps=0.02)
            g_error = max(g_error, float((a.projected_gradient - b.projected_gradient).abs().max()))
            size = max(size, float(b.projected_gradient.abs().max()))
        b_error = float((session.state() - reference.state).abs().max())
        moved = float((reference.state - start).abs().max())
        outputs = session.evaluate(inputs)["logits"], reference.evaluate(inputs)["logits"]
        print(json.dumps(dict(
            delegation=delegation, refusal=refusal, g_error=g_error, size=size, b_error=b_error, moved=moved,
            output_error=float((outputs[0] - outputs[1]).abs().max()),
        )))
        """,
    )
    assert "size 'tokens' is dynamic" in found["refusal"]
    # The network, and what is before and after `where` in the loss, which is outside as the pick of labels is.
    assert found["delegation"]["train_step"][0] <= 3
    assert found["delegation"]["evaluate"][0] == 1
    assert found["delegation"]["replay"][0] == 0, "replay must compute noise and update as train_step does"
    for method in ("train_step", "evaluate"):
        assert not {"linear", "bmm", "_softmax", "mean.dim", "permute_copy"} & set(found["delegation"][method][1])
    # Losses near 4 carry 4e-6 of rounding, g that over eps = 0.02, and ten steps with learning rate 0.01 add at most
    # 0.01 * 6 of that each to B, whose error comes back into the losses through gradients of at most 10.
    assert found["size"] > 0.1, "the comparison must be sharper than what is compared"
    assert found["g_error"] < 2e-3
    assert found["b_error"] < 10 * 0.01 * 6 * 2e-4 < found["moved"] / 10
    assert found["output_error"] < 1e-3


@pytest.mark.slow
def test_without_the_property_the_compiler_refuses_reduced_precision(openvino_python: Path) -> None:
    """What makes the example right, taken away; and what it writes is read where the program runs."""
    found = run(
        openvino_python,
        """
        import json, openvino, torch, mobizo_compiler as mobizo
        torch.set_num_threads(1)
        from mobizo_compiler import LoraConfig
        from mobizo_compiler.testing import TokenWise
        from mobizo_openvino import preprocess
        refused = []
        for header in (b"<hetero/>", b"<compiled_submodel /><compiled_submodel /></hetero_config>"):
            try:
                preprocess.in_float32(header)
            except mobizo.errors.LoweringError as error:
                refused.append(str(error))
        preprocess.in_float32 = lambda exported: exported
        precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        torch.manual_seed(0)
        arguments = TokenWise().eval(), (torch.zeros(2, 5, dtype=torch.int64),), LoraConfig(r=2, target_modules=("up",))
        try:
            mobizo.compile(*arguments, backend="openvino")
            message = None
        except mobizo.errors.LoweringError as error:
            message = str(error)
        from executorch.exir.backend.backend_details import BackendDetails
        OpenvinoBackend = type("OpenvinoBackend", (BackendDetails,), {"__module__": "other", "preprocess": None})
        try:
            mobizo.compile(*arguments, backend="openvino")
            clash = None
        except mobizo.errors.LoweringError as error:
            clash = str(error)
        print(json.dumps([refused, clash, precision, message]))
        """,
    )
    refused, clash, precision, message = found
    assert len(refused) == 2, "a header of another form must be refused, not written into"
    assert clash is not None and "other is imported" in clash
    if precision == "f32":
        pytest.skip("this processor has neither bfloat16 nor float16, so OpenVINO computes in float32 anyway")
    assert message is not None and "computes other numbers" in message


def test_the_example_says_that_openvino_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("openvino") is not None:
        pytest.skip("openvino is installed in this environment")
    backend = example_module(monkeypatch, "mobizo_openvino").MobizoOpenvino()
    with pytest.raises(BackendUnavailableError, match=r"'openvino' cannot be used on this machine: .*openvino"):
        mobizo.compile(TokenWise().eval(), (torch.zeros(2, 5, dtype=torch.int64),), backend=backend)


@pytest.mark.parametrize("padding", [0, 3])
def test_attention_as_products(monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    """The example's own pass, in eager; with padding on the left some queries may attend to nothing."""
    attention = example_module(monkeypatch, "mobizo_openvino.attention")

    class Backend(EagerBackend):
        name = "eager with attention as products"

        def passes(self) -> Any:
            return (attention.AttentionAsProducts(),)

    torch.manual_seed(0)
    model = TinyCausalLM(layers=1).eval()
    inputs, _ = tiny_batch()
    inputs["attention_mask"][:, :padding] = 0
    program = mobizo.compile(model, inputs, LoraConfig(r=3), backend=Backend())
    targets = {node.target for node in program.methods["train_step"].graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets
    with torch.no_grad():
        wanted = model(**inputs)["logits"]
    torch.testing.assert_close(Session(program).evaluate(inputs)["logits"], wanted, rtol=0, atol=2e-5)


def example_module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    for loaded in [module for module in sys.modules if module.split(".")[0] == "mobizo_openvino"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module(name)


# -- plugins that are broken ------------------------------------------------------------------------------------------

SOUND = """
import torch
from mobizo_compiler import backends
from mobizo_compiler.backends.eager import EagerBackend

class Runner:
    def __init__(self, inner):
        self.inner = inner
    def call(self, method, inputs):
        return self.inner.call(method, inputs)
    def state(self):
        return self.inner.state()

class Artifact(backends.Artifact):
    def __init__(self, inner):
        self.inner = inner
    def runner(self):
        return Runner(self.inner.runner())
    def save(self, path):
        self.inner.save(path)

class Mine(EagerBackend):
    name = "mine"
    def lower(self, methods, manifest):
        return Artifact(super().lower(methods, manifest))
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, entry: str = "mine = mine_plugin:Mine") -> None:
    """A real distribution, as pip would leave it."""
    info = folder / "mine_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mobizo_compiler.backends]\n{entry}\n")
    (folder / "mine_plugin.py").write_text(source)
    monkeypatch.delitem(sys.modules, "mine_plugin", raising=False)
    monkeypatch.syspath_prepend(folder)
    assert any(d.metadata["Name"] == "mine-plugin" for d in importlib.metadata.distributions())


def compiled(backend: str) -> mobizo.Program:
    tokens = (torch.zeros(2, 5, dtype=torch.int64),)
    lora = LoraConfig(r=2, target_modules=("up",))
    return mobizo.compile(TokenWise().eval(), tokens, lora, ZOConfig(queries=1), backend=backend)


def assert_neighbours_work() -> None:
    assert {"eager", "portable", "xnnpack"} <= set(backend_names())
    assert get_backend("portable").name == "portable"


@pytest.mark.slow
@pytest.mark.parametrize("files", [False, True])
def test_a_sound_plugin_keeps_the_contract(files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the broken ones below are made from."""
    install(tmp_path, monkeypatch, SOUND + WITH_FILES * files)
    assert backend_names()["mine"] == "mine_plugin:Mine"
    assert "mine_plugin" not in sys.modules, "listing must not import"
    assert_backend_contract("mine")


CANNOT_LOAD = {
    "raises on import": ("raise OSError('libmine.so is missing')", "libmine.so is missing"),
    "leaves on import": ("import sys\nsys.exit('no licence')", "no licence"),
    "has no such class": ("", "Mine"),
    "raises when made": ("class Mine:\n    def __init__(self):\n        raise ValueError('no device')", "no device"),
    "misses members": (
        "class Mine:\n    name = 'mine'\n    def passes(self): return ()\n    def unavailable(self): return None",
        "it has no unsupported, no lower",
    ),
}


@pytest.mark.parametrize("case", CANNOT_LOAD)
def test_a_plugin_that_cannot_be_loaded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = CANNOT_LOAD[case]
    install(tmp_path, monkeypatch, source)
    assert_neighbours_work()
    for use in (get_backend, compiled, assert_backend_contract):
        with pytest.raises(BackendUnavailableError, match=rf"backend 'mine' \(mine_plugin:Mine\).*{reason}"):
            use("mine")


def test_a_plugin_that_claims_the_name_of_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, SOUND, "xnnpack = mine_plugin:Mine\nmine = mine_plugin:Mine")
    assert_neighbours_work()
    assert compiled("eager").parameters
    assert get_backend("mine").name == "mine"
    assert "mine_plugin:Mine" in backend_names()["xnnpack"]
    with pytest.raises(UnknownBackendError, match=r"'xnnpack' is claimed by 'mobizo.*' and by 'mine_plugin:Mine'"):
        get_backend("xnnpack")


def test_the_same_plugin_installed_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        install(tmp_path / name, monkeypatch, SOUND)
    assert get_backend("mine").name == "mine"


MEMBER_FAILS = {
    "unavailable raises": ("unavailable(self): raise KeyError('driver')", BackendUnavailableError, "driver"),
    "unsupported raises": ("unsupported(self, program): raise KeyError('tanh')", BackendUnavailableError, "tanh"),
    "unsupported is no list": ("unsupported(self, program): return True", BackendUnavailableError, "returned True"),
    "passes raises": ("passes(self): raise KeyError('fuse')", BackendUnavailableError, "fuse"),
    "passes are none": ("passes(self): return ['fuse']", BackendUnavailableError, "'fuse'"),
    "lower raises": ("lower(self, methods, manifest): raise KeyError('kernel')", LoweringError, "kernel"),
    "lower gives nothing": ("lower(self, methods, manifest): return None", BackendUnavailableError, "None"),
}


@pytest.mark.parametrize("case", MEMBER_FAILS)
def test_a_member_that_fails(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, error, reason = MEMBER_FAILS[case]
    install(tmp_path, monkeypatch, f"{SOUND}\n    def {method}\n")
    assert_neighbours_work()
    with pytest.raises(error, match=rf"'mine'(.|\n)*mine_plugin:Mine(.|\n)*{reason}"):
        compiled("mine")
    with pytest.raises((AssertionError, BackendUnavailableError), match="'mine'"):
        assert_backend_contract("mine")


# A backend whose file is the number of a program that the process has in memory.
WITH_FILES = """
from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.format.program import Program
class Saved(Artifact):
    def __init__(self, inner, program):
        super().__init__(inner)
        self.program = program
    def save(self, path):
        if not path.parent.is_dir():
            raise ArtifactError("there is no folder", where=str(path))
        number = f"mine {len(Mine.saved):03d}".encode()
        Mine.saved[number] = self.program(self)
        path.write_bytes(number)
def lower(self, methods, manifest):
    lora_a = methods["train_step"].lora_a
    return Saved(EagerBackend.lower(self, methods, manifest), lambda artifact: Program(manifest, artifact, lora_a))
def load(self, path, verify):
    if path.read_bytes() not in Mine.saved:
        raise ArtifactError("it is damaged", where=str(path))
    return Mine.saved[path.read_bytes()]
Mine.suffix, Mine.saved, Mine.lower, Mine.load = ".mine", {}, lower, load
Mine.reads = lambda self, path: path.read_bytes()[:4] == b"mine"
"""

# Each is the end of a plugin, whether `compile` finds out by itself, and what the contract says.
WRONG = {
    "wrong numbers": (
        """
def call(self, method, inputs):
    return [result * 1.01 for result in self.inner.call(method, inputs)]
Runner.call = call
        """,
        True,
        "other numbers",
    ),
    "a state that evaluate does not see": (
        """
def call(self, method, inputs):
    if method != "evaluate":
        return self.inner.call(method, inputs)
    kept = self.inner.state().clone()
    self.inner.state().zero_()
    results = self.inner.call(method, inputs)
    self.inner.state().copy_(kept)
    return results
Runner.call = call
        """,
        True,
        "evaluate",
    ),
    "a state that is lost after the step": (
        """
def call(self, method, inputs):
    kept = self.inner.state().clone()
    results = self.inner.call(method, inputs)
    self.inner.state().copy_(kept)
    return results
Runner.call = call
        """,
        True,
        "state",
    ),
    "a copy in place of the state": ("Runner.state = lambda self: self.inner.state().clone()", True, "other numbers"),
    "one state for all runners": (
        """
def runner(self):
    self.one = getattr(self, "one", None) or Runner(self.inner.runner())
    return self.one
Artifact.runner = runner
        """,
        False,
        "must be zero after loading|share their state",
    ),
    "a state in half precision": (
        """
def call(self, method, inputs):
    results = self.inner.call(method, inputs)
    if method != "evaluate":
        self.inner.state().copy_(self.inner.state().half().float())
    return results
Runner.call = call
        """,
        False,
        "learning rate 0 changed the state|change of the state",
    ),
    "inputs taken for constants": (
        """
def call(self, method, inputs):
    if method == "evaluate":
        inputs = [self.__dict__.setdefault("first", inputs[0].clone())]
    return self.inner.call(method, inputs)
Runner.call = call
        """,
        False,
        "evaluate differs|of evaluate differ",
    ),
    "results in buffers that are used again": (
        """
def call(self, method, inputs):
    results = self.inner.call(method, inputs)
    kept = self.__dict__.setdefault("kept", {}).setdefault(method, results)
    return [a.copy_(b) for a, b in zip(kept, results)]
Runner.call = call
        """,
        False,
        "overwrote",
    ),
    "another name": ('Mine.name = "eager"', False, "name is 'eager'"),
    "other passes every time": (
        """
import dataclasses, itertools
from mobizo_compiler.graph.pipeline import Pass
count = itertools.count()
@dataclasses.dataclass(frozen=True)
class Idle(Pass):
    number: int
    def rewrite(self, edit):
        pass
Mine.passes = lambda self: (Idle(next(count)),)
        """,
        False,
        "equal passes",
    ),
    "a refusal that leaves a file": (
        """
def save(self, path):
    path.write_bytes(b"half")
    self.inner.save(path)
Artifact.save = save
        """,
        False,
        "left a file",
    ),
    "files into folders that are not there": (
        """
def save(self, path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"program")
Artifact.save = save
        """,
        False,
        "no folder",
    ),
    "a file that nobody knows": (
        f"{WITH_FILES}\nMine.reads = lambda self, path: False",
        False,
        "reads.. does not know",
    ),
    "files of everybody": (f"{WITH_FILES}\nMine.reads = lambda self, path: True", False, "claims a file that is no"),
    "a file of another program": (
        WITH_FILES
        + """
def load(self, path, verify):
    import dataclasses
    program = Mine.saved[path.read_bytes()]
    return dataclasses.replace(program, lora_a_by_fqn={name: -a for name, a in program.lora_a_by_fqn.items()})
Mine.load = load
        """,
        False,
        "has another A",
    ),
    "a file that loses what it computes": (
        WITH_FILES
        + """
class Deaf(Runner):
    def call(self, method, inputs):
        return [result * 0 for result in super().call(method, inputs)]
class Foreign(Artifact):
    def runner(self):
        return Deaf(self.inner.runner())
def load(self, path, verify):
    import dataclasses
    program = Mine.saved[path.read_bytes()]
    return dataclasses.replace(program, artifact=Foreign(program.artifact.inner))
Mine.load = load
        """,
        False,
        "loaded from its file, the program is another one: lane losses",
    ),
    "a file that was cut short": (
        WITH_FILES
        + """
Mine.load = lambda self, path, verify: next(iter(Mine.saved.values()))
        """,
        False,
        "where half of the file is missing",
    ),
    "a format that cannot be saved": ("Mine.suffix = '.mine'", False, "save.. refused, but suffix is '.mine'"),
    "a file without a format": (f"{WITH_FILES}\nMine.suffix = None", False, "suffix is None: there is no file format"),
    "state only inside": (
        """
from mobizo_compiler.graph.program import STATE_INPUT
def lower(self, methods, manifest):
    if any(STATE_INPUT in method.inputs for method in methods.values()):
        raise KeyError(STATE_INPUT)
    return Artifact(EagerBackend.lower(self, methods, manifest))
Mine.lower = lower
        """,
        False,
        "mobizo_state",
    ),
}


# One of what `compile` finds, and of what the contract says of runners, members and files.
QUICK = {
    "a state that evaluate does not see",
    "one state for all runners",
    "inputs taken for constants",
    "other passes every time",
    "a refusal that leaves a file",
    "files of everybody",
    "a file of another program",
    "a file that was cut short",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in WRONG])
def test_a_plugin_that_computes_something_else(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, found_by_compile, reason = WRONG[case]
    install(tmp_path, monkeypatch, SOUND + source.strip())
    assert_neighbours_work()
    if found_by_compile:
        with pytest.raises(MobizoError, match="MBZ402"):
            compiled("mine")
    else:
        assert compiled("mine").parameters
    with pytest.raises(AssertionError, match=rf"(?s)backend 'mine'.*({reason})"):
        assert_backend_contract("mine")
