"""A generation of architectures as a prefix tree, and a walk over it that runs every shared prefix once.

Architectures that begin with the same blocks have the same activations up to there, on the same images. The walk goes
depth first: an activation lives until the last module that reads it has run, so memory grows with the depth of the tree
and not with its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from spos_fast.nn.parts import HeadPart, Part
from spos_fast.supernet import Step

Route = tuple[Step, ...]


@dataclass(eq=False)
class Node:
    """A prefix: the part that it ends with, run on what the parent makes.

    Attributes:
        part: the stem's at the root, a block's, the head's at a leaf.
        children: longer prefixes by one part, in the order of the parts.
        leaf: which of the routes ends here; None inside.
    """

    part: Part
    children: list[Node] = field(default_factory=list)
    leaf: int | None = None

    def paths(self) -> list[list[Node]]:
        """For every leaf, by its number, the nodes from here to there."""
        found: dict[int, list[Node]] = {}
        waiting: list[tuple[Node, list[Node]]] = [(self, [])]
        while waiting:
            node, above = waiting.pop()
            path = [*above, node]
            if node.leaf is not None:
                found[node.leaf] = path
            waiting += [(child, path) for child in node.children]
        return [found[leaf] for leaf in sorted(found)]

    def prune(self, alive: Sequence[bool]) -> bool:
        """Take away what only leads to leaves that do not live; whether anything is left."""
        if self.leaf is not None:
            return alive[self.leaf]
        self.children = [child for child in self.children if child.prune(alive)]
        return bool(self.children)


class Parts(NamedTuple):
    """What paths consist of.

    Attributes:
        stem: what all begin with.
        blocks: for every layer the part of each candidate and setting.
        head: what all end with.
    """

    stem: Part
    blocks: list[dict[Step, Part]]
    head: HeadPart

    @property
    def levels(self) -> list[list[Part]]:
        """Those at every depth of the tree."""
        return [[self.stem], *(list(layer.values()) for layer in self.blocks), [self.head]]


def build(parts: Parts, routes: Sequence[Route], shared: int) -> Node:
    """The tree of different routes.

    Args:
        parts: what they run through.
        routes: candidate and setting for every layer; no two are equal.
        shared: the stem and so many blocks are shared; behind, every route has nodes of its own.

    Returns:
        The root. Leaves are numbered as the routes.
    """
    root = Node(parts.stem)
    places: dict[Route, Node] = {}
    # In order, so that the tree does not depend on the order of the routes.
    for leaf in sorted(range(len(routes)), key=lambda index: routes[index]):
        node, route = root, routes[leaf]
        for depth, (layer, choice) in enumerate(zip(parts.blocks, route, strict=True), 1):
            prefix = route[:depth]
            below = places.get(prefix) if depth <= shared else None
            if below is None:
                below = Node(layer[choice])
                node.children.append(below)
                places[prefix] = below
            node = below
        node.children.append(Node(parts.head, leaf=leaf))
    return root


@dataclass
class _Held:
    """An activation and how many parts are still to read it."""

    value: Tensor | None
    readers: int

    def take(self) -> Tensor:
        """The activation; the last reader takes it away."""
        value = self.value
        assert value is not None
        self.readers -= 1
        if self.readers == 0:
            self.value = None
        return value


Run = Callable[[Sequence[Node], list[Tensor]], list[Tensor | None]]


def walk(root: Node, images: Tensor, run: Run, width: int = 1) -> None:
    """Run every node once, parents before children, depth first.

    Args:
        root: of the tree.
        images: what goes into the root.
        run: runs some nodes of one depth, on one input each, and returns their outputs; None from leaves.
        width: at most as many nodes are given to ``run`` at once, and at most as many activations of one depth are
            alive. With more than one, nodes with the same part are given together where they are at hand.
    """
    waiting: list[_Waiting] = [[(root, _Held(images, 1))]]
    del images
    while waiting:
        batch = waiting.pop()
        nodes = [node for node, _ in batch]
        below = _below(nodes, run(nodes, [held.take() for _, held in batch]))
        if width > 1:
            together = {id(part): place for place, part in enumerate(dict.fromkeys(node.part for node, _ in below))}
            below.sort(key=lambda pair: together[id(pair[0].part)])
        waiting += reversed([below[start : start + width] for start in range(0, len(below), width)])


_Waiting = list[tuple[Node, _Held]]


def _below(nodes: Sequence[Node], outputs: Sequence[Tensor | None]) -> _Waiting:
    """The nodes' children with the activations that they read. (A function, so that no name keeps an activation.)"""
    pairs: _Waiting = []
    for node, out in zip(nodes, outputs, strict=True):
        if node.children:
            held = _Held(out, len(node.children))
            pairs += [(child, held) for child in node.children]
    return pairs
