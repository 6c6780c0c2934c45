// Compiles one kernel header once per instruction set. Define FASTSSL_KERNEL as the header's name, include
// this file; the kernel is then in fastssl::cpu::portable, ::avx2 and ::avx512. No include guard: that is the
// point.
//
// All standard headers must come before this file: what they define inline must keep the baseline instruction
// set.

#include "cpu/common.h"

#define FASTSSL_ISA portable
#define FASTSSL_VECTOR_BYTES 16
#define FASTSSL_TILE_ROWS 6
#include "cpu/simd.h"
#include "cpu/gemm.h"
#include FASTSSL_KERNEL
#undef FASTSSL_ISA
#undef FASTSSL_VECTOR_BYTES
#undef FASTSSL_TILE_ROWS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FASTSSL_ISA avx2
#define FASTSSL_VECTOR_BYTES 32
#define FASTSSL_TILE_ROWS 6
#include "cpu/simd.h"
#include "cpu/gemm.h"
#include FASTSSL_KERNEL
#undef FASTSSL_ISA
#undef FASTSSL_VECTOR_BYTES
#undef FASTSSL_TILE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif
#define FASTSSL_ISA avx512
#define FASTSSL_VECTOR_BYTES 64
#define FASTSSL_TILE_ROWS 14
#include "cpu/simd.h"
#include "cpu/gemm.h"
#include FASTSSL_KERNEL
#undef FASTSSL_ISA
#undef FASTSSL_VECTOR_BYTES
#undef FASTSSL_TILE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
