// 3x3 convolution, stride 1, padding 1, by minimal filtering: F(4x4, 3x3) of Lavin and Gray, arXiv 1509.09308.
// A tile of 4x4 outputs needs 36 products a pair of channels instead of 144. Maps lie in memory as [N, H, W, C].
//
// A thread takes a block of tiles through all three stages (inputs to 36 points, one matrix product a point, points to
// outputs), so that the 36 planes of a block stay in its cache. The sum over channels runs in one order whatever the
// block, so a sample's result does not depend on the rest of the batch or on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

// VECTORS x ROWS sums of LANES floats fill the registers of the machine without spilling.
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int PANEL = LANES * VECTORS;  // output channels computed together
constexpr int ROWS = 6;                 // tiles computed together
constexpr int SIDE = 6, POINTS = SIDE * SIDE, STEP = 4;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// The points are 0, +-A, +-B and infinity. These A and B have exact powers and halve the error of the usual +-1, +-2.
constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B;

// Six inputs to their points: polynomials that vanish at all points but one.
inline void to_points(const Vector* d, Vector* v) {
    const Vector p = d[4] - B2 * d[2], q = A * (d[3] - B2 * d[1]), r = d[4] - A2 * d[2], s = B * (d[3] - A2 * d[1]);
    v[0] = A2 * B2 * d[0] - (A2 + B2) * d[2] + d[4];
    v[1] = p + q;
    v[2] = p - q;
    v[3] = r + s;
    v[4] = r - s;
    v[5] = A2 * B2 * d[1] - (A2 + B2) * d[3] + d[5];
}

// Four outputs from the products at the points: y[j] = sum of point^j m[point].
inline void from_points(const Vector* m, Vector* y) {
    const Vector p = m[1] + m[2], q = A * (m[1] - m[2]), r = m[3] + m[4], s = B * (m[3] - m[4]);
    y[0] = m[0] + p + r;
    y[1] = q + s;
    y[2] = A2 * p + B2 * r;
    y[3] = A2 * q + B2 * s + m[5];
}

// c [M, V * LANES] = a [M, depth] b [depth, V * LANES]
template <int M, int V>
inline void multiply(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t depth) {
    Vector sum[M][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = load(b + (k * V + v) * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const float scalar = a[m * lda + k];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[m][v] += scalar * row[v];
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(c + m * ldc + v * LANES, sum[m][v]);
}

template <int M, int V>
inline void multiply_rest(int64_t rows, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          int64_t depth) {
    if constexpr (M > 0) {
        if (rows == M)
            multiply<M, V>(a, lda, b, c, ldc, depth);
        else
            multiply_rest<M - 1, V>(rows, a, lda, b, c, ldc, depth);
    }
}

template <int V>
inline void multiply_panel(int vectors, int64_t rows, const float* a, int64_t lda, const float* b, float* c,
                           int64_t ldc, int64_t depth) {
    if constexpr (V > 0) {
        if (vectors != V) return multiply_panel<V - 1>(vectors, rows, a, lda, b, c, ldc, depth);
        int64_t m = 0;
        for (; m + ROWS <= rows; m += ROWS) multiply<ROWS, V>(a + m * lda, lda, b, c + m * ldc, ldc, depth);
        multiply_rest<ROWS - 1, V>(rows - m, a + m * lda, lda, b, c + m * ldc, ldc, depth);
    }
}

struct Shape {
    int64_t height, width, down, across;
    Shape(int64_t height, int64_t width)
        : height(height), width(width), down((height + STEP - 1) / STEP), across((width + STEP - 1) / STEP) {}
    int64_t tiles() const { return down * across; }
    int64_t top(int64_t tile) const { return tile / across % down * STEP; }
    int64_t left(int64_t tile) const { return tile % across * STEP; }
};

// One tile of x [H, W, C] to its 36 points: v [36, plane], this tile's channels first in each plane. With a gate
// [H, W, C], x counts as 0 where the gate is not positive: the gradient of a rectified map.
template <bool GATED>
inline void transform_input(const float* x, const float* gate, const Shape& shape, int64_t tile, int64_t channels, float* v,
                            int64_t plane) {
    const int64_t top = shape.top(tile) - 1, left = shape.left(tile) - 1;
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector half[SIDE][SIDE], column[SIDE], line[SIDE];
        for (int j = 0; j < SIDE; ++j) {
            for (int i = 0; i < SIDE; ++i) {
                const int64_t row = top + i, col = left + j;
                const bool inside = row >= 0 && row < shape.height && col >= 0 && col < shape.width;
                const int64_t at = (row * shape.width + col) * channels + c;
                column[i] = inside ? load(x + at) : Vector{};
                if (GATED && inside) column[i] = load(gate + at) <= 0 ? Vector{} : column[i];
            }
            to_points(column, line);
            for (int i = 0; i < SIDE; ++i) half[i][j] = line[i];
        }
        for (int i = 0; i < SIDE; ++i) {
            to_points(half[i], line);
            for (int j = 0; j < SIDE; ++j) store(v + (i * SIDE + j) * plane + c, line[j]);
        }
    }
}

// The 36 points m [36, plane] of a tile to its outputs in y [H, W, K].
template <bool RECTIFIED>
inline void transform_output(const float* m, int64_t plane, const float* bias, const Shape& shape, int64_t tile,
                             int64_t channels, float* y) {
    const int64_t top = shape.top(tile), left = shape.left(tile);
    for (int64_t k = 0; k < channels; k += LANES) {
        const Vector shift = bias ? load(bias + k) : Vector{};
        Vector half[STEP][SIDE], column[SIDE], line[STEP];
        for (int j = 0; j < SIDE; ++j) {
            for (int i = 0; i < SIDE; ++i) column[i] = load(m + (i * SIDE + j) * plane + k);
            from_points(column, line);
            for (int i = 0; i < STEP; ++i) half[i][j] = line[i];
        }
        for (int i = 0; i < STEP && top + i < shape.height; ++i) {
            from_points(half[i], line);
            for (int j = 0; j < STEP && left + j < shape.width; ++j) {
                Vector out = line[j] + shift;
                if (RECTIFIED) out = out < 0 ? Vector{} : out;
                store(y + ((top + i) * shape.width + left + j) * channels + k, out);
            }
        }
    }
}

}  // namespace

extern "C" {

// taps [3, 3, C, K] to packed [36][K / PANEL][C][PANEL] (the last panel as narrow as what is left): the kernels at the
// points, divided by what the polynomials of to_points are there.
void winograd_pack(const float* taps, int64_t outputs, int64_t inputs, float* packed, int threads) {
    const float a = 1 / (2 * A2 * (A2 - B2)), b = 1 / (2 * B2 * (B2 - A2)), origin = 1 / (A2 * B2);
    const auto line = [=](Vector g0, Vector g1, Vector g2, Vector* u) {
        const Vector p = a * (g0 + A2 * g2), q = a * A * g1, r = b * (g0 + B2 * g2), s = b * B * g1;
        u[0] = origin * g0;
        u[1] = p + q;
        u[2] = p - q;
        u[3] = r + s;
        u[4] = r - s;
        u[5] = g2;
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < inputs; ++c)
        for (int64_t k = 0; k < outputs; k += LANES) {
            const int64_t first = k / PANEL * PANEL, width = std::min<int64_t>(PANEL, outputs - first);
            Vector half[3][SIDE], full[SIDE];
            for (int j = 0; j < 3; ++j) {
                const float* tap = taps + (j * inputs + c) * outputs + k;
                const int64_t down = 3 * inputs * outputs;
                line(load(tap), load(tap + down), load(tap + 2 * down), half[j]);
            }
            for (int i = 0; i < SIDE; ++i) {
                line(half[0][i], half[1][i], half[2][i], full);
                for (int j = 0; j < SIDE; ++j)
                    store(packed + ((i * SIDE + j) * outputs + first) * inputs + c * width + k - first, full[j]);
            }
        }
}

// y [N, H, W, K] = x [N, H, W, C] * packed + bias [K] (or none). C and K are multiples of LANES.
// gate: where it, [N, H, W, C], is not positive, x counts as 0 (or none). rectified: whether negative y become 0.
// block: tiles a thread takes at a time. Returns 0, or 1 if there is no memory for the blocks.
int winograd_convolve(const float* x, const float* gate, const float* packed, const float* bias, float* y,
                      int rectified, int64_t batch, int64_t height, int64_t width, int64_t inputs, int64_t outputs,
                      int64_t block, int threads) {
    const Shape shape(height, width);
    const int64_t tiles = batch * shape.tiles(), pixels = height * width;
    // Planes a power of two apart would share a few sets of the cache.
    const int64_t in_plane = block * inputs + LANES, out_plane = block * outputs + LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        std::unique_ptr<float, decltype(&std::free)> scratch(
            static_cast<float*>(std::aligned_alloc(64, (POINTS * (in_plane + out_plane) * 4 + 63) / 64 * 64)),
            &std::free);
        failed = scratch == nullptr;
        float* const v = scratch.get();
        float* const m = v + POINTS * in_plane;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tiles; first += block) {
            if (failed) continue;
            const int64_t count = std::min(block, tiles - first);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t image = (first + t) / shape.tiles() * pixels * inputs;
                if (gate)
                    transform_input<true>(x + image, gate + image, shape, first + t, inputs, v + t * inputs, in_plane);
                else
                    transform_input<false>(x + image, nullptr, shape, first + t, inputs, v + t * inputs, in_plane);
            }
            for (int point = 0; point < POINTS; ++point)
                for (int64_t k = 0; k < outputs; k += PANEL)
                    multiply_panel<VECTORS>(int(std::min<int64_t>(PANEL, outputs - k) / LANES), count,
                                            v + point * in_plane, inputs, packed + (point * outputs + k) * inputs,
                                            m + point * out_plane + k, outputs, inputs);
            for (int64_t t = 0; t < count; ++t) {
                float* const image = y + (first + t) / shape.tiles() * pixels * outputs;
                if (rectified)
                    transform_output<true>(m + t * outputs, out_plane, bias, shape, first + t, outputs, image);
                else
                    transform_output<false>(m + t * outputs, out_plane, bias, shape, first + t, outputs, image);
            }
        }
    }
    return failed;
}
}
