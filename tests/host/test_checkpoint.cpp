#include "trainer/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/host/safetensors_values.h"
#include "tests/host/temp_folder.h"
#include "trainer/checksum.h"
#include "trainer/safetensors.h"

namespace {

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// Whole checkpoints

struct TinyRun {
    ModelSpec model = find_model("tiny");
    ParameterList list = make_parameters(model);
    TrainState state = initial_state(list, model, 3);
    CheckpointInfo info{.model = model, .recipe = "tensorwise", .seed = 18446744073709551615u, .tokens_per_step = 4096, .samples_per_epoch = 77,
                        .config_toml = "steps = 5\nout = 'x'\n", .gemm_choices = "{\"a\": \"\\n\"}"};

    TinyRun() {
        std::mt19937 random(5);
        state.m.assign(state.params.size(), 0.0f), state.v = state.m;
        for (const Parameter& p : list.all) {
            for (int64_t i = 0; i < p.count(); ++i) {
                const size_t at = size_t(p.offset + i);
                state.m[at] = float(random()) * 1e-12f - 2e-3f, state.v[at] = float(random()) * 1e-15f;
            }
        }
        // Numbers that a detour over text or arithmetic would lose.
        const size_t at = size_t(list[list.blocks[1].fc2_weight].offset);
        state.params[at] = -0.0f, state.params[at + 1] = 1e-45f, state.m[at] = INFINITY, state.v[at] = NAN;
        state.step = 123, state.adam_t = 121, state.skipped_steps = 2;
    }
    std::string save(const std::string& out, int64_t step) {
        state.step = step;
        return save_checkpoint(out, info, list, state);
    }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}
using Names = std::vector<std::string>;

// Of the files that this process writes, as `ulimit -f`.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(rlim_t bytes) {
        getrlimit(RLIMIT_FSIZE, &before_);
        const rlimit now{.rlim_cur = bytes, .rlim_max = before_.rlim_max};
        setrlimit(RLIMIT_FSIZE, &now);
        handler_ = std::signal(SIGXFSZ, SIG_IGN);
    }
    ~FileSizeLimit() {
        setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, handler_);
    }

  private:
    rlimit before_{};
    void (*handler_)(int) = nullptr;
};

TEST(Checkpoint, RoundTripIsBitExact) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder / "new/out", 123);
    EXPECT_EQ(path, folder / "new/out/step_000123");
    const Checkpoint c = load_checkpoint(path, run.list, run.model);
    EXPECT_TRUE(same_bits(c.state.params, run.state.params));
    EXPECT_TRUE(same_bits(c.state.m, run.state.m));
    EXPECT_TRUE(same_bits(c.state.v, run.state.v));
    EXPECT_EQ(c.state.step, 123);
    EXPECT_EQ(c.state.adam_t, 121);
    EXPECT_EQ(c.state.skipped_steps, 2);
    EXPECT_EQ(c.info.recipe, run.info.recipe);
    EXPECT_EQ(c.info.seed, run.info.seed);
    EXPECT_EQ(c.info.tokens_per_step, 4096);
    EXPECT_EQ(c.info.samples_per_epoch, 77);
    EXPECT_EQ(c.info.config_toml, run.info.config_toml);
    EXPECT_EQ(c.info.gemm_choices, run.info.gemm_choices);
    EXPECT_EQ(c.info.model.name, "tiny");
    EXPECT_EQ(load_checkpoint_info(path).seed, run.info.seed);
    EXPECT_EQ(names_in(path), (Names{"adam.safetensors", "checkpoint.json", "params.safetensors"}));
    EXPECT_EQ(names_in(folder / "new/out"), Names{"step_000123"});
}

TEST(Checkpoint, EmptyMomentsAreZeros) {
    const TempFolder folder;
    TinyRun run;
    run.state.m.clear(), run.state.v.clear();
    const Checkpoint c = load_checkpoint(run.save(folder.path(), 0), run.list, run.model);
    EXPECT_TRUE(same_bits(c.state.params, run.state.params));
    EXPECT_TRUE(same_bits(c.state.m, std::vector<float>(run.state.params.size())));
    EXPECT_TRUE(same_bits(c.state.v, c.state.m));
}

TEST(Checkpoint, FilesHaveHuggingFaceNamesAndLayout) {
    const TempFolder folder;
    TinyRun run;
    const SafetensorsReader reader(run.save(folder.path(), 1) + "/params.safetensors");
    EXPECT_EQ(reader.find("transformer.wte.weight")->shape, (std::vector<int64_t>{257, 64}));
    EXPECT_EQ(reader.find("transformer.h.1.mlp.c_fc.weight")->shape, (std::vector<int64_t>{64, 256}));
    EXPECT_EQ(reader.find("transformer.h.0.attn.c_attn.bias")->shape, (std::vector<int64_t>{192}));
    const Parameter& fc1 = run.list[run.list.blocks[1].fc1_weight];
    EXPECT_EQ(read_all(reader, fc1.name)[2 * 256 + 5], run.state.params[size_t(fc1.offset) + 5 * 64 + 2]);
}

TEST(Checkpoint, PaddingInMemoryDoesNotMatter) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 1);
    ParameterList other = run.list;
    for (Parameter& p : other.all) p.offset += 6400;
    other.flat_elements += 6400;
    const Checkpoint c = load_checkpoint(path, other, run.model);
    EXPECT_TRUE(std::equal(run.state.params.begin(), run.state.params.end(), c.state.params.begin() + 6400));
}

// Saved by any number of ranks, the files are the same bytes; loaded by any number, every rank gets its part of the same.
TEST(Checkpoint, FilesDoNotDependOnTheNumberOfRanks) {
    const TempFolder folder;
    TinyRun run;
    const std::string whole = run.save(folder.path(), 1);
    const TrainState expected = load_checkpoint(whole, run.list, run.model).state;
    for (const auto& [slices, replicas] : {std::pair(1, 1), std::pair(1, 3), std::pair(2, 1), std::pair(3, 1), std::pair(4, 2), std::pair(7, 1), std::pair(16, 1)}) {
        const ParameterList list = make_parameters(run.model, slices);
        const std::string out = folder / message("%d-%d", slices, replicas);
        std::vector<TrainState> states;
        for (int r = 0; r < slices; ++r) states.push_back(load_checkpoint(whole, list, run.model, held_by(list, r, slices)).state);
        begin_checkpoint(out, list, 1);
        WrittenPart written;
        for (int rank = slices * replicas - 1; rank >= 0; --rank)
            written += parse_part(format_part(write_part(out, list, held_by(list, rank % slices, slices),
                                                         {.replica = rank / slices, .replicas = replicas, .rank = rank, .ranks = slices * replicas},
                                                         states[size_t(rank % slices)])));
        const std::string path = complete_checkpoint(out, run.info, list, states[0], written);
        EXPECT_TRUE(verify_checkpoint(path, CheckpointFiles::all));
        for (const char* file : {"/params.safetensors", "/adam.safetensors"}) EXPECT_TRUE(read_file(path + file) == read_file(whole + file)) << slices << " x " << replicas;
        EXPECT_EQ(names_in(out), (Names{"step_000001"}));
        const Checkpoint again = load_checkpoint(path, run.list, run.model);
        for (const auto flat : {&TrainState::params, &TrainState::m, &TrainState::v}) 
            EXPECT_EQ(std::memcmp((again.state.*flat).data(), (expected.*flat).data(), (expected.*flat).size() * sizeof(float)), 0) << slices << " x " << replicas;
        EXPECT_EQ(again.state.adam_t, expected.adam_t);
    }
}

TEST(Checkpoint, MissingPartsAreNoticed) {
    const TempFolder folder;
    TinyRun run;
    const ParameterList list = make_parameters(run.model, 2);
    const Held held = held_by(list, 0, 2);
    const TrainState state = load_checkpoint(run.save(folder.path(), 1), list, run.model, held).state;
    begin_checkpoint(folder.path(), list, 1);
    const WrittenPart part = write_part(folder.path(), list, held, {.replica = 0, .replicas = 1, .rank = 0, .ranks = 2}, state);
    const std::string error = error_of([&] { complete_checkpoint(folder.path(), run.info, list, state, part); });
    EXPECT_NE(error.find("the ranks wrote"), std::string::npos) << error;
    abandon_checkpoint(folder.path(), 1);
    EXPECT_EQ(names_in(folder.path()), (Names{"step_000001"}));
}

TEST(Checkpoint, LatestIsTheCompleteOneSavedLast) {
    const TempFolder folder;
    TinyRun run;
    EXPECT_EQ(find_latest(folder.path()), "");
    EXPECT_EQ(find_latest(folder / "none"), "");
    run.save(folder.path(), 9);
    run.save(folder.path(), 10);
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000010");
    // Resumed from an older one: step 10 now belongs to an abandoned future.
    run.save(folder.path(), 5);
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000005");

    fs::create_directory(folder / "step_000011");
    fs::create_directory(folder / "step_000011x");
    fs::copy(folder / "step_000010", folder / ".step_000012.tmp");
    write_file(folder / "step_13", "");
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000005");
    fs::resize_file(folder / "step_000005/adam.safetensors", 1000);
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000010");
    write_file(folder / "step_000010/checkpoint.json", read_file(folder / "step_000010/checkpoint.json").substr(0, 100));
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000009");
    fs::remove(folder / "step_000009/checkpoint.json");
    EXPECT_EQ(find_latest(folder.path()), "");
}

TEST(Checkpoint, PruningKeepsTheNewestAndForeignFiles) {
    const TempFolder folder;
    TinyRun run;
    for (const int64_t step : {1, 2, 30, 4}) run.save(folder.path(), step);
    write_file(folder / "log.jsonl", "");
    fs::create_directory(folder / "step_000000");  // not complete: not ours to remove
    prune_checkpoints(folder.path(), 0);
    EXPECT_EQ(names_in(folder.path()).size(), 6u);
    prune_checkpoints(folder.path(), 2);
    EXPECT_EQ(names_in(folder.path()), (Names{"log.jsonl", "step_000000", "step_000004", "step_000030"}));
    prune_checkpoints(folder.path(), 5);
    EXPECT_EQ(names_in(folder.path()).size(), 4u);
}

TEST(Checkpoint, SameStepIsReplacedAndLeftoversGo) {
    const TempFolder folder;
    TinyRun run;
    run.save(folder.path(), 7);
    fs::create_directories(folder / ".step_000006.tmp/x");
    fs::create_directories(folder / ".step_000005.deleted");
    fs::create_directories(folder / ".step_notes");
    run.info.recipe = "bf16";
    const std::string path = run.save(folder.path(), 7);
    EXPECT_EQ(load_checkpoint_info(path).recipe, "bf16");
    EXPECT_EQ(names_in(folder.path()), (Names{".step_notes", "step_000007"}));
}

// The two renames where folders cannot be exchanged, and a crash between them.
TEST(Checkpoint, AReplacedOneComesBackAfterACrash) {
    const TempFolder folder;
    TinyRun run;
    run.save(folder.path(), 6);
    run.save(folder.path(), 7);
    fs::rename(folder / "step_000007", folder / ".step_000007.replaced");
    EXPECT_EQ(find_latest(folder.path()), folder / "step_000007");
    EXPECT_EQ(names_in(folder.path()), (Names{"step_000006", "step_000007"}));
    fs::rename(folder / "step_000007", folder / ".step_000007.replaced");
    run.save(folder.path(), 8);  // cleans up what a crash left, but not the only checkpoint of a step
    EXPECT_EQ(names_in(folder.path()), (Names{"step_000006", "step_000007", "step_000008"}));
}

TEST(Checkpoint, RecentStepsAreKept) {
    const TempFolder folder;
    TinyRun run;
    run.state.recent = {{120, 1.5f, 0.1f}, {122, 3e-45f, 3.4e38f}};
    const Checkpoint c = load_checkpoint(run.save(folder.path(), 123), run.list, run.model);
    ASSERT_EQ(c.state.recent.size(), 2u);
    EXPECT_EQ(c.state.recent[1].step, 122);
    EXPECT_EQ(c.state.recent[1].loss, 3e-45f);
    EXPECT_EQ(c.state.recent[1].grad_norm, 3.4e38f);
}

TEST(Checkpoint, FailedSaveLeavesNoFolder) {
    const TempFolder folder;
    TinyRun run;
    write_file(folder / "file", "");
    EXPECT_NE(error_of([&] { run.save(folder / "file", 1); }), "");
    write_file(folder / ".step_000002.replaced.txt", "");
    write_file(folder / "step_000002", "a file in the way is moved, not lost silently");
    run.save(folder.path(), 2);
    EXPECT_TRUE(fs::is_directory(folder / "step_000002"));
    run.state.v.pop_back();
    EXPECT_NE(error_of([&] { run.save(folder.path(), 3); }), "");
    EXPECT_FALSE(fs::exists(folder / "step_000003"));
}

// The limit lets params.safetensors through and stops adam.safetensors in its middle, as a full disk would.
TEST(Checkpoint, ASaveThatFailsHalfwayLeavesTheOldOne) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 7);
    const TrainState saved = run.state;
    for (float& x : run.state.params) x += 1;
    {
        const FileSizeLimit limit(700000);
        for (const int64_t step : {7, 8}) EXPECT_NE(error_of([&] { run.save(folder.path(), step); }).find("adam.safetensors"), std::string::npos);
    }
    EXPECT_EQ(names_in(folder.path()), (Names{"step_000007"}));
    EXPECT_EQ(error_of([&] { verify_checkpoint(path, CheckpointFiles::all); }), "");
    EXPECT_TRUE(same_bits(load_checkpoint(path, run.list, run.model).state.params, saved.params));
}

TEST(Checkpoint, AnotherModelIsAnError) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 1);
    ModelSpec other = run.model;
    other.n_heads = 8;  // the same tensors, another model
    const std::string text = error_of([&] { load_checkpoint(path, run.list, other); });
    EXPECT_NE(text.find("n-heads is 4, this run's is 8"), std::string::npos) << text;
    other = run.model, other.name = "renamed";
    EXPECT_EQ(error_of([&] { load_checkpoint(path, run.list, other); }), "");
}

// Writes params.safetensors anew with the list's tensors after `change` and fixes the recorded size.
template <typename Change>
void rewrite_params(const std::string& path, const TinyRun& run, Change&& change) {
    std::vector<std::pair<std::string, std::vector<int64_t>>> tensors;
    {
        const SafetensorsReader reader(path + "/params.safetensors");
        for (const TensorEntry& t : reader.tensors()) tensors.emplace_back(t.name, t.shape);
    }
    change(tensors);
    SafetensorsWriter writer(path + "/params.safetensors", tensors);
    for (const auto& [name, shape] : tensors) {
        size_t n = 1;
        for (const int64_t size : shape) n *= size_t(size);
        writer.append(name, std::span(run.state.params).first(n));
    }
    writer.publish();
    nlohmann::json info = nlohmann::json::parse(read_file(path + "/checkpoint.json"));
    info.erase("checksum"), info.erase("checksums");
    info["files"]["params.safetensors"] = fs::file_size(path + "/params.safetensors");
    write_file(path + "/checkpoint.json", info.dump());
}

TEST(Checkpoint, MismatchedTensorsAreNamed) {
    const TempFolder folder;
    TinyRun run;
    const auto error_after = [&](auto&& change) {
        const std::string path = run.save(folder.path(), 1);
        rewrite_params(path, run, change);
        return error_of([&] { load_checkpoint(path, run.list, run.model); });
    };
    std::string text = error_after([](auto&) {});
    EXPECT_EQ(text, "");
    text = error_after([](auto& tensors) { tensors.pop_back(); });
    EXPECT_NE(text.find("tensor transformer.ln_f.bias: is missing; expected shape (64)"), std::string::npos) << text;
    text = error_after([](auto& tensors) { tensors.push_back({"extra", {2, 2}}); });
    EXPECT_NE(text.find("tensor extra of shape (2, 2)"), std::string::npos) << text;
    text = error_after([](auto& tensors) { std::swap(tensors[0].second[0], tensors[0].second[1]); });
    EXPECT_NE(text.find("tensor transformer.wte.weight: shape (64, 257), must be (257, 64)"), std::string::npos) << text;
}

TEST(Checkpoint, DamagedInfoIsAnError) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 1), file = path + "/checkpoint.json", good = read_file(file);
    const auto error_with = [&](const char* key, const nlohmann::json& value) {
        nlohmann::json info = nlohmann::json::parse(good);
        info[key] = value;
        write_file(file, info.dump());
        return error_of([&] { load_checkpoint(path, run.list, run.model); });
    };
    EXPECT_NE(error_with("format_version", 99).find("format version 99"), std::string::npos);
    EXPECT_NE(error_with("step", "three"), "");
    EXPECT_NE(error_with("adam_t", -1), "");
    EXPECT_NE(error_with("model", 3), "");
    // Conversions that the JSON library would make silently, or without defined result.
    EXPECT_NE(error_with("step", 1e300).find("step must be a whole number"), std::string::npos);
    EXPECT_NE(error_with("step", 1.5), "");
    EXPECT_NE(error_with("seed", -1), "");
    EXPECT_NE(error_with("saved_ns", UINT64_MAX), "");
    EXPECT_NE(error_with("files", {{"params.safetensors", true}}), "");
    EXPECT_NE(error_with("files", nlohmann::json::object()), "");
    for (size_t size = 0; size < good.size() - 2; size += 37) {
        write_file(file, good.substr(0, size));
        EXPECT_NE(error_of([&] { load_checkpoint(path, run.list, run.model); }), "") << size;
    }
    EXPECT_NE(error_of([&] { load_checkpoint(folder / "none", run.list, run.model); }).find("no complete checkpoint"),
              std::string::npos);
}

TEST(Checkpoint, AnyDamagedByteIsNoticed) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 1);
    EXPECT_TRUE(verify_checkpoint(path, CheckpointFiles::all));
    std::mt19937 random(7);
    for (const std::string name : {"checkpoint.json", "params.safetensors", "adam.safetensors"}) {
        const std::string file = path + "/" + name, good = read_file(file);
        std::vector<size_t> places;  // of the text all, of tensors the header and some
        for (size_t at = 0; at < std::min<size_t>(good.size(), 9000); ++at) places.push_back(at);
        for (int i = 0; i < 100; ++i) places.push_back(random() % good.size());
        if (name != "checkpoint.json") std::shuffle(places.begin(), places.end(), random), places.resize(60), places.push_back(good.size() - 1);
        for (const size_t at : places) {
            std::string bad = good;
            bad[at] = char(bad[at] ^ (1 << random() % 8));
            write_file(file, bad);
            const std::string error = error_of([&] { verify_checkpoint(path, CheckpointFiles::all); });
            EXPECT_NE(error.find(name), std::string::npos) << "byte " << at << " of " << name << ": \"" << error << "\"";
            EXPECT_EQ(error.find('\n'), std::string::npos) << error;
        }
        write_file(file, good);
    }
    EXPECT_EQ(error_of([&] { verify_checkpoint(path, CheckpointFiles::all); }), "");
}

TEST(Checkpoint, WithoutChecksumsIsAnOlderOne) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = run.save(folder.path(), 1), file = path + "/checkpoint.json";
    nlohmann::json info = nlohmann::json::parse(read_file(file));
    for (const char* one : {"checksum", "checksums"}) {  // not both: damaged
        nlohmann::json without = info;
        without.erase(one);
        write_file(file, without.dump());
        EXPECT_NE(error_of([&] { verify_checkpoint(path, CheckpointFiles::all); }).find("damaged"), std::string::npos);
    }
    info.erase("checksum"), info.erase("checksums");
    write_file(file, info.dump());
    EXPECT_FALSE(verify_checkpoint(path, CheckpointFiles::all));
    EXPECT_TRUE(same_bits(load_checkpoint(path, run.list, run.model).state.params, run.state.params));
}

TEST(Checkpoint, TheLatestIntactOneIsFoundAndTheDamagedAreNamed) {
    const TempFolder folder;
    TinyRun run;
    for (const int64_t step : {2, 4, 6, 8}) run.save(folder.path(), step);
    LatestIntact latest = find_latest_intact(folder.path());
    EXPECT_EQ(latest.path, folder / "step_000008");
    EXPECT_TRUE(latest.damaged.empty() && latest.verified);
    const auto damage = [&](const std::string& name) {
        std::string bytes = read_file(folder / name);
        bytes[bytes.size() / 2] ^= 4;
        write_file(folder / name, bytes);
    };
    damage("step_000008/adam.safetensors");
    damage("step_000006/checkpoint.json");
    damage("step_000002/params.safetensors");  // older than the one that is found: nobody asks
    latest = find_latest_intact(folder.path());
    EXPECT_EQ(latest.path, folder / "step_000004");
    ASSERT_EQ(latest.damaged.size(), 2u);
    EXPECT_NE(latest.damaged[0].find("step_000008/adam.safetensors"), std::string::npos) << latest.damaged[0];
    EXPECT_NE(latest.damaged[1].find("step_000006/checkpoint.json"), std::string::npos) << latest.damaged[1];
    damage("step_000004/params.safetensors");
    latest = find_latest_intact(folder.path());
    EXPECT_EQ(latest.path, "");
    EXPECT_EQ(latest.damaged.size(), 4u);
}

TEST(Checksum, PartsAddUpAndPlacesCount) {
    std::vector<float> values(5000);
    std::mt19937 random(3);
    for (float& value : values) value = float(random()) * 1e-9f;
    const std::span<const float> all(values);
    const uint64_t whole = checksum(all);
    for (const size_t cut : {size_t(0), size_t(1), size_t(1023), size_t(1024), size_t(3000), size_t(5000)})
        EXPECT_EQ(checksum(all.first(cut)) + checksum(all.subspan(cut), int64_t(cut)), whole) << cut;
    EXPECT_NE(checksum(all, 1), whole);
    for (const auto& [a, b] : {std::pair(0, 1), std::pair(5, 1029), std::pair(1023, 1024), std::pair(0, 4999)}) {
        std::swap(values[size_t(a)], values[size_t(b)]);
        EXPECT_NE(checksum(all), whole) << a << ", " << b;
        std::swap(values[size_t(a)], values[size_t(b)]);
    }
    EXPECT_NE(checksum_of_bytes("abc"), checksum_of_bytes(std::string_view("abc\0", 4)));
    uint64_t parsed = 0;
    EXPECT_TRUE(parse_checksum(format_checksum(whole), parsed) && parsed == whole);
    for (const char* text : {"", "123", "0123456789abcdeg", "-123456789abcdef", "0123456789abcdef0"}) EXPECT_FALSE(parse_checksum(text, parsed)) << text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters alone

struct NamedTensor {
    std::string name;
    std::vector<int64_t> shape;
    std::vector<float> values;
};

// The tensors of the run as the original gpt2 file has them: no prefix, mask buffers in between.
std::vector<NamedTensor> original_gpt2_tensors(const TinyRun& run) {
    std::vector<NamedTensor> tensors;
    for (const Parameter& p : run.list.all) {
        std::vector<float> values(size_t(p.count()));
        to_file_layout(p, run.state.params.data() + p.offset, values.data());
        std::vector<int64_t> shape{p.cols};
        if (!p.is_vector) shape = p.file_transposed ? std::vector<int64_t>{p.cols, p.rows} : std::vector<int64_t>{p.rows, p.cols};
        tensors.push_back({p.name.substr(std::strlen("transformer.")), shape, values});
    }
    tensors.push_back({"h.0.attn.bias", {1, 1, 2, 2}, {1, 0, 1, 1}});
    tensors.push_back({"h.0.attn.masked_bias", {}, {-1e4f}});
    return tensors;
}

void write_tensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
    std::vector<std::pair<std::string, std::vector<int64_t>>> list;
    for (const NamedTensor& t : tensors) list.emplace_back(t.name, t.shape);
    SafetensorsWriter writer(path, list);
    for (const NamedTensor& t : tensors) writer.append(t.name, t.values);
    writer.publish();
}

TEST(LoadParams, FromEveryKindOfFolderAndFile) {
    const TempFolder folder;
    TinyRun run;
    const std::string checkpoint = run.save(folder.path(), 1);
    EXPECT_TRUE(same_bits(load_params_only(checkpoint, run.list), run.state.params));
    EXPECT_TRUE(same_bits(load_params_only(checkpoint + "/params.safetensors", run.list), run.state.params));
    write_tensors(folder / "model.safetensors", original_gpt2_tensors(run));
    EXPECT_TRUE(same_bits(load_params_only(folder.path(), run.list), run.state.params));
    fs::create_directory(folder / "empty");
    EXPECT_NE(error_of([&] { load_params_only(folder / "empty", run.list); }).find("model.safetensors"), std::string::npos);
}

TEST(LoadParams, AHeadMustBeTheEmbedding) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = folder / "model.safetensors";
    std::vector<NamedTensor> tensors = original_gpt2_tensors(run);
    tensors.push_back({"lm_head.weight", tensors[0].shape, tensors[0].values});
    write_tensors(path, tensors);
    EXPECT_TRUE(same_bits(load_params_only(path, run.list), run.state.params));
    tensors.back().values[100] += 1;
    write_tensors(path, tensors);
    EXPECT_NE(error_of([&] { load_params_only(path, run.list); }).find("lm_head.weight: differs"), std::string::npos);
}

TEST(LoadParams, MismatchedTensorsAreNamed) {
    const TempFolder folder;
    TinyRun run;
    const std::string path = folder / "model.safetensors";
    const auto error_with = [&](const std::vector<NamedTensor>& tensors) {
        write_tensors(path, tensors);
        return error_of([&] { load_params_only(path, run.list); });
    };
    const std::vector<NamedTensor> good = original_gpt2_tensors(run);
    std::vector<NamedTensor> tensors = good;
    tensors.push_back({"h.2.ln_1.weight", {64}, std::vector<float>(64)});
    EXPECT_NE(error_with(tensors).find("tensor h.2.ln_1.weight of shape (64)"), std::string::npos);
    tensors = good, tensors.erase(tensors.begin() + 1);
    EXPECT_NE(error_with(tensors).find("tensor transformer.wpe.weight: is missing"), std::string::npos);
    tensors = good, tensors[1].shape = {32, 128};
    EXPECT_NE(error_with(tensors).find("tensor wpe.weight: shape (32, 128), must be (64, 64)"), std::string::npos);
    tensors = good, tensors.push_back({"transformer.wpe.weight", tensors[1].shape, tensors[1].values});
    EXPECT_NE(error_with(tensors).find("with and without"), std::string::npos);
}

}  // namespace
