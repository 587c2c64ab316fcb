// What XLA calls: the target `eqquant_product`, by the plain C interface of its foreign functions.
#include <algorithm>
#include <atomic>
#include <cstring>
#include "problem.h"
#include "xla/ffi/api/c_api.h"

namespace eqquant {

#define EQQUANT_DECLARE(name) namespace name { extern const Level level; }
EQQUANT_LEVELS(EQQUANT_DECLARE)
#define EQQUANT_ADDRESS(name) &name::level,
static const Level* const levels[] = {EQQUANT_LEVELS(EQQUANT_ADDRESS)};  // the best one first

static const Level* find_level(const char* at_most) {
  bool allowed = at_most == nullptr || !*at_most;
  for (const Level* level : levels) {
    allowed = allowed || !strcmp(level->name, at_most);
    if (allowed && level->runs_here()) return level;
  }
  return nullptr;
}
static std::atomic<const Level*> chosen{nullptr};

// ------------------------------------------------------------------ XLA's own threads
class XlaPool final : public Pool {
 public:
  XlaPool(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context) : api_(api), context_(context) {}

  int64_t threads() const override {
    int64_t count = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, context_, &count};
    return succeeds(api_->XLA_FFI_ThreadPool_NumThreads(&args)) ? count : 1;
  }

  void run(int64_t chunks, void (*f)(void*, int64_t), void* argument) const override {
    const int64_t helpers = chunks > 1 ? std::min(threads(), chunks) - 1 : 0;
    if (helpers == 0) {
      for (int64_t i = 0; i < chunks; i++) f(argument, i);
      return;
    }
    auto* work = new Work{};
    work->chunks = chunks, work->f = f, work->argument = argument;
    for (int64_t t = 0; t < helpers; t++) {
      work->users.fetch_add(1);
      XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, context_, help, work};
      if (!succeeds(api_->XLA_FFI_ThreadPool_Schedule(&args))) work->leave();
    }
    // The caller waits only for chunks that somebody has begun: no deadlock where all threads are busy.
    work->drain();
    while (work->done.load(std::memory_order_acquire) < chunks) pause();
    work->leave();
  }

 private:
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<int> users{1};
    int64_t chunks = 0;
    void (*f)(void*, int64_t) = nullptr;
    void* argument = nullptr;

    void drain() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        f(argument, i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
    void leave() {
      if (users.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
  };
  static void help(void* p) {
    auto* work = static_cast<Work*>(p);
    work->drain();
    work->leave();
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  bool succeeds(XLA_FFI_Error* error) const {
    if (!error) return true;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api_->XLA_FFI_Error_Destroy(&args);
    return false;
  }

  const XLA_FFI_Api* api_;
  XLA_FFI_ExecutionContext* context_;
};

// ------------------------------------------------------------------------ the call
static int64_t attribute(const XLA_FFI_CallFrame* frame, const char* name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan* n = frame->attrs.names[i];
    if (n->len == strlen(name) && !memcmp(n->ptr, name, n->len) && frame->attrs.types[i] == XLA_FFI_AttrType_SCALAR)
      return *static_cast<const int64_t*>(static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i])->value);
  }
  return 0;
}

static const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame* frame, int i) { return *static_cast<const XLA_FFI_Buffer*>(frame->args.args[i]); }

// The matrices of an operand: its last two axes. Those before are mapped over; one of length 1 is the same for all.
struct Stack {
  const XLA_FFI_Buffer& buffer;
  int64_t axes() const { return buffer.rank - 2; }
  int64_t height() const { return buffer.dims[axes()]; }
  int64_t width() const { return buffer.dims[axes() + 1]; }

  // The number of the matrix that belongs to matrix i of a result with these axes.
  int64_t entry(int64_t i, const Stack& result) const {
    int64_t entry = 0, stride = 1;
    for (int64_t axis = axes() - 1; axis >= 0; axis--) {
      const int64_t length = result.buffer.dims[axis], at = i % length;
      i /= length;
      if (buffer.dims[axis] != 1) entry += at * stride, stride *= buffer.dims[axis];
    }
    return entry;
  }
  template <class T> T* matrix(int64_t i) const { return static_cast<T*>(buffer.data) + i * height() * width(); }
};

// Operands: x (..., m, inputs), codes (..., rows, bytes), scales (..., row blocks, blocks), and 16 levels in the last
// axis of the last. Result: y (..., m, outputs).
static void call(const XLA_FFI_CallFrame* frame) {
  const Stack x{argument(frame, 0)}, codes{argument(frame, 1)}, scales{argument(frame, 2)};
  const Stack y{*static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[0])};
  Problem p{};
  p.code = static_cast<Code>(attribute(frame, "code"));
  p.sum_along_rows = attribute(frame, "sum_along_rows");
  p.rounded = attribute(frame, "rounded");
  p.w.rows = codes.height(), p.w.bytes = codes.width(), p.w.down = attribute(frame, "down");
  p.w.height = attribute(frame, "height"), p.w.length = attribute(frame, "length");
  p.w.tile = attribute(frame, "tile"), p.w.stored = attribute(frame, "stored");
  p.w.high_first = attribute(frame, "high_first");
  p.w.row_block = attribute(frame, "row_block"), p.w.block = attribute(frame, "block");
  p.w.levels = static_cast<const float*>(argument(frame, 3).data);
  p.m = x.height();
  const XlaPool pool(frame->api, frame->ctx);
  const Level* level = chosen.load(std::memory_order_acquire);
  int64_t count = 1;
  for (int64_t axis = 0; axis < y.axes(); axis++) count *= y.buffer.dims[axis];
  for (int64_t i = 0; i < count; i++) {
    p.x = x.matrix<float>(x.entry(i, y));
    p.w.codes = codes.matrix<uint8_t>(codes.entry(i, y));
    p.w.scales = scales.matrix<float>(scales.entry(i, y));
    p.y = y.matrix<float>(i);
    level->multiply(p, pool);
  }
}

}  // namespace eqquant

#define EQQUANT_EXPORT extern "C" __attribute__((visibility("default")))

EQQUANT_EXPORT XLA_FFI_Error* eqquant_product(XLA_FFI_CallFrame* frame) {
  // Asked what it is, before there are operands.
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return nullptr;
  }
  eqquant::call(frame);
  return nullptr;
}

// The best level that runs here, at most `at_most` (any, if it is empty): it is used from now on. Its name, or null.
EQQUANT_EXPORT const char* eqquant_use_level(const char* at_most) {
  const eqquant::Level* level = eqquant::find_level(at_most);
  if (level) eqquant::chosen.store(level, std::memory_order_release);
  return level ? level->name : nullptr;
}
