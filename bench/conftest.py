"""Options of ``pytest bench/``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Peers that take long to build are asked for."""
    group = parser.getgroup("spos_fast benchmarks")
    group.addoption("--compile-peers", action="store_true", help="torch.compile peers too: minutes of compiling")
