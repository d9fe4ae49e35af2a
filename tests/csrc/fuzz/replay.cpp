// Stands in for libFuzzer where there is only GCC: runs every file of the folders that are named, and of each a number
// of changed copies, the same ones every time.   replay CHANGES FOLDER...
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
    const long changes = count > 1 ? std::atol(arguments[1]) : 0;
    long files = 0;
    std::mt19937 random(1);
    for (int i = 2; i < count; ++i)
        for (const auto& entry : std::filesystem::directory_iterator(arguments[i])) {
            std::ifstream file(entry.path(), std::ios::binary);
            const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
            const auto run = [](const std::vector<char>& input) {
                LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
            };
            run(bytes);
            ++files;
            for (long change = 0; change < changes && !bytes.empty(); ++change) {
                std::vector<char> changed = bytes;
                for (auto left = 1 + random() % 4; left > 0 && !changed.empty(); --left) {
                    const auto at = static_cast<std::ptrdiff_t>(random() % changed.size());
                    const auto value = static_cast<char>(random());
                    switch (random() % 4) {
                        case 0:
                            changed[at] = static_cast<char>(changed[at] ^ 1 << random() % 8);
                            break;
                        case 1:
                            changed[at] = value;
                            break;
                        case 2:
                            changed.erase(changed.begin() + at);
                            break;
                        default:
                            changed.insert(changed.begin() + at, value);
                    }
                }
                run(changed);
            }
        }
    std::printf("%ld files, each as it is and changed %ld times: no finding\n", files, changes);
    return files == 0;
}
