// The matrix product under every dense convolution: see GemmArgs for the operation.
//
// A micro-kernel holds kRows × kVectors accumulators in registers. For each k it loads kVectors weights (consecutive in
// the packed panel) and broadcasts kRows inputs, so that a full tile of 6 × 4 AVX-512 vectors costs 24 multiply-adds
// for 10 loads. The number of rows for a narrower panel keeps the same number of accumulators. Rows are dealt to tiles
// evenly (49 = 4 × 6 + 5 × 5, not 8 × 6 + 1), since a tile of one row is bound by the latency of its multiply-adds.
// Between two tiles some 50 cycles are lost, as long as two of them share one loop. Columns end in a half vector where
// one is enough: 24, 40, 72, 120 and 200 channels would waste up to a third of the arithmetic in whole ones.
//
// The first tiles of a panel bring the next panel's weights into L2, some bytes for each k: at batch 1 a network reads
// its weights from L3 or memory. A line for each k, faster than memory gives them, held up the loads of the tiles: down
// to a quarter of that, where there are tiles enough, was 1–2 % faster on whole networks (Cascade Lake). Past the last
// panel of all lies, mostly, the next layer, as layers are packed in their order.
// Short products, which have little to bring, go without: one more instruction a k costs them 2 %.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

constexpr int64_t kCacheLine = 64, kFetchDepth = 64, kFetchSpread = 4;

template <class T>
struct GemmShape {
  // 16 registers hold 12 accumulators, two weights and an input; 32 hold 24, four and an input.
  static constexpr int kAccumulators = Vec<T>::kRegisters == 32 ? 24 : 12;
  static constexpr int kPanelVectors = Vec<T>::kRegisters == 32 ? 4 : 2;
  static constexpr int rows(int vectors) { return kAccumulators / vectors; }
};

// The inputs of a tile's rows at one k. One pointer for six rows leaves registers to the loop. The compiler would
// rather keep one pointer in all and each row's distance from it, spilled, so it must not see how the pointers hang
// together.
template <class T, int kRows>
struct GemmInputs {
  static constexpr int kGroup = 6, kGroups = (kRows + kGroup - 1) / kGroup;
  const T* group[kGroups];

  [[gnu::always_inline]] GemmInputs(const T* a, int64_t stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) {
      group[i] = a + kGroup * i * stride;
      if constexpr (kGroups > 1) asm("" : "+r"(group[i]));
    }
  }
  [[gnu::always_inline]] T row(int i, int64_t stride) const { return group[i / kGroup][i % kGroup * stride]; }
  [[gnu::always_inline]] void next() {
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) ++group[i];
  }
};

// A tile of outputs in registers: kFull whole vectors and, with kHalf, a half one a row.
template <class T, int kRows, int kFull, bool kHalf>
struct GemmAccumulators {
  using V = Vec<T>;
  using H = Vec<HalfOf<T>>;
  typename V::Reg full[kRows][kFull > 0 ? kFull : 1];
  typename V::HalfReg half[kRows][1];

  [[gnu::always_inline]] void start(const T* bias) {
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) full[i][j] = V::load(bias + j * V::kLanes);
      if constexpr (kHalf) half[i][0] = H::load(bias + kFull * V::kLanes);
    }
  }

  // One k: the weights of the panel against one input of each row.
  [[gnu::always_inline]] void multiply(const GemmInputs<T, kRows>& a, int64_t a_stride, const T* weight) {
    typename V::Reg w[kFull > 0 ? kFull : 1];
    typename V::HalfReg w_half;
#pragma GCC unroll 4
    for (int j = 0; j < kFull; ++j) w[j] = V::load(weight + j * V::kLanes);
    if constexpr (kHalf) w_half = H::load(weight + kFull * V::kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const auto x = V::set1(a.row(i, a_stride));
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) full[i][j] = V::fma(x, w[j], full[i][j]);
      if constexpr (kHalf) half[i][0] = H::fma(H::low(x), w_half, half[i][0]);
    }
  }

  // The last vector, half or whole, counts `last` lanes.
  [[gnu::always_inline]] void add(const T* residual, int64_t stride, int last) {
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i, residual += stride) {
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) {
        const T* r = residual + j * V::kLanes;
        const bool whole = kHalf || j < kFull - 1 || last == V::kLanes;
        full[i][j] = V::add(full[i][j], whole ? V::load(r) : V::load_n(r, last));
      }
      if constexpr (kHalf) half[i][0] = H::add(half[i][0], H::load_n(residual + kFull * V::kLanes, last));
    }
  }

  [[gnu::always_inline]] void activate(Activation activation) {
    if constexpr (kFull > 0) activate_accumulators<T>(activation, full);
    if constexpr (kHalf) activate_accumulators<HalfOf<T>>(activation, half);
  }

  [[gnu::always_inline]] void store(T* out, int64_t stride, int last) const {
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i, out += stride) {
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) {
        if (kHalf || j < kFull - 1 || last == V::kLanes) {
          V::store(out + j * V::kLanes, full[i][j]);
        } else {
          V::store_n(out + j * V::kLanes, full[i][j], last);
        }
      }
      if constexpr (kHalf) H::store_n(out + kFull * V::kLanes, half[i][0], last);
    }
  }
};

template <class T>
struct GemmPanel {
  const T* weight;
  int64_t column;  // the first
  int last;        // columns in the last vector
};

// How a tile goes through its inputs: kTaps where each chunk is a single k; kFetching brings what lies from `fetch` on,
// `fetch_step` bytes for each k. (One loop for chunks of every length costs the long ones up to 4 %.)
enum class GemmLoop { kChunks, kFetching, kTaps };

// `count` tiles one below the other, from row `row` on.
template <class T, int kRows, int kVectors, bool kHalf, GemmLoop kLoop>
void gemm_tiles(const GemmArgs<T>& g, const GemmPanel<T>& panel, int64_t row, int64_t count, const char* fetch,
                int64_t fetch_step) {
  constexpr int kLanes = Vec<T>::kLanes, kFull = kVectors - kHalf;
  constexpr int kWidth = kFull * kLanes + (kHalf ? Vec<HalfOf<T>>::kLanes : 0);
  const int64_t a_stride = g.a_stride;
  const T* a = g.a + row * a_stride;
  T* out = g.out + row * g.out_stride + panel.column;
  const T* residual = g.residual == nullptr ? nullptr : g.residual + row * g.residual_stride + panel.column;
  for (; count > 0; --count, a += kRows * a_stride, out += kRows * g.out_stride) {
    const T* weight = panel.weight;
    GemmAccumulators<T, kRows, kFull, kHalf> acc;
    acc.start(g.bias + panel.column);
    if constexpr (kLoop == GemmLoop::kTaps) {
      for (int64_t chunk = 0; chunk < g.chunks; ++chunk, weight += kWidth) {
        acc.multiply(GemmInputs<T, kRows>(a + g.chunk_offset[chunk], a_stride), a_stride, weight);
      }
    } else {
      for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
        GemmInputs<T, kRows> inputs(a + g.chunk_offset[chunk], a_stride);
        for (int64_t k = 0; k < g.chunk_length; ++k, inputs.next(), weight += kWidth) {
          if constexpr (kLoop == GemmLoop::kFetching) {
            __builtin_prefetch(fetch, 0, 2);
            fetch += fetch_step;
          }
          acc.multiply(inputs, a_stride, weight);
        }
      }
    }
    if (residual != nullptr) {
      acc.add(residual, g.residual_stride, panel.last);
      residual += kRows * g.residual_stride;
    }
    acc.activate(g.activation);
    acc.store(out, g.out_stride, panel.last);
    if (!is_cheap(g.activation)) {
      activate_tile(g.activation, out, g.out_stride, kRows, (kVectors - 1) * kLanes + panel.last);
    }
  }
}

template <class T>
using GemmTiles = void (*)(const GemmArgs<T>&, const GemmPanel<T>&, int64_t, int64_t, const char*, int64_t);

template <class T, int kVectors, bool kHalf, int kRows = GemmShape<T>::rows(kVectors)>
GemmTiles<T> select_gemm_rows(int rows, GemmLoop loop) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return select_gemm_rows<T, kVectors, kHalf, kRows - 1>(rows, loop);
  }
  // Float64 is here to check float32's code: one loop, right for all, spares it a third of the build.
  if constexpr (sizeof(T) == sizeof(float)) {
    if (loop == GemmLoop::kTaps) return gemm_tiles<T, kRows, kVectors, kHalf, GemmLoop::kTaps>;
    // A product of many rows has tiles of the two or three greatest heights.
    if constexpr (kRows > 1 && kRows >= GemmShape<T>::rows(kVectors) - 2) {
      if (loop == GemmLoop::kFetching) return gemm_tiles<T, kRows, kVectors, kHalf, GemmLoop::kFetching>;
    }
  }
  return gemm_tiles<T, kRows, kVectors, kHalf, GemmLoop::kChunks>;
}

template <class T, bool kHalf>
GemmTiles<T> select_gemm_tiles(int vectors, int rows, GemmLoop loop) {
  if constexpr (GemmShape<T>::kPanelVectors == 4) {
    if (vectors == 4) return select_gemm_rows<T, 4, kHalf>(rows, loop);
    if (vectors == 3) return select_gemm_rows<T, 3, kHalf>(rows, loop);
  }
  return vectors == 2 ? select_gemm_rows<T, 2, kHalf>(rows, loop) : select_gemm_rows<T, 1, kHalf>(rows, loop);
}

template <class T>
GemmTiles<T> select_gemm_tiles(int vectors, int rows, bool half, GemmLoop loop) {
  if constexpr (Vec<HalfOf<T>>::kLanes > 0) {
    if (half) return select_gemm_tiles<T, true>(vectors, rows, loop);
  }
  return select_gemm_tiles<T, false>(vectors, rows, loop);
}

template <class T>
void gemm(const GemmArgs<T>& g) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t vectors = (g.columns + kLanes - 1) / kLanes;
  const int64_t panels = panel_count(vectors, GemmShape<T>::kPanelVectors);
  const int64_t depth = g.chunks * g.chunk_length, panel_depth = g.depth > 0 ? g.depth : depth;
  const bool taps = g.chunk_length == 1;
  for (int64_t block = 0; block < g.rows; block += g.rows_per_block) {
    const int64_t rows = block + g.rows_per_block < g.rows ? g.rows_per_block : g.rows - block;
    for (int64_t p = g.panel_begin; p < g.panel_end; ++p) {
      const int64_t first = panel_first_vector(p, panels, vectors);
      const int panel_vectors = static_cast<int>(panel_first_vector(p + 1, panels, vectors) - first);
      const int64_t column = first * kLanes;
      const int64_t width = g.columns - column < panel_vectors * kLanes ? g.columns - column : panel_vectors * kLanes;
      const int last = static_cast<int>(width - (panel_vectors - 1) * kLanes);
      const bool half = last <= Vec<HalfOf<T>>::kLanes;
      const int64_t packed_width = panel_vectors * kLanes - (half ? kLanes - Vec<HalfOf<T>>::kLanes : 0);
      const T* weight = g.weight + column * panel_depth + g.first_k * packed_width;
      const GemmPanel<T> panel{weight, column, last};
      const int64_t max_rows = GemmShape<T>::rows(panel_vectors);
      const int64_t tiles = (rows + max_rows - 1) / max_rows;
      // The next panel has a few lines for each k. The first tiles bring them, up to four times as many tiles as lines,
      // since memory gives them slowly; where not even as many tiles follow, it is not worth it.
      const int64_t lines = (packed_width * static_cast<int64_t>(sizeof(T)) + kCacheLine - 1) / kCacheLine;
      const bool worth = depth >= kFetchDepth && !taps && lines < tiles;
      const int64_t most = kFetchSpread * lines, fetching = !worth ? 0 : most < tiles ? most : tiles - 1;
      const int64_t fetch_step = worth ? (kCacheLine * lines + fetching - 1) / fetching : 0;
      const bool again = p + 1 == g.panel_end && block + rows < g.rows;  // the next block begins with the first panel
      const T* begin = g.weight + panel_first_vector(g.panel_begin, panels, vectors) * kLanes * panel_depth;
      const char* fetch = reinterpret_cast<const char*>(again ? begin : weight + depth * packed_width);
      // Tiles of two heights at most, the high ones first: rows / tiles rounded up and down.
      const int low = static_cast<int>(rows / tiles);
      const int64_t high_tiles = rows % tiles;
      int64_t row = block;
      for (int64_t t = 0; t < tiles;) {
        const bool high = t < high_tiles, fetches = t < fetching;
        int64_t end = high ? high_tiles : tiles;
        if (fetches && fetching < end) end = fetching;
        const GemmLoop loop = taps ? GemmLoop::kTaps : fetches ? GemmLoop::kFetching : GemmLoop::kChunks;
        select_gemm_tiles<T>(panel_vectors, low + high, half, loop)(g, panel, row, end - t, fetch, fetch_step);
        if (fetches) fetch += (end - t) * depth * fetch_step;
        row += (end - t) * (low + high);
        t = end;
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
