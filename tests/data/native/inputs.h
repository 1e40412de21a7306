/* Random numbers of the harnesses: the same sequence for the same seed. */
#ifndef SWIN_TEST_INPUTS_H
#define SWIN_TEST_INPUTS_H

#include <stdint.h>

static uint64_t random_state;

static void seed_random(uint64_t seed) {
    random_state = seed * 0x9E3779B97F4A7C15u + 1;
}

static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 24);
}

/* A number in 0 … n - 1; 0 if n is smaller. */
static int below(long n) {
    return n <= 1 ? 0 : (int)(random_bits() % (uint64_t)n);
}

#define ONE_OF(...) \
    ((const int[]){__VA_ARGS__}[below((long)(sizeof((const int[]){__VA_ARGS__}) / sizeof(int)))])

#endif
