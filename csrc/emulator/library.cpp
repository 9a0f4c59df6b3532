// The C interface of csrc/sm90/host.cu on the emulated machine: the same structs, tensor maps and order of launches,
// with tensors in host memory. So tests run the whole backend, from torch's tensors to its results, without a GPU.
#include <algorithm>
#include <cstdio>

#include "backward_case.h"
#include "decode_case.h"
#include "forward_case.h"

namespace fa::emu {

// The first linked kernel of such a pass that holds the problem.
template <class Instance, class Accept>
static Instance const* find(std::vector<Instance> const& instances, int64 dtype, int64 d_qk, int64 d_v, bool softcap,
                            Accept accept) {
  auto const found = std::find_if(instances.begin(), instances.end(), [&](Instance const& x) {
    return x.shape.is_half == (dtype == kFloat16) && d_qk <= x.shape.d_qk && d_v <= x.shape.d_v &&
           softcap <= x.shape.has_softcap && accept(x);
  });
  return found == instances.end() ? nullptr : &*found;
}

static std::string run(ForwardParams const& p) {
  auto const* x = find(forward_instances(), p.dtype, p.head_dim_qk, p.head_dim_v, p.has_softcap != 0,
                       [&](ForwardInstance const& one) {
                         return p.has_band <= one.shape.has_band && one.shape.has_terms == (p.numbers.has_terms != 0);
                       });
  if (!x) return "no kernel holds these head dims";
  sm90::ForwardArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, x->shape.block_m, x->shape.block_n, args)) return wrong;
  Report report;
  if (int64 const blocks = p.numbers.has_terms ? sm90::prepare_blocks(p) : 0) {
    run_grid(sm90::kPrepareThreads, blocks, 7, [&] { x->prepare(p); }, report);
  }
  if (report.error.empty()) run_grid(x->threads, p.blocks ? p.blocks : 2, 1, [&] { x->kernel(args); }, report);
  return report.error;
}

static std::string run_kernel(BackwardInstance const& x, BackwardParams const& p) {
  sm90::BackwardArgs args;
  args.p = p;
  if (char const* wrong = make_backward_maps(p, x.shape.block_m, x.shape.block_n, args)) return wrong;
  Report report;
  run_grid(x.threads, x.tiles(p), 2, [&] { x.kernel(args); }, report);
  x.run_after(p, 3, report);
  return report.error;
}

static std::string run(BackwardParams const& p) {
  auto const kernel_for = [&](bool of_queries, bool is_fused) {
    return find(backward_instances(), p.dtype, p.head_dim_qk, p.head_dim_v, p.has_softcap != 0,
                [=](BackwardInstance const& x) {
                  bool const has_terms = p.numbers.has_terms != 0;
                  return x.of_queries == of_queries && x.is_fused == is_fused && x.shape.has_terms == has_terms;
                });
  };
  BackwardInstance const *keys = kernel_for(false, p.dq_sums != nullptr), *queries = kernel_for(true, false);
  if (!keys || !queries) return "no kernel holds these head dims";
  if (p.sum_columns != (p.dq_sums ? keys->shape.d_qk : 0)) return "dq_sums is made for another kernel";
  Report report;
  int64 const row_tiles = sm90::tile_count<kPaddedRows, sm90::Of::kQueries>(p);
  run_grid(keys->row_threads, row_tiles, 4, [&] { keys->prepare(p); }, report);
  if (report.error.empty() && p.dsinks) {
    run_grid(keys->row_threads, p.batch * p.heads_q, 5, [&] { keys->sinks(p); }, report);
  }
  if (int64 const blocks = p.numbers.has_terms && report.error.empty() ? sm90::prepare_blocks(p) : 0) {
    run_grid(sm90::kPrepareThreads, blocks, 8, [&] { keys->prepare_keys(p); }, report);
  }
  std::string wrong = report.error;
  if (wrong.empty() && p.dk) wrong = run_kernel(*keys, p);
  if (wrong.empty() && p.dq && !p.dq_sums) wrong = run_kernel(*queries, p);
  return wrong;
}

static std::string run(DecodeParams const& p) {
  bool const has_softcap = p.has_softcap != 0;
  auto const* x =
      find(decode_instances(), p.dtype, p.head_dim_qk, p.head_dim_v, has_softcap, [&](DecodeInstance const& one) {
        if (one.shape.is_gathered != p.is_gathered || one.shape.is_e4m3 != p.is_e4m3) return false;
        return one.shape.is_gathered || one.shape.has_softcap == has_softcap;
      });
  Report report;
  return x ? run_decode(*x, p, 6, report) : "no kernel holds these head dims";
}

template <class Params>
static int answer(Params const* params, int64 version, char* error, long long error_bytes) {
  std::string wrong;
  trust_kernels();
  if (params->version != version) {
    wrong = "the caller was written for another version of this library";
  } else if (params->batch > 0 && params->seqlen_q > 0) {
    wrong = run(*params);
  }
  std::snprintf(error, static_cast<size_t>(error_bytes), "%s", wrong.c_str());
  return !wrong.empty();
}

}  // namespace fa::emu

extern "C" {
long long fa_forward_version() { return fa::kForwardVersion; }
long long fa_forward_bytes() { return sizeof(fa::ForwardParams); }
long long fa_backward_version() { return fa::kBackwardVersion; }
long long fa_backward_bytes() { return sizeof(fa::BackwardParams); }
long long fa_decode_version() { return fa::kDecodeVersion; }
long long fa_decode_bytes() { return sizeof(fa::DecodeParams); }
long long fa_cuda_version() { return 0; }  // it needs no driver
int fa_forward(fa::ForwardParams const* params, char* error, long long error_bytes) {
  return fa::emu::answer(params, fa::kForwardVersion, error, error_bytes);
}
int fa_backward(fa::BackwardParams const* params, char* error, long long error_bytes) {
  return fa::emu::answer(params, fa::kBackwardVersion, error, error_bytes);
}
int fa_decode(fa::DecodeParams const* params, char* error, long long error_bytes) {
  return fa::emu::answer(params, fa::kDecodeVersion, error, error_bytes);
}
}
