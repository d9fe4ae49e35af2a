// Running statistics of many batch-norm layers at once: what one layer's part of a call is, for CPU and CUDA alike.
#pragma once

#include <algorithm>
#include <cstdint>

namespace spos {

// One layer's merge of a batch into its state, over `size` values (channels, times whatever stands in front):
//   mean' = keep_mean * mean + weight * batch_mean
//   var'  = keep_var * var + share * batch_m2 + cross * (batch_mean - mean)^2
// Without a state (null pointers) mean is 0 and var is 1. States are double; the batch's are double or float.
struct BnMerge {
    const double *mean, *var;
    const void *batch_mean, *batch_m2;
    double *mean_out, *var_out;
    int64_t size;
    double keep_mean, weight, keep_var, share, cross;

    // The average of all batches, or with weight = momentum the exponential one: of the means, and of the unbiased
    // variances of `count` values.
    void average(double weight_of_batch, int64_t count) {
        keep_mean = keep_var = 1 - weight_of_batch;
        weight = weight_of_batch;
        share = weight / static_cast<double>(count - 1);
        cross = 0;
    }

    // All values as one set, `done` of them in the state, whose var is a second moment: the rule of Chan, Golub and
    // LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
    void pool(int64_t done, int64_t count) {
        weight = static_cast<double>(count) / static_cast<double>(done + count);
        keep_mean = 1 - weight;
        keep_var = done > 0 ? 1 : 0;
        share = 1;
        cross = static_cast<double>(done) * weight;
    }
};

// One layer's state as a scale and a shift: scale = gamma / sqrt(var / divisor + epsilon), shift = beta - mean * scale.
// gamma and beta (null: ones and zeros) have the dtype of scale and shift, double or float, and `channels` values,
// which repeat over the `size` values of the state.
struct BnFinalize {
    const double *mean, *var;
    const void *gamma, *beta;
    void *scale, *shift;
    int64_t size, channels;
    double divisor;

    // Of a pooled state; the unbiased variance of one value is taken for 0, as it is the moment itself.
    void from_second_moment(int64_t count) { divisor = static_cast<double>(std::max<int64_t>(count - 1, 1)); }
};

}  // namespace spos
