// checkpoint.json beside good tensors: whatever it says, loading ends with a checkpoint or one Error.
// With --write-seed=FILE the good one is written there first, and to FILE_older one without checksums: sizes and sums belong to
// the tensors as this program writes them.
#include <filesystem>

#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"
#include "tests/fuzz/micro_model.h"
#include "tests/host/temp_folder.h"
#include "trainer/checkpoint.h"

namespace {

// A folder like a checkpoint's, whose JSON is the fuzzer's.
class CheckpointFolder {
  public:
    CheckpointFolder() : list_(make_parameters(micro_model())) {
        TrainState state{.params = std::vector<float>(static_cast<size_t>(list_.flat_elements), 1.0f), .m = {}, .v = {}};
        path_ = save_checkpoint(folder_ / "run", {.model = micro_model()}, list_, state);
        good_ = read_file(path_ + "/checkpoint.json");
        std::filesystem::remove(path_ + "/checkpoint.json");
        std::filesystem::create_symlink(json_.path(), path_ + "/checkpoint.json");
    }

    const std::string& good() const { return good_; }

    void load(const uint8_t* data, size_t size) {
        json_.assign(data, size);
        try {
            const Checkpoint checkpoint = load_checkpoint(path_, list_, micro_model());
            FUZZ_CHECK(checkpoint.state.params.size() == static_cast<size_t>(list_.flat_elements));
            FUZZ_CHECK(checkpoint.state.step >= 0 && checkpoint.state.adam_t >= 0);
        } catch (const Error&) {
        }
        try {
            verify_checkpoint(path_, CheckpointFiles::all);
        } catch (const Error&) {
        }
        find_latest_intact(folder_ / "run");  // passes over what is damaged, never throws for it
    }

  private:
    TempFolder folder_;
    MemoryFile json_;
    ParameterList list_;
    std::string path_, good_;
};

CheckpointFolder& checkpoint_folder() {
    static CheckpointFolder folder;
    return folder;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::string flag = "--write-seed=";
    for (int i = 1; i < *argc; ++i) {
        const std::string word = (*argv)[i];
        if (!word.starts_with(flag)) continue;
        const std::string& good = checkpoint_folder().good();
        write_file(word.substr(flag.size()), good);
        write_file(word.substr(flag.size()) + "_older", good.substr(0, good.find(",\n  \"checksums\"")) + "\n}");
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    checkpoint_folder().load(data, size);
    return 0;
}
