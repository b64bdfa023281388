// The matrix product of a pointwise convolution's weight gradient: see GemmTransposedArgs for the operation.
//
// As in the other product a tile of outputs stays in registers, 6 × 4 vectors, and each row costs it ten loads for 24
// multiply-adds. The four vectors of b are copied out of some rows first, which L1 holds for all tiles below each
// other: where they lie, rows of some hundred channels would meet in few sets of L1. What comes next from memory is
// fetched meanwhile, as evenly as it goes: passes over memory and products alternate, and each would wait for the
// other.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

constexpr int64_t kPanelRows = 96;

// What is left to fetch, some bytes a row.
template <class T>
struct LineFetcher {
  const GemmTransposedArgs<T>& g;
  int64_t step = 0;
  int stream = 0;
  const char *next = nullptr, *end = nullptr;

  LineFetcher(const GemmTransposedArgs<T>& args, int64_t all_rows) : g(args) {
    int64_t bytes = 0;
    for (int i = 0; i < g.kFetches; ++i) bytes += g.fetch[i] == nullptr ? 0 : g.fetch_bytes[i];
    step = bytes / (all_rows > 0 ? all_rows : 1) + 1;
    start();
  }
  void start() {
    for (; stream < g.kFetches && next >= end; ++stream) {
      next = static_cast<const char*>(g.fetch[stream]);
      end = next == nullptr ? nullptr : next + g.fetch_bytes[stream];
    }
  }
  // Where to fetch from for the next `rows` rows.
  const char* take(int64_t rows) {
    if (next >= end) start();
    const char* from = next;
    next += rows * step;
    return from;
  }
};

template <class T, int kColumns, int kVectors>
void gemm_transposed_tile(const GemmTransposedArgs<T>& g, const T* a, int64_t rows, T* out, int last, const char* fetch,
                          int64_t fetch_step) {
  using V = Vec<T>;
  typename V::Reg acc[kColumns][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kColumns; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V::set1(0);
  }
  // The outputs may lie far away.
#pragma GCC unroll 12
  for (int r = 0; r < kColumns; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + r * g.out_stride + v * V::kLanes, 1, 3);
  }
  const T* b = g.panel;
  const int64_t a_stride = g.a_stride;
  for (int64_t row = 0; row < rows; ++row, a += a_stride, b += kVectors * V::kLanes, fetch += fetch_step) {
    __builtin_prefetch(fetch, 0, 2);
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
using GemmTransposedTile = void (*)(const GemmTransposedArgs<T>&, const T*, int64_t, T*, int, const char*, int64_t);

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

// Columns of b, dense; past the last of `last` lanes are zeros.
template <class T>
void copy_panel(const T* b, int64_t stride, int64_t rows, int vectors, int last, T* panel) {
  using V = Vec<T>;
  for (int64_t row = 0; row < rows; ++row, b += stride) {
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
  const int64_t chunks = (g.rows + kPanelRows - 1) / kPanelRows;
  LineFetcher<T> lines(g, g.rows * panels * ((g.columns_a + 5) / 6));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t row = chunk * g.rows / chunks, rows = (chunk + 1) * g.rows / chunks - row;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = panel_first_vector(p, panels, vectors);
      const int panel_vectors = static_cast<int>(panel_first_vector(p + 1, panels, vectors) - first);
      const int64_t j = first * kLanes, width = g.columns_b - j;
      const int last = static_cast<int>(width < panel_vectors * kLanes ? width - (panel_vectors - 1) * kLanes : kLanes);
      copy_panel(g.b + row * g.b_stride + j, g.b_stride, rows, panel_vectors, last, g.panel);
      const int64_t most = panel_vectors == 1 ? 12 : 6, tiles = (g.columns_a + most - 1) / most;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = t * g.columns_a / tiles, end = (t + 1) * g.columns_a / tiles;
        select_gemm_transposed<T>(static_cast<int>(end - i), panel_vectors)(
            g, g.a + row * g.a_stride + i, rows, g.out + i * g.out_stride + j, last, lines.take(rows), lines.step);
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
