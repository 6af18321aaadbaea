// What the gradients' kernels share. With w_i = dL/do_i, s_in = (q_i . k_n) r_n, and 1 / g_i, e_i and 1 / |q_i| from the first kernel:
//   dA_in = (w_i . v_n) / g_i + e_i,   e_i = dL/dg_i - (w_i . o_i) / g_i,   slope_in = beta_i + 2 gamma_i s_in
//   dv_n = sum_i (P_in / g_i) w_i,   dk^_n = sum_i dA_in slope_in q_i,   dq_i = sum_n dA_in slope_in r_n k_n
// With gates A_in is P_in times the pair's, and so is its gradient's every use; the sums of A_in dA_in, by rows and by columns, are what the decay's gradient is made of.
#pragma once
#include "pairs/reach.cuh"

namespace linattn_pairs {

constexpr int kGradientThreads = 256, kWarps = kGradientThreads / 32;  // a warp: 16 of the block's rows
constexpr int kFewestRows = 64;                                        // tokens that a block owns
constexpr int kNumbers = 3;                                            // of a query: 1 / g, e, 1 / |q|

struct Gradients {
  linattn_problem problem;
  linattn_tensor out, grad_out, grad_query, grad_key, grad_value;
  const float *mass, *grad_mass;
  float *grad_coefficients;
  float *key_scale;               // (batch, key_heads, padded)
  float *query_numbers;           // (batch, query_heads, kNumbers, padded)
  float *partials;                // (batch, query_heads, parts, 3): sums of dA, dA s, dA s^2 with s of unit vectors
  float *row_sums, *column_sums;  // of A dA: (batch, query heads, length), (batch, state heads, length), or null
  int64_t padded;                 // tokens, a multiple of kRows
  int64_t chunk;                  // tokens whose pairs are formed, a multiple of kRows, or all: what lies outside of a token's own chunk is in its results already
  int32_t row_tiles, parts;       // parts: of the sums of dA, by row tiles and by those who read a state
  SequenceGates gates;
};

template <int K, int V, bool GATED> struct GradientShape {
  static constexpr int OWN_KEY = kRows * K * 2, OWN = OWN_KEY + kRows * V * 2, TILE = kKeys * K * 2, STAGE = TILE + kKeys * V * 2;
  static constexpr int STEP = GATED && K <= 32 ? 32 : 16, HALVES = STEP / 16;  // others whose products a warp holds at once
  static constexpr bool KEEPS_ROWS = V <= 64 && !GATED;  // as fragments in registers
  static constexpr int MIN_BLOCKS = V <= 64 ? 2 : 1;
  static constexpr int NUMBERS_AT = OWN + kStages * STAGE, GATES = GATED ? sizeof(OtherGates) : 0;
  static constexpr int ROWS_GATES_AT = NUMBERS_AT + kStages * kKeys * 4, COLUMNS_GATES_AT = NUMBERS_AT + kStages * kNumbers * kKeys * 4;
  static constexpr int TOTALS_AT = ROWS_GATES_AT + GATES, ROWS_SHARED = TOTALS_AT + kWarps * 3 * 4, COLUMNS_SHARED = COLUMNS_GATES_AT + GATES;
};
template <int K, int V, bool GATED> constexpr int gradient_shared_bytes() {
  using S = GradientShape<K, V, GATED>;
  return S::ROWS_SHARED > S::COLUMNS_SHARED ? S::ROWS_SHARED : S::COLUMNS_SHARED;
}

cudaError_t gated_backward_launch(const Gradients &args, cudaStream_t stream);
int gated_backward_shared_bytes(TileDims tiles);

// Hopper's warpgroups.
bool group_gradients_take(const linattn_problem &problem);
struct GroupPlan {
  int shared_bytes, tokens;  // of a block
};
GroupPlan group_gradients_plan(TileDims tiles, bool gated);
cudaError_t group_gradients_launch(const Gradients &args, bool gated, cudaStream_t stream);

cudaError_t running_gradients_launch(const Gradients &args, void *workspace, cudaStream_t stream);

cudaError_t launch_state_gradients(const Gradients &args, void *workspace, cudaStream_t stream);
cudaError_t launch_flow_correction(const Gradients &args, void *workspace, cudaStream_t stream);  // of the rows' sums, behind all kernels of pairs

struct Coefficients {
  float a, beta, gamma;  // of unit vectors
  __device__ __forceinline__ Coefficients(const linattn_problem &p, int head)
      : a(p.coefficients[head]), beta(p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head]),
        gamma(p.coefficients[2 * p.query_heads + head] * p.coefficients[3 * p.query_heads + head] * p.coefficients[3 * p.query_heads + head]) {}
  __device__ __forceinline__ void operator*=(float x) { a *= x, beta *= x, gamma *= x; }
};

// Products of a warp's own 16 rows, `kept` in registers or else at `offset` of their tile, with those of a step of others.
template <typename T, int HALVES, bool KEPT, int D, int COUNT>
__device__ __forceinline__ void add_products(float (&sums)[2 * HALVES][4], const uint32_t (&kept)[COUNT][4], const Blocks<D> &own, uint32_t offset, const Blocks<D> &others,
                                             int step) {
#pragma unroll
  for (int block = 0; block < D / 16; ++block) {
    uint32_t x[4];
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = kept[block][i];
    } else {
      ldmatrix(x, own.at(0, block) + offset);
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      uint32_t y[4];
      ldmatrix(y, others.at(half, block) + step * HALVES * Tile<D>::kBlockBytes);
      Element<T>::mma(sums[2 * half], x, y[0], y[1]), Element<T>::mma(sums[2 * half + 1], x, y[2], y[3]);
    }
  }
}

// Takes the part along x away from the gradient of x / |x|; `scale` undoes |x|, or nothing where vectors are used as they are.
template <typename T, int BLOCKS>
__device__ __forceinline__ void project(float (&acc)[2 * BLOCKS][4], const Blocks<16 * BLOCKS> &x, uint32_t offset, const float (&scale)[2]) {
  using E = Element<T>;
  float along[2] = {0.f, 0.f};
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t two[4];
      ldmatrix(two, x.at(0, block) + offset);
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &left = acc[2 * block + t][2 * half], &right = acc[2 * block + t][2 * half + 1];
          if (pass == 0) along[half] += E::low(two[2 * t + half]) * left + E::high(two[2 * t + half]) * right;
          else left -= E::low(two[2 * t + half]) * along[half], right -= E::high(two[2 * t + half]) * along[half];
        }
    }
    if (pass == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        along[half] += __shfl_xor_sync(0xffffffffu, along[half], 1);
        along[half] += __shfl_xor_sync(0xffffffffu, along[half], 2);
        along[half] *= scale[half] * scale[half];
      }
  }
}

// 16 rows of results, staged at `offset` of a tile that nobody but this warp reads there.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const linattn_tensor &tensor, T *rows, unsigned char *tile, const Blocks<D> &blocks, uint32_t offset, const float (&acc)[D / 8][4],
                                           float scale0, float scale1, int count, int warp, int lane, int pieces = D / 8) {
  __syncwarp();
#pragma unroll
  for (int block = 0; block < D / 16; ++block) store_block<T, D>(blocks.at(0, block) + offset, acc[2 * block], acc[2 * block + 1], scale0, scale1, lane);
  __syncwarp();
  for (int index = lane; index < 16 * (D / 8); index += 32) {
    const int local = 16 * warp + index / (D / 8), piece = index % (D / 8);
    if (local < count && piece < pieces)
      *reinterpret_cast<uint4 *>(rows + local * tensor.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(tile + Tile<D>::at(local, piece));
  }
}

}  // namespace linattn_pairs
