#include "csrc/cpu/unit_infer.h"

#include "csrc/cpu/unit_infer_stage.h"

namespace spos::cpu {
namespace {

constexpr int64_t kSmallImage = 256;        // pixels, up to which images go through the unit whole
constexpr int64_t kPixelsAtOnce = 112;      // of the output, about; a multiple of the rows of every tile
constexpr int64_t kFewTasks = 8;            // with fewer, images are divided
constexpr int64_t kParallelPack = 1 << 16;  // weights from which on packing is divided among the threads

template <typename T>
class Inference {
    using A = typename Compute<T>::type;

    struct Branch {
        std::vector<Stage<A>> stages;
        const std::vector<InferLayer>* layers;
        int64_t first;  // channel in the output
    };

  public:
    Inference(const UnitInference& unit, const ParallelFor& parallel_for)
        : u_(unit),
          parallel_for_(parallel_for),
          x_(static_cast<const T*>(unit.x)),
          out_(static_cast<T*>(unit.out)),
          half_(unit.channels / 2),
          out_channels_(unit.out_channels()),
          stream_(unit.samples * unit.out_height() * unit.out_width() * out_channels_ * int64_t(sizeof(T)) > kKept) {
        int64_t first = unit.split ? half_ : 0;
        for (const auto& layers : unit.branches) {
            branches_.push_back({make_stages<A, T>(unit, layers), &layers, first});
            first += layers.back().channels;
        }
        whole_ = unit.height * unit.width <= kSmallImage;
        if (whole_) {
            rows_ = unit.out_height();
            group_ = std::max<int64_t>(
                1, std::min(divide_up(kPixelsAtOnce, unit.height * unit.width), unit.samples / (2 * kFewTasks)));
        } else {
            rows_ = std::min(unit.out_height(), divide_up(kPixelsAtOnce, unit.out_width()));
        }
        for (Branch& branch : branches_) {
            int64_t rows = rows_;
            for (size_t i = branch.stages.size(); i-- > 0;) rows = branch.stages[i].plan(rows, group_);
        }
    }

    void run() {
        pack_weights();
        if (whole_ && u_.samples < kFewTasks) return run_by_panels();
        const int64_t bands = whole_ ? 1 : bands_of_image();
        const int64_t groups = divide_up(u_.samples, group_), height = u_.out_height();
        parallel_for_(groups * bands, [&](int64_t begin, int64_t end) {
            Workspace space(*this, true);
            for (int64_t task = begin; task < end; ++task) {
                const int64_t band = task % bands;
                run_band(task / bands * group_, {height * band / bands, height * (band + 1) / bands}, space);
            }
            if (stream_) finish_streams();
        });
    }

  private:
    // What a thread works in: what each branch reads and its stages make, as pixels by channels, and the windows
    // between the 1x1 and the depthwise convolution of each stage.
    struct Workspace {
        std::vector<A*> inputs;                // of a branch, if it does not read x itself
        std::vector<std::vector<A*>> results;  // of its stages but the last
        std::vector<std::vector<A*>> windows;
        AlignedScratch<A> memory;

        Workspace(const Inference& inference, bool with_windows) {
            Layout<A> layout;
            lay_out(inference, with_windows, layout);
            memory = aligned_scratch<A>(layout.size);
            layout = {memory.get(), 0};
            lay_out(inference, with_windows, layout);
            for (size_t b = 0; b < windows.size(); ++b)
                for (size_t i = 0; i < windows[b].size(); ++i)
                    std::fill_n(windows[b][i], inference.windows_size(inference.branches_[b].stages[i]), A(0));
        }

        void lay_out(const Inference& inference, bool with_windows, Layout<A>& layout) {
            inputs.clear(), results.clear(), windows.clear();
            for (const Branch& branch : inference.branches_) {
                const Stage<A>& first = branch.stages.front();
                const int64_t pixels = inference.group_ * first.rows * first.width;
                inputs.push_back(layout.take(inference.copies_input() ? pixels * inference.input_pitch() : 0));
                results.emplace_back();
                for (const Stage<A>& stage : branch.stages)
                    results.back().push_back(layout.take(
                        stage.kernel ? stage.images * stage.out_rows * stage.out_width * stage.pitch() : 0));
                if (!with_windows) continue;
                windows.emplace_back();
                for (const Stage<A>& stage : branch.stages)
                    windows.back().push_back(layout.take(inference.windows_size(stage)));
            }
        }
    };

    // Windows of all packs where rows are kept for the next step, of one panel's else.
    int64_t windows_size(const Stage<A>& stage) const {
        return stage.kernel
                   ? (whole_ ? std::min(stage.packs(), most_panel_packs()) : stage.packs()) * stage.window_size()
                   : 0;
    }

    bool copies_input() const { return u_.split || !std::is_same_v<T, A>; }
    int64_t input_channels() const { return u_.split ? half_ : u_.channels; }
    int64_t input_pitch() const { return copies_input() ? whole_packs(input_channels()) : u_.channels; }

    int64_t bands_of_image() const {
        int64_t halo = 1;  // rows of the output that are made twice between two bands
        for (const Branch& branch : branches_) {
            int64_t sum = 0;
            for (const Stage<A>& stage : branch.stages) sum += stage.kernel ? stage.kernel - 1 : 0;
            halo = std::max(halo, sum);
        }
        return std::max<int64_t>(1, std::min(divide_up(kFewTasks, u_.samples), u_.out_height() / (2 * halo)));
    }

    void pack_weights() {
        struct Task {
            Stage<A>* stage;
            const InferLayer* layer;
            int64_t panel;
        };
        std::vector<Task> tasks;
        Layout<A> layout;
        for (Branch& branch : branches_) {
            auto stage = branch.stages.begin();
            for (const InferLayer& layer : *branch.layers) {
                if (layer.kernel) continue;
                if (!stage->pointwise) ++stage;
                layout.take(stage->weights.size());
                for (int64_t panel = 0; panel < stage->panels(); ++panel) tasks.push_back({&*stage, &layer, panel});
                ++stage;
            }
        }
        packed_ = aligned_scratch<A>(layout.size);
        layout = {packed_.get(), 0};
        for (Branch& branch : branches_)
            for (Stage<A>& stage : branch.stages)
                if (stage.pointwise) stage.weights.values = layout.take(stage.weights.size());
        const A* scale = static_cast<const A*>(u_.scale);
        auto pack = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                pack_pointwise(static_cast<const T*>(tasks[i].layer->weights), tasks[i].layer->pitch,
                               PackScale<A>{scale ? scale + tasks[i].layer->first : nullptr}, tasks[i].panel,
                               tasks[i].stage->weights);
        };
        if (layout.size < kParallelPack)
            pack(0, tasks.size());
        else
            parallel_for_(tasks.size(), pack);
    }

    // Output rows `band` of a group of images that begins with image `sample`, a few rows at a time.
    void run_band(int64_t sample, RowRange band, Workspace& space) {
        std::vector<std::vector<RowRange>> steps(branches_.size());
        for (size_t b = 0; b < branches_.size(); ++b) steps[b] = before(branches_[b], band.begin);
        for (int64_t top = band.begin; top < band.end; top += rows_)
            for (size_t b = 0; b < branches_.size(); ++b) {
                Branch& branch = branches_[b];
                advance(branch, {top, std::min(band.end, top + rows_)}, steps[b]);
                PixelRows<const A> input = read(sample, band, steps[b][0], space.inputs[b]);
                Ahead ahead = b + 1 < branches_.size() ? Ahead{} : following(branch, sample, steps[b]);
                for (size_t i = 0; i < branch.stages.size(); ++i) {
                    const RowRange made =
                        i + 1 < branch.stages.size() ? steps[b][i + 1] : RowRange{top, std::min(band.end, top + rows_)};
                    run_stage(branch, branch.stages[i], sample, steps[b][i], made, input, 0, branch.stages[i].panels(),
                              space.windows[b][i], space.results[b][i], ahead);
                    input = {space.results[b][i], branch.stages[i].pitch()};
                }
            }
    }

    // Fewer small images than threads may be there: the panels of each stage are the tasks.
    void run_by_panels() {
        const int64_t height = u_.out_height();
        std::vector<Workspace> spaces;
        for (int64_t sample = 0; sample < u_.samples; ++sample) spaces.emplace_back(*this, false);
        for (size_t b = 0; b < branches_.size(); ++b) {
            Branch& branch = branches_[b];
            std::vector<RowRange> steps = before(branch, 0);
            advance(branch, {0, height}, steps);
            std::vector<PixelRows<const A>> inputs;
            for (int64_t sample = 0; sample < u_.samples; ++sample)
                inputs.push_back(read(sample, {0, height}, steps[0], spaces[sample].inputs[b]));
            for (size_t i = 0; i < branch.stages.size(); ++i) {
                const Stage<A>& stage = branch.stages[i];
                const RowRange made = i + 1 < branch.stages.size() ? steps[i + 1] : RowRange{0, height};
                const int64_t panels = stage.panels();
                parallel_for_(u_.samples * panels, [&](int64_t begin, int64_t end) {
                    const int64_t size = windows_size(stage);
                    const AlignedScratch<A> window = aligned_scratch<A>(size);
                    std::fill_n(window.get(), size, A(0));
                    Ahead nothing{};
                    for (int64_t task = begin; task < end; ++task) {
                        const int64_t sample = task / panels, panel = task % panels;
                        run_stage(branch, stage, sample, steps[i], made, inputs[sample], panel, panel + 1, window.get(),
                                  spaces[sample].results[b][i], nothing);
                    }
                    if (stream_) finish_streams();
                });
                for (int64_t sample = 0; sample < u_.samples; ++sample)
                    inputs[sample] = {spaces[sample].results[b][i], stage.pitch()};
            }
        }
    }

    // For each stage the empty range of rows before its depthwise convolution from where a band begins.
    std::vector<RowRange> before(const Branch& branch, int64_t top) const {
        std::vector<RowRange> steps(branch.stages.size());
        for (size_t i = steps.size(); i-- > 0;) {
            top = branch.stages[i].reach({top, top + 1}).begin;
            steps[i] = {top, top};
        }
        return steps;
    }

    // The rows that each stage must make now for output rows `out`.
    void advance(const Branch& branch, RowRange out, std::vector<RowRange>& steps) const {
        for (size_t i = steps.size(); i-- > 0;) {
            const RowRange needed = branch.stages[i].reach(out);
            const int64_t begin = std::max(steps[i].end, needed.begin);
            out = steps[i] = {begin, std::max(begin, needed.end)};
        }
    }

    // What the next step, or the next task, reads of x, in shares for the products of this one.
    Ahead following(const Branch& branch, int64_t sample, const std::vector<RowRange>& steps) const {
        constexpr int64_t kTile = 14;
        const int64_t images = std::min(group_, u_.samples - sample), row = u_.width * u_.channels;
        int64_t shares = 1;
        for (size_t i = 0; i < steps.size(); ++i) {
            const Stage<A>& stage = branch.stages[i];
            if (stage.pointwise)
                shares += stage.panels() * divide_up(images * steps[i].size() * stage.width, kTile) *
                          divide_up(stage.weights.depth, kStepsAShare);
        }
        const T* end = x_ + u_.samples * u_.height * row;
        const T* from = x_ + (sample * u_.height + steps[0].begin + images * steps[0].size()) * row;
        const T* to = std::min(end, from + images * std::min(u_.height, rows_ * u_.stride) * row);
        const int64_t bytes = (to - from) * sizeof(T);
        return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(to), divide_up(bytes, shares)};
    }

    // Rows of x as a branch reads them. Of a unit that splits, those of the band also pass.
    PixelRows<const A> read(int64_t sample, RowRange band, RowRange rows, A* to) const {
        const int64_t images = std::min(group_, u_.samples - sample), row = u_.width * u_.channels;
        const T* x = x_ + (sample * u_.height + rows.begin) * row;
        const int64_t pitch = input_pitch();
        if (u_.split) {
            std::vector<T> unused;
            for (RowRange part : {RowRange{rows.begin, std::min(rows.end, band.begin)},
                                  RowRange{std::max(rows.begin, band.begin), std::min(rows.end, band.end)},
                                  RowRange{std::max(rows.begin, band.end), rows.end}}) {
                if (part.size() <= 0) continue;
                ToImage<T> even = image(sample, part.begin, 0, half_);
                if (part.begin < band.begin || part.begin >= band.end) {  // another band's rows
                    unused.resize(half_);
                    even = {unused.data(), 0, half_, false};
                }
                const int64_t skipped = (part.begin - rows.begin) * u_.width;
                split_channels(PixelRows<const T>{x + skipped * u_.channels, u_.channels},
                               images * part.size() * u_.width, half_, even, PixelRows<A>{to + skipped * pitch, pitch});
            }
            return {to, pitch};
        }
        if constexpr (std::is_same_v<T, A>) {
            return {x, pitch};
        } else {
            widen_channels(PixelRows<const T>{x, u_.channels}, images * rows.size() * u_.width, u_.channels,
                           PixelRows<A>{to, pitch});
            return {to, pitch};
        }
    }

    ToImage<T> image(int64_t sample, int64_t row, int64_t first, int64_t channels) const {
        T* to = out_ + (sample * u_.out_height() + row) * u_.out_width() * out_channels_ + first;
        return {to, out_channels_, channels, stream_ && streamable(to, out_channels_, channels)};
    }

    // Panels `begin` to `end` of a stage: rows `in` before its depthwise convolution, which makes rows `out`.
    void run_stage(const Branch& branch, const Stage<A>& stage, int64_t sample, RowRange in, RowRange out,
                   PixelRows<const A> input, int64_t begin, int64_t end, A* windows, A* results, Ahead& ahead) const {
        const int64_t images = std::min(group_, u_.samples - sample), pixels = images * in.size() * stage.width;
        const ToImage<T> made = image(sample, out.begin, branch.first, stage.channels);
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t pack = panel * panel_packs(), channel = pack * kPack;
            const int64_t packs = packs_of_panel(panel, stage.packs());
            const int64_t width = std::min(packs * kPack, stage.channels - channel);
            const PointwisePanel<A> product{input,
                                            pixels,
                                            stage.weights.depth,
                                            stage.pointwise ? stage.weights.panel(panel) : nullptr,
                                            packs,
                                            stage.pointwise_shift.data() + channel,
                                            &ahead};
            if (!stage.kernel) {
                pointwise_relu(product, ToImage<T>{made.start + channel, made.pitch, width, made.stream});
                continue;
            }
            A* window = windows + (whole_ ? 0 : pack * stage.window_size());
            const ToWindow<A> to{window, stage.window_size(),
                                 stage.places.data() + in.begin % stage.window.slots * stage.width};
            if (stage.pointwise)
                pointwise_relu(product, to);
            else
                fill_window(PixelRows<const A>{input.start + channel, input.pitch}, pixels, width, to);
            for (int64_t image = 0; image < images; ++image)
                for (int64_t i = 0; i < packs; ++i)
                    depthwise_rows(DepthwiseRows<A>{
                        window + i * stage.window_size() + image * stage.window.slots * stage.window.length,
                        stage.window, stage.height,
                        stage.taps.data() + (pack + i) * stage.kernel * stage.kernel * kPack,
                        stage.depthwise_shift.data() + (pack + i) * kPack, stage.kernel, stage.stride, out.begin,
                        out.end, stage.out_width,
                        PixelRows<A>{
                            results + image * out.size() * stage.out_width * stage.pitch() + (pack + i) * kPack,
                            stage.pitch()}});
        }
    }

    const UnitInference& u_;
    const ParallelFor& parallel_for_;
    const T* x_;
    T* out_;
    int64_t half_, out_channels_;
    bool stream_;        // `out` is written past the caches
    bool whole_;         // images go through the unit whole, not in bands of rows
    int64_t rows_;       // of the output at a time
    int64_t group_ = 1;  // images at a time
    std::vector<Branch> branches_;
    AlignedScratch<A> packed_;  // weights
};

}  // namespace

void unit_infer(const UnitInference& unit, const ParallelFor& parallel_for) {
    switch (unit.dtype) {
        case DType::float32:
            return Inference<float>(unit, parallel_for).run();
        case DType::float64:
            return Inference<double>(unit, parallel_for).run();
        case DType::float16:
            return Inference<Half>(unit, parallel_for).run();
        case DType::bfloat16:
            return Inference<BFloat16>(unit, parallel_for).run();
    }
}

}  // namespace spos::cpu
