// CPU kernels of dspark.ops, registered: matrix products at the speed of memory, attention over pages, whole decoders,
// the sequential head and the rejection rule.
//
// Every row's result is the same bits however many rows share the call: each output has one accumulator that runs over
// the inner dimension in order, and no split depends on the number of rows or threads.
// T rows, N outputs, K inputs, L = 16 lanes.

#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include "attention.h"
#include "calibrated.h"
#include "chain.h"
#include "decoder.h"
#include "drafting.h"
#include "products.h"
#include "race.h"
#include "sampling.h"
#include "truncation.h"
#include "verdict.h"
#include "walk.h"

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor w, Tensor? b, int n) -> Tensor");
  library.def("linear2(Tensor x, Tensor w0, Tensor? b0, int n0, Tensor w1, Tensor? b1, int n1) -> (Tensor, Tensor)");
  library.def(
      "linear3(Tensor x, Tensor w0, Tensor? b0, int n0, Tensor w1, Tensor? b1, int n1, Tensor w2, Tensor? b2, int n2) "
      "-> (Tensor, Tensor, Tensor)");
  library.def("store(Tensor k, Tensor v, Tensor(a!) pool_k, Tensor(b!) pool_v, Tensor slots) -> ()");
  library.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor pool_k, Tensor pool_v, Tensor table, Tensor cu, "
      "Tensor context, int page_size, float scale, bool causal, int window, float softcap) -> Tensor");
  library.def(
      "draft_chain(Tensor base, Tensor w1, Tensor w2, Tensor anchor, Tensor knobs, Tensor uniform, Tensor? key, "
      "int top, Tensor confidence_base, Tensor confidence_w, Tensor? packed) -> (Tensor, Tensor, Tensor)");
  library.def(
      "decoder(Tensor token, Tensor position, Tensor slot, Tensor table, Tensor cu, Tensor context, Tensor rows, "
      "Tensor constants, int[] taps) -> (Tensor, Tensor)");
  library.def(
      "draft_context(Tensor taps, Tensor position, Tensor slot, Tensor fc, Tensor norm, Tensor constants) -> ()");
  library.def(
      "draft_block(Tensor anchor, Tensor position, Tensor table, int width, int mask, Tensor constants) "
      "-> (Tensor, Tensor)");
  library.def(
      "draft_round(Tensor[] pending, Tensor fc, Tensor context_norm, Tensor anchor, Tensor position, Tensor table, "
      "int mask, Tensor w1, Tensor packed, Tensor knobs, Tensor uniform, Tensor? key, Tensor seen, "
      "Tensor constants) -> (Tensor, Tensor, Tensor)");
  library.def("uniforms(int[] seeds, int[] counters, int[] offsets, int[] streams) -> Tensor");
  library.def("race_keys(int[] seeds, int[] counters, int[] raced, int width, int stream) -> Tensor");
  library.def("exponentials(Tensor key, int vocabulary) -> Tensor");
  library.def("draw_slot(Tensor logits, Tensor knobs, Tensor uniform, Tensor? key) -> (Tensor, Tensor)");
  library.def("nucleus(Tensor probability, Tensor top_p) -> Tensor");
  library.def(
      "verdict(Tensor logits, int[] plan, Tensor token, Tensor q, Tensor knobs, Tensor accept, Tensor final_u, "
      "Tensor? key) -> (Tensor, Tensor)");
  library.def(
      "calibrated(Tensor raw, int[] place, Tensor first, Tensor then, int[] curved, Tensor[] curves, float least) -> "
      "(Tensor, Tensor)");
  library.def(
      "walk(Tensor value, Tensor ahead, Tensor seconds, int[] limit, int[] asked, float committed, float? rate) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(dspark, CompositeExplicitAutograd, library) {
  library.impl("uniforms", uniforms);
  library.impl("race_keys", race_keys);
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) {
  library.impl("pack", pack);
  library.impl("linear", linear);
  library.impl("linear2", linear2);
  library.impl("linear3", linear3);
  library.impl("store", store);
  library.impl("ragged_attention", ragged_attention);
  library.impl("draft_chain", draft_chain);
  library.impl("decoder", decoder);
  library.impl("draft_context", draft_context);
  library.impl("draft_block", draft_block);
  library.impl("draft_round", draft_round);
  library.impl("nucleus", nucleus);
  library.impl("exponentials", exponentials);
  library.impl("draw_slot", draw_slot);
  library.impl("verdict", verdict);
  library.impl("calibrated", calibrated);
  library.impl("walk", walk);
}

// ---- the same ops as plain C functions, which compiled graphs call without the dispatcher ---------------------------

namespace {
const Tensor& get(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }
Bias maybe(AtenTensorHandle* handle) { return handle ? Bias(get(*handle)) : std::nullopt; }
AtenTensorHandle give(Tensor&& tensor) { return torch::aot_inductor::new_tensor_handle(std::move(tensor)); }
}  // namespace

extern "C" {
using H = AtenTensorHandle;

void dspark_serial_glue(int on) {
  if (on && !kept_threads) {
    kept_threads = at::get_num_threads();
    omp_set_num_threads(1);
  } else if (!on && kept_threads) {
    omp_set_num_threads(kept_threads);
    kept_threads = 0;
  }
}

// For tests: a region's fate is told, and for how many more the calling thread works alone.
void dspark_crowd_tell(int64_t threads, int64_t took, int64_t waited) { crowd.tell(threads, took, waited); }
int64_t dspark_crowd_alone() { return crowd.alone(); }

AOTITorchError aoti_torch_cpu_linear(H x, H w, H* b, int64_t n, H* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *out = give(linear(get(x), get(w), maybe(b), n)); });
}

AOTITorchError aoti_torch_cpu_linear2(H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H* out0, H* out1) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [y0, y1] = linear2(get(x), get(w0), maybe(b0), n0, get(w1), maybe(b1), n1);
    *out0 = give(std::move(y0));
    *out1 = give(std::move(y1));
  });
}

AOTITorchError aoti_torch_cpu_linear3(H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H w2, H* b2, int64_t n2,
                                      H* out0, H* out1, H* out2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [y0, y1, y2] = linear3(get(x), get(w0), maybe(b0), n0, get(w1), maybe(b1), n1, get(w2), maybe(b2), n2);
    *out0 = give(std::move(y0));
    *out1 = give(std::move(y1));
    *out2 = give(std::move(y2));
  });
}

AOTITorchError aoti_torch_cpu_store(H k, H v, H pool_k, H pool_v, H slots, H*) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ store(get(k), get(v), get(pool_k), get(pool_v), get(slots)); });
}

AOTITorchError aoti_torch_cpu_ragged_attention(H q, H k, H v, H pool_k, H pool_v, H table, H cu, H context,
                                               int64_t page_size, double scale, int32_t causal, int64_t window,
                                               double softcap, H* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = give(ragged_attention(get(q), get(k), get(v), get(pool_k), get(pool_v), get(table), get(cu), get(context),
                                 page_size, scale, causal, window, softcap));
  });
}
}
