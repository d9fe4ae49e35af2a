"""Cells of NAS-Bench-201: strings and isomorphism classes, against the benchmark's own where it is at hand."""

import numpy as np
import pytest

from spos_fast import InputError
from spos_fast.nasbench.nasbench201_cells import OPS, cell_genes, cell_string, isomorphism_classes, isomorphism_key


def test_a_string_names_the_six_edges_in_the_official_order():
    """The official string of index 0; a wrong order of edges would look up other cells' accuracies."""
    text = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    assert cell_string((4, 2, 1, 2, 1, 1)) == text
    assert cell_genes(text) == (4, 2, 1, 2, 1, 1)


def test_strings_and_genes_are_each_others_inverse_in_every_order_of_operations():
    """A reduced space numbers its operations anew; the strings stay those of the benchmark."""
    ops = ("nor_conv_3x3", "none", "skip_connect")
    for genes in np.random.default_rng(0).integers(3, size=(20, 6)).tolist():
        assert list(cell_genes(cell_string(genes, ops), ops)) == genes
        assert cell_genes(cell_string(genes, ops)) == tuple(OPS.index(ops[gene]) for gene in genes)


@pytest.mark.parametrize("text", ["", "|none~0|", "|none~1|+|none~0|none~1|+|none~0|none~1|none~2|", None, 3])
def test_what_is_no_cell_is_refused(text):
    """Truncated strings and edges in another order."""
    with pytest.raises(InputError, match="cell"):
        cell_genes(text)


def test_an_operation_of_another_space_is_named():
    """A reduced space has no string of the full one's other operations."""
    with pytest.raises(InputError, match="avg_pool_3x3"):
        cell_genes(cell_string((4, 0, 0, 0, 0, 0)), OPS[:4])
    with pytest.raises(InputError, match="genes"):
        cell_string((0, 0, 0, 0, 0, 5))


def test_isomorphic_cells_share_a_key_and_others_do_not():
    """Paths through a skip are those without it; conv order matters."""
    one_path, other_path = (3, 0, 1, 0, 0, 1), (1, 0, 3, 0, 0, 1)  # 0 -> 1 -> 2 -> 3 with one 3x3
    assert isomorphism_key(one_path) == isomorphism_key(other_path)
    assert isomorphism_key((3, 0, 2, 0, 0, 1)) != isomorphism_key((2, 0, 3, 0, 0, 1))


def test_the_classes_are_a_partition_of_the_space():
    """6,466 classes is the benchmark's own count of unique cells."""
    classes = isomorphism_classes()
    assert len(classes) == 6466
    assert len({genes for members in classes for genes in members}) == sum(map(len, classes)) == 5**6


def test_the_classes_are_those_of_the_benchmark(shared_data):
    """Class by class, not only their number."""
    with np.load(shared_data / "nasbench201" / "nasbench201.npz") as table:
        keys = [isomorphism_key(genes) for genes in table["ops"].tolist()]
        pairs = set(zip(keys, table["iso_id"].tolist(), strict=True))
    assert len(pairs) == len({key for key, _ in pairs}) == len({of for _, of in pairs}) == 6466
