// Vectors of the width of one instruction set. Included once per capability (see capability.h),
// inside a namespace of its own and after GREENMIM_VECTOR_BYTES is set. Everything here is static
// and inlined, so that no code of one instruction set can be linked into another.
//
// No header of the standard library may be included from here on: its inline functions would be
// compiled for this instruction set, and the linker might keep that copy for every machine.

#define GREENMIM_INLINE static inline __attribute__((always_inline))

// Storage types are float, double, bfloat16 and float16 (16-bit integers); arithmetic is float or
// double.
struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<bfloat16> {
  using type = float;
};
template <>
struct Arithmetic<float16> {
  using type = float;
};

GREENMIM_INLINE float load_scalar(const float* p) { return *p; }
GREENMIM_INLINE double load_scalar(const double* p) { return *p; }
GREENMIM_INLINE float load_scalar(const bfloat16* p) {
  const unsigned bits = unsigned(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
GREENMIM_INLINE void store_scalar(float* p, float value) { *p = value; }
GREENMIM_INLINE void store_scalar(double* p, double value) { *p = value; }
GREENMIM_INLINE void store_scalar(bfloat16* p, float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  // Round to nearest, ties to even; a NaN stays one.
  const unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = (unsigned short)(value != value ? 0x7fc0 : rounded);
}

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(GREENMIM_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(GREENMIM_VECTOR_BYTES), aligned(4), may_alias));
  typedef int integer __attribute__((vector_size(GREENMIM_VECTOR_BYTES)));
  static constexpr int width = GREENMIM_VECTOR_BYTES / 4;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(GREENMIM_VECTOR_BYTES)));
  typedef double unaligned
      __attribute__((vector_size(GREENMIM_VECTOR_BYTES), aligned(8), may_alias));
  typedef long long integer __attribute__((vector_size(GREENMIM_VECTOR_BYTES)));
  static constexpr int width = GREENMIM_VECTOR_BYTES / 8;
};

template <class A>
using Vec = typename Vector<A>::type;

template <class A>
GREENMIM_INLINE Vec<A> load(const A* p) {
  return *(const typename Vector<A>::unaligned*)p;
}
template <class A>
GREENMIM_INLINE void store(A* p, Vec<A> value) {
  *(typename Vector<A>::unaligned*)p = value;
}
// The same from and to storage types.
template <class A>
GREENMIM_INLINE Vec<A> load_storage(const A* p) {
  return load<A>(p);
}
template <class A>
GREENMIM_INLINE void store_storage(A* p, Vec<A> value) {
  store<A>(p, value);
}
typedef unsigned Bits __attribute__((vector_size(GREENMIM_VECTOR_BYTES)));
typedef unsigned short HalfBits
    __attribute__((vector_size(GREENMIM_VECTOR_BYTES / 2), aligned(2), may_alias));
template <class A>
GREENMIM_INLINE Vec<float> load_storage(const bfloat16* p) {
  return (Vec<float>)(__builtin_convertvector(*(const HalfBits*)p, Bits) << 16);
}
template <class A>
GREENMIM_INLINE void store_storage(bfloat16* p, Vec<float> value) {
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = (Bits)(value != value);
  *(HalfBits*)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), HalfBits);
}
template <class A>
GREENMIM_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}
// A float16 has five bits of exponent and ten of fraction: shifted to a float's place its exponent is
// short by 127 - 15. A subnormal one is a number of 2^-24. No float is subnormal on the way: a thread
// may flush these to zero (torch.set_flush_denormal).
template <class A>
GREENMIM_INLINE Vec<float> load_storage(const float16* p) {
  const Bits half = __builtin_convertvector(*(const HalfBits*)p, Bits);
  const Bits size = half & 0x7fff, is_subnormal = (Bits)(size < 0x400);
  const Bits subnormal = (Bits)(__builtin_convertvector(size, Vec<float>) * 0x1p-24f);
  const Bits number = (is_subnormal & subnormal) | (~is_subnormal & ((size << 13) + (112u << 23)));
  const Bits special = (Bits)((half & 0x7c00) == 0x7c00);  // infinite, or NaN
  return (Vec<float>)(number | (special & 0x7f800000) | ((half & 0x8000) << 16));
}
template <class A>
GREENMIM_INLINE void store_storage(float16* p, Vec<float> value) {
  const Bits bits = (Bits)value, size = bits & 0x7fffffff;
  // Round to nearest, ties to even: by integers where the result is normal; else by adding a number of
  // which the last bit counts 2^-24, as that of a subnormal float16 does.
  const Bits normal = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
  const Bits subnormal = (Bits)((Vec<float>)size + 0.5f) - 0x3f000000;
  const Bits is_subnormal = (Bits)(size < (113u << 23));
  Bits half = (is_subnormal & subnormal) | (~is_subnormal & normal);
  const Bits is_large = (Bits)(size >= 0x477ff000);  // rounds to 2^16 or more
  half = (is_large & 0x7c00) | (~is_large & half);
  const Bits nan = (Bits)(value != value);
  half = (nan & 0x7e00) | (~nan & half);
  *(HalfBits*)p = __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfBits);
}
GREENMIM_INLINE float load_scalar(const float16* p) {
  unsigned short all[GREENMIM_VECTOR_BYTES / 4] = {p->bits};
  return load_storage<float>((const float16*)all)[0];
}
GREENMIM_INLINE void store_scalar(float16* p, float value) {
  unsigned short all[GREENMIM_VECTOR_BYTES / 4];
  store_storage<float>((float16*)all, broadcast<float>(value));
  p->bits = all[0];
}
// 0, 1, ... of the lanes as a parameter pack: a shuffle is one instruction only where its indices
// are a constant before the loops around it are unrolled.
template <int... lane>
struct Lanes {};
template <int count, int... lane>
struct Count : Count<count - 1, count - 1, lane...> {};
template <int... lane>
struct Count<0, lane...> {
  using lanes = Lanes<lane...>;
};

// Lane l of the result is lane l ^ s of the value.
template <class A, int s, int... lane>
GREENMIM_INLINE Vec<A> swap_lanes(Vec<A> value, Lanes<lane...>) {
  return __builtin_shuffle(value, typename Vector<A>::integer{(lane ^ s)...});
}
template <class A, int s = Vector<A>::width / 2>
GREENMIM_INLINE A horizontal_sum(Vec<A> value) {
  if constexpr (s == 0) {
    return value[0];
  } else {
    value += swap_lanes<A, s>(value, typename Count<Vector<A>::width>::lanes{});
    return horizontal_sum<A, s / 2>(value);
  }
}
template <class A, int s = Vector<A>::width / 2>
GREENMIM_INLINE A horizontal_max(Vec<A> value) {
  if constexpr (s == 0) {
    return value[0];
  } else {
    const Vec<A> other = swap_lanes<A, s>(value, typename Count<Vector<A>::width>::lanes{});
    return horizontal_max<A, s / 2>(value > other ? value : other);
  }
}

// One step of a transposition: bit s of the row changes places with bit s of the lane.
template <class A, int s, int... lane>
GREENMIM_INLINE void swap_with_rows(Vec<A> (&rows)[sizeof...(lane)], Lanes<lane...>) {
  using I = typename Vector<A>::integer;
  constexpr int W = sizeof...(lane);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (i & s) continue;
    const Vec<A> a = rows[i], b = rows[i + s];
    rows[i] = __builtin_shuffle(a, b, I{(lane & s ? lane - s + W : lane)...});
    rows[i + s] = __builtin_shuffle(a, b, I{(lane & s ? lane + W : lane + s)...});
  }
}
// rows[i][l] <-> rows[l][i] for a square block.
template <class A, int s = Vector<A>::width / 2>
GREENMIM_INLINE void transpose_block(Vec<A> (&rows)[Vector<A>::width]) {
  if constexpr (s > 0) {
    swap_with_rows<A, s>(rows, typename Count<Vector<A>::width>::lanes{});
    transpose_block<A, s / 2>(rows);
  }
}

// exp of a float vector, for arguments up to 88: exp(x) = 2^n exp(r) with |r| <= ln(2)/2 and a
// polynomial of degree 6 for exp(r) (Cephes' expf), within 2 ulp. Below -87 the result is exactly
// zero, which makes the exclusion of a column with a bias of -inf exact.
GREENMIM_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  using I = Vector<float>::integer;
  const V lowest = broadcast<float>(-87.0f);
  const I excluded = x <= lowest;  // false for a NaN, which goes through
  x = excluded ? lowest : x;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const V magic = broadcast<float>(12582912.0f);
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = broadcast<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The integer part sits in the low bits of `shifted`; it moves to the exponent of the result.
  const I exponent = ((I)shifted - 0x4b400000 + 127) << 23;
  const V result = p * (V)exponent;
  return excluded ? V{} : result;
}

// float64 is for checking, not for speed: the mathematical library's exp, element by element.
GREENMIM_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < Vector<double>::width; i++) result[i] = __builtin_exp(x[i]);
  return result;
}
