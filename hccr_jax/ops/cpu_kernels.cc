// CPU kernels of the training step, called by XLA (ops/native.py builds and registers them).
//
// Every tensor is float32 with channels last, so the inner loop runs over neighbouring channels, as many
// as one register of the processor holds. Work is cut into a number of chunks that depends on the shapes
// alone, and partial sums are added in chunk order, so a result does not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;

namespace {

// Vectors wider than a register would do: GCC takes their comparisons and selections apart, lane by lane.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif
constexpr float kRelu6Limit = 6.0f;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void Store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Runs work(0 .. chunks-1) on the calling thread and, as they come free, on XLA's own threads. The
// caller waits only for chunks that have been started, so a full thread pool cannot deadlock it.
void Parallel(ffi::ThreadPool& pool, int64_t chunks, std::function<void(int64_t)> work) {
  struct State {
    std::function<void(int64_t)> work;
    int64_t chunks;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable done;
    int64_t finished = 0;
    void Run() {
      int64_t mine = 0;
      for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks; ++mine) work(chunk);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      if ((finished += mine) == chunks) done.notify_all();
    }
  };
  auto state = std::make_shared<State>();
  state->work = std::move(work);
  state->chunks = chunks;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Run(); });
  state->Run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done.wait(lock, [&] { return state->finished == chunks; });
}

// Calls block(first channel, how many of them an earlier call has had) for each group of kLanes
// channels. Where the channels do not divide, the last group reaches back.
template <typename F>
void ForGroups(int64_t channels, F block) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t from = std::min(c, channels - kLanes);
    block(from, c - from);
  }
}

// Adds v to kLanes sums, but for the first `skip`, which another group has counted.
inline void Accumulate(float* sums, Vector v, int64_t skip) {
  if (skip == 0) return Store(sums, Load(sums) + v);
  for (int64_t k = skip; k < kLanes; ++k) sums[k] += v[k];
}

// Cuts `count` rows or images into chunks, runs work(first, end, sums) on each, sums being `size` zeros
// of the chunk's own, and adds these up, in double, into total.
template <typename F>
void SumOverChunks(ffi::ThreadPool& pool, int64_t count, int64_t chunks, int64_t size, float* total,
                   F work) {
  std::vector<float> partial(chunks * size);
  float* partials = partial.data();
  Parallel(pool, chunks, [=](int64_t chunk) {
    work(chunk * count / chunks, (chunk + 1) * count / chunks, partials + chunk * size);
  });
  std::vector<double> sums(size);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) sums[k] += partials[chunk * size + k];
  std::copy_n(sums.data(), size, total);
}

// Returns two sums a channel over all rows of x (N, C), first[C] and second[C] in one vector;
// add(c, at, a, b) adds one row's share to a and b.
template <typename F>
std::vector<float> ColumnSums(ffi::ThreadPool& pool, int64_t rows, int64_t channels, F add) {
  std::vector<float> total(2 * channels);
  const int64_t chunks = std::clamp<int64_t>(rows / 64, 1, 64);
  auto work = [=](int64_t begin, int64_t end, float* sums) {
    // Short runs of rows keep a run in the cache while its channel groups pass over it.
    const int64_t run = std::max<int64_t>(1, 4096 / channels);
    for (int64_t r0 = begin; r0 < end; r0 += run) {
      const int64_t r1 = std::min(end, r0 + run);
      ForGroups(channels, [&](int64_t c, int64_t skip) {
        Vector a = {}, b = {};
        for (int64_t r = r0; r < r1; ++r) add(c, r * channels + c, a, b);
        Accumulate(sums + c, a, skip);
        Accumulate(sums + channels + c, b, skip);
      });
    }
  };
  SumOverChunks(pool, rows, chunks, 2 * channels, total.data(), work);
  return total;
}

// Sums of deviations and of their squares, taken from `shift` and not from zero, so that a mean far from
// zero costs no digits; turned into mean and (biased) variance.
void Moments(const std::vector<float>& sums, const float* shift, int64_t count, Result& mean,
             Result& variance) {
  const int64_t channels = sums.size() / 2;
  for (int64_t c = 0; c < channels; ++c) {
    const float offset = sums[c] / count;
    mean->typed_data()[c] = shift[c] + offset;
    variance->typed_data()[c] = std::max(0.0f, sums[channels + c] / count - offset * offset);
  }
}

// Mean and (biased) variance of each column, in one pass.
ffi::Error BatchStatistics(ffi::ThreadPool pool, Buffer x, Result mean, Result variance) {
  const int64_t channels = x.dimensions().back(), rows = x.element_count() / channels;
  const float* in = x.typed_data();
  const auto sums = ColumnSums(pool, rows, channels, [=](int64_t c, int64_t at, Vector& a, Vector& b) {
    const Vector deviation = Load(in + at) - Load(in + c);
    a += deviation;
    b += deviation * deviation;
  });
  Moments(sums, in, rows, mean, variance);
  return ffi::Error::Success();
}

// The two sums that batch norm's gradient needs: of g and of g * normalized, where g is the gradient
// let through by the activation min(max(scaled, 0), limit), and everywhere if limit is 0.
ffi::Error NormGradientSums(ffi::ThreadPool pool, Buffer x, Buffer grad, Buffer mean, Buffer inverse,
                            Buffer scale, Buffer bias, Result sum, Result product, float limit) {
  const int64_t channels = x.dimensions().back(), rows = x.element_count() / channels;
  const float *in = x.typed_data(), *g = grad.typed_data(), *mu = mean.typed_data(),
              *inv = inverse.typed_data(), *gamma = scale.typed_data(), *beta = bias.typed_data();
  const auto sums = ColumnSums(pool, rows, channels, [=](int64_t c, int64_t at, Vector& a, Vector& b) {
    const Vector normalized = (Load(in + at) - Load(mu + c)) * Load(inv + c);
    Vector passed = Load(g + at);
    if (limit > 0) {
      const Vector scaled = normalized * Load(gamma + c) + Load(beta + c);
      passed = (scaled > 0.0f) & (scaled < limit) ? passed : Vector{};
    }
    a += passed;
    b += passed * normalized;
  });
  std::copy_n(sums.data(), channels, sum->typed_data());
  std::copy_n(sums.data() + channels, channels, product->typed_data());
  return ffi::Error::Success();
}

// The shapes of a 3x3 depthwise convolution with one pixel of zero padding.
struct Shape {
  int64_t batch, height, width, channels, stride, out_height, out_width;
  int64_t ImageSize() const { return height * width * channels; }
  int64_t OutSize() const { return out_height * out_width * channels; }
  int64_t Chunks() const { return std::min<int64_t>(batch, 32); }
};

Shape ShapeOf(const Buffer& x, int64_t stride) {
  auto d = x.dimensions();
  return {d[0], d[1], d[2], d[3], stride, (d[1] - 1) / stride + 1, (d[2] - 1) / stride + 1};
}

// Batch norm and ReLU6 in the form min(max((x - mean) * slope + bias, 0), 6), of one group of channels.
struct Norm {
  Vector mean, slope, bias;
  // From the rows of a (3, channels) array.
  Norm(const float* rows, int64_t channels, int64_t c)
      : mean(Load(rows + c)), slope(Load(rows + channels + c)), bias(Load(rows + 2 * channels + c)) {}
  Vector Scaled(Vector deviation) const { return deviation * slope + bias; }
  Vector operator()(Vector x) const { return Clip(Scaled(x - mean)); }
  // Comparisons this way round let a NaN through.
  static Vector Clip(Vector v) {
    v = v < 0.0f ? Vector{} : v;
    return v > kRelu6Limit ? Vector{} + kRelu6Limit : v;
  }
  static Vector Passed(Vector scaled, Vector gradient) {
    return (scaled > 0.0f) & (scaled < kRelu6Limit) ? gradient : Vector{};
  }
};

// A window of three rows that slides down an image, each with a pixel of zeros at either end: what a
// 3x3 filter sees. Three rows stay in the cache, so what fills them is computed on the way.
class Window {
 public:
  Window(int64_t height, int64_t width, int64_t channels)
      : height_(height), size_((width + 2) * channels), channels_(channels), rows_(4 * size_) {}
  void Restart() { filled_ = 0; }
  // Row h, zeros outside the image; fill(h, to) is called once for each row, in order.
  template <typename F>
  const float* Row(int64_t h, F fill) {
    if (h < 0 || h >= height_) return rows_.data() + 3 * size_;
    for (; filled_ <= h; ++filled_) fill(filled_, rows_.data() + filled_ % 3 * size_ + channels_);
    return rows_.data() + h % 3 * size_;
  }

 private:
  int64_t height_, size_, channels_, filled_ = 0;
  std::vector<float> rows_;
};

// One row of a depthwise convolution for one group of channels; take(w, value) gets the results.
template <typename F>
inline void ConvolveRow(const float* const (&rows)[3], int64_t c, int64_t channels, int64_t stride,
                        int64_t out_width, const Vector (&weight)[9], F take) {
  for (int64_t w = 0; w < out_width; ++w) {
    Vector sum = {};
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        sum += Load(rows[i] + (w * stride + j) * channels + c) * weight[3 * i + j];
    take(w, sum);
  }
}

// Runs row(h, rows) for each row h of one image's depthwise convolution, rows being the three rows of
// the normalised and activated input that it sees.
template <typename F>
void ForOutputRows(const Shape& s, const float* image, const float* norm, Window& window, F row) {
  window.Restart();
  auto fill = [&](int64_t h, float* to) {
    const float* from = image + h * s.width * s.channels;
    ForGroups(s.channels, [&](int64_t c, int64_t) {
      const Norm n(norm, s.channels, c);
      for (int64_t at = c; at < s.width * s.channels; at += s.channels)
        Store(to + at, n(Load(from + at)));
    });
  };
  for (int64_t h = 0; h < s.out_height; ++h) {
    const float* rows[3];
    for (int i = 0; i < 3; ++i) rows[i] = window.Row(h * s.stride - 1 + i, fill);
    row(h, rows);
  }
}

inline void LoadFilter(const float* filter, int64_t channels, int64_t c, Vector (&weight)[9]) {
  for (int k = 0; k < 9; ++k) weight[k] = Load(filter + k * channels + c);
}

// The value in the middle of the first image: where the statistics' deviations are taken from.
std::vector<float> MiddleOutput(const Shape& s, const float* in, const float* norm,
                                const float* filter) {
  std::vector<float> middle(s.channels);
  const int64_t top = s.out_height / 2 * s.stride - 1, left = s.out_width / 2 * s.stride - 1;
  ForGroups(s.channels, [&](int64_t c, int64_t) {
    const Norm norm_c(norm, s.channels, c);
    Vector sum = {};
    for (int64_t i = std::max<int64_t>(0, -top); i < std::min<int64_t>(3, s.height - top); ++i)
      for (int64_t j = std::max<int64_t>(0, -left); j < std::min<int64_t>(3, s.width - left); ++j)
        sum += norm_c(Load(in + ((top + i) * s.width + left + j) * s.channels + c)) *
               Load(filter + (3 * i + j) * s.channels + c);
    Store(middle.data() + c, sum);
  });
  return middle;
}

// Norm, ReLU6, depthwise convolution; and mean and variance of the result.
ffi::Error BlockForward(ffi::ThreadPool pool, Buffer x, Buffer norm, Buffer weight, Result y,
                        Result mean, Result variance, int64_t stride) {
  const Shape s = ShapeOf(x, stride);
  const float *in = x.typed_data(), *n = norm.typed_data(), *filter = weight.typed_data();
  float* out = y->typed_data();
  const int64_t channels = s.channels, out_row = s.out_width * channels;
  const std::vector<float> middle = MiddleOutput(s, in, n, filter);
  const float* shift = middle.data();
  std::vector<float> sums(2 * channels);
  auto work = [=](int64_t b, int64_t end, float* mine) {
    Window window(s.height, s.width, channels);
    for (; b < end; ++b)
      ForOutputRows(s, in + b * s.ImageSize(), n, window, [&](int64_t h, const float* const (&at)[3]) {
        float* to = out + b * s.OutSize() + h * out_row;
        ForGroups(channels, [&](int64_t c, int64_t skip) {
          const Vector offset = Load(shift + c);
          Vector w[9], sum = {}, squares = {};
          LoadFilter(filter, channels, c, w);
          ConvolveRow(at, c, channels, s.stride, s.out_width, w, [&](int64_t k, Vector value) {
            Store(to + k * channels + c, value);
            const Vector deviation = value - offset;
            sum += deviation;
            squares += deviation * deviation;
          });
          Accumulate(mine + c, sum, skip);
          Accumulate(mine + channels + c, squares, skip);
        });
      });
  };
  SumOverChunks(pool, s.batch, s.Chunks(), 2 * channels, sums.data(), work);
  Moments(sums, shift, s.batch * s.out_height * s.out_width, mean, variance);
  return ffi::Error::Success();
}

// Norm, ReLU6, depthwise convolution, norm, ReLU6, all with given statistics.
ffi::Error BlockInference(ffi::ThreadPool pool, Buffer x, Buffer norm, Buffer weight,
                          Buffer norm_after, Result y, int64_t stride) {
  const Shape s = ShapeOf(x, stride);
  const float *in = x.typed_data(), *n = norm.typed_data(), *filter = weight.typed_data(),
              *after = norm_after.typed_data();
  float* out = y->typed_data();
  const int64_t channels = s.channels, out_row = s.out_width * channels;
  Parallel(pool, s.batch, [=](int64_t b) {
    Window window(s.height, s.width, channels);
    ForOutputRows(s, in + b * s.ImageSize(), n, window, [&](int64_t h, const float* const (&at)[3]) {
      float* to = out + b * s.OutSize() + h * out_row;
      ForGroups(channels, [&](int64_t c, int64_t) {
        Vector w[9];
        LoadFilter(filter, channels, c, w);
        const Norm finish(after, channels, c);
        ConvolveRow(at, c, channels, s.stride, s.out_width, w, [&](int64_t k, Vector value) {
          Store(to + k * channels + c, finish(value));
        });
      });
    });
  });
  return ffi::Error::Success();
}

// One input row of the gradients, for one group of channels and for each kStride-th column, those whose
// taps are j = kColumn, kColumn + kStride ..; likewise the row's taps are i = kRow ... What the pixel's
// gradient takes from the output's through tap (i, j), at row (h + 1 - i) / stride and column
// (w + 1 - j) / stride, is also what the pixel meets in the gradient of that tap.
template <int kStride, int kRow, int kColumn>
void GradientRow(const float* x, const float* const (&rows)[3], int64_t c, int64_t skip, int64_t width,
                 int64_t channels, const float* norm, const float* filter, float* out, float* sums) {
  const Norm n(norm, channels, c);
  Vector weight[9], d_weight[9] = {}, d_bias = {}, d_slope = {};
  LoadFilter(filter, channels, c, weight);
  for (int64_t w = kStride == 2 && kColumn == 0; w < width; w += kStride) {
    const Vector deviation = Load(x + w * channels + c) - n.mean, scaled = n.Scaled(deviation);
    const Vector active = Norm::Clip(scaled);
    Vector sum = {};
    for (int i = kRow; i < 3; i += kStride)
      for (int j = kColumn; j < 3; j += kStride) {
        const Vector g = Load(rows[i] + ((w + 1 - j) / kStride + 1) * channels + c);
        sum += g * weight[3 * i + j];
        d_weight[3 * i + j] += g * active;
      }
    sum = Norm::Passed(scaled, sum);
    d_bias += sum;
    d_slope += sum * deviation;
    Store(out + w * channels + c, sum * n.slope);
  }
  for (int i = kRow; i < 3; i += kStride)
    for (int j = kColumn; j < 3; j += kStride)
      Accumulate(sums + (3 * i + j) * channels + c, d_weight[3 * i + j], skip);
  Accumulate(sums + 9 * channels + c, d_bias, skip);
  Accumulate(sums + 10 * channels + c, d_slope, skip);
}

// The gradients of norm, ReLU6, depthwise convolution, norm and ReLU6. norm_after has five rows: mean,
// slope and bias, and then p and q of the gradient of its input y:
// slope * passed - p - q * (y - mean), passed being what ReLU6 lets through of grad.
// sums gets the gradients of the nine weights, of the first norm's bias and of its slope.
ffi::Error BlockBackward(ffi::ThreadPool pool, Buffer x, Buffer norm, Buffer weight, Buffer y,
                         Buffer norm_after, Buffer grad, Result dx, Result sums, int64_t stride) {
  const Shape s = ShapeOf(x, stride);
  const float *in = x.typed_data(), *n = norm.typed_data(), *filter = weight.typed_data(),
              *middle = y.typed_data(), *after = norm_after.typed_data(), *g = grad.typed_data();
  float* out = dx->typed_data();
  const int64_t channels = s.channels, row = s.width * channels, out_row = s.out_width * channels;
  auto work = [=](int64_t b, int64_t end, float* mine) {
    Window window(s.out_height, s.out_width, channels);
    for (; b < end; ++b) {
      window.Restart();
      auto fill = [&](int64_t h, float* to) {
        const int64_t start = b * s.OutSize() + h * out_row;
        ForGroups(channels, [&](int64_t c, int64_t) {
          const Norm norm_c(after, channels, c);
          const Vector p = Load(after + 3 * channels + c), q = Load(after + 4 * channels + c);
          for (int64_t at = c; at < out_row; at += channels) {
            const Vector deviation = Load(middle + start + at) - norm_c.mean;
            const Vector passed = Norm::Passed(norm_c.Scaled(deviation), Load(g + start + at));
            Store(to + at, norm_c.slope * passed - p - q * deviation);
          }
        });
      };
      for (int64_t h = 0; h < s.height; ++h) {
        const float* at[3] = {};
        const int first = (h + 1) % s.stride;
        for (int i = 2; i >= 0; --i)
          if (i % s.stride == first) at[i] = window.Row((h + 1 - i) / s.stride, fill);
        const int64_t start = b * s.ImageSize() + h * row;
        ForGroups(channels, [&](int64_t c, int64_t skip) {
          auto run = [&](auto gradient_row) {
            gradient_row(in + start, at, c, skip, s.width, channels, n, filter, out + start, mine);
          };
          if (s.stride == 1) {
            run(GradientRow<1, 0, 0>);
          } else if (first == 0) {
            run(GradientRow<2, 0, 0>);
            run(GradientRow<2, 0, 1>);
          } else {
            run(GradientRow<2, 1, 0>);
            run(GradientRow<2, 1, 1>);
          }
        });
      }
    }
  };
  SumOverChunks(pool, s.batch, s.Chunks(), 11 * channels, sums->typed_data(), work);
  return ffi::Error::Success();
}

// The weight gradient of a matrix product: x (N, K) and g (N, C) to x^T g (K, C). A tile of the result,
// kTileRows of its rows by two groups of channels, stays in registers while rows of x and g pass.
ffi::Error WeightGradient(ffi::ThreadPool pool, Buffer x, Buffer grad, Result out) {
  const int64_t inputs = x.dimensions().back(), channels = grad.dimensions().back(),
                rows = x.element_count() / inputs;
  const float *in = x.typed_data(), *g = grad.typed_data();
  auto work = [=](int64_t begin, int64_t end, float* sums) {
    constexpr int64_t kTall = kTileRows, kRun = 128;  // a run of rows stays in the cache for all tiles
    for (int64_t r0 = begin; r0 < end; r0 += kRun) {
      const int64_t r1 = std::min(end, r0 + kRun);
      for (int64_t k = 0; k < inputs; k += kTall) {
        const int64_t k0 = std::min(k, inputs - kTall);
        for (int64_t c = 0; c < channels; c += 2 * kLanes) {
          const int64_t c0 = std::min(c, channels - kLanes);
          const int64_t c1 = std::min(c + kLanes, channels - kLanes);
          Vector a[kTall] = {}, b[kTall] = {};
          for (int64_t r = r0; r < r1; ++r) {
            const Vector ga = Load(g + r * channels + c0), gb = Load(g + r * channels + c1);
            const float* at = in + r * inputs + k0;
            for (int i = 0; i < kTall; ++i) {
              a[i] += at[i] * ga;
              b[i] += at[i] * gb;
            }
          }
          for (int64_t i = k - k0; i < kTall; ++i) {
            float* to = sums + (k0 + i) * channels;
            Accumulate(to + c0, a[i], c - c0);
            Accumulate(to + c1, b[i], c + kLanes - c1);
          }
        }
      }
    }
  };
  const int64_t chunks = std::clamp<int64_t>(rows / 256, 1, 32);
  SumOverChunks(pool, rows, chunks, inputs * channels, out->typed_data(), work);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_batch_statistics, BatchStatistics,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_norm_gradient_sums, NormGradientSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<float>("limit"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_block_forward, BlockForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int64_t>("stride"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_block_inference, BlockInference,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int64_t>("stride"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_block_backward, BlockBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int64_t>("stride"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_weight_gradient, WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>());
