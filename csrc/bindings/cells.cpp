// Python's door to csrc/cells. Arguments were checked in spos_fast/nasbench; what is left here keeps memory safe.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "csrc/cells/cell.h"
#include "csrc/cells/convert.h"
#include "csrc/cells/enumerate.h"
#include "csrc/cells/error.h"
#include "csrc/cells/graph.h"
#include "csrc/cells/hash.h"
#include "csrc/cells/table.h"

namespace py = pybind11;
using namespace spos::cells;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// --- One cell, as the user writes it ---

std::optional<std::string> hash_cell(const Array<uint8_t>& matrix, const std::vector<int>& labels) {
    const auto n = static_cast<py::ssize_t>(labels.size());
    if (matrix.ndim() != 2 || matrix.shape(0) != n || matrix.shape(1) != n)
        throw py::value_error("matrix must be square, one row a label");
    const auto pruned = prune(make_graph(matrix.data(), labels));
    if (!pruned) return std::nullopt;
    return hash_graph(*pruned);
}

template <typename T>
bool read_edges(const py::array& matrix, int n, Cell& cell) {
    const auto* bytes = static_cast<const char*>(matrix.data());
    const auto row = matrix.strides(0), column = matrix.strides(1);
    for (int x = 0; x < n; ++x)
        for (int y = 0; y < n; ++y) {
            T value;
            std::memcpy(&value, bytes + x * row + y * column, sizeof value);
            if (value == T{0}) continue;
            if (value != T{1} || y <= x) return false;
            cell.edges |= 1u << (x + Cell::column(y));
        }
    return true;
}

bool is(PyObject* text, const char* wanted) {
    return PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, wanted) == 0;
}

constexpr const char* kOpNames[kOps] = {"conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"};

// The quick way for what most callers have: a numpy matrix of at most 7 vertices and a list of names. False for all
// else, right or wrong, which then goes the careful way in Python.
bool read_plain(py::handle matrix, py::handle ops, Cell& cell) {
    if (!py::isinstance<py::array>(matrix) || !PyList_Check(ops.ptr())) return false;
    const auto array = py::reinterpret_borrow<py::array>(matrix);
    if (array.ndim() != 2 || array.shape(0) != array.shape(1)) return false;
    const auto n = static_cast<int>(array.shape(0));
    if (n < 2 || n > kCellVertices || PyList_GET_SIZE(ops.ptr()) != n) return false;
    cell.vertices = static_cast<uint8_t>(n);
    const char kind = array.dtype().kind();
    const auto size = array.itemsize();
    bool good = false;
    if (size == 1 && (kind == 'i' || kind == 'u' || kind == 'b')) good = read_edges<int8_t>(array, n, cell);
    if (size == 4 && kind == 'i') good = read_edges<int32_t>(array, n, cell);
    if (size == 8 && kind == 'i') good = read_edges<int64_t>(array, n, cell);
    if (size == 8 && kind == 'f') good = read_edges<double>(array, n, cell);
    if (!good || !is(PyList_GET_ITEM(ops.ptr(), 0), "input") || !is(PyList_GET_ITEM(ops.ptr(), n - 1), "output"))
        return false;
    for (int v = 1; v < n - 1; ++v) {
        int op = 0;
        while (op < kOps && !is(PyList_GET_ITEM(ops.ptr(), v), kOpNames[op])) ++op;
        if (op == kOps) return false;
        cell.ops = static_cast<uint16_t>(cell.ops | op << 2 * (v - 1));
    }
    return true;
}

// --- Batches ---

struct Batch {
    Array<uint8_t> adjacency;
    Array<int8_t> ops;
    std::optional<Array<int32_t>> vertices;

    size_t size() const { return static_cast<size_t>(adjacency.shape(0)); }

    void check() const {
        const auto n = adjacency.ndim() == 3 ? adjacency.shape(0) : -1;
        if (n < 0 || adjacency.shape(1) != kCellVertices || adjacency.shape(2) != kCellVertices || ops.ndim() != 2 ||
            ops.shape(0) != n || ops.shape(1) != kCellVertices ||
            (vertices && (vertices->ndim() != 1 || vertices->shape(0) != n)))
            throw py::value_error("adjacency must be [N, 7, 7], ops [N, 7] and vertices [N]");
    }

    // Cells [begin, begin + count), pruned. Needs no GIL.
    void read(size_t begin, size_t count, Cell* cells) const {
        const uint8_t* matrices = adjacency.data();
        const int8_t* labels = ops.data();
        const int32_t* sizes = vertices ? vertices->data() : nullptr;
        for (size_t i = 0; i < count; ++i) {
            const size_t at = begin + i;
            Cell cell;
            // 0 would ask to look for the output; from the user it is as wrong as 8.
            const int n = !sizes ? 0 : sizes[at] == 0 ? -1 : sizes[at];
            const auto problem =
                read_cell(matrices + at * kCellVertices * kCellVertices, labels + at * kCellVertices, n, cell);
            if (problem != CellProblem::none) throw InputError("cell " + std::to_string(at) + ": " + describe(problem));
            cells[i] = prune(cell);
        }
    }
};

constexpr size_t kPiece = 4096;  // cells at a time: they stay in the cache

py::list hash_batch(const Batch& batch) {
    batch.check();
    std::vector<Digest> hashes(batch.size());
    std::vector<bool> valid(batch.size());
    {
        py::gil_scoped_release release;
        std::vector<Cell> piece(kPiece);
        std::vector<Digest> found(kPiece);
        std::vector<size_t> at(kPiece);
        Cell* cells = piece.data();
        for (size_t begin = 0; begin < batch.size(); begin += kPiece) {
            const size_t count = std::min(kPiece, batch.size() - begin);
            batch.read(begin, count, cells);
            size_t kept = 0;
            for (size_t i = 0; i < count; ++i) {
                if (cells[i].vertices == 0) continue;
                valid[begin + i] = true;
                at[kept] = begin + i;
                cells[kept++] = cells[i];
            }
            hash_cells(cells, kept, found.data());
            for (size_t i = 0; i < kept; ++i) hashes[at[i]] = found[i];
        }
    }
    py::list result(batch.size());
    for (size_t i = 0; i < batch.size(); ++i)
        result[i] = valid[i] ? py::object(py::str(to_hex(hashes[i]))) : py::none();
    return result;
}

// Cells of at most that many vertices: (hashes S32 [N], adjacency [N, 7, 7], ops [N, 7], vertices [N], params [N])
py::tuple enumerate(int most_vertices) {
    Enumeration all;
    {
        py::gil_scoped_release release;
        all = enumerate_cells(most_vertices);
    }
    const auto n = static_cast<py::ssize_t>(all.cells.size());
    py::array hashes(py::dtype("S32"), std::vector<py::ssize_t>{n});
    py::array_t<uint8_t> adjacency({n, py::ssize_t{kCellVertices}, py::ssize_t{kCellVertices}});
    py::array_t<int8_t> ops({n, py::ssize_t{kCellVertices}}), vertices(n);
    py::array_t<int32_t> params(n);
    for (py::ssize_t i = 0; i < n; ++i) {
        const Cell& cell = all.cells[i];
        write_hex(all.hashes[i], static_cast<char*>(hashes.mutable_data()) + 32 * i);
        write_cell(cell, adjacency.mutable_data(i, 0, 0), ops.mutable_data(i, 0));
        vertices.mutable_at(i) = static_cast<int8_t>(cell.vertices);
        params.mutable_at(i) = trainable_parameters(cell);
    }
    return py::make_tuple(hashes, adjacency, ops, vertices, params);
}

// Of pruned cells; 0 for one that is invalid.
py::array_t<int32_t> count_parameters(const Batch& batch) {
    batch.check();
    py::array_t<int32_t> params(static_cast<py::ssize_t>(batch.size()));
    for (size_t i = 0; i < batch.size(); ++i) {
        Cell cell;
        batch.read(i, 1, &cell);
        params.mutable_at(i) = cell.vertices == 0 ? 0 : trainable_parameters(cell);
    }
    return params;
}

// --- The table ---

class OpenTable {
  public:
    explicit OpenTable(const std::string& path) : table_(std::make_shared<Table>(Table::open(path))) {}

    const Table& get() const {
        if (!table_) throw InputError("the table was closed");
        return *table_;
    }
    // For work without the GIL: another thread may close the table meanwhile.
    std::shared_ptr<const Table> share() const { return get(), table_; }
    void close() { table_.reset(); }

    uint32_t row(py::ssize_t index) const {
        if (index < 0 || index >= static_cast<py::ssize_t>(get().size()))
            throw py::index_error("row " + std::to_string(index) + " of a table of " + std::to_string(get().size()));
        return static_cast<uint32_t>(index);
    }

    // Row, or -1; -2 where the arguments are for the careful way.
    py::ssize_t find(py::handle matrix, py::handle ops) const {
        Cell cell;
        if (!read_plain(matrix, ops, cell)) return -2;
        return get().find(prune(cell));
    }

    py::ssize_t find_hash(const std::string& hash) const {
        const auto digest = from_hex(hash);
        return digest ? get().find(*digest) : Table::kNone;
    }

    py::tuple cell(py::ssize_t index) const {
        const CellRow found = get().cell(row(index));
        const Cell cell = Cell::from_key(found.key);
        const int n = cell.vertices;
        py::array_t<int8_t> adjacency({n, n});
        for (int x = 0; x < n; ++x)
            for (int y = 0; y < n; ++y) adjacency.mutable_at(x, y) = cell.edge(x, y);
        py::list ops(n);
        static const py::handle input = py::str("input").release(), output = py::str("output").release();
        static const py::handle names[] = {py::str(kOpNames[0]).release(), py::str(kOpNames[1]).release(),
                                           py::str(kOpNames[2]).release()};
        for (int v = 0; v < n; ++v) ops[v] = v == 0 ? input : v == n - 1 ? output : names[std::min(cell.op(v), 2)];
        return py::make_tuple(adjacency, ops, found.parameters);
    }

    std::string hash(py::ssize_t index) const { return to_hex(get().cell(row(index)).hash); }

    // (training_time, train_accuracy, validation_accuracy, test_accuracy), or None where there is no such record.
    py::object metrics(py::ssize_t index, py::ssize_t epochs, py::ssize_t repeat, bool halfway) const {
        const Table& table = get();
        const uint32_t r = row(index);
        const int epoch = table.epoch_index(epochs);
        if (epoch < 0 || repeat < 0 || repeat >= static_cast<py::ssize_t>(table.repeats())) return py::none();
        const float* found = table.values(r) + ((epoch * table.repeats() + repeat) * kPoints + !halfway) * kMetrics;
        if (found[0] != found[0]) return py::none();
        return py::make_tuple(found[0], found[1], found[2], found[3]);
    }

    py::ssize_t repeats_of(py::ssize_t index, py::ssize_t epochs) const {
        const int epoch = get().epoch_index(epochs);
        return epoch < 0 ? 0 : get().repeats_of(row(index), epoch);
    }

  private:
    std::shared_ptr<const Table> table_;
};

// Metric by metric [..., epochs, repeats, points] out of rows of [epochs, repeats, points, metrics].
py::dict to_numpy(const OpenTable& open) {
    const auto shared = open.share();
    const Table& table = *shared;
    const auto n = static_cast<py::ssize_t>(table.size());
    const auto epochs = static_cast<py::ssize_t>(table.epochs().size()), repeats = py::ssize_t{table.repeats()};
    py::array hashes(py::dtype("S32"), std::vector<py::ssize_t>{n});
    py::array_t<uint8_t> adjacency({n, py::ssize_t{kCellVertices}, py::ssize_t{kCellVertices}});
    py::array_t<int8_t> ops({n, py::ssize_t{kCellVertices}}), vertices(n);
    py::array_t<int32_t> params(n);
    py::array_t<float> metrics[kMetrics];
    for (auto& metric : metrics) metric = py::array_t<float>({n, epochs, repeats, py::ssize_t{kPoints}});
    {
        auto* names = static_cast<char*>(hashes.mutable_data());
        uint8_t* matrices = adjacency.mutable_data();
        int8_t *labels = ops.mutable_data(), *sizes = vertices.mutable_data();
        int32_t* counts = params.mutable_data();
        float* out[kMetrics];
        for (int m = 0; m < kMetrics; ++m) out[m] = metrics[m].mutable_data();
        const size_t points = static_cast<size_t>(epochs * repeats * kPoints);
        py::gil_scoped_release release;
        for (uint32_t row = 0; row < table.size(); ++row) {
            const CellRow found = table.cell(row);
            const Cell cell = Cell::from_key(found.key);
            write_hex(found.hash, names + size_t{row} * 32);
            write_cell(cell, matrices + size_t{row} * kCellVertices * kCellVertices,
                       labels + size_t{row} * kCellVertices);
            sizes[row] = static_cast<int8_t>(cell.vertices);
            counts[row] = found.parameters;
            const float* values = table.values(row);
            for (size_t p = 0; p < points; ++p)
                for (int m = 0; m < kMetrics; ++m) out[m][row * points + p] = values[p * kMetrics + m];
        }
    }
    using namespace py::literals;
    return py::dict("hashes"_a = hashes, "adjacency"_a = adjacency, "ops"_a = ops, "vertices"_a = vertices,
                    "params"_a = params, "epochs"_a = py::array_t<int32_t>(epochs, table.epochs().data()),
                    "training_time"_a = metrics[kTrainingTime], "train_accuracy"_a = metrics[kTrainAccuracy],
                    "validation_accuracy"_a = metrics[kValidationAccuracy], "test_accuracy"_a = metrics[kTestAccuracy]);
}

// Rows [N] and metrics [N, repeats] of cells at one number of epochs; -1 and NaN for a cell that is not there.
py::dict lookup(const OpenTable& open, const Batch& batch, py::ssize_t epochs, bool halfway) {
    batch.check();
    const auto shared = open.share();
    const Table& table = *shared;
    const int epoch = table.epoch_index(epochs);
    if (epoch < 0) throw py::value_error("no such epochs");
    const auto n = static_cast<py::ssize_t>(batch.size()), repeats = py::ssize_t{table.repeats()};
    py::array_t<int64_t> rows(n);
    py::array_t<int32_t> params(n);
    py::array_t<float> metrics[kMetrics];
    for (auto& metric : metrics) metric = py::array_t<float>({n, repeats});
    {
        int64_t* row = rows.mutable_data();
        int32_t* counts = params.mutable_data();
        float* out[kMetrics];
        for (int m = 0; m < kMetrics; ++m) out[m] = metrics[m].mutable_data();
        py::gil_scoped_release release;
        std::vector<Cell> piece(kPiece);
        Cell* cells = piece.data();
        for (size_t begin = 0; begin < batch.size(); begin += kPiece) {
            const size_t count = std::min(kPiece, batch.size() - begin);
            batch.read(begin, count, cells);
            table.find(cells, count, row + begin);
            for (size_t i = begin; i < begin + count; ++i) {
                const bool known = row[i] != Table::kNone;
                const auto r = static_cast<uint32_t>(row[i]);
                counts[i] = known ? table.cell(r).parameters : 0;
                const float* values =
                    known ? table.values(r) + (epoch * repeats * kPoints + !halfway) * kMetrics : nullptr;
                for (py::ssize_t k = 0; k < repeats; ++k)
                    for (int m = 0; m < kMetrics; ++m)
                        out[m][i * repeats + k] = known ? values[k * kPoints * kMetrics + m] : NAN;
            }
        }
    }
    using namespace py::literals;
    return py::dict("rows"_a = rows, "params"_a = params, "training_time"_a = metrics[kTrainingTime],
                    "train_accuracy"_a = metrics[kTrainAccuracy],
                    "validation_accuracy"_a = metrics[kValidationAccuracy], "test_accuracy"_a = metrics[kTestAccuracy]);
}

py::tuple convert_file(const std::string& from, const std::string& to) {
    py::gil_scoped_release release;
    const Converted converted = convert(from, to, [] {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
    });
    py::gil_scoped_acquire acquire;
    return py::make_tuple(converted.records, converted.cells);
}

}  // namespace

PYBIND11_MODULE(_cells, module) {
    module.doc() = "The NAS-Bench-101 engine. Use it through spos_fast.nasbench.";
    module.attr("MAX_VERTICES") = kMaxVertices;
    py::register_local_exception_translator([](std::exception_ptr caught) {
        try {
            if (caught) std::rethrow_exception(caught);
        } catch (const InputError& error) {
            py::set_error(py::module_::import("spos_fast.errors").attr("InputError"), error.what());
        }
    });

    module.def("hash_cell", &hash_cell, py::arg("matrix"), py::arg("labels"),
               "Prune, then hash; None where no path leads from input to output.");
    module.def(
        "hash_cells",
        [](const Array<uint8_t>& adjacency, const Array<int8_t>& ops, std::optional<Array<int32_t>> vertices) {
            return hash_batch({adjacency, ops, std::move(vertices)});
        },
        py::arg("adjacency"), py::arg("ops"), py::arg("vertices"));
    module.def("enumerate", &enumerate);
    module.def(
        "count_parameters",
        [](const Array<uint8_t>& adjacency, const Array<int8_t>& ops, std::optional<Array<int32_t>> vertices) {
            return count_parameters({adjacency, ops, std::move(vertices)});
        },
        py::arg("adjacency"), py::arg("ops"), py::arg("vertices"));
    module.def("convert", &convert_file, py::arg("tfrecord"), py::arg("table"), "Records read, cells written.");

    py::class_<OpenTable>(module, "Table")
        .def(py::init<std::string>(), py::arg("path"))
        .def("__len__", [](const OpenTable& self) { return self.get().size(); })
        .def_property_readonly("epochs", [](const OpenTable& self) { return self.get().epochs(); })
        .def_property_readonly("repeats", [](const OpenTable& self) { return self.get().repeats(); })
        .def_property_readonly("records", [](const OpenTable& self) { return self.get().records(); })
        .def("find", &OpenTable::find, py::arg("matrix"), py::arg("ops"))
        .def("find_hash", &OpenTable::find_hash, py::arg("hash"))
        .def("cell", &OpenTable::cell, py::arg("row"))
        .def("hash", &OpenTable::hash, py::arg("row"))
        .def("metrics", &OpenTable::metrics, py::arg("row"), py::arg("epochs"), py::arg("repeat"), py::arg("halfway"))
        .def("repeats_of", &OpenTable::repeats_of, py::arg("row"), py::arg("epochs"))
        .def("to_numpy", &to_numpy)
        .def(
            "lookup",
            [](const OpenTable& self, const Array<uint8_t>& adjacency, const Array<int8_t>& ops,
               std::optional<Array<int32_t>> vertices, py::ssize_t epochs,
               bool halfway) { return lookup(self, {adjacency, ops, std::move(vertices)}, epochs, halfway); },
            py::arg("adjacency"), py::arg("ops"), py::arg("vertices"), py::arg("epochs"), py::arg("halfway"))
        .def("verify",
             [](const OpenTable& self) {
                 const auto table = self.share();
                 py::gil_scoped_release release;
                 table->verify();
             })
        .def("close", &OpenTable::close);
}
