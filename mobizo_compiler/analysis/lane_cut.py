"""Where to repeat the rows for all lanes: a minimum cut of the dataflow graph (networkx).

A value that no perturbation reaches is the same in all lanes. It can be computed once, on the rows of one lane, and
be repeated where a perturbed value needs it; or it can be computed for all lanes from repeated inputs. Every such
value is on one of two sides, single or repeated, and what is computed from a repeated value is repeated. A cut
between the sides costs the bytes of what is repeated at it, and, for every value on the repeated side, the work that
is done `lanes - 1` times too often.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch import fx

from mobizo_compiler.analysis.axes import Layout, RowAxes
from mobizo_compiler.analysis.costs import tensor_bytes, work_bytes

# A call costs about as much as moving some kilobytes.
CALL_BYTES = 4096


def perturbed_by(source: fx.Node) -> set[fx.Node]:
    """All nodes that depend on `source`, with itself."""
    found, pending = {source}, [source]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def duplication_points(axes: RowAxes, perturbed: set[fx.Node], lanes: int) -> dict[fx.Node, int]:
    """The values to repeat, each with the axis of its rows.

    Args:
        axes: Row layouts of the values that are not perturbed, in a graph with one lane.
        perturbed: The values that differ from lane to lane.
        lanes: How many lanes there will be.

    Returns:
        Values on the single side with a user on the repeated side. Inputs may be among them.
    """
    single = {node: layout for node, layout in axes.layouts.items() if layout is not None and node not in perturbed}
    if not any(node.op == "call_function" for node in single):
        return {node: layout.axis for node, layout in single.items() if isinstance(layout, Layout)}
    network = nx.DiGraph()
    network.add_nodes_from(["single", "repeated"])
    for node, layout in single.items():
        if node.op == "call_function":
            network.add_edge("single", node, capacity=(lanes - 1) * _work(node, single))
        else:
            network.add_edge("single", node)  # an input is there before anything is repeated
        copies = ("copies of", node)
        if isinstance(layout, Layout) and layout.outer == 1 and layout.kind != "index":
            network.add_edge(node, copies, capacity=lanes * tensor_bytes(node) + CALL_BYTES)
        else:
            network.add_edge(node, copies)  # its rows cannot be repeated as one block
        for user in node.users:
            if user in single:
                network.add_edge(copies, user)
                network.add_edge(user, node)
            elif user in perturbed or user.op == "output":
                network.add_edge(copies, "repeated")
    _, (once, _) = nx.minimum_cut(network, "single", "repeated")
    points = {}
    for node, layout in single.items():
        if node in once and ("copies of", node) not in once:
            assert isinstance(layout, Layout), node
            points[node] = layout.axis
    return points


def _work(node: fx.Node, single: Mapping[fx.Node, object]) -> int:
    """What computing a value costs, in bytes."""
    return work_bytes(node, (inner for inner in node.all_input_nodes if inner in single)) + CALL_BYTES
