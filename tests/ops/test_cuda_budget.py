"""What nvcc made of the building blocks' CUDA kernels: registers and local memory, where no GPU is at hand."""

from __future__ import annotations

import re

import pytest

from spos_fast import native
from tests.ops.test_batchnorm_device import resource_usage

# By mangled name: how many variants there are (for one architecture), and the most registers that a thread may have.
# 65536 registers a processor are 96 at five blocks of 128 threads, 128 at four and 168 at three; 80 at three blocks
# of 256. The second stages are short, and few blocks anyway.
BUDGETS = {
    r"\dconvolveI.*Li[35]ELi[12]E": (12, 128),  # 3 dtypes x 2 kernels x 2 strides
    r"\dconvolveI.*Li7ELi[12]E": (6, 168),
    r"\dconvolveI.*Li0ELi0E": (4, 96),  # any kernel and stride, 4 dtypes
    r"\ddata_gradientI.*Li3ELi[12]E": (6, 128),
    r"\ddata_gradientI.*Li[57]ELi[12]E": (12, 168),
    r"\ddata_gradientI.*Li0ELi0E": (4, 128),
    r"\dweight_gradientI.*Li3ELi[12]E": (6, 128),
    r"\dweight_gradientI.*Li[57]ELi[12]E": (12, 168),
    r"\dweight_gradient_of_tapI": (4, 64),
    r"\dnormalise_and_joinI": (8, 80),  # 4 dtypes, vectors and single channels
    r"\dnormalize_columnsI": (8, 80),
    r"\dnormalize_planesI": (8, 80),
    r"\dadd_relu_columnsI": (8, 80),
    r"\dadd_relu_backward_columnsI": (16, 96),  # with and without a batch norm in the shortcut
    r"\dmerge_layersI": (2, 64),
    r"\dfinalize_layersI": (2, 64),
    r"\dsum_of_columnsI": (8, 96),
    r"\dfinish_momentsI": (2, 64),
    r"\dfake_quant_columnsI": (8, 80),
    r"\dfake_quant_runsI": (8, 80),
    r"\dfake_quant_backward_columnsI": (8, 128),
    r"\dfake_quant_backward_runsI": (8, 128),
    r"\dquantize_columnsI": (8, 96),  # at most 128 at two blocks of 256
    r"\dquantize_backward_columnsI": (8, 128),
    r"\d(measure_weights|sum_for_maximum|quantize_dorefa|pass_dorefa_gradient)I": (32, 80),
    r"\dstore_(dorefa|lsq)_codesI": (16, 80),
    r"\d(store_step|store_scales|finish_step|finish_magnitudes)I": (8, 64),
    r"\dfinish_sumsI": (12, 64),
}


def test_kernels_stay_within_budget() -> None:
    """Every variant of every kernel is in the library, for every architecture, within its registers and unspilled."""
    if not native.build_info()["cuda"]:
        pytest.skip(f"no CUDA code was built: {native.build_info()['summary']}")
    usage = resource_usage(native.OPS_LIBRARY)
    for pattern, (variants, most) in BUDGETS.items():
        found = [kernel for kernel in usage if re.search(pattern, kernel[0])]
        assert len({re.sub(r".*?GLOBAL__N__\w+?_cu_\w{8}", "", name) for name, _, _ in found}) == variants, pattern
        for name, registers, stack in found:
            assert registers <= most and stack == 0, (name, registers, stack)
