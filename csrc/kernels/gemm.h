// The matrix product under every dense convolution: see GemmArgs for the operation.
//
// A micro-kernel holds kRows × kVectors accumulators in registers. For each k it loads kVectors weights (consecutive in
// the packed panel) and broadcasts kRows inputs, so that a full tile of 6 × 4 AVX-512 vectors costs 24 multiply-adds
// for 10 loads. The number of rows for a narrower panel keeps the same number of accumulators, up to 12 rows: past that
// the row addresses no longer fit the general registers. Rows are dealt to tiles evenly (49 = 4 × 6 + 5 × 5, not 8 × 6
// + 1), since a tile of one row is bound by the latency of its multiply-adds.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T>
struct GemmShape {
  // 16 registers hold 12 accumulators, two weights and an input; 32 hold 24, four and an input.
  static constexpr int kAccumulators = Vec<T>::kRegisters == 32 ? 24 : 12;
  static constexpr int kPanelVectors = Vec<T>::kRegisters == 32 ? 4 : 2;
  static constexpr int kMaxRows = 12;
  static constexpr int rows(int vectors) {
    return kAccumulators / vectors < kMaxRows ? kAccumulators / vectors : kMaxRows;
  }
};

// One k: kVectors weights from the panel against one input of each row.
template <class T, int kRows, int kVectors>
[[gnu::always_inline]] inline void multiply_row(const T* a, int64_t a_stride, const T* weight,
                                                typename Vec<T>::Reg (&acc)[kRows][kVectors]) {
  using V = Vec<T>;
  typename V::Reg w[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) w[j] = V::load(weight + j * V::kLanes);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    const auto x = V::set1(a[i * a_stride]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = V::fma(x, w[j], acc[i][j]);
  }
}

template <class T, int kRows, int kVectors>
void gemm_tile(const GemmArgs<T>& g, const T* a, const T* weight, int64_t column, const T* residual, T* out,
               int last_lanes) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const int64_t a_stride = g.a_stride;
  typename V::Reg acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const auto bias = V::load(g.bias + column + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) acc[i][j] = bias;
  }
  if (g.chunk_length == 1) {
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk, weight += kVectors * kLanes) {
      multiply_row<T>(a + g.chunk_offset[chunk], a_stride, weight, acc);
    }
  } else {
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const T* ak = a + g.chunk_offset[chunk];
      for (int64_t k = 0; k < g.chunk_length; ++k, ++ak, weight += kVectors * kLanes) {
        multiply_row<T>(ak, a_stride, weight, acc);
      }
    }
  }
  const bool tail = last_lanes < kLanes;
  if (residual != nullptr) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const T* r = residual + i * g.residual_stride + j * kLanes;
        acc[i][j] = V::add(acc[i][j], j == kVectors - 1 && tail ? V::load_n(r, last_lanes) : V::load(r));
      }
    }
  }
  activate_accumulators<T>(g.activation, acc);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* o = out + i * g.out_stride + j * kLanes;
      if (j == kVectors - 1 && tail) {
        V::store_n(o, acc[i][j], last_lanes);
      } else {
        V::store(o, acc[i][j]);
      }
    }
  }
  if (!is_cheap(g.activation)) {
    activate_tile(g.activation, out, g.out_stride, kRows, (kVectors - 1) * kLanes + last_lanes);
  }
}

template <class T>
using GemmTile = void (*)(const GemmArgs<T>&, const T*, const T*, int64_t, const T*, T*, int);

template <class T, int kVectors, int kRows>
GemmTile<T> select_gemm_rows(int rows) {
  if constexpr (kRows == 1) {
    return gemm_tile<T, 1, kVectors>;
  } else {
    return rows == kRows ? gemm_tile<T, kRows, kVectors> : select_gemm_rows<T, kVectors, kRows - 1>(rows);
  }
}

template <class T>
GemmTile<T> select_gemm_tile(int vectors, int rows) {
  using S = GemmShape<T>;
  if constexpr (S::kPanelVectors == 4) {
    if (vectors == 4) return select_gemm_rows<T, 4, S::rows(4)>(rows);
    if (vectors == 3) return select_gemm_rows<T, 3, S::rows(3)>(rows);
  }
  if (vectors == 2) return select_gemm_rows<T, 2, S::rows(2)>(rows);
  return select_gemm_rows<T, 1, S::rows(1)>(rows);
}

template <class T>
void gemm(const GemmArgs<T>& g) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t vectors = (g.columns + kLanes - 1) / kLanes;
  const int64_t panels = panel_count(vectors, GemmShape<T>::kPanelVectors);
  const int64_t depth = g.chunks * g.chunk_length;
  for (int64_t block = 0; block < g.rows; block += g.rows_per_block) {
    const int64_t rows = block + g.rows_per_block < g.rows ? g.rows_per_block : g.rows - block;
    for (int64_t p = g.panel_begin; p < g.panel_end; ++p) {
      const int64_t first = panel_first_vector(p, panels, vectors);
      const int panel_vectors = static_cast<int>(panel_first_vector(p + 1, panels, vectors) - first);
      const int64_t column = first * kLanes;
      const int64_t width = g.columns - column < panel_vectors * kLanes ? g.columns - column : panel_vectors * kLanes;
      const int last_lanes = static_cast<int>(width - (panel_vectors - 1) * kLanes);
      const T* weight = g.weight + column * depth;
      const int64_t max_rows = GemmShape<T>::rows(panel_vectors);
      const int64_t tiles = (rows + max_rows - 1) / max_rows;
      // Tiles of two heights at most: rows / tiles rounded down and up.
      const int low = static_cast<int>(rows / tiles);
      const GemmTile<T> low_tile = select_gemm_tile<T>(panel_vectors, low);
      const GemmTile<T> high_tile = rows % tiles == 0 ? low_tile : select_gemm_tile<T>(panel_vectors, low + 1);
      const int64_t high_tiles = rows % tiles;
      int64_t row = block;
      for (int64_t t = 0; t < tiles; ++t) {
        const bool high = t < high_tiles;
        const T* residual = g.residual == nullptr ? nullptr : g.residual + row * g.residual_stride + column;
        (high ? high_tile : low_tile)(g, g.a + row * g.a_stride, weight, column, residual,
                                      g.out + row * g.out_stride + column, last_lanes);
        row += high ? low + 1 : low;
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
