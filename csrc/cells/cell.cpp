#include "csrc/cells/cell.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace spos::cells {
namespace {

constexpr int kMatrix = kCellVertices * kCellVertices;

// Where the seven bits of a row of the matrix go in Cell::edges.
struct RowTable {
    uint32_t edges[kCellVertices][1 << kCellVertices] = {};
    constexpr RowTable() {
        for (int x = 0; x < kCellVertices; ++x)
            for (int row = 0; row < 1 << kCellVertices; ++row)
                for (int y = x + 1; y < kCellVertices; ++y)
                    if (row >> y & 1) edges[x][row] |= 1u << (x + Cell::column(y));
    }
};
constexpr RowTable kRows;

// Entries on and below the diagonal, one bit an entry.
constexpr uint64_t lower_entries() {
    uint64_t mask = 0;
    for (int x = 0; x < kCellVertices; ++x)
        for (int y = 0; y <= x; ++y) mask |= uint64_t{1} << (x * kCellVertices + y);
    return mask;
}

// Entries outside of the first n rows and columns.
constexpr std::array<uint64_t, kCellVertices + 1> outer_entries() {
    std::array<uint64_t, kCellVertices + 1> masks = {};
    for (int n = 0; n <= kCellVertices; ++n)
        for (int x = 0; x < kCellVertices; ++x)
            for (int y = 0; y < kCellVertices; ++y)
                if (x >= n || y >= n) masks[n] |= uint64_t{1} << (x * kCellVertices + y);
    return masks;
}
constexpr std::array<uint64_t, kCellVertices + 1> kOuter = outer_entries();

// 49 bytes of zeros and ones as 49 bits; false where another value stands. Eight at a time: the product brings the
// lowest bits of all bytes together in the highest byte.
bool entries(const uint8_t* adjacency, uint64_t& bits) {
    bits = 0;
    uint64_t wrong = 0, word;
    for (int i = 0; i < kMatrix - 1; i += 8) {
        std::memcpy(&word, adjacency + i, 8);
        wrong |= word & ~uint64_t{0x0101010101010101};
        bits |= (word * 0x0102040810204080 >> 56) << i;
    }
    const uint64_t last = adjacency[kMatrix - 1];
    bits |= last << (kMatrix - 1);
    return !(wrong | (last & ~uint64_t{1}));
}

}  // namespace

Cell Cell::from_key(uint32_t key) {
    Cell cell;
    cell.edges = key & 0x1fffff;
    cell.ops = static_cast<uint16_t>(key >> 21 & 0x3ff);
    for (int y = 1; y < kCellVertices; ++y)
        if (cell.predecessors(y)) cell.vertices = static_cast<uint8_t>(y + 1);
    return cell;
}

Cell prune(const Cell& cell) {
    const int n = cell.vertices;
    if (n < 2) return {};
    // Edges only lead upwards, so one sweep in each direction finds everything that can be reached.
    uint32_t from_input = 1, to_output = 1u << (n - 1);
    for (int y = 1; y < n; ++y) from_input |= static_cast<uint32_t>((cell.predecessors(y) & from_input) != 0) << y;
    for (int y = n - 1; y > 0; --y) to_output |= cell.predecessors(y) & (0 - (to_output >> y & 1));
    const uint32_t kept = from_input & to_output;
    if (kept == (1u << n) - 1) return cell;
    if (!(kept & 1)) return {};

    Cell pruned;
    int places[kCellVertices];
    for (int y = 0; y < n; ++y) {
        if (!(kept >> y & 1)) continue;
        const int place = pruned.vertices++;
        places[y] = place;
        for (int x = 0; x < y; ++x)
            if (kept >> x & 1 && cell.edge(x, y)) pruned.edges |= 1u << (places[x] + Cell::column(place));
        if (y > 0 && y < n - 1) pruned.ops = static_cast<uint16_t>(pruned.ops | cell.op(y) << 2 * (place - 1));
    }
    return pruned;
}

CellProblem read_cell(const uint8_t* adjacency, const int8_t* ops, int vertices, Cell& cell) {
    if (vertices == 0) {
        const void* output = std::memchr(ops, 0xfe, kCellVertices);
        if (output == nullptr) return CellProblem::last_op;
        vertices = static_cast<int>(static_cast<const int8_t*>(output) - ops) + 1;
    }
    if (vertices < 1 || vertices > kCellVertices) return CellProblem::vertices;
    uint64_t bits;
    if (!entries(adjacency, bits)) return CellProblem::not_binary;
    if (bits & (lower_entries() | kOuter[vertices])) return CellProblem::not_upper_triangular;
    if (ops[vertices - 1] != -2) return CellProblem::last_op;
    if (vertices > 1 && ops[0] != -1) return CellProblem::first_op;

    uint64_t inner = 0;  // a byte an inner vertex
    std::memcpy(&inner, ops + 1, kCellVertices - 2);
    if (vertices < kCellVertices) inner &= vertices > 2 ? (uint64_t{1} << 8 * (vertices - 2)) - 1 : 0;
    if (inner & 0xfcfcfcfcfcfc || inner & inner >> 1 & 0x010101010101) return CellProblem::inner_op;

    cell.vertices = static_cast<uint8_t>(vertices);
    cell.edges = 0;
    for (int x = 0; x < kCellVertices - 1; ++x) cell.edges |= kRows.edges[x][bits >> x * kCellVertices & 0x7f];
    cell.ops = static_cast<uint16_t>((inner & 3) | (inner >> 6 & 0xc) | (inner >> 12 & 0x30) | (inner >> 18 & 0xc0) |
                                     (inner >> 24 & 0x300));
    return CellProblem::none;
}

const char* describe(CellProblem problem) {
    switch (problem) {
        case CellProblem::none:
            return "nothing is wrong";
        case CellProblem::vertices:
            return "vertices must be 1 to 7";
        case CellProblem::not_binary:
            return "adjacency must hold zeros and ones only";
        case CellProblem::not_upper_triangular:
            return "adjacency must be upper triangular, and zero beyond the cell's vertices";
        case CellProblem::first_op:
            return "ops must start with -1 (input)";
        case CellProblem::last_op:
            return "ops must end with -2 (output)";
        case CellProblem::inner_op:
            return "ops between input and output must be 0, 1 or 2";
    }
    return "";
}

void write_cell(const Cell& cell, uint8_t* adjacency, int8_t* ops) {
    std::memset(adjacency, 0, kMatrix);
    std::memset(ops, 0, kCellVertices);
    const int n = cell.vertices;
    for (int y = 1; y < n; ++y)
        for (int x = 0; x < y; ++x) adjacency[x * kCellVertices + y] = cell.edge(x, y);
    for (int v = 1; v < n - 1; ++v) ops[v] = static_cast<int8_t>(cell.op(v));
    if (n > 1) ops[0] = -1;
    if (n > 0) ops[n - 1] = -2;
}

int32_t trainable_parameters(const Cell& cell) {
    // The network of the paper (Ying et al. 2019, section 2.1; channel rule of model_builder.compute_vertex_channels).
    constexpr int kStem = 128, kStacks = 3, kCellsPerStack = 3, kClasses = 10;
    const int n = cell.vertices, output = n - 1;
    // A convolution without bias, and the scale and shift of its batch norm.
    const auto convolution = [](int kernel, int in, int out) { return kernel * kernel * in * out + 2 * out; };
    int total = convolution(3, 3, kStem);
    int in = kStem;
    for (int stack = 0; stack < kStacks; ++stack) {
        const int out = kStem << stack;
        // Channels of the inner vertices: those before the output share its channels, the others take the most that
        // any successor wants.
        int channels[kCellVertices] = {};
        const uint32_t shares = cell.predecessors(output) & ~1u;
        if (shares) {
            const int count = __builtin_popcount(shares);
            int remainder = out % count;
            for (int v = 1; v < output; ++v)
                if (shares >> v & 1) channels[v] = out / count + (remainder-- > 0);
            for (int v = output - 1; v > 0; --v)
                if (!(shares >> v & 1))
                    for (int w = v + 1; w < output; ++w)
                        if (cell.edge(v, w)) channels[v] = std::max(channels[v], channels[w]);
        }
        for (int repeat = 0; repeat < kCellsPerStack; ++repeat) {
            for (int v = 1; v < output; ++v) {
                if (cell.edge(0, v)) total += convolution(1, in, channels[v]);
                if (cell.op(v) < 2) total += convolution(cell.op(v) == 0 ? 3 : 1, channels[v], channels[v]);
            }
            if (cell.edge(0, output)) total += convolution(1, in, out);
            in = out;
        }
    }
    return total + in * kClasses + kClasses;
}

}  // namespace spos::cells
