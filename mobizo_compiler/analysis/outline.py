"""A model as a person speaks of it: blocks in the order in which they run, alike layers counted as one.

`inspect --graph` draws it, so it is in the manifest: the graphs themselves do not travel with a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from mobizo_compiler.analysis.costs import multiply_adds, size_hint, tensor_bytes
from mobizo_compiler.analysis.lane_cut import perturbed_by
from mobizo_compiler.format.manifest import Block, Lanes
from mobizo_compiler.graph.program import STATE, STATE_INPUT, GraphProgram
from mobizo_compiler.step.sites import Site

_Key = tuple[str, str]  # name and kind of a block
ROOT = "(the model itself)"
_DEPTH = 2  # how many names of a path make a block, where no layer is repeated


def outline(captured: GraphProgram, methods: Mapping[str, GraphProgram], rows: int) -> tuple[Block, ...]:
    """The blocks of a model.

    Args:
        captured: The inference graph.
        methods: What it was rewritten to.
        rows: Rows of one call.
    """
    sites = methods["train_step"].sites
    lanes = _lanes(methods["evaluate"], methods["train_step"])
    scale = rows / _captured_rows(captured, rows)
    blocks: dict[_Key, list[fx.Node]] = {}
    indices: dict[_Key, set[str]] = {}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            key, index = _block(node)
            blocks.setdefault(key, []).append(node)
            indices.setdefault(key, set()).add(index)
    owned = _owners(sites, indices)
    seen: set[fx.Node] = set()
    found = []
    for key, nodes in blocks.items():
        members = indices[key]
        weights = {n for node in nodes for n in node.all_input_nodes if n.op == "placeholder"} - seen
        seen |= weights
        found.append(
            Block(
                key[0].replace("*", next(iter(members))) if len(members) == 1 else key[0],
                key[1],
                len(members),
                len(nodes),
                round(sum(map(multiply_adds, nodes)) * scale),
                sum(tensor_bytes(node) for node in weights if node.name not in captured.inputs),
                dict(Counter(owned[key])),
                _of_all(lanes.get(key, set())),
            )
        )
    return tuple(found)


def _block(node: fx.Node) -> tuple[tuple[str, str], str]:
    """Name and kind of the block of a node, and which of the alike layers it is in.

    >>> node = fx.Graph().placeholder("x")
    >>> node.meta["nn_module_stack"] = {"": ("", "Model"), "a": ("layers.3", "Layer"), "b": ("layers.3.up", "Linear")}
    >>> _block(node)
    (('layers.*', 'Layer'), '3')
    """
    kinds = {str(path): _class_name(kind) for path, kind in (node.meta.get("nn_module_stack") or {}).values()}
    path = next(reversed(kinds), "")
    if not path or path.startswith("_empty_nn_module_stack"):  # what torch.export writes where it knows of no module
        return (ROOT, ""), ""
    name, index = _name(path)
    return (name, kinds.get(name.replace("*", index), "")), index


def _name(path: str) -> tuple[str, str]:
    """Name of the block that a module is in, with a star for its first index, and that index."""
    parts = path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if numbered is None:
        return ".".join(parts[:_DEPTH]), ""
    return ".".join([*parts[:numbered], "*"]), parts[numbered]


def _class_name(kind: object) -> str:
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))).rpartition(".")[2]


def _captured_rows(captured: GraphProgram, rows: int) -> int:
    inputs = captured.inputs
    return next((size_hint(inputs[name].shape[axis]) for name, axis in captured.rows.items()), rows)


def _owners(sites: Sequence[Site], blocks: Mapping[_Key, set[str]]) -> dict[_Key, list[str]]:
    """The last names of the adapted layers of each block; a weight that is no module's belongs to what uses it."""
    found: dict[_Key, list[str]] = {key: [] for key in blocks}
    for site in sites:
        name, index = _name(site.fqn)
        inside = [key for key, members in blocks.items() if key[0] == name and index in members]
        around = [key for key in blocks if key[0] == ROOT or site.fqn.startswith(key[0] + ".")]
        nearest = sorted(around, key=lambda key: (key[0] == ROOT, -len(key[0])))
        for key in (inside or nearest)[:1]:
            found[key].append(site.fqn.rpartition(".")[2])
    return found


def _lanes(evaluate: GraphProgram, step: GraphProgram) -> dict[_Key, set[bool]]:
    """Of every block, whether values of it are there once (False) or in every lane (True).

    A value that depends on the state differs from lane to lane. Any other was repeated if it is larger than the same
    value of `evaluate`.
    """
    differ: set[fx.Node] = set()
    buffers = step.exported.graph_signature.inputs_to_buffers
    for node in step.graph.find_nodes(op="placeholder"):
        if buffers.get(node.name) == STATE or node.name == STATE_INPUT:
            differ |= perturbed_by(node)
    sizes = {key: tensor_bytes(node) for key, node in _numbered(evaluate)}
    found: dict[_Key, set[bool]] = {}
    for key, node in _numbered(step):
        if node in differ or key in sizes:
            found.setdefault(_block(node)[0], set()).add(node in differ or tensor_bytes(node) > sizes[key])
    return found


def _numbered(program: GraphProgram) -> Iterable[tuple[tuple[str, str, int], fx.Node]]:
    """The nodes of modules, each with its path, its operator and how many such nodes came before it."""
    seen: Counter[tuple[str, str]] = Counter()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            key = str(list(stack.values())[-1][0]), str(node.target)
            yield (*key, seen[key]), node
            seen[key] += 1


def _of_all(lanes: set[bool]) -> Lanes:
    return "none" if True not in lanes else "some" if False in lanes else "all"
