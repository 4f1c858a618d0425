/* Weights of any type as vectors of 16 fp32: products of rows, and rows added to a sum. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32, BF16, FP16, INT8 };                     /* weight types */
enum { IDENTITY, RELU, SILU, GELU_TANH, GELU };      /* activations */

static inline float activated(float x, int64_t activation) {
    if (activation == RELU) return x != x || x > 0 ? x : 0;
    if (activation == SILU) return x / (1 + expf(-x));
    if (activation == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (activation == GELU_TANH)
        return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return x;
}

typedef float f16v __attribute__((vector_size(64)));
typedef float f16u __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16u __attribute__((vector_size(32), aligned(2)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef int16_t s16v __attribute__((vector_size(32)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef int8_t c16u __attribute__((vector_size(16), aligned(1)));

static inline f16v wide_fp32(const void *w, int64_t k) { return *(const f16u *)((const float *)w + k); }
static inline float one_fp32(const void *w, int64_t k) { return ((const float *)w)[k]; }
static inline f16v wide_bf16(const void *w, int64_t k) {
    h16u h = *(const h16u *)((const uint16_t *)w + k);
    return (f16v)(__builtin_convertvector(h, u16v) << 16);
}
static inline float one_bf16(const void *w, int64_t k) {
    uint32_t bits = (uint32_t)((const uint16_t *)w)[k] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline f16v wide_int8(const void *w, int64_t k) {
    c16u c = *(const c16u *)((const int8_t *)w + k);
    s16v s = __builtin_convertvector(c, s16v); /* in one step GCC 12 converts byte by byte */
    return __builtin_convertvector(__builtin_convertvector(s, i16v), f16v);
}
static inline float one_int8(const void *w, int64_t k) { return ((const int8_t *)w)[k]; }
#ifdef __FLT16_MAX__
typedef _Float16 e16u __attribute__((vector_size(32), aligned(2)));
static inline f16v wide_fp16(const void *w, int64_t k) {
    return __builtin_convertvector(*(const e16u *)((const _Float16 *)w + k), f16v);
}
static inline float one_fp16(const void *w, int64_t k) { return (float)((const _Float16 *)w)[k]; }
#endif

/* dot: w[at .. at + n) . x;  add: y += a0 w[p0 ..] + .. + a3 w[p3 ..] (four rows spare y's traffic) */
/* In four steps: one by one, the sum would cost as much as a short row. */
static inline float sum16(f16v a) {
    float t[16];
    memcpy(t, &a, sizeof t);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
}

#define SIZE_fp32 4
#define SIZE_bf16 2
#define SIZE_fp16 2
#define SIZE_int8 1
#define FOR_TYPE(T)                                                                              \
    static inline float dot_##T(const void *w, int64_t at, int64_t next, const float *x, int64_t n) {   \
        f16v a = {0}, b = {0}, c = {0}, d = {0};                                                 \
        int64_t k = 0;                                                                           \
        for (; k + 64 <= n; k += 64) {                                                           \
            for (int i = 0; i < 64; i += 64 / SIZE_##T)                                          \
                __builtin_prefetch((const char *)w + (next + k + i) * SIZE_##T);                 \
            a += wide_##T(w, at + k) * *(const f16u *)(x + k);                                   \
            b += wide_##T(w, at + k + 16) * *(const f16u *)(x + k + 16);                         \
            c += wide_##T(w, at + k + 32) * *(const f16u *)(x + k + 32);                         \
            d += wide_##T(w, at + k + 48) * *(const f16u *)(x + k + 48);                         \
        }                                                                                        \
        for (; k + 16 <= n; k += 16) a += wide_##T(w, at + k) * *(const f16u *)(x + k);          \
        a += b;                                                                                  \
        c += d;                                                                                  \
        a += c;                                                                                  \
        float sum = sum16(a);                                                                    \
        for (; k < n; k++) sum += one_##T(w, at + k) * x[k];                                     \
        return sum;                                                                              \
    }                                                                                            \
    static inline void add_##T(const void *w, const int64_t *p, const float *a, float *y, int64_t n) {  \
        int64_t k = 0;                                                                           \
        for (; k + 16 <= n; k += 16)                                                             \
            *(f16u *)(y + k) += a[0] * wide_##T(w, p[0] + k) + a[1] * wide_##T(w, p[1] + k)      \
                              + a[2] * wide_##T(w, p[2] + k) + a[3] * wide_##T(w, p[3] + k);     \
        for (; k < n; k++)                                                                       \
            y[k] += a[0] * one_##T(w, p[0] + k) + a[1] * one_##T(w, p[1] + k)                    \
                  + a[2] * one_##T(w, p[2] + k) + a[3] * one_##T(w, p[3] + k);                   \
    }                                                                                            \
    static inline void add1_##T(const void *w, int64_t p, float a, float *y, int64_t n) {               \
        int64_t k = 0;                                                                           \
        for (; k + 16 <= n; k += 16) *(f16u *)(y + k) += a * wide_##T(w, p + k);                 \
        for (; k < n; k++) y[k] += a * one_##T(w, p + k);                                        \
    }
FOR_TYPE(fp32)
FOR_TYPE(bf16)
FOR_TYPE(int8)
#ifdef __FLT16_MAX__
FOR_TYPE(fp16)
#define OF_TYPE(FN, T) (T == FP32 ? FN##_fp32 : T == BF16 ? FN##_bf16 : T == INT8 ? FN##_int8 : FN##_fp16)
#define HAS_FP16 1
#else
#define OF_TYPE(FN, T) (T == FP32 ? FN##_fp32 : T == BF16 ? FN##_bf16 : FN##_int8)
#define HAS_FP16 0
#endif
