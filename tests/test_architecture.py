"""An architecture is a value: equal, hashable, frozen, and the same after a trip through JSON."""

import dataclasses

import numpy as np
import pytest

from spos_fast import Architecture, InputError


def test_json_round_trip_gives_an_equal_value():
    """A run folder, a file and Python name the same architecture."""
    arch = Architecture("shufflenet_v2", (0, 3, 1))
    assert Architecture.from_json(arch.to_json()) == arch
    assert hash(Architecture.from_json(arch.to_json())) == hash(arch)
    assert str(arch) == "0-3-1"


def test_it_cannot_be_changed():
    """It is a key of score caches."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Architecture("shufflenet_v2", (0,)).genes = (1,)  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", '{"space": 3, "genes": [0]}', '{"space": "a"}', '{"space": "a", "genes": [0.5]}', "{"]
)
def test_foreign_json_is_refused_in_one_line(text):
    """A wrong file gives one clear line."""
    with pytest.raises(InputError) as caught:
        Architecture.from_json(text)
    assert "\n" not in str(caught.value)


def test_numpy_integers_become_python_integers(tiny_space):
    """Genes from numpy code hash and serialise like any others; floats and booleans are refused."""
    arch = tiny_space.architecture(np.array([0, 1, 2, 3]))
    assert arch.genes == (0, 1, 2, 3) and all(type(gene) is int for gene in arch.genes)
    for wrong in ([0.0, 1, 2, 3], [True, 1, 2, 3], "0123", 7):
        with pytest.raises(InputError):
            tiny_space.architecture(wrong)
