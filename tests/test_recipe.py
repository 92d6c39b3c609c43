"""Recipes of `executorch.export`: the same program as `compile` makes, and no option that is passed over in silence."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executorch.export import (
    ExportRecipe,
    ExportSession,
    QuantizationRecipe,
    RecipeType,
    StageType,
    export,
    recipe_registry,
)
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import Dim

import mobizo_compiler as mobizo
import mobizo_compiler.export_recipe as recipes
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.backends.executorch import emit
from mobizo_compiler.backends.executorch.program_file import LORA_A_METHOD, MANIFEST_METHOD
from mobizo_compiler.errors import ConfigError, NotSupportedYetError, UnknownBackendError
from mobizo_compiler.export_recipe import MobizoRecipeProvider, MobizoRecipeType
from mobizo_compiler.testing import TokenWise

pytestmark = pytest.mark.xdist_group("recipe")  # one process, so that its programs are made once

# Of so high a rank that a second copy of the state would be more than what files differ by in padding and history.
OPTIONS: dict[str, Any] = {
    "lora": LoraConfig(r=48, lora_alpha=5, target_modules=("up", "head")),
    "zo": ZOConfig(queries=2),
}
SMALL: dict[str, Any] = {**OPTIONS, "lora": LoraConfig(r=3, lora_alpha=5, target_modules=("up",))}
TOKENS = torch.arange(15).reshape(3, 5) % 11


def exported(recipe: ExportRecipe, model: Any = None, inputs: Any = None, **more: Any) -> ExportSession:
    return export(
        TokenWise().eval() if model is None else model,
        example_inputs=[(TOKENS,)] if inputs is None else inputs,
        export_recipe=recipe,
        **more,
    )


def portable(**more: Any) -> ExportRecipe:
    return ExportRecipe.get_recipe(MobizoRecipeType.PORTABLE, **{**SMALL, **more})


@pytest.fixture(
    scope="module",
    params=[MobizoRecipeType.PORTABLE, pytest.param(MobizoRecipeType.XNNPACK, marks=pytest.mark.slow)],
    ids=lambda kind: kind.name,
)
def tiny(request: pytest.FixtureRequest) -> tuple[TokenWise, str, ExportSession]:
    """A model, the backend, and the model exported with the recipe of that backend."""
    torch.manual_seed(2)
    model = TokenWise().eval()
    recipe = ExportRecipe.get_recipe(request.param, **OPTIONS)
    return model, request.param.name.lower(), exported(recipe, model)


def test_a_recipe_gives_the_program_of_compile(tiny: tuple[TokenWise, str, ExportSession], tmp_path: Path) -> None:
    """Bit for bit, as one engine runs the same operators; from a B that is not zero."""
    model, backend, session = tiny
    inputs, labels = (TOKENS,), TOKENS
    path = tmp_path / "recipe.pte"
    path.write_bytes(session.get_pte_buffer())
    session.save_to_pte(str(tmp_path / "saved"))
    assert (tmp_path / "saved.pte").read_bytes() == path.read_bytes()
    loaded, compiled = mobizo.load(path), mobizo.compile(model, inputs, backend=backend, **OPTIONS)
    # How a program came about differs: the recipe starts from a graph that was exported.
    alike = [dataclasses.replace(p.manifest, history={}, outline=()) for p in (loaded, compiled)]
    assert alike[0] == alike[1]
    larger = path.stat().st_size - compiled.artifact.path.stat().st_size  # type: ignore[attr-defined]
    assert larger < 4 * compiled.parameters, "the initial state is in the file once"
    assert all(torch.equal(loaded.lora_a(s.fqn), compiled.lora_a(s.fqn)) for s in compiled.sites)
    start = torch.randn(compiled.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
    found, wanted = Session(loaded), Session(compiled)
    for runner in (found, wanted):
        runner.load_state(start)
    for seed in range(3):
        step = {"seed": seed, "learning_rate": 0.05, "eps": 0.02}
        left, right = (runner.train_step(inputs, labels, **step) for runner in (found, wanted))
        assert torch.equal(left.lane_losses, right.lane_losses)
        assert torch.equal(left.projected_gradient, right.projected_gradient)
        assert torch.equal(found.state(), wanted.state())
    assert not torch.equal(found.state(), start)
    for runner in (found, wanted):
        runner.replay(7, left.projected_gradient, 0.05)
    assert torch.equal(found.state(), wanted.state())
    assert torch.equal(found.evaluate(inputs), wanted.evaluate(inputs))


def test_what_a_session_says_is_about_the_training_program(
    tiny: tuple[TokenWise, str, ExportSession], capsys: pytest.CaptureFixture[str]
) -> None:
    """The delegates of every method, and the same methods wherever they are asked for."""
    _, backend, session = tiny
    manager = session.get_edge_program_manager()
    assert manager.methods == {"train_step", "evaluate", "replay"}
    assert manager.config_methods == {MANIFEST_METHOD, LORA_A_METHOD}
    assert session.get_executorch_program_manager().methods == manager.methods
    information = session.get_stage_artifacts()[StageType.TO_BACKEND].get_context("delegation_info_by_method")
    assert set(information) == manager.methods
    assert bool(information["train_step"].num_delegated_subgraphs) is (backend == "xnnpack")
    assert information["train_step"].num_non_delegated_nodes > information["replay"].num_non_delegated_nodes
    session.print_delegation_info()
    assert "method 'train_step'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recipe_can_be_used_again(tmp_path: Path) -> None:
    recipe = portable()
    first = exported(recipe).get_pte_buffer()
    other = TokenWise().eval()
    with torch.no_grad():
        other.head.weight.zero_()
    second = exported(recipe, other).get_pte_buffer()
    path = tmp_path / "program.pte"
    for buffer, same in ((first, False), (second, True)):
        path.write_bytes(buffer)
        result = Session(path).train_step((TOKENS,), TOKENS, seed=1, learning_rate=0.1, eps=0.01)
        # Logits of zero are 11 equal probabilities, whatever the adapter of `up` does before them.
        assert torch.allclose(result.lane_losses, torch.full((4,), 11.0).log(), rtol=0, atol=1e-6) is same


@pytest.mark.slow
def test_a_captured_model_goes_in_as_its_module_and_the_state_in_a_data_file(tmp_path: Path) -> None:
    model = TokenWise().eval()
    program = torch.export.export(model, (TOKENS,))
    with pytest.raises(ValueError, match="already exported"):
        exported(portable(), program)
    path = tmp_path / "program.pte"
    path.write_bytes(exported(portable(state="data"), program.module()).get_pte_buffer())
    session = Session(path)
    assert [site.fqn for site in session.program.sites] == ["up"]
    session.load_state(torch.ones(session.program.parameters))
    again = Runtime.get().load_program(path, data_path=session.export_ptd(tmp_path / "ones.ptd"))
    assert bool((again.load_method("evaluate")._method.get_attribute("mobizo_lora_b") == 1).all())


@pytest.mark.slow
def test_dynamic_sizes(tmp_path: Path) -> None:
    """`export` makes them dynamic, the recipe names them."""
    shapes = ({0: Dim("rows", max=9), 1: Dim("tokens", max=16)},)
    path = tmp_path / "dynamic.pte"
    path.write_bytes(exported(portable(dynamic_shapes=({1: shapes[0][1]},)), dynamic_shapes=shapes).get_pte_buffer())
    program = mobizo.load(path)
    assert program.manifest.inputs[0].shape == (3, "tokens")
    session = Session(program)
    for length in (5, 9):
        tokens = torch.arange(3 * length).reshape(3, length) % 11
        result = session.train_step((tokens,), tokens, seed=1, learning_rate=0.1, eps=0.01)
        assert result.lane_losses.isfinite().all()
    with pytest.raises(ConfigError, match=r"axis 1 of input 'tokens'(.|\n)*dynamic_shapes"):
        exported(portable(), dynamic_shapes=shapes)


@pytest.mark.slow
def test_any_backend_that_lowers_through_executorch(tmp_path: Path) -> None:
    """And two options of `compile`: one that changes the program, and one that shows it."""
    lines: list[str] = []
    options = {**SMALL, "state": "io", "progress": lines.append}
    path = tmp_path / "any.pte"
    recipe = ExportRecipe.get_recipe(MobizoRecipeType.ANY, backend_name="portable", **options)
    path.write_bytes(exported(recipe).get_pte_buffer())
    manifest = mobizo.load(path).manifest
    assert (manifest.backend, manifest.state) == ("portable", "io")
    assert [line.partition(":")[0] for line in lines] == ["capture", "rewrite", "lower", "check"]
    with pytest.raises(ConfigError, match=r"eager(.|\n)*not lower through ExecuTorch"):
        exported(ExportRecipe.get_recipe(MobizoRecipeType.ANY, backend_name="eager", **SMALL))
    with pytest.raises(UnknownBackendError, match="tpu"):
        ExportRecipe.get_recipe(MobizoRecipeType.ANY, backend_name="tpu")
    with pytest.raises(ConfigError, match="needs the name of a backend"):
        ExportRecipe.get_recipe(MobizoRecipeType.ANY)


@pytest.mark.parametrize("option", ["rank", "cache_dir", "example_inputs", "backend_name"])
def test_unknown_options(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"PORTABLE has no option '{option}'(.|\n)*lora, zo, loss, quantization"):
        portable(**{option: "x"})


def test_options_of_the_wrong_type_are_refused_by_compile() -> None:
    with pytest.raises(ConfigError, match="lora must be a LoraConfig"):
        exported(portable(lora=3))


def _with_quantization_recipe(recipe: ExportRecipe) -> None:
    recipe.quantization_recipe = QuantizationRecipe()


def _with_partitioner(recipe: ExportRecipe) -> None:
    recipe.lowering_recipe.partitioners = [object()]


@pytest.mark.parametrize(
    ("change", "message"),
    [(_with_quantization_recipe, "runs no quantization_recipe"), (_with_partitioner, "partitioners from its backend")],
)
def test_changes_that_would_be_passed_over(change: Any, message: str) -> None:
    recipe = portable()
    change(recipe)
    with pytest.raises(ConfigError, match=message):
        exported(recipe)


@pytest.fixture
def compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the compilation where what comes after it is refused."""

    @functools.wraps(mobizo.compile)
    def compile(captured: Any, inputs: Any, **options: Any) -> Any:
        listener = emit._listener.get()
        assert listener is not None
        listener(emit.EdgePrograms({}, {}, "shared"))
        return SimpleNamespace(methods={"replay": SimpleNamespace(exported=captured)})

    monkeypatch.setattr(recipes, "compile", compile)


@pytest.mark.usefixtures("compiled_at_once")
def test_arguments_of_export_that_cannot_be_honoured() -> None:
    with pytest.raises(NotSupportedYetError, match=r"constant methods \['answer'\]"):
        exported(portable(), constant_methods={"answer": 42})
    with pytest.raises(NotSupportedYetError, match="ETRecord"):
        exported(portable(), generate_etrecord=True)
    two: dict[str, Tensor | torch.nn.Module] = {"a": TokenWise().eval(), "b": TokenWise().eval()}
    with pytest.raises(ConfigError, match=r"one model(.|\n)*\['a', 'b'\]"):
        exported(portable(), two, {name: [(TOKENS,)] for name in two})


def test_the_provider_is_registered_once() -> None:
    name = MobizoRecipeType.get_backend_name()
    assert list(recipe_registry.list_backends()).count(name) == 1
    assert recipe_registry.get_supported_recipes(name) == list(MobizoRecipeType)
    before = {kind: kind.value for kind in MobizoRecipeType}
    assert importlib.import_module("mobizo_compiler.export_recipe") is recipes
    recipe_registry.register_backend_recipe_provider(MobizoRecipeProvider())
    assert list(recipe_registry.list_backends()).count(name) == 1
    assert {kind: kind.value for kind in MobizoRecipeType} == before

    class Foreign(RecipeType):
        FP32 = "fp32"

        @classmethod
        def get_backend_name(cls) -> str:
            return name

    assert MobizoRecipeProvider().create_recipe(Foreign.FP32) is None
