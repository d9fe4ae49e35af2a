"""What tables of tabular benchmarks share: architectures by row, and what their networks reach. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spos_fast.architecture import Architecture, integer_genes
from spos_fast.errors import InputError


class Reference(NamedTuple):
    """A predictor that needs no supernet, or only trained networks: what a supernet's ranking is compared with.

    Attributes:
        name: what it is called in reports.
        predicted: float64 [N], what it ranks the table's rows by.
        true: float64 [N], what its ranking is compared with.
    """

    name: str
    predicted: NDArray[np.float64]
    true: NDArray[np.float64]


class ArchitectureTable(ABC):
    """The networks of a search space, trained one by one. A row is an architecture.

    Accuracies are shares of 1, as everywhere in spos_fast; the official files hold percents.

    Attributes:
        space: name of the search space.
        choices: for every gene the names of its candidates, in the order of the table's indices.
        datasets: data sets that networks were trained on; the first is the default.
        genes: int64 [N, genes], the architectures.
        params: int64 [N], parameters of the networks, normalisation included.
        flops: int64 [N], multiply-accumulates of one forward.
        layout: settings of the space without which its architectures are other networks than the table's.
    """

    layout: ClassVar[dict[str, Any]] = {}
    space: ClassVar[str]
    choices: ClassVar[tuple[tuple[str, ...], ...]]
    datasets: tuple[str, ...]

    def __init__(self, genes: NDArray[np.int64], params: NDArray[np.int64], flops: NDArray[np.int64]) -> None:
        self.genes, self.params, self.flops = genes, params, flops
        self._sizes = tuple(len(names) for names in self.choices)
        if genes.ndim != 2 or genes.shape[1] != len(self._sizes):
            raise InputError(f"genes have shape {list(genes.shape)}; expected [N, {len(self._sizes)}]")
        if not len(genes) or genes.min() < 0 or (genes >= self._sizes).any():
            raise InputError(f"genes are not all below {self._sizes}, or there are none")
        self._row = np.full(int(np.prod(self._sizes)), -1, dtype=np.int64)
        numbers = np.ravel_multi_index(tuple(genes.T), self._sizes)
        self._row[numbers] = np.arange(len(genes))
        if len(np.unique(numbers)) < len(genes):
            raise InputError("an architecture occurs twice")

    def __len__(self) -> int:
        return len(self.genes)

    @abstractmethod
    def truth(self, dataset: str | None = None) -> NDArray[np.float64]:
        """What architectures are ranked by, float64 [N]: test accuracy after the longest training.

        Raises:
            InputError: the table has no such data set.
        """

    @abstractmethod
    def references(self, dataset: str | None = None) -> tuple[Reference, ...]:
        """Predictors to compare a supernet's ranking with, for rows of the table.

        Raises:
            InputError: the table has no such data set.
        """

    @abstractmethod
    def parse(self, text: str) -> tuple[int, ...]:
        """The genes of an architecture's official string.

        Raises:
            InputError: there is no such architecture.
        """

    @abstractmethod
    def string(self, index: int) -> str:
        """The official string of a row's architecture.

        Raises:
            InputError: there is no such row.
        """

    def index(self, arch: Architecture | Sequence[int] | str | int) -> int:
        """The row of an architecture.

        Args:
            arch: an architecture of the whole space, its genes, its official string, or the row itself.

        Raises:
            InputError: the table does not hold it.
        """
        if isinstance(arch, (int, np.integer)) and not isinstance(arch, bool):
            if not 0 <= arch < len(self):
                raise InputError(f"index: got {arch}; the table has rows 0 to {len(self) - 1}")
            return int(arch)
        if isinstance(arch, Architecture):
            if arch.space != self.space:
                raise InputError(f"architecture: belongs to space {arch.space!r}; this table is of {self.space!r}")
            arch = arch.genes
        genes = self.parse(arch) if isinstance(arch, str) else integer_genes(arch)
        return int(self.rows([genes])[0])

    def architecture(self, index: int) -> Architecture:
        """The architecture of a row.

        Raises:
            InputError: there is no such row.
        """
        return Architecture(self.space, tuple(self.genes[self.index(index)].tolist()))

    def rows(self, genes: ArrayLike, choices: Sequence[Sequence[str]] | None = None) -> NDArray[np.int64]:
        """The rows of many architectures.

        Args:
            genes: integers [n, genes].
            choices: names of the candidates that the genes are indices of, where they are not the table's: a reduced
                space numbers its operations anew.

        Returns:
            int64 [n].

        Raises:
            InputError: genes of another form, names that the table does not know, or an architecture that it does not
                hold.
        """
        numbers = np.asarray(genes)
        names = self.choices if choices is None else choices
        if len(names) != len(self._sizes):
            raise InputError(f"choices: got {len(names)} genes; the table's architectures have {len(self._sizes)}")
        if numbers.ndim != 2 or numbers.shape[1] != len(self._sizes) or not np.issubdtype(numbers.dtype, np.integer):
            raise InputError(
                f"genes: got {numbers.dtype} {list(numbers.shape)}; expected integers [n, {len(self._sizes)}]"
            )
        columns = []
        for position, (column, own, given) in enumerate(zip(numbers.T, self.choices, names, strict=True)):
            unknown = [name for name in given if name not in own]
            if unknown:
                raise InputError(f"choices: the table knows no {unknown[0]!r}; it has {', '.join(own)}")
            if len(column) and not 0 <= column.min() <= column.max() < len(given):
                raise InputError(f"genes: gene {position} must be 0 to {len(given) - 1}")
            columns.append(np.array([own.index(name) for name in given])[column])
        found: NDArray[np.int64] = self._row[np.ravel_multi_index(tuple(columns), self._sizes)]
        if (found < 0).any():
            absent = numbers[int((found < 0).argmax())].tolist()
            raise InputError(f"architecture: the table does not hold {absent}")
        return found

    def _dataset(self, dataset: str | None) -> str:
        """The data set of a name that may be written otherwise.

        Raises:
            InputError: the table has none of that name.
        """
        if dataset is None:
            return self.datasets[0]
        if str(dataset).lower() not in self.datasets:
            raise InputError(f"dataset: got {dataset!r}; the table has {', '.join(self.datasets)}")
        return str(dataset).lower()


def shares(percents: ArrayLike, name: str) -> NDArray[np.float64]:
    """Accuracies of a file as shares.

    Raises:
        InputError: one is no percentage.
    """
    values = np.asarray(percents, dtype=np.float64)
    if not ((values >= 0) & (values <= 100)).all():
        raise InputError(f"{name}: holds a value that is no percentage")
    return values / 100
