#include "trainer/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/checkpoint_header.h"
#include "trainer/checksum.h"
#include "trainer/distributed/shard.h"
#include "trainer/safetensors.h"

namespace fs = std::filesystem;

namespace {

using ll = long long;

// ---------------------------------------------------------------------------------------------------------------------
// Files and folders

// A renamed file is on the disk only once its folder is.
void sync_folder(const std::string& path) {
    const int folder = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    REQUIRE(folder >= 0, "%s: cannot open: %s", path.c_str(), std::strerror(errno));
    const int status = fsync(folder);
    const int error = errno;
    close(folder);
    // Some network file systems can't sync a folder and say EINVAL.
    REQUIRE(status == 0 || error == EINVAL, "%s: cannot sync: %s", path.c_str(), std::strerror(error));
}

void write_text_file(const std::string& path, const std::string& text) {
    std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "w"), std::fclose);
    REQUIRE(file, "%s: cannot create: %s", path.c_str(), std::strerror(errno));
    const bool ok = std::fwrite(text.data(), 1, text.size(), file.get()) == text.size() && std::fflush(file.get()) == 0 &&
                    fsync(fileno(file.get())) == 0;
    REQUIRE(ok, "%s: cannot write: %s", path.c_str(), std::strerror(errno));
}

// A full disk is better found before the last byte of it is taken.
void require_space(const std::string& folder, uint64_t bytes) {
    std::error_code unknown;
    const fs::space_info space = fs::space(folder, unknown);
    REQUIRE(unknown || space.available >= bytes, "%s: needs %.1f MiB of disk, %.1f MiB are free", folder.c_str(),
            double(bytes) / (1 << 20), double(space.available) / (1 << 20));
}

void rename_path(const std::string& from, const std::string& to) {
    REQUIRE(std::rename(from.c_str(), to.c_str()) == 0, "%s: cannot rename to %s: %s", from.c_str(), to.c_str(),
            std::strerror(errno));
}

// Hidden first, so that a crash halfway never leaves a part of a checkpoint under its real name.
void remove_checkpoint(const std::string& out_dir, const std::string& name) {
    const std::string hidden = out_dir + "/." + name + ".deleted";
    fs::remove_all(hidden);
    rename_path(out_dir + "/" + name, hidden);
    fs::remove_all(hidden);
}

bool is_checkpoint_name(const std::string& name) {
    return name.starts_with("step_") && name.size() > 5 && name.find_first_not_of("0123456789", 5) == std::string::npos;
}

// Where two folders cannot be exchanged, replacing one is two renames. After a crash between them, the old one comes back.
void restore_replaced(const std::string& out_dir) {
    const std::string ending = ".replaced";
    std::error_code error;
    std::vector<std::string> names;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir, error)) {
        const std::string name = entry.path().filename().string();
        if (name.starts_with(".") && name.ends_with(ending)) names.push_back(name.substr(1, name.size() - 1 - ending.size()));
    }
    for (const std::string& name : names)
        if (is_checkpoint_name(name) && !fs::exists(out_dir + "/" + name, error))
            fs::rename(out_dir + "/." + name + ending, out_dir + "/" + name, error);  // in a folder that is read-only it stays hidden
}

// What a crash left: ".step_000123.tmp", ".replaced" or ".deleted".
void remove_leftovers(const std::string& out_dir) {
    restore_replaced(out_dir);
    std::vector<fs::path> leftovers;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir)) {
        const std::string name = entry.path().filename().string();
        const size_t dot = name.rfind('.');
        if (!name.starts_with(".") || dot == 0 || !is_checkpoint_name(name.substr(1, dot - 1))) continue;
        const std::string ending = name.substr(dot);
        if (ending == ".tmp" || ending == ".replaced" || ending == ".deleted") leftovers.push_back(entry.path());
    }
    for (const fs::path& path : leftovers) fs::remove_all(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Which checkpoints there are

struct Found {
    std::string name;
    int64_t saved_ns, step;
};

// Complete checkpoints, the last saved first. Of those that are none, why, with their step.
std::vector<Found> complete_checkpoints(const std::string& out_dir, std::vector<std::pair<int64_t, std::string>>* incomplete = nullptr) {
    std::vector<Found> found;
    std::error_code missing;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir, missing)) {
        const std::string name = entry.path().filename().string();
        if (!is_checkpoint_name(name)) continue;
        try {
            const CheckpointHeader header = read_header(entry.path().string());
            found.push_back({name, header.saved_ns, header.step});
        } catch (const Error& error) {
            if (incomplete) incomplete->emplace_back(std::strtoll(name.c_str() + std::strlen("step_"), nullptr, 10), error.what());
        }
    }
    std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
        return std::pair(a.saved_ns, a.step) > std::pair(b.saved_ns, b.step);
    });
    return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors. A `Part` is one flat array under a prefix of names: "" for parameters, "adam.m." and "adam.v."

std::vector<int64_t> file_shape(const Parameter& p) {
    if (p.is_vector) return {p.cols};
    if (p.file_transposed) return {p.cols, p.rows};
    return {p.rows, p.cols};
}

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

void read_tensor(const SafetensorsReader& reader, const TensorEntry& tensor, const Parameter& p, float* flat) {
    REQUIRE(tensor.shape == file_shape(p), "%s: tensor %s: shape %s, must be %s", reader.path().c_str(), tensor.name.c_str(),
            format_shape(tensor.shape).c_str(), format_shape(file_shape(p)).c_str());
    std::vector<float> values(size_t(p.count()));
    reader.read(tensor, values.data());
    from_file_layout(p, values.data(), flat);
}

void read_piece(const SafetensorsReader& reader, const TensorEntry& tensor, const Parameter& p, const HeldPiece& piece, float* flat) {
    float* to = flat + piece.offset;
    if (piece.count == p.padded_count()) return read_tensor(reader, tensor, p, to);
    std::vector<float> whole(size_t(p.padded_count()));
    read_tensor(reader, tensor, p, whole.data());
    std::copy_n(whole.begin() + piece.first, piece.count, to);
}

// At the places of the list.
Held everything(const ParameterList& list) {
    Held held{.pieces = {}, .elements = list.flat_elements, .unit_offsets = {}, .rest_offset = list.cleared_from};
    for (size_t i = 0; i < list.all.size(); ++i)
        held.pieces.push_back({.parameter = int(i), .first = 0, .count = list.all[i].padded_count(), .offset = list.all[i].offset});
    return held;
}

struct Destination {
    std::string prefix;
    std::vector<float>* flat;
};

void read_parts(const std::string& path, const ParameterList& list, const Held& held, const std::vector<Destination>& parts) {
    const SafetensorsReader reader(path);
    std::set<std::string> known;
    for (const Destination& part : parts) {
        for (const Parameter& p : list.all) {
            const TensorEntry* tensor = reader.find(part.prefix + p.name);
            REQUIRE(tensor, "%s: tensor %s: is missing; expected shape %s", path.c_str(), (part.prefix + p.name).c_str(), format_shape(file_shape(p)).c_str());
            known.insert(part.prefix + p.name);
        }
        part.flat->assign(size_t(held.elements), 0.0f);
        for (const HeldPiece& piece : held.pieces) {
            const Parameter& p = list[piece.parameter];
            read_piece(reader, *reader.find(part.prefix + p.name), p, piece, part.flat->data());
        }
    }
    for (const TensorEntry& tensor : reader.tensors())
        REQUIRE(known.contains(tensor.name), "%s: tensor %s of shape %s: this model has none of that name", path.c_str(),
                tensor.name.c_str(), format_shape(tensor.shape).c_str());
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

std::string hidden_folder(const std::string& out_dir, int64_t step) { return message("%s/.step_%06lld.tmp", out_dir.c_str(), ll(step)); }

// ---------------------------------------------------------------------------------------------------------------------
// Hugging Face files

bool is_mask_buffer(const std::string& name) { return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"); }

std::string find_params_file(const std::string& path) {
    if (!fs::is_directory(path)) return path;
    for (const char* name : {kParamsFile, "model.safetensors"})
        if (fs::exists(path + "/" + name)) return path + "/" + name;
    throw Error(message("%s: holds neither %s nor model.safetensors", path.c_str(), kParamsFile));
}

// Published files may repeat the tied matrix as the head. A head of its own would be a different model.
void require_tied(const SafetensorsReader& reader, const TensorEntry& head, const TensorEntry& embedding) {
    const auto a = reader.bytes(head), b = reader.bytes(embedding);
    REQUIRE(head.dtype == embedding.dtype && std::equal(a.begin(), a.end(), b.begin(), b.end()),
            "%s: tensor %s: differs from %s; a head must be tied to the embedding", reader.path().c_str(), head.name.c_str(),
            embedding.name.c_str());
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

// From its hidden name to its real one. A checkpoint of that step, if there is one, is there until the new one is.
void publish_folder(const std::string& out_dir, const std::string& name) {
    const std::string path = out_dir + "/" + name, temporary = out_dir + "/." + name + ".tmp", replaced = out_dir + "/." + name + ".replaced";
    if (!fs::exists(path)) {
        rename_path(temporary, path);
    } else if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) != 0) {  // not on every file system
        rename_path(path, replaced);
        rename_path(temporary, path);
    }
    sync_folder(out_dir);
    fs::remove_all(replaced);
    fs::remove_all(temporary);  // the old one, if they were exchanged
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

std::string save_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list,
                            const TrainState& state) {
    for (const std::vector<float>* flat : {&state.params, &state.m, &state.v})
        REQUIRE(flat->size() == size_t(list.flat_elements) || (flat != &state.params && flat->empty()),
                "save_checkpoint: flat array of %zu elements, must be %lld", flat->size(), ll(list.flat_elements));
    const std::string name = message("step_%06lld", ll(state.step)), path = out_dir + "/" + name;
    const std::string temporary = out_dir + "/." + name + ".tmp";
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

void prune_checkpoints(const std::string& out_dir, int keep) {
    if (keep <= 0) return;
    const std::vector<Found> found = complete_checkpoints(out_dir);
    try {
        for (size_t i = size_t(keep); i < found.size(); ++i) remove_checkpoint(out_dir, found[i].name);
    } catch (const fs::filesystem_error& error) {
        throw Error(message("--out %s: %s", out_dir.c_str(), error.what()));
    }
}

std::string find_latest(const std::string& out_dir) {
    restore_replaced(out_dir);
    const std::vector<Found> found = complete_checkpoints(out_dir);
    return found.empty() ? "" : out_dir + "/" + found.front().name;
}

LatestIntact find_latest_intact(const std::string& out_dir) {
    restore_replaced(out_dir);
    LatestIntact latest;
    std::vector<std::pair<int64_t, std::string>> incomplete;
    int64_t step = -1;
    for (const Found& found : complete_checkpoints(out_dir, &incomplete)) try {
        const std::string path = out_dir + "/" + found.name;
        latest.verified = verify_checkpoint(path, CheckpointFiles::all);
        latest.path = path, step = found.step;
        break;
    } catch (const Error& error) {
        latest.damaged.push_back(error.what());
    }
    for (const auto& [at, problem] : incomplete)
        if (at > step) latest.damaged.push_back(problem);
    return latest;
}

void require_same_model(const std::string& whose, const ModelSpec& found, const ModelSpec& expected) {
    static const std::pair<const char*, int ModelSpec::*> kFields[] = {
        {"n-layers", &ModelSpec::n_layers}, {"dim", &ModelSpec::dim},
        {"n-heads", &ModelSpec::n_heads},   {"ffn-dim", &ModelSpec::ffn_dim},
        {"vocab-size", &ModelSpec::vocab_size}, {"seq-len", &ModelSpec::seq_len},
    };
    for (const auto& [name, field] : kFields)
        REQUIRE(found.*field == expected.*field, "%s: checkpoint of another model: its %s is %d, this run's is %d",
                whose.c_str(), name, found.*field, expected.*field);
}

CheckpointInfo load_checkpoint_info(const std::string& path) { return read_header(path).info; }

Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model) {
    return load_checkpoint(path, list, model, everything(list));
}

Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model, const Held& held) {
    const CheckpointHeader header = read_header(path);
    require_same_model("--resume " + path, header.info.model, model);
    Checkpoint c{.info = header.info, .state = {}};
    read_parts(path + "/" + kParamsFile, list, held, {{"", &c.state.params}});
    read_parts(path + "/" + kAdamFile, list, held, {{"adam.m.", &c.state.m}, {"adam.v.", &c.state.v}});
    c.state.step = header.step, c.state.adam_t = header.adam_t, c.state.skipped_steps = header.skipped_steps;
    c.state.recent = header.recent;
    return c;
}

std::vector<float> load_params_only(const std::string& path, const ParameterList& list) { return load_params_only(path, list, everything(list)); }

std::vector<float> load_params_only(const std::string& path, const ParameterList& list, const Held& held) {
    const SafetensorsReader reader(find_params_file(path));
    const std::string prefix = "transformer.";
    std::map<std::string, const TensorEntry*> by_name;
    const TensorEntry* head = nullptr;
    for (const TensorEntry& tensor : reader.tensors()) {
        if (is_mask_buffer(tensor.name)) continue;
        if (tensor.name == "lm_head.weight") {
            head = &tensor;
            continue;
        }
        const std::string name = tensor.name.starts_with(prefix) ? tensor.name : prefix + tensor.name;
        REQUIRE(by_name.emplace(name, &tensor).second, "%s: tensor %s: is there with and without \"%s\"",
                reader.path().c_str(), name.c_str(), prefix.c_str());
    }
    std::vector<float> params(size_t(held.elements), 0.0f);
    std::vector<const TensorEntry*> tensors;
    for (const Parameter& p : list.all) {
        const auto found = by_name.find(p.name);
        REQUIRE(found != by_name.end(), "%s: tensor %s: is missing; expected shape %s", reader.path().c_str(), p.name.c_str(),
                format_shape(file_shape(p)).c_str());
        tensors.push_back(found->second);
        if (head && &p == &list[list.wte]) require_tied(reader, *head, *found->second);
        by_name.erase(found);
    }
    for (const auto& [name, tensor] : by_name)
        throw Error(message("%s: tensor %s of shape %s: this model has none of that name", reader.path().c_str(),
                            tensor->name.c_str(), format_shape(tensor->shape).c_str()));
    for (const HeldPiece& piece : held.pieces) read_piece(reader, *tensors[size_t(piece.parameter)], list[piece.parameter], piece, params.data());
    return params;
}
