/* Attention of one decode step on a CPU: see decode_attention.py for the maths, whose reference
 * needs twenty PyTorch calls where the work itself takes a few microseconds. */
#include "cpu_vector.h"

static inline f16v pick(i16v mask, f16v a, f16v b) {
    return (f16v)((mask & (i16v)a) | (~mask & (i16v)b));
}

/* e^x of each of 16, to 2e-7; NaN stays NaN (the polynomial of Cephes). */
static inline f16v exp16(f16v x) {
    x = pick(x < -87.0f, (f16v){0} - 87.0f, x);
    f16v z = x * 1.44269504f;
    i16v n = __builtin_convertvector(pick(z < 0.0f, z - 0.5f, z + 0.5f), i16v);
    f16v whole = __builtin_convertvector(n, f16v);
    f16v r = x - whole * 0.693145751953125f - whole * 1.42860677e-6f;
    f16v y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (f16v)((n + 127) << 23);
}

/* y = rope(norm(x)) of one head. */
static void turned(const float *x, float *y, const float *gain, const float *cos, const float *sin,
                   int64_t d, int64_t rot, float eps) {
    float square = 0, scale = 1;
    if (gain) {
        for (int64_t i = 0; i < d; i++) square += x[i] * x[i];
        scale = 1 / sqrtf(square / d + eps);
    }
    for (int64_t i = 0; i < d; i++) y[i] = gain ? x[i] * scale * gain[i] : x[i];
    for (int64_t i = 0; cos && i < rot / 2; i++) {
        int64_t j = i + rot / 2;
        float low = y[i], high = y[j];
        y[i] = low * cos[i] - high * sin[i];
        y[j] = high * cos[j] + low * sin[j];
    }
}

static void stored(void *cache, int64_t at, const float *x, int64_t d, int64_t type) {
    for (int64_t i = 0; i < d; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        if (type == FP32)
            ((float *)cache)[at + i] = x[i];
        else if (type == BF16)
            ((uint16_t *)cache)[at + i] = x[i] != x[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#if HAS_FP16
        else
            ((_Float16 *)cache)[at + i] = (_Float16)x[i];
#endif
    }
}

/* ctx = softmax(cap(q . K) + alibi) V over cached tokens begin .. end; scores (end - begin + 16). */
static void attended(const float *q, const void *keys, const void *values, float *ctx, float *scores,
                     int64_t row, int64_t begin, int64_t end, int64_t d, int64_t type, float softcap,
                     float slope) {
    float (*dot)(const void *, int64_t, int64_t, const float *, int64_t) = OF_TYPE(dot, type);
    void (*add)(const void *, const int64_t *, const float *, float *, int64_t) = OF_TYPE(add, type);
    void (*add1)(const void *, int64_t, float, float *, int64_t) = OF_TYPE(add1, type);
    int64_t n = end - begin, t = 0;
    float peak = -INFINITY, sum = 0;
    for (t = 0; t < n; t++) {
        int64_t at = (row + begin + t) * d;
        float s = dot(keys, at, at, q, d);
        if (softcap != 0) s = softcap * tanhf(s / softcap);
        s += slope * (float)(t + 1 - n);
        scores[t] = s;
        peak = s > peak ? s : peak;
    }
    for (t = 0; t < n; t += 16) *(f16u *)(scores + t) = exp16(*(f16u *)(scores + t) - peak);
    for (t = 0; t < n; t++) sum += scores[t];
    for (t = 0; t < n; t++) scores[t] /= sum;
    memset(ctx, 0, sizeof(float) * d);
    for (t = 0; t + 4 <= n; t += 4) {
        int64_t at = (row + begin + t) * d, places[4] = {at, at + d, at + 2 * d, at + 3 * d};
        add(values, places, scores + t, ctx, d);
    }
    for (; t < n; t++) add1(values, (row + begin + t) * d, scores[t], ctx, d);
}

/* Returns 1 where a position lies outside the cache, of which nothing is then touched. */
int64_t gnomon_attention(const float *q, const float *k_new, const float *v_new, void *k_cache,
                         void *v_cache, const int32_t *position, const int32_t *slot,
                         const float *cos, const float *sin, const float *q_norm,
                         const float *k_norm, const int32_t *first, const float *alibi,
                         const int32_t *kv_slot, float *y, int64_t B, int64_t G, int64_t C,
                         int64_t d, int64_t H, int64_t SH, int64_t KG, int64_t rot,
                         int64_t own_slot, int64_t own_kv, int64_t window, int64_t type,
                         int64_t threads, double eps, double scaling, double softcap) {
    int64_t longest = 0;
    for (int64_t b = 0; b < B; b++) {
        if (position[b] < 0 || position[b] >= C) return 1;
        longest = position[b] > longest ? position[b] : longest;
    }
    float *scratch = malloc(sizeof(float) * (d + B * H * (d + longest + 17)));
    for (int64_t b = 0; b < B; b++) {
        const float *c = cos ? cos + position[b] * rot : NULL, *s = cos ? sin + position[b] * rot : NULL;
        for (int64_t g = 0; g < G; g++) {
            int64_t place = kv_slot ? kv_slot[own_kv * b * G + g] : g;
            if (place < 0 || place >= KG) continue;
            int64_t at = ((b * G + g) * C + position[b]) * d;
            turned(k_new + (b * KG + place) * d, scratch, k_norm, c, s, d, rot, (float)eps);
            stored(k_cache, at, scratch, d, type);
            stored(v_cache, at, v_new + (b * KG + place) * d, d, type);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < B * H; item++) {
        int64_t b = item / H, h = item % H, n = position[b];
        int64_t place = slot ? slot[own_slot * b * H + h] : h;
        if (place < 0 || place >= SH) continue;
        float *own = scratch + d + item * (d + longest + 17);
        const float *c = cos ? cos + n * rot : NULL, *s = cos ? sin + n * rot : NULL;
        turned(q + (b * SH + place) * d, own, q_norm, c, s, d, rot, (float)eps);
        for (int64_t i = 0; i < d; i++) own[i] *= (float)scaling;
        int64_t begin = window && n - window + 1 > 0 ? n - window + 1 : 0;
        if (first && first[b] > begin) begin = first[b];
        attended(own, k_cache, v_cache, y + (b * SH + place) * d, own + d, (b * G + h / (H / G)) * C,
                 begin, n + 1, d, type, (float)softcap, alibi ? alibi[h] : 0);
    }
    free(scratch);
    return 0;
}
