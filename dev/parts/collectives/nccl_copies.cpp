#include "dev/parts/collectives/copy_engines.h"
#include "trainer/distributed/nccl_communicator.h"

namespace {

// As the trainer gathers: in the communicator's memory, for which NCCL is allowed no CTA.
class NcclCopies final : public CopyGather {
  public:
    NcclCopies(World& world, int64_t most_bytes) : ranks_(nccl_split(world, 0, {.copy_engines = true}, true)), memory_(ranks_->memory(most_bytes)) {
        data_ = static_cast<uint8_t*>(memory_.get());
    }
    const char* name() const override { return "NCCL, zero CTAs"; }
    bool gathers() const override { return true; }
    void run(int64_t bytes, cudaStream_t stream) override { ranks_->all_gather(data_, bytes, stream); }

  private:
    const std::unique_ptr<Communicator> ranks_;
    const std::shared_ptr<void> memory_;
};

}  // namespace

std::unique_ptr<CopyGather> nccl_copy_gather(World& world, int64_t most_bytes, std::string& obstacle) {
    auto copies = std::make_unique<NcclCopies>(world, most_bytes);
    if (copies->data() != nullptr) return copies;
    obstacle = "this NCCL registers no memory";
    return nullptr;
}
