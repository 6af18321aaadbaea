// The warpgroup that brings the chunks: tokens into a step's stages, and a thread a token what the others are told of it.
#pragma once
#include "pairs/running.cuh"

namespace linattn_pairs {

// One thread a token. OWN: with what readers know of their own tokens.
template <Pass PASS, bool OWN> struct NumbersOnWay {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using Tiles = FeatureTiles;
  static constexpr bool BACK = PASS == Pass::COLUMNS, OF_QUERIES = OWN && PASS == Pass::ROWS;
  static constexpr int PIECES = kRunKeys / 8;
  uint4 raw[PIECES];
  float of_query[2];       // columns: 1 / g, e; rows: the mass, and its gradient
  double decay[3];         // the sums of log2 decay at the token, before the chunk and at its end
  int32_t query_run, key_run, run_first, run_last;
  bool real, several, begins;  // several: runs, or padding among them

  __device__ __forceinline__ void load(const Running &args, const RunPlace<PASS> &at, int step, int number) {
    const Gradients &g = args.of;
    const int thread = remade(number);
    const linattn_problem &p = g.problem;
    const int64_t begin = at.begin_of(step), token = begin + thread;
    const int count = at.count_of(begin), query_head = at.query_head(step);
    real = thread < count, begins = begin == 0;
    query_run = key_run = real ? 1 : 0, run_first = run_last = 1, several = false;
    if (p.key_segments) {
      const int32_t *const keys = p.key_segments + at.batch * p.key_segments_stride, *const queries = p.query_segments + at.batch * p.query_segments_stride;
      run_first = abs(keys[begins ? 0 : begin - 1]), run_last = abs(keys[begin + count - 1]);
      if (real) query_run = max(queries[token], 0), key_run = max(keys[token], 0);
      for (int i = thread % 32; i < count; i += 32) several |= queries[begin + i] != run_first || keys[begin + i] != run_first;
      several = __any_sync(0xffffffffu, several);
    }
    real = real && (BACK ? query_run : key_run) > 0;
    const linattn_tensor &tensor = BACK ? p.query : p.key;
    const T *const row = head_of<const T>(tensor, at.batch, BACK ? query_head : at.key_head) + (real ? token : 0) * tensor.token_stride;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) raw[i] = real && i < p.head_dim / 8 ? *reinterpret_cast<const uint4 *>(row + 8 * i) : make_uint4(0, 0, 0, 0);
    decay[0] = decay[1] = decay[2] = 0.0;
    if (g.gates.decay) {
      const double *const sums = g.gates.decay + (static_cast<int64_t>(at.batch) * p.state_heads + query_head / (p.query_heads / p.state_heads)) * p.length;
      if (thread < count) decay[0] = sums[token];
      if (!begins) decay[1] = sums[begin - 1];
      decay[2] = sums[begin + count - 1];
    }
    of_query[0] = of_query[1] = 0.f;
    const int64_t query = static_cast<int64_t>(at.batch) * p.query_heads + query_head;
    if (BACK && real) {
      const float *const numbers = g.query_numbers + query * kNumbers * g.padded + token;
      of_query[0] = numbers[0], of_query[1] = numbers[g.padded];
    }
    if (OF_QUERIES && query_run > 0) {
      of_query[0] = g.mass[query * p.length + token];
      if (g.grad_mass) of_query[1] = g.grad_mass[query * p.length + token];
    }
  }
  __device__ __forceinline__ float measured(bool normalized) const {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      for (const uint32_t two : {raw[i].x, raw[i].y, raw[i].z, raw[i].w}) square = fmaf(E::low(two), E::low(two), fmaf(E::high(two), E::high(two), square));
    return !real ? 0.f : normalized ? inverse_norm(square) : 1.f;
  }
  __device__ __forceinline__ void store(const Running &args, ChunkNumbers &to, unsigned char *features, const RunPlace<PASS> &at, int step, int number) const {
    const int thread = remade(number), count = at.count_of(at.begin_of(step));
    const Coefficients f = at.coefficients(step);
    const float unit = measured(at.p.normalize_qk), rate = static_cast<float>(log2_rate(args.of, at.query_head(step)));
    const float exponent = thread < count ? static_cast<float>(decay[0] - decay[1]) + rate * (thread + 1) : 0.f, whole = static_cast<float>(decay[2] - decay[1]) + rate * count;
    const bool mixed = several || whole < kSteepest;
    const float before = query_run == run_first ? exp2_fast(fminf(exponent, 0.f)) : 0.f, behind = key_run == run_last ? exp2_fast(fminf(whole - exponent, 0.f)) : 0.f;
    const float weight = !real ? 0.f : BACK ? before * of_query[0] : behind;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = E::low(words[j]) * unit, high = E::high(words[j]) * unit;
        const auto put = [&](int place, int next, uint32_t two) {
          *reinterpret_cast<uint16_t *>(features + place) = static_cast<uint16_t>(two), *reinterpret_cast<uint16_t *>(features + next) = static_cast<uint16_t>(two >> 16);
        };
        const auto times = [&](float factor) { return E::pack(low * factor, high * factor); };
        const int number = 8 * i + 2 * j, place = Tiles::at(number, thread), next = Tiles::at(number + 1, thread);
        const uint32_t weighted = times(f.gamma * weight);
        put(Tiles::UNITS + place, Tiles::UNITS + next, times(1.f));
        put(Tiles::WEIGHTED + Tiles::by_lanes(number, thread), Tiles::WEIGHTED + Tiles::by_lanes(number + 1, thread), weighted);
        put(Tiles::LINES + place, Tiles::LINES + next, BACK ? times(f.beta * weight) : weighted);
      }
    }
    const float factor = !real ? 0.f : mixed ? 1.f : exp2_fast(BACK ? exponent - whole : -exponent);
    *reinterpret_cast<uint16_t *>(features + Tiles::CONSTANT + 2 * thread) = static_cast<uint16_t>(E::pack(f.a * weight, 0.f));
    to.exponent[thread] = exponent, to.own[thread] = BACK ? behind : before, to.query_run[thread] = query_run, to.key_run[thread] = key_run;
    if constexpr (BACK) {
      const float error = of_query[1], share = share_of(of_query[0], error), scaled = share * factor;
      to.of_query[thread] = make_float4(f.a * scaled, f.beta * unit * scaled, f.gamma * unit * unit * scaled, share == 0.f ? 0.f : error / share);
      to.mass_weight[thread] = real ? before * error : 0.f;
    } else {
      to.mass_weight[thread] = weight;
      if constexpr (PASS == Pass::OUTPUT) {
        const Coefficients of(at.p, at.head);
        to.of_query[thread] = make_float4(of.a * factor, of.beta * unit * factor, of.gamma * unit * unit * factor, 0.f);
      } else {
        to.unit[thread] = unit, to.factor[thread] = factor;
      }
      if constexpr (OF_QUERIES) to.of_query[thread] = make_float4(of_query[0] == 0.f ? 0.f : 1.f / of_query[0], of_query[1], 0.f, 0.f);
    }
    if (thread == 0) to.kept = !begins && run_first == run_last ? exp2_fast(fminf(whole, 0.f)) : 0.f, to.mixed = mixed;
  }
};

// A chunk's tokens of a head into a tile; those from `count` on read as zero, and so does padding, NaN in memory or not. whole: there are none of either, nor empty pieces.
template <int D, typename T>
__device__ __forceinline__ void copy_chunk(uint32_t tile, const T *rows, int64_t stride, const int32_t *runs, int count, int thread, int pieces, bool whole) {
  constexpr int kPieces = D / 8, kAtOnce = kBringers / kPieces;
  const int first = thread / kPieces, piece = thread % kPieces;
  const T *source = rows + first * stride + 8 * piece;
  uint32_t place = tile + Tile<D>::at(first, piece);
  if (whole) {
#pragma unroll
    for (int i = 0; i < kRunTokens / kAtOnce; ++i, source += kAtOnce * stride, place += kAtOnce / 16 * Tile<D>::kBlockBytes) copy_async(place, source, true);
    return;
  }
#pragma unroll 2
  for (int row = first; row < kRunTokens; row += kAtOnce, source += kAtOnce * stride, place += kAtOnce / 16 * Tile<D>::kBlockBytes) {
    const bool valid = row < count && piece < pieces && (!runs || runs[row] > 0);
    copy_async(place, valid ? source : rows, valid);
  }
}

// Tokens of a step into its stages. OWN: those of readers, too.
template <Pass PASS, bool OWN> __device__ __forceinline__ void fetch_step(const Running &args, const RunPlace<PASS> &at, uint32_t base, int step, bool one_run, int number) {
  using T = __nv_bfloat16;
  using S = RunShape<PASS>;
  const int thread = remade(number);  // no address is kept from chunk to chunk: registers are short
  const linattn_problem &p = at.p;
  const int64_t begin = at.begin_of(step);
  const int count = at.count_of(begin), query_head = at.query_head(step), pieces = p.head_dim / 8;
  const int32_t *const query_runs = p.key_segments ? p.query_segments + at.batch * p.query_segments_stride + begin : nullptr;
  const int32_t *const key_runs = p.key_segments ? p.key_segments + at.batch * p.key_segments_stride + begin : nullptr;
  const auto copy = [&](auto width, uint32_t tile, const linattn_tensor &tensor, int head, const int32_t *runs, int parts) {
    const bool whole = one_run && count == kRunTokens && parts == decltype(width)::value / 8;
    copy_chunk<decltype(width)::value>(tile, head_of<const T>(tensor, at.batch, head) + begin * tensor.token_stride, tensor.token_stride, runs, count, thread, parts, whole);
  };
  const std::integral_constant<int, kRunKeys> narrow;
  const std::integral_constant<int, kRunValues> wide;
  const uint32_t others = base + S::OTHERS_AT + step % 2 * S::OTHERS, own = base + S::OWN_AT + step / at.heads % 2 * S::OWN;
  if constexpr (PASS == Pass::COLUMNS) {
    copy(narrow, others, p.query, query_head, query_runs, pieces);
    copy(wide, others + S::X, args.of.grad_out, query_head, query_runs, kRunValues / 8);
    if (OWN && step % at.heads == 0) {
      copy(narrow, own, p.key, at.key_head, key_runs, pieces);
      copy(wide, own + S::X, p.value, at.key_head, key_runs, kRunValues / 8);
    }
  } else {
    copy(narrow, others, p.key, at.key_head, key_runs, pieces);
    copy(wide, others + S::X, p.value, at.key_head, key_runs, kRunValues / 8);
    if constexpr (OWN) copy(narrow, own, p.query, query_head, query_runs, pieces);
    if constexpr (OWN && PASS == Pass::ROWS) {
      copy(wide, own + S::X, args.of.grad_out, query_head, query_runs, kRunValues / 8);
      copy(wide, own + S::OTHERS, args.of.out, query_head, query_runs, kRunValues / 8);
    }
  }
  copy_commit();
}

// The loop of those who bring chunks: to `base` tokens, by where S has them, and their numbers, each step's to the one of two places that the step before has not.
template <Pass PASS, bool OWN>
__device__ __forceinline__ void bring_chunks(const Running &args, const RunPlace<PASS> &at, uint32_t base, unsigned char *features, ChunkNumbers *numbers, int thread) {
  give_registers<kRunBringerRegisters>();
  NumbersOnWay<PASS, OWN> on_way;
  const int steps = at.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (OWN && step > 1) await_chunk_left(step - 2);
    on_way.load(args, at, step, thread);
    fetch_step<PASS, OWN>(args, at, base, step, !on_way.several, thread);
    on_way.store(args, numbers[step % 2], features + step % 2 * FeatureTiles::BYTES, at, step, thread);
    copy_wait<0>();
    warpgroup_publish();
    if constexpr (OWN) chunk_is_here(step), step_is_here(step);
    else __syncthreads();
  }
}

}  // namespace linattn_pairs
