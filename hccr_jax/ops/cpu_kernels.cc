// CPU kernels of the training step, called by XLA (ops/native.py builds and registers them).
//
// Every tensor is float32 with channels last, so the inner loop runs over 16 neighbouring channels: one
// cache line. Work is cut into a number of chunks that depends on the shapes alone, and partial sums
// are added in chunk order, so a result does not depend on the number of threads.

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

constexpr int kLanes = 16;
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

// The shapes of a 3x3 depthwise convolution with one pixel of zero padding.
struct Shape {
  int64_t batch, height, width, channels, stride, out_height, out_width;
  int64_t ImageSize() const { return height * width * channels; }
  int64_t OutSize() const { return out_height * out_width * channels; }
};

Shape ShapeOf(const Buffer& x, int64_t stride) {
  auto d = x.dimensions();
  return {d[0], d[1], d[2], d[3], stride, (d[1] - 1) / stride + 1, (d[2] - 1) / stride + 1};
}

// Calls block(first channel) for each group of kLanes channels. Where the channels do not divide, the
// last group reaches back and covers some channels twice: harmless for stores, not for sums.
template <typename F>
void ForChannelBlocks(int64_t channels, F block) {
  for (int64_t c = 0; c < channels; c += kLanes) block(std::min(c, channels - kLanes));
}

// One image, one group of channels: out[h, w] = sum over taps of in[h*s+i-1, w*s+j-1] * weight[i, j].
void ConvolveBlock(const Shape& s, const float* in, const Vector (&weight)[9], float* out) {
  const int64_t step = s.channels, row = s.width * s.channels;
  for (int64_t h = 0; h < s.out_height; ++h) {
    const int64_t top = h * s.stride - 1;
    const int i0 = top < 0, i1 = top + 2 >= s.height ? 2 : 3;
    for (int64_t w = 0; w < s.out_width; ++w) {
      const int64_t left = w * s.stride - 1;
      const float* at = in + top * row + left * step;
      Vector sum = {};
      if (i0 == 0 && i1 == 3 && left >= 0 && left + 2 < s.width) {
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) sum += Load(at + i * row + j * step) * weight[3 * i + j];
      } else {
        const int j0 = left < 0, j1 = left + 2 >= s.width ? 2 : 3;
        for (int i = i0; i < i1; ++i)
          for (int j = j0; j < j1; ++j) sum += Load(at + i * row + j * step) * weight[3 * i + j];
      }
      Store(out + (h * s.out_width + w) * step, sum);
    }
  }
}

// One image, one group of channels: the gradient of the weights, added to sums.
void WeightGradientBlock(const Shape& s, const float* in, const float* grad, Vector (&sums)[9]) {
  const int64_t step = s.channels, row = s.width * s.channels;
  for (int64_t h = 0; h < s.out_height; ++h) {
    const int64_t top = h * s.stride - 1;
    const int i0 = top < 0, i1 = top + 2 >= s.height ? 2 : 3;
    for (int64_t w = 0; w < s.out_width; ++w) {
      const int64_t left = w * s.stride - 1;
      const float* at = in + top * row + left * step;
      const Vector g = Load(grad + (h * s.out_width + w) * step);
      if (i0 == 0 && i1 == 3 && left >= 0 && left + 2 < s.width) {
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) sums[3 * i + j] += Load(at + i * row + j * step) * g;
      } else {
        const int j0 = left < 0, j1 = left + 2 >= s.width ? 2 : 3;
        for (int i = i0; i < i1; ++i)
          for (int j = j0; j < j1; ++j) sums[3 * i + j] += Load(at + i * row + j * step) * g;
      }
    }
  }
}

// One image, one group of channels, stride 2: every output's gradient spread over its taps.
void SpreadBlock(const Shape& s, const float* grad, const Vector (&weight)[9], float* out) {
  const int64_t step = s.channels, row = s.width * s.channels;
  for (int64_t p = 0; p < s.height * s.width; ++p) Store(out + p * step, Vector{});
  for (int64_t h = 0; h < s.out_height; ++h) {
    const int64_t top = h * s.stride - 1;
    const int i0 = top < 0, i1 = top + 2 >= s.height ? 2 : 3;
    for (int64_t w = 0; w < s.out_width; ++w) {
      const int64_t left = w * s.stride - 1;
      const int j0 = left < 0, j1 = left + 2 >= s.width ? 2 : 3;
      float* at = out + top * row + left * step;
      const Vector g = Load(grad + (h * s.out_width + w) * step);
      for (int i = i0; i < i1; ++i)
        for (int j = j0; j < j1; ++j) {
          float* to = at + i * row + j * step;
          Store(to, Load(to) + g * weight[3 * i + j]);
        }
    }
  }
}

ffi::Error DepthwiseForward(ffi::ThreadPool pool, Buffer x, Buffer weight, Result y, int64_t stride) {
  const Shape s = ShapeOf(x, stride);
  const float *in = x.typed_data(), *filter = weight.typed_data();
  float* out = y->typed_data();
  Parallel(pool, s.batch, [=](int64_t b) {
    ForChannelBlocks(s.channels, [&](int64_t c) {
      Vector w[9];
      for (int k = 0; k < 9; ++k) w[k] = Load(filter + k * s.channels + c);
      ConvolveBlock(s, in + b * s.ImageSize() + c, w, out + b * s.OutSize() + c);
    });
  });
  return ffi::Error::Success();
}

ffi::Error DepthwiseBackward(ffi::ThreadPool pool, Buffer x, Buffer weight, Buffer grad, Result dx,
                             Result dw, int64_t stride) {
  const Shape s = ShapeOf(x, stride);
  const float *in = x.typed_data(), *filter = weight.typed_data(), *g = grad.typed_data();
  float* out = dx->typed_data();
  const int64_t chunks = std::min<int64_t>(s.batch, 32), size = 9 * s.channels;
  std::vector<float> partial(chunks * size);
  float* partials = partial.data();
  Parallel(pool, chunks, [=](int64_t chunk) {
    const int64_t first = chunk * s.batch / chunks, last = (chunk + 1) * s.batch / chunks;
    ForChannelBlocks(s.channels, [&](int64_t c) {
      Vector w[9], sums[9] = {};
      for (int k = 0; k < 9; ++k)
        w[k] = Load(filter + (s.stride == 1 ? 8 - k : k) * s.channels + c);
      for (int64_t b = first; b < last; ++b) {
        const float *image = in + b * s.ImageSize() + c, *gb = g + b * s.OutSize() + c;
        WeightGradientBlock(s, image, gb, sums);
        if (s.stride == 1)
          ConvolveBlock(s, gb, w, out + b * s.ImageSize() + c);
        else
          SpreadBlock(s, gb, w, out + b * s.ImageSize() + c);
      }
      for (int k = 0; k < 9; ++k) Store(partials + chunk * size + k * s.channels + c, sums[k]);
    });
  });
  float* total = dw->typed_data();
  std::fill(total, total + size, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) total[k] += partials[chunk * size + k];
  return ffi::Error::Success();
}

// Adds up two sums a channel over all rows of x (N, C), chunk by chunk; row(c, at, a, b) adds one row's
// share to a and b.
template <typename F>
void ColumnSums(ffi::ThreadPool& pool, int64_t rows, int64_t channels, float* first, float* second,
                F add) {
  const int64_t chunks = std::clamp<int64_t>(rows / 64, 1, 64);
  std::vector<float> partial(chunks * 2 * channels);
  float* partials = partial.data();
  Parallel(pool, chunks, [=](int64_t chunk) {
    const int64_t begin = chunk * rows / chunks, end = (chunk + 1) * rows / chunks;
    float* mine = partials + chunk * 2 * channels;
    // Short runs of rows keep a run in the cache while its channel groups pass over it.
    const int64_t run = std::max<int64_t>(1, 4096 / channels);
    for (int64_t r0 = begin; r0 < end; r0 += run) {
      const int64_t r1 = std::min(end, r0 + run);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t from = std::min(c, channels - kLanes);
        Vector a = {}, b = {};
        for (int64_t r = r0; r < r1; ++r) add(from, r * channels + from, a, b);
        for (int64_t k = c - from; k < kLanes; ++k) {
          mine[from + k] += a[k];
          mine[channels + from + k] += b[k];
        }
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) first[c] = second[c] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < channels; ++c) {
      first[c] += partials[chunk * 2 * channels + c];
      second[c] += partials[chunk * 2 * channels + channels + c];
    }
}

// Mean and (biased) variance of each column, in one pass. Deviations are taken from the first row, not
// from zero, so that a mean far from zero costs no digits.
ffi::Error BatchStatistics(ffi::ThreadPool pool, Buffer x, Result mean, Result variance) {
  const int64_t channels = x.dimensions().back(), rows = x.element_count() / channels;
  const float* in = x.typed_data();
  float *m = mean->typed_data(), *v = variance->typed_data();
  ColumnSums(pool, rows, channels, m, v, [=](int64_t c, int64_t at, Vector& a, Vector& b) {
    const Vector deviation = Load(in + at) - Load(in + c);
    a += deviation;
    b += deviation * deviation;
  });
  for (int64_t c = 0; c < channels; ++c) {
    const float offset = m[c] / rows;
    v[c] = std::max(0.0f, v[c] / rows - offset * offset);
    m[c] = in[c] + offset;
  }
  return ffi::Error::Success();
}

// The two sums that batch norm's gradient needs: of g and of g * normalized, where g is the gradient
// let through by the activation min(max(scaled, 0), limit), and everywhere if limit is 0.
ffi::Error NormGradientSums(ffi::ThreadPool pool, Buffer x, Buffer grad, Buffer mean, Buffer inverse,
                            Buffer scale, Buffer bias, Result sum, Result product, float limit) {
  const int64_t channels = x.dimensions().back(), rows = x.element_count() / channels;
  const float *in = x.typed_data(), *g = grad.typed_data(), *mu = mean.typed_data(),
              *inv = inverse.typed_data(), *gamma = scale.typed_data(), *beta = bias.typed_data();
  ColumnSums(pool, rows, channels, sum->typed_data(), product->typed_data(),
             [=](int64_t c, int64_t at, Vector& a, Vector& b) {
               const Vector normalized = (Load(in + at) - Load(mu + c)) * Load(inv + c);
               Vector passed = Load(g + at);
               if (limit > 0) {
                 const Vector scaled = normalized * Load(gamma + c) + Load(beta + c);
                 passed = (scaled > 0.0f) & (scaled < limit) ? passed : Vector{};
               }
               a += passed;
               b += passed * normalized;
             });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_depthwise_forward, DepthwiseForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int64_t>("stride"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hccr_depthwise_backward, DepthwiseBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int64_t>("stride"));
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
