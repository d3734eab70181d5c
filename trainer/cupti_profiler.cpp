// The GPU's profiler: CUPTI records every kernel, copy and fill; two maps lead from a record to its mark.
//
//   a node of a graph    known by an id, which CUPTI tells when the node is captured (the innermost mark is the node's) and
//                        again when the graph is instantiated (the executable's node is a clone of the captured one)
//   an eager launch      known by the correlation id of the call, at whose entry the innermost mark is noted
#include "trainer/profiler.h"

#include "kernels/common/check.h"

#if __has_include(<cupti.h>)

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "kernels/common/cuda_check.h"

namespace {

template <class Function>
Function* cupti_function(const char* name) {
    static void* const library = [] {
        for (const char* file : {"libcupti.so.13", "libcupti.so.12", "libcupti.so"})
            if (void* handle = dlopen(file, RTLD_NOW)) return handle;
        return static_cast<void*>(nullptr);
    }();
    REQUIRE(library != nullptr, "profiling a GPU needs CUPTI: put the folder of the CUDA Toolkit's libcupti.so on LD_LIBRARY_PATH");
    void* function = dlsym(library, name);
    REQUIRE(function != nullptr, "this CUPTI has no %s", name);
    return reinterpret_cast<Function*>(function);
}
#define CUPTI(name) cupti_function<decltype(name)>(#name)

void cupti_check(CUptiResult status, const char* call) {
    if (status == CUPTI_SUCCESS) return;
    const char* text = nullptr;
    CUPTI(cuptiGetResultString)(status, &text);
    const bool taken = status == CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED;
    throw Error(message("%s: %s%s", call, text ? text : "unknown error", taken ? " (is another profiler attached?)" : ""));
}
#define CUPTI_CHECK(name, ...) cupti_check(CUPTI(name)(__VA_ARGS__), #name)

// "void (anonymous namespace)::f<(int)3>(args)" becomes "f<(int)3>".
std::string short_name(const char* mangled) {
    int status = 0;
    const std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
    std::string name = status == 0 ? demangled.get() : mangled;
    if (name.starts_with("void ")) name = name.substr(5);
    for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
    int depth = 0;
    for (size_t i = 0; i < name.size(); ++i) {  // the argument list opens outside of template brackets
        depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
        if (name[i] == '(' && depth == 0) return name.substr(0, i);
    }
    return name;
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMCPY2, CUPTI_ACTIVITY_KIND_MEMSET};
constexpr CUpti_CallbackDomain kCallDomains[] = {CUPTI_CB_DOMAIN_RUNTIME_API, CUPTI_CB_DOMAIN_DRIVER_API};
constexpr uint32_t kNodeCallbacks[] = {CUPTI_CBID_RESOURCE_GRAPHNODE_CREATED, CUPTI_CBID_RESOURCE_GRAPHNODE_CLONED};

class CuptiProfiler final : public Profiler, public MarkListener {
  public:
    explicit CuptiProfiler(const Peak& peak) : peak_(peak) {
        REQUIRE(active_ == nullptr, "one profiler at a time");
        active_ = this;
        CUPTI_CHECK(cuptiSubscribe, &subscriber_, on_callback, this);
        for (const uint32_t id : kNodeCallbacks) CUPTI_CHECK(cuptiEnableCallback, 1, subscriber_, CUPTI_CB_DOMAIN_RESOURCE, id);
        for (const CUpti_CallbackDomain domain : kCallDomains) CUPTI_CHECK(cuptiEnableDomain, 1, subscriber_, domain);
        CUPTI_CHECK(cuptiActivityRegisterCallbacks, give_buffer, take_buffer);
        for (const CUpti_ActivityKind kind : kKinds) CUPTI_CHECK(cuptiActivityEnable, kind);
        Mark::listen(this);
    }
    ~CuptiProfiler() override {
        Mark::listen(nullptr);
        for (const CUpti_ActivityKind kind : kKinds) CUPTI(cuptiActivityDisable)(kind);
        CUPTI(cuptiUnsubscribe)(subscriber_);
        active_ = nullptr;
    }

    void enter(const MarkInfo& mark) override {
        const std::lock_guard lock(mutex_);
        marks_.enter(mark);
    }
    void leave() override {
        const std::lock_guard lock(mutex_);
        marks_.leave();
    }

    void begin() override {
        flush();
        const std::lock_guard lock(mutex_);
        records_.clear();
        entry_of_call_.clear();  // the entries stay: the nodes of graphs go on meaning theirs
    }
    Profile end(int64_t steps) override {
        flush();
        const std::lock_guard lock(mutex_);
        REQUIRE(dropped_ == 0, "the profiler dropped %zu records", dropped_);
        std::vector<ProfileRecord> records;
        for (const Record& r : records_) {
            if (const auto call = entry_of_call_.find(r.correlation); r.node == 0 && call != entry_of_call_.end()) marks_.count_kernel(call->second);
        }
        for (const Record& r : records_) {
            const int entry = entry_of(r);
            // Copy engines' collectives are copies: all that is enqueued on the communication stream counts. Sums of what arrived are
            // kernels of the compute stream, and count as compute.
            const bool for_ranks = marks_.phase(entry) == "communication";
            records.push_back({r.name, entry, r.start_ns, r.end_ns, marks_.ideal_s(entry, peak_), for_ranks ? Work::communication : r.work, r.stream});
        }
        return summarize(std::move(records), marks_, double(steps));
    }

  private:
    struct Record {
        std::string name;
        uint64_t start_ns, end_ns, node;
        uint32_t correlation;
        Work work;
        uint32_t stream;
    };

    int entry_of(const Record& r) const {
        const auto find = [](const auto& map, auto key) { const auto at = map.find(key); return at == map.end() ? MarkLog::kNone : at->second; };
        return r.node != 0 ? find(entry_of_node_, r.node) : find(entry_of_call_, r.correlation);
    }

    static void flush() {
        CUDA_CHECK(cudaDeviceSynchronize());
        CUPTI_CHECK(cuptiActivityFlushAll, CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    }

    // Callbacks must not throw: what fails there leaves a record without a mark.
    static void CUPTIAPI on_callback(void* self, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void* data) {
        auto& profiler = *static_cast<CuptiProfiler*>(self);
        const std::lock_guard lock(profiler.mutex_);
        if (domain == CUPTI_CB_DOMAIN_RESOURCE) return profiler.on_node(id, *static_cast<const CUpti_GraphData*>(static_cast<const CUpti_ResourceData*>(data)->resourceDescriptor));
        const auto& call = *static_cast<const CUpti_CallbackData*>(data);
        if (call.callbackSite == CUPTI_API_ENTER) profiler.entry_of_call_.insert_or_assign(call.correlationId, profiler.marks_.current());
    }
    void on_node(CUpti_CallbackId id, const CUpti_GraphData& graph) {
        const auto id_of = [](CUgraphNode node) { uint64_t value = 0; CUPTI(cuptiGetGraphNodeId)(node, &value); return value; };
        const uint64_t node = id_of(graph.node);
        if (id == CUPTI_CBID_RESOURCE_GRAPHNODE_CLONED) {
            if (const auto original = entry_of_node_.find(id_of(graph.originalNode)); original != entry_of_node_.end()) entry_of_node_[node] = original->second;
            return;
        }
        const bool is_work = graph.nodeType == CU_GRAPH_NODE_TYPE_KERNEL || graph.nodeType == CU_GRAPH_NODE_TYPE_MEMCPY || graph.nodeType == CU_GRAPH_NODE_TYPE_MEMSET;
        if (!is_work) return;
        entry_of_node_[node] = marks_.current();
        marks_.count_kernel(marks_.current());
    }

    static void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
        *size = size_t(8) << 20;
        *max_records = 0;  // as many as fit
        *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
    }
    static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t valid) {
        if (active_ != nullptr) active_->read_buffer(context, stream, buffer, valid);
        std::free(buffer);
    }
    void read_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t valid) {
        const std::lock_guard lock(mutex_);
        CUpti_Activity* record = nullptr;
        while (valid > 0 && CUPTI(cuptiActivityGetNextRecord)(buffer, valid, &record) == CUPTI_SUCCESS) keep(record);
        size_t dropped = 0;
        if (CUPTI(cuptiActivityGetNumDroppedRecords)(context, stream, &dropped) == CUPTI_SUCCESS) dropped_ += dropped;
    }
    void keep(const CUpti_Activity* record) {
        const auto add = [&](const auto* r, std::string name, Work work) { records_.push_back({std::move(name), r->start, r->end, r->graphNodeId, r->correlationId, work, r->streamId}); };
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const auto* r = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
            const std::string name = short_name(r->name);
            add(r, name, work_of_kernel(name));
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto* r = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
            const bool to_device = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD, to_host = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH;
            const bool to_peer = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_PTOP;  // collectives of copy engines
            add(r, to_device ? "copy, host to device" : to_host ? "copy, device to host" : to_peer ? "copy, device to device" : "copy",
                to_peer ? Work::communication : Work::other);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY2) {
            add(reinterpret_cast<const CUpti_ActivityMemcpyPtoP4*>(record), "copy between GPUs", Work::communication);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            add(reinterpret_cast<const CUpti_ActivityMemset4*>(record), "fill", Work::other);
        }
    }

    // CUPTI's buffer callbacks carry no pointer of ours.
    static inline CuptiProfiler* active_ = nullptr;

    const Peak peak_;
    CUpti_SubscriberHandle subscriber_ = nullptr;
    std::mutex mutex_;  // CUPTI delivers buffers on a thread of its own
    MarkLog marks_;
    std::vector<Record> records_;
    size_t dropped_ = 0;
    std::unordered_map<uint64_t, int> entry_of_node_;
    std::unordered_map<uint32_t, int> entry_of_call_;
};

}  // namespace

std::unique_ptr<Profiler> make_gpu_profiler(const Peak& peak) { return std::make_unique<CuptiProfiler>(peak); }

#else

std::unique_ptr<Profiler> make_gpu_profiler(const Peak&) {
    throw Error("profiling a GPU needs CUPTI, whose headers were not there when this program was built");
}

#endif
