// A depthwise 3 x 3 convolution of visible tokens: for each, the rows of its neighbours, place by place.
// Included by kernels.h.

constexpr int kConvTaps = 9;

struct Neighbours {
  int count;
  int tap[kConvTaps];
  int64_t row[kConvTaps];  // of the tokens of all images

  Neighbours(const ConvTask& task, int64_t token) : count(0) {
    const int64_t image = token / task.tokens_per_image;
    const int32_t* of = task.neighbours +
                        (task.per_image ? token : token % task.tokens_per_image) * kConvTaps;
    for (int k = 0; k < kConvTaps; k++) {
      if (of[k] < 0) continue;
      tap[count] = k;
      row[count++] = image * task.tokens_per_image + of[k];
    }
  }
};

// Lanes of a row from c on; of the last, some may be beyond it.
template <class A, class T>
GREENMIM_INLINE Vec<A> load_lanes(const T* from, int64_t c, int64_t channels) {
  if (c + Vector<A>::width <= channels) return load_storage<A>(from + c);
  T lanes[Vector<A>::width] = {};
  __builtin_memcpy(lanes, from + c, (channels - c) * sizeof(T));
  return load_storage<A>(lanes);
}
template <class A, class T>
GREENMIM_INLINE void store_lanes(T* to, int64_t c, int64_t channels, Vec<A> value) {
  if (c + Vector<A>::width <= channels) return store_storage<A>(to + c, value);
  T lanes[Vector<A>::width];
  store_storage<A>(lanes, value);
  __builtin_memcpy(to + c, lanes, (channels - c) * sizeof(T));
}

template <class T>
void conv(const ConvTask& task) {
  using A = typename Arithmetic<T>::type;
  const int64_t channels = task.channels;
  const auto* x = static_cast<const T*>(task.x);
  const auto* weight = static_cast<const A*>(task.weight);
  const auto* bias = static_cast<const A*>(task.bias);
  auto* out = static_cast<T*>(task.out);
  for (int64_t token = task.first; token < task.last; token++) {
    const Neighbours near(task, token);
    for (int64_t c = 0; c < channels; c += Vector<A>::width) {
      Vec<A> sum = bias == nullptr ? Vec<A>{} : load_lanes<A>(bias, c, channels);
      for (int i = 0; i < near.count; i++)
        sum += load_lanes<A>(weight + near.tap[i] * channels, c, channels) *
               load_lanes<A>(x + near.row[i] * channels, c, channels);
      store_lanes<A>(out + token * channels, c, channels, sum);
    }
  }
}

// Who has a token as a neighbour is its neighbour at the opposite place: the gradient of x is a
// convolution of the gradient, and what a weight gets from a token is x times what stands there.
template <class T>
void conv_backward(const ConvTask& task) {
  using A = typename Arithmetic<T>::type;
  const int64_t channels = task.channels;
  const auto* x = static_cast<const T*>(task.x);
  const auto* grad_out = static_cast<const T*>(task.grad_out);
  const auto* weight = static_cast<const A*>(task.weight);
  auto* grad_x = static_cast<T*>(task.out);
  auto* sums = static_cast<A*>(task.sums);
  for (int64_t token = task.first; token < task.last; token++) {
    const Neighbours near(task, token);
    for (int64_t c = 0; c < channels; c += Vector<A>::width) {
      const Vec<A> own = load_lanes<A>(x + token * channels, c, channels);
      Vec<A> sum{};
      for (int i = 0; i < near.count; i++) {
        const int64_t tap = near.tap[i] * channels;
        const Vec<A> grad = load_lanes<A>(grad_out + near.row[i] * channels, c, channels);
        sum += load_lanes<A>(weight + tap, c, channels) * grad;
        if (sums == nullptr) continue;
        const Vec<A> so_far = load_lanes<A>(sums + tap, c, channels);
        store_lanes<A>(sums + tap, c, channels, so_far + own * grad);
      }
      if (sums != nullptr) {
        A* of_bias = sums + kConvTaps * channels;
        const Vec<A> so_far = load_lanes<A>(of_bias, c, channels);
        store_lanes<A>(
            of_bias, c, channels, so_far + load_lanes<A>(grad_out + token * channels, c, channels));
      }
      if (grad_x != nullptr) store_lanes<A>(grad_x + token * channels, c, channels, sum);
    }
  }
}

void conv_any(const ConvTask& task) {
  switch (task.storage) {
    case StorageType::Float32: return conv<float>(task);
    case StorageType::Float64: return conv<double>(task);
    case StorageType::BFloat16: return conv<bfloat16>(task);
    case StorageType::Float16: return conv<float16>(task);
  }
}

void conv_backward_any(const ConvTask& task) {
  switch (task.storage) {
    case StorageType::Float32: return conv_backward<float>(task);
    case StorageType::Float64: return conv_backward<double>(task);
    case StorageType::BFloat16: return conv_backward<bfloat16>(task);
    case StorageType::Float16: return conv_backward<float16>(task);
  }
}
