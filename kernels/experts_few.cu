// The op `experts` for few tokens: streams every executed neuron once.
//
// moefy_experts_few computes h of the union of the tokens' experts, multiplies it by the output rows, each block those of a
// share of the neurons, and moefy_add_shares adds the shares in their order. Every block finds the union in the masks by
// itself, which costs less than a launch that does. Neurons, not experts, are dealt out: any width of expert fills the
// chip. Weights go from memory straight into fragments, 16 bytes a lane, and the next ones are under way while these are
// multiplied: a sum over k may run in any order as long as both factors agree on it, so a lane takes the k that it can load
// at once. Every sum has a fixed order, whichever block adds it up.
#include <type_traits>

#include "dependency.cuh"
#include "experts.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kWarps = 8;
constexpr uint32_t kThreads = kWarps * 32;
constexpr int kTile = 8;  // tokens of one fragment
constexpr uint32_t kAll = 0xffffffffu;

template <class T>
constexpr int kVector = kChunkBytes / sizeof(T);

/// Products of two times eight rows with eight tokens, all loaded in chunks of 16 bytes: lane 4g + t brings chunk t of
/// rows g and g + 8 and of token g.
template <class T>
struct Dots {
  float c[4] = {};

  __device__ void add(uint4 low, uint4 high, uint4 x) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    mma(c, first, x.x, x.y, T());
    mma(c, second, x.z, x.w, T());
  }

  __device__ void finish(float (&out)[4]) const {
    for (int i = 0; i < 4; ++i) out[i] = c[i];
  }
};

template <>
struct Dots<float> {
  float c[2][kTile] = {};

  __device__ void add(uint4 low, uint4 high, uint4 x) {
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      const float4 of_token = shuffle(as_float4(x), token * 4 + threadIdx.x % 4);
      c[0][token] = dot(as_float4(low), of_token, c[0][token]);
      c[1][token] = dot(as_float4(high), of_token, c[1][token]);
    }
  }

  __device__ void finish(float (&out)[4]) const {
    float sums[2][kTile];
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      sums[0][token] = quad_sum(c[0][token]);
      sums[1][token] = quad_sum(c[1][token]);
    }
    const int t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) out[i] = pick(sums[i / 2], 2 * t + i % 2);
  }
};

/// The experts that any token runs, ascending.
struct Union {
  uint32_t words[MOEFY_MAX_EXPERTS / 32];
  uint16_t experts[MOEFY_MAX_EXPERTS];

  /// Before the masks are there.
  __device__ __forceinline__ void clear(const moefy_experts_params& p) {
    for (uint32_t w = threadIdx.x; w < ceil_div(p.neurons.num_experts, 32); w += kThreads) words[w] = 0;
    __syncthreads();
  }

  /// Finds them in the masks, with all threads; returns how many there are.
  __device__ __forceinline__ uint32_t find(const moefy_experts_params& p) {
    const uint32_t num_experts = p.neurons.num_experts, row_words = ceil_div(num_experts, 32);
    const uint32_t valid = valid_tokens(p);
    for (uint32_t i = threadIdx.x; i < p.num_tokens * row_words; i += kThreads) {
      const uint32_t w = i % row_words, beyond = (w + 1) * 32 - min((w + 1) * 32, num_experts);
      const uint32_t word = __ldcg(p.mask + i) << beyond >> beyond;
      if (word != 0 && i < valid * row_words) atomicOr(&words[w], word);
    }
    __syncthreads();
    // A warp for each word; of 32 words a lane has one.
    const uint32_t lane = threadIdx.x % 32;
    uint32_t count = 0;
    for (uint32_t first = 0; first < row_words; first += 32) {
      const uint32_t own = first + lane < row_words ? words[first + lane] : 0;
      for (uint32_t w = threadIdx.x / 32; w < min(32u, row_words - first); w += kWarps) {
        const uint32_t before = count + __reduce_add_sync(kAll, lane < w ? __popc(own) : 0);
        const uint32_t word = __shfl_sync(kAll, own, w);
        const uint32_t bit = 1u << lane;
        if (word & bit) experts[before + __popc(word & (bit - 1))] = (first + w) * 32 + lane;
      }
      count += __reduce_add_sync(kAll, __popc(own));
    }
    __syncthreads();
    return count;
  }
};

/// The executed neurons, which are the columns of h: those of the union's experts, then the shared and the linear ones.
/// Where rows are must be known soon: a division takes longer than what else is done here.
struct Executed {
  const moefy_neurons& n;
  const Union& united;
  const float inverse_width;
  uint32_t routed = 0;
  uint32_t all = 0;

  /// Before the masks are there.
  __device__ Executed(const moefy_experts_params& p, Union& memory)
      : n(p.neurons), united(memory), inverse_width(1.0f / static_cast<float>(max(p.neurons.expert_width, 1u))) {
    memory.clear(p);
  }

  __device__ void find(const moefy_experts_params& p, Union& memory) {
    routed = memory.find(p) * n.expert_width;
    all = routed + n.shared + n.rank;
  }

  /// Expert and neuron of a column; a column beyond the last gets a neuron whose weights can be read.
  __device__ uint32_t find(uint32_t column, uint32_t& expert) const {
    expert = kNoExpert;
    if (column < routed) {
      // One too much or too little at most.
      uint32_t rank = static_cast<uint32_t>((static_cast<float>(column) + 0.5f) * inverse_width);
      if (rank * n.expert_width > column) --rank;
      if (column - rank * n.expert_width >= n.expert_width) ++rank;
      expert = united.experts[rank];
      return expert * n.expert_width + column - rank * n.expert_width;
    }
    return column < all ? routed_neurons(n) + column - routed : 0;
  }
};

/// Where a share of `all` begins, if `count` share it evenly and `share` of them come before.
__device__ __forceinline__ uint32_t begin_of_share(uint32_t all, uint32_t share, uint32_t count) {
  const uint32_t each = all / count;
  return share * each + min(share, all - each * count);
}

/// Work is taken in turn: first all shares of h, then all of the outputs. A block has an output's first rows under way
/// before its last values of h are there, and it waits for h only after the last share was taken: by blocks that run, however
/// few of them fit the chip.
struct Turns {
  uint32_t* counters;  // taken, and shares of h that are there
  uint32_t (&memory)[2];
  uint32_t count = 0;

  __device__ Turns(const moefy_experts_params& p, uint32_t (&shared)[2]) : counters(p.turns), memory(shared) {}

  /// All threads: one of the last warp, which has the least to do, asks, and what it gets can be read after the next barrier
  /// of the block.
  __device__ void ask() {
    if (threadIdx.x == kThreads - 32) memory[count % 2] = atomicAdd(counters, 1u);
  }

  __device__ uint32_t read() { return memory[count++ % 2]; }

  /// Makes known what the block has written of h.
  __device__ void finish_hidden() const {
    __syncthreads();
    if (threadIdx.x != kThreads - 32) return;
    __threadfence();
    atomicAdd(counters + 1, 1u);
  }

  /// Until so many shares of h are there.
  __device__ void wait_for_hidden(uint32_t shares) const {
    if (threadIdx.x == 0) {
      while (load_acquire(counters + 1) < shares) {
      }
    }
    __syncthreads();
  }
};

/// The shares of h are even. A block takes 16 rows of w_in at a time, a group (16 neurons, or 8 of a GLU with gate and up rows
/// together), and less at the end of its share; its warps split d_model.
template <class T, int kTiles>
struct Hidden {
  static constexpr uint32_t kStep = kWarps * 4 * kVector<T>;  // of d_model
  static constexpr int kUnroll = 4;
  static constexpr uint32_t kBatch = kUnroll * kStep;
  static constexpr uint32_t kTokens = kTiles * kTile;
  static constexpr int kItems = (16 * kTokens + kThreads - 1) / kThreads;  // values of h of a thread
  using Sums = float[2][kWarps][16][kTokens];

  const moefy_experts_params& p;
  const Executed& executed;
  Sums& sums;
  const uint32_t per_group;
  uint32_t token0, end_of_columns, parity = 0;
  // Of the group whose rows are there.
  Dots<T> dots[kTiles];
  uint32_t column, neuron;
  NeuronConstants constants;
  float gates[kItems];

  __device__ Hidden(const moefy_experts_params& params, const Executed& found, Sums& memory)
      : p(params), executed(found), sums(memory), per_group(params.neurons.glu ? 8 : 16) {}

  /// What belongs to this thread's values, to arrive while the rows do.
  __device__ __forceinline__ void begin_values(uint32_t first) {
    column = first + threadIdx.x % per_group;
    uint32_t expert;
    neuron = executed.find(column, expert);
    constants = neuron_constants(p.neurons, neuron);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t token = token0 + (threadIdx.x + i * kThreads) / per_group;
      const bool runs = column < executed.all && token < p.num_tokens &&
                        (expert == kNoExpert || selects(p.mask, p.neurons.num_experts, token, expert));
      gates[i] = !runs ? 0.0f : expert == kNoExpert ? 1.0f : gate_of(p.gates, p.neurons.num_experts, token, expert);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) dots[tile] = Dots<T>();
  }

  /// Everything of a share but the values of its last group.
  template <class AskTurn>
  __device__ __forceinline__ void run(uint32_t share, AskTurn ask_turn) {
    const moefy_neurons& n = p.neurons;
    const uint32_t g = threadIdx.x % 32 / 4;
    const uint32_t k0 = threadIdx.x / 32 * 4 * kVector<T> + threadIdx.x % 4 * kVector<T>;
    const uint32_t num_batches = ceil_div(n.d_model, kBatch);
    const T* w_in = static_cast<const T*>(n.w_in);
    const uint32_t split = share % p.hidden_splits;
    token0 = share / p.hidden_splits * kTokens;
    const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(token0 + g) * n.d_model;
    const uint32_t begin = begin_of_share(executed.all, split, p.hidden_splits);
    const uint32_t end = begin_of_share(executed.all, split + 1, p.hidden_splits);
    // Columns come in fours; the last ones may be nobody's.
    end_of_columns = split + 1 < p.hidden_splits ? end : ceil_div(end, 4) * 4;

    const T *row_low, *row_high;
    bool has_low, has_high;
    const auto begin_group = [&](uint32_t first) {
      uint32_t expert;
      const uint32_t low = executed.find(first + g, expert);
      const uint32_t high = n.glu ? up_row(n, low) : input_row(n, executed.find(first + g + 8, expert));
      row_low = w_in + static_cast<uint64_t>(input_row(n, low)) * n.d_model;
      row_high = w_in + static_cast<uint64_t>(high) * n.d_model;
      has_low = first + g < end;
      has_high = n.glu ? has_low : first + g + 8 < end;
    };
    uint4 next[kUnroll][2];
    const auto load = [&](uint32_t batch) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t k = batch * kBatch + u * kStep + k0;
        next[u][0] = load_streaming_if(has_low && k < n.d_model, row_low + k);
        next[u][1] = load_streaming_if(has_high && k < n.d_model, row_high + k);
      }
    };
    begin_group(begin);
    load(0);
    begin_values(begin);
#pragma unroll 1
    for (uint32_t first = begin;;) {
      const bool is_last = first + per_group >= end_of_columns;
#pragma unroll 1
      for (uint32_t batch = 0; batch < num_batches; ++batch) {
        uint4 w[kUnroll][2];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          w[u][0] = next[u][0];
          w[u][1] = next[u][1];
        }
        if (batch + 1 < num_batches) {
          load(batch + 1);
        } else if (!is_last) {
          begin_group(first + per_group);
          load(0);
        }
        // Late enough for every block to have had its first turn, early enough to know before the end.
        if (is_last && batch == (num_batches - 1) / 2) ask_turn();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const uint32_t k = batch * kBatch + u * kStep + k0;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const bool inside = k < n.d_model && token0 + tile * kTile + g < p.num_tokens;
            dots[tile].add(w[u][0], w[u][1], load_cached_vector_if(inside, x + tile * kTile * n.d_model + k));
          }
        }
      }
      if (is_last) return;
      finish();
      first += per_group;
      begin_values(first);
    }
  }

  /// The values of a group from the sums of all warps.
  __device__ __forceinline__ void finish() {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float c[4];
      dots[tile].finish(c);
      for (int i = 0; i < 4; ++i) sums[parity][warp][g + i / 2 * 8][tile * kTile + 2 * t + i % 2] = c[i];
    }
    // The only one of a group: before a thread writes here again, all have passed that of the next group.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t token = (threadIdx.x + i * kThreads) / per_group, row = threadIdx.x % per_group;
      if (token >= kTokens || column >= end_of_columns) continue;
      float pre = 0.0f, up = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        pre += sums[parity][w][row][token];
        if (p.neurons.glu) up += sums[parity][w][row + 8][token];
      }
      const float value = gates[i] == 0.0f ? 0.0f : gates[i] * neuron_value<T>(p.neurons, neuron, constants, pre, up);
      static_cast<T*>(p.hidden)[(token0 + token) * p.hidden_stride + column] = from_float<T>(value);
    }
    parity ^= 1;
  }
};

/// h of four neurons.
template <class T>
using Four = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

/// Sums of four neurons' output rows, weighted by h of eight tokens: lane 4g + t brings the g-th 16 bytes of columns of
/// neurons 4t to 4t + 3 and h of token g for the same neurons. c[j][i] belongs to column 2j + i / 2 of the lane's and
/// to token 2t + i % 2.
template <class T>
struct Rows {
  float c[kVector<T> / 2][4] = {};

  __device__ void add(const uint4 (&w)[4], uint2 h) {
    const uint32_t words[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                                  {w[1].x, w[1].y, w[1].z, w[1].w},
                                  {w[2].x, w[2].y, w[2].z, w[2].w},
                                  {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a[4] = {
          __byte_perm(words[0][j], words[1][j], 0x5410), __byte_perm(words[0][j], words[1][j], 0x7632),
          __byte_perm(words[2][j], words[3][j], 0x5410), __byte_perm(words[2][j], words[3][j], 0x7632)};
      mma(c[j], a, h.x, h.y, T());
    }
  }

  __device__ void finish(float (&out)[kVector<T> / 2][4]) const {
    for (int j = 0; j < kVector<T> / 2; ++j) {
      for (int i = 0; i < 4; ++i) out[j][i] = c[j][i];
    }
  }
};

template <>
struct Rows<float> {
  float c[kTile][4] = {};

  __device__ void add(const uint4 (&w)[4], uint4 h) {
    const float4 row[4] = {as_float4(w[0]), as_float4(w[1]), as_float4(w[2]), as_float4(w[3])};
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      const float4 f = shuffle(as_float4(h), token * 4 + threadIdx.x % 4);
      c[token][0] = dot(f, make_float4(row[0].x, row[1].x, row[2].x, row[3].x), c[token][0]);
      c[token][1] = dot(f, make_float4(row[0].y, row[1].y, row[2].y, row[3].y), c[token][1]);
      c[token][2] = dot(f, make_float4(row[0].z, row[1].z, row[2].z, row[3].z), c[token][2]);
      c[token][3] = dot(f, make_float4(row[0].w, row[1].w, row[2].w, row[3].w), c[token][3]);
    }
  }

  __device__ void finish(float (&out)[2][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      float sums[kTile];
#pragma unroll
      for (int token = 0; token < kTile; ++token) sums[token] = quad_sum(c[token][column]);
      out[column / 2][column % 2 * 2] = pick(sums, 2 * t);
      out[column / 2][column % 2 * 2 + 1] = pick(sums, 2 * t + 1);
    }
  }
};

/// An output is a stripe of columns of y, of a share of the neurons. Four warps lie side by side, so that a row is read in
/// long pieces, and two have different neurons.
template <class T, int kTiles>
struct Output {
  static constexpr uint32_t kWide = sizeof(T) == 2 && kTiles == 1 ? 2 : 1;  // vectors of a lane, see WIDE in experts_few.rs
  static constexpr uint32_t kAcross = 4;                                    // warps side by side
  static constexpr uint32_t kDown = kWarps / kAcross;
  static constexpr uint32_t kApart = 8 * kVector<T>;  // columns between a lane's vectors
  static constexpr uint32_t kStripe = kAcross * kWide * kApart;
  static constexpr uint32_t kTokens = kTiles * kTile;
  static constexpr int kPerVector = kVector<T> / 2 * 4;  // sums of a lane, for a tile of tokens
  using Sums = float[kAcross][kWide * kPerVector][32];

  const moefy_experts_params& p;
  const Executed& executed;
  Sums& sums;
  const T* w_out;
  uint32_t token0, split, column0, first, end;
  uint4 next[kWide][4];

  __device__ Output(const moefy_experts_params& params, const Executed& found, Sums& memory)
      : p(params), executed(found), sums(memory) {}

  __device__ __forceinline__ void load() {
    const uint32_t t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t expert;
      const uint32_t column = first + 4 * t + i;
      const T* row = w_out + static_cast<uint64_t>(executed.find(column, expert)) * p.neurons.d_model;
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) {
        const bool exists = column < min(end, executed.all) && column0 + v * kApart < p.neurons.d_model;
        next[v][i] = load_streaming_if(exists, row + v * kApart);
      }
    }
  }

  __device__ __forceinline__ void place(uint32_t output) {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    const uint32_t stripe = output % p.num_stripes, across = warp % kAcross;
    split = output / p.num_stripes % p.num_splits;
    token0 = output / p.num_stripes / p.num_splits * kTokens;
    column0 = stripe * kStripe + across * kWide * kApart + g * kVector<T>;
    w_out = static_cast<const T*>(p.neurons.w_out) + column0;
    const uint32_t worker = split * kDown + warp / kAcross, fours = ceil_div(executed.all, 4);
    first = begin_of_share(fours, worker, kDown * p.num_splits) * 4;
    end = begin_of_share(fours, worker + 1, kDown * p.num_splits) * 4;
  }

  /// Asks for the first rows.
  __device__ __forceinline__ void begin() {
    if (first < end) load();
  }

  template <class AskTurn>
  __device__ __forceinline__ void run(AskTurn ask_turn) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t across = warp % kAcross, down = warp / kAcross;
    const T* hidden = static_cast<const T*>(p.hidden) + (token0 + g) * p.hidden_stride + 4 * t;
    Four<T> next_h[kTiles];
    const auto load_hidden = [&] {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool exists = token0 + tile * kTile + g < p.num_tokens && first + 4 * t < end;
        const Four<T>* from = reinterpret_cast<const Four<T>*>(hidden + tile * kTile * p.hidden_stride + first);
        next_h[tile] = exists ? __ldcg(from) : Four<T>{};
      }
    };
    load_hidden();
    ask_turn();
    Rows<T> rows[kTiles][kWide];
#pragma unroll 1
    while (first < end) {
      Four<T> h[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) h[tile] = next_h[tile];
      uint4 w[kWide][4];
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[v][i] = next[v][i];
      }
      first += 16;
      if (first < end) load();
      load_hidden();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (uint32_t v = 0; v < kWide; ++v) rows[tile][v].add(w[v], h[tile]);
      }
    }

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float own[kWide][kVector<T> / 2][4];
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) rows[tile][v].finish(own[v]);
      __syncthreads();  // the last sums have been read
#pragma unroll
      for (uint32_t i = 0; i < kWide * kPerVector; ++i) {
        if (down == 1) sums[across][i][lane] = own[i / kPerVector][i % kPerVector / 4][i % 4];
      }
      __syncthreads();
      if (down == 1) continue;
#pragma unroll
      for (uint32_t i = 0; i < kWide * kPerVector; ++i) {
        own[i / kPerVector][i % kPerVector / 4][i % 4] += sums[across][i][lane];
      }
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const uint32_t token = token0 + tile * kTile + 2 * t + b;
        float* to = p.partials + (static_cast<uint64_t>(split) * p.num_tokens + token) * p.neurons.d_model + column0;
#pragma unroll
        for (uint32_t v = 0; v < kWide; ++v) {
          if (token >= p.num_tokens || column0 + v * kApart >= p.neurons.d_model) continue;
#pragma unroll
          for (int j = 0; j < kVector<T> / 2; j += 2) {
            const float4 four = {own[v][j][b], own[v][j][2 + b], own[v][j + 1][b], own[v][j + 1][2 + b]};
            __stcg(reinterpret_cast<float4*>(to + v * kApart + 2 * j), four);
          }
        }
      }
    }
  }
};

template <class T, int kTiles>
__device__ __forceinline__ void few(const moefy_experts_params& p) {
  __shared__ Union united;
  __shared__ uint32_t taken[2];
  __shared__ union {
    typename Hidden<T, kTiles>::Sums of_hidden;
    typename Output<T, kTiles>::Sums of_output;
  } sums;
  launch_dependents();
  Executed executed(p, united);
  Hidden<T, kTiles> hidden(p, executed, sums.of_hidden);
  Output<T, kTiles> output(p, executed, sums.of_output);
  Turns turns(p, taken);
  wait_for_dependencies();
  turns.ask();
  executed.find(p, united);
  const uint32_t token_tiles = ceil_div(p.num_tokens, kTiles * kTile);
  const uint32_t shares = p.hidden_splits * token_tiles;
  const uint32_t all = shares + p.num_stripes * p.num_splits * token_tiles;
  uint32_t turn = turns.read();
  if (turn < shares) {
#pragma unroll 1
    while (true) {
      hidden.run(turn, [&] { turns.ask(); });
      __syncthreads();
      turn = turns.read();
      if (turn >= shares) break;
      hidden.finish();
      turns.finish_hidden();
    }
    if (turn < all) output.place(turn - shares);
    hidden.finish();
    turns.finish_hidden();
    if (turn >= all) return;
  } else if (turn < all) {
    output.place(turn - shares);
  } else {
    return;
  }
  // After the values were made known: that waits for whatever is under way.
  output.begin();
  turns.wait_for_hidden(shares);
#pragma unroll 1
  while (true) {
    output.run([&] { turns.ask(); });
    turn = turns.read();
    if (turn >= all) return;
    output.place(turn - shares);
    output.begin();
  }
}

}  // namespace
}  // namespace moefy

// blocks: of a multiprocessor, at least.
#define MOEFY_EXPERTS_FEW(name, type, tiles, blocks)                    \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, blocks) \
      moefy_experts_few_##name##_##tiles(const __grid_constant__ moefy_experts_params p) { \
    moefy::few<type, tiles>(p);                                         \
  }

MOEFY_EXPERTS_FEW(f32, float, 1, 1)
MOEFY_EXPERTS_FEW(f16, __half, 1, 2)
MOEFY_EXPERTS_FEW(f16, __half, 2, 2)
MOEFY_EXPERTS_FEW(f16, __half, 4, 1)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 1, 2)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 2, 2)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 4, 1)

// Before the first turn, where no router has done it.
extern "C" __global__ void moefy_experts_few_begin(const __grid_constant__ moefy_experts_params p) {
  moefy::begin();
  if (threadIdx.x < 2) p.turns[threadIdx.x] = 0;
}
