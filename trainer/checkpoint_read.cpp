// Reading a checkpoint or the files of others: whole, or what a rank holds.
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/checkpoint_header.h"
#include "trainer/safetensors.h"

namespace fs = std::filesystem;

namespace {

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

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

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
