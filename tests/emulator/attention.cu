// The attention and gather kernels as a program: a problem on standard input, the results on
// standard output. Compiled by a C++ compiler it runs them on the emulator, by nvcc on a GPU.
// tests/kernels/emulated.py writes the one and reads the other.
#include "../../csrc/cuda/attention_kernels.cuh"
#include "../../csrc/cuda/group_gather.cuh"
#include "../../csrc/cuda/table_gradient.cuh"
#include "memory.h"

#include <algorithm>
#include <vector>

using namespace greenmim::cuda;

// Only these, where a test compiles many variants of the program.
#ifndef ONLY_HEAD_DIM
#define ONLY_HEAD_DIM 0
#endif
#ifndef ONLY_ELEMENT
#define ONLY_ELEMENT -1
#endif

namespace {

// In the order of the Python side.
struct Header {
  int64_t thread_order, element, head_dim, batch, rows, partitions, groups, slots, heads,
      window_slots, table_rows, has_table, has_padding, gathered, apart, need_qkv, need_table, processors,
      shared_bytes;
  double scale;
};

struct Inputs {
  Buffer qkv, grad_out, table, pad_value, token_index, window_id, query_row, key_row;

  Inputs(const Header& h, size_t element, int64_t table_bytes)
      : qkv(h.batch * h.rows * 3 * h.heads * h.head_dim * element),
        grad_out(h.batch * h.rows * h.heads * h.head_dim * element),
        table(h.has_table ? table_bytes : 0),
        pad_value(h.has_padding ? 3 * h.heads * h.head_dim * element : 0),
        token_index(h.gathered ? 0 : h.partitions * h.groups * h.slots * 4),
        window_id(h.partitions * h.groups * h.slots * 4),
        query_row(h.partitions * h.groups * h.slots * 4),
        key_row(h.partitions * h.groups * h.slots * 4) {
    for (Buffer* buffer :
         {&qkv, &grad_out, &table, &pad_value, &token_index, &window_id, &query_row, &key_row})
      buffer->read();
  }
};

#ifndef GREENMIM_EMULATE
// Of many calls, one behind the other as in a step, in microseconds: the median of some runs of them.
template <class Call>
double time_of(const Call& call) {
  constexpr int kRuns = 15, kCalls = 16;
  std::vector<float> times(kRuns);
  cudaEvent_t start, end;
  cudaEventCreate(&start);
  cudaEventCreate(&end);
  for (int i = -2; i < kRuns; ++i) {
    cudaEventRecord(start);
    for (int j = 0; j < kCalls; ++j) call();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    if (i >= 0) cudaEventElapsedTime(&times[i], start, end);
  }
  std::sort(times.begin(), times.end());
  return 1000 * times[kRuns / 2] / kCalls;
}
#endif

// q, k or v, or what is like them: of a packed tensor, or apart and head by head.
Rows packed(void* data, const Header& h, size_t element, int which, int of) {
  const int64_t channels = h.heads * h.head_dim;
  if (h.apart && of == 3)
    return {static_cast<char*>(data) + which * h.batch * h.rows * channels * int64_t(element),
            unsigned(h.rows * channels), unsigned(h.head_dim), unsigned(h.rows * h.head_dim)};
  return {static_cast<char*>(data) + which * channels * int64_t(element),
          unsigned(h.rows * of * channels), unsigned(of * channels), unsigned(h.head_dim)};
}

// Writes all results; or, timed, on a GPU, two lines of what a forward and a backward pass take.
template <class T, int D>
void attend(const Header& h, [[maybe_unused]] bool timed) {
  Attention a{};
  a.batch = int(h.batch);
  a.rows = int(h.rows);
  a.groups = int(h.groups);
  a.slots = int(h.slots);
  a.heads = int(h.heads);
  a.head_dim = int(h.head_dim);
  a.window_slots = int(h.window_slots);
  a.table_rows = int(h.table_rows);
  a.per_image = h.partitions > 1;
  a.scale = float(h.scale);
  const int64_t table_bytes = int64_t(a.table_rows) * h.heads * 4;
  const int64_t pad_bytes = 2 * h.heads * h.head_dim * 4;
  const Inputs in(h, sizeof(T), table_bytes);
  Rows* const own[] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i) *own[i] = packed(in.qkv.as<T>(), h, sizeof(T), i, 3);
  a.table = h.has_table ? in.table.as<float>() : nullptr;
  a.pad_value = h.has_padding ? in.pad_value.as<T>() : nullptr;
  a.token_index = h.gathered ? nullptr : in.token_index.as<int>();
  a.window_id = in.window_id.as<int>();
  a.query_row = in.query_row.as<int>();
  a.key_row = in.key_row.as<int>();
  const int64_t elements = h.batch * h.rows * h.heads * h.head_dim;
  const Buffer out(elements * sizeof(T)), lse(h.batch * h.heads * h.rows * 4);
  a.out = packed(out.as<T>(), h, sizeof(T), 0, 1);
  a.lse = lse.as<float>();
  const Device device{int(h.processors), int(h.shared_bytes)};
  if (!plan<T, D>(a, Pass::Forward, device)) throw std::runtime_error("no room for forward");
  const auto forward = [&, a] { launch_attention<T, D>(a, Pass::Forward, nullptr); };
  forward();

  const Buffer grad_qkv(h.need_qkv ? 3 * elements * sizeof(T) : 0);
  const Buffer grad_table(h.need_table ? table_bytes : 0);
  const bool need_pad = h.has_padding && h.need_qkv;
  const Buffer grad_pad(need_pad ? pad_bytes : 0);
  a.grad_out = packed(in.grad_out.as<T>(), h, sizeof(T), 0, 1);
  Rows* const grads[] = {&a.grad_q, &a.grad_k, &a.grad_v};
  for (int i = 0; h.need_qkv && i < 3; ++i)
    *grads[i] = packed(grad_qkv.as<T>(), h, sizeof(T), i, 3);
  // The plan asks whether there are sums.
  a.partial = h.need_table ? grad_table.as<float>() : nullptr;
  a.partial_pad = need_pad ? grad_pad.as<float>() : nullptr;
  if (!plan<T, D>(a, Pass::Backward, device)) throw std::runtime_error("no room for backward");
  const Buffer partial(h.need_table ? a.programs() * table_bytes : 0);
  const Buffer partial_pad(need_pad ? a.programs() * pad_bytes : 0);
  if (h.need_table) a.partial = partial.as<float>();
  if (need_pad) a.partial_pad = partial_pad.as<float>();
  const Buffer sums(h.need_table ? table_runs(a.programs()) * 2 * table_bytes : 0);
  const Buffer pad_sums(need_pad ? table_runs(a.programs()) * 2 * pad_bytes : 0);
  const auto backward = [&] {
    launch_attention<T, D>(a, Pass::Backward, nullptr);
    if (h.need_table)
      run_table_gradient(a.partial, sums.as<double>(), grad_table.as<float>(), a.programs(), a.heads,
                         a.table_rows, nullptr);
    if (need_pad)
      run_table_gradient(a.partial_pad, pad_sums.as<double>(), grad_pad.as<float>(), a.programs(),
                         a.heads, 2 * a.head_dim, nullptr);
  };
  backward();
#ifndef GREENMIM_EMULATE
  if (timed) {
    std::printf("%.2f\n%.2f\n", time_of(forward), time_of(backward));
    return;
  }
#endif
  out.write();
  lse.write();
  grad_qkv.write();
  grad_table.write();
  grad_pad.write();
}

template <class T>
void attend(const Header& h, bool timed) {
  if constexpr (ONLY_HEAD_DIM == 0 || ONLY_HEAD_DIM == 16)
    if (h.head_dim <= 16) return attend<T, 16>(h, timed);
  if constexpr (ONLY_HEAD_DIM == 0 || ONLY_HEAD_DIM == 32)
    if (h.head_dim <= 32) return attend<T, 32>(h, timed);
  if constexpr (ONLY_HEAD_DIM == 0 || ONLY_HEAD_DIM == 64)
    if (h.head_dim <= 64) return attend<T, 64>(h, timed);
  throw std::runtime_error("this head dimension was not compiled");
}

// "plan": what a launch of each pass would be, without one. It takes all kernels.
#define HAS_PLAN (ONLY_HEAD_DIM == 0 && ONLY_ELEMENT == -1)
#if HAS_PLAN
template <class T, int D>
void print_plan(const Header& h) {
  Attention a{};
  a.batch = int(h.batch);
  a.groups = int(h.groups);
  a.slots = int(h.slots);
  a.heads = int(h.heads);
  a.head_dim = D;
  a.window_slots = int(h.window_slots);
  a.table_rows = int(h.table_rows);
  a.rows = int(h.rows);
  a.scale = float(h.scale);
  a.per_image = h.partitions > 1;
  int unread = 0;
  a.token_index = &unread;
  float unused;
  a.table = &unused;
  for (Pass pass : {Pass::Forward, Pass::Backward}) {
    a.partial = pass == Pass::Backward ? &unused : nullptr;
    const bool fits = plan<T, D>(a, pass, {int(h.processors), int(h.shared_bytes)});
    std::printf("%d %d %d %d %d %d %zu\n", fits, a.is_long, a.over_heads, a.strips, a.share,
                a.block_heads, shared_bytes<T, D>(a, pass));
  }
}

template <class T>
void print_plan(const Header& h) {
  if (h.head_dim <= 16) return print_plan<T, 16>(h);
  if (h.head_dim <= 32) return print_plan<T, 32>(h);
  if (h.head_dim <= 64) return print_plan<T, 64>(h);
}

#endif

// "gather" and "scatter": rows of `head_dim` elements of `element` bytes, without heads.
void copy(const Header& h, bool gather) {
  const int64_t slots = h.groups * h.slots, row_bytes = h.head_dim * h.element;
  const int64_t all_slots = h.batch * slots * row_bytes, all_tokens = h.batch * h.rows * row_bytes;
  Buffer from(gather ? all_tokens : all_slots), token_index(h.partitions * slots * 4);
  const Buffer to(gather ? all_slots : all_tokens);
  from.read();
  token_index.read();
  RowCopy c{};
  c.from = from.as<char>();
  c.to = to.as<char>();
  c.token_index = token_index.as<int>();
  c.batch = h.batch;
  c.slots = slots;
  c.tokens = h.rows;
  c.per_image = h.partitions > 1;
  copy_rows(c, gather, row_bytes, nullptr);
  to.write();
}

}  // namespace

int main(int count, char** arguments) try {
  Header h;
  if (std::fread(&h, sizeof h, 1, stdin) != 1) throw std::runtime_error("no header");
#ifdef GREENMIM_EMULATE
  emulator::thread_order = unsigned(h.thread_order);
  most_shared_bytes = size_t(h.shared_bytes);
#endif
  const std::string what = count > 1 ? arguments[1] : "attention";
#if HAS_PLAN
  if (what == "plan") {
    h.element == 0 ? print_plan<float>(h) : print_plan<bfloat16>(h);
    return 0;
  }
#endif
  if (what == "images") {  // of a block, where `groups` blocks are needed and `processors` can run
    std::printf("%lld", (long long)images_per_block(h.batch, h.groups, h.processors));
    return 0;
  }
  const bool timed = what == "time";  // and then the percentage of shared memory
#ifndef GREENMIM_EMULATE
  if (count > 2) shared_carveout = std::atoi(arguments[2]);
#endif
  if (what != "attention" && !timed) {
    copy(h, what == "gather");
    return 0;
  }
  if constexpr (ONLY_ELEMENT == -1 || ONLY_ELEMENT == 0)
    if (h.element == 0) attend<float>(h, timed);
  if constexpr (ONLY_ELEMENT == -1 || ONLY_ELEMENT == 1)
    if (h.element == 1) attend<bfloat16>(h, timed);
  if constexpr (ONLY_ELEMENT == -1 || ONLY_ELEMENT == 2)
    if (h.element == 2) attend<float16>(h, timed);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "attention: %s\n", error.what());
  return 1;
}
