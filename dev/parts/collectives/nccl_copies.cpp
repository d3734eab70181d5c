#include "dev/parts/collectives/copy_engines.h"
#include "kernels/common/cuda_check.h"

#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

#if defined(NCCL_VERSION_CODE) && NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)

#include <dlfcn.h>

#include <type_traits>

namespace {

struct Library {
    void* handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    std::string missing = handle ? "" : "no libnccl.so.2";

    template <class Function>
    void find(Function& function, const char* name) {
        function = handle ? reinterpret_cast<Function>(dlsym(handle, name)) : nullptr;
        if (handle && !function) missing = std::string("this NCCL has no ") + name;
    }
};

// A communicator that NCCL allows no CTA for gathers of buffers registered as windows, and such a buffer.
class NcclCopies final : public CopyGather {
  public:
    explicit NcclCopies(World& world) : rank_(world.rank()) {
        library_.find(get_unique_id_, "ncclGetUniqueId"), library_.find(init_, "ncclCommInitRankConfig"), library_.find(destroy_, "ncclCommDestroy");
        library_.find(allocate_, "ncclMemAlloc"), library_.find(free_, "ncclMemFree"), library_.find(gather_, "ncclAllGather");
        library_.find(register_, "ncclCommWindowRegister"), library_.find(deregister_, "ncclCommWindowDeregister"), library_.find(error_, "ncclGetErrorString");
    }
    ~NcclCopies() override {
        if (window_) deregister_(communicator_, window_);
        if (communicator_) destroy_(communicator_);
        if (data_) free_(data_);
    }
    const std::string& missing() const { return library_.missing; }

    // "" or what failed.
    std::string start(World& world, int64_t most_bytes) {
        ncclUniqueId id{};
        const std::string no_id = world.all_texts(world.rank() == 0 ? failed(get_unique_id_(&id)) : "")[0];
        if (!no_id.empty()) return no_id;
        world.host().broadcast(&id, sizeof id, 0);
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
        std::string problem = failed(init_(&communicator_, world.size(), id, world.rank(), &config));
        void* memory = nullptr;
        if (problem.empty()) problem = failed(allocate_(&memory, size_t(most_bytes)));
        data_ = static_cast<uint8_t*>(memory);
        if (problem.empty()) problem = failed(register_(communicator_, data_, size_t(most_bytes), &window_, NCCL_WIN_COLL_SYMMETRIC));
        if (problem.empty() && !window_) problem = "NCCL does not register the buffer";
        return problem;
    }

    const char* name() const override { return "NCCL, zero CTAs"; }
    bool gathers() const override { return true; }
    void run(int64_t bytes, cudaStream_t stream) override {
        const ncclResult_t status = gather_(data_ + bytes * rank_, data_, size_t(bytes), ncclUint8, communicator_, stream);
        REQUIRE(status == ncclSuccess, "%s", failed(status).c_str());
    }

  private:
    std::string failed(ncclResult_t status) const { return status == ncclSuccess ? "" : std::string("NCCL: ") + error_(status); }

    int rank_;
    Library library_;
    decltype(&ncclGetUniqueId) get_unique_id_;
    decltype(&ncclCommInitRankConfig) init_;
    decltype(&ncclCommDestroy) destroy_;
    decltype(&ncclMemAlloc) allocate_;
    decltype(&ncclMemFree) free_;
    decltype(&ncclAllGather) gather_;
    decltype(&ncclCommWindowRegister) register_;
    decltype(&ncclCommWindowDeregister) deregister_;
    decltype(&ncclGetErrorString) error_;
    ncclComm_t communicator_ = nullptr;
    ncclWindow_t window_ = nullptr;
};

}  // namespace

std::unique_ptr<CopyGather> nccl_copy_gather(World& world, int64_t most_bytes, std::string& obstacle) {
    auto copies = std::make_unique<NcclCopies>(world);
    obstacle = copies->missing();
    if (obstacle.empty()) obstacle = copies->start(world, most_bytes);
    for (const std::string& text : world.all_texts(obstacle))
        if (obstacle.empty()) obstacle = text;
    if (!obstacle.empty()) copies.reset();
    return copies;
}

#else

std::unique_ptr<CopyGather> nccl_copy_gather(World&, int64_t, std::string& obstacle) {
    obstacle = "built without NCCL 2.28 or later";
    return nullptr;
}

#endif
