// Masks -> tiles of tokens that select much the same experts. A token's key is its rarest expert, then its second rarest;
// tokens with the same key stay in their order. Every place is a count of smaller keys, so it is the same in every run.
//
// Chunks of tokens are sorted by a block each; then each key is looked up in every other chunk.
#include "dependency.cuh"
#include "experts.cuh"
#include "team.cuh"

namespace moefy {
namespace {

constexpr uint32_t kChunk = MOEFY_TILE_CHUNK;
constexpr uint32_t kKeyThreads = 1024;
constexpr uint32_t kParts = kKeyThreads / kChunk;  // threads of a token
constexpr uint32_t kPlaceThreads = 256;
constexpr uint32_t kPlaceParts = 4;  // threads that look up one key
constexpr uint32_t kUnionExperts = 64;  // that a block looks at together
constexpr uint32_t kGroups = MOEFY_TILE_TOKENS / 32;
constexpr uint32_t kVectors = kGroups / 4;
constexpr uint32_t kUnionThreads = kUnionExperts / 32 * kGroups * 32;
constexpr uint32_t kBits = 32 / kParts;  // of a word that a thread looks at
constexpr uint32_t kAhead = 4;           // words that are read early
constexpr uint32_t kNoKey = 0xffffff, kNoRank = MOEFY_MAX_EXPERTS;

/// How often each expert is selected, with its number, so that no two are the same: ranks are numbers of smaller ones. Experts
/// of the last word that do not exist have the rank of none.
__device__ __forceinline__ void rank_experts(const moefy_token_tiles_params& p, uint32_t* values, uint32_t* ranks) {
  for (uint32_t e = threadIdx.x; e < p.num_experts; e += kKeyThreads) values[e] = e;
  __syncthreads();
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < p.num_chunks * p.num_experts; i += kKeyThreads) {
    atomicAdd(values + i % p.num_experts, p.chunk_counts[i] * MOEFY_MAX_EXPERTS);
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < ceil_div(p.num_experts, 32) * 32; e += kKeyThreads) {
    uint32_t rank = e < p.num_experts ? 0 : kNoRank;
    const uint32_t value = e < p.num_experts ? values[e] : 0;
#pragma unroll 8
    for (uint32_t other = 0; other < p.num_experts; ++other) rank += values[other] < value;
    ranks[e] = rank;
  }
  __syncthreads();
}

/// The two rarest experts of a token.
struct Rarest {
  uint32_t first = kNoRank, second = kNoRank;

  __device__ void include(uint32_t rank) {
    second = min(second, max(first, rank));
    first = min(first, rank);
  }

  /// `mask` has some bits of a word, `ranks` those of their experts.
  __device__ void include(const uint32_t* ranks, uint32_t mask) {
#pragma unroll
    for (uint32_t i = 0; i < kBits; ++i) {
      const uint32_t rank = ranks[i];
      include(mask >> i & 1 ? rank : kNoRank);
    }
  }

  __device__ uint32_t key() const {
    if (first == kNoRank) return kNoKey;
    // A token with one expert comes before those that have another one too; no key is 0.
    return first * MOEFY_MAX_EXPERTS + (second == kNoRank ? first : second) + 1;
  }
};

/// How many keys of a sorted chunk are at most `most`.
__device__ __forceinline__ uint32_t count_at_most(const uint32_t* chunk, uint32_t most) {
  uint32_t count = 0;
#pragma unroll
  for (uint32_t step = kChunk / 2; step > 0; step /= 2) count += chunk[count + step - 1] <= most ? step : 0;
  return count + (chunk[count] <= most);
}

}  // namespace
}  // namespace moefy

// Keys of a chunk of tokens, each with the number of its token in the chunk, ascending. Dynamic shared memory: two words for
// each bit of a row of the mask.
extern "C" __global__ void __launch_bounds__(moefy::kKeyThreads)
    moefy_token_tiles_keys(const __grid_constant__ moefy_token_tiles_params p) {
  using namespace moefy;
  extern __shared__ uint32_t experts[];
  __shared__ __align__(16) uint32_t keys[kChunk];
  begin();
  const uint32_t own = threadIdx.x / kParts, part = threadIdx.x % kParts, token = blockIdx.x * kChunk + own;
  const uint32_t words = ceil_div(p.num_experts, 32), first_bit = part * kBits;
  const uint32_t* row = p.mask + static_cast<uint64_t>(token) * words;
  const bool exists = token < p.num_tokens;
  uint32_t early[kAhead];
#pragma unroll
  for (uint32_t i = 0; i < kAhead; ++i) early[i] = exists && i < words ? row[i] : 0;
  const bool valid = token < valid_tokens(p);
  uint32_t* ranks = experts + words * 32;
  rank_experts(p, experts, ranks);
  Rarest rarest;
#pragma unroll
  for (uint32_t i = 0; i < kAhead; ++i) {
    if (i < words) rarest.include(ranks + i * 32 + first_bit, early[i] >> first_bit);
  }
  for (uint32_t i = kAhead; i < words; ++i) {
    rarest.include(ranks + i * 32 + first_bit, exists ? row[i] >> first_bit : 0);
  }
#pragma unroll
  for (uint32_t distance = 1; distance < kParts; distance *= 2) {
    const uint32_t first = __shfl_xor_sync(kFullWarp, rarest.first, distance);
    const uint32_t second = __shfl_xor_sync(kFullWarp, rarest.second, distance);
    rarest.include(first);
    rarest.include(second);
  }
  // Beyond the last token nothing is as large.
  const uint32_t mine = exists ? (valid ? rarest.key() : kNoKey) * kChunk + own : 0xffffffffu;
  if (part == 0) keys[own] = mine;
  __syncthreads();
  uint32_t place = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < kChunk / 4; i += kParts) {
    const uint4 four = reinterpret_cast<const uint4*>(keys)[i + part];
    place += (four.x < mine) + (four.y < mine) + (four.z < mine) + (four.w < mine);
  }
#pragma unroll
  for (uint32_t distance = 1; distance < kParts; distance *= 2) place += __shfl_xor_sync(kFullWarp, place, distance);
  if (!exists) place = own;
  if (part == 0) p.sorted[blockIdx.x * kChunk + place] = mine;
}

// The place of every token. Dynamic shared memory: all keys.
extern "C" __global__ void __launch_bounds__(moefy::kPlaceThreads)
    moefy_token_tiles_places(const __grid_constant__ moefy_token_tiles_params p) {
  using namespace moefy;
  extern __shared__ __align__(16) uint32_t sorted[];
  begin();
  const uint32_t num_chunks = ceil_div(p.num_tokens, kChunk);
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < num_chunks * kChunk / 4; i += kPlaceThreads) {
    reinterpret_cast<uint4*>(sorted)[i] = reinterpret_cast<const uint4*>(p.sorted)[i];
  }
  __syncthreads();
  const uint32_t entry = blockIdx.x * (kPlaceThreads / kPlaceParts) + threadIdx.x / kPlaceParts;
  const uint32_t own = entry / kChunk, part = threadIdx.x % kPlaceParts;
  const bool exists = entry < p.num_tokens;
  const uint32_t key = exists ? sorted[entry] : 0;
  // Of the same keys, those of earlier chunks come first.
  const uint32_t at_most = key | (kChunk - 1), less = (key & ~(kChunk - 1)) - 1;
  uint32_t place = part == 0 ? entry % kChunk : 0;
#pragma unroll 4
  for (uint32_t chunk = part; chunk < num_chunks; chunk += kPlaceParts) {
    const uint32_t count = count_at_most(sorted + chunk * kChunk, chunk < own ? at_most : less);
    place += chunk == own ? 0 : count;
  }
#pragma unroll
  for (uint32_t distance = 1; distance < kPlaceParts; distance *= 2) {
    place += __shfl_xor_sync(kFullWarp, place, distance);
  }
  if (exists && part == 0) p.token_ids[place] = own * kChunk + key % kChunk;
}

// What the tokens of a tile select.
extern "C" __global__ void __launch_bounds__(moefy::kUnionThreads)
    moefy_token_tiles_unions(const __grid_constant__ moefy_token_tiles_params p) {
  using namespace moefy;
  __shared__ __align__(16) uint32_t selected_by[kUnionExperts][kGroups];
  __shared__ uint32_t nonempty[kUnionExperts / 32];
  begin();
  const uint32_t tile = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t place = tile * MOEFY_TILE_TOKENS + warp % kGroups * 32 + lane;
  const uint32_t words = ceil_div(p.num_experts, 32);
  // Padding comes last.
  const bool valid = place < valid_tokens(p);
  const uint64_t row = valid ? static_cast<uint64_t>(p.token_ids[place]) * words : 0;
  uint32_t before = 0;
  for (uint32_t first = 0; first < p.num_experts; first += kUnionExperts) {
    const uint32_t word = first / 32 + warp / kGroups;
    const uint32_t bits = valid && word < words ? p.mask[row + word] : 0;
    uint32_t mine = 0;
#pragma unroll
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t of_expert = __ballot_sync(kFullWarp, bits >> i & 1);
      mine = lane == i ? of_expert : mine;
    }
    __syncthreads();  // the last experts are done with
    selected_by[warp / kGroups * 32 + lane][warp % kGroups] = mine;
    __syncthreads();
    const bool looks = threadIdx.x < kUnionExperts;
    const uint32_t expert = first + threadIdx.x;
    uint4 tokens[kVectors] = {};
    uint32_t those = 0;
    if (looks) {
      uint32_t any = 0;
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) {
        tokens[i] = reinterpret_cast<const uint4*>(selected_by[threadIdx.x])[i];
        any |= tokens[i].x | tokens[i].y | tokens[i].z | tokens[i].w;
      }
      those = __ballot_sync(kFullWarp, expert < p.num_experts && any != 0);
      if (lane == 0) nonempty[warp] = those;
    }
    __syncthreads();
    if (looks && (those >> lane & 1)) {
      const uint32_t earlier = warp == 0 ? 0 : __popc(nonempty[0]);
      const uint64_t at = static_cast<uint64_t>(tile) * p.num_experts + before + earlier + __popc(those & ((1u << lane) - 1));
      p.tile_expert_ids[at] = expert;
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(p.tile_masks)[at * kVectors + i] = tokens[i];
    }
    before += __popc(nonempty[0]) + __popc(nonempty[1]);
  }
  if (threadIdx.x == 0) p.tile_counts[tile] = before;
}
