"""NAS-Bench-101 (Ying et al., "NAS-Bench-101: Towards Reproducible Neural Architecture Search", 2019).

Imports no torch.
"""

from spos_fast.nasbench.cell import OPERATIONS, hash_cell

__all__ = ["OPERATIONS", "hash_cell"]
