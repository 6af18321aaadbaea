// architectures: sm_80 compute_80 sm_90
// From the sum of every chunk alone to the state ahead of it (or, in reverse, R behind it), in place.
#include "generic/job.cuh"

namespace linattn {
namespace {

constexpr int AHEAD = 8;  // loads in flight: the chain of additions is short, the way to memory long

// What the state ahead of a chunk still weighs behind it: 0 where another run of tokens ends the chunk.
__device__ float carried(const Job &job, int64_t bs, int64_t chunk) {
  const linattn_problem &p = job.p;
  const int64_t start = chunk * job.chunk, stop = smaller(start + job.chunk, p.length);
  const int32_t *segments = segments_of(p.key_segments, p.key_segments_stride, static_cast<int>(bs / p.state_heads));
  if (segments != nullptr && run_behind(segments, stop) != run_before(segments, start)) return 0.0f;
  if (job.decay == nullptr) return 1.0f;
  const double *tiles = job.decay_tiles + bs * (job.tiles + 1);
  return expf(static_cast<float>(tiles[(stop + TILE - 1) / TILE] - tiles[start / TILE]));
}

// Thread = one entry of the state of one head.
template <bool REVERSE>
__global__ void scan(const __grid_constant__ Job job, int64_t size, int64_t entries) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= entries) return;
  const int64_t bs = entry / size;
  const bool causal = job.p.causal;
  float *at = job.states + bs * job.chunks * size + entry % size;
  const float *from = REVERSE ? job.grad_state : job.p.initial_state;
  const float first = from == nullptr ? 0.0f : from[entry];
  float sum = first;
  for (int64_t done = 0; done < job.chunks; done += AHEAD) {
    float own[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int64_t chunk = REVERSE ? job.chunks - 1 - (done + i) : done + i;
      own[i] = done + i < job.chunks ? at[chunk * size] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (done + i >= job.chunks) break;
      const int64_t chunk = REVERSE ? job.chunks - 1 - (done + i) : done + i;
      if (causal) at[chunk * size] = sum;
      sum = causal ? fmaf(sum, carried(job, bs, chunk), own[i]) : sum + own[i];
    }
  }
  if (!causal) at[0] = job.direct ? first : sum;
  if (REVERSE) {
    if (job.grad_initial_state != nullptr) job.grad_initial_state[entry] = sum;
  } else if (job.final_state != nullptr) {
    job.final_state[entry] = sum;
  }
}

}  // namespace

cudaError_t launch_scan(const Job &job, bool reverse, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(job.features) * (job.p.value_dim + 1);
  const int64_t entries = size * job.p.batch * job.p.state_heads;
  const unsigned blocks = static_cast<unsigned>((entries + THREADS - 1) / THREADS);
  if (reverse) scan<true><<<blocks, THREADS, 0, stream>>>(job, size, entries);
  else scan<false><<<blocks, THREADS, 0, stream>>>(job, size, entries);
  return cudaGetLastError();
}

}  // namespace linattn
