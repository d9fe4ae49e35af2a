#include "csrc/cells/record.h"

#include <array>
#include <cmath>
#include <cstring>

#include "csrc/cells/error.h"

namespace spos::cells {
namespace {

constexpr const char* kMetricNames[kMetrics] = {"training_time", "train_accuracy", "validation_accuracy",
                                                "test_accuracy"};
constexpr std::string_view kOpNames[kOps] = {"conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"};

// A value of the record for a message: cut short, and without bytes that would break the line.
std::string quoted(std::string_view text) {
    std::string shown = "'";
    for (char c : text.substr(0, 60)) shown += c >= ' ' && c <= '~' ? c : '?';
    return shown + (text.size() > 60 ? "...'" : "'");
}

// --- JSON ---

class Json {
  public:
    explicit Json(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

    void expect(char wanted) {
        skip_space();
        if (at_ == end_ || *at_ != wanted) fail(std::string("'") + wanted + "' is missing");
        ++at_;
    }

    void end() {
        skip_space();
        if (at_ != end_) fail("more follows after the list");
    }

    int32_t integer() {
        skip_space();
        const char* begin = at_;
        int64_t value = 0;
        while (at_ < end_ && *at_ >= '0' && *at_ <= '9' && value <= INT32_MAX) value = value * 10 + (*at_++ - '0');
        const bool more = at_ < end_ && (*at_ == '.' || *at_ == 'e' || *at_ == 'E' || (*at_ >= '0' && *at_ <= '9'));
        if (at_ == begin || more || value > INT32_MAX || (*begin == '0' && at_ - begin > 1))
            fail("epochs are no whole number");
        return static_cast<int32_t>(value);
    }

    void string(std::string& text) {
        expect('"');
        text.clear();
        for (;;) {
            const char* plain = at_;
            while (at_ < end_ && *at_ != '"' && *at_ != '\\' && static_cast<unsigned char>(*at_) >= ' ') ++at_;
            text.append(plain, at_);
            if (at_ == end_) fail("a string does not end");
            const char c = *at_++;
            if (c == '"') return;
            if (c != '\\') fail("a control character stands in a string");
            if (at_ == end_) fail("a string does not end");
            escape(*at_++, text);
        }
    }

  private:
    [[noreturn]] static void fail(const std::string& what) {
        throw InputError("not the JSON list of a record: " + what);
    }

    void skip_space() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
    }

    void escape(char c, std::string& text) {
        static constexpr std::string_view kShort = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
        const size_t found = kShort.find(c);
        if (found != std::string_view::npos) {
            text += kMeant[found];
            return;
        }
        // Every string of a record is ASCII, so \u beyond it is as wrong as a letter that does not belong.
        unsigned code = 0;
        if (c != 'u' || end_ - at_ < 4) fail("a wrong escape in a string");
        for (int i = 0; i < 4; ++i, ++at_) {
            const char digit = *at_;
            code <<= 4;
            if (digit >= '0' && digit <= '9')
                code |= static_cast<unsigned>(digit - '0');
            else if ((digit | 32) >= 'a' && (digit | 32) <= 'f')
                code |= static_cast<unsigned>((digit | 32) - 'a' + 10);
            else
                fail("a wrong escape in a string");
        }
        text += code < 128 ? static_cast<char>(code) : '?';
    }

    const char *at_, *end_;
};

// --- base64 ---

constexpr uint8_t kNoDigit = 64;

constexpr std::array<uint8_t, 256> base64_digits() {
    std::array<uint8_t, 256> digits = {};
    for (auto& digit : digits) digit = kNoDigit;
    const char* alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; ++i) digits[static_cast<unsigned char>(alphabet[i])] = static_cast<uint8_t>(i);
    return digits;
}
constexpr std::array<uint8_t, 256> kBase64 = base64_digits();

// RFC 2045: groups of four digits with line breaks between; `text` loses the breaks.
void decode_base64(std::string& text, std::vector<uint8_t>& bytes) {
    size_t kept = 0;
    for (size_t i = 0; i < text.size();) {
        const void* line_end = std::memchr(text.data() + i, '\n', text.size() - i);
        size_t end = line_end ? static_cast<size_t>(static_cast<const char*>(line_end) - text.data()) : text.size();
        const size_t next = line_end ? end + 1 : end;
        if (end > i && text[end - 1] == '\r') --end;
        std::memmove(text.data() + kept, text.data() + i, end - i);
        kept += end - i;
        i = next;
    }
    text.resize(kept);
    if (kept == 0 || kept % 4 != 0) throw InputError("metrics are no base64: " + std::to_string(kept) + " digits");
    const size_t padding = text[kept - 1] != '=' ? 0 : text[kept - 2] != '=' ? 1 : 2;
    for (size_t i = kept - padding; i < kept; ++i) text[i] = 'A';  // zeros, cut off below

    bytes.resize(kept / 4 * 3);
    uint8_t seen = 0;
    for (size_t i = 0, out = 0; i < kept; i += 4, out += 3) {
        const auto digit = [&](size_t j) { return kBase64[static_cast<unsigned char>(text[i + j])]; };
        const uint32_t a = digit(0), b = digit(1), c = digit(2), d = digit(3);
        seen |= static_cast<uint8_t>(a | b | c | d);
        const uint32_t group = a << 18 | b << 12 | c << 6 | d;
        bytes[out] = static_cast<uint8_t>(group >> 16);
        bytes[out + 1] = static_cast<uint8_t>(group >> 8);
        bytes[out + 2] = static_cast<uint8_t>(group);
    }
    if (seen & kNoDigit) throw InputError("metrics are no base64: a character that is no digit");
    for (; bytes.size() > kept / 4 * 3 - padding; bytes.pop_back())
        if (bytes.back() != 0) throw InputError("metrics are no base64: bits behind the end");
}

// --- protobuf ---

class Message {
  public:
    Message(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

    bool done() const { return at_ == end_; }

    // Field number and wire type.
    std::pair<uint64_t, int> tag() {
        const uint64_t value = varint();
        if (value >> 3 == 0 || value >> 32) fail("a field has an impossible number");
        return {value >> 3, static_cast<int>(value & 7)};
    }

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (at_ == end_) fail("it ends inside a number");
            const uint8_t byte = *at_++;
            value |= static_cast<uint64_t>(byte & 127) << shift;
            if (byte < 128) return value;
        }
        fail("a number is longer than 64 bits");
    }

    double fixed64() {
        double value;
        std::memcpy(&value, take(8), 8);
        return value;
    }

    Message message() {
        const uint64_t size = varint();
        return {take(size), static_cast<size_t>(size)};
    }

    // A field that is not known here.
    void skip(int wire) {
        if (wire == 0)
            varint();
        else if (wire == 1)
            take(8);
        else if (wire == 2)
            message();
        else if (wire == 5)
            take(4);
        else
            fail("a field has an impossible type");
    }

    [[noreturn]] static void fail(const std::string& what) {
        throw InputError("metrics are no ModelMetrics message: " + what);
    }

  private:
    const uint8_t* take(uint64_t size) {
        if (size > static_cast<uint64_t>(end_ - at_)) fail("it ends inside a field");
        at_ += size;
        return at_ - size;
    }

    const uint8_t *at_, *end_;
};

constexpr uint64_t kFewestParameters = 227'274, kMostParameters = 49'979'274;  // over all 423,624 cells
constexpr int kVarint = 0, kFixed64 = 1, kBytes = 2;

// One EvaluationData. The value of each metric as float32, which is what the official file holds in its doubles.
void read_evaluation(Message message, const std::string& name, double epoch, float* metrics) {
    enum { kEpoch = 1, kFirstMetric = 2 };
    double values[kMetrics];
    unsigned seen = 0;
    while (!message.done()) {
        const auto [field, wire] = message.tag();
        if (field < kEpoch || field >= kFirstMetric + kMetrics) {
            message.skip(wire);
            continue;
        }
        if (wire != kFixed64) Message::fail("field " + std::to_string(field) + " of " + name + " is no double");
        const double value = message.fixed64();
        if (field == kEpoch) {
            if (!(std::abs(value - epoch) <= 0.5))
                throw InputError(name + ": current_epoch " + std::to_string(value) + " is not about " +
                                 std::to_string(epoch));
            continue;
        }
        values[field - kFirstMetric] = value;
        seen |= 1u << (field - kFirstMetric);
    }
    for (int i = 0; i < kMetrics; ++i) {
        const std::string_view metric = kMetricNames[i];
        if (!(seen >> i & 1)) throw InputError(name + " has no " + std::string(metric));
        const double value = values[i];
        const double most = i == kTrainingTime ? 1e9 : 1;  // seconds: some thirty years
        const auto refuse = [&](const char* why) {
            char text[40];
            std::snprintf(text, sizeof text, "%.17g", value);
            throw InputError(name + ": " + std::string(metric) + " " + text + " " + why);
        };
        if (!(value >= 0 && value <= most))
            refuse(i == kTrainingTime ? "is no time in seconds" : "is not within 0 and 1");
        metrics[i] = static_cast<float>(value);
        if (static_cast<double>(metrics[i]) != value) refuse("is no float32 value, as all of the official file are");
    }
}

void read_metrics(const std::vector<uint8_t>& bytes, Record& record) {
    enum { kEvaluation = 1, kParameters = 2 };
    static const std::string names[] = {"evaluation 0", "evaluation 1 (halfway)", "evaluation 2 (final)"};
    Message message(bytes.data(), bytes.size());
    int evaluations = 0;
    bool counted = false;
    while (!message.done()) {
        const auto [field, wire] = message.tag();
        if (field == kEvaluation) {
            if (wire != kBytes) Message::fail("evaluation_data is no message");
            const Message evaluation = message.message();
            // The first one, before training, is read by nobody.
            if (evaluations == 1 || evaluations == 2)
                read_evaluation(evaluation, names[evaluations], record.epochs * 0.5 * evaluations,
                                record.metrics[evaluations - 1]);
            ++evaluations;
        } else if (field == kParameters) {
            if (wire != kVarint) Message::fail("trainable_parameters is no number");
            const uint64_t value = message.varint();
            if (value < kFewestParameters || value > kMostParameters)
                throw InputError("trainable_parameters " + std::to_string(static_cast<int64_t>(value)) +
                                 " is not within " + std::to_string(kFewestParameters) + " and " +
                                 std::to_string(kMostParameters) + ", as all of the space are");
            record.parameters = static_cast<int32_t>(value);
            counted = true;
        } else {
            message.skip(wire);
        }
    }
    if (evaluations != 3)
        throw InputError("metrics hold " + std::to_string(evaluations) +
                         " evaluations; expected 3 (start, halfway, final)");
    if (!counted) throw InputError("metrics have no trainable_parameters");
    if (record.metrics[1][kTrainingTime] < record.metrics[0][kTrainingTime])
        throw InputError("training_time falls from evaluation 1 (halfway) to evaluation 2 (final)");
}

// --- the graph ---

Cell read_graph(const std::string& adjacency, const std::string& operations) {
    Cell cell;
    int n = 0;
    while (n <= kCellVertices && static_cast<size_t>(n) * n < adjacency.size()) ++n;
    if (n < 2 || n > kCellVertices || static_cast<size_t>(n) * n != adjacency.size())
        throw InputError("adjacency of " + std::to_string(adjacency.size()) +
                         " characters is no matrix of 2 to 7 vertices");
    cell.vertices = static_cast<uint8_t>(n);
    for (int x = 0; x < n; ++x)
        for (int y = 0; y < n; ++y) {
            const char entry = adjacency[static_cast<size_t>(x * n + y)];
            if (entry == '0') continue;
            if (entry != '1') throw InputError("adjacency " + quoted(adjacency) + " holds more than zeros and ones");
            if (y <= x) throw InputError("adjacency " + quoted(adjacency) + " is not upper triangular");
            cell.edges |= 1u << (x + Cell::column(y));
        }

    std::string_view rest = operations;
    for (int v = 0; v < n; ++v) {
        const size_t comma = rest.find(',');
        const std::string_view name = rest.substr(0, comma);
        if ((comma == std::string_view::npos) != (v == n - 1))
            throw InputError("operations " + quoted(operations) + " are not " + std::to_string(n));
        rest.remove_prefix(v == n - 1 ? rest.size() : comma + 1);
        if (v == 0 || v == n - 1) {
            const std::string_view wanted = v == 0 ? "input" : "output";
            if (name != wanted)
                throw InputError("operations " + quoted(operations) + " must begin with input and end with output");
            continue;
        }
        int op = 0;
        while (op < kOps && name != kOpNames[op]) ++op;
        if (op == kOps) throw InputError("operation " + quoted(name) + " is unknown");
        cell.ops = static_cast<uint16_t>(cell.ops | op << 2 * (v - 1));
    }
    if (!(prune(cell) == cell))
        throw InputError("adjacency " + quoted(adjacency) + " has vertices on no path from input to output");
    if (cell.edge_count() > kCellEdges)
        throw InputError("adjacency " + quoted(adjacency) + " has more than " + std::to_string(kCellEdges) + " edges");
    return cell;
}

}  // namespace

Record RecordParser::parse(std::string_view data) {
    Record record;
    Json json(data);
    json.expect('[');
    json.string(texts_[0]);
    json.expect(',');
    record.epochs = json.integer();
    for (int i = 1; i < 4; ++i) {
        json.expect(',');
        json.string(texts_[i]);
    }
    json.expect(']');
    json.end();

    const auto hash = from_hex(texts_[0]);
    if (!hash) throw InputError("module hash " + quoted(texts_[0]) + " is not 32 lower-case hexadecimal digits");
    record.hash = *hash;
    if (record.epochs < 1) throw InputError("epochs must be positive, got " + std::to_string(record.epochs));
    record.cell = read_graph(texts_[1], texts_[2]);
    decode_base64(texts_[3], message_);
    read_metrics(message_, record);
    return record;
}

}  // namespace spos::cells
