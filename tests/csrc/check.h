// A test runner in a page: TEST(name) { CHECK(condition); CHECK_NEAR(got, wanted, tolerance); } and RUN_TESTS().
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace spos::test {

struct Case {
    const char* name;
    void (*run)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

inline int failures = 0;

inline bool add(const char* name, void (*run)()) {
    cases().push_back({name, run});
    return true;
}

inline void check(bool good, const char* file, int line, const std::string& what) {
    if (good) return;
    ++failures;
    if (failures <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline void check_near(double got, double wanted, double tolerance, const char* file, int line, const char* what) {
    const bool good = std::fabs(got - wanted) <= tolerance;  // false for a NaN
    if (good) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s: got %.10g, wanted %.10g within %.2g", what, got, wanted, tolerance);
    check(false, file, line, text);
}

inline int run_all() {
    int failed = 0;
    for (const Case& test : cases()) {
        const int before = failures;
        test.run();
        std::printf("%s %s\n", failures == before ? "ok    " : "FAILED", test.name);
        failed += failures != before;
    }
    std::printf("%zu passed, %d failed\n", cases().size() - failed, failed);
    return failed != 0;
}

}  // namespace spos::test

#define TEST(name)                                                        \
    static void test_##name();                                            \
    static const bool added_##name = spos::test::add(#name, test_##name); \
    static void test_##name()
#define CHECK(condition) spos::test::check(condition, __FILE__, __LINE__, #condition)
#define CHECK_NEAR(got, wanted, tolerance) spos::test::check_near(got, wanted, tolerance, __FILE__, __LINE__, #got)
#define RUN_TESTS()                   \
    int main() {                      \
        return spos::test::run_all(); \
    }
