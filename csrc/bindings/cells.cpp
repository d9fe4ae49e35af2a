// Python's door to csrc/cells. Arguments were checked in spos_fast/nasbench; what is left here keeps memory safe.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/cells/graph.h"
#include "csrc/cells/hash.h"

namespace py = pybind11;

namespace {

using Matrix = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

std::optional<std::string> hash_cell(const Matrix& matrix, const std::vector<int>& labels) {
    const auto n = static_cast<py::ssize_t>(labels.size());
    if (matrix.ndim() != 2 || matrix.shape(0) != n || matrix.shape(1) != n)
        throw py::value_error("matrix must be square, one row a label");
    const auto pruned = spos::cells::prune(spos::cells::make_graph(matrix.data(), labels));
    if (!pruned) return std::nullopt;
    return spos::cells::hash_graph(*pruned);
}

}  // namespace

PYBIND11_MODULE(_cells, module) {
    module.doc() = "The NAS-Bench-101 engine. Use it through spos_fast.nasbench.";
    module.attr("MAX_VERTICES") = spos::cells::kMaxVertices;
    module.def("hash_cell", &hash_cell, py::arg("matrix"), py::arg("labels"),
               "Prune, then hash; None where no path leads from input to output.");
}
