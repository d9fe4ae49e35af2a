// The CUDA source of quantize_weights, run on the CPU by cuda_shim.h, against double precision.
#include "kernels/cuda/quantize_weights.cu"
#include "quantizer_cases.h"

namespace {

using namespace spos;
using spos::cuda::QuantShape;
using spos::test::Quantizers;
using spos::test::Values;

// Few and many channels, runs that no vector width divides, more than a block, output channels that are neighbours.
constexpr QuantShape kShapes[] = {{1, 1, 1}, {1, 5, 9}, {1, 3, 2400}, {1, 40, 16}, {6, 4, 8}, {7, 12, 1}};

struct Bits {
    int32_t bits[2];
    int64_t index = 1;
    explicit Bits(int chosen) : bits{5, chosen} {}
    cuda::BitChoice choice() const { return {bits, &index, true, 2}; }
};

struct Given {
    DType dtype;
    QuantShape shape;
    bool per_channel;
    Values weight, grad;

    Given(DType dtype, QuantShape shape, bool per_channel)
        : dtype(dtype),
          shape(shape),
          per_channel(per_channel),
          weight(dtype, shape.count()),
          grad(dtype, shape.count()) {
        std::mt19937 random(5);
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, 0.3 * normal(random)), grad.set(i, normal(random));
        // The greatest twice, with both signs, in channel 0.
        if (weight.size() > 1 && shape.inner > 1) weight.set(0, -2), weight.set(1, 2);
    }
    cuda::Weights weights() const { return {dtype, shape, per_channel, weight.data()}; }
    int64_t group(int64_t i) const { return per_channel ? i / shape.inner % shape.channels : 0; }
    int64_t groups() const { return per_channel ? shape.channels : 1; }
    double values() const { return static_cast<double>(shape.count()) / groups(); }
};

// What a group of weights has in common, and a weight's code, in double.
struct Reference {
    std::vector<double> greatest, mean, product, ties;

    explicit Reference(const Given& given)
        : greatest(given.groups()), mean(given.groups()), product(given.groups()), ties(given.groups()) {
        for (int64_t i = 0; i < given.weight.size(); ++i) {
            const double w = given.weight[i];
            double& most = greatest[given.group(i)];
            most = std::max(most, std::fabs(w));
            mean[given.group(i)] += std::fabs(w) / given.values();
            product[given.group(i)] += given.grad[i] * std::tanh(w);
        }
        for (int64_t i = 0; i < given.weight.size(); ++i)
            ties[given.group(i)] += std::fabs(given.weight[i]) == greatest[given.group(i)];
    }

    double m(int64_t group) const { return greatest[group] > 0 ? std::tanh(greatest[group]) : 1; }
    double level(double w, int64_t group, int bits) const {
        return ((1 << bits) - 1) * (std::tanh(w) / (2 * m(group)) + 0.5);
    }
    double code(double w, int64_t group, int bits) const {
        if (bits == 1) return w < 0 ? -1 : 1;
        return 2 * std::nearbyint(level(w, group, bits)) - ((1 << bits) - 1);
    }
    double scale(int64_t group, int bits) const { return bits == 1 ? mean[group] : 1.0 / ((1 << bits) - 1); }
    // What one level more changes the code by, if float and double may disagree about it; else 0.
    double doubt(DType dtype, double w, int64_t group, int bits) const {
        const double v = level(w, group, bits), tie = std::fabs(v - std::floor(v) - 0.5);
        return bits > 1 && dtype != DType::float64 && tie < 1e-4 ? 2 : 0;
    }
};

Values workspace_for(const Given& given) {
    return Values(DType::float32, cuda::weights_workspace_bytes(given.weights()) / 4);
}

Values run(const Given& given, const Bits& bits) {
    Values out(given.dtype, given.weight.size()), workspace = workspace_for(given);
    CHECK(cuda::dorefa_weights(given.weights(), bits.choice(), workspace.data(), out.data(), nullptr) == nullptr);
    CHECK(out.guarded() && workspace.guarded());
    return out;
}

Values run_backward(const Given& given, const Bits& bits, bool detach_max) {
    Values out(given.dtype, given.weight.size()), workspace = workspace_for(given);
    CHECK(cuda::dorefa_weights_backward(given.weights(), bits.choice(), detach_max, given.grad.data(), workspace.data(),
                                        out.data(), nullptr) == nullptr);
    CHECK(out.guarded() && workspace.guarded());
    return out;
}

struct Codes {
    std::vector<int8_t> codes;
    Values scale;
};

Codes run_codes(const Given& given, const cuda::StepChoice& lsq) {
    Codes made{std::vector<int8_t>(given.weight.size() + 64, 0x5a),
               Values(test::statistics_of(given.dtype), given.shape.channels)};
    Values workspace = workspace_for(given);
    CHECK(cuda::weight_codes(given.weights(), lsq, workspace.data(), made.codes.data(), made.scale.data(), nullptr) ==
          nullptr);
    CHECK(made.scale.guarded() && workspace.guarded());
    CHECK(std::all_of(made.codes.end() - 64, made.codes.end(), [](int8_t code) { return code == 0x5a; }));
    return made;
}

// Calls run(given) for every dtype and shape, per channel and not.
template <typename Run>
void for_each_case(Run run) {
    for (const DType dtype : test::kDTypes)
        for (const QuantShape& shape : kShapes)
            for (const bool per_channel : {false, true}) run(Given(dtype, shape, per_channel));
}

}  // namespace

// Forwards: the levels; and the codes, whose product with the scale they are.
TEST(dorefa_agrees_with_double_precision) {
    for_each_case([](const Given& given) {
        const Reference exact(given);
        const double unit = test::unit_of_sums(given.dtype);
        for (const int bits : {1, 2, 3, 7, 8}) {
            const Values out = run(given, Bits(bits));
            cuda::StepChoice dorefa{};
            const Bits choice(bits);
            dorefa.bits = choice.choice();
            const Codes codes = run_codes(given, dorefa);
            for (int64_t i = 0; i < out.size(); ++i) {
                const int64_t group = given.group(i), channel = i / given.shape.inner % given.shape.channels;
                const double w = given.weight[i], scale = exact.scale(group, bits);
                const double code = exact.code(w, group, bits), doubt = exact.doubt(given.dtype, w, group, bits);
                const double rounding = test::rounding(given.dtype, code * scale) + 32 * unit * std::fabs(code * scale);
                CHECK_NEAR(out[i], code * scale, rounding + doubt * scale);
                // Of 8 bits half of one less, for the odd codes do not fit.
                const double stored = bits == 8 ? (code - 1) / 2 : code, unit_step = bits == 8 ? 2 * scale : scale;
                CHECK_NEAR(codes.codes[i], stored, bits == 8 ? doubt / 2 : doubt);
                CHECK_NEAR(codes.scale[channel], unit_step, 32 * unit * unit_step);
            }
        }
    });
}

// Backwards: through tanh, and through the maximum, whose share equal ones split.
TEST(dorefa_gradients_agree_with_double_precision) {
    for_each_case([](const Given& given) {
        const Reference exact(given);
        const double unit = test::unit_of_sums(given.dtype);
        for (const int bits : {1, 3})
            for (const bool detach_max : {false, true}) {
                const Values made = run_backward(given, Bits(bits), detach_max);
                for (int64_t i = 0; i < made.size(); ++i) {
                    const int64_t group = given.group(i);
                    const double w = given.weight[i], t = std::tanh(w), m = exact.m(group);
                    const double slope = (1 - t * t) / m;
                    double wanted = given.grad[i] * slope, size = std::fabs(wanted);
                    if (!detach_max && std::fabs(w) == exact.greatest[group]) {
                        const double sign = w > 0 ? 1 : -1;
                        wanted -= sign * slope / m * exact.product[group] / exact.ties[group];
                        size += slope / m * given.values();
                    }
                    if (bits == 1) wanted = size = given.grad[i];
                    // 1 - t^2 loses digits where t is near one.
                    const double slack = 32 * unit * std::fabs(size) / std::max(1 - t * t, 1e-3);
                    CHECK_NEAR(made[i], wanted, test::rounding(given.dtype, wanted) + slack);
                }
            }
    });
}

TEST(lsq_codes_agree_with_double_precision) {
    for_each_case([](const Given& given) {
        const int channels = given.per_channel ? static_cast<int>(given.shape.channels) : 1;
        for (const int bits : {1, 2, 4, 8}) {
            const Quantizers lsq(given.dtype, bits, cuda::QuantMode::lsq, true, false, channels);
            const Codes made = run_codes(given, lsq.choice());
            for (int64_t i = 0; i < given.weight.size(); ++i) {
                const double v = lsq.position(given.weight[i], static_cast<int>(given.group(i)));
                const bool undecided = given.dtype != DType::float64 && lsq.undecided(v);
                CHECK_NEAR(made.codes[i], lsq.code(v), undecided ? 2 : 0);
            }
            for (int64_t c = 0; c < given.shape.channels; ++c)
                CHECK(made.scale[c] == lsq.size(channels == 1 ? 0 : static_cast<int>(c)));
        }
    });
}

// Weights that are all zero are levels like any others, and let a gradient through.
TEST(zeros_are_no_nan) {
    for (const bool per_channel : {false, true})
        for (const int bits : {1, 2}) {
            Given given(DType::float32, {1, 4, 16}, per_channel);
            for (int64_t i = 0; i < 64; ++i) given.weight.set(i, 0);
            const Values out = run(given, Bits(bits)), made = run_backward(given, Bits(bits), false);
            for (int64_t i = 0; i < 64; ++i) {
                CHECK_NEAR(out[i], bits == 1 ? 0.0 : 1.0 / 3, 1e-7);  // a tie, which goes to the even level
                CHECK(made[i] == given.grad[i]);
            }
        }
}

// A NaN makes all that shares its maximum or mean NaN; with LSQ, its channel's scale only.
TEST(nan_is_not_hidden) {
    for (const bool per_channel : {false, true})
        for (const int bits : {1, 2}) {
            Given given(DType::bfloat16, {1, 4, 16}, per_channel);
            given.weight.set(37, std::numeric_limits<double>::quiet_NaN());
            const Bits choice(bits);
            const Values out = run(given, choice);
            cuda::StepChoice dorefa{};
            dorefa.bits = choice.choice();
            const Codes codes = run_codes(given, dorefa);
            const Quantizers steps(DType::bfloat16, bits, cuda::QuantMode::lsq, true, false, per_channel ? 4 : 1);
            const Codes lsq = run_codes(given, steps.choice());
            for (int64_t i = 0; i < 64; ++i) CHECK(std::isnan(out[i]) == (!per_channel || i / 16 == 2));
            for (int c = 0; c < 4; ++c) {
                CHECK(std::isnan(codes.scale[c]) == (!per_channel || c == 2));
                CHECK(std::isnan(lsq.scale[c]) == (c == 2));
            }
            CHECK(codes.codes[37] == 0 && lsq.codes[37] == 0);
        }
}

TEST(the_order_of_threads_changes_no_bit) {
    const Given given(DType::float32, {1, 3, 2400}, false);
    const Values forwards = run(given, Bits(1)), gradient = run_backward(given, Bits(3), false);
    shim::backwards = true;
    CHECK(forwards.same_bits(run(given, Bits(1))) && gradient.same_bits(run_backward(given, Bits(3), false)));
    shim::backwards = false;
}

TEST(what_cannot_be_launched_is_refused) {
    const cuda::Weights weights{DType::float32, {1, int64_t{1} << 30, 1}, true, nullptr};
    const char* error = cuda::dorefa_weights(weights, Bits(1).choice(), nullptr, nullptr, nullptr);
    CHECK(error != nullptr && std::strstr(error, "below 2^30") != nullptr);
}

RUN_TESTS()
