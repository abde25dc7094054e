// The candidate operations on all edges leaving one node of a cell, forward and backward, on a CPU.
//
// Maps lie in memory as [channels, height, width, batch]: the batch is innermost. Every operation of a cell then is
// a loop over contiguous images, whatever the kernel, stride, dilation or size of the map, and a stack of
// channels is one block. Depthwise convolutions read a copy of the activated input with zero columns on both sides;
// rows outside of the map are left out. A depthwise and the following 1x1 convolution are computed together, a
// piece of a row at a time, and batch normalisation is applied by whoever reads its input, so that of each
// stage only the input of its normalisation is written to memory.
//
// Sums over images and pixels are kept per task and added in a fixed order: results do not depend on the number
// of threads. Vectors are the compiler's (GCC and Clang); there is nothing here that is bound to one processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

enum Kind : int64_t { POINTWISE = 0, DEPTHWISE = 1, HALVES = 2 };
enum PoolKind : int64_t { MAX_POOL = 0, AVG_POOL = 1 };

// One candidate with weights on all E edges: [ReLU, depthwise, 1x1, BN] once or twice; without the depthwise
// convolution (POINTWISE); or two 1x1 convolutions on the even and the odd pixels, stacked (HALVES).
struct Op {
    int64_t kind, kernel, dilation, repeats;
    const void *depthwise1, *pointwise1, *odd1, *depthwise2, *pointwise2;  // [E*C, K*K], [E, C', C]; HALVES: [E, first, C], [E, C'-first, C]
    void *z1, *z2;                                                         // inputs of the normalisations [E, C', H', W', N]
    void *mean1, *rstd1, *mean2, *rstd2;                                   // [E, C'], written in training
    const void *scale1, *shift1, *scale2, *shift2;                         // affine part of the normalisations [E, C'], or null
    void *g_depthwise1, *g_pointwise1, *g_odd1, *g_depthwise2, *g_pointwise2;  // gradients, overwritten
    void *g_scale1, *g_shift1, *g_scale2, *g_shift2;
};

struct Pool {
    int64_t kind;
    void *z, *taken;      // pooled map [C, H', W', N]; which of the 9 pixels was the largest, uint8
    void *mean, *rstd;    // [C]
};

// mixing: [E, ops + pools + skip]: a column for each op, then each pool, then the skip connection.
struct Edges {
    int64_t edges, in_channels, out_channels, height, width, batch, stride, ops, pools, skip, training, threads, weights;
    double epsilon;
    Op *op;
    Pool *pool;
    const void *x;          // [C, H, W, N]
    const void *mixing;     // or null: ones
    void **out;             // E maps [C', H', W', N]
    const int64_t *add;     // E flags: add to what is in out
    const void **g_out;     // E maps
    void *g_x;              // [C, H, W, N] or null
    int64_t add_g_x;
    void *g_mixing;         // [E, columns], double
};

// Memory that is kept from call to call: large blocks taken from the system anew cost a page fault per 4 KiB.
struct Arena {
    std::vector<char *> blocks;
    std::vector<size_t> sizes;
    size_t block = 0, used = 0;
    ~Arena() {
        for (char *b : blocks) std::free(b);
    }
    struct Mark {
        size_t block, used;
    };
    Mark mark() const { return {block, used}; }
    void release(Mark m) { block = m.block, used = m.used; }
    void reset() { release({0, 0}); }
    template <class T> T *take(size_t count) {
        size_t bytes = (count * sizeof(T) + 255) / 256 * 256;
        while (block < blocks.size() && used + bytes > sizes[block]) ++block, used = 0;
        if (block == blocks.size()) {
            size_t size = std::max(bytes, size_t(1) << 20);
            void *memory = nullptr;
            if (posix_memalign(&memory, 256, size)) return nullptr;
            blocks.push_back(static_cast<char *>(memory));
            sizes.push_back(size);
        }
        char *start = blocks[block] + used;
        used += bytes;
        return reinterpret_cast<T *>(start);
    }
};
thread_local Arena arena;
struct OutOfMemory {};

template <class T, int L> struct Kernel {
    typedef T V __attribute__((vector_size(sizeof(T) * L)));
    typedef decltype(V{} > V{}) M;  // integers as wide as T
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;

    static inline V load(const T *p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static inline void store(T *p, V v) { std::memcpy(p, &v, sizeof v); }
    static inline V splat(T s) { return V{} + s; }
    static inline T sum(V v) {
        T lanes[L];
        std::memcpy(lanes, &v, sizeof v);
        for (int half = L / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        return lanes[0];
    }
    static inline V positive(V v) {
        // As torch.relu: NaN stays NaN.
        return v <= V{} ? V{} : v;
    }

    // A tap of a kernel: where it reads, and which of the kernel's weights it multiplies with.
    struct Tap {
        int64_t offset;
        int64_t index;
    };

    Edges &e;
    int64_t C, D, H, W, N, Ho, Wo, S, G;  // D: output channels; G: groups (an op on an edge), edge by edge
    int64_t row, row_out, plane, plane_out, map_out, count;
    int64_t pad, wide, padded;            // activated input: columns on each side, row length, plane
    int64_t pad2, wide2, padded2;         // the same for maps of the output's size
    int64_t columns;

    template <class U> U *take(size_t n) {
        U *p = arena.take<U>(n);
        if (!p) throw OutOfMemory();
        return p;
    }

    explicit Kernel(Edges &edges) : e(edges) {
        C = e.in_channels, D = e.out_channels, H = e.height, W = e.width, N = e.batch, S = e.stride;
        Ho = (H + S - 1) / S, Wo = (W + S - 1) / S;
        G = e.ops * e.edges;
        row = W * N, row_out = Wo * N, plane = H * row, plane_out = Ho * row_out, map_out = D * plane_out;
        count = plane_out;
        pad = S > 1 ? 1 : 0, pad2 = 0;
        for (int64_t o = 0; o < e.ops; ++o) {
            const Op &op = e.op[o];
            if (op.kind != DEPTHWISE) continue;
            pad = std::max(pad, padding(op));
            // Behind a stride, gradients are read up to half as far away, rounded up.
            pad2 = std::max(pad2, std::max(padding(op), int64_t(1)));
        }
        wide = (W + 2 * pad) * N, padded = H * wide;
        wide2 = (Wo + 2 * pad2) * N, padded2 = Ho * wide2;
        columns = e.ops + e.pools + (e.skip ? 1 : 0);
        arena.reset();
    }

    static int64_t padding(const Op &op) { return op.dilation * (op.kernel - 1) / 2; }
    int64_t first() const { return (D + 1) / 2; }  // output channels of the even pixels of HALVES
    int64_t depth(const Op &op) const { return op.kind == HALVES ? 2 * C : C; }  // channels before the 1x1 convolution
    T mixing(int64_t edge, int64_t column) const { return value(e.mixing, edge * columns + column, 1); }

    // --- small loops

    template <int B> static inline void accumulate(const T *const *at, const T *kernel, const Tap *taps, int n, V *acc) {
        for (int k = 0; k < n; ++k) {
            V w = splat(kernel[taps[k].index]);
            for (int j = 0; j < B; ++j) acc[j] += w * load(at[j] + taps[k].offset);
        }
    }

    template <int B> static inline void accumulate_row(const T *at, const T *kernel, const Tap *taps, int n, V *acc) {
        for (int k = 0; k < n; ++k) {
            V w = splat(kernel[taps[k].index]);
            const T *p = at + taps[k].offset;
            for (int j = 0; j < B; ++j) acc[j] += w * load(p + j * L);
        }
    }

    // destination[i] = sum over taps of weight * source[i + offset], for n contiguous numbers.
    static void taps_row(const T *source, const T *kernel, const Tap *taps, int n_taps, T *destination, int64_t n) {
        int64_t i = 0;
        for (; i + 8 * L <= n; i += 8 * L) {
            V acc[8] = {};
            accumulate_row<8>(source + i, kernel, taps, n_taps, acc);
            for (int j = 0; j < 8; ++j) store(destination + i + j * L, acc[j]);
        }
        for (; i + 4 * L <= n; i += 4 * L) {
            V acc[4] = {};
            accumulate_row<4>(source + i, kernel, taps, n_taps, acc);
            for (int j = 0; j < 4; ++j) store(destination + i + j * L, acc[j]);
        }
        for (; i < n; i += L) {
            V acc[1] = {};
            accumulate_row<1>(source + i, kernel, taps, n_taps, acc);
            store(destination + i, acc[0]);
        }
    }

    // The same where neighbouring pixels of the destination lie `step` pixels apart in the source.
    void taps_strided(const T *source, int64_t step, const T *kernel, const Tap *taps, int n_taps, T *destination,
                      int64_t from, int64_t n) const {
        int64_t i = 0;
        const T *at[8];
        auto address = [&](int64_t flat) { return source + flat / N * step * N + flat % N; };
        for (; i + 8 * L <= n; i += 8 * L) {
            V acc[8] = {};
            for (int j = 0; j < 8; ++j) at[j] = address(from + i + j * L);
            accumulate<8>(at, kernel, taps, n_taps, acc);
            for (int j = 0; j < 8; ++j) store(destination + i + j * L, acc[j]);
        }
        for (; i < n; i += L) {
            V acc[1] = {};
            at[0] = address(from + i);
            accumulate<1>(at, kernel, taps, n_taps, acc);
            store(destination + i, acc[0]);
        }
    }

    template <int R, int Q>
    static inline void product_block(const T *a, int64_t a_row, int64_t a_column, int64_t k, const T *b, int64_t b_row,
                                     T *c, int64_t c_row) {
        V acc[R][Q] = {};
        for (int64_t p = 0; p < k; ++p) {
            V right[Q];
            for (int q = 0; q < Q; ++q) right[q] = load(b + p * b_row + q * L);
            for (int r = 0; r < R; ++r) {
                V left = splat(a[r * a_row + p * a_column]);
                for (int q = 0; q < Q; ++q) acc[r][q] += left * right[q];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) store(c + r * c_row + q * L, acc[r][q]);
    }

    template <int Q>
    static inline void product_rows(int64_t m, const T *a, int64_t a_row, int64_t a_column, int64_t k, const T *b,
                                    int64_t b_row, T *c, int64_t c_row) {
        int64_t r = 0;
        for (; r + 8 <= m; r += 8) product_block<8, Q>(a + r * a_row, a_row, a_column, k, b, b_row, c + r * c_row, c_row);
        for (; r + 4 <= m; r += 4) product_block<4, Q>(a + r * a_row, a_row, a_column, k, b, b_row, c + r * c_row, c_row);
        for (; r < m; ++r) product_block<1, Q>(a + r * a_row, a_row, a_column, k, b, b_row, c + r * c_row, c_row);
    }

    // c [m, n] = a [m, k] b [k, n]; n a multiple of L.
    static void product(int64_t m, int64_t k, int64_t n, const T *a, int64_t a_row, int64_t a_column, const T *b,
                        int64_t b_row, T *c, int64_t c_row) {
        int64_t i = 0;
        for (; i + 2 * L <= n; i += 2 * L) product_rows<2>(m, a, a_row, a_column, k, b + i, b_row, c + i, c_row);
        for (; i < n; i += L) product_rows<1>(m, a, a_row, a_column, k, b + i, b_row, c + i, c_row);
    }

    template <int R, int Q>
    static inline void outer_block(const T *a, const T *b, int64_t stride, int64_t n, double *c, int64_t c_row) {
        V acc[R][Q] = {};
        for (int64_t i = 0; i < n; i += L) {
            V left[R], right[Q];
            for (int r = 0; r < R; ++r) left[r] = load(a + r * stride + i);
            for (int q = 0; q < Q; ++q) right[q] = load(b + q * stride + i);
            for (int r = 0; r < R; ++r)
                for (int q = 0; q < Q; ++q) acc[r][q] += left[r] * right[q];
        }
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) c[r * c_row + q] += sum(acc[r][q]);
    }

    // c [m, k] += a [m, n] b [k, n]^T, rows `stride` apart.
    static void outer(int64_t m, int64_t k, int64_t n, const T *a, const T *b, int64_t stride, double *c) {
        int64_t r = 0;
        for (; r + 4 <= m; r += 4) {
            int64_t q = 0;
            for (; q + 4 <= k; q += 4) outer_block<4, 4>(a + r * stride, b + q * stride, stride, n, c + r * k + q, k);
            for (; q < k; ++q) outer_block<4, 1>(a + r * stride, b + q * stride, stride, n, c + r * k + q, k);
        }
        for (; r < m; ++r) {
            int64_t q = 0;
            for (; q + 4 <= k; q += 4) outer_block<1, 4>(a + r * stride, b + q * stride, stride, n, c + r * k + q, k);
            for (; q < k; ++q) outer_block<1, 1>(a + r * stride, b + q * stride, stride, n, c + r * k + q, k);
        }
    }

    // --- pieces of rows: a task is one row of the output, worked on `piece` numbers at a time

    int64_t piece(int64_t channels) const {
        // About half of a first-level cache for the rows before the 1x1 convolution.
        int64_t numbers = std::max<int64_t>(24576 / int64_t(sizeof(T)) / channels, 4 * L);
        return std::min(numbers / L * L, row_out);
    }
    int64_t pieces(int64_t channels) const { return (row_out + piece(channels) - 1) / piece(channels); }

    // The taps of a depthwise convolution for output row y: offsets in the activated input, whose rows are `length` long.
    int taps_of(const Op &op, int64_t y, int64_t stride, int64_t height, int64_t width, int64_t length,
                int64_t margin, Tap *taps) const {
        int n = 0;
        int64_t K = op.kernel, d = op.dilation, p = padding(op);
        for (int64_t ky = 0; ky < K; ++ky) {
            int64_t in_y = y * stride + ky * d - p;
            if (in_y < 0 || in_y >= height) continue;
            for (int64_t kx = 0; kx < K; ++kx) {
                int64_t shift = kx * d - p;
                if (shift <= -width || shift >= width) continue;
                taps[n++] = {in_y * length + (shift + margin) * N, ky * K + kx};
            }
        }
        return n;
    }

    // What enters the 1x1 convolution of stage 1 (or 2): rows [depth, n] of `rows`, `stride` apart.
    void gather(const Op &op, int stage, int64_t edge, const T *activated, int64_t y, int64_t from, int64_t n, T *rows,
                int64_t stride) const {
        if (op.kind == POINTWISE) {
            for (int64_t c = 0; c < C; ++c)
                std::memcpy(rows + c * stride, activated + c * padded + y * wide + pad * N + from, n * sizeof(T));
            return;
        }
        if (op.kind == HALVES) {
            for (int64_t half = 0; half < 2; ++half) {
                Tap tap = {(2 * y + half) * wide + (half + pad) * N, 0};
                T one = 1;
                int taps = 2 * y + half < H ? 1 : 0;
                for (int64_t c = 0; c < C; ++c)
                    taps_strided(activated + c * padded, 2, &one, &tap, taps, rows + (half * C + c) * stride, from, n);
            }
            return;
        }
        Tap taps[64];
        int64_t channels = stage == 1 ? C : D, K2 = op.kernel * op.kernel;
        const T *kernel = static_cast<const T *>(stage == 1 ? op.depthwise1 : op.depthwise2) + edge * channels * K2;
        bool strided = stage == 1 && S > 1;
        int64_t length = stage == 1 ? wide : wide2, margin = stage == 1 ? pad : pad2;
        int64_t size = stage == 1 ? padded : padded2;
        int n_taps = taps_of(op, y, strided ? S : 1, stage == 1 ? H : Ho, stage == 1 ? W : Wo, length, margin, taps);
        for (int64_t c = 0; c < channels; ++c) {
            const T *source = activated + c * size;
            if (strided)
                taps_strided(source, S, kernel + c * K2, taps, n_taps, rows + c * stride, from, n);
            else
                taps_row(source + from, kernel + c * K2, taps, n_taps, rows + c * stride, n);
        }
    }

    void mix_channels(const Op &op, int stage, int64_t edge, const T *rows, int64_t stride, int64_t n, T *z) const {
        if (op.kind == HALVES) {
            const T *even = static_cast<const T *>(op.pointwise1) + edge * first() * C;
            const T *odd = static_cast<const T *>(op.odd1) + edge * (D - first()) * C;
            product(first(), C, n, even, C, 1, rows, stride, z, plane_out);
            product(D - first(), C, n, odd, C, 1, rows + C * stride, stride, z + first() * plane_out, plane_out);
            return;
        }
        int64_t k = stage == 1 ? C : D;
        const T *weight = static_cast<const T *>(stage == 1 ? op.pointwise1 : op.pointwise2) + edge * D * k;
        product(D, k, n, weight, k, 1, rows, stride, z, plane_out);
    }

    void mix_channels_back(const Op &op, int stage, int64_t edge, const T *dz, int64_t stride, int64_t n, T *t,
                           int64_t t_plane) const {
        if (op.kind == HALVES) {
            const T *even = static_cast<const T *>(op.pointwise1) + edge * first() * C;
            const T *odd = static_cast<const T *>(op.odd1) + edge * (D - first()) * C;
            product(C, first(), n, even, 1, C, dz, stride, t, t_plane);
            product(C, D - first(), n, odd, 1, C, dz + first() * stride, stride, t + C * t_plane, t_plane);
            return;
        }
        int64_t k = stage == 1 ? C : D;
        const T *weight = static_cast<const T *>(stage == 1 ? op.pointwise1 : op.pointwise2) + edge * D * k;
        product(k, D, n, weight, 1, k, dz, stride, t, t_plane);
    }

    // Mean and sum of squared deviations of n numbers.
    static void moments(const T *p, int64_t n, double *mean, double *squares) {
        V total = {};
        for (int64_t i = 0; i < n; i += L) total += load(p + i);
        T m = sum(total) / T(n);
        V around = splat(m), residual = {}, squared = {};
        for (int64_t i = 0; i < n; i += L) {
            V d = load(p + i) - around;
            residual += d, squared += d * d;
        }
        double r = sum(residual);
        *mean = double(m) + r / n;
        *squares = double(sum(squared)) - r * r / n;
    }

    struct Moments {
        double mean, squares;
        int64_t n;
    };

    // Parts in a fixed order to the mean and 1/sqrt(variance + epsilon) of a channel.
    void join(const Moments *parts, int64_t n_parts, T *mean, T *rstd) const {
        double m = 0, q = 0;
        int64_t n = 0;
        for (int64_t i = 0; i < n_parts; ++i) {
            int64_t both = n + parts[i].n;
            double delta = parts[i].mean - m;
            m += delta * parts[i].n / both;
            q += parts[i].squares + delta * delta * n / both * parts[i].n;
            n = both;
        }
        *mean = T(m);
        *rstd = T(1 / std::sqrt(q / n + e.epsilon));
    }

    static const T *at(const void *p, int64_t i) { return static_cast<const T *>(p) + i; }
    static T *at(void *p, int64_t i) { return static_cast<T *>(p) + i; }
    static T value(const void *p, int64_t i, T otherwise) { return p ? static_cast<const T *>(p)[i] : otherwise; }

    // y = a z + b is normalisation and affine part of channel c of an edge.
    void affine(const Op &op, int stage, int64_t channel, T *a, T *b) const {
        const void *mean = stage == 1 ? op.mean1 : op.mean2, *rstd = stage == 1 ? op.rstd1 : op.rstd2;
        *a = static_cast<const T *>(rstd)[channel] * value(stage == 1 ? op.scale1 : op.scale2, channel, 1);
        *b = value(stage == 1 ? op.shift1 : op.shift2, channel, 0) - static_cast<const T *>(mean)[channel] * *a;
    }

    // destination, `margin` zero pixels wider on both sides, = relu(a source + b)
    void activate(const T *source, T a, T b, bool affine_part, int64_t height, int64_t length, int64_t margin,
                  T *destination) const {
        V va = splat(a), vb = splat(b);
        for (int64_t y = 0; y < height; ++y) {
            T *p = destination + y * (length + 2 * margin * N);
            std::memset(p, 0, margin * N * sizeof(T));
            p += margin * N;
            const T *q = source + y * length;
            if (affine_part)
                for (int64_t i = 0; i < length; i += L) store(p + i, positive(va * load(q + i) + vb));
            else
                for (int64_t i = 0; i < length; i += L) store(p + i, positive(load(q + i)));
            std::memset(p + length, 0, margin * N * sizeof(T));
        }
    }

    // --- pools

    void pool_forward(const Pool &pool, int64_t c) const {
        const T *x = at(e.x, c * plane);
        T *z = at(pool.z, c * plane_out);
        typedef uint8_t B __attribute__((vector_size(L)));
        for (int64_t y = 0; y < Ho; ++y)
            for (int64_t px = 0; px < Wo; ++px) {
                int64_t y0 = y * S - 1, x0 = px * S - 1;
                int64_t ya = std::max<int64_t>(y0, 0), yb = std::min(y0 + 3, H);
                int64_t xa = std::max<int64_t>(x0, 0), xb = std::min(x0 + 3, W);
                T share = T(1) / T((yb - ya) * (xb - xa));
                for (int64_t n = 0; n < N; n += L) {
                    int64_t out = (y * Wo + px) * N + n;
                    if (pool.kind == MAX_POOL) {
                        V best = splat(-INFINITY);
                        M where = M{} + I((ya - y0) * 3 + xa - x0);
                        for (int64_t iy = ya; iy < yb; ++iy)
                            for (int64_t ix = xa; ix < xb; ++ix) {
                                V v = load(x + (iy * W + ix) * N + n);
                                M better = (v > best) | (v != v);
                                best = better ? v : best;
                                where = better ? M{} + I((iy - y0) * 3 + ix - x0) : where;
                            }
                        store(z + out, best);
                        B bytes = __builtin_convertvector(where, B);
                        std::memcpy(static_cast<uint8_t *>(pool.taken) + c * plane_out + out, &bytes, sizeof bytes);
                    } else {
                        V total = {};
                        for (int64_t iy = ya; iy < yb; ++iy)
                            for (int64_t ix = xa; ix < xb; ++ix) total += load(x + (iy * W + ix) * N + n);
                        store(z + out, total * share);
                    }
                }
            }
    }

    // g_x of row y += gradient of the pool whose output has gradient g [H', W', N].
    void pool_backward_row(const Pool &pool, int64_t c, const T *g, int64_t y, T *g_x) const {
        typedef uint8_t B __attribute__((vector_size(L)));
        const uint8_t *taken = static_cast<const uint8_t *>(pool.taken) + c * plane_out;
        T shares[10];
        for (int i = 1; i < 10; ++i) shares[i] = T(1) / T(i);
        for (int64_t x = 0; x < W; ++x) {
            // The windows that hold this pixel: where their output lies, which place in them it has, how many they hold.
            int64_t out[9], place[9], windows = 0;
            T share[9];
            for (int64_t ky = 0; ky < 3; ++ky) {
                int64_t up = y + 1 - ky;
                if (up < 0 || up % S || up / S >= Ho) continue;
                int64_t tall = std::min(up + 2, H) - std::max<int64_t>(up - 1, 0);
                for (int64_t kx = 0; kx < 3; ++kx) {
                    int64_t left = x + 1 - kx;
                    if (left < 0 || left % S || left / S >= Wo) continue;
                    out[windows] = (up / S * Wo + left / S) * N, place[windows] = ky * 3 + kx;
                    share[windows++] = shares[tall * (std::min(left + 2, W) - std::max<int64_t>(left - 1, 0))];
                }
            }
            for (int64_t n = 0; n < N; n += L) {
                V total = load(g_x + x * N + n);
                for (int64_t i = 0; i < windows; ++i) {
                    V v = load(g + out[i] + n);
                    if (pool.kind == MAX_POOL) {
                        B bytes;
                        std::memcpy(&bytes, taken + out[i] + n, sizeof bytes);
                        total += __builtin_convertvector(bytes, M) == M{} + I(place[i]) ? v : V{};
                    } else {
                        total += v * share[i];
                    }
                }
                store(g_x + x * N + n, total);
            }
        }
    }

    // --- forward

    void stage_forward(int stage, const T *activated, const std::vector<int64_t> &groups, int64_t group_size) {
        if (groups.empty()) return;
        int64_t widest = 0;
        for (int64_t g : groups) widest = std::max(widest, stage == 1 ? depth(e.op[g % e.ops]) : D);
        int64_t n_pieces = pieces(widest), length = piece(widest), parts = Ho * n_pieces;
        Moments *moments_of = e.training ? take<Moments>(groups.size() * D * parts) : nullptr;
        int64_t tasks = int64_t(groups.size()) * Ho;
        std::vector<T *> scratch(e.threads);
        for (auto &s : scratch) s = take<T>(widest * length);
        #pragma omp parallel num_threads(e.threads)
        {
            T *rows = scratch[thread()];
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; ++task) {
                // Rows of all groups one after another: a core finds in its cache what it wrote before.
                int64_t i = task % int64_t(groups.size()), y = task / int64_t(groups.size()), o = groups[i] % e.ops, edge = groups[i] / e.ops;
                const Op &op = e.op[o];
                T *z = at(stage == 1 ? op.z1 : op.z2, edge * map_out + y * row_out);
                for (int64_t part = 0; part < n_pieces; ++part) {
                    int64_t from = part * length, n = std::min(length, row_out - from);
                    gather(op, stage, edge, activated + i * group_size, y, from, n, rows, length);
                    mix_channels(op, stage, edge, rows, length, n, z + from);
                    if (!e.training) continue;
                    for (int64_t d = 0; d < D; ++d) {
                        Moments &m = moments_of[(i * D + d) * parts + y * n_pieces + part];
                        m.n = n;
                        moments(z + d * plane_out + from, n, &m.mean, &m.squares);
                    }
                }
            }
        }
        if (!e.training) return;
        for (size_t i = 0; i < groups.size(); ++i) {
            const Op &op = e.op[groups[i] % e.ops];
            for (int64_t d = 0; d < D; ++d) {
                int64_t channel = groups[i] / e.ops * D + d;
                join(moments_of + (i * D + d) * parts, parts, at(stage == 1 ? op.mean1 : op.mean2, channel),
                     at(stage == 1 ? op.rstd1 : op.rstd2, channel));
            }
        }
    }

    static int thread();

    // Consecutive groups whose intermediate maps together stay in a second-level cache or two. The same whatever the
    // number of threads, so that sums over groups are.
    std::vector<std::vector<int64_t>> batches() const {
        int64_t bytes = 4 * map_out * int64_t(sizeof(T)), cache = int64_t(3) << 20;
        int64_t size = std::max<int64_t>(cache / bytes, 1);
        std::vector<std::vector<int64_t>> found;
        for (int64_t g = 0; g < G; ++g) {
            if (g % size == 0) found.emplace_back();
            found.back().push_back(g);
        }
        return found;
    }

    std::vector<int64_t> twice(const std::vector<int64_t> &groups) const {
        std::vector<int64_t> found;
        for (int64_t g : groups)
            if (e.op[g % e.ops].repeats == 2) found.push_back(g);
        return found;
    }

    T *activated_input() {
        T *activated = take<T>(C * padded);
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t c = 0; c < C; ++c) activate(at(e.x, c * plane), 1, 0, false, H, row, pad, activated + c * padded);
        return activated;
    }

    T *activated_middle(const std::vector<int64_t> &repeated) {
        T *middle = take<T>(repeated.size() * D * padded2);
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t task = 0; task < int64_t(repeated.size()) * D; ++task) {
            int64_t g = repeated[task / D], d = task % D, edge = g / e.ops;
            const Op &op = e.op[g % e.ops];
            T a, b;
            affine(op, 1, edge * D + d, &a, &b);
            activate(at(op.z1, edge * map_out + d * plane_out), a, b, true, Ho, row_out, pad2, middle + task * padded2);
        }
        return middle;
    }

    void forward() {
        if (e.pools) {
            #pragma omp parallel for num_threads(e.threads) schedule(dynamic, 1)
            for (int64_t task = 0; task < e.pools * C; ++task) {
                const Pool &pool = e.pool[task / C];
                int64_t c = task % C;
                pool_forward(pool, c);
                if (!e.training || !pool.mean) continue;
                std::vector<Moments> parts(Ho);
                for (int64_t y = 0; y < Ho; ++y) {
                    parts[y].n = row_out;
                    moments(at(pool.z, c * plane_out + y * row_out), row_out, &parts[y].mean, &parts[y].squares);
                }
                join(parts.data(), Ho, at(pool.mean, c), at(pool.rstd, c));
            }
        }
        if (!G) {
            #pragma omp parallel for num_threads(e.threads) schedule(static)
            for (int64_t task = 0; task < e.edges * D; ++task) mix(task / D, task % D, {}, true);
            return;
        }
        const T *activated = activated_input();
        for (const auto &batch : batches()) {
            Arena::Mark mark = arena.mark();
            std::vector<int64_t> repeated = twice(batch);
            stage_forward(1, activated, batch, 0);
            if (!repeated.empty()) stage_forward(2, activated_middle(repeated), repeated, D * padded2);
            int64_t first = batch.front() / e.ops, edges = batch.back() / e.ops - first + 1;
            #pragma omp parallel for num_threads(e.threads) schedule(static)
            for (int64_t task = 0; task < edges * D; ++task) {
                int64_t edge = first + task / D;
                std::vector<int64_t> own;
                for (int64_t g : batch)
                    if (g / e.ops == edge) own.push_back(g);
                mix(edge, task % D, own, own.front() % e.ops == 0);
            }
            arena.release(mark);
        }
    }

    // out of an edge (+)= sum over ``groups`` of mixing weight * normalised map; begin: with what needs no convolution.
    void mix(int64_t edge, int64_t d, const std::vector<int64_t> &groups, bool begin) const {
        const T *maps[64];
        T factors[64], constant = 0;
        int n_maps = 0;
        for (int64_t g : groups) {
            const Op &op = e.op[g % e.ops];
            int stage = int(op.repeats);
            T a, b, w = mixing(edge, g % e.ops);
            affine(op, stage, edge * D + d, &a, &b);
            maps[n_maps] = at(stage == 1 ? op.z1 : op.z2, edge * map_out + d * plane_out);
            factors[n_maps++] = w * a;
            constant += w * b;
        }
        for (int64_t i = 0; begin && i < e.pools; ++i) {
            const Pool &pool = e.pool[i];
            T w = mixing(edge, e.ops + i), r = value(pool.rstd, d, 1);
            maps[n_maps] = at(pool.z, d * plane_out);
            factors[n_maps++] = w * r;
            constant -= w * r * value(pool.mean, d, 0);
        }
        if (begin && e.skip) {
            maps[n_maps] = at(e.x, d * plane);
            factors[n_maps++] = mixing(edge, e.ops + e.pools);
        }
        T *out = at(e.out[edge], d * plane_out);
        bool add = e.add[edge] || !begin;
        for (int64_t i = 0; i < plane_out; i += L) {
            V total = add ? load(out + i) + constant : splat(constant);
            for (int m = 0; m < n_maps; ++m) total += factors[m] * load(maps[m] + i);
            store(out + i, total);
        }
    }

    // --- backward

    // Gradient with respect to z as a g + b z + c, where g is the gradient of the output of its normalisation.
    struct Line {
        T a, b, c;
    };

    // From the sums of the gradients (and of their products with the normalised map) over images and pixels.
    Line through_norm(T factor, double mean, double rstd, double gradients, double products) const {
        if (!e.training) return {T(factor * rstd), 0, 0};
        double scale = double(factor) * rstd, slope = -scale * rstd * products / count;
        return {T(scale), T(slope), T(-scale * gradients / count - slope * mean)};
    }

    // Sums of g and of g * z over a plane.
    static void sums(const T *g, const T *z, int64_t n, int64_t length, double *gradients, double *products) {
        double s = 0, p = 0;
        for (int64_t from = 0; from < n; from += length) {
            V vs = {}, vp = {};
            int64_t until = std::min(n, from + length);
            for (int64_t i = from; i < until; i += L) {
                V v = load(g + i);
                vs += v, vp += v * load(z + i);
            }
            s += sum(vs), p += sum(vp);
        }
        *gradients = s;
        if (products) *products = p;
    }

    struct StageBackward {
        std::vector<int64_t> groups;
        std::vector<const T *> gradient;  // of each group's normalised output [D, H', W', N]
        std::vector<Line> lines;          // [group, D]
        const T *activated;               // input of the depthwise convolution, or null where weights need no gradient
        int64_t group_size;               // from one group's activated input to the next one's
        T *t;                             // result: gradient before the 1x1 convolution, with margins
        std::vector<int64_t> t_at;        // where each group's begins in it
    };

    // t = W^T dz and, for weights, dW = dz rows^T and the gradient of the depthwise kernels.
    void stage_backward(int stage, StageBackward &b) {
        int64_t n_groups = int64_t(b.groups.size()), widest = D, total = 0;
        b.t_at.resize(n_groups);
        for (int64_t i = 0; i < n_groups; ++i) {
            int64_t channels = stage == 1 ? depth(e.op[b.groups[i] % e.ops]) : D;
            widest = std::max(widest, channels);
            b.t_at[i] = total, total += channels * padded2;
        }
        b.t = take<T>(total);
        int64_t length = piece(widest), n_pieces = pieces(widest), blocks = e.weights ? std::min<int64_t>(Ho, 8) : Ho;
        std::vector<T *> scratch(e.threads);
        for (auto &s : scratch) s = take<T>(2 * widest * length);
        std::vector<double *> partial(n_groups, nullptr);
        if (e.weights)
            for (int64_t i = 0; i < n_groups; ++i) {
                const Op &op = e.op[b.groups[i] % e.ops];
                int64_t k = op.kind == HALVES || stage == 1 ? C : D;
                partial[i] = take<double>(blocks * D * k);
                std::memset(partial[i], 0, blocks * D * k * sizeof(double));
            }
        #pragma omp parallel num_threads(e.threads)
        {
            T *dz = scratch[thread()], *rows = dz + widest * length;
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < n_groups * blocks; ++task) {
                int64_t i = task % n_groups, block = task / n_groups, g = b.groups[i], edge = g / e.ops;
                const Op &op = e.op[g % e.ops];
                int64_t channels = stage == 1 ? depth(op) : D;
                const T *z = at(stage == 1 ? op.z1 : op.z2, edge * map_out);
                T *t = b.t + b.t_at[i];
                for (int64_t y = block * Ho / blocks; y < (block + 1) * Ho / blocks; ++y) {
                    for (int64_t c = 0; c < channels; ++c) {
                        std::memset(t + c * padded2 + y * wide2, 0, pad2 * N * sizeof(T));
                        std::memset(t + c * padded2 + (y + 1) * wide2 - pad2 * N, 0, pad2 * N * sizeof(T));
                    }
                    for (int64_t part = 0; part < n_pieces; ++part) {
                        int64_t from = part * length, n = std::min(length, row_out - from);
                        for (int64_t d = 0; d < D; ++d) {
                            const Line &line = b.lines[i * D + d];
                            int64_t start = d * plane_out + y * row_out + from;
                            const T *gradient = b.gradient[i] + start, *map = z + start;
                            T *p = dz + d * length;
                            if (!e.training)
                                for (int64_t j = 0; j < n; j += L) store(p + j, line.a * load(gradient + j));
                            else
                                for (int64_t j = 0; j < n; j += L)
                                    store(p + j, line.a * load(gradient + j) + (line.b * load(map + j) + line.c));
                        }
                        mix_channels_back(op, stage, edge, dz, length, n, t + y * wide2 + pad2 * N + from, padded2);
                        if (!e.weights) continue;
                        gather(op, stage, edge, b.activated + i * b.group_size, y, from, n, rows, length);
                        if (op.kind == HALVES) {
                            double *sum_even = partial[i] + block * D * C;
                            outer(first(), C, n, dz, rows, length, sum_even);
                            outer(D - first(), C, n, dz + first() * length, rows + C * length, length, sum_even + first() * C);
                        } else {
                            int64_t k = stage == 1 ? C : D;
                            outer(D, k, n, dz, rows, length, partial[i] + block * D * k);
                        }
                    }
                }
            }
        }
        if (!e.weights) return;
        for (int64_t i = 0; i < n_groups; ++i) {
            const Op &op = e.op[b.groups[i] % e.ops];
            int64_t edge = b.groups[i] / e.ops, k = op.kind == HALVES || stage == 1 ? C : D;
            for (int64_t j = 0; j < D * k; ++j) {
                double s = 0;
                for (int64_t block = 0; block < blocks; ++block) s += partial[i][block * D * k + j];
                if (op.kind != HALVES)
                    *at(stage == 1 ? op.g_pointwise1 : op.g_pointwise2, edge * D * k + j) = T(s);
                else if (j < first() * C)
                    *at(op.g_pointwise1, edge * first() * C + j) = T(s);
                else
                    *at(op.g_odd1, edge * (D - first()) * C + j - first() * C) = T(s);
            }
        }
        int64_t channels = stage == 1 ? C : D;
        #pragma omp parallel for num_threads(e.threads) schedule(dynamic, 1)
        for (int64_t task = 0; task < n_groups * channels; ++task) {
            int64_t i = task / channels, c = task % channels, edge = b.groups[i] / e.ops;
            const Op &op = e.op[b.groups[i] % e.ops];
            if (op.kind != DEPTHWISE) continue;
            int64_t K2 = op.kernel * op.kernel;
            T *gradient = at(stage == 1 ? op.g_depthwise1 : op.g_depthwise2, (edge * channels + c) * K2);
            kernel_gradient(op, stage, b.activated + i * b.group_size + c * (stage == 1 ? padded : padded2),
                            b.t + b.t_at[i] + c * padded2, gradient);
        }
    }

    void kernel_gradient(const Op &op, int stage, const T *activated, const T *t, T *gradient) const {
        int64_t K = op.kernel, d = op.dilation, p = padding(op), stride = stage == 1 ? S : 1;
        int64_t height = stage == 1 ? H : Ho, length = stage == 1 ? wide : wide2, margin = stage == 1 ? pad : pad2;
        double totals[64] = {};
        for (int64_t y = 0; y < Ho; ++y)
            for (int64_t ky = 0; ky < K; ++ky) {
                int64_t in_y = y * stride + ky * d - p;
                if (in_y < 0 || in_y >= height) continue;
                // Up to seven taps of a row of the kernel share the loads of t.
                V acc[8] = {};
                const T *left = t + y * wide2 + pad2 * N, *right = activated + in_y * length + (margin - p) * N;
                if (stride == 1) {
                    for (int64_t i = 0; i < row_out; i += L) {
                        V v = load(left + i);
                        for (int64_t kx = 0; kx < K; ++kx) acc[kx] += v * load(right + kx * d * N + i);
                    }
                } else {
                    for (int64_t x = 0; x < Wo; ++x)
                        for (int64_t n = 0; n < N; n += L) {
                            V v = load(left + x * N + n);
                            for (int64_t kx = 0; kx < K; ++kx)
                                acc[kx] += v * load(right + (x * stride + kx * d) * N + n);
                        }
                }
                for (int64_t kx = 0; kx < K; ++kx) totals[ky * K + kx] += sum(acc[kx]);
            }
        for (int64_t k = 0; k < K * K; ++k) gradient[k] = T(totals[k]);
    }

    // Taps of the transposed depthwise convolution at stride 1 for row y of its result.
    int taps_back(const Op &op, int64_t y, int64_t height, int64_t width, Tap *taps) const {
        int n = 0;
        int64_t K = op.kernel, d = op.dilation, p = padding(op);
        for (int64_t ky = 0; ky < K; ++ky) {
            int64_t out_y = y + p - ky * d;
            if (out_y < 0 || out_y >= height) continue;
            for (int64_t kx = 0; kx < K; ++kx) {
                int64_t shift = p - kx * d;
                if (shift <= -width || shift >= width) continue;
                taps[n++] = {out_y * wide2 + (shift + pad2) * N, ky * K + kx};
            }
        }
        return n;
    }

    void backward() {
        // Sums of each edge's gradient, alone and with each candidate's map, over images and pixels.
        double *gradients = take<double>(e.edges * D), *products = take<double>(e.edges * D * columns);
        T *g_active = G && e.g_x ? take<T>(C * plane) : nullptr;
        const bool summed = e.training || e.g_mixing || e.weights;
        std::memset(gradients, 0, e.edges * D * sizeof(double));
        std::memset(products, 0, e.edges * D * columns * sizeof(double));
        if (summed) shared_sums(gradients, products);
        const T *activated = G && e.weights ? activated_input() : nullptr;
        bool first = true;
        for (const auto &batch : batches()) {
            Arena::Mark mark = arena.mark();
            StageBackward stage1;
            stage1.groups = batch, stage1.group_size = 0, stage1.activated = activated;
            stage1.lines.resize(batch.size() * D);
            for (int64_t g : batch) stage1.gradient.push_back(static_cast<const T *>(e.g_out[g / e.ops]));
            if (summed) group_sums(batch, gradients, products);
            for (size_t i = 0; i < batch.size(); ++i) last_lines(batch[i], gradients, products, &stage1.lines[i * D]);
            if (e.g_x || e.weights) {
                second_stage(stage1);
                stage_backward(1, stage1);
                if (e.g_x) add_input_gradient(stage1, g_active, first);
            }
            first = false;
            arena.release(mark);
        }
        double *g_mixing = static_cast<double *>(e.g_mixing);
        for (int64_t edge = 0; edge < e.edges; ++edge)
            for (int64_t column = 0; column < columns; ++column) {
                double total = 0;
                for (int64_t d = 0; d < D; ++d) {
                    double product = products[(edge * D + d) * columns + column];
                    T scale = 1, shift = 0;
                    if (column < e.ops) {
                        const Op &op = e.op[column];
                        scale = value(op.repeats == 1 ? op.scale1 : op.scale2, edge * D + d, 1);
                        shift = value(op.repeats == 1 ? op.shift1 : op.shift2, edge * D + d, 0);
                    }
                    total += scale * product + shift * gradients[edge * D + d];
                }
                if (g_mixing) g_mixing[edge * columns + column] = total;
            }
        if (e.g_x) finish_input_gradient(g_active, gradients, products);
    }

    static double normalised(double product, double gradient, double mean, double rstd) {
        return (product - mean * gradient) * rstd;
    }

    // Sums with the maps that all edges share.
    void shared_sums(double *gradients, double *products) const {
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t task = 0; task < e.edges * D; ++task) {
            int64_t d = task % D;
            const T *g = static_cast<const T *>(e.g_out[task / D]) + d * plane_out;
            double *p = products + task * columns + e.ops;
            if (!e.pools && !e.skip) sums(g, g, plane_out, row_out, gradients + task, nullptr);
            for (int64_t i = 0; i < e.pools; ++i) {
                const Pool &pool = e.pool[i];
                sums(g, at(pool.z, d * plane_out), plane_out, row_out, gradients + task, p + i);
                p[i] = normalised(p[i], gradients[task], value(pool.mean, d, 0), value(pool.rstd, d, 1));
            }
            if (e.skip) sums(g, at(e.x, d * plane), plane_out, row_out, gradients + task, p + e.pools);
        }
    }

    void group_sums(const std::vector<int64_t> &batch, const double *gradients, double *products) const {
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t task = 0; task < int64_t(batch.size()) * D; ++task) {
            int64_t g = batch[task / D], d = task % D, edge = g / e.ops, channel = edge * D + d;
            const Op &op = e.op[g % e.ops];
            bool once = op.repeats == 1;
            double *p = products + channel * columns + g % e.ops, gradient;
            sums(static_cast<const T *>(e.g_out[edge]) + d * plane_out,
                 at(once ? op.z1 : op.z2, edge * map_out + d * plane_out), plane_out, row_out, &gradient, p);
            *p = normalised(*p, gradients[channel], *at(once ? op.mean1 : op.mean2, channel),
                            *at(once ? op.rstd1 : op.rstd2, channel));
        }
    }

    // Gradients with respect to the input of a group's last normalisation, and of its affine part.
    void last_lines(int64_t g, const double *gradients, const double *products, Line *lines) const {
        const Op &op = e.op[g % e.ops];
        bool once = op.repeats == 1;
        T w = mixing(g / e.ops, g % e.ops);
        for (int64_t d = 0; d < D; ++d) {
            int64_t channel = g / e.ops * D + d;
            double product = products[channel * columns + g % e.ops];
            T mean = *at(once ? op.mean1 : op.mean2, channel), rstd = *at(once ? op.rstd1 : op.rstd2, channel);
            T scale = value(once ? op.scale1 : op.scale2, channel, 1);
            lines[d] = through_norm(w * scale, mean, rstd, gradients[channel], product);
            if (e.weights && (once ? op.g_scale1 : op.g_scale2)) {
                *at(once ? op.g_scale1 : op.g_scale2, channel) = T(w * product);
                *at(once ? op.g_shift1 : op.g_shift2, channel) = T(w * gradients[channel]);
            }
        }
    }

    // Gradient of the activated input [C, H, W, N] (+)= what comes from these groups.
    void add_input_gradient(const StageBackward &stage1, T *g_active, bool first) const {
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t task = 0; task < C * H; ++task) {
            int64_t c = task % C, y = task / C;
            T *result = g_active + (c * H + y) * row;
            if (first) std::memset(result, 0, row * sizeof(T));
            input_gradient_row(stage1, c, y, result);
        }
    }

    // Through the activation, and with the pools and the skip connection.
    void finish_input_gradient(const T *g_active, const double *gradients, const double *products) {
        // Gradients of the pools' outputs: all edges together, through the normalisation.
        T *g_pool = e.pools ? take<T>(e.pools * C * plane_out) : nullptr;
        #pragma omp parallel for num_threads(e.threads) schedule(static)
        for (int64_t task = 0; task < e.pools * C; ++task) {
            int64_t i = task / C, c = task % C;
            const Pool &pool = e.pool[i];
            double gradient = 0, product = 0;
            for (int64_t edge = 0; edge < e.edges; ++edge) {
                double w = mixing(edge, e.ops + i);
                gradient += w * gradients[edge * D + c];
                product += w * products[(edge * D + c) * columns + e.ops + i];
            }
            Line line = pool.mean ? through_norm(1, *at(pool.mean, c), *at(pool.rstd, c), gradient, product) : Line{1, 0, 0};
            const T *z = at(pool.z, c * plane_out);
            T *p = g_pool + task * plane_out;
            for (int64_t j = 0; j < plane_out; j += L) {
                V total = {};
                for (int64_t edge = 0; edge < e.edges; ++edge)
                    total += mixing(edge, e.ops + i) * load(static_cast<const T *>(e.g_out[edge]) + c * plane_out + j);
                store(p + j, line.a * total + (line.b * load(z + j) + line.c));
            }
        }
        std::vector<T *> scratch(e.threads);
        for (auto &s : scratch) s = take<T>(row);
        #pragma omp parallel num_threads(e.threads)
        {
            T *result = scratch[thread()];
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < C * H; ++task) {
                int64_t c = task / H, y = task % H;
                const T *x = at(e.x, task * row), *active = g_active + task * row;
                T *g_x = at(e.g_x, task * row);
                for (int64_t i = 0; i < row; i += L)
                    store(result + i, G ? (load(x + i) > V{} ? load(active + i) : V{}) : V{});
                for (int64_t i = 0; i < e.pools; ++i)
                    pool_backward_row(e.pool[i], c, g_pool + (i * C + c) * plane_out, y, result);
                if (e.skip)
                    for (int64_t edge = 0; edge < e.edges; ++edge) {
                        T w = mixing(edge, e.ops + e.pools);
                        const T *g = static_cast<const T *>(e.g_out[edge]) + c * plane_out + y * row_out;
                        for (int64_t i = 0; i < row; i += L) store(result + i, load(result + i) + w * load(g + i));
                    }
                if (e.add_g_x)
                    for (int64_t i = 0; i < row; i += L) store(g_x + i, load(g_x + i) + load(result + i));
                else
                    std::memcpy(g_x, result, row * sizeof(T));
            }
        }
    }

    // Through the second repeat, where there is one: replaces gradients and lines of the first stage.
    void second_stage(StageBackward &stage1) {
        std::vector<int64_t> repeated, place;
        for (size_t i = 0; i < stage1.groups.size(); ++i)
            if (e.op[stage1.groups[i] % e.ops].repeats == 2) {
                repeated.push_back(stage1.groups[i]);
                place.push_back(int64_t(i));
            }
        int64_t n = int64_t(repeated.size());
        if (!n) return;
        StageBackward b;
        b.groups = repeated;
        for (int64_t i = 0; i < n; ++i) {
            b.gradient.push_back(stage1.gradient[place[i]]);
            b.lines.insert(b.lines.end(), &stage1.lines[place[i] * D], &stage1.lines[place[i] * D] + D);
        }
        b.activated = e.weights ? activated_middle(repeated) : nullptr;
        b.group_size = D * padded2;
        stage_backward(2, b);
        T *between = take<T>(n * map_out);
        #pragma omp parallel for num_threads(e.threads) schedule(dynamic, 1)
        for (int64_t task = 0; task < n * D; ++task) {
            int64_t i = task / D, d = task % D, g = repeated[i], edge = g / e.ops, channel = edge * D + d;
            const Op &op = e.op[g % e.ops];
            const T *t = b.t + b.t_at[i] + d * padded2, *z = at(op.z1, edge * map_out + d * plane_out);
            T *result = between + task * plane_out, a, shift;
            affine(op, 1, channel, &a, &shift);
            const T *kernel = at(op.depthwise2, channel * op.kernel * op.kernel);
            double gradient = 0, product = 0;
            Tap taps[64];
            for (int64_t y = 0; y < Ho; ++y) {
                int n_taps = taps_back(op, y, Ho, Wo, taps);
                T *p = result + y * row_out;
                const T *q = z + y * row_out;
                taps_row(t, kernel, taps, n_taps, p, row_out);
                V s = {}, sp = {};
                for (int64_t j = 0; j < row_out; j += L) {
                    V map = load(q + j), v = a * map + shift > V{} ? load(p + j) : V{};
                    store(p + j, v);
                    s += v, sp += v * map;
                }
                gradient += sum(s), product += sum(sp);
            }
            T mean = *at(op.mean1, channel), rstd = *at(op.rstd1, channel);
            product = (product - mean * gradient) * rstd;
            stage1.gradient[place[i]] = between + i * map_out;
            stage1.lines[place[i] * D + d] = through_norm(value(op.scale1, channel, 1), mean, rstd, gradient, product);
            if (e.weights && op.g_scale1) {
                *at(op.g_scale1, channel) = T(product);
                *at(op.g_shift1, channel) = T(gradient);
            }
        }
    }

    // Row y of channel c of the gradient of the activated input += what comes from these groups.
    void input_gradient_row(const StageBackward &stage1, int64_t c, int64_t y, T *result) const {
        Tap taps[64];
        const T one = 1;
        for (size_t i = 0; i < stage1.groups.size() && S == 1; ++i) {
            int64_t g = stage1.groups[i];
            const Op &op = e.op[g % e.ops];
            const T *t = stage1.t + stage1.t_at[i] + c * padded2, *kernel = &one;
            int n = 1;
            if (op.kind == DEPTHWISE) {
                kernel = at(op.depthwise1, (g / e.ops * C + c) * op.kernel * op.kernel);
                n = taps_back(op, y, Ho, Wo, taps);
            } else {
                taps[0] = {y * wide2 + pad2 * N, 0};
            }
            add_taps(t, kernel, taps, n, result, row);
        }
        if (S == 1) return;
        for (size_t i = 0; i < stage1.groups.size(); ++i) {
            int64_t g = stage1.groups[i];
            const Op &op = e.op[g % e.ops];
            if (op.kind == HALVES) {
                int64_t half = y % 2;
                const T *t = stage1.t + stage1.t_at[i] + (half * C + c) * padded2 + y / 2 * wide2 + pad2 * N;
                for (int64_t x = half; x < W; x += 2)
                    for (int64_t n = 0; n < N; n += L)
                        store(result + x * N + n, load(result + x * N + n) + load(t + x / 2 * N + n));
                continue;
            }
            const T *t = stage1.t + stage1.t_at[i] + c * padded2;
            int64_t K = op.kernel, d = op.dilation, p = padding(op);
            const T *kernel = at(op.depthwise1, (g / e.ops * C + c) * K * K);
            for (int64_t parity = 0; parity < S; ++parity) {
                int n_taps = 0;
                for (int64_t ky = 0; ky < K; ++ky) {
                    int64_t up = y + p - ky * d;
                    if (up < 0 || up % S || up / S >= Ho) continue;
                    for (int64_t kx = 0; kx < K; ++kx) {
                        int64_t left = parity + p - kx * d;
                        if ((left % S + S) % S) continue;
                        int64_t shift = left >= 0 ? left / S : -(-left / S);
                        if (shift <= -Wo || shift >= Wo) continue;
                        taps[n_taps++] = {up / S * wide2 + (shift + pad2) * N, ky * K + kx};
                    }
                }
                if (!n_taps) continue;
                for (int64_t x = parity, out = 0; x < W; x += S, ++out)
                    for (int64_t n = 0; n < N; n += L) {
                        V acc[1] = {load(result + x * N + n)};
                        accumulate_row<1>(t + out * N + n, kernel, taps, n_taps, acc);
                        store(result + x * N + n, acc[0]);
                    }
            }
        }
    }

    static void add_taps(const T *source, const T *kernel, const Tap *taps, int n_taps, T *destination, int64_t n) {
        int64_t i = 0;
        for (; i + 8 * L <= n; i += 8 * L) {
            V acc[8];
            for (int j = 0; j < 8; ++j) acc[j] = load(destination + i + j * L);
            accumulate_row<8>(source + i, kernel, taps, n_taps, acc);
            for (int j = 0; j < 8; ++j) store(destination + i + j * L, acc[j]);
        }
        for (; i < n; i += L) {
            V acc[1] = {load(destination + i)};
            accumulate_row<1>(source + i, kernel, taps, n_taps, acc);
            store(destination + i, acc[0]);
        }
    }
};

#ifdef _OPENMP
#include <omp.h>
template <class T, int L> int Kernel<T, L>::thread() { return omp_get_thread_num(); }
#else
template <class T, int L> int Kernel<T, L>::thread() { return 0; }
#endif

template <class T, int L> int run(Edges *edges, bool backward) {
    try {
        Kernel<T, L> kernel(*edges);
        if (backward)
            kernel.backward();
        else
            kernel.forward();
        return 0;
    } catch (const OutOfMemory &) {
        return 1;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

template <class T> int dispatch(Edges *edges, bool backward) {
    constexpr int widest = 64 / sizeof(T);
    if (edges->batch % widest == 0) return run<T, widest>(edges, backward);
    if (edges->batch % (widest / 2) == 0) return run<T, widest / 2>(edges, backward);
    if (edges->batch % 4 == 0) return run<T, 4>(edges, backward);
    return 2;
}

// A program is what a cell computes, as numbers: normalisations, then steps. Pointers are places in buffers that the
// caller names at each call: the number of the buffer (-1: none) and an offset in bytes; a missing buffer gives null.
struct Reader {
    const int64_t *at;
    void *const *buffers;
    int64_t number() { return *at++; }
    double real() {
        double value;
        std::memcpy(&value, at++, sizeof value);
        return value;
    }
    void *pointer() {
        int64_t buffer = *at++, offset = *at++;
        if (buffer < 0 || !buffers[buffer]) return nullptr;
        return static_cast<char *>(buffers[buffer]) + offset;
    }
};

struct Norm {
    int64_t channels, count;
    double epsilon, momentum;
    void *running_mean, *running_variance, *tracked, *mean, *rstd;

    explicit Norm(Reader &r) {
        channels = r.number(), count = r.number(), epsilon = r.real(), momentum = r.real();
        running_mean = r.pointer(), running_variance = r.pointer(), tracked = r.pointer();
        mean = r.pointer(), rstd = r.pointer();
    }

    // Statistics in eval mode.
    template <class T> void fill() const {
        for (int64_t c = 0; c < channels; ++c) {
            static_cast<T *>(mean)[c] = static_cast<const T *>(running_mean)[c];
            double variance = static_cast<const T *>(running_variance)[c];
            static_cast<T *>(rstd)[c] = T(1 / std::sqrt(variance + epsilon));
        }
    }

    // Running statistics after a batch, with the unbiased variance. Momentum below 0: the mean over all batches.
    template <class T> void record() const {
        if (!running_mean || !running_variance) return;
        double share = momentum;
        if (tracked) {
            int64_t batches = ++*static_cast<int64_t *>(tracked);
            if (momentum < 0) share = 1.0 / double(batches);
        }
        for (int64_t c = 0; c < channels; ++c) {
            T &m = static_cast<T *>(running_mean)[c], &v = static_cast<T *>(running_variance)[c];
            double r = static_cast<const T *>(rstd)[c], biased = std::max(1 / (r * r) - epsilon, 0.0);
            double variance = biased * double(count) / double(std::max<int64_t>(count - 1, 1));
            m = T(m + share * (static_cast<const T *>(mean)[c] - m));
            v = T(v + share * (variance - v));
        }
    }
};

struct Step {
    Edges edges;
    std::vector<Op> ops;
    std::vector<Pool> pools;
    std::vector<void *> out;
    std::vector<const void *> g_out;
    std::vector<int64_t> add;

    Step(Reader &r, int64_t training, int64_t threads, int64_t weights) {
        Edges &e = edges;
        e.edges = r.number(), e.in_channels = r.number(), e.out_channels = r.number(), e.height = r.number();
        e.width = r.number(), e.batch = r.number(), e.stride = r.number(), e.ops = r.number(), e.pools = r.number();
        e.skip = r.number(), e.epsilon = r.real();
        e.training = training, e.threads = threads, e.weights = weights;
        e.x = r.pointer(), e.mixing = r.pointer(), e.g_x = r.pointer(), e.add_g_x = r.number();
        e.g_mixing = r.pointer();
        for (int64_t i = 0; i < e.edges; ++i) {
            out.push_back(r.pointer()), add.push_back(r.number());
            g_out.push_back(r.pointer());
        }
        for (int64_t i = 0; i < e.ops; ++i) {
            Op op;
            op.kind = r.number(), op.kernel = r.number(), op.dilation = r.number(), op.repeats = r.number();
            op.depthwise1 = r.pointer(), op.pointwise1 = r.pointer(), op.odd1 = r.pointer();
            op.depthwise2 = r.pointer(), op.pointwise2 = r.pointer();
            op.scale1 = r.pointer(), op.shift1 = r.pointer(), op.scale2 = r.pointer(), op.shift2 = r.pointer();
            op.g_depthwise1 = r.pointer(), op.g_pointwise1 = r.pointer(), op.g_odd1 = r.pointer();
            op.g_depthwise2 = r.pointer(), op.g_pointwise2 = r.pointer();
            op.g_scale1 = r.pointer(), op.g_shift1 = r.pointer(), op.g_scale2 = r.pointer(), op.g_shift2 = r.pointer();
            op.z1 = r.pointer(), op.z2 = r.pointer();
            op.mean1 = r.pointer(), op.rstd1 = r.pointer(), op.mean2 = r.pointer(), op.rstd2 = r.pointer();
            ops.push_back(op);
        }
        for (int64_t i = 0; i < e.pools; ++i) {
            Pool pool;
            pool.kind = r.number(), pool.z = r.pointer(), pool.taken = r.pointer();
            pool.mean = r.pointer(), pool.rstd = r.pointer();
            pools.push_back(pool);
        }
        e.op = ops.data(), e.pool = pools.data(), e.out = out.data(), e.add = add.data(), e.g_out = g_out.data();
    }
};

template <class T> int interpret(const int64_t *program, void *const *buffers, int backward, int record, int weights,
                                 int threads) {
    Reader r{program, buffers};
    int64_t training = r.number(), n_norms = r.number(), n_steps = r.number();
    std::vector<Norm> norms;
    for (int64_t i = 0; i < n_norms; ++i) norms.emplace_back(r);
    std::vector<Step> steps;
    steps.reserve(n_steps);
    for (int64_t i = 0; i < n_steps; ++i) steps.emplace_back(r, training, threads, weights);
    if (backward) {
        for (int64_t i = n_steps - 1; i >= 0; --i)
            if (int status = dispatch<T>(&steps[i].edges, true)) return status;
        return 0;
    }
    if (!training)
        for (const Norm &norm : norms) norm.template fill<T>();
    for (Step &step : steps)
        if (int status = dispatch<T>(&step.edges, false)) return status;
    if (training && record)
        for (const Norm &norm : norms) norm.template record<T>();
    return 0;
}

}  // namespace

extern "C" {
// 0: done; 1: out of memory; 2: the batch is not a multiple of 4.
int run_float(const int64_t *program, void *const *buffers, int backward, int record, int weights, int threads) {
    return interpret<float>(program, buffers, backward, record, weights, threads);
}
int run_double(const int64_t *program, void *const *buffers, int backward, int record, int weights, int threads) {
    return interpret<double>(program, buffers, backward, record, weights, threads);
}
}
