#include "trainer/distributed/nccl_communicator.h"

#include "trainer/distributed/world.h"

#ifndef TRAIN_GPT_NCCL

std::string nccl_obstacle() { return "built without NCCL: install nccl.h and build again"; }
std::string nccl_version() { return ""; }
std::unique_ptr<Communicator> nccl_split(World&, int, const NcclOptions&, bool) { throw Error(nccl_obstacle()); }

#else

#include <dlfcn.h>
#include <nccl.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <type_traits>
#include <vector>

// Memory registered as a window, and gathers by copy engines.
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
#define TRAIN_GPT_NCCL_WINDOWS
#endif

namespace {

// The functions used, by name; their types are the header's.
struct Nccl {
    decltype(&ncclGetVersion) get_version;
    decltype(&ncclGetUniqueId) get_unique_id;
    decltype(&ncclCommInitRankConfig) init;
    decltype(&ncclCommDestroy) destroy;
    decltype(&ncclAllReduce) all_reduce;
    decltype(&ncclReduceScatter) reduce_scatter;
    decltype(&ncclAllGather) all_gather;
    decltype(&ncclBroadcast) broadcast;
    decltype(&ncclSend) send;
    decltype(&ncclRecv) receive;
    decltype(&ncclGroupStart) group_start;
    decltype(&ncclGroupEnd) group_end;
    decltype(&ncclGetErrorString) error_string;
    decltype(&ncclGetLastError) last_error;
    std::string obstacle;
#ifdef TRAIN_GPT_NCCL_WINDOWS
    decltype(&ncclMemAlloc) allocate;
    decltype(&ncclMemFree) free;
    decltype(&ncclCommWindowRegister) register_window;
    decltype(&ncclCommWindowDeregister) deregister_window;
    decltype(&ncclAlltoAll) all_to_all;
#endif

    Nccl() {
        void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            obstacle = dlerror();
            return;
        }
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (!function) obstacle = std::string("libnccl.so.2 has no ") + name;
        };
        find(get_version, "ncclGetVersion"), find(get_unique_id, "ncclGetUniqueId"), find(init, "ncclCommInitRankConfig");
        find(destroy, "ncclCommDestroy"), find(all_reduce, "ncclAllReduce"), find(reduce_scatter, "ncclReduceScatter");
        find(all_gather, "ncclAllGather"), find(broadcast, "ncclBroadcast"), find(error_string, "ncclGetErrorString");
        find(last_error, "ncclGetLastError"), find(send, "ncclSend"), find(receive, "ncclRecv");
        find(group_start, "ncclGroupStart"), find(group_end, "ncclGroupEnd");
#ifdef TRAIN_GPT_NCCL_WINDOWS
        find(allocate, "ncclMemAlloc"), find(free, "ncclMemFree");
        find(register_window, "ncclCommWindowRegister"), find(deregister_window, "ncclCommWindowDeregister");
        find(all_to_all, "ncclAlltoAll");
#endif
    }
};

const Nccl& nccl() {
    static const Nccl loaded;  // a library is loaded once a process
    return loaded;
}

void nccl_check(ncclResult_t status, const char* what) {
    REQUIRE(status == ncclSuccess, "%s failed: %s: %s", what, nccl().error_string(status), nccl().last_error(nullptr));
}
#define NCCL_CHECK(call) nccl_check(nccl().call, "NCCL: " #call)

ncclDataType_t type_of(Element e) { return e == Element::f32 ? ncclFloat32 : e == Element::bf16 ? ncclBfloat16 : ncclUint32; }

// What tells machines apart; the names of two may be equal.
std::string machine() {
    char name[256] = {};
    gethostname(name, sizeof name - 1);
    std::ifstream boot("/proc/sys/kernel/random/boot_id");
    std::string id;
    std::getline(boot, id);
    return std::string(name) + " " + id;
}

bool on_one_machine(Communicator& host) {
    constexpr size_t kBytes = 320;
    std::vector<char> all(kBytes * size_t(host.size()));
    std::strncpy(all.data() + kBytes * size_t(host.rank()), machine().c_str(), kBytes - 1);
    host.all_gather(all.data(), kBytes);
    for (int r = 1; r < host.size(); ++r)
        if (std::memcmp(all.data(), all.data() + kBytes * size_t(r), kBytes) != 0) return false;
    return true;
}

class NcclCommunicator final : public Communicator {
  public:
    NcclCommunicator(int rank, int size, const ncclUniqueId& id, const NcclOptions& options) : Communicator(rank, size, true) {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        if (options.most_ctas > 0) config.maxCTAs = options.most_ctas;
#ifdef TRAIN_GPT_NCCL_WINDOWS
        copies_ = options.copy_engines && size > 1;
        if (copies_) config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
#endif
        NCCL_CHECK(init(&communicator_, size, id, rank, &config));
    }
    ~NcclCommunicator() override {
        if (communicator_) nccl().destroy(communicator_);
    }

    bool copies() const override { return copies_; }

  private:
#ifdef TRAIN_GPT_NCCL_WINDOWS
    // One window, in which a buffer lies at the same place on every rank: what copy engines need.
    std::shared_ptr<void> do_memory(int64_t bytes) override {
        if (!copies_) return nullptr;
        void* memory = nullptr;
        NCCL_CHECK(allocate(&memory, size_t(bytes)));
        ncclWindow_t window = nullptr;
        NCCL_CHECK(register_window(communicator_, memory, size_t(bytes), &window, NCCL_WIN_COLL_SYMMETRIC));
        copies_ = window != nullptr;
        return {memory, [window, communicator = communicator_](void* p) {
                    if (window) nccl().deregister_window(communicator, window);
                    nccl().free(p);
                }};
    }
#endif
    void do_all_reduce(void* data, int64_t count, Element element, Reduction reduction, CUstream_st* stream) override {
        NCCL_CHECK(all_reduce(data, data, size_t(count), type_of(element), reduction == Reduction::sum ? ncclSum : ncclMax, communicator_, stream));
    }
    void do_reduce_scatter(void* data, int64_t count, Element element, CUstream_st* stream) override {
        char* mine = static_cast<char*>(data) + count * bytes_of(element) * rank();
        NCCL_CHECK(reduce_scatter(data, mine, size_t(count), type_of(element), ncclSum, communicator_, stream));
    }
    void do_all_gather(void* data, int64_t bytes, CUstream_st* stream) override {
        NCCL_CHECK(all_gather(static_cast<char*>(data) + bytes * rank(), data, size_t(bytes), ncclUint8, communicator_, stream));
    }
    void do_all_to_all(const void* from, void* to, int64_t bytes, CUstream_st* stream) override {
#ifdef TRAIN_GPT_NCCL_WINDOWS
        NCCL_CHECK(all_to_all(from, to, size_t(bytes), ncclUint8, communicator_, stream));
#else
        NCCL_CHECK(group_start());
        for (int r = 0; r < size(); ++r) {
            NCCL_CHECK(send(static_cast<const char*>(from) + bytes * r, size_t(bytes), ncclUint8, r, communicator_, stream));
            NCCL_CHECK(receive(static_cast<char*>(to) + bytes * r, size_t(bytes), ncclUint8, r, communicator_, stream));
        }
        NCCL_CHECK(group_end());
#endif
    }
    void do_broadcast(void* data, int64_t bytes, int root, CUstream_st* stream) override {
        NCCL_CHECK(broadcast(data, data, size_t(bytes), ncclUint8, root, communicator_, stream));
    }

    ncclComm_t communicator_ = nullptr;
    bool copies_ = false;
};

}  // namespace

std::string nccl_obstacle() { return nccl().obstacle; }

std::string nccl_version() {
    int version = 0;
    if (!nccl_obstacle().empty() || nccl().get_version(&version) != ncclSuccess) return "";
    return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
}

std::unique_ptr<Communicator> nccl_split(World& world, int color, const NcclOptions& options, bool of_one_too) {
    REQUIRE(nccl_obstacle().empty(), "several GPUs need NCCL: %s", nccl_obstacle().c_str());
    const std::unique_ptr<Communicator> group = world.split(color);
    if (group->size() == 1 && !of_one_too) return std::make_unique<SingleCommunicator>();
    ncclUniqueId id{};
    if (group->rank() == 0) NCCL_CHECK(get_unique_id(&id));
    group->broadcast(&id, sizeof id, 0);
    const bool near = on_one_machine(*group);
    const Watch::Waiting waiting(world.watch(), "NCCL's start");
    return std::make_unique<NcclCommunicator>(group->rank(), group->size(), id, NcclOptions{.most_ctas = options.most_ctas, .copy_engines = options.copy_engines && near});
}

#endif
