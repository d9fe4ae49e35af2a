"""NAS-Bench-101 (Ying et al., "NAS-Bench-101: Towards Reproducible Neural Architecture Search", 2019).

Imports no torch.
"""

from spos_fast.nasbench.batch import Cells, count_parameters, enumerate_cells, hash_cells
from spos_fast.nasbench.cell import OPERATIONS, hash_cell
from spos_fast.nasbench.table import Table

__all__ = ["OPERATIONS", "Cells", "Table", "count_parameters", "enumerate_cells", "hash_cell", "hash_cells"]
