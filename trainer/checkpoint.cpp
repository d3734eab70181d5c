// Writing checkpoints: by one rank, or by all of them together.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <sstream>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/checkpoint_folders.h"
#include "trainer/checkpoint_header.h"
#include "trainer/checksum.h"
#include "trainer/distributed/shard.h"
#include "trainer/safetensors.h"

namespace fs = std::filesystem;

namespace {

using ll = long long;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors. A `Part` is one flat array under a prefix of names: "" for parameters, "adam.m." and "adam.v."

struct Part {
    std::string prefix;
    const std::vector<float>* flat;
};

std::vector<std::pair<std::string, std::vector<int64_t>>> tensors_of(const ParameterList& list, const std::vector<std::string>& prefixes) {
    std::vector<std::pair<std::string, std::vector<int64_t>>> tensors;
    for (const std::string& prefix : prefixes)
        for (const Parameter& p : list.all) tensors.emplace_back(prefix + p.name, file_shape(p));
    return tensors;
}

// What the writer summed, in the order of the file.
std::vector<uint64_t> write_parts(const std::string& path, const ParameterList& list, const std::vector<Part>& parts) {
    std::vector<std::string> prefixes;
    for (const Part& part : parts) prefixes.push_back(part.prefix);
    SafetensorsWriter writer(path, tensors_of(list, prefixes));
    std::vector<float> file_values;
    for (const Part& part : parts) {
        for (const Parameter& p : list.all) {
            const float* values;
            if (part.flat->empty()) {  // moments before the first step
                file_values.assign(size_t(p.count()), 0.0f);
                values = file_values.data();
            } else if (p.file_transposed) {
                file_values.resize(size_t(p.count()));
                to_file_layout(p, part.flat->data() + p.offset, file_values.data());
                values = file_values.data();
            } else {
                values = part.flat->data() + p.offset;
            }
            writer.append(part.prefix + p.name, {values, size_t(p.count())});
        }
    }
    writer.publish();
    return writer.checksums();
}

// Elements [begin, end) of a parameter in memory; `values` begins with the first of them.
void write_elements(SafetensorsWriter& writer, const std::string& name, const Parameter& p, const Range& range, const float* values) {
    if (!p.file_transposed) return writer.write(name, range.begin, {values, size_t(range.size())});
    // Memory is (out, in), the file (in, out): of every `in`, the outs between two bounds.
    std::vector<float> run;
    for (int64_t in = 0; in < p.cols; ++in) {
        const int64_t first = std::max<int64_t>(0, range.begin - in + p.cols - 1) / p.cols, last = (range.end - in + p.cols - 1) / p.cols;
        if (first >= last) continue;
        run.clear();
        for (int64_t out = first; out < last; ++out) run.push_back(values[out * p.cols + in - range.begin]);
        writer.write(name, in * p.rows + first, run);
    }
}

void write_text_file(const std::string& path, const std::string& text) {
    std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "w"), std::fclose);
    REQUIRE(file, "%s: cannot create: %s", path.c_str(), std::strerror(errno));
    const bool ok = std::fwrite(text.data(), 1, text.size(), file.get()) == text.size() && std::fflush(file.get()) == 0 &&
                    fsync(fileno(file.get())) == 0;
    REQUIRE(ok, "%s: cannot write: %s", path.c_str(), std::strerror(errno));
}

// The last file: with it the folder is a checkpoint. `checksums` are of the tensors of both files.
void write_info(const std::string& folder, const CheckpointInfo& info, const TrainState& state, const std::vector<uint64_t>& checksums) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    CheckpointHeader header{.info = info, .step = state.step, .adam_t = state.adam_t, .skipped_steps = state.skipped_steps,
                            .saved_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count(),
                            .recent = state.recent, .files = {}, .checksums = {}};
    auto next = checksums.begin();
    for (const char* file : {kParamsFile, kAdamFile}) {
        const SafetensorsReader reader(folder + "/" + file);
        header.files[file] = fs::file_size(reader.path());
        std::vector<uint64_t>& of_file = header.checksums[file];
        of_file.push_back(checksum_of_bytes(reader.header()));
        const auto end = next + ptrdiff_t(reader.tensors().size());
        of_file.insert(of_file.end(), next, end);
        next = end;
    }
    write_text_file(folder + "/" + kInfoFile, header_text(header));
    sync_folder(folder);
}

void write_folder(const std::string& folder, const CheckpointInfo& info, const ParameterList& list, const TrainState& state) {
    std::vector<uint64_t> checksums = write_parts(folder + "/" + kParamsFile, list, {{"", &state.params}});
    const std::vector<uint64_t> of_moments = write_parts(folder + "/" + kAdamFile, list, {{"adam.m.", &state.m}, {"adam.v.", &state.v}});
    checksums.insert(checksums.end(), of_moments.begin(), of_moments.end());
    write_info(folder, info, state, checksums);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

std::string save_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list,
                            const TrainState& state) {
    for (const std::vector<float>* flat : {&state.params, &state.m, &state.v})
        REQUIRE(flat->size() == size_t(list.flat_elements) || (flat != &state.params && flat->empty()),
                "save_checkpoint: flat array of %zu elements, must be %lld", flat->size(), ll(list.flat_elements));
    const std::string name = message("step_%06lld", ll(state.step)), path = out_dir + "/" + name, temporary = hidden_folder(out_dir, state.step);
    try {
        fs::create_directories(out_dir);
        remove_leftovers(out_dir);
        require_space(out_dir, 3 * sizeof(float) * uint64_t(list.published_count()));
        fs::create_directory(temporary);
        write_folder(temporary, info, list, state);
        publish_folder(out_dir, name);
    } catch (const std::exception& error) {
        std::error_code ignored;  // a full disk gets its space back
        fs::remove_all(temporary, ignored);
        throw Error(message("checkpoint of step %lld: %s", ll(state.step), error.what()));
    }
    return path;
}

void begin_checkpoint(const std::string& out_dir, const ParameterList& list, int64_t step) {
    const std::string folder = hidden_folder(out_dir, step);
    fs::create_directories(out_dir);
    remove_leftovers(out_dir);
    require_space(out_dir, 3 * sizeof(float) * uint64_t(list.published_count()));
    fs::create_directory(folder);
    SafetensorsWriter(folder + "/" + kParamsFile, tensors_of(list, {""}), SafetensorsWriter::Share::begin).end_part();
    SafetensorsWriter(folder + "/" + kAdamFile, tensors_of(list, {"adam.m.", "adam.v."}), SafetensorsWriter::Share::begin).end_part();
}

WrittenPart& WrittenPart::operator+=(const WrittenPart& other) {
    elements += other.elements;
    checksums.resize(std::max(checksums.size(), other.checksums.size()));
    for (size_t i = 0; i < other.checksums.size(); ++i) checksums[i] += other.checksums[i];
    return *this;
}

std::string format_part(const WrittenPart& part) {
    std::string text = std::to_string(part.elements);
    for (const uint64_t sum : part.checksums) (text += ' ') += format_checksum(sum);
    return text;
}

WrittenPart parse_part(const std::string& text) {
    std::istringstream words(text);
    WrittenPart part;
    bool valid = bool(words >> part.elements);
    for (std::string word; words >> word;) valid = valid && parse_checksum(word, part.checksums.emplace_back());
    REQUIRE(valid, "checkpoint: a rank's part is \"%.60s\"", text.c_str());
    return part;
}

WrittenPart write_part(const std::string& out_dir, const ParameterList& list, const Held& held, const PartOfRank& part, const TrainState& state) {
    const std::string folder = hidden_folder(out_dir, state.step);
    SafetensorsWriter params(folder + "/" + kParamsFile, tensors_of(list, {""}), SafetensorsWriter::Share::join);
    SafetensorsWriter adam(folder + "/" + kAdamFile, tensors_of(list, {"adam.m.", "adam.v."}), SafetensorsWriter::Share::join);
    struct File {
        SafetensorsWriter& writer;
        std::string prefix;
        const std::vector<float>& flat;
    };
    const File files[] = {{params, "", state.params}, {adam, "adam.m.", state.m}, {adam, "adam.v.", state.v}};
    for (const HeldPiece& piece : held.pieces) {
        const Parameter& p = list[piece.parameter];
        const Range share = p.gemm_gradient ? even_part(piece.count, part.replica, part.replicas) : even_part(piece.count, part.rank, part.ranks);
        const Range range = intersection({piece.first + share.begin, piece.first + share.end}, {0, p.count()});  // no padding rows
        if (range.size() == 0) continue;
        for (const File& f : files) write_elements(f.writer, f.prefix + p.name, p, range, f.flat.data() + piece.offset + range.begin - piece.first);
    }
    WrittenPart written{.elements = params.end_part() + adam.end_part(), .checksums = params.checksums()};
    const std::vector<uint64_t> of_moments = adam.checksums();
    written.checksums.insert(written.checksums.end(), of_moments.begin(), of_moments.end());
    return written;
}

std::string complete_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list, const TrainState& state,
                                const WrittenPart& whole) {
    const std::string name = message("step_%06lld", ll(state.step)), folder = hidden_folder(out_dir, state.step);
    REQUIRE(whole.elements == 3 * list.published_count() && whole.checksums.size() == 3 * list.all.size(), "checkpoint of step %lld: the ranks wrote %lld elements of %lld",
            ll(state.step), ll(whole.elements), ll(3 * list.published_count()));
    for (const char* file : {kParamsFile, kAdamFile}) rename_path(folder + "/" + file + ".tmp", folder + "/" + file);
    write_info(folder, info, state, whole.checksums);
    publish_folder(out_dir, name);
    return out_dir + "/" + name;
}

void abandon_checkpoint(const std::string& out_dir, int64_t step) {
    std::error_code ignored;
    fs::remove_all(hidden_folder(out_dir, step), ignored);
}
