// tanh and rounding as vector code, for the instruction sets that this machine has not picked: the target is fixed.
#define SPOS_FIXED_TARGET
#include "csrc/cpu/tanh.h"
#include "tests/csrc/check.h"

using namespace spos::cpu;

namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

TEST(tanh_is_within_two_units_in_the_last_place) {
    double worst = 0;
    for (uint32_t base = 0; base < 0x7f800000u; base += 16 * 1021) {
        FloatPack x;
        for (int lane = 0; lane < kPack; ++lane) x[lane] = from_bits(base + 1021 * lane) * (lane % 2 ? -1 : 1);
        const FloatPack got = any_tanh(x), small = small_tanh(x);
        for (int lane = 0; lane < kPack; ++lane) {
            if (!std::isfinite(x[lane])) continue;
            const double exact = std::tanh(double(x[lane]));
            const double unit = std::nextafter(std::fabs(float(exact)), 2.0f) - std::fabs(float(exact));
            worst = std::max(worst, std::fabs(got[lane] - exact) / unit);
            if (std::fabs(x[lane]) < kSmallTanh) CHECK(small[lane] == got[lane]);
        }
    }
    CHECK(worst <= 1.4);
}

TEST(tanh_at_the_ends) {
    FloatPack x{};
    x[0] = INFINITY, x[1] = -INFINITY, x[2] = NAN, x[3] = 9.2f, x[4] = -3e38f;
    const FloatPack got = any_tanh(x);
    CHECK(got[0] == 1 && got[1] == -1 && std::isnan(got[2]) && got[3] == 1 && got[4] == -1 && got[5] == 0);
}

TEST(codes_round_to_even_and_fit_bytes) {
    for (int first = -128; first < 256; first += 8) {
        FloatPack x{};
        DoublePack wide{};
        for (int lane = 0; lane < kPack; ++lane) x[lane] = wide[lane] = first + 0.5f * lane;
        const FloatPack code = code_of<false>(x, -128.0f, 255.0f);
        const BytePack bytes = bytes_of(x), of_doubles = bytes_of(wide);
        for (int lane = 0; lane < kPack; ++lane) {
            const float wanted = std::min(std::nearbyint(x[lane]), 255.0f);
            CHECK(code[lane] == wanted);
            if (x[lane] > 255) continue;
            CHECK(bytes[lane] == static_cast<uint8_t>(int(wanted)) && of_doubles[lane] == bytes[lane]);
        }
    }
}

RUN_TESTS()
