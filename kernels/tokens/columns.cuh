// Up to 16 new tokens a sequence of the first degree where models live, in bfloat16, and where heads share a state: a block has one as a whole in shared
// memory, and each warp 16 of its columns, of all rows, as right factors in registers: the nearest bfloat16 and what is left. Past them go all
// pairs of a query head and a token, 16 at a time, as left factors: queries as they are, since what makes them of unit length multiplies the sums.
// What the tokens bring is a product by tf32 (values are exact in it, keys in two parts), added to the state in float32.
#pragma once
#include "decode.cuh"
#include "tile/exact.cuh"
#include "tile/instructions.cuh"
#include "tokens/decays.cuh"
#include "tokens/kernels.h"

namespace linattn {
namespace {

// STEPS of 8 tokens.
template <int DIM, int STEPS> struct Columns {
  static constexpr int TOKENS = 8 * STEPS, WARPS = DIM / 16, THREADS = 32 * WARPS, MOST_PAIRS = 128;
  static constexpr int WIDTH = DIM + 1, STATE = WIDTH * WIDTH, SLICES = DIM / 16;
  static constexpr int PITCH = 2 * DIM + 16;       // bytes from one vector to the next: their 16-byte parts in other banks
  static constexpr int BLOCKS = DIM == 128 ? 2 : 5;  // of a multiprocessor, by registers

  struct Fixed : Decays {
    float numbers[4][MOST_PAIRS];                      // of f: a, b, c and the temperature of each pair
    float scales[MOST_PAIRS], key_scales[MOST_TOKENS];  // what makes vectors of unit length
    float token_masses[MOST_PAIRS];                    // sums of the tokens' weights
    float of_state[MOST_PAIRS], of_one[MOST_PAIRS], inverses[MOST_PAIRS];  // what sums of a pair are multiplied by; those with the row of the feature 1
    float weighed[MOST_TOKENS];                        // what is left of a token, and makes its key of unit length
  };
  // Where a block's arrays begin in shared memory, in bytes.
  struct Layout {
    int keys, values, brought, weights, queries, end;
    __host__ __device__ Layout(int tiles) {
      keys = (4 * STATE + 31) / 16 * 16, values = keys + TOKENS * PITCH, brought = values + TOKENS * PITCH, weights = brought + DIM / 8 * STEPS * 512;
      queries = weights + tiles * 1024, end = queries + 16 * tiles * PITCH;
    }
  };
  static int shared_bytes(int tiles) { return Layout(tiles).end; }

  const SeveralArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  unsigned char *const shared;
  const int thread, warp, lane, group, place;
  const Place at;
  const int key_head, tokens, pairs, tiles, first_query;
  const int64_t state;
  const int shift;  // a state lies in shared memory as far from a boundary of 16 bytes as in memory, before and behind the tokens
  const Layout lies;
  float *const rows;
  uint32_t high[SLICES][2][2], low[SLICES][2][2];  // of this warp's columns
  uint32_t value[2][STEPS];                        // of them, two tokens to a word
  float one[2][2];                                 // the row of the feature 1, columns of sums

  __device__ __forceinline__ Columns(const SeveralArguments &args, Fixed &fixed, unsigned char *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(__shfl_sync(0xffffffffu, thread / 32, 0)), lane(thread % 32), group(lane / 4),
        place(lane % 4), key_head(key_head_of(args, at.head)), tokens(static_cast<int>(p.length)), pairs(args.group * tokens), tiles((pairs + 15) / 16),
        first_query(at.head * args.group), state((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * STATE),
        shift(static_cast<int>(reinterpret_cast<uintptr_t>((args.before ? args.before : args.after) + state) / 4 % 4)), lies(tiles),
        rows(reinterpret_cast<float *>(shared) + shift) {}

  __device__ __forceinline__ int head_of(int pair) const { return pair * args.one_token >> 16; }  // a pair is head * tokens + token
  __device__ __forceinline__ unsigned char *query(int pair) const { return shared + lies.queries + pair * PITCH; }
  __device__ __forceinline__ const uint16_t *key(int token) const { return reinterpret_cast<const uint16_t *>(shared + lies.keys + token * PITCH); }
  __device__ __forceinline__ const uint16_t *value_of(int token) const { return reinterpret_cast<const uint16_t *>(shared + lies.values + token * PITCH); }
  // Column `lane` of one of this warp's two eights, so that lanes of a product are in 32 banks of rows that lie one behind the other.
  __device__ __forceinline__ int column_of(int eight, int lane) const { return warp / 2 * 32 + lane / 2 * 8 + lane % 2 + warp % 2 * 4 + eight * 2; }
  // Which token of the block: number i, the second number of a fragment's two, of step `step`, of a place.
  static __device__ __forceinline__ int token_of(int place, int step, int i) { return 2 * STEPS * place + 2 * step + i; }
  static __device__ __forceinline__ float number(uint32_t bits) { return __uint_as_float(bits << 16); }
  static __device__ __forceinline__ float upper(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

  // ---- what is fetched

  __device__ __forceinline__ void send_for_vectors() const {
    constexpr int PARTS = DIM / 8;
    const auto first_of = [&](const linattn_tensor &from, int head) { return static_cast<const uint16_t *>(from.data) + offset_of(from, at.batch, head, 0); };
    const uint16_t *const queries = first_of(p.query, first_query), *const keys = first_of(p.key, key_head), *const values = first_of(p.value, key_head);
    const int part = thread % PARTS * 8;
#pragma unroll 1
    for (int token = thread / PARTS; token < TOKENS; token += THREADS / PARTS) {
      const bool is_token = token < tokens && is_taken(p, at.batch, token);
      const int from = is_token ? token : 0;
      linattn_tile::copy_async(linattn_tile::shared_address(key(token) + part), keys + from * static_cast<int>(p.key.token_stride) + part, is_token);
      linattn_tile::copy_async(linattn_tile::shared_address(value_of(token) + part), values + from * static_cast<int>(p.value.token_stride) + part, is_token);
    }
#pragma unroll 1
    for (int pair = thread / PARTS; pair < 16 * tiles; pair += THREADS / PARTS) {
      const bool is_pair = pair < pairs;
      const int head = is_pair ? head_of(pair) : 0, token = is_pair ? pair - head * tokens : 0;
      const int from = head * static_cast<int>(p.query.head_stride) + token * static_cast<int>(p.query.token_stride) + part;
      linattn_tile::copy_async(linattn_tile::shared_address(query(pair) + 2 * part), queries + from, is_pair);
    }
  }
  // Fours of the state's numbers that lie on 16 bytes, and those at the ends that share theirs with others, one by one.
  template <typename Memory, typename Four, typename Single> __device__ __forceinline__ void for_all_slots(Memory *memory, const Four &four, const Single &single) const {
    float *const slots = rows - shift;
    Memory *const from = memory - shift;
    const int end = shift + STATE, whole = end / 4;
#pragma unroll 4
    for (int slot = thread + (shift != 0 && thread == 0 ? THREADS : 0); slot < whole; slot += THREADS) four(slots + 4 * slot, from + 4 * slot);
    if (shift != 0 && thread < 4 && thread >= shift) single(slots + thread, from + thread);
    if (thread < end % 4) single(slots + 4 * whole + thread, from + 4 * whole + thread);
  }
  __device__ __forceinline__ void send_for_state() const {
    if (args.before)
      for_all_slots(
          args.before + state, [](float *slot, const float *x) { linattn_tile::copy_async(linattn_tile::shared_address(slot), x, true); },
          [](float *slot, const float *x) { linattn_tile::copy_number_async(linattn_tile::shared_address(slot), x, true); });
    else
#pragma unroll 1
      for (int i = thread; i < STATE; i += THREADS) rows[i] = 0.f;
  }
  __device__ __forceinline__ void begin() const {
    const Decays::Token token = Decays::token_of(p, at, lane);
    float numbers[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers[i] = thread < pairs && i != 2 ? p.coefficients[i * p.query_heads + first_query + head_of(thread)] : 0.f;
    send_for_vectors();
    linattn_tile::copy_commit();
    send_for_state();
    linattn_tile::copy_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (thread < 16 * tiles) fixed.numbers[i][thread] = numbers[i];
    if (warp == WARPS - 1) fixed.look_at_tokens(token, tokens, lane);
    linattn_tile::copy_wait<1>();
    __syncthreads();
  }

  // ---- what is known of the tokens

  // What makes vectors of unit length: four lanes have one.
  __device__ __forceinline__ void measure() const {
#pragma unroll 1
    for (int first = 8 * warp; first < 16 * tiles + TOKENS; first += 8 * WARPS) {
      const int vector = first + group, token = vector - 16 * tiles;
      const uint4 *const from = reinterpret_cast<const uint4 *>(token < 0 ? query(vector) : shared + lies.keys + token * PITCH) + place;
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < DIM / 32; ++i) {
        const uint4 bits = from[4 * i];
        square = fmaf(number(bits.x), number(bits.x), fmaf(upper(bits.x), upper(bits.x), square)),
        square = fmaf(number(bits.y), number(bits.y), fmaf(upper(bits.y), upper(bits.y), square));
        square = fmaf(number(bits.z), number(bits.z), fmaf(upper(bits.z), upper(bits.z), square)),
        square = fmaf(number(bits.w), number(bits.w), fmaf(upper(bits.w), upper(bits.w), square));
      }
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
      const float scale = !p.normalize_qk ? 1.f : square > SMALLEST_SQUARE ? 1.f / sqrtf(square) : square == square ? 0.f : square;
      if (place == 0 && token < 0) note_pair(vector, scale);
      if (place == 0 && token >= 0) fixed.key_scales[token] = scale, fixed.weighed[token] = fixed.left[MOST_TOKENS][token] * scale;
    }
  }
  __device__ __forceinline__ void note_pair(int pair, float scale) const {
    const bool is_pair = pair < pairs;
    const float carried = is_pair ? fixed.carried[pair - head_of(pair) * tokens] : 0.f;
    fixed.scales[pair] = scale * fixed.numbers[3][pair];
    fixed.of_state[pair] = fixed.numbers[1][pair] * scale * fixed.numbers[3][pair] * carried, fixed.of_one[pair] = fixed.numbers[0][pair] * carried;
  }

  // A tile's queries as a left factor, 16 dims of them.
  __device__ __forceinline__ void load_queries(uint32_t (&left)[4], int tile, int slice) const {
    linattn_tile::ldmatrix(left, linattn_tile::shared_address(query(16 * tile + lane % 16) + 32 * slice + lane / 16 * 16));
  }
  static __device__ __forceinline__ void split(float x, float y, uint32_t &high, uint32_t &low) {
    high = linattn_tile::pack_bf16(x, y);
    low = linattn_tile::pack_bf16(x - number(high), y - upper(high));
  }

  // The tokens' weights at the pairs of each tile, W_tj f(q_t . k_j), by one warp: as left factors in two parts, and added up.
  __device__ __forceinline__ void weigh_tokens() const {
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += WARPS) {
      float weights[2][4] = {};
      uint32_t high[4] = {}, low[4] = {};
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        uint32_t left[4];
        load_queries(left, tile, slice);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const uint32_t *const right = reinterpret_cast<const uint32_t *>(key(token_of(group / 2, step, group % 2)) + 16 * slice) + place;
          linattn_tile::mma_bf16(weights[step], left, right[0], right[4]);
        }
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int pair = 16 * tile + group + 8 * side;
        const float *const left = fixed.left[pair < pairs ? pair - head_of(pair) * tokens : 0];
        float sum = 0.f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int token = token_of(place, step, i);
            float &weight = weights[step][2 * side + i];
            weight = fmaf(fixed.numbers[1][pair], weight * fixed.scales[pair] * fixed.key_scales[token], fixed.numbers[0][pair]) * left[token];
            sum += weight;
          }
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (place == 0) fixed.token_masses[pair] = sum;
      }
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) split(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1], high[i], low[i]);
      uint4 *const to = weights_of(tile);
      to[0] = make_uint4(high[0], high[1], high[2], high[3]), to[1] = make_uint4(low[0], low[1], low[2], low[3]);
    }
  }
  __device__ __forceinline__ uint4 *weights_of(int tile) const { return reinterpret_cast<uint4 *>(shared + lies.weights) + (tile * 32 + lane) * 2; }

  // What the tokens bring to eight rows of the state, but for values: keys times what is left of them, as right factors in two parts.
  __device__ __forceinline__ float4 *brought(int eight, int step) const { return reinterpret_cast<float4 *>(shared + lies.brought) + (eight * STEPS + step) * 32 + lane; }
  __device__ __forceinline__ void make_keys() const {
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) {
      const int number_of = warp * 2 * STEPS + i, eight = number_of / STEPS, step = number_of % STEPS;
      float high[2], low[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int token = token_of(place, step, k);
        const float x = number(key(token)[8 * eight + group]) * fixed.weighed[token];
        high[k] = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u), low[k] = x - high[k];
      }
      *brought(eight, step) = make_float4(high[0], high[1], low[0], low[1]);
    }
  }

  // ---- the state

  // This warp's columns, as right factors and with what the tokens bring.
  __device__ __forceinline__ void take_in() {
    const float carry = fixed.carried[MOST_TOKENS];
    float left[STEPS][4];
#pragma unroll
    for (int eight = 0; eight < 2; ++eight)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const uint16_t *const first = value_of(token_of(place, step, 0)) + column_of(eight, group);
        value[eight][step] = first[0] | static_cast<uint32_t>(first[PITCH / 2]) << 16;
        left[step][eight] = number(value[eight][step]), left[step][2 + eight] = upper(value[eight][step]);
      }
#pragma unroll
    for (int eight = 0; eight < 2; ++eight)
#pragma unroll
      for (int i = 0; i < 2; ++i) one[eight][i] = rows[DIM * WIDTH + column_of(eight, 2 * place + i)];
#pragma unroll
    for (int of_rows = 0; of_rows < DIM / 8; ++of_rows) {
      float *const own = rows + (8 * of_rows + 2 * place) * WIDTH + column_of(0, group);
      float x[2][2], sums[4] = {};
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) x[row][eight] = own[row * WIDTH + 2 * eight];
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) split(x[0][eight], x[1][eight], high[of_rows / 2][eight][of_rows % 2], low[of_rows / 2][eight][of_rows % 2]);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const float4 keys = *brought(of_rows, step);
        const float of_low[2] = {keys.z, keys.w}, of_high[2] = {keys.x, keys.y};
        mma_tf32(sums, left[step], of_low), mma_tf32(sums, left[step], of_high);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) own[row * WIDTH + 2 * eight] = fmaf(x[row][eight], carry, sums[2 * eight + row]);
    }
  }

  // The sums of weights, by one warp a tile; the state's last column is their right factor, three parts of a number in three of eight columns.
  __device__ __forceinline__ void weigh_state() const {
    if (warp >= tiles) return;
    uint32_t right[SLICES][2];
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float *const own = rows + (16 * slice + 8 * i + 2 * place) * WIDTH + DIM;
        right[slice][i] = part_of(own[0], own[WIDTH]);
      }
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += WARPS) {
      float sums[4] = {};
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        uint32_t left[4];
        load_queries(left, tile, slice);
        linattn_tile::mma_bf16(sums, left, right[slice][0], right[slice][1]);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float sum = sums[2 * side] + sums[2 * side + 1];
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        const int pair = 16 * tile + group + 8 * side;
        if (place == 0 && pair < pairs) note_mass(pair, fmaf(sum, fixed.of_state[pair], fmaf(fixed.of_one[pair], rows[DIM * WIDTH + DIM], fixed.token_masses[pair])));
      }
    }
  }
  __device__ __forceinline__ void note_mass(int pair, float mass) const {
    const int head = head_of(pair), token = pair - head * tokens;
    const float total = sees(p, at.batch, token) ? mass : 0.f;
    fixed.inverses[pair] = total == 0.f ? 0.f : 1.f / total;
    if (args.mass) args.mass[(static_cast<int64_t>(at.batch) * p.query_heads + first_query + head) * tokens + token] = total;
  }
  __device__ __forceinline__ uint32_t part_of(float x, float y) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t high = linattn_tile::pack_bf16(x, y);
      if (group > part) x -= number(high), y -= upper(high);
    }
    return group < 3 ? linattn_tile::pack_bf16(x, y) : 0u;
  }

  // The last column and the last row take the tokens in, a thread a number.
  __device__ __forceinline__ void take_in_ones() const {
    const float carry = fixed.carried[MOST_TOKENS];
#pragma unroll 1
    for (int i = thread; i < 2 * DIM + 1; i += THREADS) {
      const bool is_row = i >= DIM;
      float &to = is_row ? rows[DIM * WIDTH + i - DIM] : rows[i * WIDTH + DIM];
      float sum = to * carry;
#pragma unroll 4
      for (int token = 0; token < tokens; ++token) {
        const float x = i == 2 * DIM ? 1.f : number(is_row ? value_of(token)[i - DIM] : key(token)[i]);
        sum = fmaf(is_row ? fixed.left[MOST_TOKENS][token] : fixed.weighed[token], x, sum);
      }
      to = sum;
    }
  }
  __device__ __forceinline__ void write_state() const {
    if (args.after)
      for_all_slots(
          args.after + state, [](float *slot, float *x) { *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(slot); }, [](float *slot, float *x) { *x = *slot; });
  }

  // ---- results

  __device__ __forceinline__ void write() const {
    uint16_t *const out = static_cast<uint16_t *>(args.out.data) + offset_of(args.out, at.batch, first_query, 0) + column_of(0, 2 * place);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      float sums[2][4] = {}, of_low[2][4] = {};
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        uint32_t left[4];
        load_queries(left, tile, slice);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          linattn_tile::mma_bf16(of_low[eight], left, low[slice][eight][0], low[slice][eight][1]);
          linattn_tile::mma_bf16(sums[eight], left, high[slice][eight][0], high[slice][eight][1]);
        }
      }
      const uint4 first = weights_of(tile)[0], second = weights_of(tile)[1];
      const uint32_t of_tokens[2][4] = {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
      float inverse[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int pair = 16 * tile + group + 8 * side;
        const float scale = fixed.of_state[pair], of_one = fixed.of_one[pair];
        inverse[side] = pair < pairs ? fixed.inverses[pair] : 0.f;
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float &sum = sums[eight][2 * side + i];
            sum = fmaf(sum + of_low[eight][2 * side + i], scale, of_one * one[eight][i]);
          }
      }
#pragma unroll
      for (int part = 1; part >= 0; --part)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) linattn_tile::mma_bf16(sums[eight], of_tokens[part], value[eight][0], STEPS == 2 ? value[eight][STEPS - 1] : 0u);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int pair = 16 * tile + group + 8 * side, head = head_of(pair);
        if (pair >= pairs) continue;
        uint32_t bits[2];
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
          bits[eight] = inverse[side] == 0.f ? 0u : linattn_tile::pack_bf16(sums[eight][2 * side] * inverse[side], sums[eight][2 * side + 1] * inverse[side]);
        *reinterpret_cast<uint2 *>(out + head * static_cast<int>(args.out.head_stride) + (pair - head * tokens) * static_cast<int>(args.out.token_stride)) =
            make_uint2(bits[0], bits[1]);
      }
    }
  }
};

template <int DIM, int STEPS> __global__ void __launch_bounds__(Columns<DIM, STEPS>::THREADS, Columns<DIM, STEPS>::BLOCKS) columns_kernel(const SeveralArguments args) {
  using Work = Columns<DIM, STEPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, reinterpret_cast<unsigned char *>(shared));
  work.begin();
  work.measure();
  __syncthreads();
  work.weigh_tokens();
  work.make_keys();
  linattn_tile::copy_wait<0>();
  __syncthreads();
  work.weigh_state();
  work.take_in();
  __syncthreads();
  work.take_in_ones();
  __syncthreads();
  work.write_state();
  work.write();
}

template <int DIM, int STEPS> SeveralKernel columns(int pairs) {
  using Work = Columns<DIM, STEPS>;
  return {Work::WARPS, Work::shared_bytes((pairs + 15) / 16), sizeof(typename Work::Fixed), Work::BLOCKS, 1, 1, columns_kernel<DIM, STEPS>};
}

}  // namespace
}  // namespace linattn
