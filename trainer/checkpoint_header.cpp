#include "trainer/checkpoint_header.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/checksum.h"
#include "trainer/plain_file.h"

namespace fs = std::filesystem;

namespace {

using Json = nlohmann::ordered_json;
using ll = long long;

constexpr int kFormatVersion = 1;

Json model_json(const ModelSpec& m) {
    return {{"name", m.name},       {"n_layers", m.n_layers},     {"dim", m.dim},        {"n_heads", m.n_heads},
            {"ffn_dim", m.ffn_dim}, {"vocab_size", m.vocab_size}, {"seq_len", m.seq_len}};
}

Json header_json(const CheckpointHeader& h) {
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
    json["data_hash"] = h.info.data_hash;
    json["tokenizer"] = h.info.tokenizer;
    json["config"] = h.info.config_toml;
    json["gemm_choices"] = h.info.gemm_choices;
    json["files"] = h.files;
    for (const auto& [file, sums] : h.checksums)
        for (const uint64_t sum : sums) json["checksums"][file].push_back(format_checksum(sum));
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

// Puts the last member behind an object's text, which lacks its end.
std::string sealed(const std::string& text) {
    return text + ",\n  \"checksum\": \"" + format_checksum(checksum_of_bytes(text)) + "\"\n}";
}

bool is_sealed(const std::string& text) {
    static const size_t kSeal = sealed("").size();
    return text.size() >= kSeal && sealed(text.substr(0, text.size() - kSeal)) == text;
}

std::map<std::string, std::vector<uint64_t>> parse_checksums(const Json& json) {
    std::map<std::string, std::vector<uint64_t>> checksums;
    for (const char* file : {kParamsFile, kAdamFile})
        for (const Json& text : json.at(file)) {
            const bool valid = text.is_string() && parse_checksum(text.get_ref<const std::string&>(), checksums[file].emplace_back());
            if (!valid) throw Json::type_error::create(302, "a checksum must be 16 hexadecimal digits", &text);
        }
    return checksums;
}

CheckpointHeader parse_header(const std::string& path, const std::string& text) {
    CheckpointHeader h;
    const Json json = Json::parse(text);
    const int version = WholeNumber(json, "format_version");
    REQUIRE(version == kFormatVersion, "%s: checkpoint of format version %d, must be %d", path.c_str(), version,
            kFormatVersion);
    h.step = WholeNumber(json, "step"), h.adam_t = WholeNumber(json, "adam_t");
    h.skipped_steps = WholeNumber(json, "skipped_steps"), h.saved_ns = WholeNumber(json, "saved_ns");
    for (const Json& r : json.value("recent", Json::array()))
        h.recent.push_back({whole_number<int64_t>(r.at(0), "recent step"), r.at(1), r.at(2)});
    h.info = {.model = parse_model(json.at("model")), .recipe = json.at("recipe"), .seed = WholeNumber(json, "seed"),
              .tokens_per_step = WholeNumber(json, "tokens_per_step"),
              .samples_per_epoch = WholeNumber(json, "samples_per_epoch"),
              .data_hash = json.contains("data_hash") ? WholeNumber(json, "data_hash") : uint64_t(0), .tokenizer = json.value("tokenizer", "unknown"),
              .config_toml = json.at("config"),
              .gemm_choices = json.at("gemm_choices")};
    if (!json.at("files").is_object()) throw Json::type_error::create(302, "files must be an object", &json);
    for (const auto& [name, bytes] : json.at("files").items()) h.files[name] = whole_number<uint64_t>(bytes, name);
    if (json.contains("checksums") || json.contains("checksum")) {  // one letter of damage does not hide both
        h.checksums = parse_checksums(json.at("checksums"));
        REQUIRE(is_sealed(text), "%s: damaged: it does not have the checksum that is in it", path.c_str());
    }
    return h;
}

}  // namespace

std::vector<int64_t> file_shape(const Parameter& p) {
    if (p.is_vector) return {p.cols};
    if (p.file_transposed) return {p.cols, p.rows};
    return {p.rows, p.cols};
}

std::string header_text(const CheckpointHeader& header) {
    std::string text = header_json(header).dump(2, ' ', false, Json::error_handler_t::replace);
    text.resize(text.size() - 2);  // line feed and brace
    return sealed(text);
}

CheckpointHeader read_header(const std::string& folder) {
    const std::string path = folder + "/" + kInfoFile;
    require_plain_file(path);
    std::ifstream in(path, std::ios::binary);
    REQUIRE(in, "%s: no complete checkpoint: cannot open %s: %s", folder.c_str(), kInfoFile, std::strerror(errno));
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    CheckpointHeader h;
    try {
        h = parse_header(path, text);
    } catch (const nlohmann::json::exception& error) {
        throw Error(message("%s: damaged: %s", path.c_str(), error.what()));
    }
    REQUIRE(h.step >= 0 && h.adam_t >= 0 && h.skipped_steps >= 0, "%s: step %lld, adam_t %lld, skipped_steps %lld: must be at "
            "least 0", path.c_str(), ll(h.step), ll(h.adam_t), ll(h.skipped_steps));
    for (const char* name : {kParamsFile, kAdamFile}) {
        const std::string file = folder + "/" + name;
        REQUIRE(h.files.contains(name), "%s: damaged: files has no %s", path.c_str(), name);
        require_plain_file(file);
        std::error_code error;
        const uint64_t size = fs::file_size(file, error);
        REQUIRE(!error, "%s: no complete checkpoint: %s", file.c_str(), error.message().c_str());
        REQUIRE(size == h.files[name], "%s: %llu bytes, but %s says %llu", file.c_str(), (unsigned long long)size, kInfoFile,
                (unsigned long long)h.files[name]);
    }
    return h;
}
