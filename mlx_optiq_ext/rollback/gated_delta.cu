// The mixing of a gated delta layer for a few rows: convolution, normalisation, gates
// and recurrence, in one launch. Sums are in float32; whatever mlx-lm rounds to the
// type of the rows between two of its operations is rounded here, too.
//
// A block computes 8 rows of the state of one head, a warp each. The names of types and
// sizes are template arguments:
//   InT   of rows, gates, convolution and its window
//   SumT  of a gate added to its bias
//   LogT, BiasT  of decay_log and gate_bias
//   Hk, Hv, Dk, Dv  heads of keys and of values, and the sizes of such heads
//   K     rows that the convolution sees
//   MaxT  rows of the widest pass
//
// mixed [B, T, 2 Hk Dk + Hv Dv], window [B, W, same], filter [same, K, 1],
// gate_a, gate_b [B, T, Hv], decay_log, gate_bias [Hv], start [B, S, Hv, Dv, Dk],
// kept [B]: the rows of the pass before that are kept, which say where in window and
// start this pass begins.
// outputs [B, T, Hv, Dv], states [B, T + 1, Hv, Dv, Dk], seen [B, K - 1 + T, same].
constexpr int num_channels = 2 * Hk * Dk + Hv * Dv;
constexpr int per_lane = Dk / 32;
__shared__ float queries[MaxT][Dk];
__shared__ float keys[MaxT][Dk];

const int lane = threadIdx.x;
const int row = blockIdx.y * blockDim.y + threadIdx.y;  // of the state
const int sequence = blockIdx.z / Hv;
const int head = blockIdx.z % Hv;
const int key_head = head / (Hv / Hk);
const int num_rows = mixed_shape[1];
const int first = kept[sequence];

const InT* held = window + ((size_t)sequence * window_shape[1] + first) * num_channels;
const InT* fresh = mixed + (size_t)sequence * num_rows * num_channels;
auto input = [&](int position, int channel) {
  return position < K - 1 ? held[(size_t)position * num_channels + channel]
                          : fresh[(size_t)(position - (K - 1)) * num_channels + channel];
};
auto rounded = [](float x) { return static_cast<float>(static_cast<InT>(x)); };
auto convolved = [&](int time, int channel) {
  float sum = 0.0f;
  #pragma unroll
  for (int tap = 0; tap < K; ++tap) {
    sum += static_cast<float>(input(time + tap, channel)) *
        static_cast<float>(filter[(size_t)channel * K + tap]);
  }
  sum = rounded(sum);
  return rounded(sum * rounded(1.0f / (1.0f + expf(-sum))));
};
auto summed = [](float x) {
  #pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
};

// What the convolution of the next pass may see, shared out among all blocks.
InT* all_seen = seen + (size_t)sequence * (K - 1 + num_rows) * num_channels;
const int thread = (head * gridDim.y + blockIdx.y) * blockDim.x * blockDim.y +
    threadIdx.y * blockDim.x + lane;
const int num_threads = Hv * gridDim.y * blockDim.x * blockDim.y;
for (int i = thread; i < (K - 1 + num_rows) * num_channels; i += num_threads) {
  all_seen[i] = input(i / num_channels, i % num_channels);
}

// Each warp normalises some of the queries and keys, which all warps of the block read.
const float scale = rsqrtf(static_cast<float>(Dk));
for (int i = threadIdx.y; i < 2 * num_rows; i += blockDim.y) {
  const int time = i / 2;
  const bool is_key = i % 2;
  const int channel = (is_key ? Hk * Dk : 0) + key_head * Dk + per_lane * lane;
  float values[per_lane];
  float square = 0.0f;
  #pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    values[j] = convolved(time, channel + j);
    square += values[j] * values[j];
  }
  const float norm = rsqrtf(summed(square) / Dk + 1e-6f / Dk);
  const float factor = rounded(is_key ? scale : 1.0f / Dk);
  float* normalized = is_key ? keys[time] : queries[time];
  #pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    normalized[per_lane * lane + j] = rounded(factor * rounded(values[j] * norm));
  }
}
__syncthreads();

constexpr size_t state_size = (size_t)Hv * Dv * Dk;
const size_t place = ((size_t)head * Dv + row) * Dk + per_lane * lane;
const float* before =
    start + ((size_t)sequence * start_shape[1] + first) * state_size + place;
float* after = states + (size_t)sequence * (num_rows + 1) * state_size + place;
float state[per_lane];
#pragma unroll
for (int j = 0; j < per_lane; ++j) {
  state[j] = after[j] = before[j];
}
const float decay_rate = expf(static_cast<float>(decay_log[head]));
const float bias = static_cast<float>(gate_bias[head]);
for (int time = 0; time < num_rows; ++time) {
  const size_t at = ((size_t)sequence * num_rows + time) * Hv + head;
  const float sum =
      static_cast<float>(static_cast<SumT>(static_cast<float>(gate_a[at]) + bias));
  const float softplus = static_cast<float>(
      static_cast<SumT>(fmaxf(sum, 0.0f) + log1pf(expf(-fabsf(sum)))));
  const float decay = expf(-decay_rate * softplus);
  const float beta =
      rounded(1.0f / (1.0f + expf(-static_cast<float>(gate_b[at]))));
  const float value = convolved(time, 2 * Hk * Dk + head * Dv + row);

  float remembered = 0.0f;
  #pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    state[j] *= decay;
    remembered += state[j] * keys[time][per_lane * lane + j];
  }
  const float delta = (value - summed(remembered)) * beta;
  float output = 0.0f;
  after += state_size;
  #pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    state[j] += keys[time][per_lane * lane + j] * delta;
    output += state[j] * queries[time][per_lane * lane + j];
    after[j] = state[j];
  }
  output = summed(output);
  if (lane == 0) {
    outputs[at * Dv + row] = static_cast<InT>(output);
  }
}
