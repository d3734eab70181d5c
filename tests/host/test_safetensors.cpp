#include "trainer/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "tests/host/safetensors_values.h"
#include "tests/host/temp_folder.h"

namespace {

namespace fs = std::filesystem;

std::string safetensors_text(const std::string& header, const std::string& data) {
    const uint64_t size = header.size();
    return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + header + data;
}

TEST(Safetensors, WhatIsWrittenIsRead) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    SafetensorsWriter writer(path, {{"b", {2, 3}}, {"a", {1}}, {"none", {0, 4}}, {"scalar", {}}});
    const std::vector<float> b = {1, -2, 3.5f, INFINITY, -0.0f, 1e-45f}, a = {7};
    writer.append("b", b);
    writer.append("a", a);
    writer.append("none", {});
    writer.append("scalar", a);
    EXPECT_FALSE(fs::exists(path));
    writer.publish();
    EXPECT_FALSE(fs::exists(path + ".tmp"));
    const SafetensorsReader reader(path);
    EXPECT_EQ(reader.tensors().size(), 4u);
    EXPECT_EQ(std::memcmp(read_all(reader, "b").data(), b.data(), b.size() * sizeof(float)), 0);
    EXPECT_EQ(read_all(reader, "scalar"), a);
    EXPECT_EQ(reader.find("b")->shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(reader.find("c"), nullptr);
    EXPECT_EQ(reader.metadata().at("format"), "pt");
    uint64_t header_bytes;
    std::memcpy(&header_bytes, read_file(path).data(), sizeof(header_bytes));
    EXPECT_EQ(header_bytes % 8, 0u);
}

TEST(Safetensors, ElementsCanBeWrittenInAnyOrder) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    SafetensorsWriter writer(path, {{"b", {2, 3}}, {"a", {2}}});
    const std::vector<float> values = {1, 2, 3, 4};
    writer.write("a", 1, std::span(values).first(1));
    writer.write("b", 2, values);
    writer.write("a", 0, std::span(values).last(1));
    EXPECT_NE(error_of([&] { writer.publish(); }).find("6 of 8 elements"), std::string::npos);
    EXPECT_NE(error_of([&] { writer.write("b", 3, values); }).find("elements 3 to 7 of 6"), std::string::npos);
    EXPECT_NE(error_of([&] { writer.write("c", 0, values); }).find("not of the list"), std::string::npos);
    writer.write("b", 0, std::span(values).last(2));
    writer.publish();
    const SafetensorsReader reader(path);
    EXPECT_EQ(read_all(reader, "a"), (std::vector<float>{4, 1}));
    EXPECT_EQ(read_all(reader, "b"), (std::vector<float>{3, 4, 1, 2, 3, 4}));
    EXPECT_EQ(fs::file_size(path), writer.file_bytes());
}

TEST(Safetensors, AnUnfinishedWriterLeavesNothing) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    const std::vector<float> one = {1}, two = {1, 2};
    {
        SafetensorsWriter writer(path, {{"a", {1}}, {"b", {1}}});
        EXPECT_NE(error_of([&] { writer.append("b", one); }), "");
        EXPECT_NE(error_of([&] { writer.append("a", two); }), "");
        writer.append("a", one);
        EXPECT_NE(error_of([&] { writer.publish(); }), "");
    }
    EXPECT_TRUE(fs::is_empty(folder.path()));
    EXPECT_NE(error_of([&] { SafetensorsWriter(folder / "no/folder", {}); }), "");
    EXPECT_NE(error_of([&] { SafetensorsWriter(path, {{"a", {1}}, {"a", {1}}}); }), "");
}

TEST(Safetensors, Bf16ReadsAsFloat) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    // 1, -2.5 and infinity; one byte in front makes the data unaligned
    const std::string data("z\x80\x3f\x20\xc0\x80\x7f", 7);
    write_file(path, safetensors_text(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                      R"("h":{"dtype":"BF16","shape":[3],"data_offsets":[1,7]}})", data));
    const SafetensorsReader reader(path);
    EXPECT_EQ(read_all(reader, "h"), (std::vector<float>{1, -2.5f, INFINITY}));
    EXPECT_NE(error_of([&] { read_all(reader, "a"); }).find("tensor a: is of type U8, must be F32 or BF16"), std::string::npos);
}

TEST(Safetensors, DamagedHeadersAreErrors) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    const std::string data(16, '\0');
    const auto entry = [](const std::string& fields) { return "{\"t\":{" + fields + "}}"; };
    const std::string bad_headers[] = {
        "", "[", "[]", "1", "{\"t\":1}", std::string(100000, '['), "{\"__metadata__\":3}",
        "{\"__metadata__\":{\"a\":1}}",
        "{}",  // covers none of the data
        entry(R"("dtype":"F32","shape":[4])"),
        entry(R"("dtype":"F32","data_offsets":[0,16])"),
        entry(R"("shape":[4],"data_offsets":[0,16])"),
        entry(R"("dtype":7,"shape":[4],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":4,"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[4],"data_offsets":[0,16,16])"),
        entry(R"("dtype":"F32","shape":[4.0],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[-4],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[4],"data_offsets":[-16,0])"),
        entry(R"("dtype":"F32","shape":[4],"data_offsets":[16,0])"),
        entry(R"("dtype":"F32","shape":[5],"data_offsets":[0,20])"),
        entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,12])"),  // does not cover the data
        entry(R"("dtype":"F32","shape":[3],"data_offsets":[4,16])"),
        entry(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])"),
        entry(R"("dtype":"F32","shape":[2305843009213693953,2],"data_offsets":[0,16])"),
        entry(R"("dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,18446744073709551615])"),
        R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"u":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
    };
    for (const std::string& header : bad_headers) {
        write_file(path, safetensors_text(header, data));
        const std::string text = error_of([&] { SafetensorsReader reader(path); });
        EXPECT_NE(text.find(path), std::string::npos) << header.substr(0, 200) << ": " << text;
        EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
}

TEST(Safetensors, DamagedFilesAreErrors) {
    const TempFolder folder;
    const std::string path = folder / "x.safetensors";
    const auto error_of_file = [&](const std::string& text) {
        write_file(path, text);
        return error_of([&] { SafetensorsReader reader(path); });
    };
    const std::string good =
        safetensors_text(R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", std::string(16, 'x'));
    EXPECT_EQ(error_of_file(good), "");
    for (size_t size = 0; size < good.size(); ++size) EXPECT_NE(error_of_file(good.substr(0, size)), "") << size;
    EXPECT_NE(error_of_file(good + "x"), "");
    EXPECT_NE(error_of_file(std::string(8, '\xff') + good), "");  // a header of 2^64 - 1 bytes
    EXPECT_NE(error_of([&] { SafetensorsReader reader(folder.path()); }).find("not a regular file"), std::string::npos);
    EXPECT_NE(error_of([&] { SafetensorsReader reader(folder / "none"); }).find("cannot open"), std::string::npos);

    // Random damage: an Error or a file whose every tensor can be read. The sanitizers see the rest.
    std::mt19937 random(1);
    for (int round = 0; round < 500; ++round) {
        std::string text = good;
        for (int hits = 0; hits < 3; ++hits) text[random() % text.size()] = char(random() % 256);
        write_file(path, text);
        error_of([&] {
            const SafetensorsReader reader(path);
            for (const TensorEntry& tensor : reader.tensors()) read_all(reader, tensor.name);
        });
    }
}

}  // namespace
