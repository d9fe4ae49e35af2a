// One record of the official NAS-Bench-101 file: a JSON list whose last item is a protobuf message in base64.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/cells/cell.h"
#include "csrc/cells/digest.h"

namespace spos::cells {

enum Metric { kTrainingTime, kTrainAccuracy, kValidationAccuracy, kTestAccuracy, kMetrics };
constexpr int kPoints = 2;  // measured halfway and at the end

struct Record {
    Digest hash;  // as the record says; whether it is the cell's is not checked here
    Cell cell;
    int32_t epochs;
    int32_t parameters;
    float metrics[kPoints][kMetrics];
};

// Keeps its buffers from record to record.
class RecordParser {
  public:
    // Throws InputError that says which field is impossible.
    Record parse(std::string_view data);

  private:
    std::string texts_[4];  // hash, adjacency, operations, metrics
    std::vector<uint8_t> message_;
};

}  // namespace spos::cells
