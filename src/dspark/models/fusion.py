"""Joins matrix products that share their input (q/k/v, gate/up) into one kernel call, in a traced graph."""

from __future__ import annotations

from collections import defaultdict
from operator import getitem

import torch
from torch import fx


def merge_linears(graph_module: fx.GraphModule) -> int:
    """Rewrite `dspark.linear` nodes with the same input to `linear2`/`linear3`, in place; returns how many it wrote."""
    linear = torch.ops.dspark.linear.default
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is linear:
            groups[node.args[0]].append(node)
    written = 0
    for shared, nodes in groups.items():
        merged = {2: torch.ops.dspark.linear2.default, 3: torch.ops.dspark.linear3.default}.get(len(nodes))
        if merged is None or not _weights_come_first(nodes):
            continue
        with graph_module.graph.inserting_before(nodes[0]):
            call = graph_module.graph.call_function(merged, (shared, *(a for node in nodes for a in node.args[1:])))
            call.meta["val"] = tuple(node.meta["val"] for node in nodes)
            for index, node in enumerate(nodes):
                part = graph_module.graph.call_function(getitem, (call, index))
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)
        for node in nodes:
            graph_module.graph.erase_node(node)
        written += 1
    graph_module.graph.lint()
    graph_module.recompile()
    return written


def _weights_come_first(nodes: list[fx.Node]) -> bool:
    inputs = [argument for node in nodes for argument in node.args[1:] if isinstance(argument, fx.Node)]
    return all(argument.op in ("placeholder", "get_attr") for argument in inputs)
