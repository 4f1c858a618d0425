/* Scores of neurons from few-bit copies of their projections on a CPU: see cpu_sketch.py.
 *
 * In a plane of P bits field f of byte j belongs to column f * S + j, S bytes being a row's: eight
 * bytes are widened once, and each of their fields, masked where it lies, multiplies eight
 * neighbouring values of x, which were divided by 2^(f P) beforehand. Sums are fp32, in an order that
 * depends on shapes alone. */
#include "cpu_vector.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Eight lanes: sums of sixteen, which AVX2 has no registers for, GCC 12 keeps in memory. */
typedef float f8v __attribute__((vector_size(32)));
typedef float f8u __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8v __attribute__((vector_size(32)));
typedef uint16_t h8v __attribute__((vector_size(16)));
typedef uint8_t b8u __attribute__((vector_size(8), aligned(1)));

/* GCC 12 widens bytes to words in eight instructions, where one serves. */
static inline i8v widened(const uint8_t *from) {
#ifdef __AVX2__
    return (i8v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    h8v half = __builtin_convertvector(*(const b8u *)from, h8v);
    return __builtin_convertvector(half, i8v);
#endif
}

enum { MOST = 4 }; /* rows of x that share a pass over the bytes */

/* sums[m] += weight * sum over a plane of row . x[m], x being K8 = 8 S / P apart */
static inline __attribute__((always_inline)) void plane_of(const uint8_t *row, const float *x,
                                                           int64_t S, const int P, const int ROWS,
                                                           float weight, float *sums) {
    const int fields = 8 / P;
    const int64_t K8 = S * fields;
    f8v part[MOST] = {0}; /* one row of x has four sums under way, four rows one each */
    float rest[MOST] = {0};
    int64_t j = 0;
    for (; j + 8 <= S; j += 8) {
        i8v byte = widened(row + j);
#pragma GCC unroll 8
        for (int f = 0; f < fields; f++) {
            f8v field = __builtin_convertvector(byte & (((1 << P) - 1) << (f * P)), f8v);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) {
                const int i = ROWS == 1 ? f % 4 : ROWS == 2 ? m + f % 2 * 2 : m;
                part[i] += field * *(const f8u *)(x + m * K8 + f * S + j);
            }
        }
    }
    for (; j < S; j++)
        for (int f = 0; f < fields; f++)
            for (int m = 0; m < ROWS; m++)
                rest[m] += (row[j] & (((1 << P) - 1) << (f * P))) * x[m * K8 + f * S + j];
    for (int m = 0; m < ROWS; m++) {
        f8v y = part[m];
        if (ROWS == 1) y = (part[0] + part[1]) + (part[2] + part[3]);
        if (ROWS == 2) y = part[m] + part[m + 2];
        float even = (y[0] + y[4]) + (y[2] + y[6]), odd = (y[1] + y[5]) + (y[3] + y[7]);
        sums[m] += weight * (even + odd + rest[m]);
    }
}

#define ROWS_OF(P, ROWS) plane_of(row, x, S, P, ROWS, weight, sums)
#define PLANE_OF(P)                                                                              \
    (rows == 1   ? ROWS_OF(P, 1)                                                                 \
     : rows == 2 ? ROWS_OF(P, 2)                                                                 \
     : rows == 3 ? ROWS_OF(P, 3)                                                                 \
                 : ROWS_OF(P, 4))

static void plane(const uint8_t *row, const float *x, int64_t S, int64_t bits, int64_t rows,
                  float weight, float *sums) {
    if (bits == 1) PLANE_OF(1);
    else if (bits == 2) PLANE_OF(2);
    else PLANE_OF(4);
}

/* scaled[log2 P] holds x for planes of P bits; products of `rows` rows of x from `first` */
static void products(const uint8_t *row, float *const *scaled, const float *total, int64_t first,
                     int64_t rows, int64_t K8, int64_t bits, float scale, float bias, float *y) {
    int64_t low = bits == 3 ? 2 : bits;
    memset(y, 0, sizeof(float) * rows);
    plane(row, scaled[low / 2] + first * K8, K8 * low / 8, low, rows, 1, y);
    if (bits == 3) plane(row + K8 / 4, scaled[0] + first * K8, K8 / 8, 1, rows, 4, y);
    for (int64_t m = 0; m < rows; m++)
        y[m] = (y[m] - total[first + m] * ((1 << bits) - 1) / 2) * scale + bias;
}

/* y (K8) = x (D) / 2^(f P) in the columns of field f, 0 past the last */
static void scaled_by_field(const float *x, float *y, int64_t D, int64_t K8, int P) {
    for (int64_t f = 0, S = K8 * P / 8; f < 8 / P; f++) {
        int64_t begin = f * S, end = begin + S < D ? begin + S : D;
        float part = 1.0f / (1 << (f * P));
        for (int64_t k = begin; k < end; k++) y[k] = x[k] * part;
        for (int64_t k = end < begin ? begin : end; k < begin + S; k++) y[k] = 0;
    }
}

static float half_log(float factor, const float *floor, int64_t n, double tiny) {
    return 0.5f * logf(factor * factor + (float)tiny + (floor ? floor[n] : 0));
}

/* y[m, n] = offset[n] + the half logs of act(inner row n . x[m]) and of linear row n . x[m] */
void gnomon_sketch(const float *x, const uint8_t *inner, const uint8_t *linear,
                   const float *inner_scale, const float *linear_scale, const float *inner_bias,
                   const float *linear_bias, const float *inner_floor, const float *linear_floor,
                   const float *offset, float *y, int64_t M, int64_t D, int64_t N,
                   int64_t inner_bits, int64_t linear_bits, int64_t activation, int64_t threads,
                   double tiny) {
    int64_t K8 = (D + 7) / 8 * 8;
    float *total = malloc(sizeof(float) * M * (1 + 3 * K8)), *scaled[3];
    for (int p = 0; p < 3; p++) {
        scaled[p] = total + M + p * M * K8;
        for (int64_t m = 0; m < M; m++)
            scaled_by_field(x + m * D, scaled[p] + m * K8, D, K8, 1 << p);
    }
    for (int64_t m = 0; m < M; m++) {
        double sum = 0;
        for (int64_t k = 0; k < D; k++) sum += x[m * D + k];
        total[m] = (float)sum;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < M; first += MOST) {
            int64_t rows = M - first < MOST ? M - first : MOST;
            float a[MOST], u[MOST];
            products(inner + n * (K8 * inner_bits / 8), scaled, total, first, rows, K8, inner_bits,
                     inner_scale[n], inner_bias ? inner_bias[n] : 0, a);
            if (linear)
                products(linear + n * (K8 * linear_bits / 8), scaled, total, first, rows, K8,
                         linear_bits, linear_scale[n], linear_bias ? linear_bias[n] : 0, u);
            for (int64_t m = 0; m < rows; m++) {
                float score = half_log(activated(a[m], activation), inner_floor, n, tiny);
                if (linear) score += half_log(u[m], linear_floor, n, tiny);
                y[(first + m) * N + n] = score + offset[n];
            }
        }
    free(total);
}

/* of cpu_gather.c */
int64_t gnomon_rows(const float *x, const void *up, const void *gate, const int32_t *index,
                    const int32_t *count, const float *up_scale, const float *gate_scale,
                    const float *up_bias, const float *gate_bias, const float *gain,
                    const float *shift, float *y, int64_t B, int64_t W, int64_t N, int64_t S,
                    int64_t unit, int64_t own, int64_t type, int64_t norm, int64_t activation,
                    int64_t whole, int64_t threads, double eps);

/* h[m, n] of the neurons whose score reaches the cut, 0 of the others; index[m, n] = n, or N */
void gnomon_sketched(const float *x, const uint8_t *inner, const uint8_t *linear,
                     const float *inner_scale, const float *linear_scale, const float *inner_bias,
                     const float *linear_bias, const float *inner_floor, const float *linear_floor,
                     const float *offset, const float *cut, const void *up, const void *gate,
                     const float *up_scale, const float *gate_scale, const float *up_bias,
                     const float *gate_bias, float *h, int32_t *index, int64_t M, int64_t D,
                     int64_t N, int64_t inner_bits, int64_t linear_bits, int64_t activation,
                     int64_t type, int64_t threads, double tiny) {
    int32_t *list = malloc(sizeof(int32_t) * N);
    gnomon_sketch(x, inner, linear, inner_scale, linear_scale, inner_bias, linear_bias, inner_floor,
                  linear_floor, offset, h, M, D, N, inner_bits, linear_bits, activation, threads,
                  tiny); /* scores stand where h will */
    for (int64_t m = 0; m < M; m++) {
        float *own = h + m * N;
        int64_t held = 0;
        for (int64_t n = 0; n < N; n++) {
            int keep = own[n] >= *cut;
            index[m * N + n] = keep ? (int32_t)n : (int32_t)N;
            list[held] = (int32_t)n;
            held += keep;
        }
        memset(own, 0, sizeof(float) * N);
        if (held)
            gnomon_rows(x + m * D, up, gate, list, NULL, up_scale, gate_scale, up_bias, gate_bias,
                        NULL, NULL, own, 1, D, N, held, 1, 0, type, 0, activation, 1, threads, 0);
    }
    free(list);
}

/* list of the n with |x[n]| above the threshold; how many they are */
int64_t gnomon_passing(const float *x, double threshold, int64_t N, int32_t *list) {
    int64_t held = 0;
    for (int64_t n = 0; n < N; n++) {
        list[held] = (int32_t)n;
        held += fabsf(x[n]) > (float)threshold;
    }
    return held;
}
