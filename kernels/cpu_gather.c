/* Gathered rows and columns of a matrix on a CPU, at the memory's speed: see cpu_gather.py.
 *
 * Weights are fp32, bf16, fp16 or row-scaled int8 and are widened in registers; sums are fp32, in an
 * order that depends on shapes alone, not on the number of threads. Rows out of range are not read:
 * the functions then return 1. */
#include "cpu_vector.h"

enum { NONE, RMS, LAYER };                           /* norms */
enum { AHEAD = 4 }; /* rows between the one that is summed and the one that is fetched */

int64_t gnomon_has_fp16(void) { return HAS_FP16; }

static void normalised(const float *x, float *y, int64_t n, int64_t norm, const float *gain,
                       const float *shift, float eps) {
    double mean = 0, square = 0;
    if (norm == LAYER) {
        for (int64_t k = 0; k < n; k++) mean += x[k];
        mean /= n;
    }
    for (int64_t k = 0; k < n; k++) square += (x[k] - mean) * (x[k] - mean);
    float rstd = 1 / sqrtf((float)(square / n) + eps);
    for (int64_t k = 0; k < n; k++) {
        y[k] = (x[k] - (float)mean) * rstd * (gain ? gain[k] : 1);
        if (shift) y[k] += shift[k];
    }
}

/* y (B, W) = norm(x) + residual */
void gnomon_norm(const float *x, const float *gain, const float *shift, const float *residual,
                 float *y, int64_t B, int64_t W, int64_t norm, double eps) {
    for (int64_t b = 0; b < B; b++) {
        const float *own = x + b * W;
        float *to = y + b * W;
        if (norm == NONE) memcpy(to, own, sizeof(float) * W);
        else normalised(own, to, W, norm, gain, shift, (float)eps);
        if (residual)
            for (int64_t k = 0; k < W; k++) to[k] += residual[b * W + k];
    }
}

/* Row of entry `slot`, or -1 where the list names none that exists. */
static inline int64_t row_of(const int32_t *index, int64_t slot, int64_t unit, int64_t n) {
    int64_t block = index ? index[slot / unit] : slot / unit;
    int64_t row = block * unit + slot % unit;
    return row >= 0 && row < n ? row : -1;
}

/* y[b, s] (or y[b, row] when `whole`) = act(gate row . x) * (up row . x), or act(up row . x). */
int64_t gnomon_rows(const float *x, const void *up, const void *gate, const int32_t *index,
                    const int32_t *count, const float *up_scale, const float *gate_scale,
                    const float *up_bias, const float *gate_bias, const float *gain,
                    const float *shift, float *y, int64_t B, int64_t W, int64_t N, int64_t S,
                    int64_t unit, int64_t own, int64_t type, int64_t norm, int64_t activation,
                    int64_t whole, int64_t threads, double eps) {
    float (*dot)(const void *, int64_t, int64_t, const float *, int64_t) = OF_TYPE(dot, type);
    float *scratch = NULL;
    if (norm != NONE) {
        scratch = malloc(sizeof(float) * B * W);
        for (int64_t b = 0; b < B; b++)
            normalised(x + b * W, scratch + b * W, W, norm, gain, shift, (float)eps);
        x = scratch;
    }
    int64_t wide = whole ? N : S * unit, lists = own ? B : 1, bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (int64_t item = 0; item < lists * S * unit; item++) {
        int64_t list = item / (S * unit), slot = item % (S * unit);
        if (count && slot >= count[list] * unit) continue;
        int64_t row = row_of(index ? index + list * S : NULL, slot, unit, N);
        if (row < 0) {
            bad = 1;
            continue;
        }
        int64_t next = row;
        if (item + AHEAD < lists * S * unit) { /* may lie in the next list, or past a count */
            int64_t other = (item + AHEAD) / (S * unit), at = (item + AHEAD) % (S * unit);
            next = row_of(index ? index + other * S : NULL, at, unit, N);
            if (next < 0) next = row;
        }
        int64_t first = own ? list : 0, last = own ? list + 1 : B;
        for (int64_t b = first; b < last; b++) {
            float u = dot(up, row * W, next * W, x + b * W, W);
            if (up_scale) u *= up_scale[row];
            if (up_bias) u += up_bias[row];
            if (gate) {
                float g = dot(gate, row * W, next * W, x + b * W, W);
                if (gate_scale) g *= gate_scale[row];
                if (gate_bias) g += gate_bias[row];
                u *= activated(g, activation);
            } else
                u = activated(u, activation);
            y[b * wide + (whole ? row : slot)] = u;
        }
    }
    free(scratch);
    return bad;
}

/* partial = sum over slots begin .. end of x * scale[row] * weight_t[row], four rows at a time. */
static int64_t part_of(const float *x, const void *weight_t, const int32_t *index,
                       const float *scale, float *partial, int64_t begin, int64_t end, int64_t D,
                       int64_t N, int64_t unit, int64_t type, int64_t whole) {
    void (*add)(const void *, const int64_t *, const float *, float *, int64_t) = OF_TYPE(add, type);
    void (*add1)(const void *, int64_t, float, float *, int64_t) = OF_TYPE(add1, type);
    int64_t size = type == FP32 ? 4 : type == INT8 ? 1 : 2;
    int64_t place[4], held = 0, bad = 0;
    float a[4];
    memset(partial, 0, sizeof(float) * D);
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t row = row_of(index, slot, unit, N);
        if (row < 0) {
            bad = 1;
            continue;
        }
        int64_t next = slot + 4 < end ? row_of(index, slot + 4, unit, N) : -1;
        if (next >= 0)
            for (int64_t at = 0; at < D * size; at += 64)
                __builtin_prefetch((const char *)weight_t + next * D * size + at);
        a[held] = x[whole ? row : slot] * (scale ? scale[row] : 1);
        place[held++] = row * D;
        if (held == 4) {
            add(weight_t, place, a, partial, D);
            held = 0;
        }
    }
    for (int64_t i = 0; i < held; i++) add1(weight_t, place[i], a[i], partial, D);
    return bad;
}

/* y[b] = residual[b] + bias + sum over slots; x is compact, or (B, N) when `whole`. */
int64_t gnomon_columns(const float *x, const void *weight_t, const int32_t *index,
                       const int32_t *count, const float *scale, const float *bias,
                       const float *residual, float *y, int64_t B, int64_t D, int64_t N, int64_t S,
                       int64_t unit, int64_t own, int64_t type, int64_t whole, int64_t threads) {
    int64_t wide = whole ? N : S * unit, tiles = (D + 63) / 64, bad = 0;
    int64_t parts = S * unit < 64 ? 1 : S * unit > 1024 ? 32 : S * unit / 32;
    float *partial = malloc(sizeof(float) * B * parts * D);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) reduction(| : bad)
        for (int64_t item = 0; item < B * parts; item++) {
            int64_t b = item % B, part = item / B, list = own ? b : 0; /* rows stay in the cache */
            int64_t slots = (count && count[list] < S ? count[list] : S) * unit;
            int64_t each = ((slots + parts - 1) / parts + 3) / 4 * 4;
            int64_t begin = part * each, end = begin + each < slots ? begin + each : slots;
            bad |= part_of(x + b * wide, weight_t, index ? index + list * S : NULL, scale,
                           partial + (b * parts + part) * D, begin, end, D, N, unit, type, whole);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < B * tiles; item++) {
            int64_t b = item / tiles, begin = item % tiles * 64;
            int64_t n = begin + 64 < D ? 64 : D - begin;
            float sum[64] = {0};
            for (int64_t part = 0; part < parts; part++)
                add1_fp32(partial, (b * parts + part) * D + begin, 1, sum, n);
            if (residual) add1_fp32(residual, b * D + begin, 1, sum, n);
            if (bias) add1_fp32(bias, begin, 1, sum, n);
            memcpy(y + b * D + begin, sum, sizeof(float) * n);
        }
    }
    free(partial);
    return bad;
}
