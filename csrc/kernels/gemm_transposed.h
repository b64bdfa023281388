// The matrix product of a pointwise convolution's weight gradient: see GemmTransposedArgs for the operation.
//
// As in the other product a tile of outputs stays in registers, 6 × 4 vectors, and each row costs it ten loads for 24
// multiply-adds. The four vectors of b are copied out of their rows first, once for all tiles below each other: rows of
// some hundred channels would meet in few sets of L1. What comes next from memory is fetched meanwhile, a line a row:
// passes over memory and products alternate, and each would wait for the other.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// The lines to fetch, one after another.
template <class T>
struct LineFetcher {
  const GemmTransposedArgs<T>& g;
  int stream = -1;
  const char *next = nullptr, *end = nullptr;

  void advance() {
    while (next >= end && stream < GemmTransposedArgs<T>::kFetches) {
      if (++stream == GemmTransposedArgs<T>::kFetches) break;
      next = static_cast<const char*>(g.fetch[stream]);
      end = next == nullptr ? nullptr : next + g.fetch_bytes[stream];
    }
  }
};

template <class T, int kColumns, int kVectors>
void gemm_transposed_tile(const GemmTransposedArgs<T>& g, int64_t i, int64_t j, int last, LineFetcher<T>& lines) {
  using V = Vec<T>;
  typename V::Reg acc[kColumns][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kColumns; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V::set1(0);
  }
  const T *a = g.a + i, *b = g.panel;
  const int64_t a_stride = g.a_stride;
  for (int64_t row = 0; row < g.rows;) {
    lines.advance();
    const int64_t left = g.rows - row;
    const int64_t fetching = (lines.end - lines.next + kCacheLine - 1) / kCacheLine;
    const int64_t count = fetching > 0 && fetching < left ? fetching : left;
    // Without anything to fetch, the same line again costs nothing.
    const char* line = fetching > 0 ? lines.next : reinterpret_cast<const char*>(b);
    const int64_t line_step = fetching > 0 ? kCacheLine : 0;
    for (int64_t n = 0; n < count; ++n, a += a_stride, b += kVectors * V::kLanes, line += line_step) {
      __builtin_prefetch(line, 0, 2);
      typename V::Reg w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = V::load(b + v * V::kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kColumns; ++r) {
        const auto x = V::set1(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = V::fma(x, w[v], acc[r][v]);
      }
    }
    if (fetching > 0) lines.next = line;
    row += count;
  }
  T* out = g.out + i * g.out_stride + j;
  const bool whole = last == V::kLanes;
#pragma GCC unroll 12
  for (int r = 0; r < kColumns; ++r, out += g.out_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + v * V::kLanes;
      if (v < kVectors - 1 || whole) {
        V::store(to, V::add(V::load(to), acc[r][v]));
      } else {
        V::store_n(to, V::add(V::load_n(to, last), acc[r][v]), last);
      }
    }
  }
}

template <class T>
using GemmTransposedTile = void (*)(const GemmTransposedArgs<T>&, int64_t, int64_t, int, LineFetcher<T>&);

template <class T, int kVectors, int kColumns = (kVectors == 1 ? 2 : 1) * 6>
GemmTransposedTile<T> select_gemm_transposed(int columns) {
  if constexpr (kColumns > 1) {
    if (columns < kColumns) return select_gemm_transposed<T, kVectors, kColumns - 1>(columns);
  }
  return gemm_transposed_tile<T, kColumns, kVectors>;
}

template <class T>
GemmTransposedTile<T> select_gemm_transposed(int columns, int vectors) {
  if constexpr (GemmShape<T>::kPanelVectors == 4) {
    if (vectors == 4) return select_gemm_transposed<T, 4>(columns);
    if (vectors == 3) return select_gemm_transposed<T, 3>(columns);
  }
  return vectors == 2 ? select_gemm_transposed<T, 2>(columns) : select_gemm_transposed<T, 1>(columns);
}

// Columns of b from j on, dense; past the last of `last` lanes are zeros.
template <class T>
void copy_panel(const GemmTransposedArgs<T>& g, int64_t j, int vectors, int last) {
  using V = Vec<T>;
  const T* b = g.b + j;
  T* panel = g.panel;
  for (int64_t row = 0; row < g.rows; ++row, b += g.b_stride) {
    for (int v = 0; v < vectors; ++v, panel += V::kLanes) {
      V::store(panel, v == vectors - 1 ? V::load_n(b + v * V::kLanes, last) : V::load(b + v * V::kLanes));
    }
  }
}

template <class T>
void gemm_transposed(const GemmTransposedArgs<T>& g) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t vectors = (g.columns_b + kLanes - 1) / kLanes;
  const int64_t panels = panel_count(vectors, GemmShape<T>::kPanelVectors);
  LineFetcher<T> lines{g};
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = panel_first_vector(p, panels, vectors);
    const int panel_vectors = static_cast<int>(panel_first_vector(p + 1, panels, vectors) - first);
    const int64_t j = first * kLanes, width = g.columns_b - j;
    const int last = static_cast<int>(width < panel_vectors * kLanes ? width - (panel_vectors - 1) * kLanes : kLanes);
    copy_panel(g, j, panel_vectors, last);
    const int64_t most = panel_vectors == 1 ? 12 : 6, tiles = (g.columns_a + most - 1) / most;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * g.columns_a / tiles, end = (t + 1) * g.columns_a / tiles;
      select_gemm_transposed<T>(static_cast<int>(end - i), panel_vectors)(g, i, j, last, lines);
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
