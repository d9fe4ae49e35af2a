// A unit's weights as the ops that serve modules get them: one list, whose length says which unit it is.
#pragma once

#include "csrc/bindings/tensors.h"

namespace spos::bindings {

class WeightList {
  public:
    explicit WeightList(const std::vector<Tensor>& weights) : weights_(weights) {
        const size_t count = weights.size();
        STD_TORCH_CHECK(count == 3 || count == 5 || count == 6 || count == 8,
                        "weights must hold the 3 of a shuffle unit or the 6 of an Xception unit, and the 2 of a "
                        "projection if there is one; got ",
                        count);
    }

    bool shuffle() const { return weights_.size() < 6; }
    bool projects() const { return weights_.size() % 3 != 0; }
    size_t main() const { return shuffle() ? 3 : 6; }  // how many are the main branch's
    std::optional<Tensor> depthwise_projection() const { return projection(0); }
    std::optional<Tensor> pointwise_projection() const { return projection(1); }

  private:
    std::optional<Tensor> projection(size_t index) const {
        return projects() ? std::optional<Tensor>(weights_[main() + index]) : std::nullopt;
    }

    const std::vector<Tensor>& weights_;
};

}  // namespace spos::bindings
