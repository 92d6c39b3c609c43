"""Recipes for `executorch.export`: a training program for those who export with recipes already.

Importing this module registers them:

    import mobizo_compiler.export_recipe
    recipe = ExportRecipe.get_recipe(MobizoRecipeType.XNNPACK, lora=LoraConfig(r=4))
    executorch.export.export(model, example_inputs=[(ids,)], export_recipe=recipe).save_to_pte("trained.pte")

The pipeline of `executorch.export` makes one method of each model that it is given, and has no place for a stage of
ours. So the model is compiled where a recipe may rewrite the captured program, and where a recipe may look at the
manager of the edge programs, that manager is filled with the methods that were compiled; then ExecuTorch emits them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from executorch.exir import EdgeCompileConfig, EdgeProgramManager
from executorch.export import (
    BackendRecipeProvider,
    ExportRecipe,
    LoweringRecipe,
    RecipeType,
    StageType,
    recipe_registry,
)
from torch import Tensor
from torch.export import ExportedProgram

from mobizo_compiler.api import compile
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.backends.executorch.emit import EdgePrograms, edge_programs_to, emission_config, emit
from mobizo_compiler.errors import CaptureError, ConfigError, NotSupportedYetError

# Inputs are given to `export`, the backend by the name of the recipe; a program of the cache has no edge programs.
_GIVEN_OTHERWISE = ("model", "example_inputs", "backend", "cache_dir")
STAGES = (
    StageType.TORCH_EXPORT,
    StageType.TO_EDGE,
    StageType.EDGE_PROGRAM_MANAGER_TRANSFORM,
    StageType.TO_BACKEND,
    StageType.TO_EXECUTORCH,
)


class MobizoRecipeType(RecipeType):  # type: ignore[misc]
    """What to lower with. `ANY` takes the name of a backend that lowers through ExecuTorch, as `backend_name`."""

    PORTABLE = "mobizo_portable"
    XNNPACK = "mobizo_xnnpack"
    ANY = "mobizo_any"

    @classmethod
    def get_backend_name(cls) -> str:
        """The name under which the provider is registered."""
        return "mobizo"


class MobizoRecipeProvider(BackendRecipeProvider):  # type: ignore[misc]
    """Makes recipes from the options of `mobizo_compiler.compile`."""

    @property
    def backend_name(self) -> str:
        """The name under which the provider is registered."""
        return MobizoRecipeType.get_backend_name()

    def get_supported_recipes(self) -> Sequence[RecipeType]:
        """All of them."""
        return list(MobizoRecipeType)

    def create_recipe(self, recipe_type: RecipeType, **options: Any) -> ExportRecipe | None:
        """A recipe whose export is a training program.

        Args:
            recipe_type: A `MobizoRecipeType`; None is returned for others.
            options: Those of `option_names`, and `backend_name` for the recipe `ANY`.

        Raises:
            ConfigError: An option is unknown or missing.
            UnknownBackendError: There is no backend of that name.
        """
        if not isinstance(recipe_type, MobizoRecipeType):
            return None
        chosen = recipe_type is MobizoRecipeType.ANY
        known = [*option_names(), *(["backend_name"] if chosen else [])]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"the recipe {recipe_type.name} has no option {unknown[0]!r}",
                hint=f"its options are {', '.join(known)}",
            )
        if chosen and "backend_name" not in options:
            raise ConfigError("the recipe ANY needs the name of a backend", hint='backend_name="vulkan", for example')
        backend = get_backend(options.pop("backend_name") if chosen else recipe_type.name.lower())
        return _recipe(recipe_type.value, backend, options)


def option_names() -> list[str]:
    """The options of every recipe: those of `mobizo_compiler.compile` that are not given in another way.

    >>> option_names()[:4]
    ['lora', 'zo', 'loss', 'quantization']
    """
    return [name for name in inspect.signature(compile).parameters if name not in _GIVEN_OTHERWISE]


def _recipe(name: str, backend: Backend, options: dict[str, Any]) -> ExportRecipe:
    compilation = _Compilation(backend, options)
    compilation.recipe = ExportRecipe(
        name=name,
        aten_transform_passes=[compilation.compile],
        lowering_recipe=LoweringRecipe(
            edge_manager_transform_passes=[compilation.fill],
            # The check is about operators that ExecuTorch may lack; the runtime is asked instead, by `compile`.
            edge_compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ),
        executorch_backend_config=compilation.emission,
        pipeline_stages=list(STAGES),
        strict=False,
    )
    return compilation.recipe


class _Compilation:
    """What the two places of the pipeline where a recipe is called have to tell each other."""

    recipe: ExportRecipe

    def __init__(self, backend: Backend, options: dict[str, Any]) -> None:
        self._backend = backend
        self._options = options
        self._lowered: EdgePrograms | None = None
        self.emission = emission_config()

    def compile(self, method: str, captured: ExportedProgram) -> ExportedProgram:
        """Compile the captured model; the smallest method goes on in its place, as all of them come back in `fill`."""
        self._check_recipe()
        if captured.example_inputs is None:
            raise CaptureError("the exported program has no example inputs, which show what is called a row")
        arguments, keywords = captured.example_inputs
        self._check_sizes(captured)
        found: list[EdgePrograms] = []
        with edge_programs_to(found.append):
            program = compile(captured, keywords or arguments, backend=self._backend, **self._options)
        if not found:
            raise ConfigError(
                f"backend {self._backend.name!r} does not lower through ExecuTorch, so that no recipe can use it",
                hint='use backend="xnnpack" or backend="portable", or mobizo_compiler.compile',
            )
        (self._lowered,) = found
        return program.methods["replay" if "replay" in program.methods else "evaluate"].exported

    def fill(self, manager: EdgeProgramManager) -> list[Any]:
        """Give the manager the compiled methods; there is nothing left for a pass to do."""
        lowered, self._lowered = self._lowered, None
        if len(manager.methods) != 1 or lowered is None:
            raise ConfigError(
                f"one model makes one training program, but the pipeline was given {sorted(manager.methods)}",
                hint="export each model for itself",
            )
        if manager.config_methods:
            raise NotSupportedYetError(
                f"the constant methods {sorted(manager.config_methods)} cannot be put into a training program",
                hint="leave constant_methods out",
            )
        if getattr(manager, "_etrecord", None) is not None:
            raise NotSupportedYetError("there is no ETRecord of a training program", hint="generate_etrecord=False")
        # Memory planning keeps the graphs that it has planned, and would plan them again with those of the next export.
        self.emission.memory_planning_pass = emission_config().memory_planning_pass
        # The stage goes on with the manager that it has, and does not take another.
        EdgeProgramManager.__init__(
            manager,
            dict(lowered.methods),
            constant_methods=dict(lowered.constant_methods),
            compile_config=self.recipe.lowering_recipe.edge_compile_config,
        )
        # The last stage calls this with `self.emission`; what is emitted gets its initial state and its checksum.
        manager.to_executorch = functools.partial(emit, manager, state=lowered.state)
        return []

    def _check_sizes(self, captured: ExportedProgram) -> None:
        """Sizes that the user made dynamic have to be named here too: a captured program has lost their names."""
        if self._options.get("dynamic_shapes") is not None or self._options.get("row_axes") is not None:
            return
        names = set(captured.graph_signature.user_inputs)
        for node in captured.graph.nodes:
            if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
                for axis, size in enumerate(node.meta["val"].shape):
                    if axis and not isinstance(size, int):
                        raise ConfigError(
                            f"axis {axis} of input {node.name!r} was exported with a dynamic size, which the recipe "
                            "was not told",
                            hint="give get_recipe(...) the dynamic_shapes that export(...) is given",
                        )

    def _check_recipe(self) -> None:
        """Options of a recipe that its stages would pass over in silence, or that would undo what was lowered."""
        if self.recipe.quantization_recipe is not None:
            raise ConfigError(
                "a recipe of mobizo_compiler runs no quantization_recipe",
                hint="give the recipe quantization=..., or quantize the model before",
            )
        if self.recipe.lowering_recipe.partitioners:
            raise ConfigError(
                "a recipe of mobizo_compiler has its partitioners from its backend",
                hint="write a backend: docs/writing_a_backend.md",
            )


recipe_registry.register_backend_recipe_provider(MobizoRecipeProvider())
