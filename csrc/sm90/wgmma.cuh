// wgmma in inline PTX: one overload of wgmma_ss, wgmma_rs and wgmma_wait for each accumulator size.
//
//   wgmma_ss<TRANSPOSE_A, TRANSPOSE_B>(T{}, d, a, b, accumulate)      d[64, N] (+)= A[64, 16] B[16, N], A in shared
// memory
//   wgmma_rs<TRANSPOSE_B>(T{}, d, a0, a1, a2, a3, b, accumulate)      A in registers
//   wgmma_wait<GROUPS>(d)                                             at most GROUPS committed groups left in flight
//
// The syntax is the PTX ISA's. An instruction names each of its N / 2 accumulator registers, so the macros below
// write the lists "%0,%1,..." and "+f"(d[0]),... in steps of 8 registers. Operands a and b are the low words of
// descriptors (ptx.cuh); their high word is the same everywhere: 1024 bytes between groups of 8 rows, 128-byte swizzle.
#pragma once

namespace fa::sm90 {

struct Bf16 {};
struct F16 {};

#define FA_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FA_DLIST1(d) FA_D8(d, 0)
#define FA_DLIST2(d) FA_DLIST1(d), FA_D8(d, 8)
#define FA_DLIST3(d) FA_DLIST2(d), FA_D8(d, 16)
#define FA_DLIST4(d) FA_DLIST3(d), FA_D8(d, 24)
#define FA_DLIST5(d) FA_DLIST4(d), FA_D8(d, 32)
#define FA_DLIST6(d) FA_DLIST5(d), FA_D8(d, 40)
#define FA_DLIST7(d) FA_DLIST6(d), FA_D8(d, 48)
#define FA_DLIST8(d) FA_DLIST7(d), FA_D8(d, 56)
#define FA_DLIST9(d) FA_DLIST8(d), FA_D8(d, 64)
#define FA_DLIST10(d) FA_DLIST9(d), FA_D8(d, 72)
#define FA_DLIST11(d) FA_DLIST10(d), FA_D8(d, 80)
#define FA_DLIST12(d) FA_DLIST11(d), FA_D8(d, 88)
#define FA_DLIST13(d) FA_DLIST12(d), FA_D8(d, 96)
#define FA_DLIST14(d) FA_DLIST13(d), FA_D8(d, 104)
#define FA_DLIST15(d) FA_DLIST14(d), FA_D8(d, 112)
#define FA_DLIST16(d) FA_DLIST15(d), FA_D8(d, 120)

#define FA_NAMES1 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FA_NAMES2 FA_NAMES1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FA_NAMES3 FA_NAMES2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define FA_NAMES4 FA_NAMES3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define FA_NAMES5 FA_NAMES4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define FA_NAMES6 FA_NAMES5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define FA_NAMES7 FA_NAMES6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define FA_NAMES8 FA_NAMES7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define FA_NAMES9 FA_NAMES8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define FA_NAMES10 FA_NAMES9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define FA_NAMES11 FA_NAMES10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define FA_NAMES12 FA_NAMES11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define FA_NAMES13 FA_NAMES12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define FA_NAMES14 FA_NAMES13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define FA_NAMES15 FA_NAMES14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define FA_NAMES16 FA_NAMES15 ",%120,%121,%122,%123,%124,%125,%126,%127"

// One shape for one type. EIGHTS = N / 16; I0 .. I6 number the operands after the N / 2 accumulator registers.
#define FA_WGMMA_TYPE(N, EIGHTS, TYPE, PTX_TYPE, I0, I1, I2, I3, I4, I5, I6) \
  template <int TRANSPOSE_A, int TRANSPOSE_B> \
  FA_DEVICE void wgmma_ss(TYPE, float (&d)[N / 2], uint32 a, uint32 b, int accumulate) { \
    asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %" #I2 \
                 ", 0;" \
                 " mov.b64 a, {%" #I0 ", " FA_DESCRIPTOR_HIGH "}; mov.b64 b, {%" #I1 ", " FA_DESCRIPTOR_HIGH \
                 "};" \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" FA_NAMES##EIGHTS \
                 "}, a, b, p, 1, 1, %" #I3 ", %" #I4 ";}" \
                 : FA_DLIST##EIGHTS(d) \
                 : "r"(a), "r"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B)); \
  } \
  template <int TRANSPOSE_B> \
  FA_DEVICE void wgmma_rs(TYPE, float (&d)[N / 2], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b, \
                          int accumulate) { \
    asm volatile("{.reg .pred p; .reg .b64 b; setp.ne.b32 p, %" #I5 \
                 ", 0;" \
                 " mov.b64 b, {%" #I4 ", " FA_DESCRIPTOR_HIGH \
                 "};" \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" FA_NAMES##EIGHTS \
                 "}, {%" #I0 ",%" #I1 ",%" #I2 ",%" #I3 "}, b, p, 1, 1, %" #I6 ";}" \
                 : FA_DLIST##EIGHTS(d) \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "r"(accumulate), "n"(TRANSPOSE_B)); \
  }

// The wait names the accumulator, so that no use of it can be moved above.
#define FA_WGMMA(N, EIGHTS, I0, I1, I2, I3, I4, I5, I6) \
  FA_WGMMA_TYPE(N, EIGHTS, Bf16, "bf16", I0, I1, I2, I3, I4, I5, I6) \
  FA_WGMMA_TYPE(N, EIGHTS, F16, "f16", I0, I1, I2, I3, I4, I5, I6) \
  template <int GROUPS> \
  FA_DEVICE void wgmma_wait(float (&d)[N / 2]) { \
    asm volatile("wgmma.wait_group.sync.aligned %" #I0 ";" : FA_DLIST##EIGHTS(d) : "n"(GROUPS) : "memory"); \
  }

FA_WGMMA(32, 2, 16, 17, 18, 19, 20, 21, 22)
FA_WGMMA(64, 4, 32, 33, 34, 35, 36, 37, 38)
FA_WGMMA(80, 5, 40, 41, 42, 43, 44, 45, 46)
FA_WGMMA(96, 6, 48, 49, 50, 51, 52, 53, 54)
FA_WGMMA(112, 7, 56, 57, 58, 59, 60, 61, 62)
FA_WGMMA(128, 8, 64, 65, 66, 67, 68, 69, 70)
FA_WGMMA(144, 9, 72, 73, 74, 75, 76, 77, 78)
FA_WGMMA(160, 10, 80, 81, 82, 83, 84, 85, 86)
FA_WGMMA(176, 11, 88, 89, 90, 91, 92, 93, 94)
FA_WGMMA(192, 12, 96, 97, 98, 99, 100, 101, 102)
FA_WGMMA(256, 16, 128, 129, 130, 131, 132, 133, 134)

}  // namespace fa::sm90
