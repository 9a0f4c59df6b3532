// The C interface of decoding (host.cu) on the emulated machine, as a shared library: the tests call it with the structs
// that the package packs, so that both are held against the same cases as every other backend.
#include <cstdio>

#include "decode_case.h"

using namespace fa;
using namespace fa::emu;

static void allow(void const* data, int64 elements, size_t bytes) {
  if (data && elements > 0) allow_global(data, static_cast<size_t>(elements) * bytes);
}

// What the kernels may touch, as far as the struct says how large it is.
static void allow_tensors(DecodeParams const& p) {
  forget_global();
  int64 const rows = sm90::rows_of(p), outputs = rows * p.heads_q;
  int64 const last = (p.cu_seqlens_q ? 0 : (p.batch - 1) * p.q_strides.batch) + (p.seqlen_q - 1) * p.q_strides.row +
                     (p.heads_q - 1) * p.q_strides.head;
  allow(p.q, last + p.head_dim_qk, 2);
  allow(p.out, outputs * p.head_dim_v, 2);
  allow(p.lse, outputs, 4);
  allow(p.partial_out, p.splits * outputs * p.head_dim_v, 4);
  allow(p.partial_lse, p.splits * outputs, 4);
  allow(p.sinks, p.sinks_batch_stride * (p.batch - 1) + p.heads_q, 4);
  allow(p.cache_lengths, p.batch, 4);
  allow(p.block_table, p.batch * p.table_stride, 4);
  allow(p.cu_seqlens_q, p.batch + 1, 4);
}

// 0, or 1 with the reason in `error`.
extern "C" int fa_decode(DecodeParams const* p, char* error, long long error_bytes) {
  for (DecodeInstance const& instance : decode_instances()) {
    Shape const& shape = instance.shape;
    if (shape.is_half != (p->dtype == kFloat16) || shape.has_softcap != (p->has_softcap != 0)) continue;
    if (p->head_dim_qk > shape.d_qk || p->head_dim_v > shape.d_v) continue;
    allow_tensors(*p);
    Report report;
    run_decode(instance, *p, 1, report);
    if (report.error.empty()) return 0;
    return std::snprintf(error, static_cast<size_t>(error_bytes), "%s", report.error.c_str()), 1;
  }
  return std::snprintf(error, static_cast<size_t>(error_bytes), "no kernel holds these head dims"), 1;
}
