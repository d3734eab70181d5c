#include "trainer/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/distributed/shard.h"
#include "trainer/safetensors.h"

namespace fs = std::filesystem;

namespace {

using Json = nlohmann::ordered_json;
using ll = long long;

constexpr int kFormatVersion = 1;
constexpr const char* kParamsFile = "params.safetensors";
constexpr const char* kAdamFile = "adam.safetensors";
constexpr const char* kInfoFile = "checkpoint.json";

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
// checkpoint.json

struct Header {
    CheckpointInfo info;
    int64_t step, adam_t, skipped_steps;
    int64_t saved_ns;  // since 1970
    std::vector<RecentStep> recent;
    std::map<std::string, uint64_t> files;  // sizes
};

Json model_json(const ModelSpec& m) {
    return {{"name", m.name},       {"n_layers", m.n_layers},     {"dim", m.dim},        {"n_heads", m.n_heads},
            {"ffn_dim", m.ffn_dim}, {"vocab_size", m.vocab_size}, {"seq_len", m.seq_len}};
}

Json header_json(const Header& h) {
    Json json;
    json["format_version"] = kFormatVersion;
    json["step"] = h.step;
    json["adam_t"] = h.adam_t;
    json["skipped_steps"] = h.skipped_steps;
    json["saved_ns"] = h.saved_ns;
    json["recent"] = Json::array();  // [step, loss, norm]
    for (const RecentStep& r : h.recent) json["recent"].push_back({r.step, r.loss, r.grad_norm});
    json["model"] = model_json(h.info.model);
    json["recipe"] = h.info.recipe;
    json["seed"] = h.info.seed;
    json["tokens_per_step"] = h.info.tokens_per_step;
    json["samples_per_epoch"] = h.info.samples_per_epoch;
    json["tokenizer"] = h.info.tokenizer;
    json["config"] = h.info.config_toml;
    json["gemm_choices"] = h.info.gemm_choices;
    json["files"] = h.files;
    return json;
}

// The JSON library converts any number to any type, which is undefined for 1e30 and wrong for -1 or 1.5.
template <typename Integer>
Integer whole_number(const Json& value, const std::string& what) {
    const bool fits = value.is_number_unsigned() ? std::in_range<Integer>(value.get<uint64_t>())
                                                 : value.is_number_integer() && std::in_range<Integer>(value.get<int64_t>());
    if (!fits) throw Json::type_error::create(302, what + " must be a whole number of " + std::to_string(sizeof(Integer)) + " bytes", &value);
    return value.get<Integer>();
}

// The member `key` of an object as a number of the type that is asked for.
class WholeNumber {
  public:
    WholeNumber(const Json& object, const char* key) : value_(object.at(key)), key_(key) {}
    template <typename Integer>
    operator Integer() const {
        return whole_number<Integer>(value_, key_);
    }

  private:
    const Json& value_;
    const char* key_;
};

ModelSpec parse_model(const Json& m) {
    return {.name = m.at("name"), .n_layers = WholeNumber(m, "n_layers"), .dim = WholeNumber(m, "dim"),
            .n_heads = WholeNumber(m, "n_heads"), .ffn_dim = WholeNumber(m, "ffn_dim"),
            .vocab_size = WholeNumber(m, "vocab_size"), .seq_len = WholeNumber(m, "seq_len")};
}

// Throws Error if the checkpoint is not complete.
Header read_header(const std::string& folder) {
    const std::string path = folder + "/" + kInfoFile;
    std::ifstream in(path);
    REQUIRE(in, "%s: no complete checkpoint: cannot open %s: %s", folder.c_str(), kInfoFile, std::strerror(errno));
    Header h;
    try {
        const Json json = Json::parse(in);
        const int version = WholeNumber(json, "format_version");
        REQUIRE(version == kFormatVersion, "%s: checkpoint of format version %d, must be %d", path.c_str(), version,
                kFormatVersion);
        h.step = WholeNumber(json, "step"), h.adam_t = WholeNumber(json, "adam_t");
        h.skipped_steps = WholeNumber(json, "skipped_steps"), h.saved_ns = WholeNumber(json, "saved_ns");
        for (const Json& r : json.value("recent", Json::array()))
            h.recent.push_back({whole_number<int64_t>(r.at(0), "recent step"), r.at(1), r.at(2)});
        h.info = {.model = parse_model(json.at("model")), .recipe = json.at("recipe"), .seed = WholeNumber(json, "seed"),
                  .tokens_per_step = WholeNumber(json, "tokens_per_step"),
                  .samples_per_epoch = WholeNumber(json, "samples_per_epoch"), .tokenizer = json.value("tokenizer", "unknown"),
                  .config_toml = json.at("config"),
                  .gemm_choices = json.at("gemm_choices")};
        if (!json.at("files").is_object()) throw Json::type_error::create(302, "files must be an object", &json);
        for (const auto& [name, bytes] : json.at("files").items()) h.files[name] = whole_number<uint64_t>(bytes, name);
    } catch (const nlohmann::json::exception& error) {
        throw Error(message("%s: damaged: %s", path.c_str(), error.what()));
    }
    REQUIRE(h.step >= 0 && h.adam_t >= 0 && h.skipped_steps >= 0, "%s: step %lld, adam_t %lld, skipped_steps %lld: must be at "
            "least 0", path.c_str(), ll(h.step), ll(h.adam_t), ll(h.skipped_steps));
    for (const char* name : {kParamsFile, kAdamFile}) {
        const std::string file = folder + "/" + name;
        REQUIRE(h.files.contains(name), "%s: damaged: files has no %s", path.c_str(), name);
        std::error_code error;
        const uint64_t size = fs::file_size(file, error);
        REQUIRE(!error, "%s: no complete checkpoint: %s", file.c_str(), error.message().c_str());
        REQUIRE(size == h.files[name], "%s: %llu bytes, but %s says %llu", file.c_str(), (unsigned long long)size, kInfoFile,
                (unsigned long long)h.files[name]);
    }
    return h;
}

struct Found {
    std::string name;
    int64_t saved_ns, step;
};

// Complete checkpoints, the last saved first.
std::vector<Found> complete_checkpoints(const std::string& out_dir) {
    std::vector<Found> found;
    std::error_code missing;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir, missing)) {
        const std::string name = entry.path().filename().string();
        if (!is_checkpoint_name(name)) continue;
        try {
            const Header header = read_header(entry.path().string());
            found.push_back({name, header.saved_ns, header.step});
        } catch (const Error&) {
            // Not complete: not a checkpoint. load_checkpoint says why when it is named.
        }
    }
    std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
        return std::pair(a.saved_ns, a.step) > std::pair(b.saved_ns, b.step);
    });
    return found;
}

void require_same_model(const std::string& path, const ModelSpec& found, const ModelSpec& expected) {
    static const std::pair<const char*, int ModelSpec::*> kFields[] = {
        {"n-layers", &ModelSpec::n_layers}, {"dim", &ModelSpec::dim},
        {"n-heads", &ModelSpec::n_heads},   {"ffn-dim", &ModelSpec::ffn_dim},
        {"vocab-size", &ModelSpec::vocab_size}, {"seq-len", &ModelSpec::seq_len},
    };
    for (const auto& [name, field] : kFields)
        REQUIRE(found.*field == expected.*field, "--resume %s: checkpoint of another model: its %s is %d, this run's is %d",
                path.c_str(), name, found.*field, expected.*field);
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

void write_parts(const std::string& path, const ParameterList& list, const std::vector<Part>& parts) {
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
}

void read_tensor(const SafetensorsReader& reader, const TensorEntry& tensor, const Parameter& p, float* flat) {
    REQUIRE(tensor.shape == file_shape(p), "%s: tensor %s: shape %s, must be %s", reader.path().c_str(), tensor.name.c_str(),
            format_shape(tensor.shape).c_str(), format_shape(file_shape(p)).c_str());
    std::vector<float> values(size_t(p.count()));
    reader.read(tensor, values.data());
    from_file_layout(p, values.data(), flat);
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
        std::vector<float> whole;
        for (const HeldPiece& piece : held.pieces) {
            const Parameter& p = list[piece.parameter];
            const TensorEntry& tensor = *reader.find(part.prefix + p.name);
            float* to = part.flat->data() + piece.offset;
            if (piece.count == p.padded_count()) {
                read_tensor(reader, tensor, p, to);
                continue;
            }
            whole.resize(size_t(p.padded_count()));
            read_tensor(reader, tensor, p, whole.data());
            std::copy_n(whole.begin() + piece.first, piece.count, to);
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

// The last file: with it the folder is a checkpoint.
void write_info(const std::string& folder, const CheckpointInfo& info, const TrainState& state) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    Header header{.info = info, .step = state.step, .adam_t = state.adam_t, .skipped_steps = state.skipped_steps,
                  .saved_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count(),
                  .recent = state.recent, .files = {}};
    for (const char* file : {kParamsFile, kAdamFile}) header.files[file] = fs::file_size(folder + "/" + file);
    write_text_file(folder + "/" + kInfoFile, header_json(header).dump(2, ' ', false, Json::error_handler_t::replace));
    sync_folder(folder);
}

void write_folder(const std::string& folder, const CheckpointInfo& info, const ParameterList& list, const TrainState& state) {
    write_parts(folder + "/" + kParamsFile, list, {{"", &state.params}});
    write_parts(folder + "/" + kAdamFile, list, {{"adam.m.", &state.m}, {"adam.v.", &state.v}});
    write_info(folder, info, state);
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

int64_t write_part(const std::string& out_dir, const ParameterList& list, const Held& held, const PartOfRank& part, const TrainState& state) {
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
    return params.end_part() + adam.end_part();
}

std::string complete_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list, const TrainState& state, int64_t elements) {
    const std::string name = message("step_%06lld", ll(state.step)), folder = hidden_folder(out_dir, state.step);
    REQUIRE(elements == 3 * list.published_count(), "checkpoint of step %lld: the ranks wrote %lld elements of %lld", ll(state.step), ll(elements),
            ll(3 * list.published_count()));
    for (const char* file : {kParamsFile, kAdamFile}) rename_path(folder + "/" + file + ".tmp", folder + "/" + file);
    write_info(folder, info, state);
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

CheckpointInfo load_checkpoint_info(const std::string& path) { return read_header(path).info; }

Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model) {
    Held everything{.pieces = {}, .elements = list.flat_elements, .unit_offsets = {}, .rest_offset = list.cleared_from};
    for (size_t i = 0; i < list.all.size(); ++i)
        everything.pieces.push_back({.parameter = int(i), .first = 0, .count = list.all[i].padded_count(), .offset = list.all[i].offset});
    return load_checkpoint(path, list, model, everything);
}

Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model, const Held& held) {
    const Header header = read_header(path);
    require_same_model(path, header.info.model, model);
    Checkpoint c{.info = header.info, .state = {}};
    read_parts(path + "/" + kParamsFile, list, held, {{"", &c.state.params}});
    read_parts(path + "/" + kAdamFile, list, held, {{"adam.m.", &c.state.m}, {"adam.v.", &c.state.v}});
    c.state.step = header.step, c.state.adam_t = header.adam_t, c.state.skipped_steps = header.skipped_steps;
    c.state.recent = header.recent;
    return c;
}

std::vector<float> load_params_only(const std::string& path, const ParameterList& list) {
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
    std::vector<float> params(size_t(list.flat_elements), 0.0f);
    for (const Parameter& p : list.all) {
        const auto found = by_name.find(p.name);
        REQUIRE(found != by_name.end(), "%s: tensor %s: is missing; expected shape %s", reader.path().c_str(), p.name.c_str(),
                format_shape(file_shape(p)).c_str());
        read_tensor(reader, *found->second, p, params.data() + p.offset);
        if (head && &p == &list[list.wte]) require_tied(reader, *head, *found->second);
        by_name.erase(found);
    }
    for (const auto& [name, tensor] : by_name)
        throw Error(message("%s: tensor %s of shape %s: this model has none of that name", reader.path().c_str(),
                            tensor->name.c_str(), format_shape(tensor->shape).c_str()));
    return params;
}
