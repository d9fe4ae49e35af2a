"""An architecture is a small immutable value: the name of its space and one gene a choice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spos_fast.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """One point of a search space: hashable, comparable, and the same in Python, JSON and a run folder.

    Build it with ``space.architecture(genes)``, which also checks that the genes are in the space's range.

    Attributes:
        space: name of the space that the genes belong to, e.g. ``"shufflenet_v2"``.
        genes: index of the chosen candidate, one a gene of the space.
    """

    space: str
    genes: tuple[int, ...]

    def to_json(self) -> str:
        """The architecture as one line of JSON: ``{"space": ..., "genes": [...]}``."""
        return json.dumps({"space": self.space, "genes": list(self.genes)})

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: the text is no JSON object with a ``space`` string and a ``genes`` list of integers.
        """
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"architecture: not JSON ({error})") from None
        if not isinstance(value, dict) or not isinstance(value.get("space"), str) or "genes" not in value:
            raise InputError(f'architecture: expected {{"space": NAME, "genes": [..]}}, got {text.strip()[:80]!r}')
        return cls(value["space"], integer_genes(value["genes"]))

    def __str__(self) -> str:
        return "-".join(map(str, self.genes))


def integer_genes(genes: Any) -> tuple[int, ...]:
    """``genes`` as a tuple of Python integers; numpy integers are welcome, floats and booleans are not.

    Raises:
        InputError: ``genes`` is no sequence of integers.
    """
    if not isinstance(genes, Iterable) or isinstance(genes, (str, bytes)):
        raise InputError(f"genes: expected a sequence of integers, got {genes!r}")
    out = []
    for position, gene in enumerate(genes):
        if isinstance(gene, bool) or not hasattr(gene, "__index__"):
            raise InputError(f"genes: gene {position} is {gene!r}; expected an integer")
        out.append(gene.__index__())
    return tuple(out)
